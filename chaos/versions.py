"""What a result is a result of: commit, machine, and the versions of the programs."""

import asyncio
import os
import platform
from importlib import metadata

import asyncpg

from tests.harness.processes import REPOSITORY


async def read_versions(database_url: str) -> dict[str, str]:
    """Return the commit and the versions of what runs."""
    conn = await asyncpg.connect(database_url)
    try:
        database: str = await conn.fetchval("SELECT current_setting('server_version')")
    finally:
        conn.terminate()
    names = ("orders", "fastapi", "asyncpg", "aio-pika", "aiohttp")
    return {
        "commit": await _commit(),
        "machine": f"{os.cpu_count()} cores, {platform.system()} {platform.machine()}",
        "Python": platform.python_version(),
        "PostgreSQL": database.split(maxsplit=1)[0],
        **{name: metadata.version(name) for name in names},
    }


async def _commit() -> str:
    """Return the commit of the code; `unknown` without git. `+`: there are changes that are not committed."""
    command = ("git", "describe", "--always", "--abbrev=10", "--dirty=+")
    try:
        git = await asyncio.create_subprocess_exec(*command, cwd=REPOSITORY, stdout=asyncio.subprocess.PIPE)
    except OSError:
        return "unknown"
    out, _ = await git.communicate()
    return out.decode().strip() or "unknown"
