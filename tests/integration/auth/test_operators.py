"""Operators: the admin token, or the scope `orders:operate`; without either, the routes do not exist."""

import httpx
import pytest
from fastapi import FastAPI, Request

from app.api import problems
from app.api.middleware import RequestMiddleware
from app.auth import guards
from app.auth.tokens import SharedSecret, Tokens
from tests.harness.api import assert_problem
from tests.harness.identity import SECRET, bearer, token
from tests.harness.observed import Observed

ADMIN = "the-operators-token"
TOKENS = Tokens(SharedSecret(SECRET))


def operated(guard: guards.Security) -> httpx.AsyncClient:
    """Return a client of an application with one route, which returns the operator."""
    app = FastAPI()
    problems.install(app)

    @app.get("/ops/who")
    async def who(request: Request) -> str:
        request.state.security = guard
        return (await guards.authenticate_operator(request)).subject

    return httpx.AsyncClient(
        transport=httpx.ASGITransport(RequestMiddleware(app, Observed(), max_in_flight=10)),
        base_url="http://orders",
        trust_env=False,
    )


async def test_without_operators_the_route_does_not_exist() -> None:
    """The answer equals that of an unknown path."""
    async with operated(guards.Security()) as api:
        hidden, absent = [await api.get(path, headers=bearer(ADMIN)) for path in ("/ops/who", "/nowhere")]
    assert_problem(hidden, 404, "not-found")
    assert hidden.json() == absent.json()


@pytest.mark.parametrize("tokens", [None, TOKENS])
async def test_the_admin_token_operates(tokens: Tokens | None) -> None:
    """Any other token is a 401."""
    async with operated(guards.Security(tokens, admin_token=ADMIN)) as api:
        assert (await api.get("/ops/who", headers=bearer(ADMIN))).json() == "admin-token"
        for headers in ({}, bearer(ADMIN[:-1]), bearer(ADMIN + "x"), {"Authorization": ADMIN}):
            assert_problem(await api.get("/ops/who", headers=headers), 401, "unauthorized")


@pytest.mark.parametrize("admin_token", ["", ADMIN])
async def test_a_token_operates_with_its_scope(admin_token: str) -> None:
    """A token without `orders:operate` is a 403."""
    async with operated(guards.Security(TOKENS, admin_token=admin_token)) as api:
        operator = bearer(token(scope="orders:operate", tenant=None))
        assert (await api.get("/ops/who", headers=operator)).json() == "ada"
        assert_problem(await api.get("/ops/who", headers=bearer(token())), 403, "insufficient-scope")
        assert_problem(await api.get("/ops/who"), 401, "unauthorized")
