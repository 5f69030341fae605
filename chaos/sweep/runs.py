"""One run: an order, a process that dies at a point of its way, and the recovery."""

import asyncio
import contextlib
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Mapping, Sequence

import httpx

from chaos.sweep.before import FRONT, prepare
from chaos.sweep.scenarios import CommandScenario, JanitorScenario, OrderScenario, Scenario
from chaos.sweep.site import HOOKS, PATIENCE_SECONDS, NotRecovered, Site, place, until_ready
from tests.harness.checker import is_too_late
from tests.harness.processes import Service
from tests.harness.wait import wait_until

# The process that dies must not do anything by itself, or its points would not be the same in each run: it works when
# woken. The one that recovers looks often.
DYING = {"ORDERS_OUTBOX_POLL_SECONDS": "60", "ORDERS_SAGA_POLL_SECONDS": "60"}
TRIES = 4  # at a point, before the sweep fails because the process did not die there
FINAL_PATIENCE_SECONDS = 10.0
SHORT_LIFE = {"ORDERS_IDEMPOTENCY_TTL_SECONDS": "1"}
KILLED = -9


class Runs(ABC):
    """Runs of one scenario."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self._armed = site.directory / "armed"

    async def record(self) -> list[str]:
        """Return the points of one order, in their order."""
        await self._run({})  # what earlier scenarios left behind, such as rows to prune, would add points
        record = self._site.directory / "points"
        record.unlink(missing_ok=True)
        if await self._run({"SWEEP_RECORD": str(record)}):
            raise RuntimeError("bug: the process died without a point")
        return list(dict.fromkeys(record.read_text().splitlines()))

    async def die_at(self, point: str) -> list[str]:
        """Die there, recover, and return what is wrong."""
        try:
            for _ in range(TRIES):
                if await self._run({"SWEEP_POINT": point}):
                    return await self._site.violations()
        except (NotRecovered, AssertionError) as error:  # the latter from a wait for an end
            return [str(error)]
        return [f"the process did not die there, in {TRIES} tries"]

    @abstractmethod
    async def _run(self, sweep: Mapping[str, str]) -> bool:
        """Run one order to its end. `sweep`: the hooks' environment. Return whether the process died."""


class OrderRuns(Runs):
    """A service with all roles serves an order, whose client sends its key again after the death."""

    def __init__(self, site: Site, front: Service | None, scenario: OrderScenario) -> None:
        super().__init__(site)
        self._front = front
        self._scenario = scenario
        self._body = {"items": [{"sku": scenario.sku, "quantity": 3, "unit_price": "9.99"}]}

    async def _run(self, sweep: Mapping[str, str]) -> bool:
        key = self._site.new_key()
        if self._front is not None:
            await self._use_up(self._front, key)
        await self._site.set_faults(self._scenario.faults)
        async with self._dying(sweep) as service:
            with contextlib.suppress(httpx.TransportError):
                await self._send(service, key)
            died = await self._dies(service)
        async with self._site.recovering() as service:
            await wait_until(lambda: self._is_answered(service, key), PATIENCE_SECONDS, f"a 201 for {key}")
        return died

    @contextlib.asynccontextmanager
    async def _dying(self, sweep: Mapping[str, str]) -> AsyncIterator[Service]:
        self._armed.unlink(missing_ok=True)
        within = {"SWEEP_WITHIN": "app.api,app.idempotency"} if self._scenario.takes_over else {}
        settings = {**DYING, "SWEEP_ARMED": str(self._armed), **within, **sweep}
        async with self._site.service("dying", settings, HOOKS) as service:
            await until_ready(service)
            self._armed.touch()
            yield service

    async def _use_up(self, front: Service, key: str) -> None:
        """Place another order with this key, and wait until the key has expired."""
        items = [{"sku": self._scenario.sku, "quantity": 1, "unit_price": "9.99"}]
        self._site.answers.add(f"{key}, expired", await place(front, key, {"items": items}))
        await self._site.until("SELECT expires_at <= clock_timestamp() FROM idempotency_keys WHERE key = $1", key)

    async def _is_answered(self, service: Service, key: str) -> bool:
        with contextlib.suppress(httpx.TransportError):
            return await self._send(service, key)
        return False

    async def _send(self, service: Service, key: str) -> bool:
        """Send the order, and its cancel, once. Return whether all was answered."""
        response = await place(service, key, self._body)
        if response.status_code != httpx.codes.CREATED:
            return False
        self._site.answers.add(key, response)
        if not self._scenario.cancels:
            return True
        async with httpx.AsyncClient(base_url=service.url, trust_env=False, timeout=30) as client:
            path = f"{response.headers['location']}/cancel"
            cancel = await client.post(path, headers={"Idempotency-Key": f"cancel-{key}"})
        if is_answered := cancel.is_success or is_too_late(cancel):
            self._site.answers.add_cancel(response.json()["id"], cancel)
        return is_answered

    async def _dies(self, service: Service) -> bool:
        """Wait until the process has died, or its order has ended without that."""
        quiet_since: float | None = None
        while service.process.poll() is None:
            if not await self._site.system.is_quiet():
                quiet_since = None
            elif quiet_since is None:
                quiet_since = time.monotonic()
            elif time.monotonic() - quiet_since > FINAL_PATIENCE_SECONDS:
                return False
            await asyncio.sleep(0.02)
        return True


class CommandRuns(Runs):
    """An operator's command, or the janitor, works on an order; the operator gives the command again."""

    def __init__(self, site: Site, front: Service, scenario: CommandScenario | JanitorScenario) -> None:
        super().__init__(site)
        self._front = front
        self._scenario = scenario

    async def _run(self, sweep: Mapping[str, str]) -> bool:
        order_id = await prepare(self._site, self._front, self._scenario.before)
        self._armed.touch()
        hooks = {"SWEEP_ARMED": str(self._armed), **sweep}
        if isinstance(self._scenario, JanitorScenario):
            died = await self._run_janitor(self._scenario, order_id, hooks)
        else:
            died = await self._run_command(self._scenario, order_id, hooks)
        async with self._site.recovering():
            pass
        status = await self._site.pool.fetchval("SELECT status FROM orders WHERE id = $1::text::uuid", order_id)
        if status != self._scenario.ends:
            raise NotRecovered(f"order {order_id} is {status}, and not {self._scenario.ends}")
        return died

    async def _run_janitor(self, scenario: JanitorScenario, order_id: str, hooks: Mapping[str, str]) -> bool:
        settings = {"ORDERS_ROLES": "janitor", "ORDERS_PORT": "0", "SWEEP_WITHIN": scenario.loop, **hooks}

        async def is_done() -> object:
            return await self._site.pool.fetchval(scenario.done, order_id)

        return await self._site.run(("serve",), settings, HOOKS, until=is_done) == KILLED

    async def _run_command(self, scenario: CommandScenario, order_id: str, hooks: Mapping[str, str]) -> bool:
        args = _of_order(scenario.args, order_id)
        code = await self._site.run(args, {**scenario.settings, "SWEEP_WITHIN": "", **hooks}, HOOKS)
        if code not in {0, KILLED}:
            raise NotRecovered(f"orders {' '.join(args)} ended with {code}")
        await self._site.command(args, scenario.settings, scenario.again)
        if not await self._site.pool.fetchval(scenario.done, order_id):
            raise NotRecovered(f"not true of {order_id}: {scenario.done}")
        if scenario.finally_:
            await self._site.command(_of_order(scenario.finally_, order_id))
        return code == KILLED


def make_runs(site: Site, front: Service | None, scenario: Scenario) -> Runs:
    """Return the runs of this scenario. `front`: a process with the settings of `front_settings`, if there are any."""
    if isinstance(scenario, OrderScenario):
        return OrderRuns(site, front, scenario)
    if front is None:
        raise RuntimeError("bug: this scenario needs a process that accepts orders")
    return CommandRuns(site, front, scenario)


def front_settings(scenario: Scenario) -> Mapping[str, str] | None:
    """Return the settings of the process that accepts the orders of this scenario; None: the dying one does so."""
    if isinstance(scenario, OrderScenario):
        return {**FRONT, **SHORT_LIFE} if scenario.takes_over else None
    return FRONT


def _of_order(args: Sequence[str], order_id: str) -> list[str]:
    return [order_id if arg == "ORDER" else arg for arg in args]
