"""`orders saga` as an operator types it: its output, its exit codes, and the state after it is killed."""

import asyncio
import json
import os
import pwd
import re
import signal
import sys
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest

from app.db import Pool
from app.operations.saga_views import SagaAnswer, SagaChanged, SagasAnswer
from tests.harness.commands import orders
from tests.harness.operating import audit_rows, compensate, recorded
from tests.harness.orders import placed, somebody_waits, start_saga
from tests.harness.processes import REPOSITORY
from tests.harness.sagas import Stage
from tests.harness.sandboxes import set_faults
from tests.harness.wait import AMPLE_SECONDS, wait_until

NOBODY = "postgresql://orders:orders@127.0.0.1:1/orders"  # a port that nothing listens on
SOME_ID = "01890a5d-ac97-7001-8000-000000000000"
WHY = "the payment provider is back"
ACTOR = f"cli:{pwd.getpwuid(os.getuid()).pw_name}"
CHARGE_FAILS = {"target": "payment.charge", "kind": "error"}


async def listed(database_url: str, *args: str) -> list[str]:
    _, out, _ = await orders("saga", "list", "--json", *args, database_url=database_url)
    return [saga.order_id for saga in SagasAnswer.model_validate_json(out).sagas]


async def age(pool: Pool, saga_id: UUID, column: str, seconds: int) -> None:
    await pool.execute(
        f"UPDATE sagas SET {column} = clock_timestamp() - make_interval(secs => $2) WHERE id = $1",  # noqa: S608 - a name
        saga_id,
        float(seconds),
    )


async def test_stuck_sagas_are_listed_first(database_url: str, stage: Stage) -> None:
    """Then come the other unfinished sagas, the oldest first."""
    ended = await start_saga(stage.pool)
    await stage.drive()
    young, old, late, untaken = [await start_saga(stage.pool) for _ in range(4)]
    await stage.pool.execute("UPDATE sagas SET next_attempt_at = clock_timestamp() + interval '1 hour'")
    await age(stage.pool, old, "started_at", 500)
    await age(stage.pool, late, "deadline_at", 61)
    await age(stage.pool, untaken, "next_attempt_at", 61)
    await compensate(stage.pool, untaken)  # it is due already, which does not affect the order
    await age(stage.pool, untaken, "next_attempt_at", 61)
    assert await listed(database_url) == [str(each) for each in (late, untaken, old, young)]
    assert await listed(database_url, "--limit", "1") == [str(late)]
    assert await listed(database_url, "--stuck") == [str(late), str(untaken)]
    assert await listed(database_url, "--status", "compensating") == []
    assert str(ended) not in await listed(database_url, "--status", "pending")


async def test_a_listed_saga_shows_its_step_and_last_outcome(database_url: str, stage: Stage) -> None:
    """Each saga has its step, its next attempt and the last outcome."""
    assert await orders("saga", "list", database_url=database_url) == (0, "0 unfinished sagas shown\n", "")
    saga = await start_saga(stage.pool)
    _, out, _ = await orders("saga", "list", database_url=database_url)
    assert "no call yet" in out
    await set_faults(stage.http, CHARGE_FAILS)
    await stage.orchestrator("worker-1").run_once()
    await stage.pool.execute("UPDATE sagas SET next_attempt_at = clock_timestamp() + interval '1 hour'")
    code, out, err = await orders("saga", "list", database_url=database_url)
    assert (code, err) == (0, "")
    assert re.fullmatch(
        rf"1 unfinished sagas shown\n\n{saga}  pending\n"
        r"  age     [0-9.]+ s, deadline 20\S+Z\n"
        r"  step    forward: charge_payment, 1 attempts\n"
        r"  next    in 3[56]\d\d\.\d s\n"
        r"  last    unknown \(.+\)\n",
        out,
    )


async def test_a_claimed_saga_shows_its_lease(database_url: str, stage: Stage) -> None:
    """A saga with an expired lease shows since when it is due."""
    saga = await start_saga(stage.pool)
    lease = "UPDATE sagas SET lease_owner = 'worker-1', next_attempt_at = clock_timestamp() + make_interval(secs => $1)"
    await stage.pool.execute(lease, 600.0)
    _, out, _ = await orders("saga", "list", database_url=database_url)
    assert "  next    running on worker-1, lease ends in " in out
    code, out, _ = await orders("saga", "retry", str(saga), "--reason", WHY, database_url=database_url)
    assert (code, out) == (0, f"{saga} is under way: a process has it, and was left alone\n")
    await stage.pool.execute(lease, -900.0)
    _, out, _ = await orders("saga", "list", database_url=database_url)
    assert re.search(r"next    due for 9\d\d\.\d s, abandoned by worker-1\n", out)
    assert ", stuck\n" in out


async def test_a_saga_is_shown_with_its_log(database_url: str, stage: Stage) -> None:
    """The log has every call to a partner, and every action of an operator."""
    saga = await start_saga(stage.pool)
    await set_faults(stage.http, CHARGE_FAILS)
    await stage.orchestrator().run_once()
    await stage.pool.execute("UPDATE sagas SET next_attempt_at = clock_timestamp() + interval '1 hour'")
    assert await orders("saga", "retry", str(saga), "--reason", WHY, database_url=database_url) == (
        0,
        f"{saga} is due at once\n",
        "",
    )
    await set_faults(stage.http)
    await stage.drive()
    code, out, err = await orders("saga", "show", str(saga), "--json", database_url=database_url)
    assert (code, err) == (0, "")
    answer = SagaAnswer.model_validate_json(out)
    assert answer.saga
    assert (answer.order_id, answer.status, answer.saga.step, answer.saga.next_attempt_in_seconds) == (
        str(saga),
        "confirmed",
        None,
        None,
    )
    told = [f"{line.action} {line.step} {line.attempt} {line.outcome}" for line in answer.log]
    assert told == await stage.log(saga)
    assert [sorted(line.reply or {}) for line in answer.log if line.outcome == "done"] == [
        ["expires_at", "reservation_id"],
        ["payment_id"],
        [],
        ["tracking_id"],
    ]
    assert [line.at for line in answer.log] == sorted(line.at for line in answer.log)
    [acted] = answer.operator_actions
    assert (acted.actor, acted.action, acted.reason, acted.outcome) == (ACTOR, "retry", WHY, "due")

    _, out, _ = await orders("saga", "show", str(saga), database_url=database_url)
    assert out.startswith(f"{saga}  confirmed, version 2, placed ")
    assert re.search(r"\n  [0-9:.]+   saga      do charge_payment +[0-9,]+ ms  unknown \(.+\)\n", out)
    assert re.search(r"\n  [0-9:.]+   saga      do charge_payment #2 +[0-9,]+ ms  done\n", out)
    assert re.search(r"\n  ids     .*payment_id \S+, tracking_id \S+\n", out)
    assert re.search(rf"  operator  retry +due \({ACTOR}: {WHY}\)\n", out)

    await stage.pool.execute("UPDATE orders SET placed_at = placed_at - interval '3 days'")
    _, out, _ = await orders("saga", "show", str(saga), database_url=database_url)
    assert re.search(r"\n  [0-9:.]{12}   request   order placed\n", out)
    assert re.search(r"\n  [0-9]{2}-[0-9]{2} [0-9:]{8} saga      saga started\n", out), "the day of what came later"


async def test_an_order_without_a_saga_is_shown(database_url: str, pool: Pool) -> None:
    """The output says that no saga exists."""
    order = await placed(pool)
    code, out, _ = await orders("saga", "show", str(order.id), database_url=database_url)
    assert (code, out.splitlines()[1]) == (
        0,
        "  saga    none: it has not started, or was removed after its retention",
    )


async def test_compensate_reports_its_outcome(database_url: str, stage: Stage) -> None:
    """The exit code is 0 for a change or none needed, and 1 for a refusal."""

    async def run(order_id: UUID) -> tuple[int, str, str]:
        return await orders("saga", "compensate", str(order_id), "--reason", WHY, database_url=database_url)

    unstarted, started = (await placed(stage.pool)).id, await start_saga(stage.pool)
    assert await run(unstarted) == (0, f"{unstarted} is cancelled: its saga had not started\n", "")
    assert await run(started) == (0, f"{started} turns back\n", "")
    assert await run(started) == (0, f"{started} turns back already: nothing was changed\n", "")
    _, out, _ = await orders("saga", "show", str(started), database_url=database_url)
    assert out.startswith(f"{started}  pending (compensated-by-operator), version 1, ")
    await stage.drive()
    ended = "has ended already, with everything undone: nothing was changed"
    assert await run(started) == (0, f"{started} {ended}\n", "")
    confirmed = await start_saga(stage.pool)
    await stage.drive()
    assert await run(confirmed) == (1, "", "orders: the order is confirmed\n")
    code, _, err = await orders("saga", "retry", str(confirmed), "--reason", WHY, database_url=database_url)
    assert (code, err) == (1, "orders: the order is confirmed\n")
    assert {(actor, reason) for actor, _, _, reason, _ in await audit_rows(stage.pool)} == {(ACTOR, WHY)}
    assert len(await audit_rows(stage.pool)) == 6
    code, out, _ = await orders(
        "saga", "compensate", str(started), "--reason", WHY, "--json", database_url=database_url
    )
    assert SagaChanged.model_validate_json(out).outcome == json.loads(out)["outcome"] == "ended-before"


@pytest.mark.parametrize("command", [("show",), ("retry", "--reason", WHY), ("compensate", "--reason", WHY)])
async def test_an_unknown_order_is_one_line(database_url: str, command: tuple[str, ...]) -> None:
    """The exit code is 1."""
    unknown = str(uuid4())
    name, *options = command
    assert await orders("saga", name, unknown, *options, database_url=database_url) == (
        1,
        "",
        f"orders: there is no order {unknown}\n",
    )


@pytest.mark.parametrize(
    "args",
    [
        ("show", "seven"),
        ("retry", SOME_ID),
        ("compensate", SOME_ID),
        ("retry", "seven", "--reason", WHY),
        ("retry", SOME_ID, "--reason", ""),
        ("retry", SOME_ID, "--reason", "  "),
        ("compensate", SOME_ID, "--reason", "two\nlines"),
        ("compensate", SOME_ID, "--reason", "\x1b[2J"),
        ("compensate", SOME_ID, "--reason", "half \udcff"),
        ("compensate", SOME_ID, "--reason", "x" * 501),
        ("list", "--status", "confirmed"),
        ("list", "--limit", "0"),
    ],
    ids=ascii,
)
async def test_an_invalid_option_is_a_usage_error(args: tuple[str, ...]) -> None:
    """The command exits with 2, and changes nothing."""
    code, out, err = await orders("saga", *args, database_url=NOBODY)
    assert (code, out) == (2, "")
    assert "Error: " in err


@pytest.mark.parametrize(
    ("args", "settings", "code"),
    [
        (("list",), {"database_url": NOBODY}, 3),
        (("retry", SOME_ID, "--reason", WHY), {"database_url": NOBODY}, 3),
        (("compensate", SOME_ID, "--reason", WHY, "--data-dir", "/nowhere"), {}, 3),
        (("show", SOME_ID), {"database_url": "http://127.0.0.1/"}, 2),
    ],
    ids=str,
)
async def test_exit_codes_tell_unavailable_from_misconfigured(
    args: tuple[str, ...], settings: dict[str, str], code: int
) -> None:
    """An unavailable server is exit code 3, a bad setting exit code 2, each with one line."""
    found, out, err = await orders("saga", *args, **settings)
    assert (found, out, err.count("\n")) == (code, "", 1)
    assert err.startswith("orders: ")


async def test_a_killed_command_can_be_run_again(database_url: str, stage: Stage) -> None:
    """It is killed between the change of the saga and the audit row: neither is committed without the other."""
    saga = await start_saga(stage.pool)
    conn = await asyncpg.connect(database_url)  # not from the pool, which limits idle transactions
    async with conn.transaction():
        await conn.execute("LOCK TABLE operator_actions IN EXCLUSIVE MODE")
        process = await started_compensating(database_url, saga)
        await wait_until(lambda: somebody_waits(stage.pool), AMPLE_SECONDS, "the command at the record")
        process.send_signal(signal.SIGKILL)
        assert await process.wait() == -signal.SIGKILL
    await conn.close()
    assert (await stage.order(saga)).cancel_requested_at is None
    assert await recorded(stage.pool) == []
    code, out, _ = await orders("saga", "compensate", str(saga), "--reason", WHY, database_url=database_url)
    assert (code, out) == (0, f"{saga} turns back\n")
    await stage.drive()
    assert await stage.outcome(saga) == "rejected: compensated-by-operator"
    assert await recorded(stage.pool) == ["compensate turns-back"]


async def started_compensating(database_url: str, saga: UUID) -> Any:
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "app", "saga", "compensate", str(saga), "--reason", WHY),
        cwd=REPOSITORY,
        env={**os.environ, "ORDERS_DATABASE_URL": database_url},
    )
