"""The replay memory: only the same request, only while its key lives, and never more than its bounds."""

from collections.abc import Iterator

import pytest

from app.idempotency.facts import ResponseReplayed
from app.idempotency.key import RawRequest, digest
from app.idempotency.replay_memory import ENTRY_BYTES, MARGIN_SECONDS, ReplayMemory
from app.idempotency.store import StoredResponse
from app.observability.signals import Signals

REQUEST = RawRequest("t", "k", "POST", "/orders", "", "application/json", digest(b"{}"))
DAY = 86_400.0
OTHERS = {
    "tenant": REQUEST._replace(tenant="u"),
    "key": REQUEST._replace(key="l"),
    "method": REQUEST._replace(method="PUT"),
    "path": REQUEST._replace(path="/other"),
    "query": REQUEST._replace(query="a=1"),
    "content_type": REQUEST._replace(content_type="application/json; charset=utf-8"),
    "body_digest": REQUEST._replace(body_digest=digest(b"{ }")),
}


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def memory(clock: Clock, **bounds: int) -> ReplayMemory:
    return ReplayMemory(Signals(), clock=clock, **bounds)


def answered(number: int = 1, remaining_seconds: float = DAY) -> StoredResponse:
    return StoredResponse(201, f"/orders/{number}", b"{}", remaining_seconds=remaining_seconds)


def keys(count: int) -> Iterator[RawRequest]:
    return (REQUEST._replace(key=f"k{number}") for number in range(count))


def test_a_response_comes_back_as_a_replay(clock: Clock) -> None:
    """The replay has the same status, location and body, and is counted."""
    signals, replayed = Signals(), list[ResponseReplayed]()
    signals.subscribe(ResponseReplayed, replayed.append)
    remembered = ReplayMemory(signals, clock=clock)
    assert remembered.find(REQUEST) is None
    remembered.keep(REQUEST, answered())
    found = remembered.find(REQUEST)
    assert found is not None
    assert (found.status, found.location, found.body, found.replayed) == (201, "/orders/1", b"{}", True)
    assert [fact.source for fact in replayed] == ["memory"]


@pytest.mark.parametrize("field", RawRequest._fields)
def test_another_request_is_not_found(clock: Clock, field: str) -> None:
    """Every part of the request counts."""
    remembered = memory(clock)
    remembered.keep(REQUEST, answered())
    assert remembered.find(OTHERS[field]) is None


def test_a_request_without_a_key_is_not_kept(clock: Clock) -> None:
    """Each request without a key is an order of its own."""
    remembered = memory(clock)
    remembered.keep(REQUEST._replace(key=None), answered())
    assert remembered.find(REQUEST._replace(key=None)) is None


def test_the_last_minute_of_a_key_is_left_to_postgres(clock: Clock) -> None:
    """A response is used until a minute before its key expires."""
    remembered = memory(clock)
    remembered.keep(REQUEST, answered(remaining_seconds=MARGIN_SECONDS))
    assert remembered.find(REQUEST) is None
    remembered.keep(REQUEST, answered(remaining_seconds=MARGIN_SECONDS + 10))
    clock.now += 9.9
    assert remembered.find(REQUEST) is not None
    clock.now += 0.1
    assert remembered.find(REQUEST) is None


def test_a_key_that_was_taken_over_has_its_new_response(clock: Clock) -> None:
    """The later response replaces the earlier one."""
    remembered = memory(clock)
    remembered.keep(REQUEST, answered(1, MARGIN_SECONDS + 10))
    clock.now += MARGIN_SECONDS + 11
    assert remembered.find(REQUEST) is None
    remembered.keep(REQUEST, answered(2))
    found = remembered.find(REQUEST)
    assert found is not None
    assert found.location == "/orders/2"


@pytest.mark.parametrize("bounds", [{"max_entries": 3}, {"max_bytes": 4 * (ENTRY_BYTES + 100) - 1}])
def test_the_response_used_longest_ago_makes_room(clock: Clock, bounds: dict[str, int]) -> None:
    """Both bounds hold, and a response that is used stays."""
    remembered = memory(clock, **bounds)
    first, second, third, fourth = keys(4)
    for request in (first, second, third):
        remembered.keep(request, StoredResponse(201, "/orders/1", b"x" * 40, remaining_seconds=DAY))
    assert remembered.find(first) is not None
    remembered.keep(fourth, StoredResponse(201, "/orders/1", b"x" * 40, remaining_seconds=DAY))
    assert [remembered.find(request) is not None for request in (first, second, third, fourth)] == [
        True,
        False,
        True,
        True,
    ]


def test_keeping_a_response_again_takes_no_more_room(clock: Clock) -> None:
    """A response that is kept twice counts once."""
    remembered = memory(clock, max_bytes=2 * (ENTRY_BYTES + 100))
    first, second = keys(2)
    remembered.keep(first, answered())
    for _ in range(100):
        remembered.keep(second, answered())
    assert remembered.find(first) is not None


def test_a_response_larger_than_the_memory_is_not_kept(clock: Clock) -> None:
    """The bound of bytes holds for a single response too."""
    remembered = memory(clock, max_bytes=ENTRY_BYTES)
    remembered.keep(REQUEST, answered())
    assert remembered.find(REQUEST) is None
