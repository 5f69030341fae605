"""Which bearer tokens the running service accepts, and which it refuses."""

import time
from collections.abc import AsyncIterator
from typing import Any

import httpx
import jwt
import pytest

from app.auth import jwks
from app.auth.tokens import Tokens
from app.errors import IssuerUnavailable, Unauthorized
from tests.harness.api import assert_problem, serving
from tests.harness.identity import DAY_SECONDS, SECRET, Issuer, bearer, claims, private_key, serving_keys, token

LINE = {"sku": "WIDGET", "quantity": 1, "unit_price": "9.99"}
NOWHERE = "/orders/01890a5d-ac96-774b-bcce-b302099a8057"


@pytest.fixture
async def guarded(database_url: str) -> AsyncIterator[httpx.AsyncClient]:
    """The service with a shared secret, an issuer and an audience."""
    async with serving(
        database_url, auth_mode="jwt", auth_jwt_secret=SECRET, auth_issuer="issuer", auth_audience="orders"
    ) as client:
        yield client


@pytest.fixture
async def issuer() -> AsyncIterator[Issuer]:
    async with serving_keys() as issuer:
        yield issuer


def good(**changes: Any) -> dict[str, Any]:
    return {"iss": "issuer", "aud": "orders"} | changes


async def ask(api: httpx.AsyncClient, given: str) -> httpx.Response:
    return await api.get(NOWHERE, headers=bearer(given))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"aud": ["other", "orders"]},
        {"scope": None, "scp": ["orders:read"]},
        {"scope": None, "scp": "orders:read"},
        {"nbf": 1, "iat": 1},
    ],
)
async def test_a_valid_token_is_accepted(guarded: httpx.AsyncClient, changes: dict[str, Any]) -> None:
    """Audiences, scopes and times are accepted in each form that issuers use."""
    assert_problem(await ask(guarded, token(**good(**changes))), 404, "order-not-found")


REFUSED = {
    "expired": token(**good(exp=time.time() - 1)),
    "without exp": token(**good(exp=None)),
    "with an exp that is no time": token(**good(exp="tomorrow")),
    "not valid yet": token(**good(nbf=time.time() + DAY_SECONDS)),
    "of another issuer": token(**good(iss="other")),
    "of no issuer": token(**good(iss=None)),
    "for another audience": token(**good(aud="billing")),
    "for no audience": token(**good(aud=None)),
    "of no tenant": token(**good(tenant=None)),
    "of an empty tenant": token(**good(tenant="")),
    "of a tenant that is a list": token(**good(tenant=["acme"])),
    "of a tenant that no database can store": token(**good(tenant="a\x00")),
    "of a tenant that is half a character": token(**good(tenant="\ud800")),
    "signed by somebody else": token("another secret of more than 32 bytes", **good()),
    "of another algorithm": token(SECRET * 2, "HS512", **good()),
    "unsigned": jwt.encode(claims(**good()), "", "none"),
    "of nothing": "x",
    "of three nothings": "x.y.z",
    "with a header nested deeply": f"{jwt.utils.base64url_encode(b'[' * 9000).decode()}.e30.e30",
    "with a header that is a list": f"{jwt.utils.base64url_encode(b'[]').decode()}.e30.e30",
    "with claims that are a list": jwt.PyJWS().encode(b"[]", SECRET, "HS256"),
    "with an exp beyond numbers": jwt.PyJWS().encode(b'{"exp": Infinity, "iss": "issuer", "aud": "orders"}', SECRET),
}


@pytest.mark.parametrize("given", REFUSED.values(), ids=REFUSED.keys())
async def test_a_token_is_refused_that_is(guarded: httpx.AsyncClient, given: str) -> None:
    """Each defect of a token is a 401."""
    answer = await ask(guarded, given)
    assert_problem(answer, 401, "unauthorized")
    assert answer.headers["www-authenticate"].startswith('Bearer realm="orders", error="invalid_token", error_desc')
    assert given not in answer.text


async def test_a_missing_token_is_a_401_without_an_error(guarded: httpx.AsyncClient) -> None:
    """The challenge names the scheme, and no error."""
    answer = await guarded.get(NOWHERE)
    assert_problem(answer, 401, "unauthorized")
    assert answer.headers["www-authenticate"] == 'Bearer realm="orders"'


@pytest.mark.parametrize("header", ["Basic YTpi", "Bearer", "Bearer a b", "", "Bearer \xff"])
async def test_a_malformed_header_is_refused(guarded: httpx.AsyncClient, header: str) -> None:
    """It is a 401 with `invalid_token`."""
    assert_problem(
        await guarded.get(NOWHERE, headers=[(b"authorization", header.encode("latin-1"))]), 401, "unauthorized"
    )


async def test_a_token_comes_from_one_header_only(guarded: httpx.AsyncClient) -> None:
    """Two tokens are refused, and a token in the query is ignored."""
    one = token(**good())
    twice = await guarded.get(NOWHERE, headers=[("Authorization", f"Bearer {one}")] * 2)
    assert_problem(twice, 401, "unauthorized")
    assert_problem(await guarded.get(NOWHERE, params={"access_token": one}), 401, "unauthorized")


async def test_a_missing_scope_is_named(guarded: httpx.AsyncClient) -> None:
    """The 403 names the scope that is needed."""
    answer = await guarded.post("/orders", json=LINE, headers=bearer(token(**good(scope="orders:read"))))
    assert_problem(answer, 403, "insufficient-scope")
    assert 'error="insufficient_scope"' in answer.headers["www-authenticate"]
    assert answer.headers["www-authenticate"].endswith('scope="orders:write"')


async def test_a_missing_token_is_found_before_the_body_is_parsed(guarded: httpx.AsyncClient) -> None:
    """Bad JSON without a token is a 401."""
    assert_problem(await guarded.post("/orders", content=b"{"), 401, "unauthorized")


async def test_another_claim_may_name_the_tenant(database_url: str) -> None:
    """AUTH_TENANT_CLAIM names the claim."""
    settings = {"auth_mode": "jwt", "auth_jwt_secret": SECRET, "auth_tenant_claim": "https://example.com/org"}
    elsewhere: dict[str, Any] = {"tenant": None, "https://example.com/org": "acme"}
    async with serving(database_url, **settings) as api:
        assert (await ask(api, token(**elsewhere))).status_code == 404
        assert_problem(await ask(api, token()), 401, "unauthorized")


@pytest.mark.parametrize("algorithm", ["RS256", "ES256", "EdDSA"])
async def test_a_token_signed_with_a_published_key_is_accepted(
    database_url: str, issuer: Issuer, algorithm: str
) -> None:
    """The key is fetched from the issuer."""
    key = issuer.add("k1", algorithm)
    async with serving(database_url, auth_mode="jwt", auth_jwks_url=issuer.url) as api:
        for headers in ({"kid": "k1"}, None):
            assert (await ask(api, token(key, algorithm, headers))).status_code == 404
        stranger = token(private_key(algorithm), algorithm, {"kid": "k1"})
        assert_problem(await ask(api, stranger), 401, "unauthorized")
    assert issuer.asked == 1


async def test_a_public_key_never_serves_as_a_shared_secret(database_url: str, issuer: Issuer) -> None:
    """A token signed with HS256 and a public key is refused."""
    issuer.add("k1", "RS256")
    issuer.extra = [{"kty": "oct", "kid": "k2", "k": jwt.utils.base64url_encode(SECRET.encode()).decode()}]
    async with serving(database_url, auth_mode="jwt", auth_jwks_url=issuer.url) as api:
        for key_id in ("k1", "k2"):
            assert_problem(await ask(api, token(SECRET, headers={"kid": key_id})), 401, "unauthorized")


async def test_without_the_issuer_tokens_are_a_503(database_url: str, issuer: Issuer) -> None:
    """An unavailable issuer is not the caller's fault."""
    key = issuer.add("k1", "ES256")
    issuer.status = 500
    async with serving(database_url, auth_mode="jwt", auth_jwks_url=issuer.url) as api:
        answer = await ask(api, token(key, "ES256", {"kid": "k1"}))
        assert_problem(answer, 503, "issuer-unavailable")
        assert int(answer.headers["retry-after"]) > 0
        assert (await api.get("/livez")).status_code == 200


def es256(key: Any, key_id: str) -> str:
    return token(key, "ES256", {"kid": key_id})


async def test_a_new_key_is_fetched_when_needed(issuer: Issuer) -> None:
    """A rotated key works without a restart."""
    old = issuer.add("old", "ES256")
    async with jwks.open_session() as session:
        tokens = Tokens(jwks.KeySet(session, issuer.url, cooldown_seconds=0))
        await tokens.verify(es256(old, "old"))
        new = issuer.add("new", "ES256")
        await tokens.verify(es256(new, "new"))
        await tokens.verify(es256(old, "old"))
    assert issuer.asked == 2


async def test_invented_key_ids_put_no_load_on_the_issuer(issuer: Issuer) -> None:
    """Unknown key ids cause one fetch in the cooldown."""
    key = issuer.add("k1", "ES256")
    async with jwks.open_session() as session:
        tokens = Tokens(jwks.KeySet(session, issuer.url))
        for number in range(20):
            with pytest.raises(Unauthorized):
                await tokens.verify(es256(key, f"made-up-{number}"))
    assert issuer.asked == 1


async def test_known_keys_stay_valid_while_the_issuer_is_down(
    issuer: Issuer,
) -> None:
    """A token with an unknown key is a 503 meanwhile."""
    key = issuer.add("k1", "ES256")
    async with jwks.open_session() as session:
        kept = Tokens(jwks.KeySet(session, issuer.url, fresh_seconds=0, cooldown_seconds=0))
        dropped = Tokens(jwks.KeySet(session, issuer.url, fresh_seconds=0, max_age_seconds=0, cooldown_seconds=0))
        await kept.verify(es256(key, "k1"))
        issuer.status = 503
        await kept.verify(es256(key, "k1"))
        with pytest.raises(IssuerUnavailable):
            await kept.verify(es256(key, "k2"))
        with pytest.raises(IssuerUnavailable):
            await dropped.verify(es256(key, "k1"))


@pytest.mark.parametrize(
    "body", [b"", b"[]", b"{}", b'{"keys": {}}', b'{"keys": [' + b"1," * 200 + b"1]}", b" " * 300_000, b"[" * 100_000]
)
async def test_an_invalid_key_set_is_ignored(issuer: Issuer, body: bytes) -> None:
    """The service treats it as an unavailable issuer."""
    issuer.body = body
    async with jwks.open_session() as session:
        with pytest.raises(IssuerUnavailable):
            await Tokens(jwks.KeySet(session, issuer.url)).verify(es256(private_key("ES256"), "k1"))


async def test_a_silent_issuer_is_asked_once(issuer: Issuer) -> None:
    """The fetch has a timeout, and is not repeated within the cooldown."""
    issuer.silent = True
    async with jwks.open_session() as session:
        tokens = Tokens(jwks.KeySet(session, issuer.url))
        for _ in range(3):
            with pytest.raises(IssuerUnavailable):
                await tokens.verify(es256(private_key("ES256"), "k1"))
    assert issuer.asked == 1
