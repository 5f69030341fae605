"""The invariants I1 to I9, proven again and again while a browser shows them, as `orders verify` proves them.

A pass waits for nothing. It judges again what was unfinished or wrong in earlier passes, as those of the janitor do
(`operations.maintenance.verifying`): an order that has been so for as long as `orders verify` waits.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from uuid import UUID

import structlog

from app import db
from app.bootstrap.brokers import make_broker
from app.bootstrap.consumers import queues
from app.bootstrap.verification import find_books, make_config, make_verifier
from app.errors import Unavailable
from app.observability.signals import Signals
from app.operations.verify.findings import MAX_SUSPECTS, Invariant
from app.operations.verify.report import TITLES, InvariantVerdict, VerdictStatus, VerifyReport
from app.operations.verify.run import Pass, Scope, violating_orders
from app.partners.http import HttpClient
from app.settings import Verification
from app.values import immutable

log = structlog.get_logger(__name__)

RECENT_SECONDS = 3600.0  # a kept data directory may have any number of older orders
PAUSE_SECONDS = 1.0
PAUSE_PER_SECOND = 9.0  # of a pass, so that passes take a tenth of the time


@immutable
class Verdict:
    """What is known of one invariant. `detail`: what is wrong, or why it could not be checked."""

    invariant: Invariant
    title: str
    status: VerdictStatus
    detail: str = ""


NOT_CHECKED = [Verdict(invariant, TITLES[invariant], VerdictStatus.NOT_CHECKED) for invariant in Invariant]


class Invariants:
    """Runs one pass after the other, read-only. Postgres may be down: then nothing is checked."""

    def __init__(self, pool: db.Pool, http: HttpClient, settings: Verification, changed: Callable[[], None]) -> None:
        self.problem = "The first pass has not ended"  # why nothing is checked
        self.verdicts: Sequence[Verdict] = NOT_CHECKED
        self.report: VerifyReport | None = None  # of the last pass that ended
        self._pool = pool
        self._http = http
        self._settings = settings
        self._config = make_config(settings)
        self._changed = changed
        self._broker = make_broker("", pool, Signals())
        self._pass: asyncio.Task[None] | None = None
        self._due_at = 0.0
        self._open_since: dict[UUID, float] = {}  # unfinished or wrong orders, and when a pass first found them so

    def keep_fresh(self) -> None:
        """Start a pass if the last one is old enough. Call it again and again while a browser shows them."""
        if (self._pass is None or self._pass.done()) and time.monotonic() >= self._due_at:
            self._pass = asyncio.create_task(self._run())

    async def close(self) -> None:
        """End a running pass."""
        if self._pass is not None:
            self._pass.cancel()
            await asyncio.wait([self._pass])
        await self._broker.close()

    async def _run(self) -> None:
        started_at = time.monotonic()
        try:
            access = await find_books(self._http, self._settings)
            verifier = make_verifier(self._pool, self._broker, queues(), access, self._config)
            settled_at = started_at - self._config.grace_seconds
            again = {order_id for order_id, since in self._open_since.items() if since <= settled_at}
            done = await verifier.run(Scope(since_seconds=RECENT_SECONDS, again=again, is_patient=False))
            self._remember_open(done, started_at)
            self.report = done.report()
            self.problem, self.verdicts = "", [_shorten(verdict) for verdict in self.report.invariants]
        except Unavailable as error:
            self._fail("PostgreSQL does not answer")
            log.info("playground.not_verified", error=str(error))
        except Exception:
            self._fail("The pass failed; the terminal shows the error")
            log.exception("playground.verifying_failed")
        took_seconds = time.monotonic() - started_at
        self._due_at = time.monotonic() + max(PAUSE_SECONDS, took_seconds * PAUSE_PER_SECOND)
        self._changed()

    def _remember_open(self, done: Pass, now: float) -> None:
        violating = violating_orders([*done.found.suspects.values(), *done.first.suspects.values()])
        # Violations come first, as in the janitor's passes.
        still = [*sorted(violating), *sorted(done.unfinished - violating)][:MAX_SUSPECTS]
        self._open_since = {order_id: self._open_since.get(order_id, now) for order_id in still}

    def _fail(self, problem: str) -> None:
        self.problem, self.verdicts, self.report = problem, NOT_CHECKED, None


def _shorten(verdict: InvariantVerdict) -> Verdict:
    detail = "" if verdict.status is VerdictStatus.HOLDS else verdict.detail
    if verdict.examples:
        detail = f"{verdict.examples[0].subject}: {verdict.examples[0].problem}"
    return Verdict(verdict.invariant, verdict.title, verdict.status, detail)
