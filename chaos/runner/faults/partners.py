"""Faults of the partners."""

import asyncio
import random
from collections.abc import Mapping
from typing import Any, get_args

import httpx

from chaos.runner.faults.acts import CALL_SECONDS, Row, freezing, killing
from chaos.runner.system import DEADLINE_SECONDS, System
from sandbox import faults as partner_faults

TARGETS = get_args(partner_faults.FaultTarget)
PARTNER_KINDS = tuple(kind for kind in get_args(partner_faults.FaultKind) if kind != "refuse")  # a refusal is no fault
SLOW_SECONDS = 0.3
PAST_DEADLINE_SECONDS = DEADLINE_SECONDS + 2.0


async def _let_partners_act_late(system: System, rng: random.Random, seconds: float) -> None:
    """Let calls take effect after their order's deadline, when they have been undone already."""
    target = rng.choice(("inventory.hold", "payment.charge"))
    await _set_rules(system, seconds, {"target": target, "kind": "slow", "delay_seconds": PAST_DEADLINE_SECONDS})


async def _let_partners_fail(system: System, rng: random.Random, seconds: float) -> None:
    rules: list[Mapping[str, Any]] = [
        {
            "target": rng.choice(TARGETS),
            "kind": rng.choice(PARTNER_KINDS),
            "probability": rng.choice((0.3, 0.6, 1.0)),
            "delay_seconds": SLOW_SECONDS,
        }
        for _ in range(rng.randint(1, 4))
    ]
    await _set_rules(system, seconds, *rules)


async def _set_rules(system: System, seconds: float, *rules: Mapping[str, Any]) -> None:
    async with httpx.AsyncClient(base_url=system.sandbox.url, trust_env=False, timeout=CALL_SECONDS) as sandbox:
        (await sandbox.put("/faults", json=rules)).raise_for_status()
        try:
            await asyncio.sleep(seconds)
        finally:
            (await sandbox.delete("/faults")).raise_for_status()


FAULTS: dict[str, Row] = {
    "partners: kill -9": Row("partners", (0.2, 3.0), killing(lambda system: system.sandbox)),
    "partners: freeze": Row("partners", (0.5, 4.0), freezing(lambda system: system.sandbox)),
    # Longer than the deadline, or a retry would succeed before it.
    "partners: act after the deadline": Row("partners", (13.0, 15.0), _let_partners_act_late),
    "partners: errors, timeouts, resets, garbage": Row("partners", (3.0, 8.0), _let_partners_fail),
}
