"""Place orders as good clients do: each with a key, sent again until there is an answer, whatever happens meanwhile."""

import asyncio
import itertools
import json
import secrets
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from http import HTTPStatus

import structlog

from app.demo.playground.events import Events
from app.errors import RequestError
from app.loops import Backoff
from app.partners.http import HttpClient, Interrupted, NotConnected, Reply, Target

log = structlog.get_logger(__name__)

MAX_ORDERS = 1000
MAX_WAITING = 5000
CLIENTS = 8  # of a batch
ATTEMPT_SECONDS = 3.0
RETRIES = Backoff(base_seconds=0.5, cap_seconds=2)
SHORT_SECONDS = 0.3
MAX_ANSWER_BYTES = 64 * 1024
RETRIED = frozenset({HTTPStatus.CONFLICT, HTTPStatus.TOO_MANY_REQUESTS})  # and 5xx: the key makes that safe
GOODS = (("BREAD", "3.20"), ("COFFEE", "7.50"), ("HONEY", "5.90"))


class TooManyWaiting(RequestError):
    """Too many orders of the playground have no answer yet."""


class _Batch:
    """Orders that are placed together. `left`: those without an answer. `refused`: answers but 201, by status."""

    def __init__(self, left: int) -> None:
        self.left = left
        self.refused: Counter[int] = Counter()

    def describe_refused(self) -> str:
        """Return the end of a sentence, which is empty if nothing was refused."""
        return "".join(f"; {number:,} got {status}" for status, number in sorted(self.refused.items()))


class Customers:
    """The clients of the service at `url`. What they saw becomes events, a few for each batch."""

    def __init__(self, http: HttpClient, url: str, events: Events) -> None:
        self._http = http
        self._target = Target.parse(url)
        self._events = events
        self._batches: dict[asyncio.Task[None], _Batch] = {}

    @property
    def waiting(self) -> int:
        """Return how many orders have no answer yet."""
        return sum(batch.left for batch in self._batches.values())

    async def place(self, number: int) -> None:
        """Start to place so many orders, and wait a moment for them. Raises TooManyWaiting."""
        await self._start(partial(self._place, number), number)

    async def send_one_key(self, times: int) -> None:
        """Start to send one order with one key so many times at once, and wait a moment. Raises TooManyWaiting."""
        await self._start(partial(self._send_one_key, times), 1)

    async def close(self) -> None:
        """Give up what is not answered."""
        tasks = list(self._batches)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _start(self, send: Callable[[_Batch], Awaitable[None]], number: int) -> None:
        if self.waiting + number > MAX_WAITING:
            raise TooManyWaiting(f"{self.waiting} orders wait for an answer already: repair everything, then try again")
        batch = _Batch(number)
        task = asyncio.create_task(self._run(send, batch))
        self._batches[task] = batch
        task.add_done_callback(self._batches.pop)
        # A browser without scripts then shows them at once. It must not wait for long if the service is down.
        await asyncio.wait([task], timeout=SHORT_SECONDS)

    async def _run(self, send: Callable[[_Batch], Awaitable[None]], batch: _Batch) -> None:
        try:
            await send(batch)
        except Exception:
            log.exception("playground.batch_failed")
            self._events.add("placing orders failed; the terminal shows the error")

    async def _place(self, number: int, batch: _Batch) -> None:
        self._events.add(f"you place {number:,} orders" if number > 1 else "you place 1 order")
        started_at = time.monotonic()
        keys = iter(range(number))
        run = secrets.token_hex(4)
        async with asyncio.TaskGroup() as clients:
            for _ in range(min(number, CLIENTS)):
                clients.create_task(self._be_client(run, keys, batch))
        placed = number - batch.refused.total()
        orders = "1 order has its 201" if placed == 1 else f"{placed:,} orders have their 201s"
        took = f"after {time.monotonic() - started_at:.1f}\u00a0s"
        self._events.add(f"{orders}, {took}{batch.describe_refused()}")

    async def _be_client(self, run: str, numbers: Iterator[int], batch: _Batch) -> None:
        for number in numbers:
            await self._send(f"playground-{run}-{number}", _make_order(number), batch)
            batch.left -= 1

    async def _send_one_key(self, times: int, batch: _Batch) -> None:
        key = f"playground-{secrets.token_hex(4)}"
        replies = await asyncio.gather(*(self._send(key, _make_order(0), batch) for _ in range(times)))
        created = [reply for reply in replies if reply.status == HTTPStatus.CREATED]
        ids = {reply.headers.get("location", "").rpartition("/")[2] for reply in created}
        answers = len({reply.body for reply in created})
        same = "all the same, byte for byte" if answers == 1 else f"{answers} different ones"
        made = "one order" if len(ids) == 1 else f"{len(ids)} orders, which must not happen"
        got = f", got {len(created)} answers, {same}, and made {made}" if created else ", made no order"
        text = f"one key, sent {times} times at once{got}{batch.describe_refused()}"
        self._events.add(text, ids.pop() if len(ids) == 1 else "")

    async def _send(self, key: str, body: bytes, batch: _Batch) -> Reply:
        """Send one order until it has an answer that no retry changes."""
        fields = {"Content-Type": "application/json", "Idempotency-Key": key}
        request = self._target.request("POST", "/orders", fields, body)
        for attempt in itertools.count():
            if attempt:
                await asyncio.sleep(RETRIES.pause(attempt))
            try:
                async with asyncio.timeout(ATTEMPT_SECONDS):
                    reply = await self._http.exchange(self._target, request, ATTEMPT_SECONDS, MAX_ANSWER_BYTES)
            except (TimeoutError, NotConnected, Interrupted):
                continue
            if reply.status not in RETRIED and reply.status < HTTPStatus.INTERNAL_SERVER_ERROR:
                break
        if reply.status != HTTPStatus.CREATED:
            batch.refused[reply.status] += 1
        return reply


def _make_order(number: int) -> bytes:
    sku, price = GOODS[number % len(GOODS)]
    item = {"sku": sku, "quantity": number % 3 + 1, "unit_price": price}
    return json.dumps({"customer_id": "cus_playground", "items": [item]}).encode()
