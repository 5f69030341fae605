"""The relay: carries outbox rows to the broker. At least once, in order per subject, never marked unless confirmed.

    connect, unless connected → claim (one short transaction) → publish and confirm (no transaction)
    → mark (guarded by the claim's token)

Where it may die, and who recovers:

- before the claim commits: nothing happened;
- claimed, not published: the lease ends and any relay claims the row again;
- published, not marked: the same, and the message is sent twice with the same id; the inbox absorbs it;
- frozen past its lease and awake again: its token no longer matches, so its mark changes nothing;
- told to end (SIGTERM): it finishes its batch, or is cut short and gives the rows back as they were.

An outage is not poison. When the broker cannot be reached, the relay claims nothing and backs off. What a batch did not
get confirmed in its share of the lease is given back as it was; the next batch is only as large as what was confirmed,
and grows again by doubling. Only what the broker says about one row spends that row's attempts: a nack, or a return (no
queue took it). Too many, and the row is parked with its reason until an operator decides.
"""

import asyncio
import enum
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol
from uuid import UUID, uuid4

import structlog

from app import db
from app.errors import BrokerUnavailable, DatabaseUnavailable, Unavailable
from app.loops import full_jitter
from app.messaging import outbox
from app.messaging.envelope import Envelope
from app.observability.metrics import Metrics

log = structlog.get_logger(__name__)

LEASE_SHARE = 0.9  # of the lease is for publishing, the rest for recording what became of it
RELEASE_WAIT_SECONDS = 1.0  # for the pool: the rows come back by themselves when their lease ends


@dataclass(frozen=True, slots=True)
class Refusal:
    """What the transport said about one message. `returned`: no queue took it. `final`: trying again cannot help."""

    reason: str
    returned: bool = False
    final: bool = False


class _Unknown(enum.Enum):
    UNCONFIRMED = "unconfirmed"


UNCONFIRMED = _Unknown.UNCONFIRMED  # not sent, or sent and not answered: it may be sent again, under the same id
Answer = Refusal | Literal[_Unknown.UNCONFIRMED] | None  # about one message; None: confirmed


class Transport(Protocol):
    """Where the relay publishes to."""

    async def ready(self) -> None:
        """Connect, unless connected. Raises Unavailable when nothing can be published."""

    async def publish(self, envelopes: Sequence[Envelope], seconds: float) -> Sequence[Answer]:
        """Publish for up to `seconds`; nothing may be sent later. Raises Unavailable when all would be unconfirmed."""


class Relay:
    """One relay. Any number may run, in one process or in many."""

    def __init__(
        self,
        pool: db.Pool,
        transport: Transport,
        metrics: Metrics,
        *,
        batch_size: int,
        lease_seconds: float,
        backoff_base_seconds: float,
        backoff_cap_seconds: float,
        max_attempts: int,
        checkpoint: Callable[[str], None],
    ) -> None:
        self._pool = pool
        self._transport = transport
        self._metrics = metrics
        self._batch_size = self._limit = batch_size  # the limit adapts to what the transport carries
        self._lease_seconds = lease_seconds
        self._backoff = (backoff_base_seconds, backoff_cap_seconds)
        self._max_attempts = max_attempts
        self._checkpoint = checkpoint
        self._outage: BrokerUnavailable | None = None

    def check(self) -> None:
        """Raise BrokerUnavailable if the last batch could not be published, or the broker not be reached for it."""
        if self._outage is not None:
            raise self._outage

    async def run_once(self) -> int:
        """Carry one batch. Returns how many rows were claimed; raises Unavailable while the broker is down."""
        try:
            carried = await self._carry()
        except BrokerUnavailable as error:
            self._outage, self._limit = error, 1
            raise
        self._outage = None
        return carried

    async def _carry(self) -> int:
        await self._transport.ready()  # before there is a lease that connecting could use up
        token, began_at = uuid4(), time.monotonic()
        async with db.connection(self._pool) as conn:
            claimed = await outbox.claim(conn, token, self._limit, self._lease_seconds)
        if not claimed:
            return 0
        self._checkpoint("relay.claimed")
        seconds = self._lease_seconds * LEASE_SHARE - (time.monotonic() - began_at)
        try:
            answers = await self._transport.publish([row.envelope for row in claimed], seconds)
        except asyncio.CancelledError:  # this process is ending: another relay need not wait for the lease
            await self._release(token, claimed)
            raise
        except Unavailable:
            self._metrics.outbox_publish_failed.inc(len(claimed))
            await self._release(token, claimed)
            raise
        self._checkpoint("relay.published")
        await self._record(token, claimed, answers)
        return len(claimed)

    async def _record(self, token: UUID, claimed: Sequence[outbox.Claimed], answers: Sequence[Answer]) -> None:
        judged = [
            (row, answer, self._verdict(row, answer))
            for row, answer in zip(claimed, answers, strict=True)
            if answer is not UNCONFIRMED
        ]
        if judged:
            async with db.connection(self._pool) as conn:
                ours = await outbox.settle(conn, token, [verdict for _, _, verdict in judged])
            self._tell(judged, ours)
        if len(judged) == len(claimed):
            self._limit = min(self._batch_size, self._limit * 2)
        else:
            self._limit = max(1, len(judged))
            rest = [row for row, answer in zip(claimed, answers, strict=True) if answer is UNCONFIRMED]
            await self._release(token, rest)

    def _verdict(self, row: outbox.Claimed, refusal: Refusal | None) -> outbox.Verdict:
        if refusal is None:
            return outbox.Verdict(row.envelope.id)
        attempt = row.attempts + 1
        park = refusal.final or attempt >= self._max_attempts
        return outbox.Verdict(row.envelope.id, refusal.reason, None if park else full_jitter(attempt, *self._backoff))

    def _tell(
        self, judged: Iterable[tuple[outbox.Claimed, Refusal | None, outbox.Verdict]], ours: Collection[UUID]
    ) -> None:
        for row, refusal, verdict in judged:
            names = {"event_id": str(verdict.id), "order_id": row.envelope.subject}
            if verdict.id not in ours:
                log.warning("relay.lease_lost", **names)
            elif refusal is None:
                self._metrics.outbox_published.inc()
            else:
                self._metrics.outbox_publish_failed.inc()
                self._metrics.outbox_returned.inc(refusal.returned)
                event = "relay.parked" if verdict.retry_in_seconds is None else "relay.refused"
                log.warning(event, **names, attempt=row.attempts + 1, reason=refusal.reason)

    async def _release(self, token: UUID, claimed: Sequence[outbox.Claimed]) -> None:
        try:
            async with db.connection(self._pool, RELEASE_WAIT_SECONDS) as conn:
                await outbox.release(conn, token, [row.envelope.id for row in claimed])
        except DatabaseUnavailable as error:
            log.warning("relay.not_released", error=str(error), until="the lease ends")
