"""Run the service with hooks where the libraries do I/O: `python -m chaos.sweep.hooks serve`.

Environment: SWEEP_ARMED, a file; points count from when it exists. SWEEP_RECORD, a file for the points in their order.
SWEEP_POINT, the point at which the process kills itself. This module is no part of the service.
"""

import os
import runpy
import signal
import sys
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp
import aiormq
import asyncpg
import redis.asyncio.client
import uvicorn.protocols.http.httptools_impl as http

BEFORE, AFTER = "before", "after"
# Below these, a call says what is done; they themselves say only that Postgres, Redis or the socket is used.
PLUMBING = ("app.db", "app.cache", "app.api.server", "app.api.middleware", "app.observability")
IDLE = ("app.messaging.transport_lease", "app.api.health", "app.operations.", "app.messaging.queue_depth")

Call = Callable[..., Awaitable[Any]]


class Hooks:
    """Counts the points, records them, and kills the process at the chosen one."""

    def __init__(self) -> None:
        self._armed = Path(os.environ["SWEEP_ARMED"])
        self._record = os.environ.get("SWEEP_RECORD")
        self._point = os.environ.get("SWEEP_POINT")
        self._counts: Counter[str] = Counter()

    def install(self, owner: type, name: str, library: str) -> None:
        """Hook an asynchronous method of a library."""
        original: Call = getattr(owner, name)

        async def hooked(*args: Any, **kwargs: Any) -> Any:
            place = self._place(library)
            if place is None:
                return await original(*args, **kwargs)
            self._pass(f"{place} {BEFORE}")
            answer = await original(*args, **kwargs)
            self._pass(f"{place} {AFTER}")
            return answer

        setattr(owner, name, hooked)

    def _place(self, library: str) -> str | None:
        """Return the place in our code that calls, and which of its calls this is; None: it is no part of the way."""
        if not self._armed.exists():
            return None
        caller = _caller()
        if caller is None or caller.startswith(IDLE):
            return None
        name = f"{library} {caller}"
        self._counts[name] += 1
        return f"{name} {self._counts[name]}"

    def _pass(self, point: str) -> None:
        if self._record is not None:
            with Path(self._record).open("a") as record:
                record.write(f"{point}\n")
        if point == self._point:
            os.kill(os.getpid(), signal.SIGKILL)


def _caller() -> str | None:
    """Return the innermost function of our own that is no plumbing; if all are, the innermost."""
    frame: Any = sys._getframe(2)  # noqa: SLF001 - the documented way to look at the stack
    plumbing: str | None = None
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        name = f"{module}:{frame.f_code.co_name}"
        if module.startswith("app.") and not module.startswith(PLUMBING):
            return name
        if module.startswith("app."):
            plumbing = plumbing or name
        frame = frame.f_back
    return plumbing


def install() -> None:
    """Hook all libraries that do I/O."""
    hooks = Hooks()
    for name in ("execute", "fetch", "fetchrow", "fetchval"):
        hooks.install(asyncpg.Connection, name, "postgres")
    hooks.install(aiohttp.ClientSession, "_request", "partner")
    for name in ("basic_publish", "basic_ack"):
        hooks.install(aiormq.Channel, name, "broker")
    hooks.install(redis.asyncio.client.Pipeline, "execute", "redis")
    hooks.install(http.RequestResponseCycle, "send", "client")


if __name__ == "__main__":
    install()
    runpy.run_module("app", run_name="__main__", alter_sys=True)
