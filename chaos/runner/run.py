"""One run: start the system, send the load while the schedule injects its faults, wait until all is quiet, judge."""

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import typer

import load
from chaos.bugs import Catch
from chaos.runner import LIVENESS_SECONDS, faults, reach
from chaos.runner.faults.clocks import JUMP_SECONDS
from chaos.runner.measure import Sampler, sampling
from chaos.runner.schedule import FaultKind, Injection, plan
from chaos.runner.system import System, running
from chaos.runner.verdict import HOLDS, ChaosVerdict, InjectedFault, recovery
from chaos.sweep.result import SweepResult
from chaos.versions import read_versions
from tests.harness.checker import Answers, violations
from tests.harness.commands import orders

ORDERS_PER_SECOND = 40.0  # two cores carry it beside everything else
SHORTEST_SECONDS = 60.0
FULL_RUN = 5000  # orders; from here on every state has to be reached, and no fault may be impossible
LEDGER_PAGE = 1000
QUIET_POLL_SECONDS = 0.5


@dataclass(frozen=True)
class RunConfig:
    """One run. `only`: parts of the names of faults; empty: all. `bugs`, `sweep`: results for the report.

    `rate`: orders per second, which also decides how long faults are injected.
    """

    orders: int
    seed: int
    only: Sequence[str] = ()
    command: str = ""
    bugs: Sequence[Catch] = ()
    broker_nodes: int = 1
    sweep: SweepResult | None = None
    rate: float = ORDERS_PER_SECOND

    @property
    def duration_seconds(self) -> float:
        """Return how long orders are sent and faults injected."""
        return max(SHORTEST_SECONDS, self.orders / self.rate)

    @property
    def is_full(self) -> bool:
        """Return whether every state has to be reached, and every fault to be possible."""
        return self.orders >= FULL_RUN and not self.only

    def kinds(self) -> list[FaultKind]:
        """Return the faults of this run."""
        possible = [kind for kind in faults.kinds(self.broker_nodes) if kind.name not in faults.impossible()]
        return [kind for kind in possible if not self.only or any(part in kind.name for part in self.only)]


async def run(config: RunConfig, directory: Path) -> ChaosVerdict:
    """Run it. Everything that it starts ends with it."""
    async with running(directory, broker_nodes=config.broker_nodes) as system:
        first = await _warm_up(system)
        sampler, histories = Sampler(system.postgres.url), load.Histories()
        async with sampling(sampler):
            injecting = asyncio.create_task(_inject_all(config, system, sampler.started_at))
            try:
                observed = await load.observe(_load_config(config, system), histories)
                injected = await injecting
            finally:
                injecting.cancel()
                await asyncio.wait([injecting])
            settled = await _wait_until_quiet(system, sampler.started_at + injected[-1].to_second)
        series = sampler.series(histories)
        verified = await _verify(system)
        async with httpx.AsyncClient(base_url=system.sandbox.url, trust_env=False, timeout=60) as sandbox:
            entries = await _ledger(sandbox)
            found = await violations(system.postgres.url, sandbox, _answers(first, histories))
        evidence = reach.collect([*system.logs(), *system.older_logs()], entries, observed, system.met)
        return ChaosVerdict(
            seed=config.seed,
            orders=config.orders,
            command=config.command,
            versions=await read_versions(system.postgres.url),
            load=load.judge(observed),
            checker=found,
            verified=verified,
            failed_requests=reach.count_events(system.logs())[reach.FAILED_REQUEST],
            failed_by_older=reach.count_events(system.older_logs())[reach.FAILED_REQUEST],
            settled_seconds=settled,
            faults=[replace(fault, recovered_seconds=recovery(series, fault.to_second)) for fault in injected],
            reached=reach.reached(evidence),
            series=series,
            bugs=config.bugs,
            sweep=config.sweep,
            required=list(reach.STATES) if config.is_full else (),
            impossible=faults.impossible() if config.is_full else {},
        )


def _load_config(config: RunConfig, system: System) -> load.LoadConfig:
    return load.LoadConfig(
        urls=system.urls,
        sandbox_url=system.sandbox.url,
        orders=config.orders,
        rate=config.orders / config.duration_seconds,
        clients=64,
        settle_seconds=LIVENESS_SECONDS,
        clock_error_seconds=max(JUMP_SECONDS),
        seed=config.seed,
    )


async def _warm_up(system: System) -> load.Histories:
    """Place one order, so that the topology is declared, and written to disk, before the first fault."""
    config = load.LoadConfig(urls=system.urls, sandbox_url=system.sandbox.url, orders=1, clients=1, settle_seconds=60)
    histories = load.Histories()
    verdict = load.judge(await load.observe(config, histories))
    if verdict.outcome != "holds":
        raise RuntimeError(f"the system does not work without faults:\n{load.as_text(verdict)}")
    await system.rabbitmq.sync()
    return histories


async def _inject_all(config: RunConfig, system: System, started_at: float) -> list[InjectedFault]:
    injections = plan(config.seed, config.duration_seconds, config.kinds())
    locks = {injection.kind.component: asyncio.Lock() for injection in injections}
    done = await asyncio.gather(
        *(_inject(injection, system, started_at, locks[injection.kind.component]) for injection in injections)
    )
    await system.recover()
    return sorted(done, key=lambda fault: fault.to_second)


async def _inject(injection: Injection, system: System, started_at: float, component: asyncio.Lock) -> InjectedFault:
    """Inject one fault when it is due, and when the last one of its component has been repaired."""
    await asyncio.sleep(max(0.0, started_at + injection.at_seconds - time.monotonic()))
    async with component:
        from_second, error = time.monotonic() - started_at, None
        try:
            await faults.inject(injection, system)
        except Exception as failure:  # noqa: BLE001 - the report names it, and the run fails
            error = f"{type(failure).__name__}: {failure}".strip().splitlines()[0]
            typer.echo(f"the fault failed, and so does the run: {injection.kind.name}: {error}", err=True)
    return InjectedFault(
        injection.kind.name, injection.kind.component, from_second, time.monotonic() - started_at, error
    )


async def _wait_until_quiet(system: System, last_fault_at: float) -> float | None:
    """Return the seconds from the last fault until everything had ended; None if it took too long."""
    while not await system.is_quiet():
        if time.monotonic() - last_fault_at > LIVENESS_SECONDS:
            return None
        await asyncio.sleep(QUIET_POLL_SECONDS)
    return time.monotonic() - last_fault_at


async def _verify(system: System) -> dict[str, str]:
    """Run `orders verify` as an operator would, after purging the dead letters of rubbish messages."""
    servers = {"database_url": system.postgres.url, "rabbitmq_url": system.rabbitmq.url()}
    partners = dict.fromkeys(("inventory_url", "payment_url", "shipping_url"), system.sandbox.url)
    await orders("dlq", "purge", "--reason", "rubbish of the run", **servers)
    code, out, err = await orders("verify", "--json", **servers, **partners)
    if not out:
        return {"I1 to I9": f"exit {code}: {err.strip()}"}
    rows = json.loads(out)["invariants"]
    return {
        row["invariant"]: row["status"]
        if row["status"] == HOLDS
        else f"{row['status']}: {row['detail']} {row['examples'][:3]}"
        for row in rows
    }


async def _ledger(sandbox: httpx.AsyncClient) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = []
    while True:
        after = entries[-1]["seq"] if entries else 0
        page = (await sandbox.get("/ledger", params={"after": after, "limit": LEDGER_PAGE})).raise_for_status()
        entries += page.json()["entries"]
        if len(page.json()["entries"]) < LEDGER_PAGE:
            return entries


def _answers(*all_histories: load.Histories) -> Answers:
    return Answers(
        {
            history.order.key: set(history.responses)
            for histories in all_histories
            for history in histories.by_number.values()
        }
    )
