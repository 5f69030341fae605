"""`orders verify` beside a busy system with a real broker and faulty partners: it never reports what is in progress."""

from app.operations.verify.report import VerifyReport
from tests.e2e.conftest import System, order
from tests.harness.commands import orders
from tests.harness.steps import DO, UNDO
from tests.harness.wait import AMPLE_SECONDS, wait_until

PASSES = 4
KINDS = ("error", "reset_before", "reset_after", "duplicate", "timeout_after")


async def verify(system: System) -> tuple[int, VerifyReport]:
    settings = {name.removeprefix("ORDERS_").lower(): value for name, value in system.env.items()}
    code, out, _ = await orders("verify", "--json", **settings)
    return code, VerifyReport.model_validate_json(out)


async def test_busy_system_is_never_reported(system: System) -> None:
    """Passes during a load with faults end with 0, and so does one after it, which examines every order."""
    service = await system.start()
    await system.place([service], "first", order())
    await system.all_ended()  # a pass over orders of which none has ended says "not checked"
    await system.faults(
        *({"target": target, "kind": kind, "probability": 0.04} for target in (*DO, *UNDO) for kind in KINDS),
        {"target": "shipping.create", "kind": "refuse", "probability": 0.05},
    )
    async with system.load(service, per_second=20) as keys:
        await wait_until(lambda: len(keys) >= 5, AMPLE_SECONDS, "the first orders")
        for _ in range(PASSES):
            code, report = await verify(system)
            assert code == 0, report.model_dump_json(indent=2)
    await system.all_ended()
    code, report = await verify(system)
    assert (code, report.orders) == (0, 1 + len(keys)), report.model_dump_json(indent=2)
    assert await system.violations() == []
