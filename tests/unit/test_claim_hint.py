"""The hint skips what claims have passed, and a scan from the start finds whatever became due behind it."""

from datetime import UTC, datetime, timedelta

from app.claim_hint import FULL_SCAN_SECONDS, MARGIN, START, ClaimHint

NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)


class Clock:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.seconds = 1000.0

    def __call__(self) -> float:
        return self.seconds


def test_claims_start_before_the_newest_row_of_the_last() -> None:
    hint = ClaimHint(Clock())
    assert hint.since() == START  # a new process knows nothing
    hint.record([NOON - timedelta(hours=1), NOON])
    assert hint.since() == NOON - MARGIN
    hint.record([])
    assert hint.since() == NOON - MARGIN


def test_a_claim_looks_from_the_start_every_few_seconds() -> None:
    clock = Clock()
    hint = ClaimHint(clock)
    hint.since()
    hint.record([NOON])
    clock.seconds += FULL_SCAN_SECONDS
    assert [hint.since(), hint.since()] == [START, NOON - MARGIN]


def test_rows_behind_the_hint_move_it_back() -> None:
    """A backlog in the past is claimed by every claim, not only by the rare ones that look from the start."""
    clock = Clock()
    hint = ClaimHint(clock)
    hint.record([NOON])
    hint.record([NOON - timedelta(days=1)])
    hint.since()
    assert hint.since() == NOON - timedelta(days=1) - MARGIN
