"""The commands as a user types them: their output, their exit codes, and that no process is left behind."""

import asyncio
import json
import os
import signal
import sys
from pathlib import Path

import asyncpg
import httpx
import psutil
import pytest

from app.db import Pool
from app.operations.maintenance.pruner import TABLES
from tests.e2e.conftest import StartService, client, order
from tests.harness.checker import FINAL, Answers, violations
from tests.harness.commands import orders
from tests.harness.history import lived_through
from tests.harness.processes import REPOSITORY, is_alive
from tests.harness.wait import AMPLE_SECONDS, wait_until

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


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_while_the_demo_starts_is_an_orderly_end(
    number: signal.Signals, tmp_path: Path, free_port: int
) -> None:
    """Ctrl-C and SIGTERM end a starting demo with exit code 0, and no process is left."""
    arguments = ("-m", "app", "demo", "--ephemeral", "--port", "0", "--sandbox-port", str(free_port))
    demo = await asyncio.create_subprocess_exec(
        *(sys.executable, *arguments),
        cwd=REPOSITORY,
        env={**os.environ, "TMPDIR": str(tmp_path)},
        stderr=asyncio.subprocess.PIPE,
    )
    assert demo.stderr is not None
    assert b"Starting PostgreSQL" in await demo.stderr.readline()
    members = psutil.Process(demo.pid).children(recursive=True)
    demo.send_signal(number)
    _, err = await demo.communicate()
    assert (demo.returncode, err) == (0, b"")
    assert not any(map(is_alive, members))
    assert os.listdir(tmp_path) == []  # noqa: PTH208 - Path.iterdir is refused in a coroutine


async def test_serve_refuses_a_used_port(start_service: StartService) -> None:
    """The command exits with 2 and one line before it starts anything."""
    sandbox = await start_service({}, ("sandbox",))
    code, _, err = await orders("serve", database_url=NOBODY, roles="api", port=str(sandbox.port))
    assert (code, err.count("\n")) == (2, 1)
    assert f"127.0.0.1:{sandbox.port}" in err


async def test_the_demo_finishes_and_keeps_its_orders(
    start_service: StartService, server_directory: Path, free_port: int
) -> None:
    """Orders end, survive a restart with the same `--data-dir`, and no process is left."""
    demo = await start_service(
        {}, ("demo", "--data-dir", str(server_directory / "demo"), "--sandbox-port", str(free_port))
    )
    sandbox_url = f"http://127.0.0.1:{free_port}"
    family = psutil.Process(demo.process.pid)
    members = [family, *family.children(recursive=True)]
    assert any("postgres" in member.name() for member in members)
    answers = Answers()
    async with client(demo.url) as http, client(sandbox_url) as sandbox:
        bodies = {"plain": order(), "declined": order(payment_method="pm_card_declined")}
        for key, body in bodies.items():
            answers.add(key, await http.post("/orders", json=body, headers={"Idempotency-Key": key}))
        locations = [next(iter(told))[0] for told in answers.by_key.values()]
        await wait_until(lambda: ended(http, locations), AMPLE_SECONDS, "end of both orders")
        assert await shown(http, locations) == [("confirmed", None), ("rejected", "card-declined")]
        database_url = next(word for word in demo.log.read_text().split() if word.startswith("postgresql://"))
        await wait_until(lambda: all_told(database_url), AMPLE_SECONDS, "events of both ends")
        assert await violations(database_url, sandbox, answers) == []
    assert await demo.terminate(number=signal.SIGINT) == 0
    assert not any(map(is_alive, members))
    await demo.start()
    assert await demo.terminate(number=signal.SIGKILL) == -signal.SIGKILL
    await demo.start()  # restart at once: the transport lease of the killed process only refuses other transports
    async with client(demo.url) as http:
        assert await shown(http, locations) == [("confirmed", None), ("rejected", "card-declined")]


async def ended(http: httpx.AsyncClient, locations: list[str]) -> bool:
    return all(status in FINAL for status, _ in await shown(http, locations))


async def all_told(database_url: str) -> bool:
    conn = await asyncpg.connect(database_url)
    try:
        return bool(await conn.fetchval("SELECT count(published_at) = 4 FROM outbox"))
    finally:
        await conn.close()


async def shown(http: httpx.AsyncClient, locations: list[str]) -> list[tuple[str, str | None]]:
    found = [(await http.get(location)).raise_for_status().json() for location in locations]
    return [(each["status"], each["status_reason"]) for each in found]
