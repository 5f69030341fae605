"""The commands as a user types them: their output, their exit codes, and that no process is left behind."""

import asyncio
import json
from pathlib import Path

import pytest

from app.db import Pool
from app.operations.maintenance.pruner import TABLES
from tests.e2e.conftest import StartService
from tests.harness.commands import orders
from tests.harness.history import lived_through
from tests.harness.processes import REPOSITORY

NOBODY = "postgresql://orders:orders@127.0.0.1:1/orders"  # a port that nothing listens on


@pytest.mark.parametrize(
    ("settings", "variable"),
    [
        ({}, "ORDERS_DATABASE_URL"),
        ({"database_url": "mysql://localhost/orders"}, "ORDERS_DATABASE_URL"),
        ({"database_url": NOBODY, "roles": "api,kitchen"}, "ORDERS_ROLES"),
        ({"database_url": NOBODY, "roles": "relay"}, "ORDERS_RABBITMQ_URL"),
        ({"database_url": NOBODY}, "ORDERS_INVENTORY_URL"),
        ({"database_url": NOBODY, "roles": "api", "port": "eighty"}, "ORDERS_PORT"),
    ],
)
async def test_a_bad_setting_is_one_line_that_names_it(settings: dict[str, str], variable: str) -> None:
    """`serve` reports a bad setting in one line with the variable's name, and exits with 2."""
    code, out, err = await orders("serve", **settings)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert variable in err


async def test_migrate_reports_and_upgrades_the_schema(database_url: str, postgres_url: str) -> None:
    """`migrate --check` exits with 1 while the schema is behind; `migrate` upgrades it."""
    empty = f"{postgres_url.rpartition('/')[0]}/template1"
    assert await orders("migrate", "--check", database_url=empty) == (
        1,
        "the schema is behind this release: run `orders migrate`\n",
        "",
    )
    for args in (["migrate"], ["migrate", "--check"]):
        assert await orders(*args, database_url=database_url) == (0, "the schema is current\n", "")


@pytest.mark.parametrize("name", ["openapi", "asyncapi"])
async def test_the_committed_documents_are_up_to_date(name: str) -> None:
    """The files in `docs/` are what `orders openapi` and `orders asyncapi` print."""
    committed = await asyncio.to_thread((REPOSITORY / "docs" / f"{name}.json").read_text)
    assert await orders(name) == (0, committed, "")


async def test_prune_reports_what_it_removed(database_url: str, pool: Pool) -> None:
    """One pass removes the rows past their retention, and prints their number per table."""
    await lived_through(pool, 3, "8 days")
    code, out, err = await orders("prune", "--json", database_url=database_url, saga_retention_seconds="604800")
    assert (code, json.loads(out), err) == (0, {"outbox": 3, "inbox": 3, "sagas": 3, "idempotency_keys": 0}, "")
    code, out, err = await orders("prune", database_url=database_url)
    assert (code, [line.split() for line in out.splitlines()], err) == (
        0,
        [["0", table] for table in TABLES],
        "",
    )


@pytest.mark.parametrize(
    ("settings", "args", "expected"),
    [
        ({"database_url": NOBODY}, [], 3),
        ({}, ["--data-dir", "nowhere"], 3),
        ({}, [], 2),
        ({"database_url": NOBODY, "inbox_retention_seconds": "0"}, [], 2),
    ],
)
async def test_prune_exits_with_2_or_3(settings: dict[str, str], args: list[str], expected: int) -> None:
    """An unavailable server is exit code 3, a bad setting exit code 2."""
    code, out, err = await orders("prune", *args, **settings)
    assert (code, out, err.count("\n")) == (expected, "", 1)


@pytest.mark.parametrize(("locked", "expected"), [(("inbox",), 1), (TABLES, 3)])
async def test_prune_reports_tables_that_failed(
    database_url: str, pool: Pool, locked: tuple[str, ...], expected: int
) -> None:
    """A locked table, as in a migration, is reported with exit code 1; if all tables fail, the exit code is 3."""
    await lived_through(pool, 3, "91 days")
    async with pool.acquire() as conn, conn.transaction():
        await conn.execute(f"LOCK TABLE {', '.join(locked)}")
        code, out, err = await orders("prune", "--json", database_url=database_url)
    removed = {table: 0 if table in locked else 3 for table in ("outbox", "inbox", "sagas")}
    assert (code, json.loads(out)) == (expected, {**removed, "idempotency_keys": 0})
    told = [line.split(":")[1].split()[0] for line in err.splitlines()]
    assert told == list(locked)


@pytest.mark.parametrize("args", [["migrate"], ["migrate", "--check"]])
async def test_migrate_exits_with_3_without_postgres(args: list[str]) -> None:
    """An unavailable server is one line and exit code 3."""
    code, out, err = await orders(*args, database_url=NOBODY)
    assert (code, out, err.count("\n")) == (3, "", 1)


async def test_a_refused_database_url_names_its_variable(database_url: str) -> None:
    """A URL that Postgres refuses is one line that names ORDERS_DATABASE_URL."""
    for part in ("sslmode=bogus", "no_such_parameter=3"):
        for args in (["migrate"], ["serve"]):
            code, out, err = await orders(*args, database_url=f"{database_url}?{part}", roles="api")
            assert (code, out, err.count("\n")) == (2, "", 1)
            assert "ORDERS_DATABASE_URL" in err


async def test_a_sqlalchemy_url_works_too(database_url: str) -> None:
    """`postgresql+asyncpg://` is accepted."""
    url = database_url.replace("postgresql://", "postgresql+asyncpg://") + "?ssl=disable"
    assert await orders("migrate", database_url=url) == (0, "the schema is current\n", "")


async def test_an_unusable_data_dir_is_one_line(tmp_path: Path) -> None:
    """`sandbox --ledger` and `demo --data-dir` report an unusable path in one line."""
    no_ledger = tmp_path / "text"
    no_ledger.write_text("this is no SQLite file, and much longer than its header of a hundred bytes" * 3)
    for args in (["sandbox", "--ledger", str(no_ledger), "--port", "0"], ["demo", "--data-dir", str(no_ledger)]):
        code, out, err = await orders(*args)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert str(no_ledger) in err


async def test_serve_refuses_a_used_port(start_service: StartService) -> None:
    """The command exits with 2 and one line before it starts anything."""
    sandbox = await start_service({}, ("sandbox",))
    code, _, err = await orders("serve", database_url=NOBODY, roles="api", port=str(sandbox.port))
    assert (code, err.count("\n")) == (2, 1)
    assert f"127.0.0.1:{sandbox.port}" in err
