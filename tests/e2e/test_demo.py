"""`orders demo`: the supervisor and its children. They may die at any time, and none outlives the run."""

import asyncio
import contextlib
import os
import re
import signal
import sys
from pathlib import Path

import asyncpg
import httpx
import psutil
import pytest

from tests.e2e.conftest import StartDemo, StartService, client, order
from tests.harness.checker import FINAL, Answers, violations
from tests.harness.commands import orders
from tests.harness.processes import REPOSITORY, Service, is_alive
from tests.harness.wait import AMPLE_SECONDS, wait_until

CHILDREN = {"service": "app.demo.service_process", "sandbox": "app.demo.sandbox_process", "PostgreSQL": "postgres"}
PORTS = ("--port", "--sandbox-port", "--playground-port")
END_SECONDS = 20.0  # of the contract


def children(demo: Service) -> dict[str, psutil.Process]:
    """Return the children that run now, by name."""
    found: dict[str, psutil.Process] = {}
    for process in psutil.Process(demo.process.pid).children():
        with contextlib.suppress(psutil.NoSuchProcess):
            line = process.cmdline()
            found |= {name: process for name, part in CHILDREN.items() if any(part in word for word in line)}
    return found


def family(demo: Service) -> list[psutil.Process]:
    supervisor = psutil.Process(demo.process.pid)
    return [supervisor, *supervisor.children(recursive=True)]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_while_the_demo_starts_is_an_orderly_end(
    number: signal.Signals, tmp_path: Path, free_port: int
) -> None:
    """Ctrl-C and SIGTERM end a starting demo with exit code 0, and no process is left."""
    ports = ("--port", "0", "--playground-port", "0", "--sandbox-port", str(free_port))
    arguments = ("-m", "app", "demo", "--ephemeral", *ports)
    demo = await asyncio.create_subprocess_exec(
        *(sys.executable, *arguments),
        cwd=REPOSITORY,
        env={**os.environ, "TMPDIR": str(tmp_path)},
        stderr=asyncio.subprocess.PIPE,
    )
    assert demo.stderr is not None
    assert b"Starting PostgreSQL" in await demo.stderr.readline()
    members = psutil.Process(demo.pid).children(recursive=True)
    demo.send_signal(number)
    _, err = await demo.communicate()
    assert (demo.returncode, err) == (0, b"")
    assert not any(map(is_alive, members))
    assert os.listdir(tmp_path) == []  # noqa: PTH208 - Path.iterdir is refused in a coroutine


async def test_the_demo_finishes_and_keeps_its_orders(start_demo: StartDemo) -> None:
    """Orders end, survive a restart with the same `--data-dir`, and no process is left."""
    demo = await start_demo()
    sandbox_url = re.findall(r"sandbox +(http://\S+)", demo.log.read_text())[0]
    members = family(demo)
    assert any("postgres" in member.name() for member in members)
    answers = Answers()
    async with client(demo.url) as http, client(sandbox_url) as sandbox:
        bodies = {"plain": order(), "declined": order(payment_method="pm_card_declined")}
        for key, body in bodies.items():
            answers.add(key, await http.post("/orders", json=body, headers={"Idempotency-Key": key}))
        locations = [next(iter(told))[0] for told in answers.by_key.values()]
        await wait_until(lambda: ended(http, locations), AMPLE_SECONDS, "end of both orders")
        assert await shown(http, locations) == [("confirmed", None), ("rejected", "card-declined")]
        database_url = next(word for word in demo.log.read_text().split() if word.startswith("postgresql://"))
        await wait_until(lambda: all_told(database_url), AMPLE_SECONDS, "events of both ends")
        assert await violations(database_url, sandbox, answers) == []
    assert await demo.terminate(number=signal.SIGINT) == 0
    assert not any(map(is_alive, members))
    await demo.start()
    assert await demo.terminate(number=signal.SIGKILL) == -signal.SIGKILL
    await demo.start()  # restart at once: the transport lease of the killed process only refuses other transports
    async with client(demo.url) as http:
        assert await shown(http, locations) == [("confirmed", None), ("rejected", "card-declined")]


async def ended(http: httpx.AsyncClient, locations: list[str]) -> bool:
    return all(status in FINAL for status, _ in await shown(http, locations))


async def all_told(database_url: str) -> bool:
    conn = await asyncpg.connect(database_url)
    try:
        return bool(await conn.fetchval("SELECT count(published_at) = 4 FROM outbox"))
    finally:
        await conn.close()


async def shown(http: httpx.AsyncClient, locations: list[str]) -> list[tuple[str, str | None]]:
    found = [(await http.get(location)).raise_for_status().json() for location in locations]
    return [(each["status"], each["status_reason"]) for each in found]


@pytest.mark.parametrize("name", CHILDREN)
async def test_a_killed_child_is_started_again(start_demo: StartDemo, name: str) -> None:
    """After kill -9 of any child, orders end again, on the same ports and with the same data."""
    demo = await start_demo()
    async with client(demo.url) as http:
        first = await place(http, "first")
        killed = children(demo)[name]
        killed.kill()
        await wait_until(lambda: children(demo).get(name, killed) != killed, AMPLE_SECONDS, f"another {name}")
        second = await place(http, "second")
        await wait_until(lambda: ended(http, [first, second]), AMPLE_SECONDS, "end of both orders")
        assert await shown(http, [first, second]) == [("confirmed", None)] * 2


async def place(http: httpx.AsyncClient, key: str) -> str:
    """Place an order as a stubborn client does; return its path."""

    async def placed() -> str | None:
        with contextlib.suppress(httpx.TransportError):
            response = await http.post("/orders", json=order(), headers={"Idempotency-Key": key})
            return response.headers["Location"] if response.status_code == httpx.codes.CREATED else None
        return None

    return await wait_until(placed, AMPLE_SECONDS, "201") or ""


async def test_no_child_outlives_a_killed_supervisor(start_demo: StartDemo) -> None:
    """After kill -9 of the supervisor, the kernel ends its children."""
    demo = await start_demo()
    members = family(demo)
    assert set(children(demo)) == set(CHILDREN)
    await demo.terminate(number=signal.SIGKILL)
    await wait_until(lambda: not any(map(is_alive, members)), AMPLE_SECONDS, "end of every process")


async def test_frozen_children_do_not_delay_the_end(start_demo: StartDemo) -> None:
    """SIGTERM ends the demo in time and with exit code 0, even if service and sandbox are frozen."""
    demo = await start_demo()
    members = family(demo)
    for name in ("service", "sandbox"):
        children(demo)[name].suspend()
    assert await demo.terminate(deadline_seconds=END_SECONDS) == 0
    assert not any(map(is_alive, members))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"rate_limit": "often"}, "ORDERS_RATE_LIMIT: must be like 200/second"),
        ({"partner_timeout_seconds": "20"}, "ORDERS_PARTNER_TIMEOUT_SECONDS must be at most a third"),
        ({"pg_bin": "/nowhere"}, "ORDERS_PG_BIN: no `postgres`"),
    ],
)
async def test_the_demo_refuses_a_bad_setting(settings: dict[str, str], expected: str) -> None:
    """A bad setting, also one that only the service reads, ends the demo with exit code 2 and one line."""
    code, out, err = await orders(
        "demo", "--ephemeral", *(word for option in PORTS for word in (option, "0")), **settings
    )
    assert (code, out) == (2, "")
    *before, last = err.splitlines()
    assert before == ["Starting PostgreSQL …"]
    assert last.startswith(f"orders: {expected}")


@pytest.mark.parametrize("option", PORTS)
async def test_the_demo_refuses_a_used_port(start_service: StartService, option: str) -> None:
    """A port in use is exit code 2 and one line, before anything starts."""
    taken = await start_service({}, ("sandbox",))
    ports = {**dict.fromkeys(PORTS, "0"), option: str(taken.port)}
    code, _, err = await orders("demo", "--ephemeral", *(word for pair in ports.items() for word in pair))
    assert (code, err.count("\n")) == (2, 1)
    assert err.startswith(f"orders: cannot listen on 127.0.0.1:{taken.port}: Address already in use")


async def test_a_child_that_refuses_to_start_again_ends_the_demo(start_demo: StartDemo) -> None:
    """If a restarted child reports a configuration error, the demo ends with exit code 2 and that line."""
    demo = await start_demo()
    data = next(Path(word) for word in demo.log.read_text().split() if word.endswith("/demo"))
    for path in data.glob("ledger.sqlite*"):
        path.unlink()
    (data / "ledger.sqlite").mkdir()
    children(demo)["sandbox"].kill()
    await wait_until(lambda: demo.process.poll() is not None, AMPLE_SECONDS, "end of the demo")
    assert demo.process.wait() == 2
    assert "orders: cannot keep a ledger in" in demo.log.read_text()
