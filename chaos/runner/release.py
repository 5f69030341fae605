"""The release before this one, so that both can run side by side on one database, broker and set of partners.

Its code comes from this repository's history, and runs on today's interpreter and dependencies. The schema is today's:
a deployment migrates first, so the older release has to work with a newer schema.
"""

import asyncio
import subprocess
from pathlib import Path

from tests.harness.processes import REPOSITORY

VERSION = "0.1.0"
COMMIT = "95bdd04a5d4922cc0c5348ae9cf3c309194e0eb2"  # dated VERSION in CHANGELOG.md


def is_in_history() -> bool:
    """Return whether the repository has the commit. A shallow clone and an archive do not."""
    command = ("git", "cat-file", "-e", f"{COMMIT}^{{commit}}")
    try:
        return subprocess.run(command, cwd=REPOSITORY, stderr=subprocess.DEVNULL, check=False).returncode == 0  # noqa: S603 - our own
    except FileNotFoundError:  # no git on this machine
        return False


async def unpack(directory: Path) -> Path:
    """Write the older release's code below `directory`, unless it is there, and return its root."""
    root = directory / f"release-{VERSION}"
    if not root.exists():
        archive = root.with_suffix(".tar")
        await _run("git", "archive", "--output", str(archive), COMMIT)
        root.mkdir()
        await _run("tar", "-x", "-f", str(archive), "-C", str(root))
    return root


async def _run(*command: str) -> None:
    process = await asyncio.create_subprocess_exec(
        *command, cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    _, errors = await process.communicate()
    if process.returncode:
        raise RuntimeError(f"{command[0]} ended with {process.returncode}: {errors.decode().strip()}")
