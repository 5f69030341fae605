"""Dead letters in RabbitMQ: a peek changes nothing, a replay takes effect once, a purge removes."""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import aio_pika
import pytest
from aio_pika.abc import AbstractChannel, HeadersType

from app import db
from app.messaging.envelope import Envelope
from app.operations.dead_letters import DeadLetterAction, DeadLetters
from tests.harness.dead_letters import (
    REASON,
    consuming,
    drained,
    go_over,
    holds,
    ids,
    in_queue,
    put_many,
    send,
    set_aside,
)
from tests.harness.events import PLACED, Effects, event
from tests.harness.messages import next_message, take
from tests.harness.queues import DEAD_LETTER_QUEUE, QUEUE
from tests.harness.wait import AMPLE_SECONDS


@pytest.fixture
def letters(pool: db.Pool, rabbitmq_url: str) -> DeadLetters:
    return in_queue(pool, rabbitmq_url)


async def send_all(channel: AbstractChannel, *events: Envelope) -> None:
    for envelope in events:
        await send(channel, envelope.body(), headers=dict(envelope.headers()), message_id=str(envelope.id))


async def story(pool: db.Pool, message_id: str) -> tuple[int, bool, bool]:
    async with db.connection(pool) as conn:
        row = await conn.fetchrow("SELECT * FROM inbox WHERE message_id = $1", message_id)
    assert row is not None
    return row["attempts"], row["dead_at"] is not None, row["processed_at"] is not None


def without_count(headers: HeadersType) -> HeadersType:
    """Remove the header that the broker adds to every message of a quorum queue."""
    return {name: value for name, value in headers.items() if name != "x-delivery-count"}


async def test_dead_letters_have_reasons_and_replay_once(
    rabbitmq_url: str, channel: AbstractChannel, effects: Effects, letters: DeadLetters
) -> None:
    """Three unreadable messages and one that always fails, among others; each is replayed twice."""
    failing, fine = event(), [event() for _ in range(20)]

    async def handler(conn: db.Connection, envelopes: Sequence[Envelope]) -> None:
        await effects(conn, envelopes)
        if failing in envelopes and not repaired:
            raise ValueError("no such thing")

    repaired = False
    consumer = effects.consumer(max_attempts=2)
    consumer.handlers = {PLACED: handler}
    async with consuming(rabbitmq_url, consumer):
        await send(channel, b"not json", message_id="one")
        await send_all(channel, *fine[:10], failing)
        await send(channel, b"[]", message_id="two")
        await send(channel, b"{}", message_id="three")
        await send_all(channel, *fine[10:])
        await holds(channel, 4)
        await effects.arrive(len(fine))
        assert sorted(await effects.committed()) == sorted(envelope.id for envelope in fine)
        _, findings = await go_over(letters, DeadLetterAction.PEEK)
        shown = {
            finding.letter.id: (finding.letter.reason, finding.letter.attempts, finding.inbox_state)
            for finding in findings
        }
        assert {name: state for name, (_, _, state) in shown.items()} == {
            **dict.fromkeys(("one", "two", "three"), "unreadable"),
            str(failing.id): f"failed 2 times, last error: {REASON}",
        }
        assert shown[str(failing.id)][:2] == (REASON, 2)
        assert shown["one"][0].startswith("unreadable: the body is not JSON")
        assert shown["three"][0].startswith("unreadable: its attributes")
        await holds(channel, 4)
        repaired = True
        for name in (str(failing.id), "one", "two", "three"):
            summary, _ = await go_over(letters, DeadLetterAction.REPLAY, id=name)
            assert (summary.matched, summary.depth) == (1, 4 if name == str(failing.id) else 3)
            await holds(channel, 3)
        summary, _ = await go_over(letters, DeadLetterAction.REPLAY, id=str(failing.id))
        assert summary.matched == 0
        await send_all(channel, failing)  # the copy that a killed replay leaves
        for name in ("one", "two", "three"):
            await go_over(letters, DeadLetterAction.REPLAY, id=name)
            await holds(channel, 3)
        await holds(channel, 0, QUEUE)
        await effects.arrive(len(fine) + 1)
    assert sorted(await effects.committed()) == sorted(envelope.id for envelope in (*fine, failing))


async def test_a_replay_removes_the_dead_letter_headers(channel: AbstractChannel, letters: DeadLetters) -> None:
    """A replayed message is the original, without the headers that dead-lettering added."""
    sent = event(traceparent="00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01")
    await set_aside(
        channel,
        sent,
        content_type="application/json",
        correlation_id="c",
        app_id="a",
        timestamp=datetime(2026, 1, 2, tzinfo=UTC),
    )
    await holds(channel, 1)
    await ids(letters)  # so the broker counts a delivery
    await go_over(letters, DeadLetterAction.REPLAY)
    again = await next_message(channel, QUEUE)
    assert (again.message_id, again.type, again.body) == (str(sent.id), PLACED, sent.body())
    assert without_count(again.headers) == sent.headers()
    assert again.delivery_mode == aio_pika.DeliveryMode.PERSISTENT
    assert (again.content_type, again.correlation_id, again.app_id) == ("application/json", "c", "a")
    assert again.timestamp == datetime(2026, 1, 2, tzinfo=UTC)
    assert await take(channel, DEAD_LETTER_QUEUE) is None


async def test_a_replay_resets_the_attempts(
    pool: db.Pool, channel: AbstractChannel, effects: Effects, letters: DeadLetters
) -> None:
    """A replay resets the attempts, unless the message took effect."""
    failed, done = event(), event()
    effects.failure = ValueError("no such thing")
    await effects.consumer(max_attempts=1).handle(failed)
    await effects.consumer(max_attempts=2).handle(done)
    effects.failure = None
    await effects.consumer(max_attempts=2).handle(done)
    for envelope in (failed, done):
        await set_aside(channel, envelope)
    await holds(channel, 2)
    assert await story(pool, str(failed.id)) == (1, True, False)
    _, (first, second) = await go_over(letters, DeadLetterAction.REPLAY)
    assert (first.inbox_state, first.replay_effect) == (
        f"failed once, last error: {REASON}",
        "is tried again, with all attempts",
    )
    assert second.inbox_state.startswith("took effect at 20")
    assert second.replay_effect.startswith("nothing happens a second time")
    assert await story(pool, str(failed.id)) == (0, False, False)
    assert await story(pool, str(done.id)) == (1, False, True)
    assert await drained(channel, QUEUE) == [str(failed.id), str(done.id)]


async def test_fifty_peeks_keep_all_messages_in_order(channel: AbstractChannel, letters: DeadLetters) -> None:
    """With default limits, RabbitMQ 4 drops a message that was returned more than twenty times."""
    expected = await put_many(channel, 100)
    for number in range(50):
        assert await ids(letters, limit=100 if number % 2 else 7) == expected[: 100 if number % 2 else 7]
        await holds(channel, 100)
    assert await drained(channel) == expected


async def test_a_scan_keeps_the_order_of_the_other_letters(channel: AbstractChannel, letters: DeadLetters) -> None:
    """Matching letters are purged or replayed; the others return in order."""
    expected = await put_many(channel, 90)
    for number in (0, 44, 88):
        summary, _ = await go_over(letters, DeadLetterAction.PURGE, id=expected[number])
        assert summary.matched == 1
        await holds(channel, 89 - number // 44)
    summary, _ = await go_over(letters, DeadLetterAction.REPLAY, limit=2)
    assert (summary.looked_at, summary.matched) == (2, 2)
    await holds(channel, 85)
    assert await drained(channel, QUEUE) == expected[1:3]
    assert await drained(channel) == [
        letter_id for letter_id in expected[3:] if letter_id not in {expected[44], expected[88]}
    ]


@pytest.mark.parametrize("action", [DeadLetterAction.REPLAY, DeadLetterAction.PURGE])
async def test_all_of_many_letters_are_handled(
    channel: AbstractChannel, letters: DeadLetters, action: DeadLetterAction
) -> None:
    """Without conditions, a replay or purge handles every one of 500 dead letters."""
    expected = await put_many(channel, 500)
    summary, findings = await go_over(letters, action)
    assert (summary.depth, summary.looked_at, summary.matched) == (500, 500, 500)
    assert [finding.letter.id for finding in findings] == expected
    await holds(channel, 0)
    assert sorted(filter(None, await drained(channel, QUEUE))) == (
        sorted(expected) if action is DeadLetterAction.REPLAY else []
    )


async def test_since_matches_recent_failures(channel: AbstractChannel, letters: DeadLetters) -> None:
    """`since_seconds` matches letters whose last failure is recent."""
    old, recent, silent = event(), event(), event()
    await set_aside(channel, old, minutes_ago=20)
    await set_aside(channel, recent, minutes_ago=10)
    message = aio_pika.Message(silent.body(), headers=dict(silent.headers()), message_id=str(silent.id))
    await channel.default_exchange.publish(message, DEAD_LETTER_QUEUE)
    await holds(channel, 3)
    assert await ids(letters, since_seconds=900) == [str(recent.id)]
    assert await ids(letters, since_seconds=900, id=str(old.id)) == []
    assert await ids(letters, since_seconds=1800, limit=1) == [str(old.id)]
    summary, _ = await go_over(letters, DeadLetterAction.PURGE, since_seconds=900)
    assert (summary.looked_at, summary.matched) == (3, 1)
    await holds(channel, 2)
    assert await drained(channel) == [str(old.id), str(silent.id)]


async def test_letters_dead_lettered_by_the_broker_say_so(
    rabbitmq_url: str, channel: AbstractChannel, letters: DeadLetters
) -> None:
    """Their reason comes from the broker's headers, which a replay removes."""
    sent = event()
    await send_all(channel, sent)
    async with await aio_pika.connect(rabbitmq_url) as connection:
        rejecting = await (await connection.channel()).get_queue(QUEUE, ensure=False)
        await (await rejecting.get(timeout=AMPLE_SECONDS)).reject(requeue=False)
    await holds(channel, 1)
    _, [finding] = await go_over(letters, DeadLetterAction.PEEK)
    letter = finding.letter
    assert letter.reason == "rejected of orders.saga, by the broker"
    assert letter.last_failure_at is not None
    assert (letter.attempts, finding.inbox_state) == (None, "never seen")
    await go_over(letters, DeadLetterAction.REPLAY)
    again = await next_message(channel, QUEUE)
    assert without_count(again.headers) == sent.headers()


async def test_a_dry_run_changes_nothing(
    pool: db.Pool, channel: AbstractChannel, effects: Effects, letters: DeadLetters
) -> None:
    """A dry run changes neither the queue nor the inbox."""
    failed = event()
    effects.failure = ValueError("no such thing")
    await effects.consumer(max_attempts=1).handle(failed)
    await set_aside(channel, failed)
    await set_aside(channel, event())
    await holds(channel, 2)
    for action in (DeadLetterAction.REPLAY, DeadLetterAction.PURGE):
        summary, findings = await go_over(letters, action, dry_run=True)
        assert (summary.matched, len(findings)) == (2, 2)
        await holds(channel, 2)
    assert await story(pool, str(failed.id)) == (1, True, False)
    assert await take(channel, QUEUE) is None
    assert (await drained(channel))[0] == str(failed.id)


async def test_unexpected_headers_are_shown(channel: AbstractChannel, letters: DeadLetters) -> None:
    """A letter with unexpected headers is listed too."""
    odd: list[dict[str, Any]] = [
        {"x-reason": 7, "x-attempts": "many", "x-first-failure-at": "yesterday", "x-last-failure-at": 12},
        {"x-reason": "a\x1b[31mred\n", "x-last-failure-at": "2026-01-01T00:00:00"},
        {"x-death": "gone"},
        {"x-death": [{"reason": "expired"}]},
    ]
    for headers in odd:
        await channel.default_exchange.publish(aio_pika.Message(b"\xff", headers=headers), DEAD_LETTER_QUEUE)
    await holds(channel, 4)
    _, findings = await go_over(letters, DeadLetterAction.PEEK)
    assert [
        (finding.letter.reason, finding.letter.attempts, finding.letter.last_failure_at) for finding in findings
    ] == [
        ("7", None, None),
        ("a [31mred ", None, None),
        ("unknown: the message has neither x-reason nor x-death", None, None),
        ("expired of , by the broker", None, None),
    ]
