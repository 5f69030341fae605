"""Check every call of the partner contract through the service's clients and as plain HTTP."""

import asyncio
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest

from app.partners.ports import Done, PartnerItem, Refused, Unknown
from tests.contract.conftest import post
from tests.harness.sandboxes import HOLD_SECONDS, Partners, charge_of, decisions, entries, summary
from tests.harness.wait import AMPLE_SECONDS, wait_until

ADDRESS = {"name": "Ada", "line1": "1 Main St", "city": "Oslo", "postal_code": "0150", "country": "NO"}


async def stock(http: httpx.AsyncClient, item_id: str) -> tuple[int, int, int]:
    found = (await http.get(f"/v1/inventory/stock/{item_id}")).raise_for_status().json()
    return found["free"], found["held"], found["sold"]


def test_livez(sandbox_url: str) -> None:
    """`GET /livez` reports that the process is up."""
    answer = httpx.get(f"{sandbox_url}/livez")
    assert (answer.status_code, answer.json()) == (200, {"status": "ok"})


async def test_new_item_has_a_million_free(http: httpx.AsyncClient, item: PartnerItem) -> None:
    """A new item has 1,000,000 units free."""
    assert await stock(http, item.sku) == (1_000_000, 0, 0)


async def test_hold_takes_stock_and_has_an_expiry(
    http: httpx.AsyncClient, partners: Partners, saga: UUID, item: PartnerItem
) -> None:
    """A hold moves stock from free to held and returns when it expires."""
    outcome = await partners.inventory.hold(saga, [item], HOLD_SECONDS)
    assert isinstance(outcome, Done)
    assert set(outcome.reply) == {"reservation_id", "expires_at"}
    assert await stock(http, item.sku) == (999_998, 2, 0)
    assert await partners.inventory.state(saga) == "held"


async def test_lines_of_the_same_item_are_added_up(
    http: httpx.AsyncClient, partners: Partners, saga: UUID, item: PartnerItem
) -> None:
    """A hold adds up the quantities of lines with the same item."""
    await http.put(f"/stock/{item.sku}", json={"quantity": 3})
    assert await partners.inventory.hold(saga, [item, item], HOLD_SECONDS) == Refused("out-of-stock")
    assert isinstance(await partners.inventory.hold(uuid4(), [item, PartnerItem(item.sku, 1)], HOLD_SECONDS), Done)
    assert await stock(http, item.sku) == (0, 3, 0)


async def test_hold_takes_all_items_or_none(
    http: httpx.AsyncClient, partners: Partners, saga: UUID, item: PartnerItem
) -> None:
    """A hold is refused as a whole if one item is out of stock."""
    outcome = await partners.inventory.hold(saga, [item, PartnerItem("OUT-OF-STOCK", 1)], HOLD_SECONDS)
    assert outcome == Refused("out-of-stock")
    assert await stock(http, item.sku) == (1_000_000, 0, 0)
    assert await partners.inventory.state(saga) is None


async def test_commit_sells_the_held_items(
    http: httpx.AsyncClient, partners: Partners, saga: UUID, item: PartnerItem
) -> None:
    """A commit moves stock from held to sold."""
    await partners.inventory.hold(saga, [item], HOLD_SECONDS)
    assert await partners.inventory.commit(saga) == Done()
    assert await stock(http, item.sku) == (999_998, 0, 2)
    assert await partners.inventory.state(saga) == "committed"
    assert (await summary(http, saga))["committed"] is True


async def test_commit_without_a_hold_leaves_the_key_unused(
    http: httpx.AsyncClient, partners: Partners, saga: UUID, item: PartnerItem
) -> None:
    """A commit without a hold is a 404, and the same key works once a hold exists."""
    assert await partners.inventory.commit(saga) == Unknown("404 no-hold", our_fault=True)
    await partners.inventory.hold(saga, [item], HOLD_SECONDS)
    assert await partners.inventory.commit(saga) == Done()
    assert await decisions(http, saga, "inventory.commit") == [("error", False), ("done", True)]


@pytest.mark.parametrize("committed", [False, True])
async def test_release_returns_held_or_sold_items(
    http: httpx.AsyncClient, partners: Partners, saga: UUID, item: PartnerItem, *, committed: bool
) -> None:
    """A release returns held or sold stock to free."""
    await partners.inventory.hold(saga, [item], HOLD_SECONDS)
    if committed:
        await partners.inventory.commit(saga)
    assert await partners.inventory.release(saga) == Done()
    assert await stock(http, item.sku) == (1_000_000, 0, 0)
    assert await partners.inventory.state(saga) == "released"


async def test_charge_and_refund_move_the_same_amount(http: httpx.AsyncClient, partners: Partners, saga: UUID) -> None:
    """A charge moves its amount, and a refund returns all of it."""
    outcome = await partners.payment.charge(charge_of(saga, 2997, "USD", "pm_card_visa"))
    assert isinstance(outcome, Done)
    assert set(outcome.reply) == {"payment_id"}
    assert await partners.payment.state(saga) == "charged"
    assert await partners.payment.refund(charge_of(saga)) == Done()
    assert await partners.payment.state(saga) == "refunded"
    amounts = [(entry["operation"], entry["amount_minor"], entry["applied"]) for entry in await entries(http, saga)]
    assert amounts == [("payment.charge", 2997, True), ("payment.refund", 2997, True)]
    assert (await summary(http, saga)) == {
        "charged_minor": 2997,
        "refunded_minor": 2997,
        "held": False,
        "committed": False,
        "shipped": False,
    }


async def test_charge_without_a_method_succeeds(partners: Partners, saga: UUID) -> None:
    """A charge without a payment method uses the customer's default."""
    assert isinstance(await partners.payment.charge(charge_of(saga, 1, "JPY", None)), Done)


async def test_declined_card_moves_nothing(http: httpx.AsyncClient, partners: Partners, saga: UUID) -> None:
    """A declined card moves no money, and the payment stays `declined` after a refund."""
    assert await partners.payment.charge(charge_of(saga, 500, "USD", "pm_card_declined")) == Refused("card-declined")
    assert await partners.payment.state(saga) == "declined"
    assert await partners.payment.refund(charge_of(saga)) == Done()
    assert await partners.payment.state(saga) == "declined"
    assert await decisions(http, saga, "payment.charge") == [("refused", False)]
    assert await decisions(http, saga, "payment.refund") == [("nothing-to-undo", False)]
    assert (await summary(http, saga))["charged_minor"] == 0


async def test_pm_timeout_after_answers_only_a_retry(http: httpx.AsyncClient, partners: Partners, saga: UUID) -> None:
    """`pm_timeout_after` is charged, but only a retry gets the answer."""

    async def is_charged() -> bool:
        return await decisions(http, saga, "payment.charge") == [("done", True)]

    charge = charge_of(saga, 500, "USD", "pm_timeout_after")
    unanswered = asyncio.create_task(partners.payment.charge(charge))
    await wait_until(is_charged, AMPLE_SECONDS, "the charge")
    assert isinstance(await partners.payment.charge(charge), Done)
    assert not unanswered.done()
    assert await decisions(http, saga, "payment.charge") == [("done", True), ("replayed", False)]
    unanswered.cancel()
    await asyncio.wait([unanswered])


async def test_shipment_is_created_and_cancelled(
    http: httpx.AsyncClient, partners: Partners, saga: UUID, item: PartnerItem
) -> None:
    """A shipment can be created and then cancelled."""
    outcome = await partners.shipping.create(saga, [item], ADDRESS)
    assert isinstance(outcome, Done)
    assert set(outcome.reply) == {"tracking_id"}
    assert await partners.shipping.state(saga) == "created"
    assert (await summary(http, saga))["shipped"] is True
    assert await partners.shipping.cancel(saga) == Done()
    assert await partners.shipping.state(saga) == "cancelled"
    assert (await summary(http, saga))["shipped"] is False


async def test_undeliverable_item_is_held_but_not_shipped(partners: Partners, saga: UUID) -> None:
    """Inventory holds an undeliverable item, and shipping refuses it."""
    item = PartnerItem("UNDELIVERABLE", 1)
    assert isinstance(await partners.inventory.hold(saga, [item], HOLD_SECONDS), Done)
    assert await partners.shipping.create(saga, [item], None) == Refused("undeliverable")
    assert await partners.shipping.state(saga) == "refused"


@pytest.mark.parametrize("path", ["/v1/inventory/holds", "/v1/payments", "/v1/shipments"])
async def test_unknown_saga_is_a_404(http: httpx.AsyncClient, path: str, saga: UUID) -> None:
    """The state of an unknown saga is a 404 problem."""
    answer = await http.get(f"{path}/{saga}")
    assert (answer.status_code, answer.json()["code"]) == (404, "not-found")
    assert answer.headers["content-type"] == "application/problem+json"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/inventory/hold", {"items": [{"item_id": "a", "qty": 1}], "ttl_seconds": 60}),
        ("/v1/inventory/commit", {}),
        ("/v1/inventory/release", {}),
        ("/v1/payments/charge", {"amount_minor": 1, "currency": "USD", "payment_method": None}),
        ("/v1/payments/refund", {}),
        ("/v1/shipments", {"items": [{"item_id": "a", "qty": 1}], "address": None}),
        ("/v1/shipments/cancel", {}),
    ],
)
async def test_missing_or_wrong_key_is_a_400(
    http: httpx.AsyncClient, saga: UUID, path: str, body: dict[str, Any]
) -> None:
    """A missing key, or a key of another saga or step, is a 400 and writes no entry."""
    codes = []
    for key in (None, "nonsense", f"{uuid4()}:charge_payment", f"{saga}:reserve_inventory:undo:undo"):
        answer = await post(http, path, key, {"saga_id": str(saga), **body})
        assert (answer.status_code, answer.headers["content-type"]) == (400, "application/problem+json")
        codes.append(answer.json()["code"])
    assert codes == ["idempotency-key-missing", *["idempotency-key-invalid"] * 3]
    assert await entries(http, saga) == []


@pytest.mark.parametrize(
    "change",
    [
        {"amount_minor": 0},
        {"amount_minor": "5"},
        {"amount_minor": 1.5},
        {"amount_minor": True},
        {"currency": "usd"},
        {"payment_method": 7},
        {"saga_id": "no/slash"},
        {"saga_id": None},
        {"tip": 1},
    ],
)
async def test_invalid_body_is_a_422_with_the_location(
    http: httpx.AsyncClient, saga: UUID, change: dict[str, Any]
) -> None:
    """An invalid body is a 422 that names the invalid field."""
    body = {"saga_id": str(saga), "amount_minor": 5, "currency": "USD", "payment_method": None, **change}
    answer = await post(http, "/v1/payments/charge", f"{saga}:charge_payment", body)
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid-request")
    assert answer.json()["errors"][0]["where"] == f"body.{next(iter(change))}"
    assert await entries(http, saga) == []


async def test_malformed_json_is_a_400(http: httpx.AsyncClient) -> None:
    """A body that is not JSON is a 400."""
    headers = {"Content-Type": "application/json", "Idempotency-Key": "s:charge_payment"}
    answer = await http.post("/v1/payments/charge", content=b'{"saga_id":', headers=headers)
    assert (answer.status_code, answer.json()["code"]) == (400, "malformed-json")


@pytest.mark.parametrize(("method", "status"), [("DELETE", 405), ("GET", 404)])
async def test_framework_errors_are_problems(http: httpx.AsyncClient, method: str, status: int) -> None:
    """Unknown routes and wrong methods are answered as problems."""
    answer = await http.request(method, "/ledger" if status == 405 else "/nowhere")
    assert answer.status_code == answer.json()["status"] == status
    assert answer.headers["content-type"] == "application/problem+json"


async def test_setting_stock_keeps_held_items(http: httpx.AsyncClient, partners: Partners, saga: UUID) -> None:
    """`PUT /stock` sets the free quantity and keeps the held quantity."""
    item_id = f"a thing/№{saga.hex[:8]}"
    await partners.inventory.hold(saga, [PartnerItem(item_id, 4)], HOLD_SECONDS)
    answer = await http.put(f"/stock/{item_id}", json={"quantity": 7})
    assert answer.json() == {"free": 7, "held": 4, "sold": 0}
    assert (await http.put(f"/stock/{item_id}", json={"quantity": -1})).status_code == 422


async def test_saga_id_need_not_be_a_uuid(http: httpx.AsyncClient) -> None:
    """A saga id may be any name, not only a UUID."""
    saga = f"curl-{uuid4().hex[:8]}"
    answer = await post(http, "/v1/payments/refund", f"{saga}:charge_payment:undo", {"saga_id": saga})
    assert answer.json() == {"saga_id": saga, "state": "refunded"}
