"""The verdict on an invariant, from what a pass has found."""

import pytest

from app.operations.verify.findings import MAX_SUSPECTS, Findings, Invariant, Suspicion
from app.operations.verify.report import MAX_SHOWN, VerdictStatus, VerifyReport, make_verdict

I5 = Invariant.I5


def make(*, examined: int = 0, suspects: int = 0, hindered: bool = False) -> Findings:
    findings = Findings()
    findings.count(examined, I5)
    findings.suspect(Suspicion(I5, f"order-{number}", "wrong") for number in range(suspects))
    if hindered:
        findings.hinder("payment is down", I5)
    return findings


@pytest.mark.parametrize(
    ("findings", "orders", "status"),
    [
        (make(examined=2), 2, VerdictStatus.HOLDS),
        (make(), 0, VerdictStatus.HOLDS),
        (make(), 2, VerdictStatus.NOT_CHECKED),
        (make(examined=2, hindered=True), 2, VerdictStatus.NOT_CHECKED),
        (make(hindered=True), 0, VerdictStatus.NOT_CHECKED),
        (make(examined=2, suspects=1), 2, VerdictStatus.VIOLATED),
        (make(examined=2, suspects=1, hindered=True), 2, VerdictStatus.VIOLATED),
    ],
)
def test_verdict(findings: Findings, orders: int, status: VerdictStatus) -> None:
    """A violation outweighs an obstacle, and none examined although there are orders means not checked."""
    assert make_verdict(I5, findings, orders).status is status


def test_counts_go_on_beyond_the_limits() -> None:
    """Memory and lists are bounded, the count is not; a second suspicion about an order adds nothing."""
    findings = make(examined=1, suspects=MAX_SUSPECTS + 5)
    findings.suspect([Suspicion(I5, "order-0", "wrong again")])
    verdict = make_verdict(I5, findings, 1)
    assert len(findings.suspects) == MAX_SUSPECTS
    assert verdict.violations == MAX_SUSPECTS + 5
    assert len(verdict.orders) == len(verdict.examples) == MAX_SHOWN


@pytest.mark.parametrize(
    ("findings", "exit_code"),
    [(make(examined=1), 0), (make(examined=1, hindered=True), 3), (make(examined=1, suspects=1, hindered=True), 1)],
)
def test_exit_code(findings: Findings, exit_code: int) -> None:
    """1: violated; else 3: not checked; else 0."""
    report = VerifyReport(checked_at="", took_seconds=0, orders=1, invariants=[make_verdict(I5, findings, 1)])
    assert report.exit_code == exit_code
