"""Turn the timeline of an order into the rows of a picture: what is done, what happens now, and what is to come.

A call is one row, from its attempt to its answer, and so is an event, from its writing to its publication. Many failed
attempts of one call in a row are one row, with a bar for each. Bars are in percent of an axis that ends with the last
instant known, or a little later: if it ended now, every page that shows it would change every second.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from itertools import groupby

from app.operations.timeline import PLANNED, TimelineAnswer, TimelineEntry
from app.orders.model import FINAL, Reason, Status, rfc3339
from app.pages.templates import clock
from app.saga.steps import Action
from app.values import immutable

ATTEMPTED, DONE = "attempted", "done"  # outcomes of a call
FIRST, LAST = 1, 2  # of many failed attempts, these keep rows of their own
BARS_PERCENT = 0.5  # bars of one row that are closer look like one
NARROWEST_PERCENT = 0.6  # a bar that one can see
OPEN_PART = 0.1  # of the axis: what has not ended, after the last instant known
TICKS = 4
SHORTEST_SECONDS = 0.001  # of the axis
STEP_SECONDS = (
    *(base * 10.0**power for power in range(-3, 1) for base in (1, 2, 5)),
    *(10.0, 15.0, 30.0, 60.0, 120.0, 300.0, 600.0, 900.0, 1800.0, 3600.0),
    *(hours * 3600.0 for hours in (2, 4, 6, 12, 24, 48, 168, 720)),
)

PAUSE_ENDS = frozenset({"partner-resumed", "partner-pause-replaced"})

TITLES = {
    "order-placed": "Order placed",
    "cancel-requested": "Cancel requested",
    "event-consumed": "Event consumed",
    "saga-started": "Saga started",
    "compensation-started": "Starts to undo",
    "partner-paused": "Partner paused",
    "order-confirmed": "Confirmed",
    "order-rejected": "Rejected",
    "order-cancelled": "Cancelled",
}
WHY = {
    Reason.OUT_OF_STOCK: "too little is in stock",
    Reason.CARD_DECLINED: "the card was declined",
    Reason.UNDELIVERABLE: "shipping cannot deliver to the address",
    Reason.HOLD_EXPIRED: "the hold on its stock expired",
    Reason.TIMED_OUT: "its deadline passed",
    Reason.CANCELLED_BY_CUSTOMER: "the customer cancelled it",
    Reason.COMPENSATED_BY_OPERATOR: "an operator ended it",
}
BY = {
    Reason.CANCELLED_BY_CUSTOMER: "by the customer",
    Reason.COMPENSATED_BY_OPERATOR: "by an operator",
}
WHOM = {"broker": "the broker", "database": "Postgres", "operator": "an operator"}


@immutable
class Bar:
    """When something happened, in percent of the axis. `kind`: the outcome of a call, `waiting`, or `note`."""

    left: float
    width: float
    kind: str


@immutable
class Row:
    """A line of the picture. `state`: `done`, `failed`, `now`, `next`, `operator`, `ended`; `note` for anything else.

    `seconds`: how long it took. `until`: the end of a folded row.
    """

    id: str
    state: str
    title: str
    at: str | None = None
    seconds: float | None = None
    attempt: int | None = None
    outcome: str | None = None
    detail: str | None = None
    until: str | None = None
    bars: tuple[Bar, ...] = ()


@immutable
class Tick:
    """A mark of the axis: its place in percent, and its seconds since the first row."""

    left: float
    seconds: float


@immutable
class Picture:
    """The rows in order, and the marks of their axis."""

    rows: tuple[Row, ...]
    ticks: tuple[Tick, ...]


@immutable
class _Span:
    """What happened between two entries, or in one. `entry`: the last. `end` None: it has not ended."""

    key: str
    entry: TimelineEntry
    start: datetime
    end: datetime | None

    @property
    def call(self) -> str:
        """The call that this is an attempt of; empty: it is none."""
        return name_call(self.entry) if self.entry.step else ""

    @property
    def has_failed(self) -> bool:
        """Return whether this is an attempt with an answer other than `done`."""
        return bool(self.call) and self.entry.outcome not in {ATTEMPTED, DONE}


@immutable
class _Axis:
    start: datetime
    seconds: float

    def offset(self, at: datetime) -> float:
        """Return the seconds from the start to an instant."""
        return (at - self.start).total_seconds()

    def bar(self, start: datetime, end: datetime | None, kind: str) -> Bar:
        """Return a bar; `end` None: to the end of the axis."""
        left = min(self._percent(self.offset(start)), 100 - NARROWEST_PERCENT)
        right = 100.0 if end is None else self._percent(self.offset(end))
        return Bar(left, max(NARROWEST_PERCENT, round(right - left, 2)), kind)

    def ticks(self) -> Iterator[Tick]:
        """Return the marks at round times."""
        step = next((step for step in STEP_SECONDS if step >= self.seconds / TICKS), self.seconds / TICKS)
        for number in range(TICKS + 1):
            if number * step <= self.seconds:
                yield Tick(self._percent(number * step), number * step)

    def _percent(self, seconds: float) -> float:
        return round(min(100.0, max(0.0, 100 * seconds / self.seconds)), 2)


def draw(story: TimelineAnswer) -> Picture:
    """Return the picture of an order's timeline."""
    spans = _pair([entry for entry in story.entries if entry.at is not None])
    axis = _lay_axis(story, spans)
    present = None if story.status in FINAL else _find_present(spans)
    rows = [
        *(row for run in _fold(spans) for row in _describe(run, axis, present)),
        *_describe_wait(story, axis, spans, present),
        *(Row(entry.id, "next", name_call(entry)) for entry in story.entries if entry.outcome == PLANNED),
    ]
    return Picture(tuple(rows), tuple(axis.ticks()))


def _lay_axis(story: TimelineAnswer, spans: Sequence[_Span]) -> _Axis:
    """Return an axis over all that is known: also from when the order waits, and for when its next attempt is set."""
    stuck = story.why_stuck
    known = [] if stuck is None else [stuck.since, *filter(None, [stuck.next_attempt_at])]
    instants = [*(span.end or span.start for span in spans), *map(datetime.fromisoformat, known)]
    start = min(span.start for span in spans)
    seconds = max(SHORTEST_SECONDS, (max(instants) - start).total_seconds())
    is_open = any(span.end is None for span in spans) or (stuck is not None and stuck.next_attempt_at is None)
    return _Axis(start, seconds / (1 - OPEN_PART) if is_open else seconds)


def name_call(entry: TimelineEntry) -> str:
    """Return the name of a call: `charge_payment`, `undo charge_payment`."""
    return f"undo {entry.step}" if entry.event == Action.UNDO else str(entry.step)


def name_event(entry: TimelineEntry) -> str:
    """Return the short name of the event that an entry is about: `order.placed`."""
    return (entry.detail or "").removeprefix("orders.").removesuffix(".v1")


def explain_reason(code: str | None) -> str:
    """Return in words why an order is not confirmed; the code itself, if only a newer release knows it."""
    return "" if code is None else WHY.get(Reason(code), code)


def name_waited_for(waiting_for: str) -> str:
    """Return who an order waits for, in words."""
    return WHOM.get(waiting_for, waiting_for)


def _pair(entries: Sequence[TimelineEntry]) -> list[_Span]:
    """Pair beginnings with ends: attempt and answer, writing and publication, the pause of a partner and its end."""
    spans: dict[str, _Span] = {}
    for entry in entries:
        at = datetime.fromisoformat(entry.at or "")
        key = _key(entry)
        if (begun := spans.get(key)) is not None:
            start = begun.start if entry.seconds is None else at - timedelta(seconds=entry.seconds)
            shown = begun.entry if entry.event in PAUSE_ENDS else entry
            spans[key] = replace(begun, entry=shown, start=start, end=at)
        elif entry.outcome == ATTEMPTED or entry.event in {"event-written", "partner-paused"}:
            spans[key] = _Span(key, entry, at, None)
        else:  # also the answer to an attempt that is not among the newest entries
            spans[key] = _Span(key, entry, at - timedelta(seconds=entry.seconds or 0), at)
    return list(spans.values())


def _key(entry: TimelineEntry) -> str:
    """Return the same text for a beginning and its end. It is an HTML id, too."""
    if entry.step:
        return f"{entry.event}-{entry.step}-{entry.attempt}"
    return entry.id.replace("publish-", "event-").replace("resume-", "pause-")


def _find_present(spans: Sequence[_Span]) -> str | None:
    """Return the key of the attempt that waits for its answer, None if there is none."""
    calls = [span for span in spans if span.call]
    return calls[-1].key if calls and calls[-1].end is None else None


def _fold(spans: Sequence[_Span]) -> Iterator[list[_Span]]:
    """Return the spans of each row: one, or those in the middle of many failed attempts of one call."""
    for failed, group in groupby(spans, lambda span: span.call if span.has_failed else ""):
        run = list(group)
        middle = run[FIRST:-LAST] if failed else []
        if len(middle) > 1:
            yield from ([span] for span in run[:FIRST])
            yield middle
            yield from ([span] for span in run[-LAST:])
        else:
            yield from ([span] for span in run)


def _describe(run: Sequence[_Span], axis: _Axis, present: str | None) -> Iterator[Row]:
    first = run[0]
    if len(run) > 1:
        yield _describe_many(run, axis)
        return
    entry, is_present = first.entry, first.key == present
    row = Row(
        id=first.key,
        state="note",
        title=TITLES.get(entry.event, entry.event.capitalize()),
        at=rfc3339(first.start),
        bars=(axis.bar(first.start, first.end or (None if is_present else first.start), "note"),),
    )
    if first.call:
        yield _describe_call(first, row, axis, is_present=is_present)
    elif entry.event in {"event-written", "event-published"}:
        published = first.end is not None
        yield replace(
            row,
            title=f"Event {name_event(entry)}",
            detail=None if published else "not published yet",
            outcome="published" if published else "waiting",
            seconds=entry.seconds,
            bars=(axis.bar(first.start, first.end, "note" if published else "waiting"),),
        )
    elif entry.event == "partner-paused":
        seconds = None if first.end is None else axis.offset(first.end) - axis.offset(first.start)
        bars = (axis.bar(first.start, first.end, "waiting"),)
        yield replace(row, state="operator", detail=entry.detail, seconds=seconds, bars=bars)
    elif entry.source == "operator":
        yield replace(row, state="operator", detail=entry.detail, outcome=entry.outcome)
    elif entry.source == "order":
        state = "done" if entry.outcome == Status.CONFIRMED else "ended"
        yield replace(row, state=state, detail=explain_reason(entry.detail))
    elif entry.event == "cancel-requested" and entry.detail:
        yield replace(row, detail=BY.get(Reason(entry.detail), entry.detail))
    else:
        yield replace(row, detail=explain_reason(entry.detail))


def _describe_call(span: _Span, row: Row, axis: _Axis, *, is_present: bool) -> Row:
    entry = span.entry
    row = replace(row, title=span.call, attempt=entry.attempt, seconds=entry.seconds, detail=entry.detail)
    if entry.outcome != ATTEMPTED:
        state, kind = ("done" if entry.outcome == DONE else "failed"), entry.outcome or ""
        return replace(row, state=state, outcome=entry.outcome, bars=(axis.bar(span.start, span.end, kind),))
    if is_present:
        return replace(row, state="now", outcome="now", bars=(axis.bar(span.start, None, "now"),))
    lost = "its process stopped before it recorded an answer"
    return replace(
        row, state="failed", outcome="unknown", detail=lost, bars=(axis.bar(span.start, span.start, "unknown"),)
    )


def _describe_many(run: Sequence[_Span], axis: _Axis) -> Row:
    counts = Counter(f"{span.entry.outcome} {f'({span.entry.detail})' if span.entry.detail else ''}" for span in run)
    answers = ", ".join(f"{count} × {answer.strip()}" for answer, count in counts.most_common(3))
    bars: dict[float, Bar] = {}
    for span in run:
        bar = axis.bar(span.start, span.end, span.entry.outcome or "")
        bars.setdefault(round(bar.left / BARS_PERCENT), bar)
    last = run[-1]
    return Row(
        id=f"{run[0].key}-more",
        state="failed",
        title=f"{run[0].call}, {len(run)} more attempts",
        at=rfc3339(run[0].start),
        detail=answers,
        until=rfc3339(last.end or last.start),
        bars=tuple(bars.values()),
    )


def _describe_wait(story: TimelineAnswer, axis: _Axis, spans: Sequence[_Span], present: str | None) -> Iterator[Row]:
    """Describe what an order waits for after its last attempt."""
    stuck = story.why_stuck
    if stuck is None or present is not None:
        return
    since, next_at = datetime.fromisoformat(stuck.since), stuck.next_attempt_at
    until = None if next_at is None else datetime.fromisoformat(next_at)
    detail = f"since {clock(since)}" + (f", next attempt at {clock(until)}" if until else "")
    begins = max(since, *(span.end for span in spans if span.end is not None))
    title = f"Waits for {name_waited_for(stuck.waiting_for)}"
    yield Row("now", "now", title, detail=detail, bars=(axis.bar(begins, until, "waiting"),))
