"""Place orders as good clients do: each with a key, sent again until there is an answer, whatever happens meanwhile."""

import asyncio
import itertools
import json
import secrets
import time
from collections.abc import Coroutine, Iterator
from http import HTTPStatus
from typing import Any

from app.demo.playground.events import Events
from app.errors import RequestError
from app.loops import Backoff
from app.partners.http import HttpClient, Interrupted, NotConnected, Reply, Target

MAX_ORDERS = 1000
MAX_WAITING = 5000
CLIENTS = 8  # of a batch
ATTEMPT_SECONDS = 3.0
RETRIES = Backoff(base_seconds=0.5, cap_seconds=2)
SHORT_SECONDS = 0.3
MAX_ANSWER_BYTES = 64 * 1024
RETRIED = frozenset({HTTPStatus.CONFLICT, HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE})
GOODS = (("BREAD", "3.20"), ("COFFEE", "7.50"), ("HONEY", "5.90"))


class TooManyWaiting(RequestError):
    """Too many orders of the playground have no answer yet."""


class Customers:
    """The clients of the service at `url`. What they saw becomes events."""

    def __init__(self, http: HttpClient, url: str, events: Events) -> None:
        self.waiting = 0  # orders that have no 201 yet
        self._http = http
        self._target = Target.parse(url)
        self._events = events
        self._batches: set[asyncio.Task[None]] = set()

    async def place(self, number: int) -> None:
        """Start to place so many orders, and wait a moment for them. Raises TooManyWaiting."""
        await self._start(self._place(number), number)

    async def send_one_key(self, times: int) -> None:
        """Start to send one order with one key so many times at once, and wait a moment. Raises TooManyWaiting."""
        await self._start(self._send_one_key(times), 1)

    async def close(self) -> None:
        """Give up what is not answered."""
        for batch in self._batches:
            batch.cancel()
        await asyncio.gather(*self._batches, return_exceptions=True)

    async def _start(self, batch: Coroutine[Any, Any, None], number: int) -> None:
        if self.waiting + number > MAX_WAITING:
            batch.close()
            raise TooManyWaiting(f"{self.waiting} orders wait for an answer already: repair everything, then try again")
        self.waiting += number
        task = asyncio.create_task(batch)
        self._batches.add(task)
        task.add_done_callback(self._batches.discard)
        # A browser without scripts then shows them at once. It must not wait for long if the service is down.
        await asyncio.wait([task], timeout=SHORT_SECONDS)

    async def _place(self, number: int) -> None:
        self._events.add(f"you place {number:,} orders" if number > 1 else "you place 1 order")
        started_at = time.monotonic()
        keys = iter(range(number))
        run = secrets.token_hex(4)
        await asyncio.gather(*(self._be_client(run, keys) for _ in range(min(number, CLIENTS))))
        orders = "1 order has its 201" if number == 1 else f"{number:,} orders have their 201s"
        self._events.add(f"{orders}, after {time.monotonic() - started_at:.1f}\u00a0s")

    async def _be_client(self, run: str, numbers: Iterator[int]) -> None:
        for number in numbers:
            await self._send(f"playground-{run}-{number}", _make_order(number))
            self.waiting -= 1

    async def _send_one_key(self, times: int) -> None:
        key = f"playground-{secrets.token_hex(4)}"
        replies = await asyncio.gather(*(self._send(key, _make_order(0)) for _ in range(times)))
        self.waiting -= 1
        ids = {reply.headers.get("location", "").rpartition("/")[2] for reply in replies}
        answers = {reply.body for reply in replies}
        same = "all the same, byte for byte" if len(answers) == 1 else f"{len(answers)} different ones"
        made = "one order" if len(ids) == 1 else f"{len(ids)} orders, which must not happen"
        self._events.add(
            f"one key, sent {times} times at once, got {times} answers, {same}, and made {made}", ids.pop()
        )

    async def _send(self, key: str, body: bytes) -> Reply:
        """Send one order until it is answered with 201. Other answers that no retry changes become events."""
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
            if reply.status not in RETRIED:
                break
        if reply.status != HTTPStatus.CREATED:
            self._events.add(f"an order got {reply.status}: {reply.body.decode(errors='replace')[:200]}")
        return reply


def _make_order(number: int) -> bytes:
    sku, price = GOODS[number % len(GOODS)]
    item = {"sku": sku, "quantity": number % 3 + 1, "unit_price": price}
    return json.dumps({"customer_id": "cus_playground", "items": [item]}).encode()
