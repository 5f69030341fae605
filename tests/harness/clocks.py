"""Wrong clocks, by libfaketime: for one command, and for servers whose clock jumps while they run."""

import asyncio
import os
import sys
from collections.abc import Mapping
from multiprocessing import forkserver
from pathlib import Path

from tests.harness.processes import REPOSITORY

# Timers and deadlines of a process are by the monotonic clock, which no administrator sets.
COMMON = {
    "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    # Python 3 waits for its own lock by that clock; the library's workaround for an old glibc would make it spin.
    "FAKETIME_FORCE_MONOTONIC_FIX": "0",
}
JUMP_WITHIN_SECONDS = 1  # a process looks at its clock's file as often
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - libfaketime puts files of its own there


async def orders_at(offset: str, *args: str, **settings: str) -> tuple[int, str, str]:
    """Run `orders …` with the clock off by `offset`, such as `+1h`; return exit code, stdout and stderr."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("ORDERS_")}
    env = {
        **inherited,
        **{f"ORDERS_{name.upper()}": value for name, value in settings.items()},
        **COMMON,
        "LD_PRELOAD": find_faketime("libfaketimeMT.so.1"),
        "FAKETIME": offset,
    }
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "app", *args, cwd=REPOSITORY, env=env, stdout=pipe, stderr=pipe
    )
    out, err = await process.communicate()
    return process.returncode or 0, out.decode(), err.decode()


class Clock:
    """The clock of the processes that have its `env`. It is right until it is set. `file`: holds its offset."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self.set(0)

    @property
    def env(self) -> Mapping[str, str]:
        """The environment of a process with this clock, if it has one thread and is not `Forked`."""
        # The library's other variant locks, which a signal handler of Postgres must not.
        return {**self.env_if_preloaded, **_at_run_time(), "LD_PRELOAD": find_faketime("libfaketime.so.1")}

    @property
    def env_if_preloaded(self) -> Mapping[str, str]:
        """The environment of a `Forked` process with this clock, after `preload`."""
        return {"FAKETIME_TIMESTAMP_FILE": str(self._file)}

    def set(self, offset_seconds: int) -> None:
        """Let the clock jump: to the right time and this much more, or less."""
        new = self._file.with_suffix(".new")
        new.write_text(f"{offset_seconds:+d}\n")
        new.chmod(0o644)  # Postgres may run as another user
        new.rename(self._file)


def preload() -> None:
    """Start the process from which `Forked` processes are forked, so that each of them can have a `Clock`."""
    added = {**_at_run_time(), "LD_PRELOAD": find_faketime("libfaketimeMT.so.1")}
    os.environ.update(added)
    try:
        forkserver.ensure_running()
    finally:
        for name in added:
            del os.environ[name]


def _at_run_time() -> dict[str, str]:
    return {**COMMON, "FAKETIME_CACHE_DURATION": str(JUMP_WITHIN_SECONDS)}


def remove_shared_memory(pid: int) -> None:
    """Remove what the library leaves behind if a process that loaded it is killed."""
    for name in (f"faketime_shm_{pid}", f"sem.faketime_sem_{pid}"):
        (SHARED_MEMORY / name).unlink(missing_ok=True)


def find_faketime(name: str) -> str:
    """Return the path of this variant of the library that fakes the time. FileNotFoundError says what to install."""
    for path in Path("/usr/lib").glob(f"*/faketime/{name}"):
        return str(path)
    raise FileNotFoundError(
        "libfaketime is not installed: run scripts/install-servers, or `apt-get install libfaketime`"
    )
