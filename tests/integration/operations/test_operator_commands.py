"""`orders outbox` and `orders dlq` as an operator types them: their output and exit codes."""

import json
from functools import partial
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
from aio_pika.abc import AbstractChannel

from app.db import Pool, migrate
from app.demo.embedded_postgres import EmbeddedPostgres, find_binaries
from app.loops import in_thread
from app.messaging.consumer import Consumer
from app.observability.signals import Signals
from app.operations.dead_letter_views import DeadLettersAnswer, TreatedAnswer
from app.operations.outbox import OutboxAnswer, OutboxCounts
from app.saga import start as saga_start
from tests.harness.commands import module, orders
from tests.harness.databases import patient_pool
from tests.harness.dead_letters import REASON, consuming, drained, holds, set_aside
from tests.harness.events import PLACED
from tests.harness.operating import recorded
from tests.harness.orders import DEADLINE_SECONDS, event_of, placed
from tests.harness.queues import CONSUMER, QUEUE
from tests.harness.wait import AMPLE_SECONDS, wait_until

NOBODY = "postgresql://orders:orders@127.0.0.1:1/orders"  # a port that nothing listens on
SOME_ID = "01890a5d-ac97-7001-8000-000000000000"
NO_BROKER = "amqp://127.0.0.1:1/"


@pytest.fixture
def env(database_url: str, rabbitmq_url: str) -> dict[str, str]:
    return {"database_url": database_url, "rabbitmq_url": rabbitmq_url}


async def parked(pool: Pool) -> UUID:
    order = await placed(pool)
    row_id: UUID = await pool.fetchval(
        """
        UPDATE outbox SET parked_at = clock_timestamp(), last_error = $1, attempts = 10
        WHERE subject = $2 RETURNING id
        """,
        REASON,
        str(order.id),
    )
    return row_id


async def row_of(pool: Pool, row_id: UUID) -> dict[str, Any]:
    row = await pool.fetchrow("SELECT * FROM outbox WHERE id = $1", row_id)
    assert row is not None
    return dict(row)


async def put(pool: Pool, channel: AbstractChannel, number: int) -> list[str]:
    """Dead-letter the events of new orders; return their ids."""
    found = []
    for _ in range(number):
        envelope = event_of(await placed(pool))
        await set_aside(channel, envelope)
        found.append(str(envelope.id))
    await holds(channel, number)
    return found


def saga_consumer(pool: Pool) -> Consumer:
    start = partial(saga_start.handle_order_placed, deadline_seconds=DEADLINE_SECONDS)
    return Consumer(pool, CONSUMER, {PLACED: start}, 1, Signals())


async def test_the_outbox_commands_show_waiting_rows(database_url: str, pool: Pool) -> None:
    """`stats` and `list` show pending and parked rows with their reasons."""
    row_id = await parked(pool)
    await placed(pool)
    code, out, err = await orders("outbox", "stats", database_url=database_url)
    assert (code, err) == (0, "")
    assert out.startswith("1 pending (the oldest for ")
    assert out.endswith(" s), 1 parked\n")
    _, out, _ = await orders("outbox", "stats", "--json", database_url=database_url)
    assert OutboxCounts.model_validate_json(out).parked == 1
    _, out, _ = await orders("outbox", "list", "--json", "--limit", "1", database_url=database_url)
    answer = OutboxAnswer.model_validate_json(out)
    assert (answer.pending, [(row.id, row.state, row.reason) for row in answer.rows]) == (
        1,
        [(str(row_id), "parked", REASON)],
    )
    _, out, _ = await orders("outbox", "list", database_url=database_url)
    assert f"{row_id}  {PLACED}  order " in out
    assert f"  reason    {REASON}\n" in out


async def test_a_parked_row_is_requeued_once(database_url: str, pool: Pool) -> None:
    """A second `requeue` finds no parked row, and exits with 1."""
    row_id = await parked(pool)
    assert await orders("outbox", "requeue", str(row_id), database_url=database_url) == (
        0,
        f"{row_id} is pending again\n",
        "",
    )
    row = await row_of(pool, row_id)
    assert (row["parked_at"], row["attempts"], row["last_error"]) == (None, 0, REASON)
    for unknown in (row_id, uuid4()):
        code, out, err = await orders("outbox", "requeue", str(unknown), database_url=database_url)
        assert (code, out, err) == (1, "", f"orders: no parked outbox row has the id {unknown}\n")
    assert await row_of(pool, row_id) == row


@pytest.mark.parametrize(
    "args",
    [
        ("outbox", "requeue", "seven"),
        ("outbox", "list", "--limit", "0"),
        ("dlq", "peek", "--since", "soon"),
        ("dlq", "replay", "--queue", "orders.other"),
        ("dlq", "purge", "--limit", "0"),
        ("dlq", "purge", "--id", ""),
        ("dlq", "replay", "--id", "r\udce9f-1"),  # not UTF-8 on the command line
    ],
    ids=lambda args: ascii(" ".join(args)),
)
async def test_an_invalid_option_is_a_usage_error(args: tuple[str, ...]) -> None:
    """The command exits with 2, and changes nothing."""
    code, out, err = await orders(*args, database_url=NOBODY)
    assert (code, out) == (2, "")
    assert "Error: Invalid value for" in err


@pytest.mark.parametrize(
    ("args", "settings", "code"),
    [
        (("outbox", "stats"), {"database_url": NOBODY}, 3),
        (("outbox", "requeue", SOME_ID), {"database_url": NOBODY}, 3),
        (("dlq", "peek"), {"database_url": NOBODY}, 3),
        (("dlq", "replay"), {"rabbitmq_url": NO_BROKER}, 3),
        (("outbox", "list", "--data-dir", "/nowhere"), {}, 3),
        (("dlq", "peek"), {"rabbitmq_url": "http://127.0.0.1/"}, 2),
    ],
    ids=str,
)
async def test_exit_codes_tell_unavailable_from_misconfigured(
    database_url: str, args: tuple[str, ...], settings: dict[str, str], code: int
) -> None:
    """An unavailable server is exit code 3, a bad setting exit code 2, each with one line."""
    found, out, err = await orders(*args, **{"database_url": database_url, **settings})
    assert (found, out, err.count("\n")) == (code, "", 1)
    assert err.startswith("orders: ")


async def test_an_outdated_schema_is_one_line(postgres_url: str) -> None:
    """The line says what to run."""
    code, out, err = await orders("dlq", "peek", database_url=f"{postgres_url.rpartition('/')[0]}/template1")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "orders migrate" in err


async def test_dead_letters_are_shown_replayed_and_purged(
    env: dict[str, str], pool: Pool, channel: AbstractChannel
) -> None:
    """`peek`, `replay` and `purge` report what they did to which dead letters."""
    first, second, third = await put(pool, channel, 3)
    code, out, _ = await orders("dlq", "peek", "--json", "--queue", "orders.saga.dlq", **env)
    answer = DeadLettersAnswer.model_validate_json(out)
    assert (code, answer.queue, answer.depth, [each.id for each in answer.dead_letters]) == (
        0,
        QUEUE,
        3,
        [first, second, third],
    )
    assert (answer.dead_letters[0].reason, answer.dead_letters[0].inbox) == (REASON, "never seen")
    await holds(channel, 3)
    _, out, _ = await orders("dlq", "peek", "--limit", "1", "--since", "15m", **env)
    assert out.startswith(f"3 dead letters of orders.saga, 1 shown\n\n{first}  {PLACED}  order ")
    assert f"  reason  {REASON} (7 attempts, 20" in out
    assert "  inbox   never seen\n  replay  is tried again, with all attempts\n" in out
    await holds(channel, 3)

    code, out, _ = await orders("dlq", "replay", "--dry-run", "--json", **env)
    treated = TreatedAnswer.model_validate_json(out)
    assert (code, treated.dry_run, treated.done) == (0, True, 3)
    await holds(channel, 3)
    _, out, _ = await orders("dlq", "replay", "--dry-run", "--id", second, **env)
    assert out.startswith(f"would be replayed: 1 of 3 dead letters of orders.saga\n\n{second}  ")
    await holds(channel, 3)

    assert await orders("dlq", "replay", "--id", second, **env) == (
        0,
        "replayed: 1 of 3 dead letters of orders.saga\n",
        "",
    )
    await holds(channel, 2)
    code, out, _ = await orders("dlq", "replay", "--id", second, **env)
    assert (code, out.splitlines()[0]) == (0, "replayed: 0 of 2 dead letters of orders.saga")
    assert f"sent again from the outbox: {second}" in out
    code, out, _ = await orders("dlq", "replay", "--id", SOME_ID, **env)
    assert (code, out) == (1, "replayed: 0 of 2 dead letters of orders.saga\n")
    await holds(channel, 2)
    assert await orders("dlq", "purge", **env) == (0, "purged: 2 of 2 dead letters of orders.saga\n", "")
    assert await orders("dlq", "purge", **env) == (0, "purged: 0 of 0 dead letters of orders.saga\n", "")
    await holds(channel, 0)
    assert await drained(channel, QUEUE) == [second]


@pytest.mark.parametrize("point", ["dlq.rearmed", "dlq.published"])
async def test_a_killed_replay_can_be_run_again(
    env: dict[str, str], pool: Pool, rabbitmq_url: str, channel: AbstractChannel, point: str
) -> None:
    """Each saga starts once, even when the first replay was killed in the middle."""
    await put(pool, channel, 3)
    assert (await module("tests.harness.crashing_dlq", "replay", point, **env))[0] == -9
    await holds(channel, 3)
    assert await recorded(pool) == ["dlq replay unfinished"]
    assert (await orders("dlq", "replay", **env))[:2] == (0, "replayed: 3 of 3 dead letters of orders.saga\n")
    assert await recorded(pool) == ["dlq replay unfinished", "dlq replay done"]
    await holds(channel, 0)
    await holds(channel, 6 if point == "dlq.published" else 3, QUEUE)
    async with consuming(rabbitmq_url, saga_consumer(pool)):
        await wait_until(lambda: all_started(pool), AMPLE_SECONDS, "start of every saga")
        await holds(channel, 0, QUEUE)
    assert await pool.fetchval("SELECT count(*) FROM sagas") == 3
    assert await pool.fetchval("SELECT count(*) FROM inbox WHERE processed_at IS NOT NULL") == 3
    await holds(channel, 0)


async def all_started(pool: Pool) -> bool:
    return bool(await pool.fetchval("SELECT count(*) >= 3 FROM sagas"))


async def test_the_commands_find_the_database_of_a_demo(server_directory: Path) -> None:
    """With `--data-dir`, as `orders demo` runs it: a database below the directory, and no broker."""
    async with EmbeddedPostgres(server_directory, find_binaries()) as postgres:
        await in_thread(migrate, postgres.url)
        async with patient_pool(postgres.url, 2) as pool:
            row_id = await parked(pool)
            here = ("--data-dir", str(server_directory))
            _, out, _ = await orders("dlq", "peek", "--json", *here)
            [letter] = DeadLettersAnswer.model_validate_json(out).dead_letters
            assert (letter.id, letter.reason, letter.attempts) == (str(row_id), REASON, 10)
            code, out, _ = await orders("dlq", "purge", *here)
            assert (code, out) == (0, "purged: 1 of 1 dead letters of orders.saga\n")
            _, out, _ = await orders("saga", "list", *here)
            assert "  event   was purged, since 20" in out
            assert (await orders("dlq", "replay", "--id", str(row_id), *here))[0] == 0
            assert (await row_of(pool, row_id))["parked_at"] is None
            _, out, _ = await orders("outbox", "list", "--json", *here)
            assert [row["state"] for row in json.loads(out)["rows"]] == ["waiting"]
