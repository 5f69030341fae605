"""The Idempotency-Key: which one a request carries, which request it stands for, and one at a time in a process."""

import asyncio
import gc
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import pytest

from app.api.orders.schemas import read_place_order
from app.errors import DatabaseUnavailable, IdempotencyKeyInvalid, IdempotencyKeyMissing, RequestInProgress
from app.idempotency import Idempotency, IdempotencyConfig, Prepare, replay_cache
from app.idempotency.key import IdempotencyKey, bind, fingerprint, read_key
from app.idempotency.store import StoredResponse
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
def test_a_structured_field_string_and_the_bare_token_are_the_same_key(header: str, found: str) -> None:
    assert read_key([header], required=True) == found


@pytest.mark.parametrize("values", [[], [""], ["  "], ['""'], ['" "'], ["", " "]])
def test_a_blank_key_is_none_and_refused_only_where_one_is_required(values: list[str]) -> None:
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
def test_anything_else_is_invalid(values: list[str], *, required: bool) -> None:
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
def test_however_it_is_written_the_same_request_has_the_same_fingerprint(body: bytes | dict[str, Any]) -> None:
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
    assert printed(body) != printed(LONG)


@pytest.mark.parametrize("other", [{"method": "PUT"}, {"path": "/orders/1/cancel"}, {"query": "dry_run=1"}])
def test_another_method_path_or_query_has_another_fingerprint(other: dict[str, str]) -> None:
    assert printed(LONG, **other) != printed(LONG)


def test_the_order_of_lines_is_part_of_the_request() -> None:
    first, second = LINE, LINE | {"sku": "OTHER"}
    assert printed({"items": [first, second]}) != printed({"items": [second, first]})


def test_a_fingerprint_never_changes_within_its_version() -> None:
    # Keys live for a day, so two releases must agree on it: a new normal form needs a new FINGERPRINT_VERSION.
    assert printed(LONG).hex() == "73745eab11ecff7830bc56c94d4beb3070a8b21ae782015ba49315bc95954029"


def answered(name: str) -> StoredResponse:
    return StoredResponse(201, f"/orders/{name}", name.encode())


class WithoutPostgres(Idempotency):
    """What comes before Postgres; the write itself runs at once."""

    async def _execute(
        self,
        key: IdempotencyKey | None,  # noqa: ARG002 - of the method that is replaced
        prepare: Prepare,
        admit: Callable[[], None],  # noqa: ARG002
        wait_seconds: float,
    ) -> StoredResponse:
        assert 0 < wait_seconds <= AMPLE_SECONDS
        write, _ = prepare()
        return await write(cast("Any", None))


class Crowd:
    """Requests that each take as long as `leave` is not set, and are answered with their name."""

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


async def test_of_many_requests_with_one_key_one_acts_and_the_others_share_its_answer() -> None:
    crowd = Crowd()
    tasks = [crowd.send(str(number), key()) for number in range(5)]
    await crowd.until_inside("0")
    crowd.leave.set()
    first, *others = await asyncio.gather(*tasks)
    assert first == answered("0")
    assert others == [replace(first, replayed=True)] * 4
    assert crowd.signals.value("idempotency_cache_hits_total", {"source": "postgres"}) == 4


async def test_a_request_behind_a_failed_one_acts_itself() -> None:
    crowd = Crowd()
    crowd.failure = DatabaseUnavailable("out")
    tasks = [crowd.send(str(number), key()) for number in range(3)]
    crowd.leave.set()
    assert await asyncio.gather(*tasks, return_exceptions=True) == [crowd.failure] * 3


async def test_another_request_with_the_key_does_not_share_the_answer() -> None:
    crowd = Crowd()
    other = bind("t", "k", "POST", "/orders", "", {"other": 1})
    tasks = [crowd.send("first", key()), crowd.send("other", other)]
    crowd.leave.set()
    assert [each.body for each in await asyncio.gather(*tasks)] == [b"first", b"other"]


async def test_a_request_that_has_waited_its_time_is_told_that_the_first_is_still_running() -> None:
    crowd = Crowd(wait_seconds=0.01)
    first = crowd.send("first", key())
    await crowd.until_inside("first")
    with pytest.raises(RequestInProgress):
        await crowd.enter("late", key())
    crowd.leave.set()
    await first
    conflicts = crowd.signals.value("idempotency_conflicts_total", {"kind": "in-progress"})
    assert (crowd.inside, conflicts) == ([], 1)


async def test_other_keys_other_tenants_and_requests_without_a_key_are_not_held_up() -> None:
    crowd = Crowd()
    keys = {"a": key("a"), "b": key("b"), "other tenant's a": key("a", "u"), "none": None, "none either": None}
    tasks = [crowd.send(name, of) for name, of in keys.items()]
    await crowd.until_inside(*keys)
    crowd.leave.set()
    await asyncio.gather(*tasks)


@pytest.mark.parametrize("cancelled", ["first", "second"])
async def test_a_cancelled_request_leaves_the_place_to_the_next(cancelled: str) -> None:
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


async def test_a_place_that_nobody_wants_any_more_is_forgotten() -> None:
    crowd = Crowd()
    crowd.leave.set()
    for number in range(100):
        await crowd.enter(str(number), key(str(number)))
    gc.collect()
    assert sum(isinstance(each, asyncio.Lock) for each in gc.get_objects()) < 100


def test_a_copy_is_read_as_it_was_written() -> None:
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
def test_a_copy_of_anything_but_this_very_request_or_past_its_end_is_no_copy(raw: bytes) -> None:
    assert replay_cache.decode(key(), raw, 100.0) is None
