"""A fake of the part of Stripe's API that the service uses, on a real port, with a ledger that judges.

Written from Stripe's documentation, not from the client: idempotency (a key's first answer, failures too, is repeated
until the key is forgotten; answers to what it cannot read are not kept), the states of a payment intent, card errors,
one full refund, a search that lags behind. What has no documentation (a late delivery, a lost answer) is a `Fault`.
"""

import asyncio
import contextlib
import itertools
import json
import re
import socket
import struct
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

from aiohttp import web

from app.partners.client import PartnerClient
from app.partners.http import HttpClient
from app.partners.stripe_payment import StripePayment
from tests.harness.wait import AMPLE_SECONDS

API_KEY = "sk_test_fake_and_secret"
CURRENCIES = frozenset({"usd", "eur", "jpy", "kwd", "isk", "ugx", "mga"})
SINGLE_USE = "pm_once_"  # a card of the customer's browser: Stripe takes it once, unless it belongs to a customer
DECLINES = {
    "pm_card_visa_chargeDeclined": ("card_declined", "generic_decline"),
    "pm_card_visa_chargeDeclinedInsufficientFunds": ("card_declined", "insufficient_funds"),
    "pm_card_chargeDeclinedExpiredCard": ("expired_card", None),
    "pm_card_chargeDeclinedProcessingError": ("processing_error", None),
}
AUTHENTICATION = "pm_card_authenticationRequired"
REDIRECT = "pm_that_redirects"  # the customer would have to do something elsewhere
PROCESSING = "pm_still_processing"  # succeeds with `finish`
CHARGEABLE = frozenset({"requires_payment_method", "requires_confirmation", "requires_action"})
NOT_DONE = frozenset({"error", "busy", "timeout_before", "reset_before"})
RESET_INSTEAD_OF_FIN = struct.pack("ii", 1, 0)  # SO_LINGER on, zero seconds

Fields = Mapping[str, str]


@dataclass
class Fault:
    """What goes wrong with an operation: create, confirm, look, cancel, refund, refunds or search.

    error, busy (500, 429; not done) · broken (done, and 500 is the key's answer) · timeout_before, timeout_after,
    reset_before, reset_after · garbage (done) · late (delivered when the gate opens) · slow (in work until it opens)
    """

    operation: str
    kind: str
    times: float = 1


class Refusal(Exception):
    """An answer other than 200."""

    def __init__(self, status: int, kind: str, code: str | None = None, **more: Any) -> None:
        super().__init__(kind, code)
        self.status = status
        self.body = {"error": {"type": kind, "message": "…", **({"code": code} if code else {}), **more}}


def invalid(code: str | None = None, **more: Any) -> Refusal:
    return Refusal(400, "invalid_request_error", code, **more)


@dataclass
class StripeFake:
    """The fake. Tests set `faults`, move time by hand, and read `ledger`."""

    url: str = ""
    faults: list[Fault] = field(default_factory=list)
    ledger: list[tuple[str, str, int]] = field(default_factory=list)  # saga, charge or refund, amount
    requests: list[tuple[str, Fields, Mapping[str, str]]] = field(default_factory=list)  # operation, fields, headers
    intents: dict[str, dict[str, Any]] = field(default_factory=dict)
    refunds: list[dict[str, Any]] = field(default_factory=list)
    refund_status: str = "succeeded"
    is_closed: bool = False  # to this account: nothing it asks for is accepted
    waiting: asyncio.Event = field(default_factory=asyncio.Event)  # something late or slow is there
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    _numbers: "itertools.count[int]" = field(default_factory=itertools.count)
    _answers: dict[str, tuple[str, int, Any]] = field(default_factory=dict)
    _running: set[str] = field(default_factory=set)
    _used: set[str] = field(default_factory=set)
    _indexed: int = 0

    def fail(self, kind: str, *operations: str, times: float = 1) -> None:
        """Let these operations fail so often, and no other."""
        self.faults = [Fault(operation, kind, times) for operation in operations]

    def forget_keys(self) -> None:
        """Let a day pass: no idempotency key is known any more."""
        self._answers.clear()

    def index(self) -> None:
        """Let search catch up with what there is."""
        self._indexed = len(self.intents)

    def finish(self) -> None:
        """Let what is being processed, payments and refunds, succeed."""
        for intent in self.intents.values():
            if intent["status"] == "processing":
                self._take_money(intent)
        for refund in self.refunds:
            if refund["status"] == "pending":
                self._return_money(refund)

    def charged(self, saga: UUID) -> list[int]:
        """Return every amount that was ever charged for a saga."""
        return [amount for of, what, amount in self.ledger if (of, what) == (str(saga), "charge")]

    def kept(self, saga: UUID) -> int:
        """Return what was charged and not given back."""
        return sum(amount if what == "charge" else -amount for of, what, amount in self.ledger if of == str(saga))

    def states(self, saga: UUID) -> list[str]:
        """Return the states of a saga's intents, oldest first."""
        return [each["status"] for each in self.intents.values() if each["metadata"]["saga_id"] == str(saga)]

    def asked(self) -> list[str]:
        """Return the operations that were asked for, in order."""
        return [operation for operation, _, _ in self.requests]

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Answer a request, or let it go wrong as a fault says."""
        operation, fields = await self._read(request)
        self.requests.append((operation, fields, dict(request.headers)))
        fault = next((each for each in self.faults if each.operation == operation and each.times > 0), None)
        kind = fault.kind if fault else ""
        if fault:
            fault.times -= 1
        if kind == "late":
            await self._at_the_gate()
        status, body, headers = 500, {"error": {"type": "api_error"}}, {}
        if kind == "busy":
            status, body, headers = (
                429,
                {"error": {"type": "invalid_request_error", "code": "rate_limit"}},
                {"Retry-After": "1"},
            )
        elif kind not in NOT_DONE:
            status, body, headers = await self._answer(request, operation, fields, kind)
        if kind.startswith("timeout"):
            await self.ended.wait()
        if kind.startswith("reset") and request.transport is not None:
            request.transport.get_extra_info("socket").setsockopt(
                socket.SOL_SOCKET, socket.SO_LINGER, RESET_INSTEAD_OF_FIN
            )
            request.transport.abort()
        text = '{"id": "' if kind == "garbage" else json.dumps(body)
        return web.Response(status=status, text=text, headers=headers, content_type="application/json")

    async def _read(self, request: web.Request) -> tuple[str, Fields]:
        fields = {str(name): str(value) for name, value in (await request.post()).items()} or dict(request.query)
        path = re.sub(r"/pi_\w+", "/ID", request.path)
        operations = {
            ("POST", "/v1/payment_intents"): "create",
            ("POST", "/v1/payment_intents/ID/confirm"): "confirm",
            ("POST", "/v1/payment_intents/ID/cancel"): "cancel",
            ("GET", "/v1/payment_intents/ID"): "look",
            ("GET", "/v1/payment_intents/search"): "search",
            ("POST", "/v1/refunds"): "refund",
            ("GET", "/v1/refunds"): "refunds",
        }
        return operations[request.method, path], fields

    async def _answer(
        self, request: web.Request, operation: str, fields: Fields, kind: str
    ) -> tuple[int, Any, dict[str, str]]:
        """Execute a request, or repeat the answer to its key."""
        if request.headers.get("Authorization") != f"Bearer {API_KEY}":
            return 401, {"error": {"type": "invalid_request_error", "code": None}}, {}
        if not re.fullmatch(r"20\d\d-\d\d-\d\d\.[a-z]+", request.headers.get("Stripe-Version", "")) or self.is_closed:
            return 400, {"error": {"type": "invalid_request_error"}}, {}
        key = request.headers.get("Idempotency-Key")
        what = json.dumps([request.path, fields], sort_keys=True)
        if key in self._answers:
            first, status, body = self._answers[key]
            if first != what:
                return 400, {"error": {"type": "idempotency_error"}}, {}
            return status, body, {"Idempotent-Replayed": "true"}
        if key in self._running:
            return 409, {"error": {"type": "idempotency_error", "code": "idempotency_key_in_use"}}, {}
        with self._in_work(key):
            if kind == "slow":
                await self._at_the_gate()
            status, body, kept = self._executed(request, operation, fields)
        if kind == "broken":
            status, body, kept = 500, {"error": {"type": "api_error"}}, True
        if key and kept:
            self._answers[key] = what, status, json.loads(json.dumps(body))
        return status, body, {}

    @contextlib.contextmanager
    def _in_work(self, key: str | None) -> Any:
        if key:
            self._running.add(key)
        try:
            yield
        finally:
            self._running.discard(key or "")

    def _executed(self, request: web.Request, operation: str, fields: Fields) -> tuple[int, Any, bool]:
        """Return status, body, and whether they are kept for the key: not where validation failed."""
        execute: Callable[[Fields], Any]
        intent = self.intents.get(request.match_info.get("id", ""), {})
        execute = {
            "create": self._create,
            "confirm": lambda fields: self._confirm(intent, fields),
            "cancel": lambda _: self._cancel(intent),
            "look": lambda _: intent,
            "search": self._search,
            "refund": self._refund,
            "refunds": self._refunds,
        }[operation]
        if operation in ("confirm", "cancel", "look") and not intent:
            return 404, invalid("resource_missing", param="intent").body, False
        try:
            return 200, execute(fields), True
        except Refusal as refusal:
            kept = refusal.status != 400 or "payment_intent" in refusal.body["error"]
            return refusal.status, refusal.body, kept

    def _create(self, fields: Fields) -> Any:
        amount, currency = int(fields["amount"]), fields["currency"]
        if currency not in CURRENCIES:
            raise invalid(param="currency")
        if currency in ("isk", "ugx") and amount % 100:
            raise invalid("invalid_charge_amount_no_decimal_compatible", param="amount")
        if currency == "kwd" and amount % 10:
            raise invalid(param="amount")
        if amount < 50:
            raise invalid("amount_too_small", param="amount")
        if amount > 99_999_999:
            raise invalid("amount_too_large", param="amount")
        assert fields["payment_method_types[]"] == "card"
        intent = {
            "id": f"pi_fake{next(self._numbers)}",
            "object": "payment_intent",
            "amount": amount,
            "currency": currency,
            "status": "requires_payment_method",
            "metadata": {"saga_id": fields["metadata[saga_id]"]},
            "last_payment_error": None,
        }
        self.intents[str(intent["id"])] = intent
        return intent

    def _confirm(self, intent: dict[str, Any], fields: Fields) -> Any:
        method = fields["payment_method"]
        if intent["status"] not in CHARGEABLE:
            raise self._unexpected_state(intent)
        if not method.startswith("pm_") or method in self._used:
            raise invalid("resource_missing" if method not in self._used else None, param="payment_method")
        if method.startswith(SINGLE_USE):
            self._used.add(method)
        if method in DECLINES or (method == AUTHENTICATION and fields.get("error_on_requires_action") == "true"):
            code, decline_code = DECLINES.get(method, ("authentication_required", None))
            intent["status"] = "requires_payment_method"
            intent["last_payment_error"] = {"code": code}
            raise Refusal(402, "card_error", code, decline_code=decline_code, payment_intent=dict(intent))
        if method in (AUTHENTICATION, REDIRECT):
            intent["status"] = "requires_action"
        elif method == PROCESSING:
            intent["status"] = "processing"
        else:
            self._take_money(intent)
        return intent

    def _cancel(self, intent: dict[str, Any]) -> Any:
        if intent["status"] not in CHARGEABLE:
            raise self._unexpected_state(intent)
        intent["status"] = "canceled"
        return intent

    def _search(self, fields: Fields) -> Any:
        match = re.fullmatch(r"metadata\['saga_id'\]:'([0-9a-f-]{36})'", fields["query"])
        assert match
        indexed = list(self.intents.values())[: self._indexed]
        data = [each for each in indexed if each["metadata"]["saga_id"] == match[1]]
        return {"object": "search_result", "has_more": False, "data": data}

    def _refund(self, fields: Fields) -> Any:
        intent = self.intents.get(fields["payment_intent"])
        if intent is None or intent["status"] != "succeeded":
            raise invalid("resource_missing" if intent is None else None, param="payment_intent")
        if self._live_refunds(intent["id"]):
            raise invalid("charge_already_refunded")
        refund = {"id": "re_fake", "object": "refund", "payment_intent": intent["id"], "status": self.refund_status}
        self.refunds.append(refund)
        if self.refund_status == "succeeded":
            self._return_money(refund)
        return refund

    def _refunds(self, fields: Fields) -> Any:
        data = [each for each in self.refunds if each["payment_intent"] == fields["payment_intent"]]
        return {"object": "list", "has_more": False, "data": data}

    def _live_refunds(self, intent_id: str) -> list[dict[str, Any]]:
        return [each for each in self.refunds if each["payment_intent"] == intent_id and each["status"] != "failed"]

    def _take_money(self, intent: dict[str, Any]) -> None:
        intent["status"] = "succeeded"
        self.ledger.append((intent["metadata"]["saga_id"], "charge", intent["amount"]))

    def _return_money(self, refund: dict[str, Any]) -> None:
        refund["status"] = "succeeded"
        intent = self.intents[refund["payment_intent"]]
        self.ledger.append((intent["metadata"]["saga_id"], "refund", intent["amount"]))

    def _unexpected_state(self, intent: dict[str, Any]) -> Refusal:
        return invalid("payment_intent_unexpected_state", payment_intent=dict(intent))

    async def _at_the_gate(self) -> None:
        self.waiting.set()
        await self.gate.wait()


def client_of(partner_http: HttpClient, url: str, timeout_seconds: float = AMPLE_SECONDS) -> StripePayment:
    """Return the service's own client for it. No deadline for connecting alone: a call past that one was not sent."""
    return StripePayment(PartnerClient(partner_http, url, AMPLE_SECONDS), API_KEY, timeout_seconds)


@contextlib.asynccontextmanager
async def stripe_fake() -> AsyncIterator[StripeFake]:
    """Serve a fake of its own."""
    fake = StripeFake()
    app = web.Application()
    app.router.add_route("*", "/v1/payment_intents/{id:pi_\\w+}", fake.handle)
    app.router.add_route("*", "/v1/payment_intents/{id:pi_\\w+}/{action}", fake.handle)
    app.router.add_route("*", "/{path:.*}", fake.handle)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        fake.url = "http://{}:{}".format(*runner.addresses[0])
        yield fake
    finally:
        fake.ended.set()
        fake.gate.set()
        await runner.cleanup()
