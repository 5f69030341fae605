"""The janitor's verification: judge the orders of the last hour, some each minute, and report the result as metrics.

Each pass continues after the last one, over orders that had time to end. It judges again what was unfinished or wrong
before, so a violation is reported until it is gone. `orders verify` looks at everything; this looks at what is new.
"""

from collections.abc import Awaitable, Callable
from datetime import datetime
from uuid import UUID

import structlog

from app.observability.signals import Signals
from app.operations.maintenance.facts import InvariantExamined
from app.operations.verify.findings import MAX_SUSPECTS
from app.operations.verify.report import VerdictStatus
from app.operations.verify.run import Pass, Scope, Verifier, violating_orders

log = structlog.get_logger(__name__)

PERIOD_SECONDS = 60.0
ORDERS_PER_PASS = 500  # of a partner without a ledger, this is as many query calls
RECENT_SECONDS = 3600.0  # a pass that is further behind continues here
SETTLED_SECONDS = 60.0  # most orders have ended by then


class RecentVerifier:
    """Verifies recent orders. `make`: find out what the partners offer now, and make a verifier for one pass.

    `max_again`: how many unfinished or wrong orders the next pass judges again.
    """

    def __init__(
        self,
        make: Callable[[], Awaitable[Verifier]],
        signals: Signals,
        settled_seconds: float = SETTLED_SECONDS,
        max_again: int = MAX_SUSPECTS,
    ) -> None:
        self._make = make
        self._max_again = max_again
        self._settled_seconds = settled_seconds
        self._signals = signals
        self._start: UUID | None = None
        self._keys_after: datetime | None = None
        self._again: set[UUID] = set()

    async def run_once(self) -> int:
        """Run one pass. Returns 0: there is nothing more to do before the next period. Raises DatabaseUnavailable."""
        scope = Scope(
            since_seconds=RECENT_SECONDS,
            start=self._start,
            until_seconds=self._settled_seconds,
            limit=ORDERS_PER_PASS,
            again=frozenset(self._again),
            keys_after=self._keys_after,
            is_whole=False,
            is_patient=False,
        )
        done = await (await self._make()).run(scope)
        self._start, self._keys_after = done.bounds.end, done.keys_until
        violating = violating_orders([*done.found.suspects.values(), *done.first.suspects.values()])
        # Violations come first: many unfinished orders must not make a violation look as if it were gone.
        again = [*sorted(violating), *sorted(done.unfinished - violating)]
        self._again = set(again[: self._max_again])
        self._report(done)
        return 0

    def _report(self, done: Pass) -> None:
        for verdict in done.report().invariants:
            if verdict.status is not VerdictStatus.NOT_CHECKED:
                is_complete = not done.found.obstacles.get(verdict.invariant)
                self._signals.emit(InvariantExamined(verdict.invariant, verdict.violations, is_complete=is_complete))
            if verdict.status is VerdictStatus.VIOLATED:
                first = verdict.examples[0]
                log.error(
                    "invariant.violated",
                    invariant=verdict.invariant,
                    violations=verdict.violations,
                    subject=first.subject,
                    problem=first.problem,
                )
