"""Child processes of the demo: start each, restart one that dies, end them all. Both ends of their pipes are here.

    spawn: it imports its code → `start`: its settings go to its stdin → it serves → "ready" comes from its stdout
    → it dies → a pause → spawn

The supervisor holds the listening sockets and its children inherit them. So a port stays the same and stays ours, and
connections that arrive while a child is down wait for the next one.
"""

import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Coroutine, Mapping
from enum import StrEnum
from functools import partial
from typing import Any, Protocol

import uvloop

from app.api.server.listener import until_signalled
from app.demo.embedded_postgres import dying_with_parent
from app.errors import ConfigurationError, Unavailable
from app.loops import Backoff

READY = "ready"
REFUSED, UNAVAILABLE = 2, 3  # the exit codes of a child that says why
RESTARTS = Backoff(base_seconds=0.5, cap_seconds=5)  # a child that cannot start must not keep the machine busy
STABLE_SECONDS = 10.0  # a child that has run for so long is restarted as if it had never died
START_SECONDS = 60.0  # a child that is not ready by then is ended
KILL_SECONDS = 2.0

Values = Mapping[str, Any]


class Program(Protocol):
    """What a child runs."""

    @property
    def pid(self) -> int | None:
        """The process; None if there is none."""

    async def start(self) -> None:
        """Return when it is ready. Raises ConfigurationError, Unavailable."""

    async def wait(self) -> int:
        """Return its exit code when it has ended; negative for a signal."""

    async def stop(self) -> None:
        """End it, if it runs."""


class PythonProgram:
    """`python -m module`, which serves on `listener`.

    `values`: make its settings, when everything that it needs is ready. It has `stop_seconds` from SIGTERM to its end,
    and `start_seconds` until it is ready.
    """

    def __init__(
        self,
        module: str,
        listener: socket.socket,
        values: Callable[[], Values],
        stop_seconds: float,
        start_seconds: float = START_SECONDS,
    ) -> None:
        self._module = module
        self._listener = listener
        self._values = values
        self._stop_seconds = stop_seconds
        self._start_seconds = start_seconds
        self._process: asyncio.subprocess.Process | None = None

    @property
    def pid(self) -> int | None:
        """The process; None if there is none."""
        return None if self._process is None or self._process.returncode is not None else self._process.pid

    async def spawn(self) -> None:
        """Start the process, which imports its code and waits for its settings."""
        self._process = await asyncio.create_subprocess_exec(
            *(*dying_with_parent(signal.SIGKILL), sys.executable, "-m", self._module, str(self._listener.fileno())),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            pass_fds=[self._listener.fileno()],
            start_new_session=True,  # Ctrl-C must not reach it: it ends when the supervisor says so
        )

    async def start(self) -> None:
        """Return when it serves. Raises ConfigurationError, Unavailable with what it reported."""
        if self.pid is None:
            await self.spawn()
        process = self._process
        if process is None or process.stdin is None or process.stdout is None:
            raise RuntimeError("bug: there is no process, or it has no pipes")
        try:
            async with asyncio.timeout(self._start_seconds):
                with contextlib.suppress(ConnectionError):  # it has died; its exit code follows
                    process.stdin.write(json.dumps(self._values()).encode() + b"\n")
                    await process.stdin.drain()
                line = (await process.stdout.readline()).decode().strip()
        except TimeoutError as error:
            await self.stop()
            raise Unavailable(f"{self._module} was not ready within {self._start_seconds:g} s") from error
        if line == READY:
            return
        code = await process.wait()
        if code == REFUSED and line:
            raise ConfigurationError(line)
        raise Unavailable(line or f"{self._module} ended before it was ready: {describe_end(code)}")

    async def wait(self) -> int:
        """Return its exit code when it has ended; negative for a signal."""
        return 0 if self._process is None else await self._process.wait()

    async def stop(self) -> None:
        """Send SIGTERM and, if that does not end it in time, SIGKILL."""
        process, self._process = self._process, None
        for number, seconds in ((signal.SIGTERM, self._stop_seconds), (signal.SIGKILL, KILL_SECONDS)):
            if process is None or process.returncode is not None:
                return
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(number)
                process.send_signal(signal.SIGCONT)  # a frozen process would not get the other one
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await process.wait()


class ChildState(StrEnum):
    """What a child is doing."""

    STARTING = "starting"
    RUNNING = "running"
    FROZEN = "frozen"
    DOWN = "down"


class Child:
    """A program that is started again whenever it dies. `report`: called with each event, in words."""

    def __init__(self, name: str, program: Program, report: Callable[[str], None]) -> None:
        self.name = name
        self.state = ChildState.DOWN
        self.restarts = 0
        self.changes_at = 0.0  # by the monotonic clock: when a frozen or lost child will be back
        self._program = program
        self._report = report
        self._started_at = 0.0
        self._failures = 0
        self._keeping: asyncio.Task[None] | None = None
        self._thawing: asyncio.TimerHandle | None = None
        self._recovering = asyncio.Event()  # ends the pause before a restart

    @property
    def pid(self) -> int | None:
        """Its process; None if there is none."""
        return self._program.pid

    @property
    def seconds_away(self) -> float:
        """For how long a frozen or lost child will still be away; 0 if it is to be back at once, or there."""
        return max(0.0, self.changes_at - time.monotonic())

    async def start(self) -> None:
        """Start it for the first time, return when it is ready, and keep it running from then on.

        Raises ConfigurationError, Unavailable.
        """
        await self._start()
        self._keeping = asyncio.create_task(self._keep())

    async def until_refused(self) -> None:
        """Wait until it refuses to start again; raises ConfigurationError."""
        if self._keeping is None:
            raise RuntimeError(f"bug: {self.name} was not started")
        await asyncio.shield(self._keeping)

    async def stop(self) -> None:
        """End it for good. Does nothing if it does not run."""
        if self._keeping is not None:
            self._keeping.cancel()
            await asyncio.wait([self._keeping])
        await self._program.stop()
        self.state = ChildState.DOWN

    def kill(self, number: signal.Signals = signal.SIGKILL, away_seconds: float = 0.0) -> None:
        """Send it the signal; when it has died, start it again, but not before `away_seconds` are over."""
        if self._send(number):
            self.changes_at = time.monotonic() + away_seconds

    def freeze(self, seconds: float) -> None:
        """Stop its process (SIGSTOP) and continue it after `seconds`. Does nothing unless it is running."""
        pid = self.pid
        if self.state is ChildState.RUNNING and self._send(signal.SIGSTOP):
            self.state, self.changes_at = ChildState.FROZEN, time.monotonic() + seconds
            self._thawing = asyncio.get_running_loop().call_later(seconds, self._thaw, pid)

    def recover(self) -> None:
        """Continue it now if it is frozen, and start it now if it is down."""
        self.changes_at = time.monotonic()
        self._recovering.set()
        if self._thawing is not None:
            self._thawing.cancel()
        self._thaw(self.pid)

    def _thaw(self, pid: int | None) -> None:
        if self.state is ChildState.FROZEN and self.pid == pid and self._send(signal.SIGCONT):
            self.state = ChildState.RUNNING
            self._report(f"{self.name} continues (process {pid})")

    def _send(self, number: signal.Signals) -> bool:
        with contextlib.suppress(ProcessLookupError):
            if (pid := self.pid) is not None:
                os.kill(pid, number)
                return True
        return False

    async def _start(self) -> None:
        self.state = ChildState.STARTING
        try:
            await self._program.start()
        except BaseException:
            self.state = ChildState.DOWN
            raise
        self.state, self._started_at = ChildState.RUNNING, time.monotonic()

    async def _keep(self) -> None:
        while True:
            code = await self._program.wait()
            self.state = ChildState.DOWN
            if time.monotonic() - self._started_at > STABLE_SECONDS:
                self._failures = 0
            self._report(f"{self.name} ended ({describe_end(code)}); it will be started again")
            await self._restart()

    async def _restart(self) -> None:
        while True:
            self._failures += 1
            self._recovering.clear()
            pause_seconds = max(RESTARTS.pause(self._failures), self.seconds_away)
            self.changes_at = time.monotonic() + pause_seconds
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause_seconds):
                    await self._recovering.wait()
            await self._program.stop()  # a Postgres that died has to let go of its directory
            try:
                await self._start()
            except (Unavailable, OSError) as error:  # OSError: no process could be made
                self._report(f"{self.name} did not start: {error}")
            else:
                self.restarts += 1
                self._report(f"{self.name} runs again (process {self.pid})")
                return


def describe_end(code: int) -> str:
    """Say how a process ended."""
    return f"exit code {code}" if code >= 0 else f"killed by {signal.Signals(-code).name}"


def run_child(serve: Callable[[socket.socket, Values, Callable[[], None]], Coroutine[Any, Any, None]]) -> None:
    """Be a child: read the settings from stdin, serve until SIGTERM, and report on stdout. It does not return.

    `serve` gets the socket, the settings, and what to call when it is ready.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # only answers may go to the supervisor
    line = sys.stdin.readline()
    if not line:
        sys.exit(0)  # the supervisor has ended
    listener = socket.socket(fileno=int(sys.argv[1]))
    ready = partial(print, READY, file=answers, flush=True)
    try:
        uvloop.run(until_signalled(_until_orphaned(serve(listener, json.loads(line), ready))))
    except (ConfigurationError, Unavailable) as error:
        print(" ".join(str(error).split()), file=answers, flush=True)
        sys.exit(REFUSED if isinstance(error, ConfigurationError) else UNAVAILABLE)


async def _until_orphaned(work: Coroutine[Any, Any, None]) -> None:
    """Do the work, and end like by SIGTERM when the supervisor is gone: not every system sends a signal then."""
    loop, supervisor = asyncio.get_running_loop(), sys.stdin.fileno()

    def end() -> None:
        loop.remove_reader(supervisor)
        os.kill(os.getpid(), signal.SIGTERM)

    loop.add_reader(supervisor, end)
    await work
