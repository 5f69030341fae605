"""The order's status: which changes there are, and that no other one is possible."""

from itertools import product

import pytest

from app.orders import events
from app.orders.model import FINAL, TRANSITIONS, Reason, Status, may_become

ALLOWED = {
    (Status.PENDING, Status.CONFIRMED),
    (Status.PENDING, Status.COMPENSATING),
    (Status.PENDING, Status.CANCELLED),
    (Status.COMPENSATING, Status.REJECTED),
    (Status.COMPENSATING, Status.CANCELLED),
}


@pytest.mark.parametrize(("present", "following"), list(product(Status, Status)))
def test_an_order_changes_in_the_allowed_ways_only(present: Status, following: Status) -> None:
    assert may_become(present, following) == ((present, following) in ALLOWED)


def test_an_order_that_has_ended_never_changes_again() -> None:
    assert set(FINAL) == {Status.CONFIRMED, Status.REJECTED, Status.CANCELLED}


def test_every_order_that_has_not_ended_can_end() -> None:
    reached = {Status.PENDING}
    while not reached >= (further := {each for status in reached for each in TRANSITIONS[status]}):
        reached |= further
    assert reached == set(Status)
    assert all(TRANSITIONS[status] for status in reached - FINAL)


def test_every_status_but_compensating_is_told_by_an_event_of_its_own() -> None:
    assert set(events.TYPES) == set(Status) - {Status.COMPENSATING}
    assert len(set(events.TYPES.values())) == len(events.TYPES)


def test_a_reason_of_a_newer_release_is_kept_as_it_is() -> None:
    newer = Reason("of-a-newer-release")
    assert (str(newer), newer.value, newer == Reason("of-a-newer-release")) == (newer, "of-a-newer-release", True)
    assert newer not in list(Reason)
    assert Reason("timed-out") is Reason.TIMED_OUT
    with pytest.raises(ValueError, match="7"):
        Reason(7)  # type: ignore[arg-type]
