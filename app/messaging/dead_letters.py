"""The port to dead letters: messages that could not be handled and wait for an operator.

RabbitMQ keeps them in a dead-letter queue (`rabbitmq.dead_letters`). Without a broker they are the parked rows of the
outbox (`outbox_dead_letters`).
"""

from collections.abc import Collection, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A message that could not be handled. `number`: its place in the scan, from 1. None: the message does not say.

    `event_id`: the id in the inbox; None: the message is unreadable. `id`: the message's own, else the event's, else
    `-`; the consumer gives an id to every message that it dead-letters.
    """

    number: int
    id: str
    event_id: str | None
    type: str | None
    subject: str | None
    tenant: str | None
    reason: str
    attempts: int | None
    first_failure_at: datetime | None
    last_failure_at: datetime | None


class DeadLetterScan(Protocol):
    """One scan over the dead letters that were there when it started: `depth` of them."""

    depth: int

    async def take(self, limit: int) -> list[DeadLetter]:
        """Return the next dead letters, up to `limit`; none at the end."""

    async def replay(self, letters: Sequence[DeadLetter]) -> None:
        """Give some of those last taken all their attempts again, and send them to their queue."""

    async def purge(self, letters: Sequence[DeadLetter], recorded: Collection[str]) -> None:
        """Record these event ids as purged in the inbox, then remove some of those last taken for good."""


class DeadLetterSource(Protocol):
    """Where the dead letters of one queue are."""

    async def may_be_scanned_often(self) -> bool:
        """Return False if scans use up dead letters, so that only an operator may start one. Raises Unavailable."""

    def scan(self) -> AbstractAsyncContextManager[DeadLetterScan]:
        """Start a scan. Raises DeadLettersBusy while another one runs, BrokerUnavailable, DatabaseUnavailable."""
