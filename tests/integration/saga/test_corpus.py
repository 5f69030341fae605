"""This release finishes the sagas of earlier releases, from every state in both directions."""

from itertools import product
from typing import Any

import pytest

from app.orders.model import FINAL, Reason
from app.saga import steps
from app.saga.plan import SagaDirection
from tests.harness import corpus
from tests.harness.corpus import BY_CUSTOMER, Stored
from tests.harness.sagas import Stage

DONE = {"kept_minor": 2997, "held": False, "committed": True, "shipped": True}
UNDONE = {"kept_minor": 0, "held": False, "committed": False, "shipped": False}
STORED = corpus.read()


def saga_of(stored: Stored) -> dict[str, Any]:
    [row] = stored["rows"]["sagas"]
    return dict(row)


def ends_late(stored: Stored) -> str:
    """Return how a saga ends if it is resumed after its deadline."""
    row = saga_of(stored)
    if "finished_at" in row or row["direction"] == SagaDirection.BACKWARD or stored["ends"] == BY_CUSTOMER:
        return str(stored["ends"])
    return corpus.TIMED_OUT


def test_corpus_has_every_state_of_every_plan() -> None:
    """Waiting and running, in both directions."""
    states = {
        (row["plan_version"], row["direction"], row.get("step"), row["attempts"] > 0, "lease_owner" in row)
        for row in map(saga_of, STORED)
    }
    for version, table in steps.PLANS.items():
        assert (version, SagaDirection.FORWARD, table[0].step, False, False) in states
        for direction in SagaDirection:
            assert (version, direction, None, False, False) in states
        for row, direction, under_way in product(table, SagaDirection, (False, True)):
            if direction is SagaDirection.FORWARD or row.undo is not None:
                assert (version, direction, row.step, True, under_way) in states
                assert (version, direction, row.step, False, False) in states  # stopped before its attempt
    assert {each["ends"].partition(":")[0] for each in STORED} == FINAL
    assert {row["reason"] for row in map(saga_of, STORED) if "reason" in row} == set(Reason)


@pytest.mark.parametrize("late", [False, True])
async def test_every_stored_saga_reaches_its_end(stage: Stage, *, late: bool) -> None:
    restored = {await corpus.restore(stage, stored): stored for stored in STORED}
    later = """
        UPDATE sagas SET started_at = started_at + shift, deadline_at = deadline_at + shift
        FROM (SELECT id, clock_timestamp() + make_interval(secs => $1) - deadline_at AS shift FROM sagas) AS by
        WHERE sagas.id = by.id
    """
    await stage.pool.execute(later, 0 if late else 900)
    finished = {saga_id: row for saga_id in restored if (row := await stage.saga(saga_id))["finished_at"]}
    await stage.drive()
    assert {saga_id: await stage.saga(saga_id) for saga_id in finished} == finished  # they were not touched
    told = {(row["subject"], row["type"]) for row in await stage.pool.fetch("SELECT subject, type FROM outbox")}
    for saga_id, stored in restored.items():
        ends = ends_late(stored) if late else stored["ends"]
        assert (stored["name"], await stage.outcome(saga_id)) == (stored["name"], ends)
        if ends == "confirmed" or await stage.ledger(saga_id):  # a late saga may not have made any call
            assert await stage.standing(saga_id) == (DONE if ends == "confirmed" else UNDONE), stored["name"]
        event = (str(saga_id), f"orders.order.{ends.partition(':')[0]}.v1")
        assert (event in told) == (saga_id not in finished), stored["name"]
