"""What happened in the last minutes, in slots of a few seconds: orders placed and finished, latencies, the backlog.

Orders come from the outbox, whatever process placed and finished them: its ids are ordered by time, so one slot is a
range of the primary key. Each slot is read when it is over, and again with the next one, for what was committed late,
for any number of viewers. The latency of the 201 is that of this process, and the backlog is measured only while a page
shows it: Postgres has no history of these.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

from app import db
from app.orders import events
from app.orders.model import Status

SLOT_SECONDS = 5
SLOTS = 60
SETTLED_SECONDS = 1.0  # nearly every event is committed within this time after its id is made
MAX_EVENTS = 50_000  # some 50 ms; enough for slots with 2,000 orders a second, placed and finished, read twice
MAX_SAGAS = 2000  # whose duration one reading looks up

Buckets = Sequence[tuple[float, float]]  # of a histogram: upper bound in seconds, how many are not above it


@dataclass(slots=True)
class Slot:
    """A few seconds. `saga_seconds`: how long sagas took that finished here. `answers`: to orders, by this process.

    `backlog`: unfinished orders at its end. None: not measured.
    """

    placed: int = 0
    finished: int = 0
    saga_seconds: list[float] = field(default_factory=list)
    answers: Buckets | None = None
    backlog: int | None = None


class RecentHistory:
    """The last slots. `read_answers`: return the histogram of this process's 201 answers to orders, since its start.

    `max_events`: that one reading counts; if there are more, the slots before them stay unknown.
    """

    def __init__(self, read_answers: Callable[[], Buckets], max_events: int = MAX_EVENTS) -> None:
        self._read_answers = read_answers
        self._max_events = max_events
        self._answers: Buckets = ()
        self._over = 0  # slots before this number have been read
        self._slots: dict[int, Slot] = {}

    def slots(self) -> list[Slot | None]:
        """Return the last `SLOTS` slots, oldest first. None: unknown, because too much happened to count it."""
        return [self._slots.get(number) for number in range(self._over - SLOTS, self._over)]

    async def update(self, conn: db.Connection, now: datetime, backlog: int) -> None:
        """Read the slots that are over and not read yet. `now`: by Postgres's clock. `backlog`: unfinished orders."""
        over = int((now.timestamp() - SETTLED_SECONDS) // SLOT_SECONDS)
        if over <= self._over:
            return
        first = max(self._over - 1, over - SLOTS)
        read = await _read_slots(conn, first, over, self._max_events)
        answers = self._read_answers()
        if (again := self._slots.get(first)) is not None and first in read:
            read[first].answers, read[first].backlog = again.answers, again.backlog
        if (newest := read.get(over - 1)) is not None:
            newest.backlog = backlog
            newest.answers = _difference(answers, self._answers) if self._over == over - 1 else None
        self._slots = {number: slot for number, slot in (self._slots | read).items() if number >= over - SLOTS}
        self._answers, self._over = answers, over


async def _read_slots(conn: db.Connection, first: int, end: int, max_events: int) -> dict[int, Slot]:
    """Return the slots from `first` up to `end`, without the oldest ones if more than `max_events` happened."""
    bounds = [db.first_id(datetime.fromtimestamp(number * SLOT_SECONDS, UTC)) for number in (first, end)]
    counts = await conn.fetch(
        f"""
        SELECT date_bin('{SLOT_SECONDS:d} s', occurred_at, 'epoch') AS starts_at,
               count(*) FILTER (WHERE type = $3) AS placed, count(*) FILTER (WHERE type <> $3) AS finished
        FROM (
            SELECT occurred_at, type FROM outbox WHERE id >= $1 AND id < $2 ORDER BY id DESC LIMIT {max_events:d}
        ) AS happened
        GROUP BY 1
        """,  # noqa: S608 - numbers
        *bounds,
        events.PLACED,
    )
    durations = await conn.fetch(
        f"""
        SELECT date_bin('{SLOT_SECONDS:d} s', finished_at, 'epoch') AS starts_at,
               extract(epoch FROM finished_at - started_at)::float8 AS seconds
        FROM (
            SELECT subject FROM outbox WHERE id >= $1 AND id < $2 AND type = ANY($3)
            ORDER BY id DESC LIMIT {MAX_SAGAS:d}
        ) AS ended
        JOIN sagas ON sagas.id = ended.subject::uuid
        WHERE finished_at IS NOT NULL
        """,  # noqa: S608 - numbers
        *bounds,
        [name for status, name in events.TYPES.items() if status is not Status.PENDING],
    )
    is_whole = sum(row["placed"] + row["finished"] for row in counts) < max_events
    start = first if is_whole else min(_number_of(row["starts_at"]) for row in counts) + 1
    slots = {number: Slot() for number in range(start, end)}
    for row in counts:
        if (slot := slots.get(_number_of(row["starts_at"]))) is not None:
            slot.placed, slot.finished = row["placed"], row["finished"]
    for row in durations:
        if (slot := slots.get(_number_of(row["starts_at"]))) is not None:
            slot.saga_seconds.append(row["seconds"])
    return slots


def _number_of(starts_at: datetime) -> int:
    return int(starts_at.timestamp()) // SLOT_SECONDS


def percentile(values: Iterable[float], share: float) -> float | None:
    """Return the value that this share of the values does not exceed; None if there are none."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else None


def bucket_percentile(buckets: Buckets, share: float) -> float | None:
    """Estimate a percentile as Prometheus does, within its bucket; None if the histogram is empty."""
    total = buckets[-1][1] if buckets else 0
    if not total:
        return None
    rank, lower, before = share * total, 0.0, 0.0
    for bound, count in buckets:
        if count >= rank:
            return lower if math.isinf(bound) else lower + (bound - lower) * (rank - before) / (count - before)
        lower, before = bound, count
    return lower


def total(slots: Iterable[Slot | None]) -> Buckets:
    """Return the histogram of the answers in all of these slots."""
    sums: dict[float, float] = {}
    for slot in slots:
        for bound, count in (slot.answers or ()) if slot else ():
            sums[bound] = sums.get(bound, 0) + count
    return sorted(sums.items())


def _difference(later: Buckets, earlier: Buckets) -> Buckets:
    before = dict(earlier)
    return [(bound, count - before.get(bound, 0)) for bound, count in later]
