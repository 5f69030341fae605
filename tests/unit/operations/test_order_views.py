"""What an operator can do about an order, as a pure function of its situation."""

import dataclasses
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest

from app.operations.order_views import OrderAction, find_actions
from app.operations.why_stuck import Situation
from app.orders.model import Line, Order, Reason, Status

NOW = datetime(2026, 1, 1, tzinfo=UTC)
ID = UUID("01890a5d-ac96-774b-bcce-b302099a8057")
OTHER_ID = UUID("01890a5d-ac96-774b-bcce-b302099a8058")
LATER = NOW + timedelta(seconds=1)
RETRY, COMPENSATE, CANCEL, REQUEUE, REPLAY = OrderAction
ORDER = Order(
    id=ID, tenant="default", status=Status.PENDING, status_reason=None, customer_id=None, currency="USD",
    lines=(Line("WIDGET", 1, 1),), payment_method=None, shipping_address=None, metadata=None, tracking_id=None,
    version=1, placed_at=NOW, updated_at=NOW,
)  # fmt: skip
PENDING = Situation(ID, "pending", NOW, NOW)
CALLING = dataclasses.replace(PENDING, direction="forward", lease_owner="host:1", due_at=LATER, processed_at=NOW)
WAITING = dataclasses.replace(CALLING, lease_owner=None)
DEAD = dataclasses.replace(PENDING, dead_at=NOW)
COMPENSATING = {"status": Status.COMPENSATING}
REJECTED = {"status": Status.REJECTED}
REQUESTED = {"cancel_requested_at": NOW, "cancel_reason": Reason.COMPENSATED_BY_OPERATOR}


@pytest.mark.parametrize(
    ("situation", "seen", "order", "expected"),
    [
        (PENDING, {}, {}, [COMPENSATE, CANCEL]),
        (CALLING, {}, {}, [COMPENSATE, CANCEL]),
        (CALLING, {}, REQUESTED, []),
        (WAITING, {}, {}, [RETRY, COMPENSATE, CANCEL]),
        (WAITING, {"due_at": NOW}, {}, [COMPENSATE, CANCEL]),
        (WAITING, {"direction": "backward"}, COMPENSATING, [RETRY]),
        (WAITING, {"finished_at": NOW}, REJECTED, []),
        (PENDING, {"parked_at": NOW, "event_id": ID}, {}, [REQUEUE, COMPENSATE, CANCEL]),
        (WAITING, {"finished_at": NOW, "parked_at": NOW, "event_id": ID}, REJECTED, [REQUEUE]),
        (DEAD, {"parked_at": NOW, "event_id": ID}, {}, [REPLAY, COMPENSATE, CANCEL]),
        (DEAD, {"parked_at": NOW, "event_id": OTHER_ID}, {"status": Status.CANCELLED}, [REPLAY, REQUEUE]),
        (DEAD, {}, {}, [REPLAY, COMPENSATE, CANCEL]),
        (DEAD, {}, {"status": Status.CANCELLED}, [REPLAY]),
        (DEAD, {"purged_at": NOW}, {}, [REPLAY, COMPENSATE, CANCEL]),
        (DEAD, {"purged_at": NOW}, {"status": Status.CANCELLED}, []),
        (DEAD, {"processed_at": NOW}, {"status": Status.CANCELLED}, []),
    ],
)
def test_only_what_changes_something_is_offered(
    situation: Situation, seen: dict[str, Any], order: dict[str, Any], expected: list[OrderAction]
) -> None:
    """An attempt under way is not retried, an order that ends is not ended, and a handled event is not replayed.

    A dead letter that is parked too, as without a broker, is replayed: a requeue does not reset its attempts.
    """
    found = find_actions(dataclasses.replace(ORDER, **order), dataclasses.replace(situation, **seen))
    assert list(found) == expected
