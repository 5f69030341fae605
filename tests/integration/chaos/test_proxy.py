"""The fault proxy: it forwards unchanged without faults; each fault does only what it says, and is counted."""

import asyncio
import contextlib
import random

import asyncpg
import pytest

from chaos.proxy import postgres
from chaos.proxy.faults import Blackhole, Delay, Direction, Lose, Refuse, Reset, Throttle
from chaos.proxy.proxy import Proxy
from tests.harness.proxied import (
    ANSWER,
    INSERT,
    LOST,
    NEVER_SECONDS,
    SLEEP,
    Proxied,
    by_a_transaction,
    client_of,
    proxied_to,
)
from tests.harness.wait import AMPLE_SECONDS, wait_until

# Without faults


async def test_large_parameters_and_results_arrive_whole(proxied: Proxied) -> None:
    """Large statements and results pass the proxy unchanged."""
    text = "".join(map(str, range(2_000_000)))
    assert await proxied.client.fetchval("SELECT $1::text", text) == text
    rows = await proxied.client.fetch("SELECT n FROM generate_series(1, 200000) n")
    assert [row["n"] for row in rows] == list(range(1, 200_001))


async def test_concurrent_connections_do_not_mix(proxied: Proxied) -> None:
    """Each of many concurrent connections gets its own answers."""

    async def note(number: int) -> None:
        async with client_of(proxied.url) as conn:
            for round_ in range(10):
                async with conn.transaction():
                    await conn.execute("INSERT INTO notes VALUES ($1)", f"{number:02} {round_}")
                assert await conn.fetchval("SELECT $1::int", number) == number

    await asyncio.gather(*map(note, range(40)))
    assert await proxied.notes() == [f"{number:02} {round_}" for number in range(40) for round_ in range(10)]


@pytest.mark.parametrize("mode", ["disable", "prefer"])
async def test_frames_are_seen_with_any_ssl_mode(proxied: Proxied, mode: str) -> None:
    """The proxy declines encryption, so it reads the frames of every client."""
    proxied.proxy.arm(ANSWER)
    async with client_of(f"{proxied.url}?sslmode={mode}") as conn:
        with pytest.raises(LOST):
            await by_a_transaction(conn)


async def test_a_statement_can_be_cancelled(proxied: Proxied) -> None:
    task = asyncio.create_task(proxied.client.execute(SLEEP))
    await proxied.server_waits("PgSleep")
    task.cancel()
    await asyncio.wait({task})
    assert await proxied.client.fetchval("SELECT 42") == 42


async def test_the_last_message_of_a_session_arrives(proxied: Proxied) -> None:
    """The server's message before it ends a session reaches the client."""
    task = asyncio.create_task(proxied.client.execute(SLEEP))
    await proxied.server_waits("PgSleep")
    await proxied.witness.execute("SELECT pg_terminate_backend($1)", proxied.client.get_server_pid())
    with pytest.raises(LOST, match="terminating connection due to administrator command"):
        await task


async def test_a_client_that_leaves_ends_its_session(proxied: Proxied) -> None:
    """When the client disconnects, its session on the server ends."""
    proxied.client.terminate()
    await proxied.sessions_end()


async def test_a_dead_upstream_closes_connections(free_port: int) -> None:
    """If the upstream is down, the proxy accepts a connection and closes it."""
    async with Proxy("127.0.0.1", free_port, frames=postgres) as proxy:
        with pytest.raises(LOST):
            await asyncpg.connect(f"postgresql://nobody@127.0.0.1:{proxy.port}/nowhere")


async def test_leaving_the_proxy_closes_its_connections(proxied: Proxied) -> None:
    """Leaving the proxy's context closes every connection."""
    proxy = Proxy("127.0.0.1", proxied.proxy.port, frames=postgres)
    async with contextlib.AsyncExitStack() as clients:
        async with proxy:
            proxied.client = await clients.enter_async_context(client_of(proxy.url(proxied.url)))
        await proxied.client_is_closed()


# The link


async def test_a_delayed_connection_works_and_keeps_the_order(database_url: str) -> None:
    every, some = Delay(0.001), Delay(0.01, probability=0.5)
    async with proxied_to(database_url, random.Random(7)) as proxied:  # noqa: S311 - two of its first three throws hit
        proxied.proxy.arm(every)
        proxied.proxy.arm(some)
        rows = await proxied.client.fetch("SELECT n FROM generate_series(1, 100000) n")
    assert [row["n"] for row in rows] == list(range(1, 100_001))
    assert proxied.proxy.struck[every] > proxied.proxy.struck[some] > 0


@pytest.mark.parametrize(
    ("delay", "arrived"),
    [
        (Delay(NEVER_SECONDS, Direction.UP), []),
        (Delay(NEVER_SECONDS, Direction.DOWN), ["kept"]),
        (Throttle(1, Direction.UP), []),  # a byte a second: minutes for any statement
    ],
    ids=str,
)
async def test_a_delay_affects_its_direction_only(
    proxied: Proxied, delay: Delay | Throttle, arrived: list[str]
) -> None:
    """A delay holds the chunks of its direction, and no others."""
    proxied.proxy.arm(delay)
    task = asyncio.create_task(proxied.client.execute(INSERT))
    await wait_until(lambda: proxied.proxy.struck[delay], AMPLE_SECONDS, "strike")
    assert await proxied.notes() == arrived
    assert not task.done()
    proxied.proxy.cut()
    with pytest.raises(LOST):
        await task
    await proxied.sessions_end()
    assert await proxied.notes() == arrived


async def test_a_sender_waits_while_much_is_queued(proxied: Proxied) -> None:
    """The proxy stops reading from a sender while much of its data is queued."""
    proxied.proxy.arm(Delay(NEVER_SECONDS, Direction.DOWN, times=1))
    task = asyncio.create_task(proxied.client.execute("SELECT repeat('x', 1000) FROM generate_series(1, 30000)"))
    await proxied.server_waits("ClientWrite")
    for _ in range(200):  # round trips: enough time for the proxy to read everything
        await proxied.notes()
    await proxied.server_waits("ClientWrite")
    proxied.proxy.cut()
    with pytest.raises(LOST):
        await task


async def test_a_blackhole_holds_all_connections(proxied: Proxied) -> None:
    """A blackhole holds open and new connections until it is disarmed."""
    blackhole = Blackhole()
    proxied.proxy.arm(blackhole)
    both = asyncio.gather(by_a_transaction(proxied.client), proxied.answers())
    await wait_until(lambda: proxied.proxy.struck[blackhole] == 2, AMPLE_SECONDS, "second connection")
    for _ in range(20):  # round trips to the server, of which each of the two needs only a few
        assert await proxied.notes() == []
    assert not both.done()
    proxied.proxy.disarm(blackhole)
    assert list(await both) == [None, True]
    assert await proxied.notes() == ["kept"]


async def test_a_commit_leaves_a_blackhole_late(proxied: Proxied) -> None:
    """A COMMIT held in a blackhole arrives even after its client has left."""
    await proxied.client.execute(f"BEGIN; {INSERT}")
    proxied.proxy.arm(Blackhole())
    with pytest.raises(TimeoutError):
        await proxied.client.execute("COMMIT", timeout=0.05)
    proxied.client.terminate()
    assert await proxied.notes() == []
    proxied.proxy.disarm()
    await wait_until(proxied.notes, AMPLE_SECONDS, "late commit")


async def test_a_reset_ends_open_and_new_connections(proxied: Proxied) -> None:
    """A reset ends open and new connections with a TCP RST."""
    reset = Reset()
    reader, writer = await asyncio.open_connection("127.0.0.1", proxied.proxy.port)
    assert await proxied.client.fetchval("SELECT 42") == 42  # by then the proxy has accepted the other one too
    proxied.proxy.arm(reset)
    with pytest.raises(ConnectionResetError):
        await reader.read()
    await proxied.client_is_closed()
    assert proxied.proxy.struck == {reset: 2}
    writer.close()
    with pytest.raises(ConnectionResetError):
        await asyncpg.connect(proxied.url, ssl=False)  # otherwise it would retry without SSL
    assert proxied.proxy.struck == {reset: 3}


async def test_refuse_affects_new_connections_only(proxied: Proxied) -> None:
    """New connections are refused until the fault is disarmed; open ones stay."""
    refuse, port = Refuse(), proxied.proxy.port
    for _ in range(3):
        proxied.proxy.arm(refuse)
        with pytest.raises(ConnectionRefusedError):
            await proxied.answers()
        assert await proxied.client.fetchval("SELECT 42") == 42
        proxied.proxy.disarm()
        assert await proxied.answers()
    assert proxied.proxy.port == port
    assert proxied.proxy.struck == {refuse: 3}


async def test_cutting_ends_every_connection_once(proxied: Proxied) -> None:
    proxied.proxy.cut()
    await proxied.client_is_closed()
    assert await proxied.answers()


# How often


async def test_a_fault_strikes_with_its_probability(database_url: str) -> None:
    """A fault strikes with its probability, and equal dice give equal strikes."""
    ours, its = random.Random(5), random.Random(5)  # noqa: S311 - the same in every run is what is wanted
    expected = [ours.random() < 0.3 for _ in range(20)]
    lost = Lose(postgres.COMMIT_REQUEST, probability=0.3)
    async with proxied_to(database_url, its) as proxied:
        proxied.proxy.arm(lost)
        assert await proxied.commit_often(20) == expected
        assert proxied.proxy.struck == {lost: sum(expected)}
        assert len(await proxied.notes()) == expected.count(False)


async def test_times_limits_the_strikes_since_arming(proxied: Proxied) -> None:
    """A fault strikes at most `times`, counted from arming it."""
    lost = Lose(postgres.COMMIT_ANSWER, times=2)
    for already in (0, 2):
        proxied.proxy.arm(lost)
        assert await proxied.commit_often(4) == [True, True, False, False]
        assert proxied.proxy.struck == {lost: already + 2}


async def test_disarming_stops_one_fault(proxied: Proxied) -> None:
    """A disarmed fault no longer strikes; the others do."""
    delay = Delay(0.0)
    proxied.proxy.arm(delay)
    proxied.proxy.arm(ANSWER)
    proxied.proxy.disarm(delay)
    assert await proxied.commit_often(1) == [True]
    proxied.proxy.disarm()
    assert await proxied.commit_often(1) == [False]
    assert proxied.proxy.struck == {ANSWER: 1}


async def test_a_blackhole_may_strike_one_connection(proxied: Proxied) -> None:
    """With `times=1`, a blackhole holds one of several connections."""
    blackhole = Blackhole(times=1)
    proxied.proxy.arm(blackhole)
    task = asyncio.create_task(proxied.client.fetchval("SELECT 42"))
    assert await proxied.answers()
    assert not task.done()
    proxied.proxy.disarm()
    assert await task == 42
    assert proxied.proxy.struck == {blackhole: 1}
