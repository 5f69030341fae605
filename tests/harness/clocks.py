"""Run `orders …` with a wrong clock."""

import asyncio
import os
import sys
from pathlib import Path

from tests.harness.processes import REPOSITORY


async def orders_at(offset: str, *args: str, **settings: str) -> tuple[int, str, str]:
    """Run `orders …` with the clock off by `offset`, such as `+1h`; return exit code, stdout and stderr."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("ORDERS_")}
    env = {
        **inherited,
        **{f"ORDERS_{name.upper()}": value for name, value in settings.items()},
        "LD_PRELOAD": find_faketime(),
        "FAKETIME": offset,
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    }
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "app", *args, cwd=REPOSITORY, env=env, stdout=pipe, stderr=pipe
    )
    out, err = await process.communicate()
    return process.returncode or 0, out.decode(), err.decode()


def find_faketime() -> str:
    """Return the path of the library that fakes the time. FileNotFoundError says what to install."""
    for path in Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"):
        return str(path)
    raise FileNotFoundError(
        "libfaketime is not installed: run scripts/install-servers, or `apt-get install libfaketime`"
    )
