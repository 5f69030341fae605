"""Check and read a form that changes something: it must come from our own page, in the session of its sender.

Three things must hold (OWASP, "Cross-Site Request Forgery Prevention"): the browser says that the request comes from
this origin, the form has the token of the session, and the session's cookie is SameSite=Lax.
"""

import hashlib
import hmac
from urllib.parse import parse_qsl

from starlette.requests import Request

from app.errors import InsufficientScope, MalformedRequest

MEDIA_TYPE = "application/x-www-form-urlencoded"
MAX_FIELDS = 2000
TOKEN_FIELD = "form_token"  # noqa: S105 - the name of a field

Form = dict[str, list[str]]


def token_of(session: str) -> str:
    """Return the token of a session's forms. Who does not know the session's cookie cannot make it."""
    return hashlib.sha256(f"form\n{session}".encode()).hexdigest()


def require_own_origin(request: Request) -> None:
    """Raise InsufficientScope unless the browser says that the request comes from a page of ours."""
    host = request.headers.get("host", "")
    if not host or request.headers.get("origin", "") not in {f"http://{host}", f"https://{host}"}:
        raise InsufficientScope("this form was not sent by a page of this service", "orders:operate")


def parse(content: bytes) -> Form:
    """Return the values of a form, by field. Raises MalformedRequest."""
    try:
        pairs = parse_qsl(content.decode(), keep_blank_values=True, max_num_fields=MAX_FIELDS)
    except ValueError as error:
        raise MalformedRequest("the form cannot be read") from error
    form: Form = {}
    for name, value in pairs:
        form.setdefault(name, []).append(value)
    return form


def require_token(form: Form, session: str) -> None:
    """Raise InsufficientScope unless the form has the session's token."""
    given = form.pop(TOKEN_FIELD, [""])[0]
    if not hmac.compare_digest(given.encode(), token_of(session).encode()):
        raise InsufficientScope("this form belongs to another session: load the page again", "orders:operate")


def one(form: Form, name: str, default: str = "") -> str:
    """Return the only value of a field, without spaces around it. Raises MalformedRequest if it has several."""
    values = form.get(name, [default])
    if len(values) != 1:
        raise MalformedRequest(f"the form has {name} more than once")
    return values[0].strip()
