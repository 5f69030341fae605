"""Who may use the playground: a browser that opened its address with the token, on the address of the supervisor.

The token proves that one can read the terminal, or the console of the demo. A page of another site does not know it,
and cannot make a browser send a form of ours (`app.pages.forms`). A name of its own that leads to this machine ("DNS
rebinding") does not help it either: requests with another `Host` are refused.

Browsers send cookies to all ports of a host. So the cookie's name has the port, and two demos do not log each other
out; but any server on this machine that the browser visits receives the cookie, and is trusted.
"""

import hmac
import secrets

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from app.errors import InsufficientScope, Unauthorized
from app.pages import forms

COOKIE = "orders_playground_{port}"
TOKEN = "token"  # noqa: S105 - the name of a query parameter
SCOPE = "orders:operate"
HTTP_PORT = 80


class Access:
    """The token and the session of one run of the demo, which serves the playground on `port` of this machine."""

    def __init__(self, port: int) -> None:
        suffix = "" if port == HTTP_PORT else f":{port}"
        self._cookie = COOKIE.format(port=port)
        self._hosts = {f"{name}{suffix}" for name in ("127.0.0.1", "localhost")}
        self._token = secrets.token_urlsafe(16)
        self._session = secrets.token_urlsafe(32)
        self.url = f"http://127.0.0.1{suffix}/?{TOKEN}={self._token}"
        self.form_token = forms.token_of(self._session)

    def enter(self, request: Request) -> Response | None:
        """Let the browser in if it comes with a token; return None without. Raises InsufficientScope, Unauthorized."""
        self._require_own_host(request)
        given = request.query_params.get(TOKEN)
        if given is None:
            return None
        if not hmac.compare_digest(given.encode(), self._token.encode()):
            raise Unauthorized("this is not the token of this run")
        answer = RedirectResponse("/", 303)
        answer.set_cookie(self._cookie, self._session, httponly=True, samesite="lax")
        return answer

    def require_session(self, request: Request) -> None:
        """Check that the browser has the session. Raises InsufficientScope, Unauthorized."""
        self._require_own_host(request)
        given = request.cookies.get(self._cookie, "")
        if not hmac.compare_digest(given.encode(), self._session.encode()):
            raise Unauthorized("this browser has not opened the address of this run")

    def require_own_form(self, form: forms.Form) -> None:
        """Check that a form has the token of the session. Raises InsufficientScope."""
        forms.require_token(form, self._session)

    def _require_own_host(self, request: Request) -> None:
        if request.headers.get("host") not in self._hosts:
            raise InsufficientScope("the playground is for this machine only", SCOPE)
