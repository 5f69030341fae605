"""Check every fault on every call: the client's outcome, the ledger's entries and the result of a retry."""

import asyncio
import signal
import time
from collections.abc import Callable
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest

from app.partners.ports import Done, Outcome, PartnerItem, Refused, Unknown
from tests.contract.conftest import ACTS, DO, REFUSALS, SandboxProcess, prepare
from tests.harness.sandboxes import Partners, charge_of, decisions, entries, plain_http, set_faults
from tests.harness.wait import AMPLE_SECONDS, wait_until

DONE, NOT_DONE = [("done", True)], [("error", False)]
DECIDED = {
    "refuse": [("refused", False)],
    "error": NOT_DONE,
    "unavailable": NOT_DONE,
    "slow": DONE,
    "timeout_before": NOT_DONE,
    "timeout_after": DONE,
    "reset_before": NOT_DONE,
    "reset_after": DONE,
    "garbage": DONE,
    "duplicate": [("done", True), ("replayed", False)],
}
MATRIX = [(target, kind) for target in ACTS for kind in DECIDED if kind != "refuse" or target in DO]


def is_expected(outcome: Outcome, target: str, kind: str) -> bool:
    """Return whether the client's outcome is the one that the contract defines for this fault."""
    match kind:
        case "slow" | "duplicate":
            return isinstance(outcome, Done)
        case "refuse":
            return outcome == Refused(REFUSALS[target])
        case "error":
            return outcome == Unknown("500 partner-error")
        case "unavailable":
            return outcome == Unknown("503 partner-unavailable", retry_after_seconds=1.0)
        case _:
            return isinstance(outcome, Unknown) and not outcome.our_fault


@pytest.mark.parametrize(("target", "kind"), MATRIX)
async def test_each_fault_on_each_call(
    http: httpx.AsyncClient, partners: Partners, saga: UUID, item: PartnerItem, *, target: str, kind: str
) -> None:
    """The client's outcome and the ledger match the fault, and a retry succeeds or replays the decision."""
    await prepare(partners, saga, item, target)
    await set_faults(http, {"target": target, "kind": kind, "times": 1, "delay_seconds": 0.05})
    outcome = await ACTS[target](partners, saga, item)
    assert is_expected(outcome, target, kind), outcome
    assert await decisions(http, saga, target) == DECIDED[kind]

    again = await ACTS[target](partners, saga, item)
    assert isinstance(again, Refused if kind == "refuse" else Done)
    last = ("done", True) if DECIDED[kind] == NOT_DONE else ("replayed", False)
    assert await decisions(http, saga, target) == [*DECIDED[kind], last]


@pytest.mark.parametrize("kind", ["timeout_before", "timeout_after"])
async def test_timeout_lasts_until_client_deadline(
    partners: Partners,
    partners_at: Callable[..., Partners],
    http: httpx.AsyncClient,
    sandbox_url: str,
    saga: UUID,
    kind: str,
) -> None:
    """During a timeout fault, the client gets nothing until its own deadline."""
    await set_faults(http, {"target": "payment.charge", "kind": kind})
    await partners.payment.state(saga)  # opens a connection that the next call, with its short timeout, can reuse
    outcome = await partners_at(sandbox_url, timeout_seconds=0.3).payment.charge(charge_of(saga, 1, "USD", None))
    assert outcome == Unknown("no answer within 0.3 s")


@pytest.mark.parametrize("kind", ["reset_before", "reset_after"])
async def test_reset_fault_resets_the_tcp_connection(http: httpx.AsyncClient, saga: UUID, kind: str) -> None:
    """A reset fault sends a TCP reset, not a normal close."""
    await set_faults(http, {"target": "payment.refund", "kind": kind})
    body, headers = {"saga_id": str(saga)}, {"Idempotency-Key": f"{saga}:charge_payment:undo"}
    with pytest.raises(httpx.ReadError) as reset:
        await http.post("/v1/payments/refund", json=body, headers=headers)
    causes = []
    cause: BaseException | None = reset.value
    while cause is not None:
        causes.append(type(cause))
        cause = cause.__cause__ or cause.__context__
    assert ConnectionResetError in causes


async def test_timeout_closes_without_an_answer(http: httpx.AsyncClient, saga: UUID) -> None:
    """After `delay_seconds`, a timeout fault closes the connection and sends no byte."""
    await set_faults(http, {"target": "payment.refund", "kind": "timeout_after", "delay_seconds": 0.05})
    body, headers = {"saga_id": str(saga)}, {"Idempotency-Key": f"{saga}:charge_payment:undo"}
    with pytest.raises(httpx.RemoteProtocolError, match="without sending a response"):
        await http.post("/v1/payments/refund", json=body, headers=headers)


async def test_slow_call_is_done_after_client_timeout(
    http: httpx.AsyncClient, partners: Partners, partners_at: Callable[..., Partners], sandbox_url: str
) -> None:
    """A slow call takes `delay_seconds` and takes effect even if the client has timed out."""
    patient, hasty = uuid4(), uuid4()
    await set_faults(http, {"target": "payment.charge", "kind": "slow", "delay_seconds": 0.4})
    started = time.monotonic()
    assert isinstance(await partners.payment.charge(charge_of(patient, 1, "USD", None)), Done)
    assert time.monotonic() - started >= 0.4
    timed_out = await partners_at(sandbox_url, timeout_seconds=0.2).payment.charge(charge_of(hasty, 1, "USD", None))
    assert timed_out == Unknown("no answer within 0.2 s")

    async def is_done() -> bool:
        return await decisions(http, hasty, "payment.charge") == [("done", True)]

    await wait_until(is_done, AMPLE_SECONDS, "the charge")
    await set_faults(http)
    assert isinstance(await partners.payment.charge(charge_of(hasty, 1, "USD", None)), Done)
    assert await decisions(http, hasty, "payment.charge") == [("done", True), ("replayed", False)]


async def test_first_matching_rule_with_uses_left_applies(
    http: httpx.AsyncClient, partners: Partners, saga: UUID
) -> None:
    """The first rule that matches the call and has `times` left applies."""
    other = uuid4()
    await set_faults(
        http,
        {"target": "payment.refund", "kind": "error"},
        {"target": "payment.charge", "kind": "reset_before", "match": {"saga_id": str(other)}},
        {"target": "payment.charge", "kind": "error", "times": 1},
        {"target": "payment.charge", "kind": "unavailable", "times": 1},
    )
    outcomes = [await partners.payment.charge(charge_of(saga, 1, "USD", None)) for _ in range(3)]
    assert [str(getattr(outcome, "detail", "done")) for outcome in outcomes] == [
        "500 partner-error",
        "503 partner-unavailable",
        "done",
    ]
    assert [rule["times"] for rule in (await http.get("/faults")).json()] == [None, None, 0, 0]
    assert isinstance(await partners.payment.charge(charge_of(other, 1, "USD", None)), Unknown)
    assert [entry["detail"] for entry in await entries(http, other)] == ["reset_before"]


@pytest.mark.parametrize(
    ("match", "applies"),
    [
        ({"payment_method": "pm_a"}, True),
        ({"payment_method": "pm_a", "amount_minor": 1}, True),
        ({"payment_method": "pm_b"}, False),
        ({"payment_method": "pm_a", "amount_minor": 2}, False),
        ({"colour": None}, False),
    ],
)
async def test_rule_matches_only_if_all_fields_are_equal(
    http: httpx.AsyncClient, partners: Partners, saga: UUID, match: dict[str, Any], *, applies: bool
) -> None:
    """A rule applies only if the body contains every field of `match` with an equal value."""
    await set_faults(http, {"target": "payment.charge", "kind": "error", "match": match})
    outcome = await partners.payment.charge(charge_of(saga, 1, "USD", "pm_a"))
    assert isinstance(outcome, Unknown if applies else Done)


async def test_probability_is_the_share_of_failed_calls(http: httpx.AsyncClient, partners: Partners) -> None:
    """A rule with a probability fails that share of the calls."""
    rule = {"target": "payment.refund", "kind": "error"}
    for probability, low, high in ((0.0, 0, 0), (0.5, 50, 150), (1.0, 200, 200)):
        await set_faults(http, {**rule, "probability": probability})
        outcomes = await asyncio.gather(*(partners.payment.refund(charge_of(uuid4())) for _ in range(200)))
        assert low <= sum(isinstance(outcome, Unknown) for outcome in outcomes) <= high


async def test_fault_rules_read_back_and_are_deleted(http: httpx.AsyncClient) -> None:
    """`GET /faults` returns the rules as set, and `DELETE /faults` removes all of them."""
    rule = {"target": "shipping.create", "kind": "refuse", "match": {"address": None}}
    filled = {"probability": 1.0, "times": None, "delay_seconds": 0, **rule}
    for rules in ([rule, rule], [rule], [filled]):
        answer = await http.put("/faults", json=rules)
        assert answer.json() == (await http.get("/faults")).json() == [filled] * len(rules)
    assert (await http.delete("/faults")).status_code == 204
    assert (await http.get("/faults")).json() == []


@pytest.mark.parametrize(
    "change",
    [
        {"target": "payment"},
        {"kind": "explode"},
        {"kind": "refuse", "target": "payment.refund"},
        {"kind": "refuse", "target": "inventory.release"},
        {"kind": "refuse", "target": "shipping.cancel"},
        {"probability": 1.1},
        {"probability": "1"},
        {"times": -1},
        {"times": 1.5},
        {"times": True},
        {"delay_seconds": -1},
        {"delay_seconds": 1e9},
        {"match": []},
        {"mach": {}},
    ],
)
async def test_invalid_rule_is_a_422(http: httpx.AsyncClient, change: dict[str, Any]) -> None:
    """An invalid rule is rejected with 422, and the earlier rules stay."""
    rule = {"target": "payment.charge", "kind": "error"}
    before = (await http.put("/faults", json=[rule])).json()
    answer = await http.put("/faults", json=[rule, {**rule, **change}])
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid-request")
    assert answer.json()["errors"][0]["where"].startswith("body.1")
    assert (await http.get("/faults")).json() == before


async def test_shutdown_ends_unanswered_and_slow_calls(
    start_sandbox: Callable[..., SandboxProcess],
    partners_at: Callable[..., Partners],
    saga: UUID,
) -> None:
    """Unanswered and slow calls do not delay the sandbox's shutdown."""
    sandbox = start_sandbox()
    partners = partners_at(sandbox.url)
    async with plain_http(sandbox.url) as http:
        await set_faults(
            http,
            {"target": "payment.charge", "kind": "timeout_after", "times": 1},
            {"target": "payment.refund", "kind": "slow", "times": 1, "delay_seconds": 60},
            {"target": "shipping.cancel", "kind": "reset_after", "times": 1},
        )
        assert isinstance(await partners.shipping.cancel(saga), Unknown)
        silent = asyncio.create_task(partners.payment.charge(charge_of(saga, 1, "USD", None)))
        slow = asyncio.create_task(partners.payment.refund(charge_of(uuid4())))

        async def all_rules_are_used_up() -> bool:
            return [rule["times"] for rule in (await http.get("/faults")).json()] == [0, 0, 0]

        await wait_until(all_rules_are_used_up, AMPLE_SECONDS, "all rules used up")
        assert await asyncio.to_thread(sandbox.terminate) in (0, -signal.SIGTERM)
    assert isinstance(await silent, Unknown)
    assert isinstance(await slow, Done)
