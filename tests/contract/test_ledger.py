"""Check the ledger: it records every decision in order, and a kill of the sandbox loses no answered call."""

import asyncio
import json
import sqlite3
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest

from app.partners.ports import Done, Outcome, PartnerItem, Refused
from sandbox import create_app
from tests.contract.conftest import ACTS, DO, UNDO, SandboxProcess, post
from tests.harness.sandboxes import (
    HOLD_SECONDS,
    Partners,
    charge_of,
    decisions,
    entries,
    plain_http,
    set_faults,
    summary,
)
from tests.harness.wait import AMPLE_SECONDS, wait_until

Start = Callable[..., SandboxProcess]


async def expire_a_hold(http: httpx.AsyncClient, partners: Partners, saga: UUID, item: PartnerItem) -> None:
    body = {
        "saga_id": str(saga),
        "items": [{"item_id": item.sku, "qty": item.quantity}],
        "ttl_seconds": 0.05,
    }
    assert (await post(http, "/v1/inventory/hold", f"{saga}:reserve_inventory", body)).status_code == 201

    async def is_expired() -> bool:
        return await partners.inventory.state(saga) == "expired"

    await wait_until(is_expired, AMPLE_SECONDS, "the hold to expire")


async def test_entry_fields(http: httpx.AsyncClient, partners: Partners, saga: UUID) -> None:
    """An entry has the saga, the operation, the key, the UTC time, the outcome and the amount."""
    await partners.payment.charge(charge_of(saga, 1050, "USD", "pm_card_visa"))
    await partners.payment.charge(charge_of(saga, 1050, "USD", "pm_card_visa"))
    done, replayed = await entries(http, saga)
    assert done["seq"] < replayed["seq"]
    assert datetime.fromisoformat(done["at"]).utcoffset() == timedelta(0)
    fixed = {
        "saga_id": str(saga),
        "operation": "payment.charge",
        "key": f"{saga}:charge_payment",
        "detail": None,
    }
    assert done == {
        **fixed,
        "seq": done["seq"],
        "at": done["at"],
        "outcome": "done",
        "applied": True,
        "amount_minor": 1050,
    }
    assert (replayed["outcome"], replayed["applied"], replayed["amount_minor"]) == ("replayed", False, None)


async def test_pages_of_entries_have_no_gap_or_repeat(http: httpx.AsyncClient, partners: Partners, saga: UUID) -> None:
    """Paging with `after` and `limit` returns each entry once."""
    for _ in range(7):
        await partners.payment.refund(charge_of(saga))
    whole, after = [], 0
    while page := (await http.get("/ledger", params={"saga_id": str(saga), "after": after, "limit": 3})).json()[
        "entries"
    ]:
        whole += page
        after = page[-1]["seq"]
    assert whole == await entries(http, saga)
    assert len(whole) == 7


async def test_ledger_without_saga_id_lists_all_sagas(http: httpx.AsyncClient, partners: Partners) -> None:
    """A missing or empty `saga_id` selects the entries of every saga."""
    sagas = [uuid4(), uuid4()]
    for saga in sagas:
        await partners.payment.refund(charge_of(saga))
    listed = (await http.get("/ledger?saga_id=")).json()["entries"]
    assert {str(saga) for saga in sagas} <= {entry["saga_id"] for entry in listed}
    assert {str(saga) for saga in sagas} <= set((await http.get("/ledger/summary")).json()["sagas"])


@pytest.mark.parametrize("query", ["after=-1", "limit=0", "limit=x", "after=99999999999999999999"])
async def test_invalid_page_is_a_422(http: httpx.AsyncClient, query: str) -> None:
    """Invalid values of `after` and `limit` are rejected with 422."""
    assert (await http.get(f"/ledger?{query}")).status_code == 422


async def test_saga_without_entries_has_no_summary(http: httpx.AsyncClient, saga: UUID) -> None:
    """The summary omits a saga without entries."""
    assert (await http.get("/ledger/summary", params={"saga_id": str(saga)})).json() == {"sagas": {}}


async def test_expired_hold_returns_its_stock(
    http: httpx.AsyncClient, partners: Partners, saga: UUID, item: PartnerItem
) -> None:
    """An expired hold returns its stock and writes an entry without a key."""
    await expire_a_hold(http, partners, saga, item)
    stock = (await http.get(f"/v1/inventory/stock/{item.sku}")).json()
    assert stock == {"free": 1_000_000, "held": 0, "sold": 0}
    [returned] = await entries(http, saga, "inventory.release")
    assert (returned["outcome"], returned["applied"]) == ("done", True)
    assert (returned["key"], returned["detail"]) == (None, "expired")
    assert (await summary(http, saga))["held"] is False


async def test_commit_of_an_expired_hold_is_refused(
    http: httpx.AsyncClient, partners: Partners, saga: UUID, item: PartnerItem
) -> None:
    """A commit of an expired hold is refused permanently, and a release has nothing to undo."""
    await expire_a_hold(http, partners, saga, item)
    assert await partners.inventory.commit(saga) == Refused("hold-expired")
    assert await partners.inventory.commit(saga) == Refused("hold-expired")
    assert await partners.inventory.release(saga) == Done()
    assert await partners.inventory.state(saga) == "expired"
    assert await decisions(http, saga, "inventory.commit") == [("refused", False), ("replayed", False)]
    assert await decisions(http, saga, "inventory.release") == [("done", True), ("nothing-to-undo", False)]


async def test_stock_of_an_expired_hold_can_be_held_again(
    http: httpx.AsyncClient, partners: Partners, saga: UUID, item: PartnerItem
) -> None:
    """Another saga can hold the stock of an expired hold."""
    await http.put(f"/stock/{item.sku}", json={"quantity": item.quantity})
    await expire_a_hold(http, partners, saga, item)
    assert isinstance(await partners.inventory.hold(uuid4(), [item], HOLD_SECONDS), Done)


async def test_kill_loses_no_state(
    start_sandbox: Start, partners_at: Callable[..., Partners], saga: UUID, item: PartnerItem
) -> None:
    """After a kill and a restart, the ledger, the fault rules, the stock and the answers are unchanged."""
    sandbox = start_sandbox()
    partners, other = partners_at(sandbox.url), uuid4()
    async with plain_http(sandbox.url) as http:
        replies = [await act(partners, saga, item) for act in ACTS.values()]
        await partners.inventory.hold(other, [item], HOLD_SECONDS)
        await set_faults(http, {"target": "payment.charge", "kind": "error", "times": 3})
        paths = ["/ledger", "/ledger/summary", "/faults", f"/v1/inventory/stock/{item.sku}"]
        before = [(await http.get(path)).json() for path in paths]
        sandbox.kill()
        sandbox.start()
        assert [(await http.get(path)).json() for path in paths] == before
        undone = [await act(partners, saga, item) for act in UNDO.values()]
    assert undone == replies[len(DO) :]
    assert await partners.inventory.state(other) == "held"


async def test_kill_during_calls_loses_and_repeats_nothing(
    start_sandbox: Start, partners_at: Callable[..., Partners]
) -> None:
    """A kill during calls loses no answered call, and no retry charges a second time."""
    sandbox = start_sandbox()
    partners = partners_at(sandbox.url)
    sagas = [uuid4() for _ in range(120)]
    first: dict[UUID, Outcome] = {}

    async def charge(saga: UUID) -> None:
        first[saga] = await partners.payment.charge(charge_of(saga, 100, "USD", None))

    calls = [asyncio.create_task(charge(saga)) for saga in sagas]

    await wait_until(lambda: len(first) >= 20, AMPLE_SECONDS, "answers to the first calls")
    sandbox.kill()
    sandbox.start()
    await asyncio.gather(*calls)
    again = {saga: await partners.payment.charge(charge_of(saga, 100, "USD", None)) for saga in sagas}
    assert all(isinstance(outcome, Done) for outcome in again.values())
    assert all(again[saga] == outcome for saga, outcome in first.items() if isinstance(outcome, Done))
    async with plain_http(sandbox.url) as http:
        listed = (await http.get("/ledger")).json()["entries"]
    assert Counter(entry["saga_id"] for entry in listed if entry["applied"]) == dict.fromkeys(map(str, sagas), 1)


async def test_ledger_file_is_append_only(tmp_path: Path) -> None:
    """The ledger file rejects updates and deletes of its entries."""
    app: Any = create_app(tmp_path / "ledger.sqlite")
    async with app.router.lifespan_context(app):
        with closing(sqlite3.connect(tmp_path / "ledger.sqlite", isolation_level=None)) as file:
            row = "INSERT INTO ledger (at, saga_id, operation, outcome, applied) VALUES ('', '', '', '', 1)"
            file.execute(row)
            for change in ("UPDATE ledger SET applied = 0", "DELETE FROM ledger"):
                with pytest.raises(sqlite3.IntegrityError, match="append-only"):
                    file.execute(change)


async def test_file_that_is_not_a_database_fails_the_start(tmp_path: Path) -> None:
    """The sandbox does not start on a file that is not a SQLite database."""
    path = tmp_path / "notes.txt"
    path.write_text("this text is not a database, but as long as a database header" * 20)
    app: Any = create_app(path)
    with pytest.raises(sqlite3.DatabaseError):
        async with app.router.lifespan_context(app):
            pass


async def test_missing_ledger_folder_is_created(tmp_path: Path) -> None:
    """The sandbox creates the ledger file's folder if it is missing."""
    path = tmp_path / "new" / "ledger.sqlite"
    app: Any = create_app(path)
    async with app.router.lifespan_context(app):
        assert path.exists()


async def test_pages_of_the_summary_have_no_gap_or_repeat(http: httpx.AsyncClient, partners: Partners) -> None:
    """Paging the summary with `after` and `limit` returns each saga once, ordered by id."""
    sagas = sorted(str(uuid4()) for _ in range(7))
    for saga in sagas:
        await partners.payment.charge(charge_of(UUID(saga)))
    whole: dict[str, Any] = {}
    after = ""
    while page := (await http.get("/ledger/summary", params={"after": after, "limit": 3})).json()["sagas"]:
        assert not page.keys() & whole.keys()
        assert len(page) <= 3
        whole |= page
        after = max(page)
    assert list(whole) == sorted(whole)
    assert whole == (await http.get("/ledger/summary")).json()["sagas"]
    assert set(sagas) <= whole.keys()


async def test_summary_counts_moves_and_shows_items(
    http: httpx.AsyncClient, partners: Partners, saga: UUID, item: PartnerItem
) -> None:
    """With `details`, the summary counts the applied entries of each operation, and shows what is held or sold."""
    for act in list(DO.values()) * 2:
        await act(partners, saga, item)
    query = {"saga_id": str(saga), "details": "true"}
    sold = (await http.get("/ledger/summary", params=query)).json()["sagas"][str(saga)]
    assert sold["moves"] == dict.fromkeys(DO, 1)
    assert sold["items"] == {item.sku: item.quantity}
    await partners.inventory.release(saga)
    released = (await http.get("/ledger/summary", params=query)).json()["sagas"][str(saga)]
    assert released["moves"]["inventory.release"] == 1
    assert released["items"] == {}


async def test_totals_since(http: httpx.AsyncClient, partners: Partners, saga: UUID) -> None:
    """`/ledger/totals` counts what was applied after a `seq`: refusals and replays move nothing."""
    before = (await http.get("/ledger/totals")).json()["seq"]
    await partners.payment.charge(charge_of(saga, 1050, "USD", "pm_card_visa"))
    await partners.payment.charge(charge_of(saga, 1050, "USD", "pm_card_visa"))
    await partners.payment.charge(charge_of(uuid4(), 70, "USD", "pm_card_declined"))
    await partners.payment.refund(charge_of(saga))
    new = (await http.get("/ledger/totals", params={"after": before})).json()
    assert new["operations"] == {
        "payment.charge": {"moves": 1, "amount_minor": 1050},
        "payment.refund": {"moves": 1, "amount_minor": 1050},
    }
    later = (await http.get("/ledger/totals", params={"after": new["seq"]})).json()
    assert (later["seq"], later["operations"]) == (new["seq"], {})


async def test_totals_of_the_stock(http: httpx.AsyncClient, partners: Partners, item: PartnerItem) -> None:
    """`/ledger/totals` sums up the stock of all items: free + held + sold equals what was supplied."""
    await partners.inventory.hold(uuid4(), [item], HOLD_SECONDS)
    for name in (item.sku, "OUT-OF-STOCK"):
        (await http.put(f"/stock/{name}", json={"quantity": 5})).raise_for_status()
    totals = (await http.get("/ledger/totals")).json()
    stock = (await http.get("/ledger/stock")).json()["items"].values()
    assert totals["items"] == len(stock)
    assert totals["stock"] == {part: sum(one[part] for one in stock) for part in ("free", "held", "sold", "supplied")}
    assert totals["stock"]["free"] + totals["stock"]["held"] + totals["stock"]["sold"] == totals["stock"]["supplied"]


async def test_set_stock_is_a_ledger_entry(http: httpx.AsyncClient, partners: Partners, item: PartnerItem) -> None:
    """`PUT /stock` is recorded without a saga, and explains the stock: free + held + sold equals what was supplied."""
    await partners.inventory.hold(uuid4(), [item], HOLD_SECONDS)
    for quantity in (5, 70):
        (await http.put(f"/stock/{item.sku}", json={"quantity": quantity})).raise_for_status()
    listed = (await http.get("/ledger")).json()["entries"]
    details = [json.loads(entry["detail"]) for entry in listed if entry["operation"] == "stock.set"]
    assert [detail for detail in details if detail["item_id"] == item.sku] == [
        {"item_id": item.sku, "free_before": 1_000_000 - item.quantity, "free": 5},
        {"item_id": item.sku, "free_before": 5, "free": 70},
    ]
    assert "" not in (await http.get("/ledger/summary")).json()["sagas"]
    before = f"{item.sku[:-1]}{chr(ord(item.sku[-1]) - 1)}"
    page = (await http.get("/ledger/stock", params={"after": before, "limit": 1})).json()["items"]
    assert page == {
        item.sku: {"free": 70, "held": item.quantity, "sold": 0, "supplied": 70 + item.quantity},
    }
