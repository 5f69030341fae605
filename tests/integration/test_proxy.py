"""The fault proxy: without faults nobody notices it; each fault does what it says, to whom it says, and is counted."""

import asyncio
import contextlib
import random

import asyncpg
import pytest

from chaos import postgres
from chaos.faults import Blackhole, Delay, Direction, Lose, Refuse, Reset, Throttle
from chaos.proxy import Proxy
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
    text = "".join(map(str, range(2_000_000)))
    assert await proxied.client.fetchval("SELECT $1::text", text) == text
    rows = await proxied.client.fetch("SELECT n FROM generate_series(1, 200000) n")
    assert [row["n"] for row in rows] == list(range(1, 200_001))


async def test_concurrent_connections_do_not_mix(proxied: Proxied) -> None:
    async def note(number: int) -> None:
        async with client_of(proxied.url) as conn:
            for each in range(10):
                async with conn.transaction():
                    await conn.execute("INSERT INTO notes VALUES ($1)", f"{number:02} {each}")
                assert await conn.fetchval("SELECT $1::int", number) == number

    await asyncio.gather(*map(note, range(40)))
    assert await proxied.notes() == [f"{number:02} {each}" for number in range(40) for each in range(10)]


@pytest.mark.parametrize("mode", ["disable", "prefer"])
async def test_frames_are_seen_whether_or_not_the_client_would_encrypt(proxied: Proxied, mode: str) -> None:
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


async def test_what_the_server_says_before_it_ends_a_session_arrives(proxied: Proxied) -> None:
    task = asyncio.create_task(proxied.client.execute(SLEEP))
    await proxied.server_waits("PgSleep")
    await proxied.witness.execute("SELECT pg_terminate_backend($1)", proxied.client.get_server_pid())
    with pytest.raises(LOST, match="terminating connection due to administrator command"):
        await task


async def test_a_client_that_goes_takes_its_session_along(proxied: Proxied) -> None:
    proxied.client.terminate()
    await proxied.sessions_end()


async def test_an_upstream_that_is_out_shows_as_a_connection_that_closes(free_port: int) -> None:
    async with Proxy("127.0.0.1", free_port, frames=postgres) as proxy:
        with pytest.raises(LOST):
            await asyncpg.connect(f"postgresql://nobody@127.0.0.1:{proxy.port}/nowhere")


async def test_a_proxy_that_is_left_leaves_no_connection(proxied: Proxied) -> None:
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
async def test_a_delay_holds_the_chunks_of_its_direction(
    proxied: Proxied, delay: Delay | Throttle, arrived: list[str]
) -> None:
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


async def test_a_sender_waits_while_much_of_what_it_sent_is_held(proxied: Proxied) -> None:
    proxied.proxy.arm(Delay(NEVER_SECONDS, Direction.DOWN, times=1))
    task = asyncio.create_task(proxied.client.execute("SELECT repeat('x', 1000) FROM generate_series(1, 30000)"))
    await proxied.server_waits("ClientWrite")
    for _ in range(200):  # round trips: time enough for the proxy to take all of it
        await proxied.notes()
    await proxied.server_waits("ClientWrite")
    proxied.proxy.cut()
    with pytest.raises(LOST):
        await task


async def test_a_blackhole_holds_open_and_new_connections_until_it_is_lifted(proxied: Proxied) -> None:
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


async def test_a_commit_held_in_a_blackhole_arrives_after_its_client_has_gone(proxied: Proxied) -> None:
    await proxied.client.execute(f"BEGIN; {INSERT}")
    proxied.proxy.arm(Blackhole())
    with pytest.raises(TimeoutError):
        await proxied.client.execute("COMMIT", timeout=0.05)
    proxied.client.terminate()
    assert await proxied.notes() == []
    proxied.proxy.disarm()
    await wait_until(proxied.notes, AMPLE_SECONDS, "late commit")


async def test_a_reset_ends_open_and_new_connections_with_an_rst(proxied: Proxied) -> None:
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
        await asyncpg.connect(proxied.url, ssl=False)  # which it would try once more without SSL, otherwise
    assert proxied.proxy.struck == {reset: 3}


async def test_refusing_keeps_new_connections_out_and_lets_open_ones_live_until_it_is_lifted(proxied: Proxied) -> None:
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


async def test_a_fault_strikes_with_its_probability_as_the_dice_fall(database_url: str) -> None:
    ours, its = random.Random(5), random.Random(5)  # noqa: S311 - the same in every run is what is wanted
    expected = [ours.random() < 0.3 for _ in range(20)]
    lost = Lose(postgres.COMMIT_REQUEST, probability=0.3)
    async with proxied_to(database_url, its) as proxied:
        proxied.proxy.arm(lost)
        assert await proxied.commit_often(20) == expected
        assert proxied.proxy.struck == {lost: sum(expected)}
        assert len(await proxied.notes()) == expected.count(False)


async def test_a_fault_strikes_so_many_times_and_afresh_when_armed_again(proxied: Proxied) -> None:
    lost = Lose(postgres.COMMIT_ANSWER, times=2)
    for already in (0, 2):
        proxied.proxy.arm(lost)
        assert await proxied.commit_often(4) == [True, True, False, False]
        assert proxied.proxy.struck == {lost: already + 2}


async def test_a_disarmed_fault_strikes_no_more_and_the_others_do(proxied: Proxied) -> None:
    delay = Delay(0.0)
    proxied.proxy.arm(delay)
    proxied.proxy.arm(ANSWER)
    proxied.proxy.disarm(delay)
    assert await proxied.commit_often(1) == [True]
    proxied.proxy.disarm()
    assert await proxied.commit_often(1) == [False]
    assert proxied.proxy.struck == {ANSWER: 1}


async def test_one_connection_of_several_is_held_when_a_blackhole_may_strike_once(proxied: Proxied) -> None:
    blackhole = Blackhole(times=1)
    proxied.proxy.arm(blackhole)
    task = asyncio.create_task(proxied.client.fetchval("SELECT 42"))
    assert await proxied.answers()
    assert not task.done()
    proxied.proxy.disarm()
    assert await task == 42
    assert proxied.proxy.struck == {blackhole: 1}
