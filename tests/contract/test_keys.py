"""One key, one decision, one answer, for ever; an undo blocks its do, whichever comes first."""

import asyncio
from uuid import UUID

import httpx
import pytest

from app.partners.ports import Done, Item, Refused, Unknown
from tests.contract.conftest import ACTS, DO, REFUSALS, UNDO, UNDONE_BY, post, prepare
from tests.harness.sandboxes import HOLD_SECONDS, Partners, charge_of, decisions, entries, set_faults, summary


@pytest.mark.parametrize("operation", ACTS)
async def test_the_same_key_again_is_the_same_answer_and_moves_nothing(
    http: httpx.AsyncClient, partners: Partners, saga: UUID, item: Item, operation: str
) -> None:
    await prepare(partners, saga, item, operation)
    first = await ACTS[operation](partners, saga, item)
    assert isinstance(first, Done)
    assert await ACTS[operation](partners, saga, item) == await ACTS[operation](partners, saga, item) == first
    replays = [("replayed", False)] * 2
    assert await decisions(http, saga, operation) == [("done", True), *replays]


@pytest.mark.parametrize("operation", ACTS)
async def test_calls_with_one_key_that_arrive_together_share_one_answer(
    http: httpx.AsyncClient, partners: Partners, saga: UUID, item: Item, operation: str
) -> None:
    await prepare(partners, saga, item, operation)
    outcomes = await asyncio.gather(*(ACTS[operation](partners, saga, item) for _ in range(12)))
    assert isinstance(outcomes[0], Done)
    assert outcomes.count(outcomes[0]) == 12
    assert sorted(await decisions(http, saga, operation)) == [("done", True)] + [("replayed", False)] * 11


@pytest.mark.parametrize("operation", DO)
async def test_a_refusal_is_remembered_even_if_the_call_would_succeed_now(
    http: httpx.AsyncClient, partners: Partners, saga: UUID, item: Item, operation: str
) -> None:
    await prepare(partners, saga, item, operation)
    await set_faults(http, {"target": operation, "kind": "refuse", "times": 1})
    for _ in range(2):
        assert await DO[operation](partners, saga, item) == Refused(REFUSALS[operation])
    assert await decisions(http, saga, operation) == [("refused", False), ("replayed", False)]


@pytest.mark.parametrize("operation", DO)
async def test_an_undo_of_what_never_happened_succeeds_and_blocks_the_do_for_good(
    http: httpx.AsyncClient, partners: Partners, saga: UUID, item: Item, operation: str
) -> None:
    undo = UNDONE_BY[operation]
    assert await UNDO[undo](partners, saga, item) == Done()
    for _ in range(2):
        assert await DO[operation](partners, saga, item) == Unknown("409 undone")
    assert await decisions(http, saga, undo) == [("nothing-to-undo", False)]
    assert await decisions(http, saga, operation) == [("undone", False)] * 2


@pytest.mark.parametrize("operation", DO)
async def test_a_do_sent_again_after_its_undo_is_undone_though_it_once_succeeded(
    http: httpx.AsyncClient, partners: Partners, saga: UUID, item: Item, operation: str
) -> None:
    await prepare(partners, saga, item, operation)
    assert isinstance(await DO[operation](partners, saga, item), Done)
    assert await UNDO[UNDONE_BY[operation]](partners, saga, item) == Done()
    assert await DO[operation](partners, saga, item) == Unknown("409 undone")
    assert await decisions(http, saga, operation) == [("done", True), ("undone", False)]
    assert await decisions(http, saga, UNDONE_BY[operation]) == [("done", True)]


async def test_the_one_undo_of_inventory_blocks_a_commit_of_the_released_hold(
    partners: Partners, saga: UUID, item: Item
) -> None:
    await partners.inventory.hold(saga, [item], HOLD_SECONDS)
    await partners.inventory.release(saga)
    assert await partners.inventory.commit(saga) == Unknown("409 undone")


async def test_what_a_tombstone_stands_for_is_told_as_undone(partners: Partners, saga: UUID, item: Item) -> None:
    for undo in UNDO.values():
        await undo(partners, saga, item)
    assert await partners.inventory.state(saga) == "released"
    assert await partners.payment.state(saga) == "refunded"
    assert await partners.shipping.state(saga) == "cancelled"


async def test_a_key_with_another_body_is_a_422_and_our_fault_and_leaves_the_first_answer(
    http: httpx.AsyncClient, partners: Partners, saga: UUID
) -> None:
    first = await partners.payment.charge(charge_of(saga, 700, "EUR", None))
    assert await partners.payment.charge(charge_of(saga, 701, "EUR", None)) == Unknown(
        "422 idempotency-key-reused", our_fault=True
    )
    assert await partners.payment.charge(charge_of(saga, 700, "EUR", None)) == first
    assert await decisions(http, saga, "payment.charge") == [
        ("done", True),
        ("error", False),
        ("replayed", False),
    ]
    assert (await summary(http, saga))["charged_minor"] == 700


async def test_the_order_of_fields_and_absent_nulls_make_no_other_body(http: httpx.AsyncClient, saga: UUID) -> None:
    key = f"{saga}:charge_payment"
    first = {"saga_id": str(saga), "amount_minor": 5, "currency": "USD", "payment_method": None}
    again = {"currency": "USD", "amount_minor": 5, "saga_id": str(saga)}
    answers = [await post(http, "/v1/payments/charge", key, body) for body in (first, again)]
    assert [each.status_code for each in answers] == [201, 201]
    assert answers[0].content == answers[1].content


async def test_a_do_and_its_undo_that_race_leave_nothing_standing(
    http: httpx.AsyncClient, partners: Partners, saga: UUID, item: Item
) -> None:
    await asyncio.gather(*(act(partners, saga, item) for act in ACTS.values()))
    told = await summary(http, saga)
    assert told["charged_minor"] == told["refunded_minor"]
    assert [told["held"], told["committed"], told["shipped"]] == [False, False, False]
    assert {each["key"] for each in await entries(http, saga)} == {
        f"{saga}:{step}"
        for step in (
            "reserve_inventory",
            "commit_inventory",
            "charge_payment",
            "create_shipment",
            "reserve_inventory:undo",
            "charge_payment:undo",
            "create_shipment:undo",
        )
    }
