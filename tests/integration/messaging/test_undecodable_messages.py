"""A message that the AMQP library cannot decode is dead-lettered; other messages take effect."""

import struct
from typing import Any

import httpx
import pytest
from aio_pika.abc import AbstractChannel

from app import db
from app.messaging.topology import EXCHANGE
from app.operations.dead_letters import DeadLetterAction
from tests.harness.api import serving
from tests.harness.dead_letters import consuming, drained, go_over, holds, in_queue, send
from tests.harness.events import Effects, event
from tests.harness.messages import next_message
from tests.harness.queues import DEAD_LETTER_QUEUE, QUEUE
from tests.harness.raw_amqp import array, long_string, publish_raw, short_string, table

RAW: dict[str, dict[str, bytes]] = {
    "timestamp": {"timestamp": struct.pack(">Q", 1_772_000_000_000_000)},  # microseconds
    "message_id": {"message_id": short_string(b"r\xe9f-1")},
    "headers": {"headers": table((b"name", long_string(b"Ren\xe9")))},
}
# Messages that arrive, but cannot be sent again unchanged. The broker's frames hold 128 KiB.
UNSENDABLE: dict[str, dict[str, bytes]] = {
    "full frame": {"headers": table(*[(b"h%d" % number, long_string(b"e" * 490)) for number in range(262)])},
    "grows when repaired": {
        "headers": table(*[(b"h%d" % number, long_string(b"\xe9" * 490)) for number in range(240)])
    },
    "asks for other queues": {"headers": table((b"CC", array(long_string(b"\xe9"))))},
}
TOKEN = "a-token-of-the-operators"


async def test_undecodable_messages_are_dead_lettered(
    rabbitmq_url: str, channel: AbstractChannel, effects: Effects
) -> None:
    """One of each kind, among readable messages. The connection survives, so each is delivered once."""
    fine = [event() for _ in range(2 * len(RAW))]
    async with consuming(rabbitmq_url, effects.consumer()):
        for kind, before, after in zip(RAW, fine[::2], fine[1::2], strict=True):
            await send(channel, before.body(), headers=dict(before.headers()))
            await publish_raw(channel, b'{"kind": "%b"}' % kind.encode(), RAW[kind], EXCHANGE, "order.placed")
            await send(channel, after.body(), headers=dict(after.headers()))
        await holds(channel, len(RAW))
        await effects.arrive(len(fine))
    queue = await channel.get_queue(DEAD_LETTER_QUEUE, ensure=False)
    for kind in RAW:
        letter = await queue.get(no_ack=True)
        assert letter is not None
        assert letter.body == b'{"kind": "%b"}' % kind.encode()
        assert str(letter.headers["x-reason"]).startswith("unreadable: its properties cannot be decoded: " + kind)
        assert not letter.headers.get("x-delivery-count")
    assert len(await effects.committed()) == len(fine)


@pytest.mark.parametrize("raw", UNSENDABLE.values(), ids=UNSENDABLE)
async def test_headers_that_cannot_be_sent_are_dropped(
    pool: db.Pool, rabbitmq_url: str, channel: AbstractChannel, effects: Effects, raw: dict[str, bytes]
) -> None:
    """The dead letter and its replay go without them; body and reason arrive."""
    await publish_raw(channel, b"not an event", raw, EXCHANGE, "order.placed")
    async with consuming(rabbitmq_url, effects.consumer()):
        await holds(channel, 1)
    letters = in_queue(pool, rabbitmq_url)
    _, [found] = await go_over(letters, DeadLetterAction.PEEK)
    assert found.letter.reason.startswith("unreadable: ")
    assert (await go_over(letters, DeadLetterAction.REPLAY))[0].matched == 1
    again = await next_message(channel, QUEUE)
    assert again.body == b"not an event"
    assert "CC" not in again.headers


@pytest.mark.parametrize("raw", RAW.values(), ids=RAW)
async def test_an_undecodable_dead_letter_can_be_replayed(
    pool: db.Pool, rabbitmq_url: str, channel: AbstractChannel, effects: Effects, raw: dict[str, bytes]
) -> None:
    """Letters that the broker itself dead-lettered are listed, replayed and purged as they are."""
    letters = in_queue(pool, rabbitmq_url)
    await publish_raw(channel, b"{}", raw, "", DEAD_LETTER_QUEUE)
    _, [found] = await go_over(letters, DeadLetterAction.PEEK)
    assert found.letter.reason.startswith("its properties cannot be decoded: ")
    assert found.letter.id == ("r?f-1" if "message_id" in raw else "-")
    await holds(channel, 1)
    summary, _ = await go_over(letters, DeadLetterAction.REPLAY)
    assert summary.matched == 1
    async with consuming(rabbitmq_url, effects.consumer()):
        await holds(channel, 1)
    _, [found] = await go_over(letters, DeadLetterAction.PEEK)
    assert found.letter.reason.startswith("unreadable: ")
    await go_over(letters, DeadLetterAction.PURGE)
    assert await drained(channel) == []


async def test_ops_shows_and_purges_an_undecodable_letter(
    database_url: str, rabbitmq_url: str, channel: AbstractChannel
) -> None:
    """The same over HTTP."""
    for raw in RAW.values():
        await publish_raw(channel, b"{}", raw, "", DEAD_LETTER_QUEUE)
    await holds(channel, len(RAW))

    async def ask(ops: httpx.AsyncClient, method: str, path: str) -> Any:
        answer = await ops.request(method, path, headers={"Authorization": f"Bearer {TOKEN}"})
        return answer.raise_for_status().json()

    async with serving(database_url, rabbitmq_url=rabbitmq_url, admin_token=TOKEN) as ops:
        assert (await ask(ops, "GET", "/ops/dlq"))["depth"] == len(RAW)
        assert (await ask(ops, "POST", "/ops/dlq/purge"))["done"] == len(RAW)
    assert await drained(channel) == []
