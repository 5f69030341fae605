"""Keep pages live: one stream for each open page, and one task that reads for all of them.

While anybody watches, the task renders each watched page once in PERIOD_SECONDS, however many watch it, one after the
other: pages use at most one connection at a time. It sends a fragment to a stream only when its HTML has changed. A new
stream gets all fragments, so a browser that reconnects, also to another process, misses nothing.
"""

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping

import structlog
from fastapi.sse import KEEPALIVE_COMMENT, format_sse_event
from starlette.requests import Request
from starlette.responses import StreamingResponse

from app.errors import OrdersError, Overloaded, Unavailable

log = structlog.get_logger(__name__)

PERIOD_SECONDS = 1.0
CAPACITY = 100  # streams of a process; without one a page shows the state of its loading
HEARTBEAT_SECONDS = 15.0  # proxies commonly close a connection that is silent for 60 s
RETRY_MILLISECONDS = 1000
HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}  # nginx, for one, would hold events back

Fragments = Mapping[str, str]  # HTML by the id of its element
Reader = Callable[[], Awaitable[Fragments]]


class _Watched:
    """A page that somebody watches. `problem`: why it could not be read just now."""

    def __init__(self, read: Reader) -> None:
        self.read = read
        self.fragments: Fragments = {}
        self.problem: str | None = None
        self.has_been_read = False
        self.streams = 0
        self.changed = asyncio.Event()  # a new one after each reading


class Feed:
    """The streams of a process."""

    def __init__(self, capacity: int = CAPACITY, period_seconds: float = PERIOD_SECONDS) -> None:
        self._capacity = capacity
        self._period_seconds = period_seconds
        self._pages: dict[str, _Watched] = {}
        self._due = asyncio.Event()
        self._reading: asyncio.Task[None] | None = None
        self._stopping = False

    @property
    def count(self) -> int:
        """Return how many streams are open."""
        return sum(page.streams for page in self._pages.values())

    def answer(self, request: Request, key: str, read: Reader, seconds: float | None = None) -> StreamingResponse:
        """Answer with the stream of a page, for `seconds` at most. `key`: the same for all who see the same page.

        Raises Overloaded when too many streams are open.
        """
        if self._stopping or self.count >= self._capacity:
            raise Overloaded("too many live pages are open")
        request.scope["state"]["is_stream"] = True
        return StreamingResponse(self._follow(key, read, seconds), headers=HEADERS, media_type="text/event-stream")

    def wake(self) -> None:
        """Read the watched pages now: something has changed."""
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

    async def _follow(self, key: str, read: Reader, seconds: float | None) -> AsyncGenerator[bytes, None]:
        sent: dict[str, str] = {}
        problem: str | None = None
        ends_at = None if seconds is None else asyncio.get_running_loop().time() + seconds
        with self._watch(key, read) as page:
            yield format_sse_event(event="hello", data_str="", retry=RETRY_MILLISECONDS)
            while not self._stopping:
                changed = page.changed
                for name, text in page.fragments.items():
                    if sent.get(name) != text:
                        sent[name] = text
                        yield format_sse_event(event="fragment", data_str=json.dumps({"id": name, "html": text}))
                if page.has_been_read and page.problem != problem:
                    problem = page.problem
                    yield format_sse_event(event="problem", data_str=problem or "")
                if ends_at is not None and asyncio.get_running_loop().time() >= ends_at:
                    yield format_sse_event(event="expired", data_str="")
                    return
                if not await _within(HEARTBEAT_SECONDS, changed):
                    yield KEEPALIVE_COMMENT

    @contextlib.contextmanager
    def _watch(self, key: str, read: Reader) -> Iterator[_Watched]:
        page = self._pages.setdefault(key, _Watched(read))
        page.streams += 1
        self._due.set()
        if self._reading is None:
            self._reading = asyncio.create_task(self._read_repeatedly())
        try:
            yield page
        finally:
            page.streams -= 1
            if not page.streams:
                del self._pages[key]

    async def _read_repeatedly(self) -> None:
        while True:
            await _within(self._period_seconds if self._pages else None, self._due)
            self._due.clear()
            for page in list(self._pages.values()):
                await _read(page)


async def _read(page: _Watched) -> None:
    try:
        page.fragments, page.problem = await page.read(), None
    except Unavailable as error:
        log.info("pages.stale", error=str(error))
        page.problem = "the service cannot read this right now: what you see is not current"
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
