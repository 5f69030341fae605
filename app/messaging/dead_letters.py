"""The port to dead letters: messages that could not be handled and wait for an operator.

RabbitMQ keeps them in a dead-letter queue (`rabbitmq.dead_letters`). Without a broker, they are the parked outbox rows
(`outbox_dead_letters`).
"""

from collections.abc import Collection, Sequence
from contextlib import AbstractAsyncContextManager
from datetime import datetime
from typing import Protocol

from app.values import immutable


@immutable
class DeadLetter:
    """A message that could not be handled. `number`: its place in the scan, from 1. None: unknown.

    `event_id`: the id in the inbox; None: the message is unreadable. `id`: the message's id, else the event's, else
    `-`.
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
    """One scan of the `depth` dead letters that were there when it started."""

    depth: int

    async def take(self, limit: int) -> list[DeadLetter]:
        """Return up to `limit` of the next dead letters; none at the end."""

    async def replay(self, letters: Sequence[DeadLetter]) -> None:
        """Reset the attempts of some of the letters last taken, and send them to their queue."""

    async def purge(self, letters: Sequence[DeadLetter], recorded: Collection[str]) -> None:
        """Record these event ids as purged in the inbox, then delete some of the letters last taken."""


class DeadLetterSource(Protocol):
    """Where the dead letters of one queue are."""

    async def may_be_scanned_often(self) -> bool:
        """Return False if each scan brings the letters closer to a delivery limit: only an operator may start one.

        Raises Unavailable.
        """

    def scan(self) -> AbstractAsyncContextManager[DeadLetterScan]:
        """Start a scan. Raises DeadLettersBusy while another one runs, BrokerUnavailable, DatabaseUnavailable."""
