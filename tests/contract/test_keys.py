"""Check idempotency keys: each key has one decision and one answer, and an undo blocks its do permanently."""

import asyncio
from uuid import UUID

import httpx
import pytest

from app.partners.ports import Done, PartnerItem, Refused, Unknown
from app.saga.steps import Action
from tests.contract.conftest import ACTS, DO, REFUSALS, UNDO, UNDONE_BY, post, prepare
from tests.harness.sandboxes import HOLD_SECONDS, Partners, charge_of, decisions, entries, set_faults, summary
from tests.harness.steps import OPERATIONS


@pytest.mark.parametrize("operation", ACTS)
async def test_same_key_replays_the_answer(
    http: httpx.AsyncClient, partners: Partners, saga: UUID, item: PartnerItem, operation: str
) -> None:
    """A retry with the same key gets the same answer and moves nothing."""
    await prepare(partners, saga, item, operation)
    first = await ACTS[operation](partners, saga, item)
    assert isinstance(first, Done)
    assert await ACTS[operation](partners, saga, item) == await ACTS[operation](partners, saga, item) == first
    replays = [("replayed", False)] * 2
    assert await decisions(http, saga, operation) == [("done", True), *replays]


@pytest.mark.parametrize("operation", ACTS)
async def test_concurrent_calls_with_one_key_share_an_answer(
    http: httpx.AsyncClient, partners: Partners, saga: UUID, item: PartnerItem, operation: str
) -> None:
    """Concurrent calls with the same key are decided once and share the answer."""
    await prepare(partners, saga, item, operation)
    outcomes = await asyncio.gather(*(ACTS[operation](partners, saga, item) for _ in range(12)))
    assert isinstance(outcomes[0], Done)
    assert outcomes.count(outcomes[0]) == 12
    assert sorted(await decisions(http, saga, operation)) == [("done", True)] + [("replayed", False)] * 11


@pytest.mark.parametrize("operation", DO)
async def test_refusal_is_replayed(
    http: httpx.AsyncClient, partners: Partners, saga: UUID, item: PartnerItem, operation: str
) -> None:
    """A refusal is replayed, even if the call could succeed by now."""
    await prepare(partners, saga, item, operation)
    await set_faults(http, {"target": operation, "kind": "refuse", "times": 1})
    for _ in range(2):
        assert await DO[operation](partners, saga, item) == Refused(REFUSALS[operation])
    assert await decisions(http, saga, operation) == [("refused", False), ("replayed", False)]


@pytest.mark.parametrize("operation", DO)
async def test_undo_before_do_blocks_the_do(
    http: httpx.AsyncClient, partners: Partners, saga: UUID, item: PartnerItem, operation: str
) -> None:
    """An undo without an earlier do succeeds and blocks the do permanently."""
    undo = UNDONE_BY[operation]
    assert await UNDO[undo](partners, saga, item) == Done()
    for _ in range(2):
        assert await DO[operation](partners, saga, item) == Unknown("409 undone")
    assert await decisions(http, saga, undo) == [("nothing-to-undo", False)]
    assert await decisions(http, saga, operation) == [("undone", False)] * 2


@pytest.mark.parametrize("operation", DO)
async def test_do_retried_after_its_undo_is_undone(
    http: httpx.AsyncClient, partners: Partners, saga: UUID, item: PartnerItem, operation: str
) -> None:
    """A retry of a successful do after its undo is answered `undone`, not with the first answer."""
    await prepare(partners, saga, item, operation)
    assert isinstance(await DO[operation](partners, saga, item), Done)
    assert await UNDO[UNDONE_BY[operation]](partners, saga, item) == Done()
    assert await DO[operation](partners, saga, item) == Unknown("409 undone")
    assert await decisions(http, saga, operation) == [("done", True), ("undone", False)]
    assert await decisions(http, saga, UNDONE_BY[operation]) == [("done", True)]


async def test_release_blocks_a_later_commit(partners: Partners, saga: UUID, item: PartnerItem) -> None:
    """A release blocks the commit of the released hold."""
    await partners.inventory.hold(saga, [item], HOLD_SECONDS)
    await partners.inventory.release(saga)
    assert await partners.inventory.commit(saga) == Unknown("409 undone")


async def test_state_after_an_undo_without_a_do(partners: Partners, saga: UUID, item: PartnerItem) -> None:
    """After an undo without a do, the partner's state shows the undo."""
    for undo in UNDO.values():
        await undo(partners, saga, item)
    assert await partners.inventory.state(saga) == "released"
    assert await partners.payment.state(saga) == "refunded"
    assert await partners.shipping.state(saga) == "cancelled"


async def test_key_reused_with_another_body_is_a_422(http: httpx.AsyncClient, partners: Partners, saga: UUID) -> None:
    """A key reused with another body is a 422 and our fault; the first answer stays."""
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


async def test_field_order_and_nulls_do_not_change_a_body(http: httpx.AsyncClient, saga: UUID) -> None:
    """Two bodies are equal regardless of field order and of nulls that are left out."""
    key = f"{saga}:charge_payment"
    first = {"saga_id": str(saga), "amount_minor": 5, "currency": "USD", "payment_method": None}
    again = {"currency": "USD", "amount_minor": 5, "saga_id": str(saga)}
    answers = [await post(http, "/v1/payments/charge", key, body) for body in (first, again)]
    assert [answer.status_code for answer in answers] == [201, 201]
    assert answers[0].content == answers[1].content


async def test_racing_dos_and_undos_cancel_out(
    http: httpx.AsyncClient, partners: Partners, saga: UUID, item: PartnerItem
) -> None:
    """If each do races its undo, no charge, hold or shipment remains."""
    await asyncio.gather(*(act(partners, saga, item) for act in ACTS.values()))
    totals = await summary(http, saga)
    assert totals["charged_minor"] == totals["refunded_minor"]
    assert [totals["held"], totals["committed"], totals["shipped"]] == [False, False, False]
    assert {entry["key"] for entry in await entries(http, saga)} == {
        f"{saga}:{step}" if action is Action.DO else f"{saga}:{step}:undo" for step, action in OPERATIONS
    }
