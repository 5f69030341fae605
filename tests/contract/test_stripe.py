"""The payment port over Stripe charges once and undoes permanently, whatever is lost, late or forgotten."""

import asyncio
from collections.abc import Callable
from dataclasses import replace
from uuid import UUID, uuid4

import pytest

from app.partners.circuit import is_failure
from app.partners.client import PartnerClient
from app.partners.http import HttpClient
from app.partners.ports import ChargeRequest, Done, NotSent, Refused, Unknown
from app.partners.stripe_payment import API_VERSION, StripePayment
from tests.contract.conftest import met_a_fault
from tests.harness import stripe_fake
from tests.harness.sandboxes import charge_of
from tests.harness.stripe_fake import API_KEY, AUTHENTICATION, DECLINES, PROCESSING, REDIRECT, SINGLE_USE, StripeFake
from tests.harness.wait import AMPLE_SECONDS, wait_until

DECLINED = Refused("card-declined")
LOST = ("error", "busy", "timeout_before", "timeout_after", "reset_before", "reset_after", "garbage")
DAY_AND_MORE = 30.0
Client = Callable[..., StripePayment]


@pytest.fixture
def client(partner_http: HttpClient, stripe: StripeFake) -> Client:
    def client(timeout_seconds: float = AMPLE_SECONDS) -> StripePayment:
        return stripe_fake.client_of(partner_http, stripe.url, timeout_seconds)

    return client


@pytest.fixture
def payment(client: Client) -> StripePayment:
    return client()


@pytest.fixture
def charge(saga: UUID) -> ChargeRequest:
    return charge_of(saga, 2997, "USD", "pm_card_visa")


def aged(charge: ChargeRequest, hours: float) -> ChargeRequest:
    """Return the same charge for a saga that started so many hours ago."""
    return charge_of(charge.saga_id, charge.amount_minor, charge.currency, charge.payment_method, hours)


def patience(kind: str) -> float:
    return 0.3 if kind.startswith("timeout") else AMPLE_SECONDS


async def test_charge_creates_and_confirms_an_intent(
    payment: StripePayment, stripe: StripeFake, charge: ChargeRequest
) -> None:
    """The intent is created with the saga's key."""
    assert await payment.charge(charge) == Done({"payment_id": "pi_fake0"})
    assert stripe.ledger == [(str(charge.saga_id), "charge", 2997)]
    [(_, fields, headers), (_, confirmed, confirming)] = stripe.requests
    # Never change these: a running saga's key rejects other fields.
    assert fields == {
        "amount": "2997",
        "currency": "usd",
        "payment_method_types[]": "card",
        "metadata[saga_id]": str(charge.saga_id),
    }
    assert confirmed == {"payment_method": "pm_card_visa", "error_on_requires_action": "true"}
    assert headers["Idempotency-Key"] == f"{charge.saga_id}:charge_payment"
    assert confirming["Idempotency-Key"] == f"{charge.saga_id}:charge_payment:confirm"
    assert (headers["Stripe-Version"], headers["Content-Type"]) == (API_VERSION, "application/x-www-form-urlencoded")


async def test_repeated_charge_is_the_same_charge(
    payment: StripePayment, stripe: StripeFake, charge: ChargeRequest
) -> None:
    first = await payment.charge(charge)
    assert [await payment.charge(charge) for _ in range(2)] == [first, first]
    assert stripe.charged(charge.saga_id) == [2997]


async def test_concurrent_charges_of_a_saga_charge_once(
    payment: StripePayment, stripe: StripeFake, charge: ChargeRequest
) -> None:
    stripe.fail("slow", "create")
    first = asyncio.create_task(payment.charge(charge))
    await wait_until(stripe.waiting.is_set, AMPLE_SECONDS, "the first charge")
    assert await payment.charge(charge) == Unknown("409 idempotency_key_in_use")
    stripe.gate.set()
    assert isinstance(await first, Done)
    assert stripe.charged(charge.saga_id) == [2997]


@pytest.mark.parametrize("method", [*DECLINES, AUTHENTICATION, REDIRECT, "not-a-method", f"{SINGLE_USE}used"])
async def test_declined_card_is_refused(payment: StripePayment, stripe: StripeFake, saga: UUID, method: str) -> None:
    """The undo of a declined charge leaves nothing that could be charged."""
    await payment.charge(charge_of(uuid4(), 500, "USD", f"{SINGLE_USE}used"))
    charge = charge_of(saga, 2997, "USD", method)
    assert [await payment.charge(charge) for _ in range(2)] == [DECLINED, DECLINED]
    assert await payment.refund(charge) == Done()
    assert (stripe.charged(saga), stripe.states(saga)) == ([], ["canceled"])


@pytest.mark.parametrize(
    ("amount_minor", "currency", "method"),
    [(49, "USD", "pm_card_visa"), (10**12, "USD", "pm_card_visa"), (5124, "KWD", "pm_card_visa"), (500, "USD", None)],
)
async def test_impossible_charge_is_refused(
    payment: StripePayment, stripe: StripeFake, saga: UUID, amount_minor: int, currency: str, method: str | None
) -> None:
    """The undo of an impossible charge is done at once."""
    charge = charge_of(saga, amount_minor, currency, method)
    assert await payment.charge(charge) == DECLINED
    assert await payment.refund(charge) == Done()
    assert (stripe.charged(saga), stripe.states(saga)) == ([], ["canceled"] if method is None else [])


@pytest.mark.parametrize("kind", LOST)
@pytest.mark.parametrize("operation", ["create", "confirm"])
async def test_unclear_answer_to_a_charge_is_unknown(
    client: Client, stripe: StripeFake, charge: ChargeRequest, operation: str, kind: str
) -> None:
    """Repeating the call charges once."""
    stripe.fail(kind, operation)
    outcome = await met_a_fault(stripe, lambda: client(patience(kind)).charge(charge))
    if (operation, kind) == ("confirm", "garbage"):  # the intent can be read, and has been charged
        assert isinstance(outcome, Done)
    else:
        assert isinstance(outcome, Unknown)
        assert not outcome.our_fault
    assert isinstance(await client().charge(charge), Done)
    assert stripe.charged(charge.saga_id) == [2997]


@pytest.mark.parametrize("method", ["pm_card_visa", f"{SINGLE_USE}card", "pm_card_visa_chargeDeclined"])
@pytest.mark.parametrize("kind", ["timeout_after", "reset_after", "garbage", "broken"])
async def test_lost_decision_on_a_card_is_repeated(
    client: Client, stripe: StripeFake, saga: UUID, method: str, kind: str
) -> None:
    stripe.fail(kind, "confirm")
    charge = charge_of(saga, 2997, "USD", method)
    await met_a_fault(stripe, lambda: client(patience(kind)).charge(charge))
    expected = DECLINED if method in DECLINES else Done({"payment_id": "pi_fake0"})
    assert await client().charge(charge) == expected
    assert stripe.charged(saga) == ([] if method in DECLINES else [2997])


async def test_replayed_failure_charges_nothing(
    payment: StripePayment, stripe: StripeFake, charge: ChargeRequest
) -> None:
    """The undo of a replayed failure is done."""
    stripe.fail("broken", "create")
    for _ in range(2):
        assert await payment.charge(charge) == Unknown("500 api_error")
    assert await payment.refund(charge) == Done()
    assert stripe.charged(charge.saga_id) == []


async def test_processing_payment_is_unknown(payment: StripePayment, stripe: StripeFake, saga: UUID) -> None:
    """A payment in processing is unknown until it succeeds or fails."""
    charge = charge_of(saga, 2997, "USD", PROCESSING)
    assert await payment.charge(charge) == Unknown("200 processing")
    assert await payment.refund(charge) == Unknown("400 payment_intent_unexpected_state")
    stripe.finish()
    assert isinstance(await payment.charge(charge), Done)
    assert await payment.refund(charge) == Done()
    assert (stripe.charged(saga), stripe.kept(saga)) == ([2997], 0)


async def test_retry_after_is_passed_on(payment: StripePayment, stripe: StripeFake, charge: ChargeRequest) -> None:
    busy = Unknown("429 rate_limit", retry_after_seconds=1.0)
    for operation in ("create", "confirm"):
        stripe.fail("busy", operation)
        assert await payment.charge(charge) == busy
    for operation in ("create", "look", "cancel"):
        stripe.fail("busy", operation)
        assert await payment.refund(charge) == busy


async def test_request_rejected_by_stripe_is_our_fault(
    payment: StripePayment, stripe: StripeFake, charge: ChargeRequest
) -> None:
    await payment.charge(charge)
    another_amount, another_currency = replace(charge, amount_minor=2998), charge_of(uuid4(), 3000, "ZMW", "pm_a")
    assert await payment.charge(another_amount) == Unknown("400 idempotency_error", our_fault=True)
    assert await payment.charge(another_currency) == Unknown("400 invalid_request_error", our_fault=True)
    assert stripe.charged(charge.saga_id) == [2997]


async def test_never_accepted_charge_has_nothing_to_undo(
    payment: StripePayment, stripe: StripeFake, saga: UUID
) -> None:
    assert await payment.refund(charge_of(saga, 3000, "IQD", "pm_card_visa")) == Done()
    assert stripe.intents == {}


async def test_rejected_undo_is_not_done(payment: StripePayment, stripe: StripeFake, charge: ChargeRequest) -> None:
    await payment.charge(charge)
    stripe.is_closed = True
    assert await payment.refund(charge) == Unknown("400 invalid_request_error", our_fault=True)
    stripe.is_closed = False
    assert await payment.refund(charge) == Done()
    assert stripe.kept(charge.saga_id) == 0


async def test_wrong_api_key_is_our_fault(
    partner_http: HttpClient, payment: StripePayment, stripe: StripeFake, charge: ChargeRequest
) -> None:
    """A call with a wrong key undoes nothing."""
    wrong = StripePayment(PartnerClient(partner_http, stripe.url, AMPLE_SECONDS), "sk_test_other", AMPLE_SECONDS)
    refused = Unknown("401 invalid_request_error", our_fault=True)
    assert await payment.charge(charge) != await wrong.charge(charge) == refused
    assert await wrong.refund(charge) == refused
    assert stripe.kept(charge.saga_id) == 2997


async def test_repeated_undo_refunds_once(payment: StripePayment, stripe: StripeFake, charge: ChargeRequest) -> None:
    await payment.charge(charge)
    assert await payment.refund(charge) == await payment.refund(charge) == Done()
    await asyncio.gather(*(payment.refund(charge) for _ in range(5)))
    assert stripe.ledger == [(str(charge.saga_id), what, 2997) for what in ("charge", "refund")]


@pytest.mark.parametrize("kind", LOST)
@pytest.mark.parametrize("operation", ["create", "look", "cancel", "refund", "refunds"])
async def test_unclear_answer_to_an_undo_is_unknown(
    client: Client, stripe: StripeFake, charge: ChargeRequest, operation: str, kind: str
) -> None:
    """Repeating the undo completes it."""
    if operation != "cancel":
        await client().charge(charge)
    if operation == "refunds":
        await client().refund(charge)
    stripe.fail(kind, operation)
    outcome = await met_a_fault(stripe, lambda: client(patience(kind)).refund(charge))
    assert isinstance(outcome, Unknown)
    assert not outcome.our_fault
    assert await client().refund(charge) == Done()
    assert stripe.kept(charge.saga_id) == 0
    assert stripe.states(charge.saga_id) == ["canceled" if operation == "cancel" else "succeeded"]


@pytest.mark.parametrize("operation", ["create", "confirm"])
async def test_charge_after_its_undo_charges_nothing(
    client: Client, stripe: StripeFake, charge: ChargeRequest, operation: str
) -> None:
    stripe.fail("late", operation)
    late = asyncio.create_task(client().charge(charge))
    await wait_until(stripe.waiting.is_set, AMPLE_SECONDS, "the charge on its way")
    assert await client().refund(charge) == Done()
    stripe.gate.set()
    assert await late == Unknown("400 payment_intent_unexpected_state")
    assert (stripe.charged(charge.saga_id), stripe.states(charge.saga_id)) == ([], ["canceled"])


async def test_refund_is_done_only_after_success(
    payment: StripePayment, stripe: StripeFake, charge: ChargeRequest
) -> None:
    await payment.charge(charge)
    stripe.refund_status = "pending"
    for _ in range(2):
        assert await payment.refund(charge) == Unknown("the refund is pending")
    stripe.finish()
    assert await payment.refund(charge) == Done()
    assert (len(stripe.refunds), stripe.kept(charge.saga_id)) == (1, 0)


async def test_failed_refund_is_repeated(payment: StripePayment, stripe: StripeFake, charge: ChargeRequest) -> None:
    await payment.charge(charge)
    stripe.refund_status = "failed"
    assert await payment.refund(charge) == Unknown("200 failed")
    stripe.refund_status = "succeeded"
    assert await payment.refund(charge) == await payment.refund(charge) == Done()
    assert stripe.kept(charge.saga_id) == 0


@pytest.mark.parametrize("kind", LOST)
async def test_undo_after_the_key_expired_searches_the_saga(
    client: Client, payment: StripePayment, stripe: StripeFake, charge: ChargeRequest, kind: str
) -> None:
    await payment.charge(charge)
    await payment.charge(charge_of(uuid4(), 500, "USD", "pm_card_visa"))
    stripe.forget_keys()
    stripe.index()
    stripe.fail(kind, "search")
    old = aged(charge, DAY_AND_MORE)
    assert isinstance(await met_a_fault(stripe, lambda: client(patience(kind)).refund(old)), Unknown)
    assert await payment.refund(old) == await payment.refund(old) == Done()
    assert sum(amount if what == "charge" else -amount for _, what, amount in stripe.ledger) == 500
    assert (stripe.kept(charge.saga_id), len(stripe.intents)) == (0, 2)


async def test_old_undo_of_nothing_is_done(payment: StripePayment, stripe: StripeFake, charge: ChargeRequest) -> None:
    assert await payment.refund(aged(charge, DAY_AND_MORE)) == Done()
    assert stripe.asked() == ["search"]


@pytest.mark.parametrize("hours", [0, 1, 12, 22.9])
async def test_undo_within_a_day_does_not_search(
    payment: StripePayment, stripe: StripeFake, charge: ChargeRequest, hours: float
) -> None:
    """The search index may be behind."""
    await payment.charge(charge)
    assert await payment.refund(aged(charge, hours)) == Done()
    assert (stripe.kept(charge.saga_id), "search" in stripe.asked()) == (0, False)


@pytest.mark.parametrize("hours", [0, DAY_AND_MORE])
async def test_undo_of_a_recorded_charge_uses_its_intent(
    payment: StripePayment, stripe: StripeFake, charge: ChargeRequest, hours: float
) -> None:
    """The undo uses the recorded intent at any age, and looks up no other."""
    await payment.charge(charge)
    stripe.forget_keys()
    recorded = replace(aged(charge, hours), payment_id="pi_fake0")
    assert await payment.refund(recorded) == await payment.refund(recorded) == Done()
    assert stripe.asked() == ["create", "confirm", "look", "refund", "look", "refund", "refunds"]
    assert stripe.kept(charge.saga_id) == 0


@pytest.mark.parametrize("hours", [0, DAY_AND_MORE])
@pytest.mark.parametrize("payment_id", ["pi_elsewhere", "pay_1", "pi_/.."])
async def test_recorded_charge_unknown_to_the_account(
    payment: StripePayment, stripe: StripeFake, charge: ChargeRequest, hours: float, payment_id: str
) -> None:
    """The charge is not undone, and the outcome is our fault."""
    for each in (charge, replace(charge, amount_minor=5124, currency="KWD")):  # Stripe cannot charge the second amount
        outcome = await payment.refund(replace(aged(each, hours), payment_id=payment_id))
        assert isinstance(outcome, Unknown)
        assert (outcome.our_fault, is_failure(outcome)) == (True, False)
    assert set(stripe.asked()) <= {"look"}


async def test_process_frozen_past_the_key_charges_nothing(
    payment: StripePayment, stripe: StripeFake, charge: ChargeRequest
) -> None:
    await payment.charge(charge)
    stripe.forget_keys()
    assert isinstance(await payment.charge(aged(charge, 12.1)), NotSent)
    assert stripe.charged(charge.saga_id) == [2997]


async def test_all_requests_of_a_call_share_its_deadline(
    partner_http: HttpClient, stripe: StripeFake, charge: ChargeRequest
) -> None:
    patient = PartnerClient(partner_http, stripe.url, AMPLE_SECONDS)
    hasty = StripePayment(patient, API_KEY, 0.3)
    stripe.fail("late", "confirm", "look")
    late = Unknown("no answer within 0.3 s")
    assert [await hasty.charge(charge), await hasty.refund(charge)] == [late, late]
