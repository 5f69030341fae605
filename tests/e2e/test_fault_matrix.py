"""With any fault of each partner call, and of any two calls of an order, every order ends as it should."""

import asyncio
import random
from itertools import combinations_with_replacement, product
from typing import Any

import httpx
import pytest

from app.saga.steps import Step
from tests.e2e.conftest import System, order
from tests.harness.processes import Service
from tests.harness.steps import DO, PLAN, UNDO, undo_of
from tests.harness.wait import wait_until

Fault = tuple[str, str]  # target, kind
Case = tuple[Fault, ...]

# The faults belong to single orders, so no circuit may open and delay the others.
PATIENT = {"partner_circuit_failures": "1000000"}
KINDS = (
    "timeout_after",
    "timeout_before",
    "reset_after",
    "reset_before",
    "garbage",
    "error",
    "unavailable",
    "duplicate",  # last: it succeeds, so of two faults for one call it must be the second
)
FAULTS = sorted(product((*DO, *UNDO), KINDS), key=lambda fault: KINDS.index(fault[1]))
SINGLES: list[Case] = [(fault,) for fault in FAULTS]
PAIRS: list[Case] = [
    (one, other)
    for one, other in combinations_with_replacement(FAULTS, 2)
    if not (one == other and one[1] == "duplicate")
]
SAMPLE = random.Random(6).sample(PAIRS, 60)  # noqa: S311 - the same sample every time, not a secret


def calls_until(refused: str) -> tuple[str, ...]:
    """Return the calls of a saga whose partner refuses this step."""
    names = [spec.step for spec in PLAN]
    attempted = DO[: names.index(refused) + 1]
    undone = {undo_of(operation) for operation in attempted}
    return (*attempted, *(undo for undo in UNDO if undo in undone))


# The order, its end, and the calls that its saga makes.
WAYS: dict[str, tuple[dict[str, Any], tuple[str, str | None], tuple[str, ...]]] = {
    "confirmed": (order(), ("confirmed", None), DO),
    "declined": (
        order(payment_method="pm_card_declined"), ("rejected", "card-declined"), calls_until(Step.CHARGE_PAYMENT),
    ),
    "cancelled": (order(), ("cancelled", "cancelled-by-customer"), (*DO, *UNDO)),
    "undeliverable": (order("UNDELIVERABLE"), ("rejected", "undeliverable"), (*DO, *UNDO)),
}  # fmt: skip


async def cancel_at_the_last_step(system: System, api: Service, order_id: str, case: Case) -> None:
    """Cancel at the last step after the order's faults: it had more unclear answers there than faults."""
    query = "SELECT count(*) > $2 FROM saga_steps WHERE (saga_id, step, outcome) = ($1, $3, 'unknown')"
    last = PLAN[-1].step
    await wait_until(lambda: system.pool.fetchval(query, order_id, len(case), last), 60, f"last step of {order_id}")
    assert (await system.cancel([api], f"cancel-{order_id}", order_id)).status_code == httpx.codes.ACCEPTED


def possible_ways(case: Case) -> list[str]:
    """Return the ways that make all of these calls. An order to be cancelled must not get its shipment."""
    possible = [way for way, (_, _, calls) in WAYS.items() if {target for target, _ in case} <= {*calls}]
    return [way for way in possible if way != "cancelled" or (DO[-1], "duplicate") not in case]


def rules_of(case: Case, way: str, order_id: str) -> list[dict[str, Any]]:
    """Return rules that apply each fault to the order once. An order to be cancelled never gets its shipment."""
    match = {"saga_id": order_id}
    endless = [{"target": DO[-1], "kind": "unavailable", "match": match}] if way == "cancelled" else []
    return [*({"target": target, "kind": kind, "times": 1, "match": match} for target, kind in case), *endless]


async def go_through(system: System, cases: list[Case]) -> None:
    """Place one order per case, alternating between the possible ways, and kill the service halfway."""
    api = await system.start(roles="api")
    ways = []
    for number, case in enumerate(cases):
        possible = possible_ways(case)
        ways.append(possible[number % len(possible)])
    placed = [await system.place([api], f"order-{number}", WAYS[way][0]) for number, way in enumerate(ways)]
    ids = [answer.json()["id"] for answer in placed]
    rules = [rules_of(*of_it) for of_it in zip(cases, ways, ids, strict=True)]
    await system.faults(*(rule for of_it in rules for rule in of_it))
    doomed = await system.start(roles="relay,consumer", **PATIENT)
    to_cancel = [(id_, case) for id_, way, case in zip(ids, ways, cases, strict=True) if way == "cancelled"]
    cancelling = asyncio.gather(*(cancel_at_the_last_step(system, api, *of_it) for of_it in to_cancel))
    await wait_until(lambda: under_way(system, len(cases)), 60, "the middle of it")
    await doomed.kill()
    await system.start(roles="relay,consumer", **PATIENT)
    await cancelling
    await system.all_ended()
    assert await system.violations() == []
    rows = await system.pool.fetch("SELECT id::text, status, status_reason FROM orders")
    ended = {row["id"]: (row["status"], row["status_reason"]) for row in rows}
    assert [(case, ended[id_]) for case, id_ in zip(cases, ids, strict=True)] == [
        (case, WAYS[way][1]) for case, way in zip(cases, ways, strict=True)
    ]
    left = (await system.sandbox.get("/faults")).json()
    assert [rule for rule in left if rule["times"]] == []  # every fault has happened


async def under_way(system: System, orders: int) -> bool:
    query = "SELECT count(*) >= 3 * $1 AND count(*) FILTER (WHERE action = 'undo') > 0 FROM saga_steps"
    return bool(await system.pool.fetchval(query, orders))


@pytest.mark.parametrize("cases", [SINGLES, SAMPLE], ids=["each fault alone", "two faults"])
async def test_every_order_ends_despite_faults_and_a_kill(system: System, cases: list[Case]) -> None:
    """Each order has its own faults, and ends as it should."""
    await go_through(system, cases)
