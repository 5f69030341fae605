"""`orders verify` as an operator types it: its table, its JSON and its exit codes."""

from typing import Any

from app.operations.verify.report import VerifyReport
from tests.harness.commands import orders
from tests.harness.verifying import Verified

NOBODY = "postgresql://orders:orders@127.0.0.1:1/orders"  # a port that nothing listens on
SHORT: dict[str, str] = {"saga_lease_seconds": "3", "partner_timeout_seconds": "1"}


def settings_of(system: Verified) -> dict[str, Any]:
    return {"database_url": system.database_url, **system.partners, **SHORT}


async def test_table_of_a_healthy_system(system: Verified) -> None:
    """A row per invariant with its verdict and its examined orders; exit code 0, and nothing on stderr."""
    await system.place("one")
    code, out, err = await orders("verify", **settings_of(system))
    rows = [line for line in out.splitlines() if line.startswith("  I")]
    assert [row.split()[0] for row in rows] == [f"I{number}" for number in range(1, 10)]
    assert all("  1  holds" in row for row in rows)
    assert (code, err) == (0, "")


async def test_violation_names_the_order(system: Verified) -> None:
    """The table has the order's id and what is wrong below the row; exit code 1."""
    await system.place("one")
    await system.pool.execute("UPDATE orders SET total_minor = total_minor + 1")
    code, out, _ = await orders("verify", **settings_of(system))
    assert code == 1
    assert "violated (1)" in out
    assert f"{system.orders['one']}  its lines add up to 29.97, its total is 29.98 USD" in out


async def test_json_is_the_report(system: Verified) -> None:
    """Without partners, the rows that need them are not checked; exit code 3."""
    await system.place("one")
    code, out, _ = await orders("verify", "--json", database_url=system.database_url)
    report = VerifyReport.model_validate_json(out)
    assert code == report.exit_code == 3
    assert [row.invariant.value for row in report.invariants if row.status.value == "not checked"] == ["I4", "I5", "I7"]


async def test_since_narrows_the_orders(system: Verified) -> None:
    """`--since` examines only the orders placed within that time; nonsense is a usage error."""
    await system.place("one")
    code, out, _ = await orders("verify", "--since", "1h", "--json", **settings_of(system))
    assert (code, VerifyReport.model_validate_json(out).orders) == (0, 1)
    code, _, err = await orders("verify", "--since", "soon", **settings_of(system))
    assert code == 2
    assert "--since" in err


async def test_database_down_is_one_line() -> None:
    """Without Postgres nothing can be checked: exit code 3 and one line."""
    code, out, err = await orders("verify", database_url=NOBODY)
    assert (code, out) == (3, "")
    assert len(err.splitlines()) == 1
    assert err.startswith("orders: ")
