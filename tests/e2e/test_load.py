"""`orders load` against a real service: its verdict, its exit code, and what it sends."""

import json

from tests.e2e.conftest import System
from tests.harness.checker import violations
from tests.harness.commands import orders


async def test_a_run_against_a_correct_service_holds(system: System) -> None:
    """Every promise holds, keys that were sent twice or abandoned included, and the checker agrees."""
    service = await system.start()
    args = ("load", service.url, "--sandbox", system.sandbox_process.url, "--orders", "150", "--clients", "16")
    code, out, err = await orders(*args, "--json")
    verdict = json.loads(out)
    assert (code, verdict["outcome"], verdict["violations"]) == (0, "holds", []), (out, err)
    assert verdict["acknowledged"] == verdict["orders"] == 150
    assert verdict["requests"] > 150
    assert verdict["charged_minor"] - verdict["refunded_minor"] == verdict["due_minor"] > 0
    assert set(verdict["statuses"]) == {"confirmed", "rejected"}
    await system.all_ended()
    assert await violations(system.env["ORDERS_DATABASE_URL"], system.sandbox) == []


async def test_orders_that_do_not_end_are_violations(system: System) -> None:
    """If orders have not ended in time, the run fails, names them, and exits with 1."""
    service = await system.start()
    await system.faults({"target": "inventory.hold", "kind": "unavailable"})
    code, out, _ = await orders(
        *("load", service.url, "--sandbox", system.sandbox_process.url),
        *("--orders", "5", "--rate", "50", "--settle", "1"),
    )
    assert code == 1, out
    assert "VIOLATED: every order ends: 5" in out
    await system.faults()
    await system.all_ended()


async def test_a_run_that_proves_nothing_says_so(system: System) -> None:
    """Without a ledger, a service or a token there is no verdict: exit 3. A bad URL is a usage error: exit 2."""
    nowhere = "http://127.0.0.1:1"
    service = await system.start()
    code, out, err = await orders("load", service.url, "--sandbox", nowhere, "--orders", "1")
    assert (code, out) == (3, "")
    assert err.startswith(f"orders: cannot read {nowhere}/ledger/summary")
    code, out, err = await orders("load", nowhere, "--sandbox", system.sandbox_process.url, "--orders", "1")
    assert (code, out) == (3, "")
    assert err.startswith(f"orders: no service answers at {nowhere}")
    secured = await system.start(auth_mode="jwt", auth_jwt_secret="x" * 32)
    code, out, err = await orders("load", secured.url, "--sandbox", system.sandbox_process.url, "--orders", "1")
    assert (code, out) == (3, "")
    assert err.startswith(f"orders: cannot read {secured.url}/orders: 401")
    code, _, err = await orders("load", "localhost:8000")
    assert code == 2
    assert "URL" in err
