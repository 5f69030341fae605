"""The sweep: record the points of an order's way, then die at each of them and check the recovery."""

import asyncio
import contextlib
import dataclasses
import json
import sys
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer

from chaos.runner.system import System, keep_logs, running
from tests.harness.checker import Answers, is_too_late, violations
from tests.harness.processes import Service
from tests.harness.run import ControllerRun
from tests.harness.wait import wait_until

# The process that dies must not do anything by itself, or its points would not be the same in each run: it works when
# woken. The one that recovers looks often.
DYING = {"ORDERS_OUTBOX_POLL_SECONDS": "60", "ORDERS_SAGA_POLL_SECONDS": "60"}
RECOVERING = {"ORDERS_OUTBOX_POLL_SECONDS": "0.1", "ORDERS_SAGA_POLL_SECONDS": "0.1"}
LEASES = {
    "ORDERS_OUTBOX_LEASE_SECONDS": "1.5",
    "ORDERS_OUTBOX_PUBLISH_TIMEOUT_SECONDS": "1",
    "ORDERS_SAGA_LEASE_SECONDS": "1.5",
    "ORDERS_PARTNER_TIMEOUT_SECONDS": "0.5",
    "ORDERS_SAGA_DEADLINE_SECONDS": "300",
}
PATIENCE_SECONDS = 120.0
CHARGE_SECONDS = 0.3  # less than PARTNER_TIMEOUT_SECONDS
TRIES = 4  # at a point, before the sweep fails because the process did not die there
FINAL_PATIENCE_SECONDS = 10.0


@dataclasses.dataclass(frozen=True)
class Scenario:
    """What happens to an order. `cancels`: its customer cancels it at once. `faults`: rules of the sandbox."""

    sku: str = "WIDGET"
    cancels: bool = False
    faults: Sequence[Mapping[str, Any]] = ()

    def body(self) -> Mapping[str, Any]:
        """Return the request."""
        return {"items": [{"sku": self.sku, "quantity": 3, "unit_price": "9.99"}]}


SCENARIOS: Mapping[str, Scenario] = {
    "confirmed": Scenario(),
    "compensated": Scenario(sku="UNDELIVERABLE"),
    # The cancel comes while the charge is on its way, in every run.
    "cancelled": Scenario(
        cancels=True, faults=[{"target": "payment.charge", "kind": "slow", "delay_seconds": CHARGE_SECONDS}]
    ),
}


@dataclasses.dataclass(frozen=True)
class PointResult:
    """A point, and what was wrong after the recovery; nothing, if it recovered."""

    scenario: str
    point: str
    violations: list[str]


class Sweep:
    """Runs one order after another against services that die."""

    def __init__(self, system: System, directory: Path) -> None:
        self._system = system
        self._directory = directory
        self._armed = directory / "armed"
        self._answers = Answers()
        self._number = 0
        # The sweep has services of its own; it needs the servers and partners of the system, without the proxies.
        self._env = {
            **system.env,
            **LEASES,
            "ORDERS_ROLES": "api,relay,consumer,janitor",
            "ORDERS_DATABASE_URL": system.postgres.url,
            "ORDERS_RABBITMQ_URL": system.rabbitmq.url(),
        }

    async def record(self, scenario: str) -> list[str]:
        """Return the points of one order, in their order."""
        record = self._directory / f"{scenario}.points"
        async with self._dying(SWEEP_RECORD=str(record)) as service:
            await self._place(service, scenario)
            await self._until_quiet()
        return list(dict.fromkeys(record.read_text().splitlines()))

    async def die_at(self, scenario: str, point: str) -> PointResult:
        """Die there, recover, and check."""
        for _ in range(TRIES):
            async with self._dying(SWEEP_POINT=point) as service:
                key = await self._place(service, scenario)
                died = await self._dies(service)
            await self._recover(scenario, key)
            if died:
                found = await self._violations()
                return PointResult(scenario, point, found)
        return PointResult(scenario, point, [f"the process did not die there, in {TRIES} tries"])

    @contextlib.asynccontextmanager
    async def _dying(self, **sweep: str) -> AsyncIterator[Service]:
        self._armed.unlink(missing_ok=True)
        env = {**self._env, **DYING, "SWEEP_ARMED": str(self._armed), **sweep}
        log = self._directory / "logs" / "dying.log"
        async with Service(env, ("serve",), log=log, module="chaos.sweep.hooks") as service:
            await self._until_ready(service)
            self._armed.touch()
            yield service

    async def _until_ready(self, service: Service) -> None:
        async with httpx.AsyncClient(base_url=service.url, trust_env=False) as client:

            async def is_ready() -> bool:
                return bool((await client.get("/readyz")).json()["status"] == "ok")

            await wait_until(is_ready, PATIENCE_SECONDS, "readiness")

    async def _place(self, service: Service, scenario: str) -> str:
        """Send the order, and its cancel, once. The process may die before it answers."""
        self._number += 1
        key = f"sweep-{self._number}"
        async with httpx.AsyncClient(base_url=self._system.sandbox.url, trust_env=False) as sandbox:
            (await sandbox.put("/faults", json=SCENARIOS[scenario].faults)).raise_for_status()
        with contextlib.suppress(httpx.TransportError):
            await self._send(service, scenario, key)
        return key

    async def _send(self, service: Service, scenario: str, key: str) -> bool:
        """Send the order, and its cancel. Return whether all was answered."""
        async with httpx.AsyncClient(base_url=service.url, trust_env=False, timeout=30) as client:
            response = await client.post("/orders", json=SCENARIOS[scenario].body(), headers={"Idempotency-Key": key})
            if response.status_code != httpx.codes.CREATED:
                return False
            self._answers.add(key, response)
            if not SCENARIOS[scenario].cancels:
                return True
            path = f"{response.headers['location']}/cancel"
            cancel = await client.post(path, headers={"Idempotency-Key": f"cancel-{key}"})
        if is_answered := cancel.is_success or is_too_late(cancel):
            self._answers.add_cancel(response.json()["id"], cancel)
        return is_answered

    async def _dies(self, service: Service) -> bool:
        """Wait until the process has died, or its order has ended without that."""
        quiet_since: float | None = None
        while service.process.poll() is None:
            if not await self._system.is_quiet():
                quiet_since = None
            elif quiet_since is None:
                quiet_since = time.monotonic()
            elif time.monotonic() - quiet_since > FINAL_PATIENCE_SECONDS:
                return False
            await asyncio.sleep(0.02)
        return True

    async def _recover(self, scenario: str, key: str) -> None:
        """Start another process, send the key until it gets a 201, and wait until all is done."""
        log = self._directory / "logs" / "recovering.log"
        async with Service({**self._env, **RECOVERING}, log=log) as service:

            async def answers() -> bool:
                with contextlib.suppress(httpx.TransportError):
                    return await self._send(service, scenario, key)
                return False

            await wait_until(answers, PATIENCE_SECONDS, f"a 201 for {key}")
            await self._until_quiet()

    async def _until_quiet(self) -> None:
        await wait_until(self._system.is_quiet, PATIENCE_SECONDS, "end of every order")

    async def _violations(self) -> list[str]:
        async with httpx.AsyncClient(base_url=self._system.sandbox.url, trust_env=False, timeout=60) as sandbox:
            return await violations(self._system.postgres.url, sandbox, self._answers)


async def sweep(directory: Path, scenarios: list[str], every: int) -> list[PointResult]:
    """Sweep over every `every`th point of these scenarios."""
    results: list[PointResult] = []
    async with running(directory, processes={}) as system:
        runs = Sweep(system, directory)
        for scenario in scenarios:
            points = await runs.record(scenario)
            typer.echo(f"{scenario}: {len(points)} points", err=True)
            for point in points[::every]:
                results.append(result := await runs.die_at(scenario, point))
                typer.echo(f"  {point:<90} {'; '.join(result.violations) or 'recovered'}")
                if result.violations:
                    return results
    return results


def main(
    scenario: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(SCENARIOS)}; default: all.")] = None,
    every: Annotated[int, typer.Option(min=1, help="Die only at every so many points.")] = 1,
    output: Annotated[Path | None, typer.Option(help="Write the result as JSON to this file.")] = None,
) -> None:
    """Kill the service at every point of an order's way, and check that it recovers. Exit 1 if it does not."""
    chosen = scenario or list(SCENARIOS)
    if unknown := set(chosen) - set(SCENARIOS):
        raise typer.BadParameter(f"there is no scenario {', '.join(unknown)}", param_hint="--scenario")
    servers = ControllerRun()
    try:
        results = asyncio.run(sweep(servers.directory, chosen, every))
    finally:
        keep_logs(servers.directory, Path("chaos-report"))
        servers.close()
    failed = [result for result in results if result.violations]
    typer.echo(f"{len(results)} points: {len(results) - len(failed)} recovered, {len(failed)} did not")
    if output is not None:
        output.write_text(json.dumps([dataclasses.asdict(result) for result in results], indent=1))
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    typer.run(main)
