"""Child processes that tests start, kill and freeze, including the service."""

import contextlib
import os
import signal
import ssl
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

import httpx
import psutil

from app.demo.embedded_postgres import dying_with_parent
from tests.harness.forked import Forked
from tests.harness.ports import free_port
from tests.harness.wait import wait_until

REPOSITORY = Path(__file__).parents[2]
START_SECONDS = 90.0
KILL_SECONDS = 60.0
LOG_TAIL_LINES = 60
NO_TLS = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # spares loading certificates for each client


class ProcessTree:
    """One or more processes and all their descendants.

    A process group is not enough: Postgres and Erlang put their children into groups of their own.
    """

    def __init__(self, *leaders: "subprocess.Popen[bytes] | Forked") -> None:
        self.leaders = leaders
        self._frozen: list[psutil.Process] = []

    def freeze(self) -> None:
        """Stop every process (SIGSTOP), parents first, so that none starts another meanwhile."""
        for leader in self.leaders:
            with contextlib.suppress(psutil.NoSuchProcess):  # it may have just ended
                if leader.poll() is None:
                    self._suspend(psutil.Process(leader.pid))

    def _suspend(self, process: psutil.Process) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.suspend()
            self._frozen.append(process)
            for child in process.children():
                self._suspend(child)

    def thaw(self) -> None:
        """Continue the frozen processes (SIGCONT), children first."""
        while self._frozen:
            with contextlib.suppress(psutil.NoSuchProcess):
                self._frozen.pop().resume()

    def pids(self) -> list[int]:
        """Return every process that runs now, parents first."""
        found: list[int] = []
        for leader in self.leaders:
            with contextlib.suppress(psutil.NoSuchProcess):
                process = psutil.Process(leader.pid)
                found += [process.pid, *(child.pid for child in process.children(recursive=True))]
        return found

    async def kill(self) -> None:
        """SIGKILL all processes; return when all have ended."""
        self.thaw()
        self.freeze()
        doomed, self._frozen = self._frozen, []
        for process in doomed:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        await wait_until(lambda: not any(map(is_alive, doomed)), KILL_SECONDS, f"end of {doomed} after SIGKILL")
        for leader in self.leaders:
            leader.wait()


def is_alive(process: psutil.Process) -> bool:
    """Return whether the process still runs. A zombie does not: it only waits for its parent."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    return False


def tail(log: Path) -> str:
    """Return the end of a log, to be shown with a failure."""
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    return "\n".join([f"--- the end of {log}", *lines[-LOG_TAIL_LINES:], "---"])


def start_process(
    command: Sequence[str], directory: Path, env: Mapping[str, str], log: Path
) -> subprocess.Popen[bytes]:
    """Start a process that writes to `log`, gets no Ctrl-C, and is killed when this process ends for any reason."""
    with log.open("ab") as output:
        return subprocess.Popen(
            [*dying_with_parent(signal.SIGKILL), *command],
            cwd=directory,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )


class Service:
    """`orders serve` (or another command or `module` that serves HTTP) on a free port, as a process.

    `env` is added to this process's environment without its ORDERS_*. The object can be restarted on the same port.
    `code`: the root of the code that the next start runs; set it to run another release.
    """

    def __init__(
        self, env: Mapping[str, str], args: Sequence[str] = ("serve",), *, log: Path, module: str = "app"
    ) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = log
        self.code = REPOSITORY
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("ORDERS_")}
        self._env = {**inherited, "ORDERS_PORT": str(self.port), **env}
        by_option = ["--port", str(self.port)] if args[0] in {"sandbox", "demo"} else []
        self._program = (module, [*args, *by_option])
        self._tree: ProcessTree | None = None

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.kill()

    async def start(self) -> None:
        """Return when `/livez` answers 200. AssertionError, with the end of the log, if it does not."""
        self._tree = ProcessTree(self._launch())
        try:
            async with httpx.AsyncClient(base_url=self.url, trust_env=False, verify=NO_TLS) as client:
                await wait_until(lambda: self._is_live(client), START_SECONDS, "200 from /livez")
        except BaseException as error:
            await self.kill()
            error.add_note(tail(self.log))
            raise

    def _launch(self) -> "subprocess.Popen[bytes] | Forked":
        module, args = self._program
        if self.code == REPOSITORY:
            return Forked(module, args, self._env, REPOSITORY, self.log, self.log)
        # The process that `Forked` copies has already imported this release.
        return start_process([sys.executable, "-m", module, *args], self.code, self._env, self.log)

    async def _is_live(self, client: httpx.AsyncClient) -> bool:
        if self.process.poll() is not None:
            raise AssertionError(f"ended with {self.process.returncode} while starting")
        with contextlib.suppress(httpx.TransportError):
            return (await client.get("/livez")).status_code == httpx.codes.OK
        return False

    @property
    def process(self) -> "subprocess.Popen[bytes] | Forked":
        """The running process."""
        return self._running().leaders[0]

    def _running(self) -> ProcessTree:
        if self._tree is None:
            raise RuntimeError("bug: the service was not started")
        return self._tree

    async def terminate(self, deadline_seconds: float = 25.0, number: signal.Signals = signal.SIGTERM) -> int:
        """Send SIGTERM, or another signal; return the exit code if the process ends within the deadline."""
        process = self.process
        process.send_signal(number)
        await wait_until(
            lambda: process.poll() is not None, deadline_seconds, f"end of the service after {number.name}"
        )
        return process.wait()

    async def kill(self) -> None:
        """SIGKILL the process and wait for its end. Does nothing if it is not running."""
        if self._tree is not None:
            tree, self._tree = self._tree, None
            await tree.kill()

    def freeze(self) -> None:
        """Stop the process (SIGSTOP)."""
        self._running().freeze()

    def thaw(self) -> None:
        """Continue the process (SIGCONT)."""
        self._running().thaw()
