"""Whole sagas that pay through Stripe: by the fake's ledger, a confirmed order is paid once, and no other is paid."""

import asyncio
from collections.abc import Callable
from uuid import UUID

import pytest
from structlog.testing import capture_logs

from app.orders.model import Line
from app.partners.http import HttpClient
from app.saga.orchestrator import Orchestrator
from tests.harness import stripe_fake
from tests.harness.cancelling import cancel
from tests.harness.orders import start_saga
from tests.harness.sagas import Stage, dies_at, running
from tests.harness.sandboxes import set_faults
from tests.harness.stripe_fake import StripeFake
from tests.harness.wait import AMPLE_SECONDS, wait_until

VISA = {"payment_method": "pm_card_visa"}
LOST = ("error", "busy", "broken", "timeout_before", "timeout_after", "reset_before", "reset_after", "garbage")
UNDONE = {"kept_minor": 0, "held": False, "committed": False, "shipped": False}
Paying = Callable[..., Orchestrator]


@pytest.fixture
def paying(stage: Stage, partner_http: HttpClient, stripe: StripeFake) -> Paying:
    """Return a function that makes orchestrators that pay through Stripe, with this timeout per call."""

    def paying(seconds: float = AMPLE_SECONDS, checkpoint: Callable[[str], None] = lambda _: None) -> Orchestrator:
        payment = stripe_fake.client_of(partner_http, stripe.url, seconds)
        return stage.orchestrator(payment=payment, checkpoint=checkpoint)

    return paying


async def balances(stage: Stage, stripe: StripeFake, saga: UUID, outcome: str, charges: int) -> None:
    """Check the order's end against the fake's ledger, and that nothing is left that could still be charged."""
    assert await stage.outcome(saga) == outcome
    assert stripe.charged(saga) == [2997] * charges
    assert stripe.kept(saga) == (2997 if outcome == "confirmed" else 0)
    assert set(stripe.states(saga)) <= {"succeeded", "canceled"}
    standing = await stage.standing(saga)  # the sandbox's, which only plays inventory and shipping
    assert standing == (UNDONE if outcome != "confirmed" else {**UNDONE, "committed": True, "shipped": True})


async def test_payment_of_a_confirmed_order_is_recorded(stage: Stage, stripe: StripeFake, paying: Paying) -> None:
    saga = await start_saga(stage.pool, **VISA)
    await stage.drive(paying())
    await balances(stage, stripe, saga, "confirmed", 1)
    query = "SELECT reply ->> 'payment_id' FROM saga_steps WHERE step = 'charge_payment' AND outcome = 'done'"
    assert [await stage.pool.fetchval(query)] == list(stripe.intents)


@pytest.mark.parametrize("method", ["pm_card_visa_chargeDeclined", None])
async def test_order_that_cannot_be_paid_is_rejected(
    stage: Stage, stripe: StripeFake, paying: Paying, method: str | None
) -> None:
    saga = await start_saga(stage.pool, payment_method=method)
    await stage.drive(paying())
    await balances(stage, stripe, saga, "rejected: card-declined", 0)


@pytest.mark.parametrize(("currency", "price_minor"), [("IQD", 1000), ("CLF", 10_000)])
async def test_unknown_currency_is_never_charged(
    stage: Stage, stripe: StripeFake, paying: Paying, currency: str, price_minor: int
) -> None:
    """The order ends rejected, no intent is ever confirmed, and the log says why."""
    saga = await start_saga(stage.pool, currency=currency, lines=(Line("WIDGET", 3, price_minor),), **VISA)
    with capture_logs() as logs:
        await stage.drive(paying())
    assert await stage.outcome(saga) == "rejected: card-declined"
    assert stripe.charged(saga) == []
    assert "confirm" not in stripe.asked()
    [line] = [line for line in logs if line["event"] == "stripe.not_charged"]
    assert (line["currency"], line["saga_id"]) == (currency, str(saga))
    assert "number of decimals is not known" in line["reason"]


async def charged_and_cancelled(stage: Stage, orchestrator: Orchestrator) -> UUID:
    """Let an order be paid, then cancel it."""
    saga = await start_saga(stage.pool, **VISA)
    await set_faults(stage.http, {"target": "inventory.commit", "kind": "error", "times": 1})
    await orchestrator.run_once()
    await cancel(stage.pool, saga)
    return saga


@pytest.mark.parametrize("days", [0, 3])
async def test_cancel_after_the_charge_refunds_its_payment(
    stage: Stage, stripe: StripeFake, paying: Paying, days: int
) -> None:
    """The recorded payment id is used."""
    saga = await charged_and_cancelled(stage, paying())
    assert stripe.kept(saga) == 2997
    await stage.pool.execute("UPDATE sagas SET started_at = started_at - make_interval(days => $1)", days)
    stripe.forget_keys()
    await stage.drive(paying())
    await balances(stage, stripe, saga, "cancelled: cancelled-by-customer", 1)
    assert stripe.asked() == ["create", "confirm", "look", "refund"]


async def test_cancel_during_the_charge_refunds_its_payment(stage: Stage, stripe: StripeFake, paying: Paying) -> None:
    """The recorded payment id is used."""
    saga = await start_saga(stage.pool, **VISA)
    stripe.fail("slow", "confirm")
    turn = asyncio.create_task(paying().run_once())
    await wait_until(stripe.waiting.is_set, AMPLE_SECONDS, "the charge")
    await cancel(stage.pool, saga)
    stripe.gate.set()
    await turn
    await balances(stage, stripe, saga, "cancelled: cancelled-by-customer", 1)
    assert stripe.asked() == ["create", "confirm", "look", "refund"]


async def stays_and_needs_an_operator(stage: Stage, saga: UUID, paying: Paying) -> None:
    """Check that undoing at this account does not end the saga, and needs an operator at once."""
    for _ in range(3):
        await stage.let_time_pass()
        await paying().run_once()
        assert await stage.outcome(saga) == "compensating: cancelled-by-customer"
        assert (await stage.saga(saga))["needs_operator_at"] <= (await stage.saga(saga))["updated_at"]


@pytest.mark.parametrize("days", [0, 3])
async def test_charge_at_another_account_is_not_lost(
    stage: Stage, stripe: StripeFake, paying: Paying, days: int
) -> None:
    """The order stays compensating until the account that has the money is configured again."""
    saga = await charged_and_cancelled(stage, paying())
    await stage.pool.execute("UPDATE sagas SET started_at = started_at - make_interval(days => $1)", days)
    theirs, stripe.intents = stripe.intents, {}
    stripe.forget_keys()
    await stays_and_needs_an_operator(stage, saga, paying)
    assert (stripe.kept(saga), stripe.intents) == (2997, {})
    stripe.intents = theirs
    await stage.drive(paying())
    await balances(stage, stripe, saga, "cancelled: cancelled-by-customer", 1)


async def test_charge_at_another_provider_is_not_lost(stage: Stage, stripe: StripeFake, paying: Paying) -> None:
    """The order stays compensating until the provider that has the money is configured again."""
    saga = await charged_and_cancelled(stage, stage.orchestrator())
    await stays_and_needs_an_operator(stage, saga, paying)
    assert (stripe.asked(), (await stage.standing(saga))["kept_minor"]) == ([], 2997)
    await stage.drive()
    assert await stage.outcome(saga) == "cancelled: cancelled-by-customer"
    assert await stage.standing(saga) == UNDONE


@pytest.mark.parametrize(
    ("operation", "kind"),
    [*(("create", kind) for kind in LOST if kind != "broken"), *(("confirm", kind) for kind in LOST)],
)
async def test_lost_answer_charges_at_most_once(
    stage: Stage, stripe: StripeFake, paying: Paying, operation: str, kind: str
) -> None:
    """No money stays charged without a confirmed order."""
    saga = await start_saga(stage.pool, **VISA)
    stripe.fail(kind, operation)
    await stage.drive(paying(0.3 if kind.startswith("timeout") else AMPLE_SECONDS))
    await balances(stage, stripe, saga, "confirmed", 1)


async def test_replayed_failure_ends_at_the_deadline(stage: Stage, stripe: StripeFake, paying: Paying) -> None:
    """Stripe repeats a failure for a day; the order is rejected and nothing is charged."""
    saga = await start_saga(stage.pool, **VISA)
    stripe.fail("broken", "create")
    for _ in range(3):
        await stage.let_time_pass()
        await paying().run_once()
    assert await stage.outcome(saga) == "pending"
    await stage.let_the_deadline_pass()
    await stage.drive(paying())
    assert await stage.outcome(saga) == "rejected: timed-out"
    assert (stripe.charged(saga), await stage.standing(saga)) == ([], UNDONE)


@pytest.mark.parametrize("kind", LOST)
@pytest.mark.parametrize(
    ("reason", "operation"),
    [("hold-expired", "look"), ("hold-expired", "refund"), *(("timed-out", each) for each in ("create", "refund"))],
)
async def test_rejected_only_after_a_certain_refund(
    stage: Stage, stripe: StripeFake, paying: Paying, reason: str, operation: str, kind: str
) -> None:
    """With hold-expired the charge was retried and its answer recorded; with timed-out no answer was recorded."""
    saga = await start_saga(stage.pool, **VISA)
    await set_faults(stage.http, {"target": "inventory.commit", "kind": "refuse"})
    await paying(checkpoint=dies_at("saga.charge_payment.do.answered")).run_once()
    if reason == "timed-out":
        await stage.let_the_deadline_pass()
    await stage.let_time_pass()
    await paying(checkpoint=dies_at("saga.charge_payment.undo.attempted")).run_once()
    stripe.fail(kind, operation, times=4)
    for _ in range(4):
        await stage.let_time_pass()
        await paying(0.3 if kind.startswith("timeout") else AMPLE_SECONDS).run_once()
        assert stripe.kept(saga) == 0 or await stage.outcome(saga) == f"compensating: {reason}"
    assert stripe.faults.pop().times < 4
    await stage.drive(paying())
    await balances(stage, stripe, saga, f"rejected: {reason}", 1)


@pytest.mark.parametrize("operation", ["create", "confirm"])
async def test_charge_after_the_rejection_takes_no_money(
    stage: Stage, stripe: StripeFake, paying: Paying, operation: str
) -> None:
    saga = await start_saga(stage.pool, **VISA)
    stripe.fail("late", operation)
    async with running(paying()) as frozen:
        await wait_until(stripe.waiting.is_set, AMPLE_SECONDS, "the charge on its way")
        await stage.let_the_deadline_pass()
        await stage.drive(paying())
        assert await stage.outcome(saga) == "rejected: timed-out"
        stripe.gate.set()
        await wait_until(lambda: "confirm" in stripe.asked(), AMPLE_SECONDS, "the late charge")
        assert not frozen.done()
    await balances(stage, stripe, saga, "rejected: timed-out", 0)


async def test_unrecorded_charge_is_refunded_days_later(stage: Stage, stripe: StripeFake, paying: Paying) -> None:
    saga = await start_saga(stage.pool, **VISA)
    await paying(checkpoint=dies_at("saga.charge_payment.do.answered")).run_once()
    assert stripe.kept(saga) == 2997
    await stage.pool.execute("UPDATE sagas SET started_at = started_at - interval '3 days'")
    await stage.let_the_deadline_pass()
    stripe.forget_keys()
    stripe.index()
    await stage.drive(paying())
    await balances(stage, stripe, saga, "rejected: timed-out", 1)


async def test_many_orders_with_random_failures_balance(stage: Stage, stripe: StripeFake, paying: Paying) -> None:
    methods = ("pm_card_visa", "pm_card_visa_chargeDeclined")
    sagas = [await start_saga(stage.pool, payment_method=methods[number % 3 == 0]) for number in range(12)]
    stripe.fail("reset_after", "create", "confirm", "look", "cancel", times=5)
    runners = [paying(), paying()]
    for _ in range(20):
        await stage.let_time_pass()
        await asyncio.gather(*(runner.run_once() for runner in runners))
    for number, saga in enumerate(sagas):
        declined = number % 3 == 0
        await balances(stage, stripe, saga, "rejected: card-declined" if declined else "confirmed", int(not declined))
    assert sum(amount for _, _, amount in stripe.ledger) == 8 * 2997
