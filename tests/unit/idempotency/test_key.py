"""The Idempotency-Key: how it is read, which request it stands for, and single flight."""

import asyncio
import gc
import json
from dataclasses import replace
from typing import Any, cast

import pytest

from app.api.orders.schemas import read_place_order
from app.errors import DatabaseUnavailable, IdempotencyKeyInvalid, IdempotencyKeyMissing, RequestInProgress
from app.idempotency import Idempotency, IdempotencyConfig, replay_cache
from app.idempotency.key import IdempotencyKey, bind, fingerprint, read_key
from app.idempotency.store import StoredResponse
from app.idempotency.transaction import Write
from tests.harness.observed import Observed
from tests.harness.wait import AMPLE_SECONDS, wait_until

LINE = {"sku": "WIDGET", "quantity": 3, "unit_price": "9.99"}
LONG = {"items": [LINE], "metadata": {"a": 1, "b": [1.5, "x"]}}


def key(name: str = "k", tenant: str = "t") -> IdempotencyKey:
    return bind(tenant, name, "POST", "/orders", "", {})


def printed(body: bytes | dict[str, Any], method: str = "POST", path: str = "/orders", query: str = "") -> bytes:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return fingerprint(method, path, query, read_place_order(raw).normal_form())


@pytest.mark.parametrize(
    ("header", "found"),
    [
        ("abc", "abc"),
        ('"abc"', "abc"),
        (' "abc" ', "abc"),
        (r'"a\"b\\c"', r'a"b\c'),
        (r'a"b\c', r'a"b\c'),
        ("!~", "!~"),
        ('"abc";v=1', "abc"),
        ('"abc"; v=1.5;flag;  x="y \\" z";*t=tok/en:1;b=:YWJj:;n=?0;d=@-1;u=%"f%c3%bc"', "abc"),
        ("a,b;c=d", "a,b;c=d"),
        ("k" * 255, "k" * 255),
        ('"' + "k" * 255 + '"', "k" * 255),
    ],
)
def test_quoted_and_bare_keys_are_the_same(header: str, found: str) -> None:
    """A structured-field string and the bare token are the same key."""
    assert read_key([header], required=True) == found


@pytest.mark.parametrize("values", [[], [""], ["  "], ['""'], ['" "'], ["", " "]])
def test_a_blank_key_is_no_key(values: list[str]) -> None:
    """A blank key counts as none, which is refused only where one is required."""
    assert read_key(values, required=False) is None
    with pytest.raises(IdempotencyKeyMissing):
        read_key(values, required=True)


@pytest.mark.parametrize(
    "values",
    [
        ["k" * 256],
        ['"' + "k" * 256 + '"'],
        ["two words"],
        ['"two words"'],
        ["clé"],
        ['"clé"'],
        ["a\x7fb"],
        ["a\tb"],
        ['"abc'],
        ['"'],
        ['"a"b"'],
        ['"a" ;p=1'],
        ['"a";P=1'],
        ['"a";'],
        ['"a";p='],
        ['"a";p=1 2'],
        ['"a";p="x'],
        ['"a";p=1.2345'],
        ['"a";p=:=A=:'],
        ['"a";1'],
        ['"a", "b"'],
        [r'"a\b"'],
        ["a", "a"],
        ["a", "b"],
    ],
)
@pytest.mark.parametrize("required", [True, False])
def test_any_other_key_is_invalid(values: list[str], *, required: bool) -> None:
    """Every other value raises IdempotencyKeyInvalid."""
    with pytest.raises(IdempotencyKeyInvalid):
        read_key(values, required=required)


@pytest.mark.parametrize(
    "body",
    [
        b'{ "metadata" : {"b":[1.50,"\\u0078"],"a":1.0},\n"items":[{"unit_price":"9.99","quantity":3,"sku":"WIDGET"}]}',
        {**LONG, "items": [LINE | {"unit_price": 9.99}]},
        {**LONG, "items": [LINE | {"unit_price": "9.990"}]},
        {"metadata": LONG["metadata"], **LINE},
        {"metadata": LONG["metadata"], "sku": "WIDGET", "quantity": 3, "unitPrice": 9.99},
        {**LONG, "currency": "USD"},
        {**LONG, "customer_id": None, "payment_method": None, "shippingAddress": None},
    ],
    ids=["spelling", "number", "zeros", "flat", "camel", "default currency", "explicit nulls"],
)
def test_equal_requests_have_the_same_fingerprint(body: bytes | dict[str, Any]) -> None:
    """The fingerprint does not depend on how a request is written."""
    assert printed(body) == printed(LONG)


@pytest.mark.parametrize(
    "body",
    [
        {**LONG, "items": [LINE | {"sku": "widget"}]},
        {**LONG, "items": [LINE | {"quantity": 2}]},
        {**LONG, "items": [LINE | {"unit_price": "9.98"}]},
        {**LONG, "items": [LINE, LINE]},
        {**LONG, "items": [LINE | {"quantity": 1}, LINE | {"quantity": 2}]},
        {**LONG, "currency": "EUR"},
        {**LONG, "customer_id": "cus_1"},
        {**LONG, "payment_method": "pm_1"},
        {**LONG, "metadata": {}},
        {**LONG, "metadata": {"a": "1", "b": [1.5, "x"]}},
        {**LONG, "metadata": {"a": 1, "b": ["x", 1.5]}},
        {**LONG, "shipping_address": {"name": "Ada", "line1": "1", "city": "Oslo", "country": "NO"}},
    ],
)
def test_another_body_has_another_fingerprint(body: dict[str, Any]) -> None:
    """A different body has a different fingerprint."""
    assert printed(body) != printed(LONG)


@pytest.mark.parametrize("other", [{"method": "PUT"}, {"path": "/orders/1/cancel"}, {"query": "dry_run=1"}])
def test_another_method_path_or_query_has_another(other: dict[str, str]) -> None:
    """A different method, path or query has a different fingerprint."""
    assert printed(LONG, **other) != printed(LONG)


def test_the_order_of_lines_is_part_of_the_request() -> None:
    """The same lines in another order are another request."""
    first, second = LINE, LINE | {"sku": "OTHER"}
    assert printed({"items": [first, second]}) != printed({"items": [second, first]})


def test_a_fingerprint_never_changes_within_its_version() -> None:
    # Keys live for a day, so two releases must agree on it: a new normal form needs a new FINGERPRINT_VERSION.
    """The fingerprint of a known request stays the same across releases."""
    assert printed(LONG).hex() == "73745eab11ecff7830bc56c94d4beb3070a8b21ae782015ba49315bc95954029"


def answered(name: str) -> StoredResponse:
    return StoredResponse(201, f"/orders/{name}", name.encode())


class WithoutPostgres(Idempotency):
    """The layers before Postgres; the write itself runs at once."""

    async def _execute_alone(
        self,
        key: IdempotencyKey | None,  # noqa: ARG002 - of the method that is replaced
        write: Write,
        response: StoredResponse | None,  # noqa: ARG002
        in_doubt: StoredResponse | None,  # noqa: ARG002
        wait_seconds: float,
    ) -> StoredResponse:
        assert 0 < wait_seconds <= AMPLE_SECONDS
        return await write(cast("Any", None))


class Crowd:
    """Requests that run until `leave` is set, and return their name."""

    def __init__(self, wait_seconds: float = AMPLE_SECONDS) -> None:
        self.signals = Observed()
        config = IdempotencyConfig(ttl_seconds=86_400, wait_seconds=wait_seconds, concurrency=10)
        self.idempotency = WithoutPostgres(cast("Any", None), None, config, self.signals)
        self.inside: list[str] = []
        self.leave = asyncio.Event()
        self.failure: Exception | None = None

    async def enter(self, name: str, of: IdempotencyKey | None) -> StoredResponse:
        async def write(_: Any) -> StoredResponse:
            self.inside.append(name)
            await self.leave.wait()
            self.inside.remove(name)
            if self.failure:
                raise self.failure
            return answered(name)

        return await self.idempotency.run_single(of, write)

    def send(self, name: str, of: IdempotencyKey | None) -> "asyncio.Task[StoredResponse]":
        return asyncio.create_task(self.enter(name, of))

    async def until_inside(self, *names: str) -> None:
        await wait_until(lambda: sorted(self.inside) == sorted(names), AMPLE_SECONDS, f"{names} inside")


async def test_requests_with_one_key_share_a_response() -> None:
    """Of concurrent requests with one key, one writes, and the others share its response."""
    crowd = Crowd()
    tasks = [crowd.send(str(number), key()) for number in range(5)]
    await crowd.until_inside("0")
    crowd.leave.set()
    first, *others = await asyncio.gather(*tasks)
    assert first == answered("0")
    assert others == [replace(first, replayed=True)] * 4
    assert crowd.signals.value("idempotency_cache_hits_total", {"source": "postgres"}) == 4


async def test_a_request_after_a_failed_one_writes() -> None:
    """A request that waited for a failed one writes itself."""
    crowd = Crowd()
    crowd.failure = DatabaseUnavailable("out")
    tasks = [crowd.send(str(number), key()) for number in range(3)]
    crowd.leave.set()
    assert await asyncio.gather(*tasks, return_exceptions=True) == [crowd.failure] * 3


async def test_another_request_does_not_share_the_response() -> None:
    """A different request with the same key does not share the response."""
    crowd = Crowd()
    other = bind("t", "k", "POST", "/orders", "", {"other": 1})
    tasks = [crowd.send("first", key()), crowd.send("other", other)]
    crowd.leave.set()
    assert [response.body for response in await asyncio.gather(*tasks)] == [b"first", b"other"]


async def test_waiting_for_the_first_request_is_limited() -> None:
    """A request that waits too long raises RequestInProgress."""
    crowd = Crowd(wait_seconds=0.01)
    first = crowd.send("first", key())
    await crowd.until_inside("first")
    with pytest.raises(RequestInProgress):
        await crowd.enter("late", key())
    crowd.leave.set()
    await first
    conflicts = crowd.signals.value("idempotency_conflicts_total", {"kind": "in-progress"})
    assert (crowd.inside, conflicts) == ([], 1)


async def test_other_keys_and_tenants_do_not_wait() -> None:
    """Other keys, other tenants and requests without a key do not wait."""
    crowd = Crowd()
    keys = {"a": key("a"), "b": key("b"), "other tenant's a": key("a", "u"), "none": None, "none either": None}
    tasks = [crowd.send(name, of) for name, of in keys.items()]
    await crowd.until_inside(*keys)
    crowd.leave.set()
    await asyncio.gather(*tasks)


@pytest.mark.parametrize("cancelled", ["first", "second"])
async def test_a_cancelled_request_leaves_its_turn(cancelled: str) -> None:
    """A cancelled request leaves its turn to the next."""
    crowd = Crowd()
    tasks = {"first": crowd.send("first", key()), "second": crowd.send("second", key())}
    await crowd.until_inside("first")
    tasks.pop(cancelled).cancel()
    crowd.inside = [name for name in crowd.inside if name != cancelled]
    [(survivor, task)] = tasks.items()
    await crowd.until_inside(survivor)
    crowd.leave.set()
    await task
    await crowd.enter("afterwards", key())


async def test_unused_entries_are_removed() -> None:
    """The entry of a key is removed when no request uses it."""
    crowd = Crowd()
    crowd.leave.set()
    for number in range(100):
        await crowd.enter(str(number), key(str(number)))
    gc.collect()
    assert sum(isinstance(thing, asyncio.Lock) for thing in gc.get_objects()) < 100


def test_a_copy_is_decoded_unchanged() -> None:
    """An encoded copy is decoded unchanged."""
    answer = StoredResponse(201, "/orders/1", b'{"a": "\n"}', remaining_seconds=60)
    assert replay_cache.decode(key(), replay_cache.encode(key(), answer, 160.0), 100.0) == replace(
        answer, replayed=True
    )


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{}",
        b"[]\nbody",
        b"\xff\nbody",
        replay_cache.encode(key("other"), answered("1"), 160.0),
        replay_cache.encode(key(tenant="other"), answered("1"), 160.0),
        replay_cache.encode(bind("t", "k", "POST", "/orders", "", {"other": 1}), answered("1"), 160.0),
        replay_cache.encode(replace(key(), fingerprint_version=2), answered("1"), 160.0),
        replay_cache.encode(key(), answered("1"), 100.0),
        replay_cache.encode(key(), StoredResponse(201, "/orders/1", b""), 160.0),
        replay_cache.encode(key(), answered("1"), 160.0).replace(b"201", b'"x"'),
    ],
)
def test_only_intact_copies_of_this_request_count(raw: bytes) -> None:
    """A copy that is damaged, expired or of another request is ignored."""
    assert replay_cache.decode(key(), raw, 100.0) is None
