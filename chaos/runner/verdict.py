"""The verdict of a run: two judges that share nothing, the time that the end took, and the states that were met."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from chaos.bugs import Catch
from chaos.runner.measure import Series
from chaos.runner.reach import Reached
from chaos.sweep.result import SweepResult
from load import Verdict
from load.verdict import NO_500

HOLDS = "holds"


@dataclass(frozen=True)
class InjectedFault:
    """A fault as it happened, in seconds of the run. `error`: why it could not be injected."""

    kind: str
    component: str
    from_second: float
    to_second: float
    error: str | None
    recovered_seconds: float | None = None  # from its end to the first second with half of the usual 201s


@dataclass
class ChaosVerdict:
    """Everything that the report shows."""

    seed: int
    orders: int
    command: str
    versions: dict[str, str]
    load: Verdict
    checker: list[str]  # violations that the checker of tables and ledger found
    verified: dict[str, str]  # what `orders verify` said of each invariant
    failed_requests: int  # of this release: its logs have an unexpected error for each
    failed_by_older: int  # by the older release, while processes were rolled back: its errors are not this one's
    settled_seconds: float | None  # from the last fault to the end of the last order and event; None: not in time
    faults: list[InjectedFault] = field(default_factory=list)
    reached: list[Reached] = field(default_factory=list)
    series: Series = field(default_factory=Series)
    required: Sequence[str] = ()  # states that this run had to meet
    impossible: Mapping[str, str] = field(default_factory=dict)  # faults that it had to inject and could not, and why
    bugs: Sequence[Catch] = ()  # of a run of `chaos.bugs` on the same code
    sweep: SweepResult | None = None  # of a run of `chaos.sweep` on the same code

    @property
    def violations(self) -> list[str]:
        """Return every reason why the run failed, one line each."""
        found = [
            f"{violation.promise}: {violation.count} ({', '.join(violation.names[:3])})"
            for violation in self.load.violations
            if violation.promise != NO_500 or violation.count > self.failed_by_older
        ]
        if self.failed_requests:
            found.append(f"{self.failed_requests} requests failed unexpectedly: see http.failed in the logs")
        found += self.checker
        found += [f"orders verify: {name} {said}" for name, said in self.verified.items() if said != HOLDS]
        if self.settled_seconds is None:
            found.append("the system was not quiet in time after the last fault")
        missed = {row.state for row in self.reached if not row.count}
        found += [f"not reached: {state}" for state in self.required if state in missed]
        found += [f"not injected: {fault.kind}: {fault.error}" for fault in self.faults if fault.error]
        found += [f"not injected: {kind}: {reason}" for kind, reason in self.impossible.items()]
        found += [f"planted bug not caught: {catch.bug}" for catch in self.bugs if catch.caught_by is None]
        if self.sweep is not None:
            found += [f"crash point not recovered: {result.scenario}, {result.point}" for result in self.sweep.failed]
        if self.load.not_checked:
            found.append(self.load.not_checked)
        return found


def recovery(series: Series, ended_at: float) -> float | None:
    """Return the seconds from the end of a fault to the first full second with half of the usual 201s."""
    busy = sorted(count for count in series.acknowledged if count)
    if not busy:
        return None
    usual = busy[len(busy) // 2]
    first = int(ended_at) + 1
    for second in range(first, len(series.acknowledged)):
        if series.acknowledged[second] >= usual / 2:
            return max(0.0, second - ended_at)
    return None
