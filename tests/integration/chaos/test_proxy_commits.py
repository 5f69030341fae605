"""The fault proxy loses a COMMIT or its answer, at any position in the stream."""

import asyncio
import contextlib
import itertools
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

import asyncpg
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app import db
from app.errors import DatabaseUnavailable
from chaos.proxy import postgres
from chaos.proxy.faults import Lose
from chaos.proxy.frames import Frames, Piece, Watcher
from chaos.proxy.proxy import Proxy
from tests.harness.proxied import (
    ANSWER,
    INSERT,
    LOST,
    REQUEST,
    Proxied,
    by_a_transaction,
    client_of,
)
from tests.harness.wait import AMPLE_SECONDS, wait_until


async def by_one_query(conn: asyncpg.Connection) -> None:
    await conn.execute(f"BEGIN; {INSERT}; commit ;")


async def by_a_prepared_statement(conn: asyncpg.Connection) -> None:
    await conn.execute(f"BEGIN; {INSERT}")
    await conn.fetch("COMMIT")


Commit = Callable[[asyncpg.Connection], Awaitable[None]]
commits = pytest.mark.parametrize("commit", [by_a_transaction, by_one_query, by_a_prepared_statement])


# A COMMIT is lost


@commits
async def test_a_lost_commit_request_rolls_back(proxied: Proxied, commit: Commit) -> None:
    """The client loses its connection, and the transaction is rolled back."""
    proxied.proxy.arm(REQUEST)
    with pytest.raises(LOST):
        await commit(proxied.client)
    await proxied.sessions_end()
    assert await proxied.notes() == []
    assert proxied.proxy.struck == {REQUEST: 1}


@commits
async def test_a_lost_commit_answer_is_committed(proxied: Proxied, commit: Commit) -> None:
    """The client loses its connection, but the transaction is committed."""
    proxied.proxy.arm(ANSWER)
    with pytest.raises(LOST):
        await commit(proxied.client)
    assert await proxied.notes() == ["kept"]
    assert proxied.proxy.struck == {ANSWER: 1}


async def test_a_silently_lost_commit_answer_is_committed(proxied: Proxied) -> None:
    """The client waits without an answer, but the transaction is committed."""
    swallowed = Lose(postgres.COMMIT_ANSWER, silent=True)
    proxied.proxy.arm(swallowed)
    task = asyncio.create_task(by_a_transaction(proxied.client))
    await wait_until(lambda: proxied.proxy.struck[swallowed], AMPLE_SECONDS, "strike")
    assert await proxied.notes() == ["kept"]
    assert not task.done()
    assert not proxied.client.is_closed()
    proxied.client.terminate()
    with pytest.raises(LOST):
        await task
    await proxied.sessions_end()


async def test_a_failed_commit_has_no_answer_to_lose(proxied: Proxied) -> None:
    """The answer to a COMMIT that fails is not a COMMIT answer."""
    once = "ALTER TABLE notes ADD CONSTRAINT once UNIQUE (text) DEFERRABLE INITIALLY DEFERRED"
    await proxied.client.execute(f"{once}; {INSERT}")
    proxied.proxy.arm(ANSWER)
    with pytest.raises(asyncpg.UniqueViolationError):
        await by_a_transaction(proxied.client)
    with pytest.raises(asyncpg.DivisionByZeroError):
        await proxied.client.execute("BEGIN; SELECT 1 / 0")
    assert await proxied.client.execute("COMMIT") == "ROLLBACK"
    assert not proxied.proxy.struck


async def test_the_end_of_a_savepoint_is_no_commit(proxied: Proxied) -> None:
    """Releasing a savepoint is not named a COMMIT."""
    async with proxied.client.transaction():
        proxied.proxy.arm(REQUEST)
        proxied.proxy.arm(ANSWER)
        await by_a_transaction(proxied.client)
        proxied.proxy.disarm()
    assert not proxied.proxy.struck


async def test_a_pool_recovers_from_a_lost_commit(proxied: Proxied) -> None:
    """A lost COMMIT raises DatabaseUnavailable, and the pool works again afterwards."""

    async def note(pool: db.Pool) -> None:
        async with db.transaction(pool) as conn:
            await conn.execute(INSERT)

    proxied.proxy.arm(Lose(postgres.COMMIT_REQUEST, times=1))
    async with db.open_pool(proxied.url, 1, wait_seconds=AMPLE_SECONDS) as pool:
        with pytest.raises(DatabaseUnavailable):
            await note(pool)
        await note(pool)
    assert await proxied.notes() == ["kept"]


# Frames in segments


def frame(kind: bytes, body: bytes) -> bytes:
    return kind + struct.pack("!i", len(body) + 4) + body


class Crumbs(Watcher):
    """A protocol that forwards every byte alone."""

    def feed(self, chunk: bytes) -> Iterator[Piece]:
        return (Piece(chunk[at : at + 1]) for at in range(len(chunk)))

    def requests(self) -> Watcher:
        return self

    answers = requests


class Pipeline(Crumbs):
    """A protocol that forwards the frames of INSERT and COMMIT in one chunk."""

    PARSE = frame(b"P", b"\0INSERT INTO notes VALUES ('piped')\0\0\0")
    FRAMES = PARSE + frame(b"B", bytes(8)) + frame(b"E", bytes(5))

    def feed(self, chunk: bytes) -> Iterator[Piece]:
        yield Piece(self.FRAMES + chunk if chunk.startswith(b"Q") and b"COMMIT" in chunk else chunk)


@contextlib.asynccontextmanager
async def client_through(frames: Frames, proxied: Proxied) -> AsyncIterator[asyncpg.Connection]:
    """A client behind a first proxy, which rearranges the chunks for the second one."""
    async with (
        Proxy("127.0.0.1", proxied.proxy.port, frames=frames) as first,
        client_of(first.url(proxied.url)) as conn,
    ):
        yield conn


@pytest.mark.parametrize(("fault", "kept"), [(REQUEST, []), (ANSWER, ["kept"])])
async def test_a_commit_is_found_in_single_bytes(proxied: Proxied, fault: Lose, kept: list[str]) -> None:
    """A COMMIT is found even if every byte arrives alone."""
    async with client_through(Crumbs(), proxied) as conn:
        proxied.proxy.arm(fault)
        with pytest.raises(LOST):
            await by_a_transaction(conn)
    proxied.client.terminate()
    await proxied.sessions_end()
    assert await proxied.notes() == kept


async def test_a_commit_is_found_behind_other_frames(proxied: Proxied) -> None:
    """A COMMIT is found behind other frames in one chunk."""
    async with client_through(Pipeline(), proxied) as conn:
        await by_a_transaction(conn)
        assert await proxied.notes() == ["kept", "piped"]
        proxied.proxy.arm(REQUEST)
        with pytest.raises(LOST):
            await by_a_transaction(conn)
    proxied.client.terminate()
    await proxied.sessions_end()
    assert await proxied.notes() == ["kept", "piped"]


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
def test_chunk_boundaries_do_not_matter(cuts: set[int]) -> None:
    """With any chunk boundaries, the same frames are named, and no byte is lost."""
    sent, received = STARTUP + b"".join(SENT), b"".join(RECEIVED)
    for watcher, stream, named in ((postgres.requests(), sent, [*COMMITS]), (postgres.answers(), received, [DONE])):
        edges = [0, *sorted(cut for cut in cuts if cut < len(stream)), len(stream)]
        chunks = [stream[start:end] for start, end in itertools.pairwise(edges)]
        pieces = [piece for chunk in chunks for piece in watcher.feed(chunk)]
        assert b"".join(piece.data for piece in pieces) == stream
        assert [piece.data for piece in pieces if piece.frame] == named


@pytest.mark.parametrize("stream", [b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x02\0\x01\0\x01", STARTUP + bytes(5)])
def test_a_stream_of_another_protocol_is_an_error(stream: bytes) -> None:
    """A stream of another protocol raises ValueError."""
    with pytest.raises(ValueError, match="not a PostgreSQL"):
        list(postgres.requests().feed(stream))
