"""Who has logged in. A session is the value of a cookie; no process keeps it, and every process can check it.

The admin token logs in by a signed session: a key made from the token signs it, and the token itself never leaves the
server. A token of the issuer is its own session: it says who its bearer is and until when, and the issuer signed it.
"""

import hashlib
import time

from app.auth import guards
from app.auth.guards import Security
from app.auth.tokens import SharedSecret, Tokens, sign
from app.errors import Unauthorized
from app.values import immutable

COOKIE = "orders_console"
SESSION_SECONDS = 8 * 3600.0
MAX_CHARACTERS = 3800  # browsers keep cookies of 4,096 bytes, name and attributes included
PURPOSE = "orders console"
SIGNED, ISSUED = "signed.", "issued."  # how a session begins


@immutable
class Viewer:
    """Who looks at a page. `tenant` None: an operator, who sees all tenants. `session`: the value of the cookie."""

    subject: str
    tenant: str | None
    session: str
    expires_at: float

    @property
    def is_operator(self) -> bool:
        """Return whether the viewer may see everything, and change it."""
        return self.tenant is None

    def without_session(self) -> "Viewer":
        """Return what all viewers with the same rights have in common."""
        return Viewer("", self.tenant, "", self.expires_at)

    @property
    def source(self) -> str:
        """The key of the viewer's limits: as in the API."""
        return self.tenant or guards.CurrentOperator(self.subject).source

    @property
    def seconds_left(self) -> float:
        """Return how long the session still lasts."""
        return self.expires_at - time.time()


class Sessions:
    """Opens and checks sessions. `open_key`: with it, every visitor gets a session of an operator (the demo)."""

    def __init__(self, security: Security, open_key: str = "") -> None:
        self._security = security
        self.is_open = bool(open_key)
        secret = open_key or security.admin_token
        self._key = hashlib.sha256(f"{PURPOSE}\n{secret}".encode()).hexdigest() if secret else ""
        self._signed = Tokens(SharedSecret(self._key), audience=PURPOSE)

    async def open_to_everybody(self) -> Viewer:
        """Return the session of a new visitor of the demo."""
        return await self._sign("demo")

    async def log_in(self, token: str) -> Viewer:
        """Return the session of the bearer of a token. Raises Unauthorized, InsufficientScope, IssuerUnavailable."""
        if guards.is_admin_token(self._security, token):
            return await self._sign(guards.ADMIN_SUBJECT)
        if self._security.tokens is None:
            raise Unauthorized("this is not the admin token", "invalid_token")
        if len(token) > MAX_CHARACTERS:
            raise Unauthorized(f"the token has more than {MAX_CHARACTERS} characters, too many for a browser's cookie")
        return await self.read(ISSUED + token)

    async def read(self, session: str) -> Viewer:
        """Return who has this session. Raises Unauthorized, InsufficientScope, IssuerUnavailable."""
        if session.startswith(SIGNED) and self._key:
            claims = await self._signed.verify(session.removeprefix(SIGNED))
            return Viewer(guards.subject_of(claims), None, session, float(claims["exp"]))
        if session.startswith(ISSUED) and self._security.tokens is not None:
            claims = await self._security.tokens.verify(session.removeprefix(ISSUED))
            tenant = guards.tenant_or_all(claims, self._security.tenant_claim)
            return Viewer(guards.subject_of(claims), tenant, session, float(claims["exp"]))
        raise Unauthorized("nobody has logged in")

    async def _sign(self, subject: str) -> Viewer:
        token = sign(self._key, {"sub": subject, "aud": PURPOSE}, SESSION_SECONDS)
        return await self.read(SIGNED + token)
