"""The ledger tells all that happened, in order, and nothing that was answered is lost, whatever kills the sandbox."""

import asyncio
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

from app.partners.ports import Done, Item, Outcome, Refused
from sandbox import create_app
from tests.contract.conftest import ACTS, SandboxProcess, post
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


async def expire_a_hold(http: httpx.AsyncClient, partners: Partners, saga: UUID, item: Item) -> None:
    body = {
        "saga_id": str(saga),
        "items": [{"item_id": item.sku, "qty": item.quantity}],
        "ttl_seconds": 0.05,
    }
    assert (await post(http, "/v1/inventory/hold", f"{saga}:reserve_inventory", body)).status_code == 201

    async def it_is_over() -> bool:
        return await partners.inventory.state(saga) == "expired"

    await wait_until(it_is_over, AMPLE_SECONDS, "end of the hold")


async def test_an_entry_tells_who_did_what_when_by_which_key_and_how_it_ended(
    http: httpx.AsyncClient, partners: Partners, saga: UUID
) -> None:
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


async def test_entries_are_read_in_pages_without_a_gap_or_a_repeat(
    http: httpx.AsyncClient, partners: Partners, saga: UUID
) -> None:
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


async def test_the_whole_ledger_is_every_sagas_and_an_empty_parameter_means_all(
    http: httpx.AsyncClient, partners: Partners
) -> None:
    sagas = [uuid4(), uuid4()]
    for saga in sagas:
        await partners.payment.refund(charge_of(saga))
    told = (await http.get("/ledger?saga_id=")).json()["entries"]
    assert {str(saga) for saga in sagas} <= {each["saga_id"] for each in told}
    assert {str(saga) for saga in sagas} <= set((await http.get("/ledger/summary")).json()["sagas"])


@pytest.mark.parametrize("query", ["after=-1", "limit=0", "limit=x", "after=99999999999999999999"])
async def test_a_page_that_cannot_be_is_a_422(http: httpx.AsyncClient, query: str) -> None:
    assert (await http.get(f"/ledger?{query}")).status_code == 422


async def test_a_saga_without_entries_has_no_summary(http: httpx.AsyncClient, saga: UUID) -> None:
    assert (await http.get("/ledger/summary", params={"saga_id": str(saga)})).json() == {"sagas": {}}


async def test_a_hold_past_its_time_returns_its_stock_and_the_ledger_says_so(
    http: httpx.AsyncClient, partners: Partners, saga: UUID, item: Item
) -> None:
    await expire_a_hold(http, partners, saga, item)
    stock = (await http.get(f"/v1/inventory/stock/{item.sku}")).json()
    assert stock == {"free": 1_000_000, "held": 0, "sold": 0}
    [returned] = await entries(http, saga, "inventory.release")
    assert (returned["outcome"], returned["applied"]) == ("done", True)
    assert (returned["key"], returned["detail"]) == (None, "expired")
    assert (await summary(http, saga))["held"] is False


async def test_a_commit_of_an_expired_hold_is_refused_for_good_and_an_undo_finds_nothing(
    http: httpx.AsyncClient, partners: Partners, saga: UUID, item: Item
) -> None:
    await expire_a_hold(http, partners, saga, item)
    assert await partners.inventory.commit(saga) == Refused("hold-expired")
    assert await partners.inventory.commit(saga) == Refused("hold-expired")
    assert await partners.inventory.release(saga) == Done()
    assert await partners.inventory.state(saga) == "expired"
    assert await decisions(http, saga, "inventory.commit") == [("refused", False), ("replayed", False)]
    assert await decisions(http, saga, "inventory.release") == [("done", True), ("nothing-to-undo", False)]


async def test_stock_of_an_expired_hold_is_free_for_the_next(
    http: httpx.AsyncClient, partners: Partners, saga: UUID, item: Item
) -> None:
    await http.put(f"/stock/{item.sku}", json={"quantity": item.quantity})
    await expire_a_hold(http, partners, saga, item)
    assert isinstance(await partners.inventory.hold(uuid4(), [item], HOLD_SECONDS), Done)


async def test_everything_is_as_before_after_a_kill(
    start_sandbox: Start, partners_at: Callable[..., Partners], saga: UUID, item: Item
) -> None:
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
        undone = [await act(partners, saga, item) for act in list(ACTS.values())[4:]]
    assert undone == replies[4:]
    assert await partners.inventory.state(other) == "held"


async def test_a_kill_amid_calls_loses_no_answer_and_repeats_no_deed(
    start_sandbox: Start, partners_at: Callable[..., Partners]
) -> None:
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
    assert all(isinstance(each, Done) for each in again.values())
    assert all(again[saga] == outcome for saga, outcome in first.items() if isinstance(outcome, Done))
    async with plain_http(sandbox.url) as http:
        told = (await http.get("/ledger")).json()["entries"]
    assert Counter(each["saga_id"] for each in told if each["applied"]) == dict.fromkeys(map(str, sagas), 1)


async def test_the_ledger_file_takes_no_change_of_what_is_written(tmp_path: Path) -> None:
    app: Any = create_app(tmp_path / "ledger.sqlite")
    async with app.router.lifespan_context(app):
        with closing(sqlite3.connect(tmp_path / "ledger.sqlite", isolation_level=None)) as file:
            row = "INSERT INTO ledger (at, saga_id, operation, outcome, applied) VALUES ('', '', '', '', 1)"
            file.execute(row)
            for change in ("UPDATE ledger SET applied = 0", "DELETE FROM ledger"):
                with pytest.raises(sqlite3.IntegrityError, match="append-only"):
                    file.execute(change)


async def test_a_file_that_is_no_ledger_fails_the_start(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("not a database, though long enough to be taken for one" * 20)
    app: Any = create_app(path)
    with pytest.raises(sqlite3.DatabaseError):
        async with app.router.lifespan_context(app):
            pass


async def test_a_ledger_in_a_folder_yet_to_be_made_is_made(tmp_path: Path) -> None:
    path = tmp_path / "new" / "ledger.sqlite"
    app: Any = create_app(path)
    async with app.router.lifespan_context(app):
        assert path.exists()
