"""Operators pause and resume partners, by route and by command. Each action is recorded, and timelines show it."""

import asyncio
import os
import pwd
import re
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import httpx
import pytest

from app import db
from app.db import Pool
from app.errors import PartnerNotFound
from app.operations import ages, partner_views, partners, timeline
from app.operations.ages import LIMITS
from app.operations.audit_views import ActionsAnswer, ActionTarget
from app.operations.partner_views import PartnerChanged, PartnersAnswer
from app.operations.timeline import TimelineAnswer
from app.orders.model import rfc3339
from app.saga import pauses
from app.saga.pause_watch import PauseWatch
from app.saga.pauses import COUNTED_ORDERS, LateOrders, PartnerPauses
from app.saga.steps import partners as names_of_partners
from tests.harness.api import assert_problem, serving
from tests.harness.cancelling import cancel
from tests.harness.commands import orders
from tests.harness.identity import bearer
from tests.harness.operating import OPERATOR, audit_rows, pause_partner, recorded, resume_partner
from tests.harness.orders import DEADLINE_SECONDS, TENANT, placed, start_saga
from tests.harness.queues import CONSUMER
from tests.harness.sagas import Stage
from tests.harness.wait import AMPLE_SECONDS, wait_until

TOKEN = "a-token-of-the-operators"
ACTOR = f"cli:{pwd.getpwuid(os.getuid()).pw_name}"
WHY = "the provider charges twice"
NOBODY = "postgresql://orders:orders@127.0.0.1:1/orders"  # a port that nothing listens on
PAUSE = {"for": "30m", "reason": WHY}
ROUTES = (
    ("GET", "/ops/partners"),
    ("POST", "/ops/partners/payment/pause"),
    ("POST", "/ops/partners/payment/resume"),
    ("POST", "/ops/partners/acme/pause"),
)


@pytest.fixture
async def ops(database_url: str) -> AsyncIterator[httpx.AsyncClient]:
    """An operator's client."""
    async with serving(database_url, admin_token=TOKEN) as client:
        client.headers["Authorization"] = f"Bearer {TOKEN}"
        yield client


async def change(ops: httpx.AsyncClient, path: str, **body: str) -> PartnerChanged:
    answer = (await ops.post(f"/ops/partners/{path}", json=body)).raise_for_status()
    assert answer.headers["cache-control"] == "no-store"
    return PartnerChanged.model_validate(answer.json(), strict=True)


async def listed(ops: httpx.AsyncClient) -> PartnersAnswer:
    answer = (await ops.get("/ops/partners")).raise_for_status()
    assert answer.headers["cache-control"] == "no-store"
    return PartnersAnswer.model_validate(answer.json(), strict=True)


def seconds_from_now(instant: str) -> float:
    return (datetime.fromisoformat(instant) - datetime.now(UTC)).total_seconds()


async def story(stage: Stage, order_id: UUID, tenant: str | None = None) -> TimelineAnswer:
    """Return an order's timeline, as an operator reads it, or its tenant."""
    return await timeline.read(stage.pool, order_id, tenant, CONSUMER)


def told(answer: TimelineAnswer) -> list[tuple[str, str | None]]:
    """Return the entries about pauses: event and detail."""
    return [(entry.event, entry.detail) for entry in answer.entries if entry.event.startswith("partner-")]


@pytest.mark.parametrize(("method", "path"), ROUTES)
async def test_only_an_operator_is_let_in(
    api: httpx.AsyncClient, ops: httpx.AsyncClient, method: str, path: str
) -> None:
    """Without the token each route is a 401, or a 404 where no operator is configured."""
    assert_problem(await api.request(method, path), 404, "not-found")
    assert_problem(await ops.request(method, path, headers=bearer("x")), 401, "unauthorized")


async def test_a_partner_is_paused_and_resumed(ops: httpx.AsyncClient, pool: Pool) -> None:
    """The list shows who, until when and why; the audit log keeps it."""
    assert [(each.partner, each.pause, each.circuit, each.sagas) for each in (await listed(ops)).partners] == [
        (name, None, None, 0) for name in names_of_partners()
    ]
    saga = await start_saga(pool)
    await pool.execute("UPDATE sagas SET step = 'charge_payment' WHERE id = $1", saga)
    changed = await change(ops, "payment/pause", **PAUSE)
    assert changed.pause is not None
    assert (changed.partner, changed.action, changed.outcome) == ("payment", "partner pause", "paused")
    assert changed.message == f"calls to payment are paused until {changed.pause.ends_at}"
    assert (changed.pause.actor, changed.pause.reason) == ("admin-token", WHY)
    assert abs(seconds_from_now(changed.pause.ends_at) - 1800) < AMPLE_SECONDS
    inventory, payment, shipping = (await listed(ops)).partners
    assert (payment.pause, payment.sagas, inventory.pause, shipping.pause) == (changed.pause, 1, None, None)
    resumed = await change(ops, "payment/resume", reason="it is back")
    assert (resumed.outcome, resumed.pause, resumed.message) == ("resumed", None, "calls to payment are resumed")
    again = await change(ops, "payment/resume", reason="it is back")
    assert (again.outcome, again.message) == ("not-paused", "calls to payment were not paused: nothing was changed")
    assert [each.pause for each in (await listed(ops)).partners] == [None] * 3
    assert await audit_rows(pool) == [
        ("admin-token", "partner pause", None, WHY, "paused"),
        ("admin-token", "partner resume", None, "it is back", "resumed"),
        ("admin-token", "partner resume", None, "it is back", "not-paused"),
    ]
    actions = ActionsAnswer.model_validate((await ops.get("/ops/actions")).json(), strict=True).actions
    assert {str(each.target) for each in actions} == {str(ActionTarget(kind="partner", id="payment"))}
    assert actions[-1].selection == {"partner": "payment", "seconds": 1800}


async def test_a_second_pause_replaces_the_first(ops: httpx.AsyncClient, pool: Pool) -> None:
    """Its end may be later or earlier; the reason is that of the second."""
    await change(ops, "payment/pause", **PAUSE)
    changed = await change(ops, "payment/pause", **{"for": "60", "reason": "a short one"})
    assert changed.outcome == "replaced"
    assert changed.message.endswith(", instead of the pause before")
    payment = (await listed(ops)).partners[1]
    assert payment.pause == changed.pause
    assert changed.pause is not None
    assert changed.pause.reason == "a short one"
    await change(ops, "payment/resume", reason="enough")
    assert [each.pause for each in (await listed(ops)).partners] == [None] * 3
    assert await recorded(pool) == ["partner pause paused", "partner pause replaced", "partner resume resumed"]


async def test_concurrent_pauses_leave_one(pool: Pool) -> None:
    """Each of them replaces the one before, so a single resume ends them all."""
    await asyncio.gather(*(pause_partner(pool, "payment") for _ in range(6)))
    assert sorted(await recorded(pool)) == ["partner pause paused"] + ["partner pause replaced"] * 5
    await resume_partner(pool, "payment")
    assert [each.pause for each in (await partner_views.read_partners(pool)).partners] == [None] * 3


async def test_an_unknown_partner_is_not_found(ops: httpx.AsyncClient, pool: Pool) -> None:
    """Nothing is recorded."""
    for path, body in (("acme/pause", PAUSE), ("acme/resume", {"reason": WHY}), ("Payment/pause", PAUSE)):
        assert_problem(await ops.post(f"/ops/partners/{path}", json=body), 404, "partner-not-found")
    with pytest.raises(PartnerNotFound, match="inventory, payment, shipping"):
        await partners.resume(pool, "acme", OPERATOR)
    assert await audit_rows(pool) == []


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"for": "30m"},
        {"reason": WHY},
        {**PAUSE, "for": "0"},
        {**PAUSE, "for": "soon"},
        {**PAUSE, "for": 1800},
        {**PAUSE, "for": "100d"},
        {**PAUSE, "reason": " "},
        {**PAUSE, "partner": "payment"},
    ],
    ids=str,
)
async def test_an_invalid_pause_is_refused(ops: httpx.AsyncClient, pool: Pool, body: dict[str, Any]) -> None:
    assert_problem(await ops.post("/ops/partners/payment/pause", json=body), 422, "validation-failed")
    assert await audit_rows(pool) == []


@pytest.mark.parametrize("longest", ["999999", "999999s", "9999m", "999h", "99d"])
async def test_the_longest_pauses_are_accepted(ops: httpx.AsyncClient, longest: str) -> None:
    assert (await change(ops, "payment/pause", **{**PAUSE, "for": longest})).outcome == "paused"


async def test_a_pause_warns_of_orders_that_would_be_rejected(ops: httpx.AsyncClient, pool: Pool) -> None:
    """Those go forward, still need the partner, and reach their deadline before its end. New ones may be among them."""
    at_payment, after_payment, compensating, cancelled, in_time, before_payment = [
        await start_saga(pool) for _ in range(6)
    ]
    await pool.execute("UPDATE sagas SET deadline_at = started_at + interval '10 min'")
    for saga, change_of in (
        (at_payment, "step = 'charge_payment'"),
        (after_payment, "step = 'commit_inventory'"),
        (compensating, "step = 'charge_payment', direction = 'backward'"),
        (in_time, "deadline_at = clock_timestamp() + interval '50 min'"),
        (before_payment, "step = 'reserve_inventory'"),
    ):
        await pool.execute(f"UPDATE sagas SET {change_of} WHERE id = $1", saga)  # noqa: S608 - a list in this test
    await cancel(pool, cancelled)
    changed = await change(ops, "payment/pause", **PAUSE)
    assert changed.orders_too_late == 2
    assert changed.pause is not None
    until = rfc3339(datetime.fromisoformat(changed.pause.ends_at) - timedelta(minutes=10))
    assert changed.warning == (
        "2 unfinished orders reach their deadline before then, and would be rejected"
        f"; so would orders placed before {until}"
    )
    short = await change(ops, "payment/pause", **{**PAUSE, "for": "5m"})
    assert (short.orders_too_late, short.warning) == (0, None)
    assert (await change(ops, "shipping/pause", **PAUSE)).orders_too_late == 3


async def test_a_pause_warns_of_orders_without_a_saga(ops: httpx.AsyncClient, pool: Pool) -> None:
    """Each gets as much time as the newest saga did, from its start on: too little for a long pause."""
    await placed(pool)
    long, short = "30m", "14m"
    assert (await change(ops, "payment/pause", **{**PAUSE, "for": long})).warning is None  # no saga tells the time
    await pool.execute("UPDATE sagas SET direction = 'backward' WHERE id = $1", await start_saga(pool))
    warned = await change(ops, "payment/pause", **{**PAUSE, "for": long})
    assert warned.orders_too_late == 1
    assert (await change(ops, "payment/pause", **{**PAUSE, "for": short})).warning is None
    await pool.execute("UPDATE orders SET status = 'cancelled'")
    assert warned.pause is not None
    alone = (await change(ops, "payment/pause", **{**PAUSE, "for": long})).warning
    assert alone is not None
    assert re.fullmatch("orders placed before .*Z reach their deadline before then, and would be rejected", alone)


async def test_a_pause_begins_although_its_cost_cannot_be_counted(database_url: str, pool: Pool) -> None:
    """The count is slower than a statement may be, as with a large backlog."""
    async with serving(database_url, admin_token=TOKEN, database_statement_seconds=1) as ops:
        ops.headers["Authorization"] = f"Bearer {TOKEN}"
        async with pool.acquire() as conn, conn.transaction():
            await conn.execute("LOCK TABLE sagas")
            changed = await change(ops, "payment/pause", **PAUSE)
            await pause_partner(pool, "payment")  # the count of the first pause keeps no lock
    assert (changed.outcome, changed.orders_too_late) == ("paused", None)
    assert changed.warning is not None
    assert changed.warning.endswith("could not be counted")
    assert await recorded(pool) == ["partner pause paused", "partner pause replaced"]


async def test_late_orders_are_counted_up_to_a_limit(pool: Pool) -> None:
    """Those with and those without a saga. The warning says that there are more."""
    await start_saga(pool)
    await placed(pool)
    found = []
    async with pool.acquire() as conn:
        ends_at = await db.now(conn) + timedelta(hours=1)
        for limit in (1, 2):
            late = await pauses.find_late(conn, "payment", ends_at, limit=limit)
            found.append((late.number, late.has_more))
    assert found == [(1, True), (2, False)]
    warning = partner_views.warn(LateOrders(COUNTED_ORDERS, None, has_more=True))
    assert warning == "more than 10,000 unfinished orders reach their deadline before then, and would be rejected"


async def test_a_pause_ends_by_itself(ops: httpx.AsyncClient, pool: Pool) -> None:
    """From its end on, it is neither shown nor resumed."""
    await change(ops, "payment/pause", **PAUSE)
    await pool.execute("UPDATE partner_pauses SET ends_at = clock_timestamp()")
    assert [each.pause for each in (await listed(ops)).partners] == [None] * 3
    assert (await change(ops, "payment/resume", reason=WHY)).outcome == "not-paused"
    assert (await change(ops, "payment/pause", **PAUSE)).outcome == "paused"


async def test_the_circuit_of_the_process_is_shown(database_url: str, sandbox_url: str) -> None:
    """A process that calls partners has one for each; a pause by route is obeyed at once."""
    urls = dict.fromkeys(("inventory_url", "payment_url", "shipping_url"), sandbox_url)
    async with serving(database_url, admin_token=TOKEN, roles="api,relay,consumer", **urls) as ops:
        ops.headers["Authorization"] = f"Bearer {TOKEN}"
        assert [each.circuit for each in (await listed(ops)).partners] == ["closed"] * 3
        await change(ops, "payment/pause", **PAUSE)

        async def is_shown() -> bool:
            return 'partner_paused{partner="payment"} 1.0' in (await ops.get("/metrics")).text

        await wait_until(is_shown, AMPLE_SECONDS, "the pause in the metrics")


async def test_the_timeline_tells_of_a_pause(stage: Stage) -> None:
    """Until when, also of a pause that began before the order; its end is an entry of its own. Operators read why."""
    known = PartnerPauses()
    watch = PauseWatch(stage.pool, known, stage.signals)
    before = await start_saga(stage.pool)
    await stage.drive()
    await pause_partner(stage.pool, "payment")
    saga = await start_saga(stage.pool)
    await watch.run_once()
    await stage.orchestrator(pauses=known).run_once()
    answer = await story(stage, saga)
    assert answer.why_stuck is not None
    assert answer.why_stuck.waiting_for == "payment"
    assert "An operator paused calls to payment until " in answer.why_stuck.message
    assert f": {OPERATOR.reason}." in answer.why_stuck.message
    [(event, detail)] = told(answer)
    assert event == "partner-paused"
    assert detail is not None
    assert detail.startswith("payment until 20")
    assert detail.endswith(f"Z: {OPERATOR.reason}")
    of_tenant = await story(stage, saga, TENANT)
    assert of_tenant.why_stuck is not None
    assert "An operator paused calls to payment until " in of_tenant.why_stuck.message
    assert told(of_tenant) == [(event, detail.removesuffix(f": {OPERATOR.reason}"))]
    assert OPERATOR.reason not in of_tenant.model_dump_json()
    await pause_partner(stage.pool, "payment", 60)
    await resume_partner(stage.pool, "payment")
    later = await story(stage, saga)
    assert [event for event, _ in told(later)] == [
        "partner-paused", "partner-pause-replaced", "partner-paused", "partner-resumed",
    ]  # fmt: skip
    assert [entry for entry in answer.entries if entry.at] == [
        entry for entry in later.entries if entry.id in {each.id for each in answer.entries if each.at}
    ]
    assert later.why_stuck is None or "An operator" not in later.why_stuck.message
    await watch.run_once()
    await stage.drive(stage.orchestrator(pauses=known))
    ended = await story(stage, saga)
    await pause_partner(stage.pool, "shipping")
    assert await story(stage, saga) == ended
    assert told(await story(stage, before)) == []


async def test_a_pause_that_ran_out_is_told_as_resumed(stage: Stage) -> None:
    """By its time, without an operator."""
    saga = await start_saga(stage.pool)
    await pause_partner(stage.pool, "payment")
    await stage.pool.execute("UPDATE partner_pauses SET ends_at = clock_timestamp()")
    assert [event for event, _ in told(await story(stage, saga))] == ["partner-paused", "partner-resumed"]


async def test_a_late_undo_of_a_paused_partner_is_within_its_limit(stage: Stage) -> None:
    """The pause is reported instead. At another partner, or after the pause, it is past its limit."""
    late = next(limit for limit in LIMITS if (limit.table, limit.state) == ("sagas", "late"))

    async def overdue() -> int:
        async with stage.pool.acquire() as conn:
            return (await ages.count_overdue(conn, [late]))["sagas", "late"]

    await start_saga(stage.pool)
    await stage.pool.execute(
        "UPDATE sagas SET step = 'charge_payment', direction = 'backward', deadline_at = deadline_at - interval '1 h'"
    )
    assert await overdue() == 1
    await pause_partner(stage.pool, "shipping")
    assert await overdue() == 1
    await pause_partner(stage.pool, "payment")
    assert await overdue() == 0
    await resume_partner(stage.pool, "payment")
    assert await overdue() == 1


async def test_the_commands_pause_and_resume(database_url: str, pool: Pool) -> None:
    """Lines for people, and JSON; the warning is on stderr."""
    saga = await start_saga(pool)
    await pool.execute("UPDATE sagas SET step = 'charge_payment' WHERE id = $1", saga)
    env = {"database_url": database_url}
    code, out, err = await orders("partner", "pause", "payment", "--for", "30m", "--reason", WHY, **env)
    [(_, ends_at)] = await pool.fetch("SELECT paused_at, ends_at FROM partner_pauses")
    until = ends_at.strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    assert (code, out) == (0, f"calls to payment are paused until {until}\n")
    new = rfc3339(ends_at - timedelta(seconds=DEADLINE_SECONDS))
    late = "1 unfinished order reaches its deadline before then, and would be rejected"
    assert err == f"warning: {late}; so would orders placed before {new}\n"
    assert timedelta() < ends_at - datetime.now(UTC) <= timedelta(minutes=30)
    _, out, _ = await orders("partner", "list", **env)
    lines = out.splitlines()
    assert lines[0] == "inventory  not paused; 0 unfinished sagas at its steps"
    assert lines[1] == f"payment    paused until {until}; 1 unfinished saga at its steps"
    assert lines[2].startswith(f"           by {ACTOR} since 20")
    assert lines[2].endswith(f"Z: {WHY}")
    _, out, _ = await orders("partner", "list", "--json", **env)
    assert [each.pause is None for each in PartnersAnswer.model_validate_json(out).partners] == [True, False, True]
    code, out, err = await orders("partner", "resume", "payment", "--reason", "it is back", "--json", **env)
    assert (code, PartnerChanged.model_validate_json(out).outcome, err) == (0, "resumed", "")
    assert await orders("partner", "resume", "payment", "--reason", "it is back", **env) == (
        0,
        "calls to payment were not paused: nothing was changed\n",
        "",
    )
    assert await audit_rows(pool) == [
        (ACTOR, "partner pause", None, WHY, "paused"),
        (ACTOR, "partner resume", None, "it is back", "resumed"),
        (ACTOR, "partner resume", None, "it is back", "not-paused"),
    ]
    _, out, _ = await orders("audit", "--limit", "1", **env)
    assert "  target    partner payment\n" in out


@pytest.mark.parametrize(
    ("args", "code"),
    [
        (("pause", "acme", "--for", "30m", "--reason", WHY), 2),
        (("resume", "acme", "--reason", WHY), 2),
        (("pause", "payment", "--for", "soon", "--reason", WHY), 2),
        (("pause", "payment", "--for", "100d", "--reason", WHY), 2),
        (("pause", "payment", "--reason", WHY), 2),
        (("pause", "payment", "--for", "30m"), 2),
        (("pause", "payment", "--for", "30m", "--reason", "two\nlines"), 2),
        (("resume", "payment"), 2),
        (("pause", "payment", "--for", "30m", "--reason", WHY), 3),
        (("list",), 3),
    ],
    ids=str,
)
async def test_a_command_that_cannot_be_done_has_its_code(args: tuple[str, ...], code: int) -> None:
    """2: usage, which is checked first; 3: the database is unavailable."""
    found, out, err = await orders("partner", *args, database_url=NOBODY)
    assert (found, out) == (code, "")
    if "acme" in args:
        assert "the partners are inventory, payment, shipping" in " ".join(err.split())
