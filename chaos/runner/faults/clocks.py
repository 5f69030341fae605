"""Faults of clocks: one jumps forwards or backwards, and is right again some seconds later.

No jump is longer than a key lives, or than a hold of stock lives after its order's deadline: beyond that a key may be
used anew, and a partner may sell the stock to another customer. Everything else has to hold under any jump.
"""

import asyncio
import random
from collections.abc import Callable

from chaos.runner.faults.acts import Inject, Row
from chaos.runner.system import System
from tests.harness.clocks import Clock

# Times that Postgres wrote while its clock was ahead are that much later when it is right again: everything that waits
# for one of them, such as a resend, needs so much longer after the last fault.
JUMP_SECONDS = (5, 20, 60)


def _jumping(clocks: Callable[[System], list[Clock]]) -> Inject:
    """Return a fault that lets one of these clocks jump."""

    async def inject(system: System, rng: random.Random, seconds: float) -> None:
        clock = rng.choice(clocks(system))
        clock.set(rng.choice((-1, 1)) * rng.choice(JUMP_SECONDS))
        try:
            await asyncio.sleep(seconds)
        finally:
            clock.set(0)

    return inject


FAULTS: dict[str, Row] = {
    "clock of a process: jump": Row("clock", (3.0, 10.0), _jumping(lambda system: system.clocks.services)),
    "clock of postgres: jump": Row("postgres-clock", (3.0, 10.0), _jumping(lambda system: [system.clocks.postgres])),
    "clock of partners: jump": Row("partners-clock", (3.0, 10.0), _jumping(lambda system: [system.clocks.partners])),
}
