"""Run `orders …`, and programs of the harness, as processes."""

import asyncio
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.harness.forked import Forked
from tests.harness.processes import REPOSITORY


async def orders(*args: str, **settings: str) -> tuple[int, str, str]:
    """Run `orders …` with these settings and no others; return exit code, stdout and stderr."""
    return await module("app", *args, **settings)


async def module(name: str, *args: str, **settings: str) -> tuple[int, str, str]:
    """Run `python -m name …` in the same way."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("ORDERS_")}
    env = {**inherited, **{f"ORDERS_{name.upper()}": value for name, value in settings.items()}}
    return await asyncio.to_thread(_run, name, args, env)


def _run(name: str, args: Sequence[str], env: Mapping[str, str]) -> tuple[int, str, str]:
    with tempfile.TemporaryDirectory() as directory:
        out, err = Path(directory, "out"), Path(directory, "err")
        code = Forked(name, args, env, REPOSITORY, out, err).wait()
        return code, out.read_text(), err.read_text()
