"""Run `orders serve` and kill or freeze it: `python -m tests.harness.crashing POINT [SIGKILL or SIGSTOP]`.

POINT is a crash point of the service, such as `saga.charge_payment.do.attempted`. The function for crash points is an
argument of the composition root. No setting can install one, so only a program like this one can.
"""

import os
import signal
import sys

import uvloop

from app import main, settings
from app.api.server import listener
from app.observability import logs
from app.observability.signals import Signals


def serve(point: str, number: signal.Signals = signal.SIGKILL) -> None:
    """Run the service until it first passes the point; once it is thawed, it passes it as any other."""
    ahead = {point}

    def checkpoint(passed: str) -> None:
        if passed in ahead:
            ahead.remove(passed)
            os.kill(os.getpid(), number)

    configured = settings.load(settings.Settings)
    logs.configure_logging(configured.log_format, configured.log_level, background=True)
    uvloop.run(listener.until_signalled(main.serve(configured, Signals(checkpoint))))


if __name__ == "__main__":
    serve(sys.argv[1], *(signal.Signals[name] for name in sys.argv[2:]))
