"""The partner sandbox on a real socket, the service's own clients for it, and plain HTTP for what they cannot say."""

import contextlib
import socket
import ssl
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import aiohttp
import httpx
import uvicorn

from app.partners.client import PartnerClient
from app.partners.inventory import HttpInventory
from app.partners.payment import HttpPayment
from app.partners.ports import Charge
from app.partners.shipping import HttpShipping
from app.server import KEEP_ALIVE_SECONDS
from sandbox import create_app, http_protocol
from tests.harness.wait import AMPLE_SECONDS

HOLD_SECONDS = 1200  # as for a saga with 900 s


@dataclass(frozen=True)
class Partners:
    """The three clients."""

    inventory: HttpInventory
    payment: HttpPayment
    shipping: HttpShipping

    @classmethod
    def at(cls, session: aiohttp.ClientSession, url: str, timeout_seconds: float = AMPLE_SECONDS) -> "Partners":
        """Return the clients of the one sandbox that plays all three."""
        client = PartnerClient(session, url, timeout_seconds)
        return cls(HttpInventory(client), HttpPayment(client), HttpShipping(client))


def charge_of(
    saga: UUID, amount_minor: int = 1, currency: str = "USD", payment_method: str | None = None, age_hours: float = 0
) -> Charge:
    """The money of a saga that started so long ago."""
    started_at = datetime.now(UTC) - timedelta(hours=age_hours)
    return Charge(saga, amount_minor, currency, payment_method, started_at)


@contextlib.contextmanager
def in_a_thread() -> Iterator[str]:
    """Run a sandbox with a ledger in memory; lend its URL."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=512)
    config = uvicorn.Config(
        create_app(None), http=http_protocol, log_config=None, timeout_keep_alive=KEEP_ALIVE_SECONDS
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


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
