"""An order placed over HTTP ends confirmed, or rejected with everything undone, over real servers."""

from typing import Any

import aio_pika
import httpx
import pytest

from tests.e2e.conftest import System, client, order
from tests.harness.steps import DO
from tests.harness.wait import AMPLE_SECONDS, wait_until

UNDOS = {
    "inventory.release": ("WIDGET", "payment.charge"),
    "payment.refund": ("WIDGET", "shipping.create"),
    "shipping.cancel": ("WIDGET", "shipping.create"),
}
REFUSALS = [
    (order("OUT-OF-STOCK"), None, "out-of-stock"),
    (order(payment_method="pm_card_declined"), None, "card-declined"),
    (order("UNDELIVERABLE"), None, "undeliverable"),
    (order(), {"target": "inventory.commit", "kind": "refuse"}, "hold-expired"),
]
UNCLEAR = [
    {"target": target, "kind": kind, "times": 1}
    for target in DO
    for kind in ("error", "timeout_after", "reset_before", "reset_after", "garbage", "duplicate")
]


async def test_an_order_is_confirmed_and_its_events_tell_of_it_in_order(system: System) -> None:
    service = await system.start()
    connection = await aio_pika.connect(system.env["ORDERS_RABBITMQ_URL"])
    async with connection, client(service.url) as http:
        await wait_until(lambda: is_ready(http), AMPLE_SECONDS, "readiness, and the exchange with it")
        channel = await connection.channel()
        listener = await channel.declare_queue(exclusive=True)
        await listener.bind("orders.events", "#")
        placed = await http.post("/orders", json=order())
        await system.all_ended()
        shown = (await http.get(placed.headers["location"])).raise_for_status().json()
        heard = []
        while event := await listener.get(fail=False, timeout=AMPLE_SECONDS):
            heard.append(
                (event.routing_key, event.headers["cloudEvents_sequence"], event.headers["cloudEvents_subject"])
            )
    assert placed.status_code == 201
    assert placed.json()["status"] == "pending"
    assert (shown["status"], shown["status_reason"], shown["version"]) == ("confirmed", None, 2)
    assert shown["tracking_id"]
    assert list(dict.fromkeys(heard)) == [  # each at least once
        ("order.placed", "1", shown["id"]),
        ("order.confirmed", "2", shown["id"]),
    ]


async def is_ready(http: httpx.AsyncClient) -> bool:
    return bool((await http.get("/readyz")).json()["status"] == "ok")


@pytest.mark.parametrize(("body", "fault", "reason"), REFUSALS, ids=[reason for _, _, reason in REFUSALS])
async def test_an_order_that_a_partner_refuses_is_rejected_with_everything_undone(
    system: System, body: dict[str, Any], fault: dict[str, Any] | None, reason: str
) -> None:
    await system.faults(*([fault] if fault else []))
    await system.place([await system.start()], "refused", body)
    await system.all_ended()
    assert await system.statuses() == {("rejected", reason)}
    assert await system.violations() == []


@pytest.mark.parametrize("undo", UNDOS)
async def test_an_order_is_not_shown_as_rejected_before_every_undo_has_succeeded(system: System, undo: str) -> None:
    sku, refusing = UNDOS[undo]
    await system.faults({"target": refusing, "kind": "refuse"}, {"target": undo, "kind": "error"})
    await system.place([await system.start()], "undone", order(sku))
    await wait_until(lambda: failures(system, undo), AMPLE_SECONDS, f"three failures of {undo}")
    assert {status for status, _ in await system.statuses()} == {"compensating"}
    await system.faults()
    await system.all_ended()
    assert {status for status, _ in await system.statuses()} == {"rejected"}
    assert await system.violations() == []


async def failures(system: System, operation: str) -> bool:
    entries = (await system.sandbox.get("/ledger", params={"limit": 1000})).json()["entries"]
    return [entry["operation"] for entry in entries if entry["outcome"] == "error"].count(operation) >= 3


async def test_an_unclear_answer_is_asked_again_until_it_is_clear(system: System) -> None:
    """One order for each partner call and each way to leave its outcome open; each ends confirmed, charged once."""
    service = await system.start()
    for number, fault in enumerate(UNCLEAR):
        await system.faults(fault)
        await system.place([service], f"unclear-{number}", order())
        await system.all_ended()
    assert await system.statuses() == {("confirmed", None)}
    assert await system.violations() == []


async def test_an_order_that_is_not_done_by_its_deadline_turns_back(system: System) -> None:
    await system.faults({"target": "shipping.create", "kind": "unavailable"})
    await system.place([await system.start(saga_deadline_seconds="2")], "late", order())
    await system.all_ended()
    assert await system.statuses() == {("rejected", "timed-out")}
    assert await system.violations() == []


async def test_the_roles_work_in_processes_of_their_own(system: System) -> None:
    api = [await system.start(roles="api"), await system.start(roles="api")]
    for role in ("relay", "consumer", "consumer", "janitor"):
        await system.start(roles=role)
    for number in range(10):
        await system.place(api[number % 2 :], f"apart-{number}", order())
    await system.all_ended()
    assert await system.statuses() == {("confirmed", None)}
    assert await system.violations() == []
