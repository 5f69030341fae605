"""Payment over Stripe's API (https://docs.stripe.com/api), safe to lose any answer of, and to undo at any instant.

    charge:  create an intent (moves no money; the saga's key)  →  confirm it, by its id (charges it)
    refund:  take the intent on record, or find it  →  cancel it, or give back what it charged

Money moves through a confirmed intent alone. A saga has one intent that anybody ever confirms, Stripe charges an intent
at most once, and a cancelled one never: that is the tombstone for a charge that arrives after its undo.

A charge whose answer is on record is undone by its intent's id, however old it is. An id that the account does not
know, or that is no intent's, says that the money is elsewhere: with another account or provider than the configured
one. Nothing is undone then, and a person must look.

A charge whose answer was never recorded has to be found. The undo creates its intent again: the same key, the same
intent. If there was none there is one now, and a create that comes late gets this one, cancelled. Stripe keeps a key
for at least 24 hours. The undo of an older saga searches for its id instead; search may be an hour behind, so no saga
is charged for hours before undoing changes over to it. Neither can tell that another account was asked: accounts are
changed only when no saga is unfinished.

The rest of an undo needs no key, and may go on for days: the intent's state says what is left to do.
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
API_VERSION = "2025-03-31.basil"  # pinned: an account's own default changes what answers look like

CHARGED_WITHIN = timedelta(hours=12)  # of the saga's start; later attempts are not sent
FOUND_BY_KEY_WITHIN = timedelta(hours=23)  # an hour's margin for clocks that differ

DECLINED = Refused("card-declined")
INTENTS = "/v1/payment_intents"
INTENT_ID = re.compile(r"pi_[A-Za-z0-9_]{1,190}")  # it goes into addresses

# What can never be charged, whoever asks how often: the order's amount.
IMPOSSIBLE = frozenset({"amount_too_small", "amount_too_large"})
# Wrong credentials, address or fields; but an intent in another state than expected is nobody's fault.
OUR_FAULT = frozenset({HTTPStatus.BAD_REQUEST, HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN, HTTPStatus.NOT_FOUND})
UNEXPECTED_STATE = "payment_intent_unexpected_state"
UNDECIDED_REFUNDS = frozenset({"pending", "requires_action"})

Reply = Answer | NotSent | Unknown


class StripePayment:
    """The `Payment` of the ports. One call, however many requests it takes, ends within `timeout_seconds`."""

    def __init__(self, client: PartnerClient, api_key: str, timeout_seconds: float) -> None:
        self._client = client
        self._headers = {"Authorization": f"Bearer {api_key}", "Stripe-Version": API_VERSION}
        self._timeout_seconds = timeout_seconds

    async def charge(self, charge: ChargeRequest) -> Outcome:
        """Charge the amount to a card, with nobody there to authenticate."""
        return await self._in_time(self._charge(charge))

    async def refund(self, charge: ChargeRequest) -> Outcome:
        """Give back whatever was charged. Done only when the refund has succeeded: a pending one may still fail."""
        return await self._in_time(self._undo(charge))

    async def _in_time(self, call: Coroutine[Any, Any, Outcome]) -> Outcome:
        try:
            async with asyncio.timeout(self._timeout_seconds):
                return await call
        except TimeoutError:
            return Unknown(f"no answer within {self._timeout_seconds:g} s")

    async def _charge(self, charge: ChargeRequest) -> Outcome:
        if not is_known(charge.currency):
            return _decline(charge, "Stripe's number of decimals is not known for this currency")
        if (fields := _fields(charge)) is None:
            return _decline(charge, "Stripe cannot charge this amount exactly")
        if charge.payment_method is None:
            return _decline(charge, "the order names no payment method")
        answer = await self._create(charge, fields)
        if isinstance(answer, Answer) and (intent := _created(answer)):
            # Asked only now: a process that was frozen for a day may just have been given another intent than before.
            if _age(charge) > CHARGED_WITHIN:
                return NotSent("too late to be charged: Stripe may have forgotten the key")
            return await self._confirm(charge.saga_id, intent, charge.payment_method)
        return _judged(answer) if isinstance(answer, Answer) else answer

    async def _create(self, charge: ChargeRequest, fields: Mapping[str, str]) -> Reply:
        return await self._post(INTENTS, fields, f"{charge.saga_id}:charge_payment")

    async def _confirm(self, saga_id: UUID, intent: str, payment_method: str) -> Outcome:
        """Charge the intent; where the answer does not say what came of it, the intent may.

        Stripe answers a key with its first answer, a failure too, for as long as the key lives.
        """
        fields = {"payment_method": payment_method, "error_on_requires_action": "true"}
        answer = await self._post(f"{INTENTS}/{intent}/confirm", fields, f"{saga_id}:charge_payment:confirm")
        if not isinstance(answer, Answer):
            return answer
        outcome = _judged(answer)
        unclear = answer.status == HTTPStatus.OK or answer.status >= HTTPStatus.INTERNAL_SERVER_ERROR
        if isinstance(outcome, Unknown) and (unclear or _code(answer) == UNEXPECTED_STATE):
            seen = await self._get(f"{INTENTS}/{intent}")
            if isinstance(seen, Answer) and isinstance(clear := _judged(seen), Done | Refused):
                return clear
        return outcome

    async def _undo(self, charge: ChargeRequest) -> Outcome:
        if charge.payment_id is None:
            return await self._undo_unheard(charge)
        if INTENT_ID.fullmatch(charge.payment_id):
            return await self._settle(charge.payment_id)
        return Unknown("charged by another provider", our_fault=True, health=PartnerHealth.WORKING)

    async def _undo_unheard(self, charge: ChargeRequest) -> Outcome:
        """Undo a charge of which nobody knows whether it happened."""
        fields = _fields(charge)
        if fields is None:
            return Done()  # nothing was ever sent of it
        by_key = _age(charge) < FOUND_BY_KEY_WITHIN
        intents = await (self._found_by_key(charge, fields) if by_key else self._found_by_search(charge))
        if not isinstance(intents, list):
            return intents
        for intent in intents:
            outcome = await self._settle(intent)
            if not isinstance(outcome, Done):
                return outcome
        return Done()

    async def _found_by_key(self, charge: ChargeRequest, fields: Mapping[str, str]) -> list[str] | NotSent | Unknown:
        answer = await self._create(charge, fields)
        if not isinstance(answer, Answer):
            return answer
        if intent := _created(answer):
            return [intent]
        return [] if _says_none_was_created(answer) else _unknown(answer)

    async def _found_by_search(self, charge: ChargeRequest) -> list[str] | NotSent | Unknown:
        query = urlencode({"query": f"metadata['saga_id']:'{charge.saga_id}'", "limit": 10})  # there is one at most
        answer = await self._get(f"{INTENTS}/search?{query}")
        if not isinstance(answer, Answer):
            return answer
        found = _list(answer)
        intents = [intent for each in found or () if (intent := _id(each))]
        return intents if found is not None and len(intents) == len(found) else _unknown(answer)

    async def _settle(self, intent: str) -> Outcome:
        """Leave nothing that could be charged, and no money. Only what has not been charged can be cancelled."""
        answer = await self._get(f"{INTENTS}/{intent}")
        status = _status(answer) if isinstance(answer, Answer) else None
        if status == "succeeded":
            return await self._give_back(intent)
        if status not in (None, "canceled"):
            answer = await self._post(f"{INTENTS}/{intent}/cancel", {})
        if not isinstance(answer, Answer):
            return answer
        return Done() if _status(answer) == "canceled" else _unknown(answer)

    async def _give_back(self, intent: str) -> Outcome:
        """Refund all of it. Stripe gives back no more than it took, so this needs no key either."""
        answer = await self._post("/v1/refunds", {"payment_intent": intent})
        if isinstance(answer, Answer) and _code(answer) == "charge_already_refunded":
            answer = await self._get(f"/v1/refunds?{urlencode({'payment_intent': intent, 'limit': 10})}")
        if not isinstance(answer, Answer):
            return answer
        refunds = [answer.body] if (listed := _list(answer)) is None else listed
        states = {_text(_object(refund).get("status")) for refund in refunds}
        if states & UNDECIDED_REFUNDS:
            return Unknown("the refund is pending", health=PartnerHealth.WORKING)
        return Done() if answer.status == HTTPStatus.OK and "succeeded" in states else _unknown(answer)

    async def _post(self, path: str, fields: Mapping[str, str], key: str | None = None) -> Reply:
        headers = self._headers if key is None else {**self._headers, "Idempotency-Key": key}
        return await self._client.attempt("POST", path, headers, form=fields)

    async def _get(self, path: str) -> Reply:
        return await self._client.attempt("GET", path, self._headers)


def _decline(charge: ChargeRequest, reason: str) -> Refused:
    """Decline without asking Stripe, and log why."""
    log.warning("stripe.not_charged", saga_id=str(charge.saga_id), currency=charge.currency, reason=reason)
    return DECLINED


def _fields(charge: ChargeRequest) -> Mapping[str, str] | None:
    """What an intent is made of; None for an amount that Stripe cannot charge.

    The same for every attempt, whatever the release: Stripe refuses a key that comes again with other fields.
    """
    amount = stripe_amount(charge.amount_minor, charge.currency)
    if amount is None:
        return None
    return {
        "amount": str(amount),
        "currency": charge.currency.lower(),
        "payment_method_types[]": "card",  # others take days to succeed, or send the customer elsewhere
        "metadata[saga_id]": str(charge.saga_id),
    }


def _age(charge: ChargeRequest) -> timedelta:
    return datetime.now(UTC) - charge.started_at


def _judged(answer: Answer) -> Outcome:
    """Say what an answer to a charge means. An intent that waits for the customer is declined: nobody is there."""
    error, intent = _error(answer), _id(answer.body)
    match answer.status, _status(answer):
        case HTTPStatus.OK, "succeeded" if intent:
            return Done({"payment_id": intent})
        case HTTPStatus.OK, "requires_action":
            return DECLINED
        case HTTPStatus.OK, "requires_payment_method" if _object(answer.body).get("last_payment_error"):
            return DECLINED
        case HTTPStatus.PAYMENT_REQUIRED, _ if error.get("type") == "card_error":
            return DECLINED
        case HTTPStatus.BAD_REQUEST, _ if error.get("param") == "payment_method" or _code(answer) in IMPOSSIBLE:
            return DECLINED
    return _unknown(answer)


def _unknown(answer: Answer) -> Unknown:
    said = _code(answer) or _text(_error(answer).get("type")) or _status(answer)
    what = said or ("unreadable answer" if answer.body is None else "unexpected answer")
    our_fault = answer.status in OUR_FAULT and what != UNEXPECTED_STATE
    health = PartnerHealth.WORKING if answer.status == HTTPStatus.OK and said else answer.health
    return Unknown(f"{answer.status} {what}", answer.retry_after_seconds, our_fault, health)


def _created(answer: Answer) -> str | None:
    return _id(answer.body) if answer.status == HTTPStatus.OK else None


def _says_none_was_created(answer: Answer) -> bool:
    """Whether an answer to the key proves that no intent was ever given out for it, so that none can be confirmed.

    A failure that Stripe repeats for the key is what everybody was answered. An amount or a currency that it does not
    take it would not have looked at, had the key ever been answered with an intent.
    """
    repeated = answer.headers.get("Idempotent-Replayed") == "true" and answer.status >= HTTPStatus.BAD_REQUEST
    not_taken = answer.status == HTTPStatus.BAD_REQUEST and _error(answer).get("param") in ("amount", "currency")
    return repeated or not_taken


def _status(answer: Answer) -> str | None:
    """Return the state of the intent or the refund that was answered."""
    return _text(_object(answer.body).get("status")) if answer.status == HTTPStatus.OK else None


def _error(answer: Answer) -> Mapping[str, Any]:
    return _object(_object(answer.body).get("error"))


def _code(answer: Answer) -> str | None:
    return _text(_error(answer).get("code"))


def _list(answer: Answer) -> list[Any] | None:
    data = _object(answer.body).get("data") if answer.status == HTTPStatus.OK else None
    return data if isinstance(data, list) else None


def _id(value: Any) -> str | None:
    found = _object(value).get("id")
    return found if isinstance(found, str) and INTENT_ID.fullmatch(found) else None


def _object(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _text(value: Any) -> str | None:
    return value if is_text(value) else None
