"""Stored sagas: the rows that a release leaves behind at every crash point of a saga, and the partners' decisions.

`python -m tests.harness.corpus` records the sagas of this release: real runs against the sandbox, each abandoned at one
point. `restore` puts one into a database and a sandbox, with a new id, as if it had run there.
"""

import asyncio
import json
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

from app.db import open_pool
from app.operations import sagas
from app.operations.audit import AuditActor
from app.orders.model import Line
from app.partners.http import HttpClient
from app.saga.steps import Action, StepRequest
from tests.harness import databases, sandboxes
from tests.harness.cancelling import cancel
from tests.harness.orders import start_saga
from tests.harness.run import ControllerRun
from tests.harness.sagas import Stage, dies_at
from tests.harness.sandboxes import HOLD_SECONDS, Partners, set_faults
from tests.harness.steps import DO, OPERATIONS, PLAN, crash_points

Stored = dict[str, Any]  # name, ends (its end if it is resumed before its deadline), rows by table, ledger
CORPUS = Path(__file__).parents[1] / "corpus"
TABLES = {"orders": "id", "order_lines": "order_id", "sagas": "id", "saga_steps": "saga_id"}
DECIDED = ("done", "refused", "nothing-to-undo")

WAYS: dict[str, dict[str, Any]] = {
    "confirmed": {},
    "rejected: out-of-stock": {"lines": (Line("OUT-OF-STOCK", 1, 999),)},
    "rejected: card-declined": {"payment_method": "pm_card_declined"},
    "rejected: hold-expired": {"lines": (Line("WIDGET", 1, 5), Line("WIDGET", 2, 999))},
    "rejected: undeliverable": {"lines": (Line("UNDELIVERABLE", 3, 999),), "shipping_address": {"name": "Ada"}},
}
HOLD_EXPIRES = {"target": "inventory.commit", "kind": "refuse"}
BY_CUSTOMER = "cancelled: cancelled-by-customer"
BY_OPERATOR = "rejected: compensated-by-operator"
TIMED_OUT = "rejected: timed-out"
UNDELIVERABLE = "rejected: undeliverable"
ANSWERED = {action: crash_points(action)[1::2] for action in Action}
STARTED, FINISHED, AGAIN = "started", "saga.finished", ", to be tried again"


def instants() -> Iterator[tuple[str, str]]:
    """Yield every crash point of a saga, and the fault target of the call that is made there."""
    for action in Action:
        for spec in PLAN if action is Action.DO else reversed(PLAN):
            for point in crash_points(action, [spec]):
                yield point, OPERATIONS[spec.step, action]


def read() -> list[Stored]:
    """Return every stored saga of every release."""
    return [
        {**stored, "name": f"{path.stem}: {stored['name']}"}
        for path in sorted(CORPUS.glob("*.json"))
        for stored in json.loads(path.read_text())
    ]


async def restore(stage: Stage, stored: Stored) -> UUID:
    """Insert the rows, and repeat the sandbox's decisions. Return the saga's new id."""
    saga_id = uuid4()
    rows = json.loads(json.dumps(stored["rows"]).replace(stored["rows"]["sagas"][0]["id"], str(saga_id)))
    for table in TABLES:
        for row in rows[table]:
            columns = ", ".join(row)
            query = f"INSERT INTO {table} ({columns}) SELECT {columns} FROM jsonb_populate_record(NULL::{table}, $1)"  # noqa: S608 - names
            await stage.pool.execute(query, json.dumps(row))
    order, decided = await stage.order(saga_id), [each.split() for each in stored["ledger"]]
    refused = [{"target": operation, "kind": "refuse"} for operation, outcome in decided if outcome == "refused"]
    await set_faults(stage.http, *refused)
    request = StepRequest(order, order.placed_at, HOLD_SECONDS)
    calls = {OPERATIONS[spec.step, action]: call for spec in PLAN for action, call in spec.calls().items()}
    for operation, _ in decided:
        await calls[operation](stage.partners.ports, request)
    await set_faults(stage.http)
    assert await stage.ledger(saga_id) == stored["ledger"]
    return saga_id


async def _stored(stage: Stage, saga_id: UUID, name: str, ends: str) -> Stored:
    rows: dict[str, list[dict[str, Any]]] = {}
    for table, column in TABLES.items():
        query = f"SELECT jsonb_strip_nulls(to_jsonb({table})) FROM {table} WHERE {column} = $1 ORDER BY {table}"  # noqa: S608 - names
        found = [json.loads(text) for (text,) in await stage.pool.fetch(query, saga_id)]
        # The database assigns the ids of the log.
        rows[table] = [{k: v for k, v in row.items() if (table, k) != ("saga_steps", "id")} for row in found]
    decided = [each for each in await stage.ledger(saga_id) if each.split()[1] in DECIDED]
    return {"name": name, "ends": ends, "rows": rows, "ledger": decided}


async def _abandoned(stage: Stage, saga_id: UUID, name: str, ends: str) -> Stored:
    stored = await _stored(stage, saga_id, name, ends)
    await set_faults(stage.http)
    await stage.drive()  # so that the next recording does not find it
    assert await stage.outcome(saga_id) == ends, name
    return stored


async def _on_a_way(stage: Stage, ends: str, point: str, *faults: Mapping[str, Any]) -> Stored | None:
    """Run a saga to the crash point, or to a pause caused by a fault. Return None unless only this way passes there."""
    await set_faults(stage.http, *faults, *([HOLD_EXPIRES] if ends.endswith("hold-expired") else []))
    saga_id = await start_saga(stage.pool, **WAYS[ends])
    if point != STARTED:
        checkpoint = dies_at(FINISHED if faults else point)
        await stage.orchestrator("recorder", checkpoint=checkpoint).run_once()
    ended = (await stage.saga(saga_id))["finished_at"] is not None
    refused = any("refused" in each for each in await stage.ledger(saga_id))
    if ended == (point == FINISHED) and refused == (ends != "confirmed"):
        return await _abandoned(stage, saga_id, f"{ends}, {point}{AGAIN if faults else ''}", ends)
    await set_faults(stage.http)
    await stage.drive()
    return None


async def _stopped(stage: Stage, ends: str, point: str) -> Stored:
    """Run a saga to the crash point, and stop its process normally there: its next attempt is not recorded."""
    saga_id = await start_saga(stage.pool, **WAYS[ends])

    def checkpoint(passed: str) -> None:
        if passed == point:
            orchestrator.stop()

    orchestrator = stage.orchestrator("recorder", checkpoint=checkpoint)
    await orchestrator.run_once()
    return await _abandoned(stage, saga_id, f"{ends}, {point}, stopped", ends)


async def _unheard(stage: Stage, point: str) -> Stored:
    """Run a saga to the crash point, and cancel it there: no process has seen the cancel yet."""
    saga_id = await start_saga(stage.pool)
    await stage.orchestrator("recorder", checkpoint=dies_at(point)).run_once()
    await cancel(stage.pool, saga_id)
    return await _abandoned(stage, saga_id, f"{BY_CUSTOMER}, unheard, {point}", BY_CUSTOMER)


async def _turning(stage: Stage, ends: str, point: str, target: str) -> Stored:
    """Make a saga compensate whose last answer was lost, and let it pause at this undo."""
    await set_faults(stage.http, {"target": DO[-1], "kind": "reset_after"})
    saga_id = await start_saga(stage.pool)
    await stage.orchestrator("recorder").run_once()
    if ends == BY_CUSTOMER:
        await cancel(stage.pool, saga_id)
    elif ends == BY_OPERATOR:
        await sagas.compensate(stage.pool, saga_id, AuditActor("recorder", "to be stored"), {})
    else:
        await stage.let_the_deadline_pass()
    await set_faults(stage.http, {"target": target, "kind": "error"})
    await stage.let_time_pass()
    await stage.orchestrator("recorder").run_once()
    return await _abandoned(stage, saga_id, f"{ends}, {point}{AGAIN}", ends)


async def record(stage: Stage) -> list[Stored]:
    """Run sagas on every way to every crash point, and to a pause at every call. Return what they leave behind."""
    found: list[Stored | None] = []
    for ends in WAYS:
        found += [
            await _on_a_way(stage, ends, point) for point in (STARTED, *(point for point, _ in instants()), FINISHED)
        ]
        found += [
            await _on_a_way(stage, ends, point, {"target": target, "kind": "error"})
            for point, target in instants()
            if point.endswith("attempted")
        ]
    for point, target in instants():
        if ".do." in point:
            found.append(await _unheard(stage, point))
        elif point.endswith("attempted"):
            found += [await _turning(stage, ends, point, target) for ends in (BY_CUSTOMER, BY_OPERATOR, TIMED_OUT)]
    found += [await _stopped(stage, "confirmed", point) for point in ANSWERED[Action.DO][:-1]]
    found += [await _stopped(stage, UNDELIVERABLE, point) for point in ANSWERED[Action.UNDO][:-1]]
    found.append(await _stopped(stage, UNDELIVERABLE, ANSWERED[Action.DO][-1]))
    return [stored for stored in found if stored is not None]


async def _main(run: ControllerRun) -> None:
    with sandboxes.in_a_thread() as url:
        postgres_url = await asyncio.to_thread(run.server, "postgres")
        async with (
            databases.fresh(postgres_url, run) as database_url,
            open_pool(database_url, 4) as pool,
            sandboxes.plain_http(url) as http,
            HttpClient() as session,
        ):
            found = await record(Stage(pool, http, Partners.at(session, url)))
    lines = ",\n".join(json.dumps(each, sort_keys=True, separators=(",", ":")) for each in found)
    (CORPUS / f"{version('orders')}.json").write_text(f"[\n{lines}\n]\n")


if __name__ == "__main__":
    controller = ControllerRun()
    try:
        asyncio.run(_main(controller))
    finally:
        controller.close()
