"""The same job by hand, the least that Python can do it with: no framework, writes in groups, raw AMQP, bare HTTP.

It is as durable as the other floors: an order, its event, each step and the end are committed before what follows. As
they, it has no leases, no compensation, no limits and no observability, and it checks only what it has to read.
"""

import asyncio
import contextlib
import json
import os
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any, cast
from uuid import UUID, uuid4

import aiormq
import asyncpg
import httptools
import uvloop
from aiormq.abc import DeliveredMessage
from pamqp.commands import Basic

from bench.floors import events, steps
from bench.floors.steps import STEPS, Line, Step

BATCH, PREFETCH, CONNECTIONS = 200, 256, 4
PARTNERS_HOST, _, PARTNERS_PORT = os.environ["PARTNERS_URL"].removeprefix("http://").partition(":")
TABLES = """
    CREATE TABLE orders (
        id uuid PRIMARY KEY, idempotency_key text UNIQUE, status text NOT NULL, step text, lines jsonb NOT NULL,
        total_minor bigint NOT NULL, placed_at timestamptz NOT NULL DEFAULT now(), updated_at timestamptz
    );
    CREATE TABLE outbox (
        id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, type text NOT NULL, data jsonb NOT NULL,
        published_at timestamptz
    );
    CREATE INDEX ON outbox (id) WHERE published_at IS NULL
"""
PLACE = f"""
    WITH placed AS (
        INSERT INTO orders (id, idempotency_key, status, lines, total_minor)
        SELECT id, key, 'pending', lines, total
        FROM unnest($1::uuid[], $2::text[], $3::jsonb[], $4::bigint[]) AS given (id, key, lines, total)
        ON CONFLICT DO NOTHING RETURNING id, lines
    )
    INSERT INTO outbox (type, data)
    SELECT '{events.PLACED}', jsonb_build_object('order_id', id, 'lines', lines) FROM placed
    RETURNING data ->> 'order_id'
"""  # noqa: S608 - a constant
KNOWN = "SELECT idempotency_key, id FROM orders WHERE idempotency_key = ANY($1)"
RECORD = f"""
    WITH recorded AS (
        UPDATE orders SET step = given.step, status = given.status, updated_at = now()
        FROM unnest($1::uuid[], $2::text[], $3::text[]) AS given (id, step, status) WHERE orders.id = given.id
        RETURNING orders.id, orders.status
    )
    INSERT INTO outbox (type, data)
    SELECT '{events.CONFIRMED}', jsonb_build_object('order_id', id) FROM recorded WHERE status = 'confirmed'
"""  # noqa: S608 - a constant
PENDING = f"SELECT id, type, data FROM outbox WHERE published_at IS NULL ORDER BY id LIMIT {BATCH}"  # noqa: S608 - a constant
PUBLISHED = "UPDATE outbox SET published_at = now() WHERE id = ANY($1)"
CREATED = b"HTTP/1.1 201 Created\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s"


class Group:
    """Writes the rows that come while the last group is written."""

    def __init__(self, write: Callable[[list[Any]], Awaitable[list[Any]]]) -> None:
        self._write = write
        self._rows: list[tuple[Any, asyncio.Future[Any]]] = []
        self._task: asyncio.Task[None] | None = None

    async def add(self, row: Any) -> Any:
        """Return the result of the row."""
        result = asyncio.get_running_loop().create_future()
        self._rows.append((row, result))
        if self._task is None:
            self._task = asyncio.create_task(self._run())
        return await result

    async def _run(self) -> None:
        while self._rows:
            rows, self._rows = self._rows, []
            for (_, result), value in zip(rows, await self._write([row for row, _ in rows]), strict=True):
                result.set_result(value)
        self._task = None


class Http(asyncio.Protocol):
    """One HTTP/1.1 connection. `handle` gets the key and the body of each message."""

    def __init__(self, handle: Callable[["Http", str, bytes], None], parser: Callable[[Any], Any]) -> None:
        self._handle = handle
        self._parser = parser(self)
        self._key, self._body = "", b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self.transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        """Parse."""
        self._parser.feed_data(data)

    def on_message_begin(self) -> None:
        """Begin a message."""
        self._key, self._body = "", b""

    def on_header(self, name: bytes, value: bytes) -> None:
        """Keep the key."""
        if name.lower() == b"idempotency-key":
            self._key = value.decode()

    def on_body(self, body: bytes) -> None:
        """Keep the body."""
        self._body += body

    def on_message_complete(self) -> None:
        """Hand the message over."""
        self._handle(self, self._key, self._body)


class Partners:
    """Kept connections to the partners."""

    def __init__(self) -> None:
        self._idle: deque[Http] = deque()
        self._answers: dict[Http, asyncio.Future[None]] = {}

    async def call(self, step: Step, order_id: str, lines: list[Line]) -> None:
        """Make one call."""
        loop = asyncio.get_running_loop()
        connection = self._idle.pop() if self._idle else await self._connect()
        body = json.dumps(steps.body(step, order_id, lines)).encode()
        head = f"POST {step.path} HTTP/1.1\r\nHost: partner\r\nIdempotency-Key: {steps.key(step, order_id)}\r\n"
        answer = self._answers[connection] = loop.create_future()
        connection.transport.write(
            f"{head}Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body
        )
        await answer
        self._idle.append(connection)

    async def _connect(self) -> Http:
        _, connection = await asyncio.get_running_loop().create_connection(
            lambda: Http(self._answer, httptools.HttpResponseParser), PARTNERS_HOST, int(PARTNERS_PORT)
        )
        return connection

    def _answer(self, connection: Http, _key: str, _body: bytes) -> None:
        self._answers.pop(connection).set_result(None)


class Service:
    """Accepts orders, publishes their events and finishes them."""

    def __init__(self, pool: asyncpg.Pool, channel: aiormq.abc.AbstractChannel) -> None:
        self._pool = pool
        self._channel = channel
        self._partners = Partners()
        self._places, self._records = Group(self._place), Group(self._record)
        self._placed = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    def accept(self, connection: Http, key: str, body: bytes) -> None:
        """Accept an order."""
        self._start(self._accept(connection, key, body))

    def _start(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _accept(self, connection: Http, key: str, body: bytes) -> None:
        lines = [
            {
                "sku": item["sku"],
                "quantity": item["quantity"],
                "unit_price_minor": round(float(item["unit_price"]) * 100),
            }
            for item in json.loads(body)["items"]
        ]
        total = sum(line["quantity"] * line["unit_price_minor"] for line in lines)
        order_id = await self._places.add((uuid4(), key, json.dumps(lines), total))
        answer = json.dumps({"id": str(order_id), "status": "pending", "items": lines, "total_minor": total}).encode()
        connection.transport.write(CREATED % (len(answer), answer))

    async def _place(self, rows: list[Any]) -> list[UUID]:
        placed = {UUID(row[0]) for row in await self._pool.fetch(PLACE, *map(list, zip(*rows, strict=True)))}
        self._placed.set()
        ids: dict[str, UUID] = {}
        if known := [row[1] for row in rows if row[0] not in placed]:
            found = await self._pool.fetch(KNOWN, known)
            ids = {row["idempotency_key"]: row["id"] for row in found}
        return [row[0] if row[0] in placed else ids[row[1]] for row in rows]

    async def publish(self) -> None:
        """Publish what is in the outbox, for ever."""
        while True:
            self._placed.clear()
            if rows := await self._pool.fetch(PENDING):
                await asyncio.gather(*(self._publish(row["type"], row["data"].encode()) for row in rows))
                await self._pool.execute(PUBLISHED, [row["id"] for row in rows])
            else:
                await self._placed.wait()

    async def _publish(self, type_: str, content: bytes) -> None:
        is_consumed = type_ == events.PLACED
        properties = Basic.Properties(
            delivery_mode=2, message_id=str(uuid4()), message_type=type_, content_type="application/json"
        )
        await self._channel.basic_publish(
            content, routing_key=events.QUEUE if is_consumed else type_, properties=properties, mandatory=is_consumed
        )

    async def consume(self, message: DeliveredMessage) -> None:
        """Finish the order of an event."""
        event = json.loads(message.body)
        order_id, lines = event["order_id"], [Line(**line) for line in event["lines"]]
        for step in STEPS:
            await self._partners.call(step, order_id, lines)
            await self._records.add((UUID(order_id), step.name, "confirmed" if step is STEPS[-1] else "pending"))
        self._placed.set()
        if message.delivery_tag is not None:
            await message.channel.basic_ack(message.delivery_tag)

    async def _record(self, rows: list[Any]) -> list[None]:
        await self._pool.execute(RECORD, *map(list, zip(*rows, strict=True)))
        return [None] * len(rows)


async def main() -> None:
    """Serve until killed."""
    async with contextlib.AsyncExitStack() as stack:
        pool = await stack.enter_async_context(
            asyncpg.create_pool(os.environ["DATABASE_URL"], min_size=CONNECTIONS, max_size=CONNECTIONS)
        )
        await pool.execute(TABLES)
        broker = await aiormq.connect(os.environ["RABBITMQ_URL"])
        stack.push_async_callback(broker.close)
        publishing, consuming = await broker.channel(publisher_confirms=True), await broker.channel()
        await consuming.queue_declare(events.QUEUE, durable=True, arguments={"x-queue-type": "quorum"})
        service = Service(pool, publishing)
        await consuming.basic_qos(prefetch_count=PREFETCH)
        await consuming.basic_consume(events.QUEUE, service.consume)
        server = await asyncio.get_running_loop().create_server(
            lambda: Http(service.accept, httptools.HttpRequestParser), "127.0.0.1", int(os.environ["PORT"])
        )
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(server.serve_forever())
            tasks.create_task(service.publish())


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())
