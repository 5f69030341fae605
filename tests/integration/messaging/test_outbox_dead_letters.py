"""Without a broker, the parked rows of handled types are the dead letters, with the same operations."""

import pytest

from app import db
from app.messaging.consumer import Consumer
from app.messaging.envelope import Envelope
from app.messaging.outbox_dead_letters import OutboxDeadLetters
from app.messaging.relay import Relay
from app.operations.dead_letters import DeadLetterAction, DeadLetters
from app.saga import unstarted
from tests.harness.dead_letters import REASON, go_over, ids
from tests.harness.events import CONFIRMED, PLACED, Effects, event, put
from tests.harness.orders import event_of, placed
from tests.harness.queues import queue_of
from tests.harness.relays import local_transport, make_relay


@pytest.fixture
def letters(pool: db.Pool) -> DeadLetters:
    return DeadLetters(pool, queue_of("effects"), OutboxDeadLetters(pool, queue_of("effects")))


def relay(pool: db.Pool, consumer: Consumer) -> Relay:
    return make_relay(
        pool,
        local_transport(consumer),
        batch_size=1000,
        lease_seconds=3600,
        backoff_seconds=600,
        max_attempts=10,
    )


async def park(pool: db.Pool, effects: Effects, *events: Envelope) -> list[str]:
    """Park the rows of these events, one after the other."""
    effects.failure = ValueError("no such thing")
    for envelope in events:
        await put(pool, envelope)
        await relay(pool, effects.consumer(max_attempts=1)).run_once()
    effects.failure = None
    return [str(envelope.id) for envelope in events]


async def test_parked_rows_are_listed_oldest_first(pool: db.Pool, effects: Effects, letters: DeadLetters) -> None:
    """Parked rows are listed with their failures, longest parked first."""
    expected = await park(pool, effects, *(event() for _ in range(3)))
    await put(pool, event())
    await pool.execute("UPDATE outbox SET parked_at = clock_timestamp(), last_error = 'x' WHERE type = $1", CONFIRMED)
    summary, findings = await go_over(letters, DeadLetterAction.PEEK)
    assert (summary.depth, [finding.letter.id for finding in findings]) == (3, expected)
    letter = findings[0].letter
    assert (letter.reason, letter.attempts, letter.type, letter.tenant) == (REASON, 1, PLACED, "default")
    assert letter.first_failure_at is not None
    assert letter.last_failure_at is not None
    assert letter.first_failure_at <= letter.last_failure_at
    assert findings[0].inbox_state == f"failed once, last error: {REASON}"
    assert await ids(letters, limit=2) == expected[:2]
    assert await ids(letters, id=expected[1]) == expected[1:2]


async def test_since_matches_recently_parked_rows(pool: db.Pool, effects: Effects, letters: DeadLetters) -> None:
    """`since_seconds` matches rows that were parked recently."""
    expected = await park(pool, effects, event(), event())
    await pool.execute("UPDATE outbox SET parked_at = parked_at - interval '20 min' WHERE id::text = $1", expected[0])
    assert await ids(letters, since_seconds=900) == expected[1:]


async def test_a_replayed_row_takes_effect_once(pool: db.Pool, effects: Effects, letters: DeadLetters) -> None:
    """Each replayed row takes effect once; a second replay finds none."""
    events = [event() for _ in range(250)]
    await put(pool, *events)
    await pool.execute("UPDATE outbox SET parked_at = clock_timestamp(), last_error = 'x', attempts = 10")
    for meant in (250, 0):
        summary, _ = await go_over(letters, DeadLetterAction.REPLAY)
        assert (summary.depth, summary.matched) == (meant, meant)
    await relay(pool, effects.consumer(max_attempts=2)).run_once()
    assert sorted(await effects.committed()) == sorted(envelope.id for envelope in events)
    assert await ids(letters) == []


async def test_a_replay_resets_the_attempts(pool: db.Pool, effects: Effects, letters: DeadLetters) -> None:
    """A replay resets the attempts of a row."""
    await park(pool, effects, event())
    await go_over(letters, DeadLetterAction.REPLAY)
    effects.failure = ValueError("no such thing")
    consumer = effects.consumer(max_attempts=3)
    for _ in range(2):
        await relay(pool, consumer).run_once()
        await pool.execute("UPDATE outbox SET next_attempt_at = clock_timestamp()")
    assert await ids(letters) == []
    await relay(pool, consumer).run_once()
    assert len(await ids(letters)) == 1


async def test_a_dry_run_changes_nothing(pool: db.Pool, effects: Effects, letters: DeadLetters) -> None:
    """A dry run changes neither outbox nor inbox."""
    await park(pool, effects, event(), event())
    tables = ("SELECT * FROM outbox ORDER BY id", "SELECT * FROM inbox ORDER BY message_id")
    before = [await pool.fetch(table) for table in tables]
    for action in (DeadLetterAction.REPLAY, DeadLetterAction.PURGE):
        summary, _ = await go_over(letters, action, dry_run=True)
        assert summary.matched == 2
    assert [await pool.fetch(table) for table in tables] == before


async def test_a_purged_event_is_listed_until_replayed(pool: db.Pool, effects: Effects, letters: DeadLetters) -> None:
    """The order of a purged event is listed until the event is replayed."""
    order = await placed(pool)
    effects.failure = ValueError("no such thing")
    await relay(pool, effects.consumer(max_attempts=1)).run_once()
    [nobodys] = await park(pool, effects, event())
    waiting = str(event_of(order).id)
    summary, findings = await go_over(letters, DeadLetterAction.PURGE)
    assert (summary.matched, {finding.letter.id for finding in findings}) == (2, {waiting, nobodys})
    assert await ids(letters) == []
    async with db.connection(pool) as conn:
        [listed] = await unstarted.list_blocked(conn, letters.queue.consumer, 10)
        assert (str(listed.order_id), listed.purged) == (waiting, True)
    await relay(pool, effects.consumer()).run_once()
    assert await effects.committed() == []

    summary, _ = await go_over(letters, DeadLetterAction.REPLAY, id=waiting)
    assert (summary.matched, summary.from_outbox) == (0, True)
    async with db.connection(pool) as conn:
        assert await unstarted.list_blocked(conn, letters.queue.consumer, 10) == []
    effects.failure = None
    await relay(pool, effects.consumer()).run_once()
    assert await effects.committed() == [order.id]
