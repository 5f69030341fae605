"""Libraries that do a part of the service's job, each in an environment of its own: its versions are not ours.

A peer is a program and a list of requirements with the same name.
"""

import asyncio
import sys
from pathlib import Path

HERE = Path(__file__).parent
ENVIRONMENTS = HERE.parents[1] / ".venv" / "peers"


async def python(name: str) -> str:
    """Return the Python of a peer's environment; install it at first, and when its requirements have changed."""
    requirements, directory = HERE / f"{name}.txt", ENVIRONMENTS / name
    mark, found = directory / "installed", directory / "bin" / "python"
    if not mark.exists() or mark.read_text() != requirements.read_text():
        await _run(sys.executable, "-m", "venv", "--clear", str(directory))
        pip = (str(found), "-m", "pip", "--disable-pip-version-check", "--quiet", "install")
        await _run(*pip, "--require-hashes", "--requirement", str(requirements))
        mark.write_text(requirements.read_text())
    return str(found)


async def _run(*command: str) -> None:
    process = await asyncio.create_subprocess_exec(*command)
    if await process.wait():
        raise RuntimeError(f"failed: {' '.join(command)}")
