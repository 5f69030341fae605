"""What commands print for people: columns that line up, and nothing that hides the worst."""

import pytest

from app.cli.sagas import format_details
from app.cli.verify import format_report
from app.operations.saga_views import SagaAnswer, SagaView, StepLogView
from app.operations.timeline import TimelineEntry
from app.operations.verify.findings import Invariant
from app.operations.verify.report import InvariantVerdict, VerdictStatus, VerifyReport, ViolationView
from app.operations.why_stuck import WhyStuck

DAY = "2026-11-21"
PLACED = f"{DAY}T03:47:02.123456Z"
SAGA = SagaView(
    order_id="o1", tenant="default", status="pending", direction="forward", step="charge_payment", attempts=2,
    reason=None, age_seconds=2.06, next_attempt_in_seconds=0.4, lease_owner=None,
    deadline_at=f"{DAY}T04:02:02.000000Z", stuck=False,
)  # fmt: skip
ENTRIES = [
    TimelineEntry(id="placed", at=PLACED, source="request", event="order-placed"),
    TimelineEntry(
        id="4", at=f"{DAY}T03:47:02.500000Z", source="saga", event="do", step="charge_payment", attempt=2,
        outcome="unknown", detail="HTTP 503", seconds=0.0121,
    ),
    TimelineEntry(
        id="act-1", at="2026-11-22T08:00:01.000000Z", source="operator", event="retry", outcome="due",
        detail="admin: it is back",
    ),
    TimelineEntry(id="planned", at=None, source="plan", event="do", step="create_shipment", outcome="planned"),
]  # fmt: skip


def answer(**changes: object) -> SagaAnswer:
    """Return an order in trouble."""
    values: dict[str, object] = {
        "order_id": "o1",
        "tenant": "default",
        "status": "pending",
        "status_reason": None,
        "version": 1,
        "placed_at": PLACED,
        "updated_at": PLACED,
        "saga": SAGA,
        "log": [
            StepLogView(
                at=PLACED, action="do", step="reserve_inventory", attempt=1, outcome="done", detail=None,
                reply={"reservation_id": "res_1"},
            )
        ],
        "operator_actions": [],
        "timeline": ENTRIES,
        "why_stuck": WhyStuck(
            message="Payment failed charge_payment.",
            waiting_for="payment",
            since=f"{DAY}T03:47:02.500000Z",
            next_attempt_at=f"{DAY}T03:47:03.000000Z",
        ),
    }  # fmt: skip
    return SagaAnswer.model_validate(values | changes)


def test_an_order_is_told_line_by_line() -> None:
    """State, partners' ids, what it waits for, then each entry; another day has its date, a step to come no time."""
    assert format_details(answer()).splitlines() == [
        f"o1  pending, version 1, placed {PLACED}",
        f"  age     2.1 s, deadline {DAY}T04:02:02.000000Z",
        "  step    forward: charge_payment, 2 attempts",
        "  next    in 0.4 s",
        "  ids     reservation_id res_1",
        "  waits   for payment since 03:47:02.500, next attempt 03:47:03.000",
        "          Payment failed charge_payment.",
        "",
        "  03:47:02.123   request   order placed",
        "  03:47:02.500   saga      do charge_payment #2           12 ms  unknown (HTTP 503)",
        "  11-22 08:00:01 operator  retry                                 due (admin: it is back)",
        "                 plan      do create_shipment                    planned",
    ]


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"next_attempt_in_seconds": None, "step": None}, "  step    forward: nothing left to do"),
        ({"next_attempt_in_seconds": None}, "  next    it has ended"),
        ({"next_attempt_in_seconds": -3.0}, "  next    due for 3.0 s"),
        ({"next_attempt_in_seconds": -3.0, "lease_owner": "a:1"}, "  next    due for 3.0 s, abandoned by a:1"),
        ({"lease_owner": "a:1"}, "  next    running on a:1, lease ends in 0.4 s"),
        ({"stuck": True}, f"  age     2.1 s, deadline {DAY}T04:02:02.000000Z, stuck"),
    ],
)
def test_who_has_a_saga_and_since_when(changes: dict[str, object], line: str) -> None:
    """A saga is running, waiting, due or abandoned."""
    assert line in format_details(answer(saga=SAGA.model_copy(update=changes))).splitlines()


def test_an_order_without_a_saga_says_so() -> None:
    """It may not have started, or be too old."""
    told = format_details(answer(saga=None, why_stuck=None, log=[]))
    assert "  saga    none: it has not started, or was removed after its retention" in told.splitlines()
    assert "waits" not in told


def verdict(invariant: Invariant, status: VerdictStatus, violations: int = 0, detail: str = "") -> InvariantVerdict:
    examples = [ViolationView(order_id=f"o{n}", subject=f"o{n}", problem="is late") for n in range(violations)]
    return InvariantVerdict(
        invariant=invariant, title="title", status=status, examined=1200, violations=violations,
        orders=[], examples=examples, detail=detail,
    )  # fmt: skip


def test_a_report_is_a_table_with_its_violations_below() -> None:
    """Each invariant has a row; ten violations are named, the rest is counted; a reason stands below its row."""
    report = VerifyReport(
        checked_at=PLACED,
        took_seconds=4.71,
        orders=1200,
        invariants=[
            verdict(Invariant.I1, VerdictStatus.HOLDS, detail="1,200 keys"),
            verdict(Invariant.I2, VerdictStatus.VIOLATED, 12),
            verdict(Invariant.I3, VerdictStatus.NOT_CHECKED, detail="not checked: the broker is unavailable"),
        ],
    )
    lines = format_report(report).splitlines()
    assert [line.split()[0] for line in lines[1:4]] == ["I1", "I2", "o0"]
    assert "(1,200 keys)" in lines[1]
    assert "violated" in lines[2]
    assert "(12)" in lines[2]
    assert lines[13].strip() == "and 2 more"
    assert lines[15].strip() == "not checked: the broker is unavailable"
    assert lines[-1] == "1,200 orders, 4.7 s: 1 holds, 1 violated, 1 not checked"
    assert report.exit_code == 1
    report.invariants.pop(1)
    assert report.exit_code == 3
