"""Where a claim starts to look for due rows, so that it does not step over the entries of all earlier rows."""

import time
from collections.abc import Callable, Iterable
from datetime import UTC, datetime, timedelta

START = datetime(1970, 1, 1, tzinfo=UTC)  # before every row: look through the whole index
MARGIN = timedelta(seconds=2)
FULL_SCAN_SECONDS = 5.0


class ClaimHint:
    """The instant from which this process's claims look for due rows. See `since`.

    A claim takes the rows that have been due for longest, so it starts at the low end of an index on `next_attempt_at`.
    That end is full of dead entries: one for each row that was claimed there before. Vacuum and earlier scans remove
    them, but neither may while any session holds a snapshot from before: a backup, a report, a forgotten transaction.
    Then each claim would step over every row since that snapshot, and a day-long backup would stop the service.

    New rows are due now, and retries in the future, so rows become due at the high end. A claim therefore starts a
    margin before the newest instant that the last one took. What it can miss is a row that became due in the past: its
    transaction took longer than the margin, Postgres's clock was set back, a row waited behind an earlier one of its
    subject. So every few seconds, a claim looks from the start. That delays such a row by those seconds, and loses
    none. If that claim finds such rows, the next ones start there, so a backlog in the past is not left to rare scans.

    The hint belongs to one process and costs nothing to lose: the first claim looks from the start.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._since = START
        self._full_scan_at = clock()

    def since(self) -> datetime:
        """Return the instant from which the next claim must look."""
        now = self._clock()
        if now < self._full_scan_at:
            return self._since
        self._full_scan_at = now + FULL_SCAN_SECONDS
        return START

    def record(self, due: Iterable[datetime]) -> None:
        """Take note of when the rows of a claim were due."""
        newest = max(due, default=None)
        if newest is not None:
            self._since = newest - MARGIN
