"""Plant known bugs, one at a time, in a scratch copy, and check that a named test catches each: `python -m chaos.bugs`.

A harness that never fails proves nothing. Each bug breaks one invariant in the way that services of this kind commonly
do. A bug whose text no longer occurs exactly once in the code fails the run, so the table cannot go stale.
"""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

REPOSITORY = Path(__file__).parents[1]
COPIED = ("app", "chaos", "load", "migrations", "sandbox", "scripts", "tests", "deploy", "docs", "pyproject.toml")
CAUGHT = 1  # pytest's exit code when a test failed; others mean that no test ran
PATIENCE_SECONDS = 300


@dataclasses.dataclass(frozen=True)
class Bug:
    """A bug: in `path`, `good` becomes `bad`. `caught_by`: tests, of which at least one must fail."""

    name: str
    invariant: str
    path: str
    good: str
    bad: str
    caught_by: Sequence[str]


STORE, OUTBOX = "app/saga/store.py", "app/messaging/outbox.py"
INTEGRATION = "tests/integration"

BUGS = (
    Bug(
        "asynchronous commits are accepted",
        "I1",
        "app/db_session.py",
        'if found["synchronous_commit"] == "off" or ignores_standby:',
        "if ignores_standby:",
        [f"{INTEGRATION}/test_db.py::test_a_session_with_asynchronous_commits_is_refused"],
    ),
    Bug(
        "an unknown COMMIT counts as committed",
        "I1",
        "app/idempotency/transaction.py",
        "            if in_doubt is None:\n                raise\n",
        "            if in_doubt is None:\n                raise\n            return in_doubt\n",
        [f"{INTEGRATION}/idempotency/test_intake.py"],
    ),
    Bug(
        "a COMMIT that waits for the standby is cancelled",
        "I1",
        "app/db.py",
        "            conn.terminate()\n            raise\n        except asyncpg.ReadOnlySQLTransactionError:",
        "            await asyncio.sleep(0.3)\n            conn.terminate()\n            raise\n"
        "        except asyncpg.ReadOnlySQLTransactionError:",
        [f"{INTEGRATION}/test_synchronous_standby.py"],
    ),
    Bug(
        "a row that no standby has is proof of a commit",
        "I1",
        "app/idempotency/transaction.py",
        "        async with db.connection(pool) as conn:\n            await db.await_standby(conn)\n        return C",
        "        return C",
        [f"{INTEGRATION}/test_synchronous_standby.py::test_the_second_attempt_waits_for_the_standby_too"],
    ),
    Bug(
        "the same key with another body is a replay",
        "I2",
        "app/idempotency/transaction.py",
        "    if (record.fingerprint_version, record.fingerprint) != (key.fingerprint_version, key.fingerprint):",
        "    if False:",
        [f"{INTEGRATION}/idempotency/test_intake.py"],
    ),
    Bug(
        "Redis decides: a copy is not compared with the request",
        "I2",
        "app/idempotency/replay_cache.py",
        "same = {field: head[field] for field in _request(key)} == _request(key)",
        'same = head["name"] == _request(key)["name"]',
        [f"{INTEGRATION}/idempotency/test_intake.py::test_another_request_with_a_copied_key_is_refused"],
    ),
    Bug(
        "an expired key is never free again",
        "I2",
        "app/idempotency/store.py",
        "    WHERE k.expires_at <= clock_timestamp()\n    RETURNING tenant, key",
        "    WHERE false\n    RETURNING tenant, key",
        [f"{INTEGRATION}/idempotency", f"{INTEGRATION}/orders/test_store.py"],
    ),
    Bug(
        "messages are published without mandatory",
        "I3",
        "app/messaging/rabbitmq/batch.py",
        "mandatory=envelope.type in self._mandatory_types,",
        "mandatory=False,",
        [f"{INTEGRATION}/messaging/test_rabbitmq.py"],
    ),
    Bug(
        "a returned message counts as confirmed",
        "I3",
        "app/messaging/rabbitmq/publisher.py",
        "channel(publisher_confirms=True, on_return_raises=True)",
        "channel(publisher_confirms=True, on_return_raises=False)",
        [f"{INTEGRATION}/messaging/test_rabbitmq.py"],
    ),
    Bug(
        "messages are not persistent",
        "I3",
        "app/messaging/rabbitmq/batch.py",
        "delivery_mode=aio_pika.DeliveryMode.PERSISTENT,",
        "delivery_mode=aio_pika.DeliveryMode.NOT_PERSISTENT,",
        [f"{INTEGRATION}/messaging/test_rabbitmq.py"],
    ),
    Bug(
        "rows are recorded as published before the confirm",
        "I3",
        "app/messaging/relay.py",
        "results: list[PublishResult] = [UNCONFIRMED] * len(rows)",
        "results: list[PublishResult] = [None] * len(rows)",
        [f"{INTEGRATION}/messaging/test_relay.py"],
    ),
    Bug(
        "a relay without its lease still records",
        "I3",
        OUTBOX,
        "WHERE outbox.id = result.id AND claim_token = $1",
        "WHERE outbox.id = result.id AND $1::uuid IS NOT NULL",
        [f"{INTEGRATION}/messaging/test_outbox.py"],
    ),
    Bug(
        "events of an order may overtake each other",
        "I3",
        OUTBOX,
        "AND sequence <= (\n",
        "AND sequence * 0 <= (\n",
        [f"{INTEGRATION}/messaging/test_outbox.py"],
    ),
    Bug(
        "the inbox is off: every delivery takes effect",
        "I4",
        "app/messaging/inbox.py",
        "            WHERE inbox.processed_at IS NULL\n            RETURNING true",
        "            RETURNING true",
        [f"{INTEGRATION}/messaging/test_consumer.py"],
    ),
    Bug(
        "a message is acknowledged before it is handled",
        "I4",
        "app/messaging/rabbitmq/subscription.py",
        "        match await handle_to_end(self._consumer, message.headers, message.body, ended):\n"
        "            case Handled():\n                await message.ack()\n",
        "        await message.ack()\n"
        "        match await handle_to_end(self._consumer, message.headers, message.body, ended):\n"
        "            case Handled():\n                pass\n",
        [f"{INTEGRATION}/messaging/test_subscription.py"],
    ),
    Bug(
        "a saga is written without its fencing token",
        "I4",
        STORE,
        "        WHERE id = $1 AND version = $2\n        RETURNING id, version,",
        "        WHERE id = $1 AND $2::integer IS NOT NULL\n        RETURNING id, version,",
        [f"{INTEGRATION}/saga/test_store.py"],
    ),
    Bug(
        "the key of a partner call changes with each attempt",
        "I5",
        "app/partners/payment.py",
        'f"{charge.saga_id}:charge_payment", body, CHARGE',
        'f"{charge.saga_id}:charge_payment:{id(body)}", body, CHARGE',
        ["tests/contract/test_client.py", f"{INTEGRATION}/saga/test_orchestrator.py"],
    ),
    Bug(
        "a step whose outcome is unknown is not undone",
        "I5",
        "app/saga/plan.py",
        "return _step_back(backward, current if state.attempts else current - 1, plans)",
        "return _step_back(backward, current - 1, plans)",
        ["tests/unit/saga/test_plan.py"],
    ),
    Bug(
        "a cancel during the last step is lost",
        "I5",
        "app/saga/runner.py",
        "locked_state = self._interrupt(run, progress, order.cancel_reason)",
        "locked_state = state",
        [f"{INTEGRATION}/saga/test_cancellation.py"],
    ),
    Bug(
        "a saga starts for a cancelled order",
        "I5",
        "app/saga/start.py",
        "    if status != Status.PENDING:\n        return\n",
        "",
        [f"{INTEGRATION}/saga/test_store.py", f"{INTEGRATION}/saga/test_cancellation.py"],
    ),
    Bug(
        "the resender is off",
        "I6",
        "app/operations/maintenance/resender.py",
        "        if unstarted and await self._may_resend():",
        "        if False:",
        [f"{INTEGRATION}/operations/test_resender.py"],
    ),
    Bug(
        "an undo that keeps failing is not reported",
        "I6",
        STORE,
        "                now.at + make_interval(secs => $15)),",
        "                now.at + make_interval(secs => $15) + interval '100 years'),",
        [f"{INTEGRATION}/saga/test_needs_operator.py"],
    ),
    Bug(
        "a claimed row stays with a dead relay",
        "I6",
        OUTBOX,
        "WHERE {PENDING} AND next_attempt_at <= (SELECT clock_timestamp())",
        "WHERE {PENDING} AND claim_token IS NULL AND next_attempt_at <= (SELECT clock_timestamp())",
        [f"{INTEGRATION}/messaging/test_outbox.py"],
    ),
    Bug(
        "rows are pruned before their order has ended",
        "I6",
        OUTBOX,
        '        await select_finished(conn, {row["subject"] for row in rows}),',
        '        [row["subject"] for row in rows],',
        [f"{INTEGRATION}/operations/test_pruner.py"],
    ),
    Bug(
        "an expired hold is shipped",
        "I7",
        "app/partners/inventory.py",
        'COMMIT = Agreement(200, (), {(409, "hold-expired")})',
        "COMMIT = Agreement(None)",
        ["tests/contract", f"{INTEGRATION}/saga/test_orchestrator.py"],
    ),
    Bug(
        "stock is not released",
        "I7",
        "app/saga/steps.py",
        "undo=lambda ports, request: ports.inventory.release(request.order.id),",
        "undo=lambda ports, request: ports.shipping.cancel(request.order.id),",
        [f"{INTEGRATION}/saga/test_orchestrator.py"],
    ),
    Bug(
        "a hold is shorter than the saga may take",
        "I7",
        "app/saga/start.py",
        "coalesce($8, ceil($5) + $9)::int",
        "coalesce($8, ceil($5) - $9)::int",
        [f"{INTEGRATION}/saga/test_store.py"],
    ),
    Bug(
        "a reader gets another tenant's order",
        "I9",
        "app/orders/store.py",
        "if order is None or order.tenant != tenant:",
        "if order is None:",
        [f"{INTEGRATION}/auth/test_owasp.py"],
    ),
    Bug(
        "keys are shared by all tenants",
        "I9",
        "app/idempotency/key.py",
        "return IdempotencyKey(tenant, key, fingerprint(",
        'return IdempotencyKey("", key, fingerprint(',
        [f"{INTEGRATION}/auth/test_owasp.py"],
    ),
    Bug(
        "a listing shows the orders of all tenants",
        "I9",
        "app/orders/queries.py",
        'yield f"tenant = {parameter(listing.tenant)}"',
        'yield f"{parameter(listing.tenant)}::text IS NOT NULL"',
        [f"{INTEGRATION}/auth/test_owasp.py", f"{INTEGRATION}/api/test_listing.py"],
    ),
)


@dataclasses.dataclass(frozen=True)
class Catch:
    """Whether a bug was caught, and by which test. `problem`: why the bug could not be tried."""

    bug: str
    invariant: str
    caught_by: str | None
    seconds: float
    problem: str | None = None


def plant(bug: Bug, copy: Path) -> None:
    """Plant a bug in the copy. Raises ValueError unless its text occurs exactly once."""
    path = copy / bug.path
    text = path.read_text()
    if (found := text.count(bug.good)) != 1:
        raise ValueError(f"its text occurs {found} times in {bug.path}")
    path.write_text(text.replace(bug.good, bug.bad))


def try_bug(bug: Bug, copy: Path) -> Catch:
    """Plant the bug, run its tests, and remove it again."""
    started_at = time.monotonic()
    original = (copy / bug.path).read_text()
    try:
        plant(bug, copy)
        run = subprocess.run(  # noqa: S603 - our own tests
            [
                sys.executable,
                "-m",
                "pytest",
                "-q",
                "-x",
                "-n0",
                "--no-header",
                "-p",
                "no:cacheprovider",
                *bug.caught_by,
            ],
            cwd=copy,
            env={**os.environ, "PYTHONPATH": str(copy)},
            capture_output=True,
            text=True,
            timeout=PATIENCE_SECONDS,
            check=False,
        )
    except ValueError as error:
        return Catch(bug.name, bug.invariant, None, 0.0, str(error))
    finally:
        (copy / bug.path).write_text(original)
    lines = run.stdout.splitlines()
    failed = [line.removeprefix("FAILED ").partition(" - ")[0] for line in lines if line.startswith("FAILED ")]
    problem = None if run.returncode in {0, CAUGHT} else f"pytest ended with {run.returncode}: {run.stdout[-300:]}"
    return Catch(
        bug.name, bug.invariant, failed[0] if failed else None, round(time.monotonic() - started_at, 1), problem
    )


def copy_repository(directory: Path) -> Path:
    """Copy everything that the tests need."""
    copy = directory / "copy"
    copy.mkdir()
    for name in COPIED:
        source = REPOSITORY / name
        if source.is_dir():
            shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(source, copy / name)
    return copy


def main(
    only: Annotated[list[str] | None, typer.Option(help="Try only bugs whose name contains this.")] = None,
    output: Annotated[Path | None, typer.Option(help="Write the result as JSON to this file.")] = None,
) -> None:
    """Plant each bug in turn, and check that its tests catch it. Exit 1 if one is not caught."""
    chosen = [bug for bug in BUGS if not only or any(part in bug.name for part in only)]
    if not chosen:
        raise typer.BadParameter("no bug has such a name", param_hint="--only")
    catches = []
    with tempfile.TemporaryDirectory(prefix="orders-bugs-") as directory:
        copy = copy_repository(Path(directory))
        for bug in chosen:
            catches.append(catch := try_bug(bug, copy))
            result = catch.problem or catch.caught_by or "NOT CAUGHT"
            typer.echo(f"{catch.invariant}  {catch.bug:<55}  {catch.seconds:5.1f} s  {result}")
    missed = [catch for catch in catches if catch.caught_by is None]
    typer.echo(f"{len(catches) - len(missed)} of {len(catches)} planted bugs were caught")
    if output is not None:
        output.write_text(json.dumps([dataclasses.asdict(catch) for catch in catches], indent=1))
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    typer.run(main)
