"""The relay: carries outbox rows to the broker. At least once, in order per subject, never marked unless confirmed.

    claim (one short transaction) → publish and confirm (no transaction) → mark (guarded by the claim's token)

Where it may die, and who recovers:

- before the claim commits: nothing happened;
- claimed, not published: the lease ends and any relay claims the row again;
- published, not marked: the same, and the message is sent twice with the same id; the inbox absorbs it;
- frozen past its lease and awake again: its token no longer matches, so its mark changes nothing.

An outage is not poison. When the broker cannot be reached, or a batch is not confirmed in time, the rows are given
back as they were and the whole relay backs off. Only what the broker says about one row spends that row's attempts: a
nack, or a return (no queue took it). Too many, and the row is parked with its reason until an operator decides.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol
from uuid import UUID, uuid4

import structlog

from app import db
from app.errors import DatabaseUnavailable, Unavailable
from app.loops import full_jitter
from app.messaging import outbox
from app.messaging.envelope import Envelope
from app.telemetry import Metrics

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Refusal:
    """What the transport said about one message. `returned`: no queue took it. `final`: trying again cannot help."""

    reason: str
    returned: bool = False
    final: bool = False


class Transport(Protocol):
    """Where the relay publishes to."""

    async def publish(self, envelopes: Sequence[Envelope]) -> Sequence[Refusal | None]:
        """Publish all; None for each confirmed one. Raises Unavailable when the transport itself is out."""


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
        self._batch_size = batch_size
        self._lease_seconds = lease_seconds
        self._backoff = (backoff_base_seconds, backoff_cap_seconds)
        self._max_attempts = max_attempts
        self._checkpoint = checkpoint

    async def run_once(self) -> int:
        """Carry one batch. Returns how many rows were claimed; raises Unavailable while the broker is out."""
        token = uuid4()
        async with db.connection(self._pool) as conn:
            claimed = await outbox.claim(conn, token, self._batch_size, self._lease_seconds)
        if not claimed:
            return 0
        self._checkpoint("relay.claimed")
        try:
            refusals = await self._transport.publish([row.envelope for row in claimed])
        except Unavailable:
            self._metrics.outbox_publish_failed.inc(len(claimed))
            await self._release(token, claimed)
            raise
        self._checkpoint("relay.published")
        async with db.connection(self._pool) as conn:
            await self._mark(conn, token, claimed, refusals)
        return len(claimed)

    async def _mark(
        self,
        conn: db.Connection,
        token: UUID,
        claimed: Sequence[outbox.Claimed],
        refusals: Sequence[Refusal | None],
    ) -> None:
        published = [row.envelope.id for row, refusal in zip(claimed, refusals, strict=True) if refusal is None]
        if published:
            marked = await outbox.mark_published(conn, token, published)
            self._metrics.outbox_published.inc(marked)
            if marked < len(published):
                log.warning("relay.lease_lost", rows=len(published) - marked)
        for row, refusal in zip(claimed, refusals, strict=True):
            if refusal is not None:
                await self._refuse(conn, token, row, refusal)

    async def _refuse(self, conn: db.Connection, token: UUID, row: outbox.Claimed, refusal: Refusal) -> None:
        attempt = row.attempts + 1
        park = refusal.final or attempt >= self._max_attempts
        pause = None if park else full_jitter(attempt, *self._backoff)
        if not await outbox.refuse(conn, token, row.envelope.id, refusal.reason, pause):
            log.warning("relay.lease_lost", rows=1)
            return
        self._metrics.outbox_publish_failed.inc()
        if refusal.returned:
            self._metrics.outbox_returned.inc()
        log.warning(
            "relay.parked" if park else "relay.refused",
            event_id=str(row.envelope.id),
            order_id=row.envelope.subject,
            attempt=attempt,
            reason=refusal.reason,
        )

    async def _release(self, token: UUID, claimed: Sequence[outbox.Claimed]) -> None:
        try:
            async with db.connection(self._pool) as conn:
                await outbox.release(conn, token, [row.envelope.id for row in claimed])
        except DatabaseUnavailable as error:
            log.warning("relay.not_released", error=str(error), until="the lease ends")
