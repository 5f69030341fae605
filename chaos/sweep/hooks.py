"""Run `orders` with hooks where the libraries do I/O: `python -m chaos.sweep.hooks serve`, or another command.

Environment: SWEEP_ARMED, a file; points count from when it exists. SWEEP_RECORD, a file for the points in their order.
SWEEP_POINT, the point at which the process kills itself. SWEEP_WITHIN, modules with commas: only their calls, and those
of what they call, are points; empty, all calls are; not set, those that a loop makes without an order are none. This
module is no part of the service.
"""

import os
import runpy
import signal
import sys
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import aiormq
import asyncpg
import redis.asyncio.client
import uvicorn.protocols.http.httptools_impl as http

from app.partners.http import HttpClient

BEFORE, AFTER = "before", "after"
# Below these, a call says what is done; they themselves say only that Postgres, Redis or the socket is used.
PLUMBING = ("app.db", "app.cache", "app.api.server", "app.api.middleware", "app.observability", "app.cli.serve")
IDLE = (
    "app.messaging.transport_lease",
    "app.api.health",
    "app.operations.",
    "app.messaging.queue_depth",
)
JANITOR = "app.operations.maintenance."  # what it calls is no part of an order's way either

Call = Callable[..., Awaitable[Any]]


class Hooks:
    """Counts the points, records them, and kills the process at the chosen one."""

    def __init__(self) -> None:
        self._armed = Path(os.environ["SWEEP_ARMED"])
        self._record = os.environ.get("SWEEP_RECORD")
        self._point = os.environ.get("SWEEP_POINT")
        within = os.environ.get("SWEEP_WITHIN")
        self._within = None if within is None else tuple(within.split(","))
        self._counts: Counter[str] = Counter()

    def install(self, owner: type, name: str, library: str) -> None:
        """Hook an asynchronous method of a library."""
        original: Call = getattr(owner, name)

        def hooked(*args: Any, **kwargs: Any) -> Awaitable[Any]:
            place = self._place(library)  # now: the call may be awaited in a task of its own, without our code above it
            call = original(*args, **kwargs)
            return call if place is None else self._pass_around(place, call)

        setattr(owner, name, hooked)

    async def _pass_around(self, place: str, call: Awaitable[Any]) -> Any:
        self._pass(f"{place} {BEFORE}")
        answer = await call
        self._pass(f"{place} {AFTER}")
        return answer

    def _place(self, library: str) -> str | None:
        """Return the place in our code that calls, and which of its calls this is; None: it is no part of the way."""
        if not self._armed.exists():
            return None
        callers = _callers()
        # The innermost that is no plumbing; if all are, the innermost.
        caller = next((name for name in callers if not name.startswith(PLUMBING)), next(iter(callers), None))
        if caller is None or not self._is_part(caller, callers):
            return None
        name = f"{library} {caller}"
        self._counts[name] += 1
        return f"{name} {self._counts[name]}"

    def _is_part(self, caller: str, callers: list[str]) -> bool:
        if self._within is None:
            return not (caller.startswith(IDLE) or any(name.startswith(JANITOR) for name in callers))
        return any(name.startswith(self._within) for name in callers)

    def _pass(self, point: str) -> None:
        if self._record is not None:
            with Path(self._record).open("a") as record:
                record.write(f"{point}\n")
        if point == self._point:
            os.kill(os.getpid(), signal.SIGKILL)


def _callers() -> list[str]:
    """Return the functions of our own on the stack, the innermost first."""
    frame: Any = sys._getframe(2)  # noqa: SLF001 - the documented way to look at the stack
    names = []
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module.startswith("app."):
            names.append(f"{module}:{frame.f_code.co_name}")
        frame = frame.f_back
    return names


def install() -> None:
    """Hook all libraries that do I/O."""
    hooks = Hooks()
    for name in ("execute", "fetch", "fetchrow", "fetchval"):
        hooks.install(asyncpg.Connection, name, "postgres")
    hooks.install(HttpClient, "exchange", "partner")
    for name in ("basic_publish", "basic_ack", "basic_consume", "basic_cancel"):  # a declaration changes nothing
        hooks.install(aiormq.Channel, name, "broker")
    hooks.install(redis.asyncio.client.Pipeline, "execute", "redis")
    hooks.install(http.RequestResponseCycle, "send", "client")


if __name__ == "__main__":
    install()
    runpy.run_module("app", run_name="__main__", alter_sys=True)
