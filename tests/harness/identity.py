"""Make tokens as an issuer does, and serve the issuer's key set on a real socket."""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator
from typing import Any

import jwt
from aiohttp import web
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

SECRET = "a shared secret of more than 32 bytes"
DAY_SECONDS = 86_400  # many tokens are made when their module is imported: longer than any run of the tests takes
ALGORITHMS: dict[str, Any] = {"RS256": jwt.algorithms.RSAAlgorithm, "ES256": jwt.algorithms.ECAlgorithm,
              "EdDSA": jwt.algorithms.OKPAlgorithm}  # fmt: skip


def claims(**changes: Any) -> dict[str, Any]:
    """What a good token says; a claim that is changed to None is left out."""
    good = {"sub": "ada", "tenant": "acme", "scope": "orders:read orders:write", "exp": time.time() + DAY_SECONDS}
    return {name: value for name, value in (good | changes).items() if value is not None}


def token(key: Any = SECRET, algorithm: str = "HS256", headers: dict[str, Any] | None = None, **changes: Any) -> str:
    """A signed token, good unless `changes` say otherwise."""
    return jwt.encode(claims(**changes), key, algorithm, headers=headers)


def bearer(given: str) -> dict[str, str]:
    """The header that carries a token."""
    return {"Authorization": f"Bearer {given}"}


def private_key(algorithm: str) -> Any:
    """Make a key for the algorithm."""
    match algorithm:
        case "RS256":
            return rsa.generate_private_key(public_exponent=65537, key_size=2048)
        case "ES256":
            return ec.generate_private_key(ec.SECP256R1())
        case _:
            return ed25519.Ed25519PrivateKey.generate()


class Issuer:
    """Publishes the public halves of the keys in `keys` (by key id: algorithm and key), and counts who asks."""

    def __init__(self) -> None:
        self.url = ""
        self.keys: dict[str, tuple[str, Any]] = {}
        self.extra: list[dict[str, Any]] = []
        self.body: bytes | None = None  # instead of the keys
        self.asked = 0
        self.status = 200
        self.silent = False
        self.over = asyncio.Event()

    def add(self, key_id: str, algorithm: str) -> Any:
        """Make a key and publish it."""
        self.keys[key_id] = (algorithm, private_key(algorithm))
        return self.keys[key_id][1]

    async def answer(self, _: web.Request) -> web.Response:
        self.asked += 1
        if self.silent:
            await self.over.wait()
        published = [
            {**ALGORITHMS[algorithm].to_jwk(key.public_key(), as_dict=True), "kid": key_id, "use": "sig"}
            for key_id, (algorithm, key) in self.keys.items()
        ]
        body = json.dumps({"keys": published + self.extra}).encode() if self.body is None else self.body
        headers = {"Location": self.url} if self.status == web.HTTPFound.status_code else {}
        return web.Response(body=body, status=self.status, headers=headers)


@contextlib.asynccontextmanager
async def serving_keys() -> AsyncIterator[Issuer]:
    """Serve an issuer's keys; lend it."""
    issuer = Issuer()
    app = web.Application()
    app.router.add_get("/jwks", issuer.answer)
    runner = web.AppRunner(app, shutdown_timeout=0)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        host, port = runner.addresses[0][:2]
        issuer.url = f"http://{host}:{port}/jwks"
        yield issuer
    finally:
        issuer.over.set()
        await runner.cleanup()
