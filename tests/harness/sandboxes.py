"""Run the partner sandbox on a real socket; call it through the service's clients or as plain HTTP."""

import contextlib
import socket
import ssl
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
import uvicorn
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from app.api.server.listener import KEEP_ALIVE_SECONDS
from app.partners.client import PartnerClient
from app.partners.http import HttpClient
from app.partners.inventory import HttpInventory
from app.partners.payment import HttpPayment
from app.partners.ports import ChargeRequest, PartnerPorts
from app.partners.shipping import HttpShipping
from sandbox import create_app, http_protocol
from tests.harness.wait import AMPLE_SECONDS

HOLD_SECONDS = 1200  # the hold of a saga with a deadline of 900 s


@dataclass(frozen=True)
class Partners:
    """The service's clients of the three partners."""

    inventory: HttpInventory
    payment: HttpPayment
    shipping: HttpShipping

    @property
    def ports(self) -> PartnerPorts:
        """Return them as the saga's steps call them."""
        return PartnerPorts(self.inventory, self.payment, self.shipping)

    @classmethod
    def at(cls, partner_http: HttpClient, url: str, timeout_seconds: float = AMPLE_SECONDS) -> "Partners":
        """Return three clients that all call the sandbox at `url`."""
        client = PartnerClient(partner_http, url, timeout_seconds)
        return cls(HttpInventory(client), HttpPayment(client), HttpShipping(client))


def charge_of(
    saga: UUID, amount_minor: int = 1, currency: str = "USD", payment_method: str | None = None, age_hours: float = 0
) -> ChargeRequest:
    """Return the charge of a saga that started `age_hours` ago."""
    started_at = datetime.now(UTC) - timedelta(hours=age_hours)
    return ChargeRequest(saga, amount_minor, currency, payment_method, started_at)


@contextlib.contextmanager
def in_a_thread(ledger: Path | None = None, *, hides_ledger: bool = False) -> Iterator[str]:
    """Run a sandbox in a thread, with its ledger in memory unless there is a file for it, and yield its URL.

    `hides_ledger`: answer as partners do that show no ledger.
    """
    listener = socket.create_server(("127.0.0.1", 0), backlog=512)
    app = _hide_ledger(create_app(ledger)) if hides_ledger else create_app(ledger)
    config = uvicorn.Config(
        _hide_ledger(app) if hides_ledger else app,
        http=http_protocol,
        log_config=None,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


def _hide_ledger(app: ASGIApp) -> ASGIApp:
    async def routed(scope: Scope, receive: Receive, send: Send) -> None:
        hidden = scope["type"] == "http" and scope["path"].startswith("/ledger")
        await (PlainTextResponse("no such page", 404) if hidden else app)(scope, receive, send)

    return routed


def plain_http(url: str) -> httpx.AsyncClient:
    """Return an HTTP client that returns responses as they are. Its empty TLS context avoids loading certificates."""
    no_tls = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    return httpx.AsyncClient(base_url=url, timeout=AMPLE_SECONDS, verify=no_tls, trust_env=False)


async def entries(http: httpx.AsyncClient, saga: UUID | str, operation: str | None = None) -> list[dict[str, Any]]:
    """Return the ledger entries of a saga, or only those of one operation."""
    listed = (await http.get("/ledger", params={"saga_id": str(saga)})).raise_for_status().json()["entries"]
    return [entry for entry in listed if operation in (None, entry["operation"])]


async def decisions(http: httpx.AsyncClient, saga: UUID | str, operation: str) -> list[tuple[str, bool]]:
    """Return the outcome and `applied` of each ledger entry of an operation, in order."""
    return [(entry["outcome"], entry["applied"]) for entry in await entries(http, saga, operation)]


async def summary(http: httpx.AsyncClient, saga: UUID | str) -> dict[str, Any]:
    """Return the ledger's summary of a saga."""
    answer = (await http.get("/ledger/summary", params={"saga_id": str(saga)})).raise_for_status().json()
    totals: dict[str, Any] = answer["sagas"][str(saga)]
    return totals


async def set_faults(http: httpx.AsyncClient, *rules: Mapping[str, Any]) -> None:
    """Replace all fault rules with these."""
    (await http.put("/faults", json=list(rules))).raise_for_status()
