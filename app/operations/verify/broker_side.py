"""Examine the broker and the whole outbox: I3 (lost events), I4 (second events), I6 (dead letters), I8 (backlog)."""

from collections.abc import Iterable, Iterator, Sequence

from app import db
from app.errors import BrokerUnavailable
from app.messaging import outbox, transport_lease
from app.messaging.broker import Broker
from app.messaging.topology import QueueSpec
from app.operations.verify import events
from app.operations.verify.findings import Findings, Invariant, Suspicion
from app.orders.events import PLACED
from app.values import immutable

BACKLOG_SLACK = 1.1  # each process counts the backlog every second, and lets requests in between

FOREIGN = "SELECT id, subject FROM outbox WHERE type = $1 AND id::text <> subject LIMIT $2"


@immutable
class Depths:
    """How many messages wait for consumers. None: the broker did not say, or a lost event cannot be there."""

    waiting: int | None
    is_known: bool


class BrokerSide:
    """The broker in a pass, with the queues of this service."""

    def __init__(self, broker: Broker, queues: Sequence[QueueSpec]) -> None:
        self._broker = broker
        self._queues = queues

    async def examine(self, pool: db.Pool, found: Findings) -> Depths:
        """Read the depths of all queues. Dead letters are past their age limit at once."""
        async with db.connection(pool) as conn:
            others = await transport_lease.list_live(conn) - {self._broker.name}
        if others:
            reason = f"the service uses the transport {', '.join(sorted(others))}, this pass {self._broker.name}"
            found.hinder(reason, Invariant.I3, Invariant.I6)
            return Depths(None, is_known=False)
        total = 0
        try:
            for queue in self._queues:
                waiting, dead_letters = await self._broker.read_depth(queue)
                total += waiting
                if dead_letters:
                    problem = f"{dead_letters} dead letters wait for an operator"
                    found.suspect([Suspicion(Invariant.I6, f"queue: {queue.dead_letter_queue}", problem)])
        except BrokerUnavailable as error:
            found.hinder(f"the broker: {error}", Invariant.I3, Invariant.I6)
            return Depths(None, is_known=False)
        return Depths(total if self._broker.is_shared else 0, is_known=True)


def keep_proven(suspicions: Iterable[Suspicion], depths: Depths, found: Findings) -> Iterator[Suspicion]:
    """Keep all but lost events that may still wait in a queue; these make I3 not checked."""
    for suspicion in suspicions:
        if suspicion.problem != events.LOST or (depths.is_known and not depths.waiting):
            yield suspicion
        elif depths.is_known:
            found.hinder("published events without an effect may be among the messages that wait", Invariant.I3)


async def find_foreign_events(pool: db.Pool, limit: int) -> list[Suspicion]:
    """Return orders that have a second `order.placed`: the real one has the order's own id."""
    async with db.connection(pool) as conn:
        rows = await conn.fetch(FOREIGN, PLACED, limit)
    return [Suspicion(Invariant.I4, row["subject"], f"it has a second order.placed, {row['id']}") for row in rows]


async def measure_backlog(pool: db.Pool, max_pending: int) -> list[Suspicion]:
    """Return whether more events wait than intake may let in."""
    limit = int(max_pending * BACKLOG_SLACK) + 1000
    async with db.connection(pool) as conn:
        pending = await outbox.count_pending(conn, limit + 1)
    if pending <= limit:
        return []
    return [Suspicion(Invariant.I8, "outbox: pending", f"more than {limit} events wait, the limit is {max_pending}")]
