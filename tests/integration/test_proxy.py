"""The fault proxy: without faults nobody notices it; each fault does what it says, to whom it says, and is counted."""

import asyncio
import contextlib
import itertools
import random
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from urllib.parse import urlsplit

import asyncpg
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app import db
from app.errors import DatabaseUnavailable
from chaos import postgres
from chaos.faults import Blackhole, Delay, Direction, Lose, Refuse, Reset
from chaos.frames import Frames, Piece, Watcher
from chaos.proxy import Proxy
from tests.harness.wait import wait_until

AMPLE_SECONDS = 20.0
NEVER_SECONDS = 3600.0
REQUEST, ANSWER = Lose(postgres.COMMIT_REQUEST), Lose(postgres.COMMIT_ANSWER)
LOST = (asyncpg.ConnectionDoesNotExistError, ConnectionResetError)  # a connection that ended below a statement
SLEEP = f"SELECT pg_sleep({NEVER_SECONDS})"
INSERT = "INSERT INTO notes VALUES ('kept')"


@contextlib.asynccontextmanager
async def client_of(url: str) -> AsyncIterator[asyncpg.Connection]:
    conn = await asyncpg.connect(url)
    try:
        yield conn
    finally:
        conn.terminate()


@dataclass
class Stage:
    """A proxy, one client of it, and a witness who asks the server itself."""

    proxy: Proxy
    url: str
    client: asyncpg.Connection
    witness: asyncpg.Connection

    async def notes(self) -> list[str]:
        return [row["text"] for row in await self.witness.fetch("SELECT text FROM notes ORDER BY text")]

    async def answers(self) -> bool:
        async with client_of(self.url) as conn:
            return bool(await conn.fetchval("SELECT 42") == 42)

    async def client_is_closed(self) -> None:
        await wait_until(self.client.is_closed, AMPLE_SECONDS, "end of the client's connection")

    async def sessions_end(self) -> None:
        """Wait until the server has ended every other session, its transaction with it."""
        query = "SELECT count(*) = 1 FROM pg_stat_activity WHERE datname = current_database()"
        await wait_until(lambda: self.witness.fetchval(query), AMPLE_SECONDS, "end of the sessions")

    async def server_waits(self, event: str) -> None:
        """Wait until the server does, on behalf of the client."""
        query = "SELECT wait_event = $2 FROM pg_stat_activity WHERE pid = $1"
        pid = self.client.get_server_pid()
        await wait_until(lambda: self.witness.fetchval(query, pid, event), AMPLE_SECONDS, event)

    async def commit_often(self, rounds: int) -> list[bool]:
        """Commit with a connection each; tell which of them were lost."""
        lost = []
        for _ in range(rounds):
            async with client_of(self.url) as conn:
                lost.append(True)
                with contextlib.suppress(*LOST):
                    await by_a_transaction(conn)
                    lost[-1] = False
        return lost


@contextlib.asynccontextmanager
async def stage_of(url: str, dice: random.Random | None = None) -> AsyncIterator[Stage]:
    parts = urlsplit(url)
    async with client_of(url) as witness:
        await witness.execute("CREATE TABLE notes (text text NOT NULL)")
        async with (
            Proxy(parts.hostname or "", parts.port or 0, frames=postgres, dice=dice) as proxy,
            client_of(proxy.url(url)) as client,
        ):
            yield Stage(proxy, proxy.url(url), client, witness)


@pytest.fixture
async def stage(database_url: str) -> AsyncIterator[Stage]:
    async with stage_of(database_url) as stage:
        yield stage


async def by_a_transaction(conn: asyncpg.Connection) -> None:
    async with conn.transaction():
        await conn.execute("INSERT INTO notes VALUES ($1)", "kept")


async def by_one_query(conn: asyncpg.Connection) -> None:
    await conn.execute(f"BEGIN; {INSERT}; commit ;")


async def by_a_prepared_statement(conn: asyncpg.Connection) -> None:
    await conn.execute(f"BEGIN; {INSERT}")
    await conn.fetch("COMMIT")


Commit = Callable[[asyncpg.Connection], Awaitable[None]]
commits = pytest.mark.parametrize("commit", [by_a_transaction, by_one_query, by_a_prepared_statement])


# Without faults


async def test_large_parameters_and_results_arrive_whole(stage: Stage) -> None:
    text = "".join(map(str, range(2_000_000)))
    assert await stage.client.fetchval("SELECT $1::text", text) == text
    rows = await stage.client.fetch("SELECT n FROM generate_series(1, 200000) n")
    assert [row["n"] for row in rows] == list(range(1, 200_001))


async def test_concurrent_connections_do_not_mix(stage: Stage) -> None:
    async def note(number: int) -> None:
        async with client_of(stage.url) as conn:
            for each in range(10):
                async with conn.transaction():
                    await conn.execute("INSERT INTO notes VALUES ($1)", f"{number:02} {each}")
                assert await conn.fetchval("SELECT $1::int", number) == number

    await asyncio.gather(*map(note, range(40)))
    assert await stage.notes() == [f"{number:02} {each}" for number in range(40) for each in range(10)]


@pytest.mark.parametrize("mode", ["disable", "prefer"])
async def test_frames_are_seen_whether_or_not_the_client_would_encrypt(stage: Stage, mode: str) -> None:
    stage.proxy.arm(ANSWER)
    async with client_of(f"{stage.url}?sslmode={mode}") as conn:
        with pytest.raises(LOST):
            await by_a_transaction(conn)


async def test_a_statement_can_be_cancelled(stage: Stage) -> None:
    task = asyncio.create_task(stage.client.execute(SLEEP))
    await stage.server_waits("PgSleep")
    task.cancel()
    await asyncio.wait({task})
    assert await stage.client.fetchval("SELECT 42") == 42


async def test_what_the_server_says_before_it_ends_a_session_arrives(stage: Stage) -> None:
    task = asyncio.create_task(stage.client.execute(SLEEP))
    await stage.server_waits("PgSleep")
    await stage.witness.execute("SELECT pg_terminate_backend($1)", stage.client.get_server_pid())
    with pytest.raises(LOST, match="terminating connection due to administrator command"):
        await task


async def test_a_client_that_goes_takes_its_session_along(stage: Stage) -> None:
    stage.client.terminate()
    await stage.sessions_end()


async def test_an_upstream_that_is_out_shows_as_a_connection_that_closes(free_port: int) -> None:
    async with Proxy("127.0.0.1", free_port, frames=postgres) as proxy:
        with pytest.raises(LOST):
            await asyncpg.connect(f"postgresql://nobody@127.0.0.1:{proxy.port}/nowhere")


async def test_a_proxy_that_is_left_leaves_no_connection(stage: Stage) -> None:
    proxy = Proxy("127.0.0.1", stage.proxy.port, frames=postgres)
    async with contextlib.AsyncExitStack() as clients:
        async with proxy:
            stage.client = await clients.enter_async_context(client_of(proxy.url(stage.url)))
        await stage.client_is_closed()


# A COMMIT is lost


@commits
async def test_a_lost_commit_request_is_a_lost_connection_and_the_transaction_is_rolled_back(
    stage: Stage, commit: Commit
) -> None:
    stage.proxy.arm(REQUEST)
    with pytest.raises(LOST):
        await commit(stage.client)
    await stage.sessions_end()
    assert await stage.notes() == []
    assert stage.proxy.struck == {REQUEST: 1}


@commits
async def test_a_lost_commit_answer_is_a_lost_connection_though_the_transaction_is_committed(
    stage: Stage, commit: Commit
) -> None:
    stage.proxy.arm(ANSWER)
    with pytest.raises(LOST):
        await commit(stage.client)
    assert await stage.notes() == ["kept"]
    assert stage.proxy.struck == {ANSWER: 1}


async def test_a_swallowed_commit_answer_is_silence_though_the_transaction_is_committed(stage: Stage) -> None:
    swallowed = Lose(postgres.COMMIT_ANSWER, silent=True)
    stage.proxy.arm(swallowed)
    task = asyncio.create_task(by_a_transaction(stage.client))
    await wait_until(lambda: stage.proxy.struck[swallowed], AMPLE_SECONDS, "strike")
    assert await stage.notes() == ["kept"]
    assert not task.done()
    assert not stage.client.is_closed()
    stage.client.terminate()
    with pytest.raises(LOST):
        await task
    await stage.sessions_end()


async def test_a_commit_that_is_refused_has_no_answer_to_lose(stage: Stage) -> None:
    once = "ALTER TABLE notes ADD CONSTRAINT once UNIQUE (text) DEFERRABLE INITIALLY DEFERRED"
    await stage.client.execute(f"{once}; {INSERT}")
    stage.proxy.arm(ANSWER)
    with pytest.raises(asyncpg.UniqueViolationError):
        await by_a_transaction(stage.client)
    with pytest.raises(asyncpg.DivisionByZeroError):
        await stage.client.execute("BEGIN; SELECT 1 / 0")
    assert await stage.client.execute("COMMIT") == "ROLLBACK"
    assert not stage.proxy.struck


async def test_the_end_of_a_savepoint_is_no_commit(stage: Stage) -> None:
    async with stage.client.transaction():
        stage.proxy.arm(REQUEST)
        stage.proxy.arm(ANSWER)
        await by_a_transaction(stage.client)
        stage.proxy.disarm()
    assert not stage.proxy.struck


async def test_the_pool_takes_a_lost_commit_for_an_outage_and_works_again(stage: Stage) -> None:
    async def note(pool: db.Pool) -> None:
        async with db.transaction(pool) as conn:
            await conn.execute(INSERT)

    stage.proxy.arm(Lose(postgres.COMMIT_REQUEST, times=1))
    pool = await db.create_pool(stage.url, 1)
    try:
        with pytest.raises(DatabaseUnavailable):
            await note(pool)
        await note(pool)
    finally:
        pool.terminate()
    assert await stage.notes() == ["kept"]


# Frames in segments


def frame(kind: bytes, body: bytes) -> bytes:
    return kind + struct.pack("!i", len(body) + 4) + body


class Crumbs:
    """A protocol whose every byte is a segment of its own."""

    def feed(self, chunk: bytes) -> Iterator[Piece]:
        return (Piece(chunk[at : at + 1]) for at in range(len(chunk)))

    def requests(self) -> Watcher:
        return self

    answers = requests


class Pipeline(Crumbs):
    """A protocol that sends an INSERT's frames in one segment with the COMMIT's."""

    PARSE = frame(b"P", b"\0INSERT INTO notes VALUES ('piped')\0\0\0")
    FRAMES = PARSE + frame(b"B", bytes(8)) + frame(b"E", bytes(5))

    def feed(self, chunk: bytes) -> Iterator[Piece]:
        yield Piece(self.FRAMES + chunk if chunk.startswith(b"Q") and b"COMMIT" in chunk else chunk)


@contextlib.asynccontextmanager
async def client_through(frames: Frames, stage: Stage) -> AsyncIterator[asyncpg.Connection]:
    """A client whose bytes a first proxy arranges in its own way before the stage's proxy sees them."""
    async with Proxy("127.0.0.1", stage.proxy.port, frames=frames) as first, client_of(first.url(stage.url)) as conn:
        yield conn


@pytest.mark.parametrize(("fault", "kept"), [(REQUEST, []), (ANSWER, ["kept"])])
async def test_a_commit_is_found_though_every_byte_comes_by_itself(stage: Stage, fault: Lose, kept: list[str]) -> None:
    async with client_through(Crumbs(), stage) as conn:
        stage.proxy.arm(fault)
        with pytest.raises(LOST):
            await by_a_transaction(conn)
    stage.client.terminate()
    await stage.sessions_end()
    assert await stage.notes() == kept


async def test_a_commit_is_found_behind_other_frames_of_its_segment(stage: Stage) -> None:
    async with client_through(Pipeline(), stage) as conn:
        await by_a_transaction(conn)
        assert await stage.notes() == ["kept", "piped"]
        stage.proxy.arm(REQUEST)
        with pytest.raises(LOST):
            await by_a_transaction(conn)
    stage.client.terminate()
    await stage.sessions_end()
    assert await stage.notes() == ["kept", "piped"]


STARTUP = struct.pack("!ii", 17, 196608) + b"user\0me\0\0"
COMMITS = frame(b"B", b"\0name" + bytes(7)), frame(b"Q", b"SELECT 1; COMMIT; \0")
OTHERS = (
    frame(b"Q", b"COMMIT PREPARED 'x'\0"),
    frame(b"Q", bytes(postgres.READ_BYTES)),
    frame(b"d", b"Q\0\0\0\x0bCOMMIT\0"),
)
SENT = [frame(b"P", b"name\0COMMIT\0\0\0"), COMMITS[0], frame(b"B", bytes(8)), *OTHERS, COMMITS[1], frame(b"S", b"")]
DONE = frame(b"C", b"COMMIT\0")
RECEIVED = [frame(b"C", b"BEGIN\0"), frame(b"D", DONE), DONE, frame(b"C", b"COMMIT PREPARED\0"), frame(b"Z", b"I")]


@given(cuts=st.sets(st.integers(1, 300)))
def test_however_the_stream_is_cut_the_same_frames_are_named_and_no_byte_is_lost(cuts: set[int]) -> None:
    sent, received = STARTUP + b"".join(SENT), b"".join(RECEIVED)
    for watcher, stream, named in ((postgres.requests(), sent, [*COMMITS]), (postgres.answers(), received, [DONE])):
        edges = [0, *sorted(cut for cut in cuts if cut < len(stream)), len(stream)]
        chunks = [stream[start:end] for start, end in itertools.pairwise(edges)]
        pieces = [piece for chunk in chunks for piece in watcher.feed(chunk)]
        assert b"".join(piece.data for piece in pieces) == stream
        assert [piece.data for piece in pieces if piece.frame] == named


@pytest.mark.parametrize("stream", [b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x02\0\x01\0\x01", STARTUP + bytes(5)])
def test_a_stream_of_another_protocol_is_an_error(stream: bytes) -> None:
    with pytest.raises(ValueError, match="not a PostgreSQL"):
        list(postgres.requests().feed(stream))


# The link


async def test_a_delayed_connection_works_and_keeps_the_order(stage: Stage) -> None:
    every, some = Delay(0.001), Delay(0.01, probability=0.5)
    stage.proxy.arm(every)
    stage.proxy.arm(some)
    rows = await stage.client.fetch("SELECT n FROM generate_series(1, 100000) n")
    assert [row["n"] for row in rows] == list(range(1, 100_001))
    assert stage.proxy.struck[every] > stage.proxy.struck[some] > 0


@pytest.mark.parametrize(("direction", "arrived"), [(Direction.UP, []), (Direction.DOWN, ["kept"])])
async def test_a_delay_holds_the_chunks_of_its_direction(
    stage: Stage, direction: Direction, arrived: list[str]
) -> None:
    delay = Delay(NEVER_SECONDS, direction)
    stage.proxy.arm(delay)
    task = asyncio.create_task(stage.client.execute(INSERT))
    await wait_until(lambda: stage.proxy.struck[delay], AMPLE_SECONDS, "strike")
    assert await stage.notes() == arrived
    assert not task.done()
    stage.proxy.cut()
    with pytest.raises(LOST):
        await task
    await stage.sessions_end()
    assert await stage.notes() == arrived


async def test_a_sender_waits_when_much_of_what_it_sent_is_held(stage: Stage) -> None:
    stage.proxy.arm(Delay(NEVER_SECONDS, Direction.DOWN, times=1))
    task = asyncio.create_task(stage.client.execute("SELECT repeat('x', 1000) FROM generate_series(1, 60000)"))
    await stage.server_waits("ClientWrite")
    stage.proxy.cut()
    with pytest.raises(LOST):
        await task


async def test_a_blackhole_holds_open_and_new_connections_until_it_is_lifted(stage: Stage) -> None:
    blackhole = Blackhole()
    stage.proxy.arm(blackhole)
    both = asyncio.gather(by_a_transaction(stage.client), stage.answers())
    await wait_until(lambda: stage.proxy.struck[blackhole] == 2, AMPLE_SECONDS, "second connection")
    for _ in range(20):  # round trips to the server, of which each of the two needs only a few
        assert await stage.notes() == []
    assert not both.done()
    stage.proxy.disarm(blackhole)
    assert list(await both) == [None, True]
    assert await stage.notes() == ["kept"]


async def test_a_commit_held_in_a_blackhole_arrives_after_its_client_has_gone(stage: Stage) -> None:
    await stage.client.execute(f"BEGIN; {INSERT}")
    stage.proxy.arm(Blackhole())
    with pytest.raises(TimeoutError):
        await stage.client.execute("COMMIT", timeout=0.05)
    stage.client.terminate()
    assert await stage.notes() == []
    stage.proxy.disarm()
    await wait_until(stage.notes, AMPLE_SECONDS, "late commit")


async def test_a_reset_ends_open_and_new_connections_with_an_rst(stage: Stage) -> None:
    reset = Reset()
    reader, writer = await asyncio.open_connection("127.0.0.1", stage.proxy.port)
    assert await stage.client.fetchval("SELECT 42") == 42  # by then the proxy has accepted the other one too
    stage.proxy.arm(reset)
    with pytest.raises(ConnectionResetError):
        await reader.read()
    await stage.client_is_closed()
    assert stage.proxy.struck == {reset: 2}
    writer.close()
    with pytest.raises(ConnectionResetError):
        await asyncpg.connect(stage.url, ssl=False)  # which it would try once more without SSL, otherwise
    assert stage.proxy.struck == {reset: 3}


async def test_refusing_keeps_new_connections_out_and_lets_open_ones_live_until_it_is_lifted(stage: Stage) -> None:
    refuse, port = Refuse(), stage.proxy.port
    for _ in range(3):
        stage.proxy.arm(refuse)
        with pytest.raises(ConnectionRefusedError):
            await stage.answers()
        assert await stage.client.fetchval("SELECT 42") == 42
        stage.proxy.disarm()
        assert await stage.answers()
    assert stage.proxy.port == port
    assert stage.proxy.struck == {refuse: 3}


async def test_cutting_ends_every_connection_once(stage: Stage) -> None:
    stage.proxy.cut()
    await stage.client_is_closed()
    assert await stage.answers()


# How often


async def test_a_fault_strikes_with_its_probability_as_the_dice_fall(database_url: str) -> None:
    ours, its = random.Random(5), random.Random(5)  # noqa: S311 - the same in every run is what is wanted
    expected = [ours.random() < 0.3 for _ in range(20)]
    lost = Lose(postgres.COMMIT_REQUEST, probability=0.3)
    async with stage_of(database_url, its) as stage:
        stage.proxy.arm(lost)
        assert await stage.commit_often(20) == expected
        assert stage.proxy.struck == {lost: sum(expected)}
        assert len(await stage.notes()) == expected.count(False)


async def test_a_fault_strikes_so_many_times_and_afresh_when_armed_again(stage: Stage) -> None:
    lost = Lose(postgres.COMMIT_ANSWER, times=2)
    for already in (0, 2):
        stage.proxy.arm(lost)
        assert await stage.commit_often(4) == [True, True, False, False]
        assert stage.proxy.struck == {lost: already + 2}


async def test_a_disarmed_fault_strikes_no_more_and_the_others_do(stage: Stage) -> None:
    delay = Delay(0.0)
    stage.proxy.arm(delay)
    stage.proxy.arm(ANSWER)
    stage.proxy.disarm(delay)
    assert await stage.commit_often(1) == [True]
    stage.proxy.disarm()
    assert await stage.commit_often(1) == [False]
    assert stage.proxy.struck == {ANSWER: 1}


async def test_one_connection_of_several_is_held_when_a_blackhole_may_strike_once(stage: Stage) -> None:
    blackhole = Blackhole(times=1)
    stage.proxy.arm(blackhole)
    task = asyncio.create_task(stage.client.fetchval("SELECT 42"))
    assert await stage.answers()
    assert not task.done()
    stage.proxy.disarm()
    assert await task == 42
    assert stage.proxy.struck == {blackhole: 1}
