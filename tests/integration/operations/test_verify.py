"""A pass over a healthy system finds nothing, and says how much it has examined."""

from tests.harness.verifying import Verified, problems, statuses


async def test_healthy_system_holds(system: Verified) -> None:
    """Confirmed and rejected orders of a healthy system satisfy every invariant, and each was examined."""
    await system.place("one", "two")
    await system.place("refused", items=[{"sku": "UNDELIVERABLE", "quantity": 1, "unit_price": "9.99"}])
    report = await system.verify()
    assert not statuses(report), list(problems(report))
    assert report.exit_code == 0
    assert {row.invariant.value: row.examined for row in report.invariants} == dict.fromkeys(
        (f"I{number}" for number in range(1, 10)), 3
    )
