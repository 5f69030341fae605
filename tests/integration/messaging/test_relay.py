"""The relay: publishes at least once and records only confirmed rows. Only refusals of a row use up its attempts."""

from collections.abc import Awaitable, Callable, Sequence
from typing import Any
from uuid import UUID

import pytest

from app import db
from app.errors import BrokerUnavailable
from app.messaging.envelope import Envelope
from app.messaging.relay import PublishResult, Refusal, Relay
from tests.harness.events import CONFIRMED, counted, event, nothing, put
from tests.harness.observed import Observed
from tests.harness.relays import make_relay
from tests.harness.wait import AMPLE_SECONDS

NACK = Refusal("nacked by the broker")
RETURN = Refusal("returned: no queue is bound for order.placed", returned=True)
FINAL = Refusal("cannot be written", final=True)
LEASE_SECONDS = 3600.0
YEAR_SECONDS = 31_536_000.0  # full jitter makes pauses of any length up to this, so few are short


class Crash(BaseException):
    """The process ends here."""


async def carry_on() -> None:
    """Do nothing meanwhile."""


class Broker:
    """A transport that confirms and keeps everything, unless it is down or has a refusal for the message."""

    def __init__(self) -> None:
        self.sent: list[UUID] = []
        self.refusals: dict[UUID, Refusal] = {}
        self.carries: int | None = None  # messages per batch; None: no limit
        self.is_down = False
        self.refuses_connections = False
        self.meanwhile: Callable[[], Awaitable[Any]] = carry_on

    async def ready(self) -> None:
        if self.refuses_connections:
            raise BrokerUnavailable("rabbitmq: connection refused")

    async def publish(
        self, envelopes: Sequence[Envelope], seconds: float, results: list[PublishResult]
    ) -> list[PublishResult]:
        assert 0 < seconds < LEASE_SECONDS
        self.sent += [envelope.id for envelope in envelopes]
        await self.meanwhile()
        if self.is_down:
            raise BrokerUnavailable("rabbitmq: connection refused")
        carried = envelopes if self.carries is None else envelopes[: self.carries]
        results[: len(carried)] = [self.refusals.get(envelope.id) for envelope in carried]
        return results


def relay(
    pool: db.Pool,
    broker: Broker,
    signals: Observed | None = None,
    *,
    batch_size: int = 100,
    checkpoint: Callable[[str], None] = nothing,
) -> Relay:
    return make_relay(
        pool,
        broker,
        signals,
        batch_size=batch_size,
        lease_seconds=LEASE_SECONDS,
        backoff_seconds=YEAR_SECONDS,
        checkpoint=checkpoint,
    )


async def rows(pool: db.Pool, state: str = "true") -> dict[UUID, dict[str, Any]]:
    async with db.connection(pool) as conn:
        return {row["id"]: dict(row) for row in await conn.fetch(f"SELECT * FROM outbox WHERE {state}")}  # noqa: S608


async def make_due(pool: db.Pool) -> None:
    async with db.connection(pool) as conn:
        await conn.execute("UPDATE outbox SET next_attempt_at = clock_timestamp()")


@pytest.fixture
def broker() -> Broker:
    return Broker()


async def test_a_confirmed_row_is_never_sent_again(pool: db.Pool, broker: Broker) -> None:
    """A confirmed row is recorded as published, and never sent again."""
    signals, events = Observed(), [event(), event(event_type=CONFIRMED)]
    await put(pool, *events)
    assert await relay(pool, broker, signals).run_once() == 2
    await make_due(pool)
    assert await relay(pool, broker, signals).run_once() == 0
    assert sorted(broker.sent) == sorted(envelope.id for envelope in events)
    assert len(await rows(pool, "published_at IS NOT NULL")) == 2
    assert counted(signals, "outbox_published_total") == 2
    assert counted(signals, "outbox_publish_failed_total") == 0


async def test_a_batch_respects_the_batch_size(pool: db.Pool, broker: Broker) -> None:
    """A batch is no larger than `batch_size`."""
    await put(pool, *(event() for _ in range(5)))
    small = relay(pool, broker, batch_size=2)
    assert [await small.run_once() for _ in range(4)] == [2, 2, 1, 0]


async def test_a_loop_claims_again_only_when_more_is_due(pool: db.Pool, broker: Broker) -> None:
    """More is due after a full batch, and after a batch of which rows were released."""
    small = relay(pool, broker, batch_size=2)
    await put(pool, *(event() for _ in range(3)))
    assert [await small.run_batch() for _ in range(2)] == [True, False]
    await put(pool, event(), event())
    broker.carries = 1
    large = relay(pool, broker)
    assert [await large.run_batch() for _ in range(3)] == [True, True, False]


async def test_an_outage_releases_the_rows_unchanged(pool: db.Pool, broker: Broker) -> None:
    """An outage releases the rows unchanged, and is reported."""
    signals, events = Observed(), [event(), event()]
    await put(pool, *events)
    broker.is_down = True
    for _ in range(5):
        with pytest.raises(BrokerUnavailable):
            await relay(pool, broker, signals).run_once()
    given_back = await rows(pool, "next_attempt_at <= clock_timestamp() AND claim_token IS NULL")
    assert [(row["attempts"], row["parked_at"]) for row in given_back.values()] == [(0, None)] * 2
    assert counted(signals, "outbox_publish_failed_total") == 10
    broker.is_down = False
    assert await relay(pool, broker).run_once() == 2


async def test_nothing_is_claimed_without_a_connection(pool: db.Pool, broker: Broker) -> None:
    """The relay claims nothing while the broker cannot be reached."""
    await put(pool, event())
    publisher = relay(pool, broker)
    broker.refuses_connections = True
    with pytest.raises(BrokerUnavailable):
        await publisher.run_once()
    with pytest.raises(BrokerUnavailable):
        publisher.check()
    assert len(await rows(pool, "claim_token IS NULL AND next_attempt_at <= clock_timestamp()")) == 1
    broker.refuses_connections = False
    assert await publisher.run_once() == 1
    publisher.check()


async def test_unconfirmed_rows_are_released(pool: db.Pool, broker: Broker) -> None:
    """Confirmed rows are recorded, and the others released."""
    events = [event() for _ in range(6)]
    await put(pool, *events)
    broker.carries, broker.refusals = 3, {envelope.id: NACK for envelope in events[:1]}
    await relay(pool, broker).run_once()
    assert len(await rows(pool, "published_at IS NOT NULL")) + len(await rows(pool, "attempts = 1")) == 3
    rest = await rows(pool, "published_at IS NULL AND attempts = 0")
    assert len(rest) == 3
    assert all(row["claim_token"] is None for row in rest.values())
    broker.carries = None
    assert await relay(pool, broker).run_once() == 3


async def test_the_batch_size_adapts(pool: db.Pool, broker: Broker) -> None:
    """The next batch is as large as the number of confirmed rows, and doubles from there."""
    await put(pool, *(event() for _ in range(40)))
    publisher = relay(pool, broker, batch_size=8)
    broker.carries = 3
    assert [await publisher.run_once() for _ in range(3)] == [8, 3, 6]
    broker.carries = None
    assert [await publisher.run_once() for _ in range(4)] == [3, 6, 8, 8]
    broker.is_down = True
    with pytest.raises(BrokerUnavailable):
        await publisher.run_once()
    broker.is_down = False
    assert [await publisher.run_once() for _ in range(3)] == [1, 2, 3]


async def test_an_outage_is_reported_without_postgres(pool: db.Pool, database_url: str, broker: Broker) -> None:
    """An outage is reported even if no connection is free to release the rows."""
    async with db.open_pool(database_url, 1, wait_seconds=0.1) as narrow:
        await narrow.fetchval("SELECT 1")  # connect first, which may be slow
        await put(pool, event())
        broker.is_down, broker.meanwhile = True, narrow.acquire
        with pytest.raises(BrokerUnavailable):
            await relay(narrow, broker).run_once()
    broker.is_down, broker.meanwhile = False, carry_on
    assert await relay(pool, broker).run_once() == 0
    await make_due(pool)  # the lease ends
    assert await relay(pool, broker).run_once() == 1


@pytest.mark.parametrize(("refusal", "returns"), [(NACK, 0), (RETURN, 1)])
async def test_a_refusal_uses_up_an_attempt_of_its_row_only(
    pool: db.Pool, broker: Broker, refusal: Refusal, returns: int
) -> None:
    """Only the refused row waits and uses up an attempt."""
    signals, refused, fine = Observed(), event(), event()
    await put(pool, refused, fine)
    broker.refusals = {refused.id: refusal}
    assert await relay(pool, broker, signals).run_once() == 2
    assert await relay(pool, broker, signals).run_once() == 0
    assert list(await rows(pool, "published_at IS NOT NULL")) == [fine.id]
    waiting = (await rows(pool, "next_attempt_at > clock_timestamp()"))[refused.id]
    assert (waiting["attempts"], waiting["last_error"], waiting["parked_at"]) == (1, refusal.reason, None)
    assert counted(signals, "outbox_published_total") == 1
    assert counted(signals, "outbox_publish_failed_total") == 1
    assert counted(signals, "outbox_returned_total") == returns


@pytest.mark.parametrize("refusal", [NACK, RETURN])
async def test_a_row_refused_too_often_is_parked(pool: db.Pool, broker: Broker, refusal: Refusal) -> None:
    """After its last attempt, a refused row is parked with the reason."""
    refused = event()
    await put(pool, refused)
    broker.refusals = {refused.id: refusal}
    for _ in range(3):
        assert await rows(pool, "parked_at IS NOT NULL") == {}
        assert await relay(pool, broker).run_once() == 1
        await make_due(pool)
    assert await relay(pool, broker).run_once() == 0
    parked = (await rows(pool, "parked_at IS NOT NULL"))[refused.id]
    assert (parked["attempts"], parked["last_error"], parked["published_at"]) == (3, refusal.reason, None)


async def test_a_final_refusal_parks_the_row_at_once(pool: db.Pool, broker: Broker) -> None:
    """A row whose refusal is final is parked at once."""
    hopeless = event()
    await put(pool, hopeless)
    broker.refusals = {hopeless.id: FINAL}
    assert await relay(pool, broker).run_once() == 1
    assert (await rows(pool, "parked_at IS NOT NULL"))[hopeless.id]["last_error"] == FINAL.reason


async def test_a_refused_row_can_still_be_published(pool: db.Pool, broker: Broker) -> None:
    """A row that the broker accepts after refusals is published."""
    refused = event()
    await put(pool, refused)
    broker.refusals = {refused.id: NACK}
    await relay(pool, broker).run_once()
    await make_due(pool)
    broker.refusals = {}
    await relay(pool, broker).run_once()
    published = (await rows(pool, "published_at IS NOT NULL"))[refused.id]
    assert (published["attempts"], published["last_error"]) == (1, None)


async def test_a_batch_costs_two_statements(pool: db.Pool, database_url: str, broker: Broker) -> None:
    """A batch costs two statements, whatever the results of its rows."""
    statements: list[str] = []
    async with db.open_pool(database_url, 1, wait_seconds=AMPLE_SECONDS) as narrow:
        await put(pool, event())
        await relay(narrow, broker).run_once()  # asyncpg reads the array types once per connection
        async with db.connection(narrow) as conn:
            conn.add_query_logger(lambda query: statements.append(query.query.split()[0]))
        events = [event() for _ in range(90)]
        await put(pool, *events)
        broker.refusals = {envelope.id: (NACK, RETURN, FINAL)[n % 3] for n, envelope in enumerate(events[:60])}
        assert await relay(narrow, broker).run_once() == 90
    assert statements == ["WITH", "UPDATE"]
    assert len(await rows(pool, "published_at IS NOT NULL")) == 31
    assert len(await rows(pool, "parked_at IS NOT NULL")) == 20


@pytest.mark.parametrize(("crash_at", "sent_before"), [("relay.claimed", 0), ("relay.published", 1)])
async def test_a_dead_relay_delays_its_rows_by_one_lease(
    pool: db.Pool, broker: Broker, crash_at: str, sent_before: int
) -> None:
    """If a relay dies before recording, its rows are sent again after the lease, with the same ids."""

    def die(checkpoint: str) -> None:
        if checkpoint == crash_at:
            raise Crash

    only = event()
    await put(pool, only)
    with pytest.raises(Crash):
        await relay(pool, broker, checkpoint=die).run_once()
    assert broker.sent == [only.id] * sent_before
    assert await relay(pool, broker).run_once() == 0
    await make_due(pool)
    assert await relay(pool, broker).run_once() == 1
    assert broker.sent == [only.id] * (sent_before + 1)
    assert list(await rows(pool, "published_at IS NOT NULL")) == [only.id]


@pytest.mark.parametrize("refusal", [None, NACK, FINAL])
async def test_a_relay_frozen_past_its_lease_changes_nothing(
    pool: db.Pool, broker: Broker, refusal: Refusal | None
) -> None:
    """A relay that resumes after its lease ended records nothing."""
    only, late, late_signals = event(), Broker(), Observed()

    async def another_relay_takes_over() -> None:
        await make_due(pool)
        assert await relay(pool, broker).run_once() == 1

    await put(pool, only)
    late.meanwhile = another_relay_takes_over
    late.refusals = {only.id: refusal} if refusal else {}
    assert await relay(pool, late, late_signals).run_once() == 1
    published = (await rows(pool, "published_at IS NOT NULL"))[only.id]
    assert (published["attempts"], published["parked_at"]) == (0, None)
    assert counted(late_signals, "outbox_published_total") == 0
    assert late.sent == broker.sent == [only.id]


async def test_events_of_a_subject_are_published_in_order(pool: db.Pool, broker: Broker) -> None:
    """A later event of a subject is sent once the earlier one is confirmed."""
    events = [event("order", sequence) for sequence in (1, 2, 3)]
    await put(pool, *reversed(events))
    publisher = relay(pool, broker)
    assert [await publisher.run_once() for _ in range(4)] == [1, 1, 1, 0]
    assert broker.sent == [envelope.id for envelope in events]
