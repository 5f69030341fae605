"""`orders serve` that dies by SIGKILL at one instant: `python -m tests.harness.crashing POINT`.

POINT is a checkpoint of the service, such as `saga.charge_payment.do.attempted`. The composition root takes what to do
at a checkpoint as an argument and no setting can give it one, so only a program like this one can arm it.
"""

import os
import signal
import sys

import uvloop

from app import main, server, settings, telemetry


def serve(point: str) -> None:
    """Run the service until it passes the point."""

    def checkpoint(passed: str) -> None:
        if passed == point:
            os.kill(os.getpid(), signal.SIGKILL)

    configured = settings.load(settings.Settings)
    telemetry.configure_logging(configured.log_format, configured.log_level)
    uvloop.run(server.until_signalled(main.serve(configured, checkpoint)))


if __name__ == "__main__":
    serve(sys.argv[1])
