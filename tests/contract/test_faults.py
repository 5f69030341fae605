"""Every kind of fault on every call: what the client makes of it, what the ledger says, and that a re-send mends it."""

import asyncio
import signal
import time
from collections.abc import Callable
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest

from app.partners.ports import Done, Item, Outcome, Refused, Unknown
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


def is_as_agreed(outcome: Outcome, target: str, kind: str) -> bool:
    """Whether a client that met this fault knows exactly what it can know."""
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
async def test_a_fault_is_seen_as_agreed_recorded_as_it_was_and_mended_by_sending_again(
    http: httpx.AsyncClient, partners: Partners, saga: UUID, item: Item, *, target: str, kind: str
) -> None:
    await prepare(partners, saga, item, target)
    await set_faults(http, {"target": target, "kind": kind, "times": 1, "delay_seconds": 0.05})
    outcome = await ACTS[target](partners, saga, item)
    assert is_as_agreed(outcome, target, kind), outcome
    assert await decisions(http, saga, target) == DECIDED[kind]

    again = await ACTS[target](partners, saga, item)
    assert isinstance(again, Refused if kind == "refuse" else Done)
    last = ("done", True) if DECIDED[kind] == NOT_DONE else ("replayed", False)
    assert await decisions(http, saga, target) == [*DECIDED[kind], last]


@pytest.mark.parametrize("kind", ["timeout_before", "timeout_after"])
async def test_a_timeout_is_silence_until_the_clients_own_deadline(
    partners: Partners,
    partners_at: Callable[..., Partners],
    http: httpx.AsyncClient,
    sandbox_url: str,
    saga: UUID,
    kind: str,
) -> None:
    await set_faults(http, {"target": "payment.charge", "kind": kind})
    await partners.payment.state(saga)  # leaves its connection to a call that has no time for one
    outcome = await partners_at(sandbox_url, timeout_seconds=0.3).payment.charge(charge_of(saga, 1, "USD", None))
    assert outcome == Unknown("no answer within 0.3 s")


@pytest.mark.parametrize("kind", ["reset_before", "reset_after"])
async def test_a_reset_is_a_reset_of_the_connection_not_a_close(http: httpx.AsyncClient, saga: UUID, kind: str) -> None:
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


async def test_a_timeout_ends_with_a_close_and_no_byte_of_an_answer(http: httpx.AsyncClient, saga: UUID) -> None:
    await set_faults(http, {"target": "payment.refund", "kind": "timeout_after", "delay_seconds": 0.05})
    body, headers = {"saga_id": str(saga)}, {"Idempotency-Key": f"{saga}:charge_payment:undo"}
    with pytest.raises(httpx.RemoteProtocolError, match="without sending a response"):
        await http.post("/v1/payments/refund", json=body, headers=headers)


async def test_a_slow_answer_takes_its_time_and_is_done_though_the_client_gave_up(
    http: httpx.AsyncClient, partners: Partners, partners_at: Callable[..., Partners], sandbox_url: str
) -> None:
    patient, hasty = uuid4(), uuid4()
    await set_faults(http, {"target": "payment.charge", "kind": "slow", "delay_seconds": 0.4})
    started = time.monotonic()
    assert isinstance(await partners.payment.charge(charge_of(patient, 1, "USD", None)), Done)
    assert time.monotonic() - started >= 0.4
    given_up = await partners_at(sandbox_url, timeout_seconds=0.2).payment.charge(charge_of(hasty, 1, "USD", None))
    assert given_up == Unknown("no answer within 0.2 s")

    async def is_done() -> bool:
        return await decisions(http, hasty, "payment.charge") == [("done", True)]

    await wait_until(is_done, AMPLE_SECONDS, "the charge")
    await set_faults(http)
    assert isinstance(await partners.payment.charge(charge_of(hasty, 1, "USD", None)), Done)
    assert await decisions(http, hasty, "payment.charge") == [("done", True), ("replayed", False)]


async def test_the_first_rule_that_fits_with_times_left_applies(
    http: httpx.AsyncClient, partners: Partners, saga: UUID
) -> None:
    other = uuid4()
    await set_faults(
        http,
        {"target": "payment.refund", "kind": "error"},
        {"target": "payment.charge", "kind": "reset_before", "match": {"saga_id": str(other)}},
        {"target": "payment.charge", "kind": "error", "times": 1},
        {"target": "payment.charge", "kind": "unavailable", "times": 1},
    )
    outcomes = [await partners.payment.charge(charge_of(saga, 1, "USD", None)) for _ in range(3)]
    assert [str(getattr(each, "detail", "done")) for each in outcomes] == [
        "500 partner-error",
        "503 partner-unavailable",
        "done",
    ]
    assert [rule["times"] for rule in (await http.get("/faults")).json()] == [None, None, 0, 0]
    assert isinstance(await partners.payment.charge(charge_of(other, 1, "USD", None)), Unknown)
    assert [each["detail"] for each in await entries(http, other)] == ["reset_before"]


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
async def test_a_rule_matches_only_when_every_field_is_equal(
    http: httpx.AsyncClient, partners: Partners, saga: UUID, match: dict[str, Any], *, applies: bool
) -> None:
    await set_faults(http, {"target": "payment.charge", "kind": "error", "match": match})
    outcome = await partners.payment.charge(charge_of(saga, 1, "USD", "pm_a"))
    assert isinstance(outcome, Unknown if applies else Done)


async def test_probability_is_the_share_of_calls_that_go_wrong(http: httpx.AsyncClient, partners: Partners) -> None:
    rule = {"target": "payment.refund", "kind": "error"}
    for probability, low, high in ((0.0, 0, 0), (0.5, 50, 150), (1.0, 200, 200)):
        await set_faults(http, {**rule, "probability": probability})
        outcomes = await asyncio.gather(*(partners.payment.refund(charge_of(uuid4())) for _ in range(200)))
        assert low <= sum(isinstance(each, Unknown) for each in outcomes) <= high


async def test_faults_read_back_as_they_were_set_and_are_deleted_as_a_whole(http: httpx.AsyncClient) -> None:
    rule = {"target": "shipping.create", "kind": "refuse", "match": {"address": None}}
    filled = {"probability": 1.0, "times": None, "delay_seconds": 0, **rule}
    for given in ([rule, rule], [rule], [filled]):
        answer = await http.put("/faults", json=given)
        assert answer.json() == (await http.get("/faults")).json() == [filled] * len(given)
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
async def test_a_rule_that_makes_no_sense_is_a_422_and_the_former_rules_stay(
    http: httpx.AsyncClient, change: dict[str, Any]
) -> None:
    rule = {"target": "payment.charge", "kind": "error"}
    before = (await http.put("/faults", json=[rule])).json()
    answer = await http.put("/faults", json=[rule, {**rule, **change}])
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid-request")
    assert answer.json()["errors"][0]["where"].startswith("body.1")
    assert (await http.get("/faults")).json() == before


async def test_a_server_that_stops_lets_go_of_silent_and_slow_calls(
    start_sandbox: Callable[..., SandboxProcess],
    partners_at: Callable[..., Partners],
    saga: UUID,
) -> None:
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

        async def all_have_met_their_fault() -> bool:
            return [rule["times"] for rule in (await http.get("/faults")).json()] == [0, 0, 0]

        await wait_until(all_have_met_their_fault, AMPLE_SECONDS, "every fault met")
        assert await asyncio.to_thread(sandbox.terminate) in (0, -signal.SIGTERM)
    assert isinstance(await silent, Unknown)
    assert isinstance(await slow, Done)
