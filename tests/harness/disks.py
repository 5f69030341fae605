"""Disks that fail, by libfiu: reads, writes and syncs of a process that has the `env` of its disk."""

import asyncio
import shutil
from collections.abc import Mapping
from pathlib import Path

LIBRARIES = Path("/usr/lib/fiu")
COMMAND_SECONDS = 10.0


class Disk:
    """The disk of the processes that have its `env`. `directory`: where they listen for commands.

    Postgres cannot have one: it exports functions whose names (`hash_create`) libfiu uses too, and crashes.
    """

    def __init__(self, directory: Path) -> None:
        directory.mkdir()
        self._pipes = directory / "fiu"

    @property
    def env(self) -> Mapping[str, str]:
        """The environment of a process with this disk. FileNotFoundError says what to install."""
        libraries = [LIBRARIES / name for name in ("fiu_run_preload.so", "fiu_posix_preload.so")]
        if not all(library.exists() for library in libraries) or not shutil.which("fiu-ctrl"):
            raise FileNotFoundError(
                "libfiu is not installed: run scripts/install-servers, or `apt-get install fiu-utils`"
            )
        return {"LD_PRELOAD": " ".join(map(str, libraries)), "FIU_CTRL_FIFO": str(self._pipes), "FIU_ENABLE": ""}

    async def fail(self, pid: int, calls: str, error: int) -> None:
        """Let these calls of a process fail with this `errno` until it ends: `posix/io/sync/*` are all syncs."""
        await self._command(pid, f"enable name={calls},failinfo={error}")

    async def _command(self, pid: int, command: str) -> None:
        control = await asyncio.create_subprocess_exec("fiu-ctrl", "-f", str(self._pipes), "-c", command, str(pid))
        try:
            async with asyncio.timeout(COMMAND_SECONDS):  # it waits forever for a process that has just ended
                await control.wait()
        finally:
            if control.returncode is None:
                control.kill()
        if control.returncode:
            raise RuntimeError(f"fiu-ctrl ended with {control.returncode}")
