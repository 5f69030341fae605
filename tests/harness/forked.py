"""Run our programs as processes forked from one that has already imported everything.

`multiprocessing`'s fork server is a clean process, one per worker. Its children are killed when it ends.
"""

import contextlib
import ctypes
import multiprocessing
import os
import runpy
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

PR_SET_PDEATHSIG = 1  # prctl(2)

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["app.cli.main", "tests.harness.crashing"])


class Forked:
    """A running program, with the methods of `subprocess.Popen` that the tests use."""

    def __init__(
        self, module: str, args: Sequence[str], env: Mapping[str, str], directory: Path, out: Path, err: Path
    ) -> None:
        files = (str(directory), str(out), str(err))
        self._process = CONTEXT.Process(target=_run, args=(module, list(args), dict(env), *files))
        self._process.start()
        self.pid = self._process.pid or 0

    @property
    def returncode(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """Return the exit code, if it has ended."""
        return self._process.exitcode

    def wait(self) -> int:
        """Return the exit code when it has ended."""
        self._process.join()
        return self._process.exitcode or 0

    def send_signal(self, number: int) -> None:
        """Send it a signal, if it still runs."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):  # it has just ended
                os.kill(self.pid, number)


def _run(module: str, args: list[str], env: dict[str, str], directory: str, out: str, err: str) -> None:
    """Become `python -m module args` in a session of its own."""
    os.setsid()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    os.chdir(directory)
    os.environ.clear()
    os.environ.update(env)
    for path, number in ((os.devnull, 0), (out, 1), (err, 2)):
        flags = os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_APPEND
        opened = os.open(path, flags, 0o600)
        os.dup2(opened, number)
        os.close(opened)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115 - multiprocessing has replaced it
    sys.argv = [module, *args]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
