"""Send HTTP requests as fast as one process can, on kept connections.

The generator must not be the bottleneck: requests are bytes made beforehand except for their key, and of a response
only the status and the length are read. It takes about 20 µs of a core per request. All contenders get the same one.
"""

import asyncio
import itertools
import math
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Self, cast

BODY = b'{"items":[{"sku":"WIDGET","quantity":3,"unit_price":"9.99"}]}'
CREATED, REFUSED = 201, 503
HEAD_END = b"\r\n\r\n"
LENGTH = b"content-length:"


@dataclass
class Traffic:
    """The answers of one window. `latencies` are in seconds."""

    seconds: float = 0.0
    latencies: list[float] = field(default_factory=list)  # of the answers 201
    refused: int = 0  # with 503

    @property
    def rate(self) -> float:
        """Return answers per second."""
        return len(self.latencies) / self.seconds

    def percentile_ms(self, share: float) -> float:
        """Return this percentile of the latencies, in milliseconds."""
        return percentile(self.latencies, share) * 1000


def percentile(values: Sequence[float], share: float) -> float:
    """Return the smallest value that `share` of the values do not exceed."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def new_keys() -> Iterator[bytes]:
    """Yield keys that no other run uses."""
    run = uuid.uuid4().hex
    return (b"%s-%d" % (run.encode(), number) for number in itertools.count())


def orders(keys: Iterator[bytes]) -> Iterator[bytes]:
    """Yield requests that place an order, one for each key."""
    head = b"POST /orders HTTP/1.1\r\nhost: bench\r\ncontent-type: application/json\r\ncontent-length: %d\r\n" % len(
        BODY
    )
    return (b"%sidempotency-key: %s\r\n\r\n%s" % (head, key, BODY) for key in keys)


class Connection(asyncio.Protocol):
    """One kept connection. `answered` is called with itself and the status when a response is complete."""

    def __init__(self, answered: Callable[["Connection", int], None], failed: Callable[[str], None]) -> None:
        self._answered = answered
        self._failed = failed
        self._transport: asyncio.Transport | None = None
        self._buffer = b""
        self.due_at = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self._transport = cast("asyncio.Transport", transport)  # of a TCP connection

    def send(self, request: bytes, due_at: float) -> None:
        """Send a request, from whose `due_at` its latency counts. The answer to the last one must be complete."""
        if self._transport is None:
            raise RuntimeError("bug: not connected")
        self.due_at = due_at
        self._transport.write(request)

    def data_received(self, data: bytes) -> None:
        """Read until the response is complete."""
        self._buffer += data
        end = self._buffer.find(HEAD_END)
        if end < 0:
            return
        head = self._buffer[:end].lower()
        at = head.find(LENGTH)
        if at < 0:
            self._failed(f"an answer without Content-Length: {self._buffer[:300]!r}")
            return
        length = int(head[at + len(LENGTH) :].split(b"\r\n", 1)[0])
        if len(self._buffer) < end + len(HEAD_END) + length:
            return
        status = int(head[9:12])
        if status not in {CREATED, REFUSED}:
            self._failed(f"neither 201 nor 503: {self._buffer[:600]!r}")
            return
        self._buffer = b""
        self._answered(self, status)

    def connection_lost(self, _: Exception | None) -> None:
        """Report an end that `close` did not ask for."""
        if self._transport is not None:
            self._failed("the contender closed a connection")

    def close(self) -> None:
        """Close the connection."""
        transport, self._transport = self._transport, None
        if transport is not None:
            transport.close()


class Client:
    """Keeps `connections` connections to each port, and sends requests on them. `refusable`: a 503 is no failure."""

    def __init__(
        self, ports: int | Sequence[int], connections: int, requests: Iterator[bytes], *, refusable: bool = False
    ) -> None:
        self._ports = [ports] if isinstance(ports, int) else ports
        self._count = connections
        self._refusable = refusable
        self._requests = requests
        self._connections: list[Connection] = []
        self._idle: deque[Connection] = deque()
        self._is_greedy = False
        self._owed: deque[float] = deque()  # since when, on perf_counter
        self._traffic = Traffic()
        self._quiet = asyncio.Event()
        self._failure: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def __aenter__(self) -> Self:
        loop = asyncio.get_running_loop()
        for _, port in itertools.product(range(self._count), self._ports):
            _, connection = await loop.create_connection(
                lambda: Connection(self._on_answer, self._on_failure), "127.0.0.1", port
            )
            self._connections.append(connection)
        self._idle.extend(self._connections)
        return self

    async def __aexit__(self, *_: object) -> None:
        for connection in self._connections:
            connection.close()
        self._failure.cancel()

    async def saturate(self, seconds: float) -> Traffic:
        """Send on every connection the next request as soon as the last one is answered. Raises RuntimeError."""
        self._is_greedy = True
        begin = self._begin()
        while self._idle:
            self._send(self._idle.popleft(), begin)
        await self._wait(seconds)
        traffic = self._end(begin)
        self._is_greedy = False
        await self.settle()
        return traffic

    @property
    def traffic(self) -> Traffic:
        """The answers since the last window began."""
        return self._traffic

    def owe(self, count: int, due_at: float | None = None) -> None:
        """Send so many requests more, as connections become idle. Their latency counts from `due_at`; default: now."""
        self._owed.extend([time.perf_counter() if due_at is None else due_at] * count)
        while self._owed and self._idle:
            self._send(self._idle.popleft(), self._owed.popleft())

    async def collect(self, seconds: float) -> Traffic:
        """Return the answers of the next `seconds` to requests that others `owe`. Raises RuntimeError."""
        begin = self._begin()
        await self._wait(seconds)
        return self._end(begin)

    async def pace(self, seconds: float, per_second: float) -> Traffic:
        """Send requests at even times, no matter how long the answers take. Raises RuntimeError.

        Latencies count from the time at which a request was due, so one that has to wait for a connection is not late
        for free.
        """
        begin = self._begin()
        for number in range(int(seconds * per_second)):
            await self._wait(begin + number / per_second - time.perf_counter())
            self.owe(1, begin + number / per_second)
        await self._wait(begin + seconds - time.perf_counter())
        traffic = self._end(begin)
        await self.settle()
        return traffic

    async def settle(self) -> None:
        """Return when every request that was owed is answered. Raises RuntimeError."""
        while self._owed or len(self._idle) < len(self._connections):
            self._quiet.clear()
            waiting = asyncio.ensure_future(self._quiet.wait())
            await asyncio.wait((waiting, self._failure), return_when=asyncio.FIRST_COMPLETED)
            waiting.cancel()
            if self._failure.done():
                self._failure.result()

    def _begin(self) -> float:
        self._traffic = Traffic()
        return time.perf_counter()

    def _end(self, begin: float) -> Traffic:
        self._traffic.seconds = time.perf_counter() - begin
        return self._traffic

    async def _wait(self, seconds: float) -> None:
        await asyncio.wait((self._failure,), timeout=max(seconds, 0))
        if self._failure.done():
            self._failure.result()

    def _send(self, connection: Connection, due_at: float) -> None:
        connection.send(next(self._requests), due_at)

    def _on_answer(self, connection: Connection, status: int) -> None:
        if status == CREATED:
            self._traffic.latencies.append(time.perf_counter() - connection.due_at)
        elif self._refusable:
            self._traffic.refused += 1
        else:
            self._on_failure("the contender refused a request")
        if self._is_greedy:
            self._send(connection, time.perf_counter())
            return
        self._idle.append(connection)
        self._quiet.set()
        self.owe(0)

    def _on_failure(self, reason: str) -> None:
        if not self._failure.done():
            self._failure.set_exception(RuntimeError(reason))


async def saturate(port: int, connections: int, requests: Iterator[bytes], seconds: float) -> Traffic:
    """Saturate a contender on new connections: servers close those that were idle while others had their turn."""
    async with Client(port, connections, requests) as client:
        return await client.saturate(seconds)


async def send_each(port: int, connections: int, requests: Sequence[bytes]) -> None:
    """Send each request once."""
    async with Client(port, connections, iter(requests)) as client:
        client.owe(len(requests))
        await client.settle()
