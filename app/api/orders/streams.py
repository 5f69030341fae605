"""The open event streams of this process: bounded, fed by one reader an order, and ended when the process stops.

A stream holds neither a database connection nor a request slot while it waits. One task reads an order's story for all
streams that follow it: at once when the order ends in this process, else every POLL_SECONDS. All these tasks together
use at most READS connections, so that requests find free ones, above all while Postgres is slow.
"""

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncGenerator, Iterator, Sequence
from uuid import UUID

import structlog
from fastapi.sse import KEEPALIVE_COMMENT, format_sse_event

from app import db
from app.errors import Overloaded, TooManyRequests, Unavailable
from app.operations import timeline
from app.operations.timeline import Position, TimelineEntry

log = structlog.get_logger(__name__)

CAPACITY = 500  # streams of a process: each costs a connection and some kilobytes
TENANT_CAPACITY = 100  # so that one tenant leaves room for others
POLL_SECONDS = 1.0
READS = 2  # stories read at the same time; a read takes about a millisecond
HEARTBEAT_SECONDS = 15.0  # proxies commonly close a connection that is silent for 60 s
RETRY_MILLISECONDS = 1000  # when a client reconnects after its process stopped; others take over at once
RETRY_AFTER_SECONDS = 5


class _Story:
    """What is known of one order, shared by the streams that follow it."""

    def __init__(self, entries: Sequence[TimelineEntry]) -> None:
        self.entries = entries
        self.changed = asyncio.Event()  # a new one after each change
        self.due = asyncio.Event()  # read again now
        self.followers = 0
        self.reader: asyncio.Task[None] | None = None

    def update(self, entries: Sequence[TimelineEntry]) -> None:
        """Wake the streams if there is anything new."""
        if [entry.id for entry in entries] != [entry.id for entry in self.entries]:
            self.entries, changed = entries, self.changed
            self.changed = asyncio.Event()
            changed.set()


class Streams:
    """The streams of this process. `consumer`: the inbox name of the saga's consumer."""

    def __init__(
        self,
        pool: db.Pool,
        consumer: str,
        *,
        capacity: int = CAPACITY,
        tenant_capacity: int = TENANT_CAPACITY,
        heartbeat_seconds: float = HEARTBEAT_SECONDS,
    ) -> None:
        self._heartbeat_seconds = heartbeat_seconds
        self._pool = pool
        self.consumer = consumer
        self._capacity = capacity
        self._tenant_capacity = tenant_capacity
        self._by_tenant: Counter[str] = Counter()
        self._stories: dict[UUID, _Story] = {}
        self._stopping = asyncio.Event()
        self._reads = asyncio.Semaphore(READS)

    @property
    def count(self) -> int:
        """Return how many streams are open."""
        return self._by_tenant.total()

    async def read(self, order_id: UUID, tenant: str) -> list[TimelineEntry]:
        """Return the story so far. Raises OrderNotFound, DatabaseUnavailable."""
        return await timeline.read_entries(self._pool, order_id, tenant, self.consumer)

    def require_room(self, tenant: str) -> None:
        """Raise Overloaded or TooManyRequests if no more streams may be opened."""
        if self._stopping.is_set() or self.count >= self._capacity:
            raise Overloaded("the process already has its maximum number of event streams")
        if self._by_tenant[tenant] >= self._tenant_capacity:
            raise TooManyRequests("too many event streams are open", RETRY_AFTER_SECONDS)

    async def follow(
        self, order_id: UUID, tenant: str, position: Position, entries: Sequence[TimelineEntry]
    ) -> AsyncGenerator[bytes, None]:
        """Yield the entries past `position` as server-sent events, until the order has ended or the process stops."""
        with self._join(order_id, tenant, entries) as story:
            while True:
                changed = story.changed
                for entry in timeline.unseen(story.entries, position):
                    position = position.after(entry)
                    yield _event(entry, position)
                if position.is_at_end:
                    return
                if self._stopping.is_set():
                    yield format_sse_event(retry=RETRY_MILLISECONDS)
                    return
                if not await self._wait(changed):
                    yield KEEPALIVE_COMMENT

    def wake(self, order_id: UUID) -> None:
        """Read an order's story now: it has changed."""
        if (story := self._stories.get(order_id)) is not None:
            story.due.set()

    def stop(self) -> None:
        """End every stream now; clients reconnect to another process."""
        self._stopping.set()
        for story in self._stories.values():
            story.changed.set()

    async def close(self) -> None:
        """Stop reading."""
        self.stop()
        readers = [story.reader for story in self._stories.values() if story.reader is not None]
        for reader in readers:
            reader.cancel()
        await asyncio.gather(*readers, return_exceptions=True)

    @contextlib.contextmanager
    def _join(self, order_id: UUID, tenant: str, entries: Sequence[TimelineEntry]) -> Iterator[_Story]:
        story = self._stories.setdefault(order_id, _Story(entries))
        story.update(entries)
        story.followers += 1
        self._by_tenant[tenant] += 1
        if story.reader is None:
            story.reader = asyncio.create_task(self._read_repeatedly(order_id, tenant, story))
        try:
            yield story
        finally:
            self._by_tenant[tenant] -= 1
            story.followers -= 1
            if not story.followers:
                story.reader.cancel()
                del self._stories[order_id]

    async def _read_repeatedly(self, order_id: UUID, tenant: str, story: _Story) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(POLL_SECONDS):
                    await story.due.wait()
            story.due.clear()
            try:
                async with self._reads:
                    story.update(await self.read(order_id, tenant))
            except Unavailable as error:  # the streams wait, with heartbeats, until Postgres is back
                log.warning("streams.stale", order_id=str(order_id), error=str(error))
            except Exception:
                log.exception("streams.failed", order_id=str(order_id))

    async def _wait(self, changed: asyncio.Event) -> bool:
        """Wait for a change. Return false if a heartbeat is due before."""
        try:
            async with asyncio.timeout(self._heartbeat_seconds):
                await changed.wait()
        except TimeoutError:
            return False
        return True


def _event(entry: TimelineEntry, position: Position) -> bytes:
    return format_sse_event(data_str=entry.model_dump_json(), event=entry.source, id=str(position))
