"""A database per test, cloned from a template that is migrated once per run. Names contain the run's id."""

import asyncio
import contextlib
import uuid
from collections.abc import AsyncIterator
from urllib.parse import urlsplit, urlunsplit

import asyncpg

from app.db import Pool, migrate, open_pool
from tests.harness.run import Run
from tests.harness.wait import AMPLE_SECONDS


def patient_pool(
    url: str, size: int, connection_class: type[asyncpg.Connection] = asyncpg.Connection
) -> contextlib.AbstractAsyncContextManager[Pool]:
    """Lend a pool of the service with ample time limits. Tests of the limits use shorter ones."""
    return open_pool(url, size, AMPLE_SECONDS, AMPLE_SECONDS, connection_class)


@contextlib.asynccontextmanager
async def fresh(server_url: str, run: Run) -> AsyncIterator[str]:
    """Lend the URL of a migrated, empty database; drop it afterwards, even with open connections."""
    template = await asyncio.to_thread(_migrated_template, server_url, run)
    async with created(server_url, run, f"TEMPLATE {template}") as url:
        yield url


@contextlib.asynccontextmanager
async def created(server_url: str, run: Run, options: str) -> AsyncIterator[str]:
    """Lend the URL of a database with these options of CREATE DATABASE; drop it afterwards."""
    name = f"{_prefix(run)}{uuid.uuid4().hex[:12]}"
    await _execute(server_url, f"CREATE DATABASE {name} {options}")
    try:
        yield _in_database(server_url, name)
    finally:
        await _execute(server_url, f"DROP DATABASE {name} WITH (FORCE)")


async def drop_all(server_url: str, run: Run) -> None:
    """Drop every database of the run, the template included."""
    conn = await asyncpg.connect(server_url)
    try:
        query = "SELECT datname FROM pg_database WHERE starts_with(datname, $1)"
        for (name,) in await conn.fetch(query, _prefix(run)):
            await conn.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")
    finally:
        await conn.close()


def _migrated_template(server_url: str, run: Run) -> str:
    """Make the template once per run. Do not call it in an event loop's thread: it runs its own loops."""
    name, done = f"{_prefix(run)}template", run.directory / "template.migrated"
    with run.lock("template"):
        if not done.exists():
            asyncio.run(_execute(server_url, f"DROP DATABASE IF EXISTS {name} WITH (FORCE)"))
            asyncio.run(_execute(server_url, f"CREATE DATABASE {name} TEMPLATE template0 ENCODING 'UTF8'"))
            migrate(_in_database(server_url, name))
            done.touch()
    return name


def _prefix(run: Run) -> str:
    return f"orders_test_{run.id}_"


def _in_database(server_url: str, name: str) -> str:
    return urlunsplit(urlsplit(server_url)._replace(path=f"/{name}"))


async def _execute(server_url: str, statement: str) -> None:
    conn = await asyncpg.connect(server_url)
    try:
        await conn.execute(statement)
    finally:
        await conn.close()
