"""The partner sandbox on a real socket, the service's own clients for it, and plain HTTP for what they cannot say."""

import asyncio
import contextlib
import os
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import aiohttp
import httpx
import pytest
import uvicorn

from app.partners.client import PartnerClient, open_session
from app.partners.inventory import HttpInventory
from app.partners.payment import HttpPayment
from app.partners.ports import Item, Outcome
from app.partners.shipping import HttpShipping
from app.sandbox import create_app, http_protocol

AMPLE_SECONDS = 20.0  # for what must happen, on however busy a machine
HOLD_SECONDS = 600

SERVER = """
import socket, sys, uvicorn
from pathlib import Path
if "without-httptools" in sys.argv:
    sys.modules["httptools"] = None
from app.sandbox import create_app, http_protocol
config = uvicorn.Config(create_app(Path(sys.argv[1])), http=http_protocol, log_config=None)
uvicorn.Server(config).run(sockets=[socket.socket(fileno=int(sys.argv[2]))])
"""


@dataclass(frozen=True)
class Partners:
    """The three clients, and what one saga asks of each."""

    inventory: HttpInventory
    payment: HttpPayment
    shipping: HttpShipping


Act = Callable[[Partners, UUID, Item], Awaitable[Outcome]]

DO: dict[str, Act] = {
    "inventory.hold": lambda to, saga, item: to.inventory.hold(saga, [item]),
    "inventory.commit": lambda to, saga, _: to.inventory.commit(saga),
    "payment.charge": lambda to, saga, _: to.payment.charge(saga, 700, "EUR", "pm_card_visa"),
    "shipping.create": lambda to, saga, item: to.shipping.create(saga, [item], None),
}
UNDO: dict[str, Act] = {
    "inventory.release": lambda to, saga, _: to.inventory.release(saga),
    "payment.refund": lambda to, saga, _: to.payment.refund(saga),
    "shipping.cancel": lambda to, saga, _: to.shipping.cancel(saga),
}
ACTS = {**DO, **UNDO}
UNDONE_BY = {
    "inventory.hold": "inventory.release",
    "inventory.commit": "inventory.release",
    "payment.charge": "payment.refund",
    "shipping.create": "shipping.cancel",
}
REFUSALS = {
    "inventory.hold": "out-of-stock",
    "inventory.commit": "hold-expired",
    "payment.charge": "card-declined",
    "shipping.create": "undeliverable",
}


@dataclass
class SandboxProcess:
    """A sandbox in a process of its own, on a ledger file. Its port outlives it, so callers wait while it is down."""

    ledger: Path
    options: Sequence[str] = ()
    listener: socket.socket = field(default_factory=lambda: socket.create_server(("127.0.0.1", 0), backlog=512))
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.listener.getsockname()[1]}"

    def start(self) -> None:
        number = self.listener.fileno()
        command = [sys.executable, "-c", SERVER, str(self.ledger), str(number), *self.options]
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
        self.process = subprocess.Popen(command, pass_fds=[number], env=environment)

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def terminate(self) -> int:
        assert self.process is not None
        self.process.terminate()
        return self.process.wait(timeout=AMPLE_SECONDS)


@pytest.fixture(scope="session")
def sandbox_url() -> Iterator[str]:
    listener = socket.create_server(("127.0.0.1", 0), backlog=512)
    server = uvicorn.Server(uvicorn.Config(create_app(None), http=http_protocol, log_config=None))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    server.should_exit = True
    thread.join()


@pytest.fixture
def start_sandbox(tmp_path: Path) -> Iterator[Callable[..., SandboxProcess]]:
    with contextlib.ExitStack() as stack:

        def start(*options: str) -> SandboxProcess:
            sandbox = SandboxProcess(tmp_path / "ledger.sqlite", options)
            stack.callback(sandbox.listener.close)
            stack.callback(sandbox.kill)
            sandbox.start()
            return sandbox

        yield start


@pytest.fixture
async def http(sandbox_url: str) -> AsyncIterator[httpx.AsyncClient]:
    async with plain_http(sandbox_url) as client:
        yield client
        await client.delete("/faults")


@pytest.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    async with open_session() as session:
        yield session


@pytest.fixture
def partners_at(session: aiohttp.ClientSession) -> Callable[..., Partners]:
    def at(url: str, timeout_seconds: float = AMPLE_SECONDS, hold_seconds: int = HOLD_SECONDS) -> Partners:
        client = PartnerClient(session, url, timeout_seconds)
        return Partners(HttpInventory(client, hold_seconds), HttpPayment(client), HttpShipping(client))

    return at


@pytest.fixture
def partners(partners_at: Callable[..., Partners], sandbox_url: str) -> Partners:
    return partners_at(sandbox_url)


@pytest.fixture
def saga() -> UUID:
    return uuid4()


@pytest.fixture
def item() -> Item:
    """Two of an item that no other test knows."""
    return Item(f"item-{uuid4().hex[:12]}", 2)


def plain_http(url: str) -> httpx.AsyncClient:
    """HTTP without a client's judgement; the empty TLS context spares loading certificates for each test."""
    no_tls = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    return httpx.AsyncClient(base_url=url, timeout=AMPLE_SECONDS, verify=no_tls, trust_env=False)


async def entries(http: httpx.AsyncClient, saga: UUID | str, operation: str | None = None) -> list[dict[str, Any]]:
    """The ledger's entries of a saga, or of one operation on it."""
    found = (await http.get("/ledger", params={"saga_id": str(saga)})).raise_for_status().json()["entries"]
    return [each for each in found if operation in (None, each["operation"])]


async def decisions(http: httpx.AsyncClient, saga: UUID | str, operation: str) -> list[tuple[str, bool]]:
    """What was decided on an operation, in order: the outcome, and whether anything moved."""
    return [(each["outcome"], each["applied"]) for each in await entries(http, saga, operation)]


async def summary(http: httpx.AsyncClient, saga: UUID | str) -> dict[str, Any]:
    """What the ledger says in all of a saga."""
    found = (await http.get("/ledger/summary", params={"saga_id": str(saga)})).raise_for_status().json()
    each: dict[str, Any] = found["sagas"][str(saga)]
    return each


async def set_faults(http: httpx.AsyncClient, *rules: Mapping[str, Any]) -> None:
    """Let these be the fault rules until the test ends."""
    (await http.put("/faults", json=list(rules))).raise_for_status()


async def post(http: httpx.AsyncClient, path: str, key: str | None, body: Any) -> httpx.Response:
    """One partner call as plain HTTP."""
    return await http.post(path, json=body, headers={} if key is None else {"Idempotency-Key": key})


async def wait_until(holds: Callable[[], Awaitable[bool]]) -> None:
    """Return once it holds; it must, within ample time."""
    async with asyncio.timeout(AMPLE_SECONDS):
        while not await holds():  # noqa: ASYNC110 - what it waits for happens behind a socket
            await asyncio.sleep(0.01)


async def prepare(partners: Partners, saga: UUID, item: Item, operation: str) -> None:
    """Do what must be there before an operation makes sense."""
    if operation in ("inventory.commit", "inventory.release"):
        await partners.inventory.hold(saga, [item])
    if operation == "payment.refund":
        await partners.payment.charge(saga, 700, "EUR", "pm_card_visa")
    if operation == "shipping.cancel":
        await partners.shipping.create(saga, [item], None)
