"""Send the orders of a run, retry the keys without a 201, wait until all orders have ended, and collect the evidence.

With a rate, each key is due at a fixed time (an open loop), and its latency counts from then, also if it had to wait
for a free client: a slow service cannot hide its delays by slowing the load down (coordinated omission). Without a
rate, each client sends its next key when it has finished with the last one (a closed loop).
"""

import asyncio
import contextlib
import itertools
import random
import secrets
import time
from collections.abc import AsyncIterator, Coroutine, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

import aiohttp

from load.history import HUNG_UP, NO_ANSWER, Histories, KeyHistory
from load.mix import Behaviour, OrderMix
from load.progress import Progress
from load.service import NETWORK_ERRORS, REQUEST_SECONDS, Service
from load.verdict import Observed, Verdict, is_final, judge, number_of

SENDS = 3  # a client gives up a key after this many requests without a 201; the run retries it at the end
PAUSE_SECONDS = 0.3  # before a client retries, on average
LOOK_SECONDS = 0.5  # between looks for unfinished orders
STUCK_NAMED = 20
UNFINISHED = ("pending", "compensating")


@dataclass(frozen=True)
class LoadConfig:
    """One run against a service that has these `urls`.

    `rate`: keys per second; None: as fast as `clients` go. `settle_seconds`: to answer all keys and end all orders.
    `clock_error_seconds`: how far the clocks of the service may be behind; orders carry the time of the process that
    took them.
    """

    urls: Sequence[str]
    sandbox_url: str
    orders: int = 1000
    rate: float | None = None
    clients: int = 32
    settle_seconds: float = 180.0
    clock_error_seconds: float = 0.0
    token: str = ""
    seed: int = 1
    run_id: str = field(default_factory=lambda: secrets.token_hex(4))


async def run(config: LoadConfig) -> Verdict:
    """Run it and judge it. Raises CannotCheck if the service or the ledger cannot be read."""
    return judge(await observe(config, Histories()))


async def observe(config: LoadConfig, histories: Histories) -> Observed:
    """Run it, and collect the evidence; `histories` fills meanwhile. Raises CannotCheck."""
    connector = aiohttp.TCPConnector(limit=2 * config.clients + 2)  # a client may send twice at once
    async with aiohttp.ClientSession(connector=connector) as session:
        service = Service(session, config.urls, config.sandbox_url, config.token)
        started_at = await service.find_start() - timedelta(seconds=config.clock_error_seconds)
        await service.require_access()
        await service.require_ledger()
        return await _Run(config, service, started_at, histories).observe()


class _Run:
    def __init__(self, config: LoadConfig, service: Service, placed_after: datetime, histories: Histories) -> None:
        self._config = config
        self._service = service
        self._placed_after = placed_after
        self._mix = OrderMix(config.run_id, config.seed)
        self._histories = histories
        self._progress = Progress(service, self._histories, config.orders)
        self._seconds = 0.0

    async def observe(self) -> Observed:
        async with _background(self._progress.run()):
            await self._send_all()
            deadline = time.monotonic() + self._config.settle_seconds
            self._progress.phase = "retrying"
            await self._retry_unacknowledged(deadline)
            self._progress.phase = "settling"
            await self._wait_for_ends(deadline)
            self._progress.phase = "checking"
            return await self._collect()

    async def _send_all(self) -> None:
        started_at = time.monotonic()
        numbers = iter(range(self._config.orders))
        await asyncio.gather(*(self._be_client(numbers, started_at) for _ in range(self._config.clients)))
        self._seconds = time.monotonic() - started_at

    async def _be_client(self, numbers: Iterator[int], started_at: float) -> None:
        for number in numbers:
            due_at = time.monotonic()
            if self._config.rate is not None:
                due_at = started_at + number / self._config.rate
                await asyncio.sleep(max(0.0, due_at - time.monotonic()))
            await self._place(self._histories.start(self._mix.order(number), due_at))

    async def _place(self, history: KeyHistory) -> None:
        """Send one key as its client would."""
        sends = SENDS
        match history.order.behaviour:
            case Behaviour.HANGS_UP:
                await self._send(history, history.order.hangs_up_after_seconds)
                sends -= 1
            case Behaviour.SENDS_TWICE:
                sends -= 1
                if any(await asyncio.gather(self._send(history), self._send(history))):
                    return
        for attempt in range(sends):
            if attempt:
                await asyncio.sleep(random.uniform(0.5, 1.5) * PAUSE_SECONDS)  # noqa: S311 - spreading load needs no secrecy
            if await self._send(history):
                if history.order.behaviour is Behaviour.REPEATS:
                    await self._send(history)
                return
        history.gave_up = True

    async def _send(self, history: KeyHistory, timeout_seconds: float = REQUEST_SECONDS) -> bool:
        """Send one request, and record its outcome. Return whether it got a 201."""
        try:
            response = await self._service.place(history.order.key, history.order.body(), timeout_seconds)
        except NETWORK_ERRORS:
            history.outcomes[HUNG_UP if timeout_seconds < REQUEST_SECONDS else NO_ANSWER] += 1
            return False
        return history.add(*response)

    async def _retry_unacknowledged(self, deadline: float) -> None:
        """Retry the keys without a 201 until each has one: only then is it known which orders exist."""
        while (waiting := self._histories.unacknowledged()) and time.monotonic() < deadline:
            histories = iter(waiting)

            async def retry(histories: Iterator[KeyHistory] = histories) -> None:
                for history in histories:
                    await self._send(history)

            await asyncio.gather(*(retry() for _ in range(self._config.clients)))
            await asyncio.sleep(LOOK_SECONDS)

    async def _wait_for_ends(self, deadline: float) -> None:
        while await self._has_unfinished():
            if time.monotonic() >= deadline:
                return
            await asyncio.sleep(LOOK_SECONDS)

    async def _has_unfinished(self) -> bool:
        for status in UNFINISHED:
            async for order in self._service.orders(self._placed_after, self._config.settle_seconds, status=status):
                if self._is_ours(order):
                    return True
        return False

    def _is_ours(self, order: dict[str, str | None]) -> bool:
        return str(order["customer_id"]).startswith(self._mix.customer_prefix)

    async def _collect(self) -> Observed:
        patience = self._config.settle_seconds
        listed = self._service.orders(self._placed_after, patience)
        orders = {order["id"]: order async for order in listed if self._is_ours(order)}
        unlisted = {id_ for history in self._histories.by_number.values() for id_ in history.order_ids} - orders.keys()
        found = {id_: await self._service.find_order(id_, patience) for id_ in sorted(unlisted)}
        orders |= {id_: order for id_, order in found.items() if order is not None and self._is_ours(order)}
        ledger = {id_: row async for id_, row in self._service.ledger(patience) if id_ in orders}
        stuck = [id_ for id_, order in orders.items() if not is_final(order)]
        reasons = {id_: await self._service.why_stuck(id_) for id_ in itertools.islice(stuck, STUCK_NAMED)}
        return Observed(
            keys=self._config.orders,
            seconds=self._seconds,
            histories=self._histories,
            orders={id_: order for id_, order in orders.items() if number_of(order) in self._histories.by_number},
            missing=[id_ for id_, order in found.items() if order is None],
            ledger=ledger,
            stock={item: await self._service.stock(item, patience) for item in self._mix.items()},
            stuck={id_: reason for id_, reason in reasons.items() if reason},
        )


@contextlib.asynccontextmanager
async def _background(work: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    task = asyncio.create_task(work)
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])
