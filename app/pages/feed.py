"""Keep pages live: one stream for each open page, and one task that reads for all of them.

While browsers show pages, the task renders each page once in PERIOD_SECONDS for all its viewers, one page after the
other: pages use at most one connection at a time. If that takes long, as while a million events wait, it reads less
often. It sends a fragment to a stream only when its HTML has changed. A new stream gets all fragments, so a browser
that reconnects, also to another process, misses nothing.

A stream ends after STREAM_SECONDS, and the browser opens another one: so a viewer who has logged out sees no more, and
that without a memory of sessions.
"""

import asyncio
import contextlib
import json
import math
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Hashable, Iterator, Mapping

import structlog
from fastapi.sse import KEEPALIVE_COMMENT, format_sse_event
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from app.errors import OrdersError, Overloaded, TooManyRequests, Unavailable

log = structlog.get_logger(__name__)

STREAM = "stream"  # the query parameter that asks for the stream of a page
PERIOD_SECONDS = 1.0
SHARE = 0.2  # the share of time that reading may take
PAUSE_SECONDS = 5.0  # no slow reading makes a page older than this and the reading itself
READING_SECONDS = 10.0  # the longest reading of a page: a slow one must not stop the others for long
CAPACITY = 100  # streams of a process; without one a page shows the state of its loading
TENANT_CAPACITY = 25  # so that one tenant leaves room for others
TENANTS_SHARE = 0.75  # of the streams, so that all tenants leave room for operators
STREAM_SECONDS = 300.0
RETRY_AFTER_SECONDS = 5
HEARTBEAT_SECONDS = 15.0  # proxies commonly close a connection that is silent for 60 s
RETRY_MILLISECONDS = 1000
HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}  # nginx, for one, would hold events back
MEDIA_TYPE = "text/event-stream"
EXPIRED = format_sse_event(event="expired", data_str="")
NOT_CURRENT = "the service cannot read this right now: what you see is not current"

Fragments = Mapping[str, str]  # HTML by the id of its element
Reader = Callable[[], Awaitable[Fragments]]


class _Watched:
    """A page that browsers show. `problem`: why it could not be read just now."""

    def __init__(self, read: Reader) -> None:
        self.read = read
        self.fragments: Fragments = {}
        self.problem: str | None = None
        self.has_been_read = False
        self.streams = 0
        self.changed = asyncio.Event()  # a new one after each reading


def expired() -> Response:
    """Answer with a stream that says: the session is over. The page then loads itself again."""
    return Response(EXPIRED, headers=HEADERS, media_type=MEDIA_TYPE)


class Feed:
    """The streams of a process."""

    def __init__(
        self,
        capacity: int = CAPACITY,
        period_seconds: float = PERIOD_SECONDS,
        *,
        tenant_capacity: int = TENANT_CAPACITY,
        stream_seconds: float = STREAM_SECONDS,
        heartbeat_seconds: float = HEARTBEAT_SECONDS,
    ) -> None:
        self._capacity = capacity
        self._period_seconds = period_seconds
        self._tenant_capacity = tenant_capacity
        self._stream_seconds = stream_seconds
        self._heartbeat_seconds = heartbeat_seconds
        self._pages: dict[Hashable, _Watched] = {}
        self._by_tenant: Counter[str | None] = Counter()
        self._due = asyncio.Event()
        self._due_at = 0.0
        self._reading: asyncio.Task[None] | None = None
        self._stopping = False

    @property
    def count(self) -> int:
        """Return how many streams are open."""
        return self._by_tenant.total()

    def answer(
        self,
        request: Request,
        key: Hashable,
        read: Reader,
        seconds: float | None = None,
        tenant: str | None = None,
    ) -> Response:
        """Answer with the stream of a page. `seconds`: until the viewer's session is over; None: it never is.

        `key`: the same for all who see the same page. `tenant`: has its own limit; None: no tenant. Raises Overloaded
        or TooManyRequests when too many streams are open.
        """
        if request.scope["state"].get("is_head"):
            head = Response(headers=HEADERS, media_type=MEDIA_TYPE)
            del head.headers["Content-Length"]  # a stream has none (RFC 9110, section 8.6)
            return head
        if self._stopping or self.count >= self._capacity:
            raise Overloaded("too many live pages are open")
        if not self._has_room(tenant):
            raise TooManyRequests("too many live pages are open", RETRY_AFTER_SECONDS)
        request.scope["state"]["is_stream"] = True
        events = self._follow(key, read, seconds, tenant)
        return StreamingResponse(events, headers=HEADERS, media_type=MEDIA_TYPE)

    def wake(self) -> None:
        """Read the watched pages now: something has changed."""
        self._due_at = 0.0
        self._due.set()

    def stop(self) -> None:
        """End every stream now; browsers reconnect to another process."""
        self._stopping = True
        for page in self._pages.values():
            page.changed.set()

    async def close(self) -> None:
        """End every stream, and stop reading."""
        self.stop()
        if self._reading is not None:
            self._reading.cancel()
            await asyncio.wait([self._reading])

    def _has_room(self, tenant: str | None) -> bool:
        if self._stopping or self.count >= self._capacity:
            return False
        of_tenants = self.count - self._by_tenant[None]
        return tenant is None or (
            self._by_tenant[tenant] < self._tenant_capacity and of_tenants < self._capacity * TENANTS_SHARE
        )

    async def _follow(
        self, key: Hashable, read: Reader, seconds: float | None, tenant: str | None
    ) -> AsyncGenerator[bytes, None]:
        if not self._has_room(tenant):  # others came first since `answer`
            return
        now = asyncio.get_running_loop().time
        session_ends_at = math.inf if seconds is None else now() + seconds
        ends_at = min(session_ends_at, now() + self._stream_seconds)
        sent: dict[str, str] = {}
        problem: str | None = None
        with self._watch(key, read, tenant) as page:
            yield format_sse_event(event="hello", data_str="", retry=RETRY_MILLISECONDS)
            while not self._stopping and now() < ends_at:
                changed = page.changed
                for name, text in page.fragments.items():
                    if sent.get(name) != text:
                        sent[name] = text
                        yield format_sse_event(event="fragment", data_str=json.dumps({"id": name, "html": text}))
                if page.has_been_read and page.problem != problem:
                    problem = page.problem
                    yield format_sse_event(event="problem", data_str=problem or "")
                if not await _within(min(self._heartbeat_seconds, ends_at - now()), changed):
                    yield KEEPALIVE_COMMENT
        if now() >= session_ends_at:
            yield EXPIRED

    @contextlib.contextmanager
    def _watch(self, key: Hashable, read: Reader, tenant: str | None) -> Iterator[_Watched]:
        page = self._pages.setdefault(key, _Watched(read))
        page.streams += 1
        self._by_tenant[tenant] += 1
        if not page.has_been_read:
            self._due.set()
        if self._reading is None:
            self._reading = asyncio.create_task(self._read_repeatedly())
        try:
            yield page
        finally:
            self._by_tenant[tenant] -= 1
            page.streams -= 1
            if not page.streams:
                del self._pages[key]

    async def _read_repeatedly(self) -> None:
        """Read each page once in a period, and a new one at once."""
        now = asyncio.get_running_loop().time
        while True:
            await _within(max(0.0, self._due_at - now()) if self._pages else None, self._due)
            self._due.clear()
            begun_at = now()
            is_due = begun_at >= self._due_at
            if is_due:
                self._due_at = math.inf  # unless `wake` is called while it reads
            for page in list(self._pages.values()):
                if page.streams and (is_due or not page.has_been_read):
                    await _read(page)
            if self._due_at == math.inf:
                ended_at = now()
                pause = min((ended_at - begun_at) / SHARE, PAUSE_SECONDS)
                self._due_at = ended_at + max(self._period_seconds, pause)


async def _read(page: _Watched) -> None:
    try:
        async with asyncio.timeout(READING_SECONDS):
            page.fragments, page.problem = await page.read(), None
    except (Unavailable, TimeoutError) as error:
        log.info("pages.stale", error=str(error))
        page.problem = NOT_CURRENT
    except OrdersError as error:
        page.problem = str(error)
    except Exception:
        log.exception("pages.failed")
        page.problem = "something went wrong on our side: what you see is not current"
    page.has_been_read = True
    changed, page.changed = page.changed, asyncio.Event()
    changed.set()


async def _within(seconds: float | None, event: asyncio.Event) -> bool:
    """Wait for the event; return false if it does not come in time. `seconds` None: for ever."""
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        return False
    return True
