"""Every log line about an order says which one, whose, and in which request and trace, as far as that is known."""

import hashlib
import json
from collections.abc import Awaitable, Callable
from typing import Any

import httpx

from app.db import Pool
from tests.harness.processes import Service
from tests.harness.sandboxes import plain_http
from tests.harness.wait import AMPLE_SECONDS, wait_until

TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
CALLER = {"traceparent": f"00-{TRACE_ID}-b7ad6b7169203331-00"}
StartService = Callable[..., Awaitable[Service]]


def lines(service: Service, event: str) -> list[dict[str, Any]]:
    """Return the complete lines of one event in the log of a service; a thread of it writes them."""
    complete = service.log.read_text().rpartition("\n")[0]
    parsed = [json.loads(line) for line in complete.splitlines() if line.startswith("{")]
    return [line for line in parsed if line["event"] == event]


async def first_line(service: Service, event: str) -> dict[str, Any]:
    """Wait for the first line of an event, and return it."""
    await wait_until(lambda: bool(lines(service, event)), AMPLE_SECONDS, f"a line {event}")
    return lines(service, event)[0]


def env(database_url: str, sandbox_url: str, **more: str) -> dict[str, str]:
    """Return the environment of a whole service without a broker."""
    partners = {f"ORDERS_{name}_URL": sandbox_url for name in ("INVENTORY", "PAYMENT", "SHIPPING")}
    return {"ORDERS_DATABASE_URL": database_url, "ORDERS_LOG_FORMAT": "json", **partners, **more}


async def test_lines_about_an_order_have_its_fields(
    database_url: str, sandbox_url: str, http: httpx.AsyncClient, pool: Pool, start_service: StartService
) -> None:
    """From the request to the end of its saga, in one trace. The log shows an idempotency key only as a hash."""
    await http.put("/stock", json={"LOGGED": 10})
    service = await start_service(env(database_url, sandbox_url, ORDERS_INBOX_MAX_ATTEMPTS="1"))
    async with plain_http(service.url) as client:
        body = {"sku": "LOGGED", "quantity": 1, "unit_price": 1}
        headers = {"Idempotency-Key": "secret-key", "X-Request-ID": "request-1", **CALLER}
        order = (await client.post("/orders", json=body, headers=headers)).json()["id"]
        finished, placed = await first_line(service, "saga.finished"), await first_line(service, "order.placed")
        known = {"order_id": order, "tenant": "default", "trace_id": TRACE_ID}
        hashed = hashlib.sha256(b"secret-key").hexdigest()[:12]
        assert known.items() <= finished.items()
        assert {**known, "request_id": "request-1", "idempotency_key": hashed}.items() <= placed.items()
        assert len(placed["span_id"]) == len(finished["span_id"]) == 16
        assert "secret-key" not in service.log.read_text()

        await pool.execute("ALTER TABLE sagas RENAME TO hidden")
        order = (await client.post("/orders", json=body, headers=CALLER)).json()["id"]
        known = {"order_id": order, "event_id": order, "tenant": "default", "trace_id": TRACE_ID}
        for event in ("consumer.failed", "relay.parked"):
            assert known.items() <= (await first_line(service, event)).items()

        await pool.execute("ALTER TABLE orders RENAME TO hidden_too")
        assert (await client.get(f"/orders/{order}")).status_code == 500
        await client.get("/orders/none")
        failed = await first_line(service, "http.failed")
    assert (failed["order_id"], failed["tenant"]) == (order, "default")
