"""Unsuitable databases and roles are refused with one line that says what to change."""

import contextlib
import uuid
from collections.abc import AsyncIterator
from urllib.parse import urlsplit

import pytest

from app.db import Pool
from tests.harness import databases
from tests.harness.api import serving
from tests.harness.commands import orders
from tests.harness.run import Run

LINE = {"sku": "WIDGET", "quantity": 3, "unit_price": "9.99", "metadata": {"city": "Łódź"}}
EMPTY = "TEMPLATE template0 ENCODING 'UTF8'"
NO_SCHEMA = "REVOKE USAGE ON SCHEMA public FROM PUBLIC"
OLDER = "UPDATE alembic_version SET version_num = '0005'; ALTER TABLE sagas DROP hold_seconds"


@contextlib.asynccontextmanager
async def role(pool: Pool, url: str, grants: str) -> AsyncIterator[str]:
    """Lend the URL of the pool's database for a new role with these grants; `{}` is its name."""
    name = f"service_{uuid.uuid4().hex[:12]}"
    await pool.execute(f"REVOKE CREATE ON SCHEMA public FROM PUBLIC; CREATE ROLE {name} LOGIN PASSWORD 'secret'")
    try:
        await pool.execute(grants.format(name))
        host = urlsplit(url).netloc.rpartition("@")[2]
        yield urlsplit(url)._replace(netloc=f"{name}:secret@{host}").geturl()
    finally:
        await pool.execute(f"DROP OWNED BY {name}; DROP ROLE {name}")


async def assert_refused(url: str, command: str, *reasons: str) -> None:
    """Assert exit code 2 and one line on stderr, with the variable and the `reasons`."""
    code, out, err = await orders(command, database_url=url, roles="api")
    assert (code, out, err.count("\n")) == (2, "", 1), err
    for reason in ("ORDERS_DATABASE_URL", *reasons):
        assert reason in err


@pytest.mark.parametrize("encoding", ["LATIN1", "SQL_ASCII"])
async def test_only_a_database_in_utf8_is_accepted(postgres_url: str, run: Run, encoding: str) -> None:
    """A database with another encoding is refused."""
    options = f"TEMPLATE template0 ENCODING '{encoding}' LC_COLLATE 'C' LC_CTYPE 'C'"
    async with databases.created(postgres_url, run, options) as url:
        for command in ("migrate", "serve"):
            await assert_refused(url, command, encoding, "UTF8")


async def test_a_role_that_cannot_create_cannot_migrate(postgres_url: str, run: Run) -> None:
    """A role without CREATE on the schema is refused."""
    async with databases.created(postgres_url, run, EMPTY) as url, databases.patient_pool(url, 1) as pool:
        for grants, named in (("GRANT USAGE ON SCHEMA public TO {}", "the schema public"), (NO_SCHEMA, "any schema")):
            async with role(pool, url, grants) as its_url:
                await assert_refused(its_url, "migrate", named, "USAGE and CREATE")


async def test_a_role_that_does_not_own_the_tables_cannot_migrate(pool: Pool, database_url: str) -> None:
    """A role that does not own the tables is refused."""
    grants = f"{OLDER}; GRANT CREATE ON SCHEMA public TO {{0}}; GRANT ALL ON ALL TABLES IN SCHEMA public TO {{0}}"
    async with role(pool, database_url, grants) as url:
        await assert_refused(url, "migrate", "must be owner of table sagas", "owns the tables")


async def test_a_role_that_can_only_use_rows_can_serve(pool: Pool, database_url: str) -> None:
    """The service runs with a role that may only read and write rows."""
    grants = "GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public TO {}"
    async with role(pool, database_url, grants) as url:
        async with serving(url) as api:
            assert (await api.post("/orders", json=LINE)).status_code == 201
            assert (await api.get("/readyz")).status_code == 200
        assert await orders("migrate", "--check", database_url=url) == (0, "the schema is current\n", "")
        assert (await orders("prune", database_url=url))[0] == 0
        await assert_refused(url, "migrate", "the schema public", "USAGE and CREATE")
