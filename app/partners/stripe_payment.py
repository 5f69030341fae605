"""Payment through Stripe (https://docs.stripe.com/api). Any answer may be lost, and a charge can be undone at any time.

    charge:  create an intent with the saga's key (moves no money)  →  confirm the intent by its id (charges the card)
    refund:  use the recorded intent, or find it  →  cancel it, or refund what it charged

Only a confirmed intent moves money. Each saga confirms at most one intent. Stripe charges an intent at most once, and
never charges a cancelled one; so a cancelled intent blocks a charge that arrives after its undo.

A charge whose answer was recorded is undone by the id of its intent, at any age. If the account does not know the id,
or it is not the id of an intent, the money is at an account or provider other than the configured one. Then nothing is
undone, and an operator must act.

A charge whose answer was never recorded has to be found. The undo creates the intent again with the same key, which
returns the same intent. If there was none, the undo has made one, and a create request that arrives late gets this
cancelled intent. Stripe keeps a key for at least 24 hours. The undo of an older saga searches for the saga's id
instead. The search index may be an hour behind, so charging stops hours before undos switch to the search. Neither way
can detect that another account was used: change the account only while no saga is unfinished.

The rest of an undo needs no key and may take days: the state of the intent says what is left to do.
"""

import asyncio
import re
from collections.abc import Coroutine, Mapping
from datetime import UTC, datetime, timedelta
from http import HTTPStatus
from typing import Any
from urllib.parse import urlencode
from uuid import UUID

import structlog

from app.partners.client import Answer, PartnerClient, is_text
from app.partners.ports import ChargeRequest, Done, NotSent, Outcome, PartnerHealth, Refused, Unknown
from app.partners.stripe_amounts import is_known, stripe_amount

log = structlog.get_logger(__name__)

API_URL = "https://api.stripe.com"
API_VERSION = "2025-03-31.basil"  # pinned, because an account's default version changes the format of answers

CHARGED_WITHIN = timedelta(hours=12)  # after the saga's start; later attempts are not sent
FOUND_BY_KEY_WITHIN = timedelta(hours=23)  # one hour of margin for differences between clocks

DECLINED = Refused("card-declined")
INTENTS = "/v1/payment_intents"
INTENT_ID = re.compile(r"pi_[A-Za-z0-9_]{1,190}")  # it becomes part of URLs

# The order's amount can never be charged; retrying cannot change that.
IMPOSSIBLE = frozenset({"amount_too_small", "amount_too_large"})
# Wrong credentials, address or fields. An intent in another state than expected is not our fault.
OUR_FAULT = frozenset({HTTPStatus.BAD_REQUEST, HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN, HTTPStatus.NOT_FOUND})
UNEXPECTED_STATE = "payment_intent_unexpected_state"
UNDECIDED_REFUNDS = frozenset({"pending", "requires_action"})

Reply = Answer | NotSent | Unknown


class StripePayment:
    """The `Payment` port over Stripe. A call may take several requests, and ends within `timeout_seconds`."""

    def __init__(self, client: PartnerClient, api_key: str, timeout_seconds: float) -> None:
        self._client = client
        self._headers = {"Authorization": f"Bearer {api_key}", "Stripe-Version": API_VERSION}
        self._timeout_seconds = timeout_seconds

    async def charge(self, charge: ChargeRequest) -> Outcome:
        """Charge the amount to a card, without authentication by the customer."""
        return await self._within_timeout(self._charge(charge))

    async def refund(self, charge: ChargeRequest) -> Outcome:
        """Refund what was charged. It is done only when the refund has succeeded: a pending refund may still fail."""
        return await self._within_timeout(self._undo(charge))

    async def state_of(self, charge: ChargeRequest) -> str | Unknown | None:
        """Return `charged`, `declined` or `refunded`, None if Stripe has no intent of the saga. Changes nothing.

        A charge without a recorded id is searched for, and the search index may be an hour behind. Unknown also if the
        amount of the intent is not the order's, or only a part of it was refunded.
        """
        try:
            async with asyncio.timeout(self._timeout_seconds):
                return await self._find_state(charge)
        except TimeoutError:
            return Unknown(f"no answer within {self._timeout_seconds:g} s")

    async def _find_state(self, charge: ChargeRequest) -> str | Unknown | None:
        found = [charge.payment_id] if charge.payment_id else await self._find_by_search(charge)
        if not isinstance(found, list):
            return Unknown(found.detail)
        states = [await self._read_state(intent, charge) for intent in found]
        if states.count("charged") > 1:
            return "charged twice"
        return next((state for state in states if state not in ("declined", "refunded")), states[0] if states else None)

    async def _read_state(self, intent: str, charge: ChargeRequest) -> str | Unknown:
        if not INTENT_ID.fullmatch(intent):
            return Unknown("charged by another provider")
        answer = await self._get(f"{INTENTS}/{intent}")
        if not isinstance(answer, Answer) or answer.status != HTTPStatus.OK:
            return _make_unknown(answer) if isinstance(answer, Answer) else Unknown(answer.detail)
        if _read_status(answer) != "succeeded":
            return "declined"  # or cancelled: no money moved
        refunds = await self._get(f"/v1/refunds?{urlencode({'payment_intent': intent, 'limit': 10})}")
        listed = _read_list(refunds) if isinstance(refunds, Answer) else None
        if listed is None:
            return _make_unknown(refunds) if isinstance(refunds, Answer) else Unknown(refunds.detail)
        live = {_as_text(_as_object(refund).get("status")) for refund in listed}
        if "succeeded" in live:
            return "refunded"
        expected = stripe_amount(charge.amount_minor, charge.currency)
        return "charged" if _as_object(answer.body).get("amount") == expected else "charged another amount"

    async def _within_timeout(self, call: Coroutine[Any, Any, Outcome]) -> Outcome:
        try:
            async with asyncio.timeout(self._timeout_seconds):
                return await call
        except TimeoutError:
            return Unknown(f"no answer within {self._timeout_seconds:g} s")

    async def _charge(self, charge: ChargeRequest) -> Outcome:
        if not is_known(charge.currency):
            return _decline(charge, "Stripe's number of decimals is not known for this currency")
        if (fields := _build_fields(charge)) is None:
            return _decline(charge, "Stripe cannot charge this amount exactly")
        if charge.payment_method is None:
            return _decline(charge, "the order names no payment method")
        answer = await self._create(charge, fields)
        if isinstance(answer, Answer) and (intent := _read_created(answer)):
            # Check the age only now: a process that was frozen for a day may have got another intent than before.
            if _age(charge) > CHARGED_WITHIN:
                return NotSent("too late to be charged: Stripe may have forgotten the key")
            return await self._confirm(charge.saga_id, intent, charge.payment_method)
        return _interpret(answer) if isinstance(answer, Answer) else answer

    async def _create(self, charge: ChargeRequest, fields: Mapping[str, str]) -> Reply:
        return await self._post(INTENTS, fields, f"{charge.saga_id}:charge_payment")

    async def _confirm(self, saga_id: UUID, intent: str, payment_method: str) -> Outcome:
        """Confirm the intent, which charges the card. If the answer is unclear, read the state of the intent.

        Stripe repeats its first answer to a key, even a failure, until the key expires.
        """
        fields = {"payment_method": payment_method, "error_on_requires_action": "true"}
        answer = await self._post(f"{INTENTS}/{intent}/confirm", fields, f"{saga_id}:charge_payment:confirm")
        if not isinstance(answer, Answer):
            return answer
        outcome = _interpret(answer)
        unclear = answer.status == HTTPStatus.OK or answer.status >= HTTPStatus.INTERNAL_SERVER_ERROR
        if isinstance(outcome, Unknown) and (unclear or _read_code(answer) == UNEXPECTED_STATE):
            seen = await self._get(f"{INTENTS}/{intent}")
            if isinstance(seen, Answer) and isinstance(clear := _interpret(seen), Done | Refused):
                return clear
        return outcome

    async def _undo(self, charge: ChargeRequest) -> Outcome:
        if charge.payment_id is None:
            return await self._undo_unrecorded(charge)
        if INTENT_ID.fullmatch(charge.payment_id):
            return await self._settle(charge.payment_id)
        return Unknown("charged by another provider", our_fault=True, health=PartnerHealth.WORKING)

    async def _undo_unrecorded(self, charge: ChargeRequest) -> Outcome:
        """Undo a charge whose answer was never recorded, so that it may or may not have happened."""
        fields = _build_fields(charge)
        if fields is None:
            return Done()  # nothing was ever sent
        by_key = _age(charge) < FOUND_BY_KEY_WITHIN
        intents = await (self._find_by_key(charge, fields) if by_key else self._find_by_search(charge))
        if not isinstance(intents, list):
            return intents
        for intent in intents:
            outcome = await self._settle(intent)
            if not isinstance(outcome, Done):
                return outcome
        return Done()

    async def _find_by_key(self, charge: ChargeRequest, fields: Mapping[str, str]) -> list[str] | NotSent | Unknown:
        answer = await self._create(charge, fields)
        if not isinstance(answer, Answer):
            return answer
        if intent := _read_created(answer):
            return [intent]
        return [] if _proves_no_intent(answer) else _make_unknown(answer)

    async def _find_by_search(self, charge: ChargeRequest) -> list[str] | NotSent | Unknown:
        query = urlencode({"query": f"metadata['saga_id']:'{charge.saga_id}'", "limit": 10})  # there is at most one
        answer = await self._get(f"{INTENTS}/search?{query}")
        if not isinstance(answer, Answer):
            return answer
        found = _read_list(answer)
        intents = [intent for item in found or () if (intent := _read_id(item))]
        return intents if found is not None and len(intents) == len(found) else _make_unknown(answer)

    async def _settle(self, intent: str) -> Outcome:
        """Cancel the intent, or refund it if it was charged: a charged intent cannot be cancelled."""
        answer = await self._get(f"{INTENTS}/{intent}")
        status = _read_status(answer) if isinstance(answer, Answer) else None
        if status == "succeeded":
            return await self._refund_intent(intent)
        if status not in (None, "canceled"):
            answer = await self._post(f"{INTENTS}/{intent}/cancel", {})
        if not isinstance(answer, Answer):
            return answer
        return Done() if _read_status(answer) == "canceled" else _make_unknown(answer)

    async def _refund_intent(self, intent: str) -> Outcome:
        """Refund the whole charge. Stripe never refunds more than it charged, so this needs no key."""
        answer = await self._post("/v1/refunds", {"payment_intent": intent})
        if isinstance(answer, Answer) and _read_code(answer) == "charge_already_refunded":
            answer = await self._get(f"/v1/refunds?{urlencode({'payment_intent': intent, 'limit': 10})}")
        if not isinstance(answer, Answer):
            return answer
        refunds = [answer.body] if (listed := _read_list(answer)) is None else listed
        states = {_as_text(_as_object(refund).get("status")) for refund in refunds}
        if states & UNDECIDED_REFUNDS:
            return Unknown("the refund is pending", health=PartnerHealth.WORKING)
        return Done() if answer.status == HTTPStatus.OK and "succeeded" in states else _make_unknown(answer)

    async def _post(self, path: str, fields: Mapping[str, str], key: str | None = None) -> Reply:
        headers = self._headers if key is None else {**self._headers, "Idempotency-Key": key}
        return await self._client.attempt("POST", path, headers, form=fields)

    async def _get(self, path: str) -> Reply:
        return await self._client.attempt("GET", path, self._headers)


def _decline(charge: ChargeRequest, reason: str) -> Refused:
    """Decline without calling Stripe, and log the reason."""
    log.warning("stripe.not_charged", saga_id=str(charge.saga_id), currency=charge.currency, reason=reason)
    return DECLINED


def _build_fields(charge: ChargeRequest) -> Mapping[str, str] | None:
    """Return the fields of an intent; None for an amount that Stripe cannot charge.

    They must be the same for every attempt, in every release: Stripe rejects a key that is repeated with other fields.
    """
    amount = stripe_amount(charge.amount_minor, charge.currency)
    if amount is None:
        return None
    return {
        "amount": str(amount),
        "currency": charge.currency.lower(),
        "payment_method_types[]": "card",  # other methods take days to succeed, or redirect the customer
        "metadata[saga_id]": str(charge.saga_id),
    }


def _age(charge: ChargeRequest) -> timedelta:
    return datetime.now(UTC) - charge.started_at


def _interpret(answer: Answer) -> Outcome:
    """Return the outcome of a charge. An intent that waits for the customer is declined: no customer is present."""
    error, intent = _read_error(answer), _read_id(answer.body)
    match answer.status, _read_status(answer):
        case HTTPStatus.OK, "succeeded" if intent:
            return Done({"payment_id": intent})
        case HTTPStatus.OK, "requires_action":
            return DECLINED
        case HTTPStatus.OK, "requires_payment_method" if _as_object(answer.body).get("last_payment_error"):
            return DECLINED
        case HTTPStatus.PAYMENT_REQUIRED, _ if error.get("type") == "card_error":
            return DECLINED
        case HTTPStatus.BAD_REQUEST, _ if error.get("param") == "payment_method" or _read_code(answer) in IMPOSSIBLE:
            return DECLINED
    return _make_unknown(answer)


def _make_unknown(answer: Answer) -> Unknown:
    stated = _read_code(answer) or _as_text(_read_error(answer).get("type")) or _read_status(answer)
    reason = stated or ("unreadable answer" if answer.body is None else "unexpected answer")
    our_fault = answer.status in OUR_FAULT and reason != UNEXPECTED_STATE
    health = PartnerHealth.WORKING if answer.status == HTTPStatus.OK and stated else answer.health
    return Unknown(f"{answer.status} {reason}", answer.retry_after_seconds, our_fault, health)


def _read_created(answer: Answer) -> str | None:
    return _read_id(answer.body) if answer.status == HTTPStatus.OK else None


def _proves_no_intent(answer: Answer) -> bool:
    """Return whether the answer proves that Stripe never returned an intent for this key, so none can be confirmed.

    If Stripe replays a failure, every request with this key got that failure. If it rejects the amount or the currency,
    it checked them, which it does not do for a key that already has an intent.
    """
    replayed = answer.headers.get("idempotent-replayed") == "true" and answer.status >= HTTPStatus.BAD_REQUEST
    rejected = answer.status == HTTPStatus.BAD_REQUEST and _read_error(answer).get("param") in ("amount", "currency")
    return replayed or rejected


def _read_status(answer: Answer) -> str | None:
    """Return the state of the intent or the refund in the answer."""
    return _as_text(_as_object(answer.body).get("status")) if answer.status == HTTPStatus.OK else None


def _read_error(answer: Answer) -> Mapping[str, Any]:
    return _as_object(_as_object(answer.body).get("error"))


def _read_code(answer: Answer) -> str | None:
    return _as_text(_read_error(answer).get("code"))


def _read_list(answer: Answer) -> list[Any] | None:
    data = _as_object(answer.body).get("data") if answer.status == HTTPStatus.OK else None
    return data if isinstance(data, list) else None


def _read_id(value: Any) -> str | None:
    found = _as_object(value).get("id")
    return found if isinstance(found, str) and INTENT_ID.fullmatch(found) else None


def _as_object(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _as_text(value: Any) -> str | None:
    return value if is_text(value) else None
