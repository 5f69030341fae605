"""OWASP API Security Top 10 (2023), item by item. Where one does not apply, its test proves why.

The details are in test_security_tokens, test_rates, test_connections and test_api_refusals.
"""

import ast
import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from fastapi.routing import APIRoute

import app
from app.db import Pool
from app.main import create_app
from app.settings import Settings, load
from tests.harness.api import assert_problem, serving
from tests.harness.identity import SECRET, bearer, token
from tests.harness.processes import Service
from tests.harness.sandboxes import plain_http

LINE = {"sku": "WIDGET", "quantity": 1, "unit_price": "9.99"}
ADMIN = "the-operators-token"
SOME_ID = "01890a5d-ac96-774b-bcce-b302099a8057"
CARD = "4242 4242 4242 4242"
PAGES = {"/", "/page.css", "/docs", "/docs/swagger-initializer.js", "/docs/{name}"}
PUBLIC = {"/livez", "/readyz", "/health/live", "/health/ready", "/metrics", *PAGES}


@pytest.fixture
async def guarded(database_url: str) -> AsyncIterator[httpx.AsyncClient]:
    async with serving(database_url, auth_mode="jwt", auth_jwt_secret=SECRET, admin_token=ADMIN) as client:
        yield client


def of(tenant: str, scope: str = "orders:read orders:write") -> dict[str, str]:
    return bearer(token(tenant=tenant, scope=scope))


async def place(api: httpx.AsyncClient, headers: dict[str, str], body: Any = LINE) -> httpx.Response:
    return await api.post("/orders", json=body, headers=headers)


def routes(database_url: str) -> list[APIRoute]:
    made: FastAPI = create_app(load(Settings, database_url=database_url, roles="api"))
    included = (getattr(getattr(entry, "original_router", None), "routes", (entry,)) for entry in made.routes)
    return [route for routes in included for route in routes if isinstance(route, APIRoute)]


async def test_api1_2023_another_tenants_order_does_not_exist(guarded: httpx.AsyncClient) -> None:
    """Another tenant's order is the same 404 as an unknown one."""
    location = (await place(guarded, of("acme"))).headers["location"]
    assert (await guarded.get(location, headers=of("acme"))).status_code == 200
    assert_problem(await guarded.get(location, headers=of("globex")), 404, "order-not-found")


async def test_api1_2023_keys_belong_to_a_tenant(guarded: httpx.AsyncClient, pool: Pool) -> None:
    """Two tenants may use the same key for different orders."""
    answers = [await place(guarded, of(tenant) | {"Idempotency-Key": "k"}) for tenant in ("acme", "globex")]
    other = await place(guarded, of("initech") | {"Idempotency-Key": "k"}, LINE | {"quantity": 2})
    again = await place(guarded, of("acme") | {"Idempotency-Key": "k"})
    assert [each.status_code for each in (*answers, other)] == [201, 201, 201]
    assert again.content == answers[0].content
    assert await pool.fetchval("SELECT count(DISTINCT tenant) FROM orders") == 3


@pytest.mark.parametrize("name", ["X-Tenant", "X-Tenant-ID", "Tenant", "X-Forwarded-User", "Authorization"])
async def test_api1_2023_no_header_selects_a_tenant(api: httpx.AsyncClient, pool: Pool, name: str) -> None:
    """Without authentication every order belongs to the default tenant."""
    assert (await place(api, {name: f"Bearer {token(tenant='acme')}"})).status_code == 201
    assert await pool.fetchval("SELECT string_agg(DISTINCT tenant, ',') FROM orders") == "default"


async def test_api2_2023_nothing_but_a_verified_token_authenticates(guarded: httpx.AsyncClient) -> None:
    """Every other credential is a 401."""
    for headers in ({}, bearer(token("x" * 40)), bearer(token(exp=1)), bearer(ADMIN), {"Cookie": f"token={token()}"}):
        assert_problem(await place(guarded, headers), 401, "unauthorized")


async def test_api3_2023_internal_fields_are_hidden(guarded: httpx.AsyncClient, pool: Pool) -> None:
    """A client can neither set nor see internal fields."""
    for name, value in {"id": "1", "tenant": "globex", "status": "confirmed", "total": "0.01", "version": 7}.items():
        assert_problem(await place(guarded, of("acme"), {"items": [LINE], name: value}), 422, "validation-failed")
    body = {"items": [LINE], "payment_method": "pm_card_visa", "metadata": {"note": "mine"}}
    seen = (await place(guarded, of("acme"), body)).json()
    assert not {"tenant", "payment_method", "metadata", "shipping_address"} & seen.keys()
    assert await pool.fetchval("SELECT count(*) FROM orders") == 1


async def test_api4_2023_every_resource_is_limited(database_url: str) -> None:
    """Bodies, headers, targets and request rates have limits."""
    async with serving(database_url, rate_limit="8/day") as api:
        many = {"items": [LINE] * 101}
        assert_problem(await place(api, {}, many), 422, "validation-failed")
        json_type = {"content-type": "application/json"}
        for body, status in (
            (b" " * 1_000_000, 413),
            (b"[" * 10_000 + b"]" * 10_000, 400),
            (b'{"metadata": ' + b'{"a":' * 10_000 + b"1" + b"}" * 10_001, 400),
            (b'{"sku": "\xff"}', 400),
            (b"1" * 60_000, 400),
        ):
            assert (await api.post("/orders", content=body, headers=json_type)).status_code == status
        assert (await api.get("/orders/" + "a" * 9000)).status_code == 414
        assert (await api.get("/livez", headers={"A": "a" * 17_000})).status_code == 431
        assert [(await place(api, {})).status_code for _ in range(3)] == [201, 201, 429]


async def test_api4_2023_every_request_of_a_burst_is_answered(api: httpx.AsyncClient) -> None:
    """Each gets a 201 or a 503."""
    answers = await asyncio.gather(*(place(api, {}) for _ in range(100)))
    assert {each.status_code for each in answers} <= {201, 503}


@pytest.mark.parametrize(("scope", "needed"), [("orders:write", "read"), ("orders:read", "write"), ("", "write")])
async def test_api5_2023_a_token_allows_only_its_scopes(guarded: httpx.AsyncClient, scope: str, needed: str) -> None:
    """A missing scope is a 403."""
    path = "/orders/01890a5d-ac96-774b-bcce-b302099a8057"
    headers = of("acme", scope)
    answer = await (guarded.get(path, headers=headers) if needed == "read" else place(guarded, headers))
    assert_problem(answer, 403, "insufficient-scope")


async def test_api6_2023_a_repeated_purchase_is_one_order(guarded: httpx.AsyncClient, pool: Pool) -> None:
    """Buying is the sensitive flow: a quota limits it, and a key makes a repeat harmless."""
    headers = of("acme") | {"Idempotency-Key": "k"}
    answers = await asyncio.gather(*(place(guarded, headers) for _ in range(10)))
    assert len({each.content for each in answers}) == 1
    assert await pool.fetchval("SELECT count(*) FROM orders") == 1


async def test_api7_2023_no_url_of_a_request_is_ever_fetched(api: httpx.AsyncClient) -> None:
    """Every outgoing connection goes to a configured address. A URL in an order is plain text."""
    asked: list[str] = []

    async def visited(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append((await reader.readline()).decode())
        writer.close()

    async with await asyncio.start_server(visited, "127.0.0.1", 0) as trap:
        url = "http://{}:{}/".format(*trap.sockets[0].getsockname())
        body = {
            "items": [LINE | {"sku": url}],
            "customer_id": url,
            "payment_method": url,
            "metadata": {"callback": url},
        }
        named = {"Referer": url, "X-Forwarded-Host": url, "Origin": url, "Forwarded": f"host={url}"}
        placed = await api.post(f"/orders?callback={url}", json=body, headers=named)
        assert (placed.status_code, placed.headers["location"].startswith("/orders/")) == (201, True)
    assert asked == []
    clients = {"aiohttp", "httpx", "requests", "urllib.request", "http.client"}
    package = Path(app.__file__).parent
    modules = [path for room in ("api", "auth") for path in (package / room).rglob("*.py")]
    assert {path.name for path in modules if clients & imported(path)} == {"jwks.py"}


def imported(path: Path) -> set[str]:
    """Return the names of the modules that a file imports."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


@pytest.mark.parametrize("path", ["/livez", "/", "/docs", "/openapi.json", "/nowhere", "/orders/no-uuid", "/metrics"])
async def test_api8_2023_every_answer_carries_the_security_headers(api: httpx.AsyncClient, path: str) -> None:
    """Errors and pages carry the security headers too."""
    headers = (await api.get(path)).headers
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"
    assert headers["cache-control"] == "no-store"
    assert headers["content-security-policy"].startswith("default-src 'none'; ")
    assert "frame-ancestors 'none'" in headers["content-security-policy"]
    assert not {"server", "x-powered-by", "access-control-allow-origin"} & headers.keys()


async def test_api8_2023_the_docs_page_runs_only_its_own_script(api: httpx.AsyncClient) -> None:
    """Its policy allows no other source."""
    answer = await api.get("/docs")
    policy = dict(each.split(" ", 1) for each in answer.headers["content-security-policy"].split("; "))
    assert answer.headers["content-type"].startswith("text/html")
    assert (policy["default-src"], policy["script-src"], policy["style-src"]) == ("'none'", "'self'", "'self'")
    assert policy["img-src"] == "'self' data:"


async def test_api8_2023_secrets_show_in_no_answer_and_no_log(
    database_url: str, start_service: Callable[..., Awaitable[Service]]
) -> None:
    """No token, password or card number appears anywhere."""
    secrets = {
        "ORDERS_ADMIN_TOKEN": ADMIN,
        "ORDERS_AUTH_JWT_SECRET": SECRET,
        "ORDERS_REDIS_URL": "redis://:redis-password@127.0.0.1:1/0",
    }
    env = {"ORDERS_DATABASE_URL": database_url, "ORDERS_ROLES": "api", "ORDERS_AUTH_MODE": "jwt"}
    service = await start_service({**env, **secrets, "ORDERS_RATE_LIMIT": "100/day", "ORDERS_LOG_LEVEL": "DEBUG"})
    good = token()
    async with plain_http(service.url) as api:
        told = [(await api.get(path)).text for path in ("/docs", "/openapi.json", "/readyz", "/metrics", "/nowhere")]
        told += [(await place(api, bearer(given))).text for given in (good, good[:-4] + "AAAA", ADMIN)]
        for body in (
            LINE | {"sku": CARD},
            LINE | {"metadata": {CARD: 1}},
            LINE | {CARD: 1},
            LINE | {"payment_method": CARD},
        ):
            told.append((await place(api, bearer(good), body)).text)
    assert await service.terminate() == 0
    everything = "".join(told) + service.log.read_text()
    assert "order.placed" in everything
    for secret in (ADMIN, SECRET, "redis-password", good, good.rpartition(".")[2], CARD):
        assert secret not in everything


async def test_api8_2023_an_unexpected_error_logs_no_secrets(
    pool: Pool, database_url: str, start_service: Callable[..., Awaitable[Service]]
) -> None:
    """A failed constraint makes Postgres quote the row, and a path can contain a key."""
    await pool.execute("ALTER TABLE orders ADD CONSTRAINT unexpected CHECK (currency <> 'CHF')")
    body = LINE | {
        "currency": "CHF",
        "payment_method": "pm_private_token",
        "shipping_address": {"name": "Ada", "line1": "12 Private Lane", "city": "Basel", "country": "CH"},
    }
    service = await start_service({"ORDERS_DATABASE_URL": database_url, "ORDERS_ROLES": "api"})
    async with plain_http(service.url) as api:
        assert_problem(await api.post("/orders", json=body), 500, "internal-error")
        await pool.execute("ALTER TABLE idempotency_keys RENAME TO elsewhere")
        assert_problem(await api.get("/idempotency-keys/private-key-1"), 500, "internal-error")
    assert await service.terminate() == 0
    log = service.log.read_text()
    assert log.count('"http.failed"') == 2
    assert 'violates check constraint \\"unexpected\\"' in log
    assert '"route": "/idempotency-keys/{key:path}"' in log
    for private in ("pm_private_token", "Private Lane", "private-key-1"):
        assert private not in log


async def test_api9_2023_every_route_is_documented_and_guarded(database_url: str, guarded: httpx.AsyncClient) -> None:
    """Every route is in the document and needs a token, except the public ones."""
    document = (await guarded.get("/openapi.json")).json()
    found = routes(database_url)
    assert {"/orders", "/ops/dlq/purge"} < {route.path for route in found}
    for route in found:
        if route.path in PUBLIC:
            continue
        assert route.path_format in document["paths"]
        path = route.path_format.format(order_id=SOME_ID, row_id=SOME_ID, key="k", partner="payment")
        for method in route.methods or ():
            assert_problem(await guarded.request(method, path), 401, "unauthorized")


async def test_api9_2023_debugging_aids_do_not_exist(api: httpx.AsyncClient) -> None:
    """Their paths are a 404."""
    for path in ("/redoc", "/debug", "/docs/oauth2-redirect", "/.env", "/admin"):
        assert_problem(await api.get(path), 404, "not-found")
    assert_problem(await api.request("TRACE", "/livez"), 405, "method-not-allowed")


async def test_api10_2023_the_issuer_is_not_trusted(database_url: str) -> None:
    """A request only uses the issuer of all other services; tests/contract/test_client.py covers the partners."""
    hops = 0

    async def redirects(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal hops
        hops += 1
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 302 Found\r\nLocation: /elsewhere\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        writer.close()

    async with await asyncio.start_server(redirects, "127.0.0.1", 0) as issuer:
        url = "http://{}:{}/jwks".format(*issuer.sockets[0].getsockname())
        async with serving(database_url, auth_mode="jwt", auth_jwks_url=url) as api:
            unjudged = bearer(token(SECRET, headers={"kid": "k"}))
            assert_problem(await place(api, unjudged), 401, "unauthorized")  # no key is fetched for HS256
            assert hops == 0
            unsigned = json.dumps({"alg": "RS256", "kid": "k"})
            forged = ".".join([encoded(unsigned), encoded('{"tenant": "acme"}'), "AAAA"])
            assert_problem(await place(api, bearer(forged)), 503, "issuer-unavailable")
    assert hops == 1


def encoded(text: str) -> str:
    from jwt.utils import base64url_encode  # noqa: PLC0415 - the one use

    return base64url_encode(text.encode()).decode()
