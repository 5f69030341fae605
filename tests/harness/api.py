"""Serve the HTTP API in this process, on a real socket."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping
from typing import Any

import httpx

from app.api.server import listener as server_listener
from app.main import make_server
from app.settings import Settings, load
from tests.harness.sandboxes import plain_http
from tests.harness.wait import AMPLE_SECONDS, wait_until

DEFAULTS: Mapping[str, Any] = {
    "roles": "api",
    "database_pool_wait_seconds": AMPLE_SECONDS,
    "database_statement_seconds": AMPLE_SECONDS,
    "idempotency_wait_seconds": AMPLE_SECONDS,
    "redis_timeout_seconds": AMPLE_SECONDS,
    "shutdown_timeout_seconds": 4,
}


@contextlib.asynccontextmanager
async def serving(database_url: str, *, tracing: Any = None, **values: Any) -> AsyncIterator[httpx.AsyncClient]:
    """Serve with the role `api` alone, unless `values` (settings) say otherwise, and `tracing`; lend a client."""
    settings = load(Settings, database_url=database_url, **{**DEFAULTS, **values})
    with contextlib.closing(server_listener.listen("127.0.0.1", 0)) as listener:
        server = make_server(settings, listener, tracing=tracing)
        task = asyncio.create_task(server.serve(sockets=[listener]))
        try:
            await wait_until(lambda: server.started or task.done(), AMPLE_SECONDS, "start of the server")
            async with plain_http(f"http://127.0.0.1:{listener.getsockname()[1]}") as client:
                yield client
        finally:
            server.should_exit = True
            await task


def assert_problem(answer: httpx.Response, status: int, code: str) -> None:
    """Assert that the answer is an RFC 9457 problem with this stable code."""
    assert (answer.status_code, answer.headers["content-type"]) == (status, "application/problem+json")
    assert answer.headers["x-request-id"]
    body = answer.json()
    assert (body["status"], body["code"], body["type"]) == (status, code, f"urn:orders:problem:{code}")
    assert body["title"]
    assert body["detail"]
