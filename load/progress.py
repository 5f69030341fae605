"""The live line of a run: rewritten on a terminal, else printed now and then."""

import asyncio
import sys
import time
from typing import TextIO

from load.history import Histories, percentile
from load.service import Service

TERMINAL_SECONDS = 0.5
PRINT_SECONDS = 5.0
ERASE = "\r\x1b[2K"


class Progress:
    """Shows how a run goes on `stream`. `phase` is what the run does now."""

    def __init__(self, service: Service, histories: Histories, keys: int, stream: TextIO = sys.stderr) -> None:
        self.phase = "sending"
        self._service = service
        self._histories = histories
        self._keys = keys
        self._stream = stream
        self._started_at = time.monotonic()

    async def run(self) -> None:
        """Show the line until cancelled."""
        terminal = self._stream.isatty()
        before, before_at = 0, time.monotonic()
        try:
            while True:
                await asyncio.sleep(TERMINAL_SECONDS if terminal else PRINT_SECONDS)
                done, now = self._acknowledged(), time.monotonic()
                line = self._line(done, (done - before) / (now - before_at), await self._service.backlog())
                before, before_at = done, now
                print(ERASE + line if terminal else line, end="" if terminal else "\n", file=self._stream, flush=True)
        finally:
            if terminal:
                print(ERASE, end="", file=self._stream, flush=True)

    def _acknowledged(self) -> int:
        return sum(history.is_acknowledged for history in self._histories.by_number.values())

    def _line(self, done: int, per_second: float, backlog: dict[str, float]) -> str:
        recent = [history.acknowledged_seconds for history in list(self._histories.by_number.values())[-1000:]]
        times = sorted(seconds for seconds in recent if seconds is not None)
        parts = [
            f"{time.monotonic() - self._started_at:5.0f} s",
            f"{self.phase:<9}",
            f"{done:,}/{self._keys:,} acknowledged",
            f"{per_second:,.0f}/s",
            f"p50 {milliseconds(percentile(times, 0.5))}  p99 {milliseconds(percentile(times, 0.99))}",
            *(f"{name} {number:,.0f}" for name, number in backlog.items()),
        ]
        return "  ".join(parts)


def milliseconds(seconds: float | None) -> str:
    """Return a duration for people."""
    return "–" if seconds is None else f"{seconds * 1000:,.0f} ms" if seconds < 10 else f"{seconds:,.1f} s"  # noqa: PLR2004 - seconds read better from here on
