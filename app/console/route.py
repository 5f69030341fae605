"""The route class of the console: who may see a page, and errors as pages for people.

A page takes `Page`, an operator's page `OperatorPage`. A route that changes something takes `Change`, which has checked
the form and has its fields.
"""

from collections.abc import Awaitable, Callable, Coroutine, Mapping
from http import HTTPStatus
from typing import Annotated, Any
from urllib.parse import quote

import structlog
from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import RedirectResponse

from app.api import problems
from app.api.ops.deps import OpsDeps
from app.api.params import parse_reason
from app.auth import guards
from app.console.deps import ConsoleDeps
from app.console.links import templates
from app.console.sessions import COOKIE, Viewer
from app.errors import InsufficientScope, OrdersError, Unauthorized, Unavailable, ValidationFailed
from app.observability import log_fields
from app.operations.audit import AuditActor
from app.pages import feed, forms
from app.pages.feed import STREAM
from app.pages.forms import Form
from app.values import immutable

log = structlog.get_logger(__name__)

HOME = "/console"
LOGIN = "/console/login"
UNAVAILABLE = "the service cannot do this right now: try again in a moment"
KEPT_HEADERS = ("allow", "connection", "retry-after")  # of an error, on its page


class ConsoleRoute(APIRoute):
    """A route whose errors are pages. Without a session it leads to the login."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return FastAPI's handler, with errors as pages."""
        handle = super().get_route_handler()

        async def handle_page(request: Request) -> Response:
            try:
                return await handle(request)
            except (Unauthorized, InsufficientScope) as error:
                return _refuse(request, error)
            except RequestValidationError as error:
                mistakes = problems.mistakes(error.errors())
                text = "; ".join(f"{mistake['pointer']}: {mistake['detail']}" for mistake in mistakes)
                return show_error(request, HTTPStatus.UNPROCESSABLE_ENTITY, text)
            except OrdersError as error:
                answer = problems.answer_to(error)  # the same status, headers and log line as in the API
                # What is unavailable, and where, is for the log.
                text = (error.public or UNAVAILABLE) if isinstance(error, Unavailable) else str(error)
                return show_error(request, HTTPStatus(answer.status_code), text, answer.headers)
            except (ClientDisconnect, HTTPException):  # of the middleware; of `install`
                raise
            except Exception:
                log.exception("console.failed", route=request.scope["route"].path)
                return show_error(request, HTTPStatus.INTERNAL_SERVER_ERROR, "something went wrong on our side")

        return handle_page


def install(app: FastAPI) -> None:
    """Make pages of the framework's own errors below /console: no such page, no such method."""
    answer_elsewhere = app.exception_handlers[HTTPException]

    async def answer(request: Request, error: Exception) -> Response:
        found = answer_elsewhere(request, error)
        response = await found if isinstance(found, Awaitable) else found
        if not f"{request.scope['path']}/".startswith(f"{HOME}/"):
            return response
        detail = error.detail if isinstance(error, HTTPException) else ""
        return show_error(request, HTTPStatus(response.status_code), detail, response.headers)

    app.add_exception_handler(HTTPException, answer)


def console_router() -> APIRouter:
    """Return a router for pages of the console."""
    return APIRouter(route_class=ConsoleRoute, include_in_schema=False, default_response_class=Response)


@immutable
class PageRequest:
    """A request for a page by a viewer who may see it."""

    request: Request
    viewer: Viewer

    @property
    def ops(self) -> OpsDeps:
        """What operations need."""
        deps: OpsDeps = self.request.state.ops
        return deps

    @property
    def console(self) -> ConsoleDeps:
        """What the console needs besides."""
        deps: ConsoleDeps = self.request.state.console
        return deps

    @property
    def wants_stream(self) -> bool:
        """Return whether this asks for the page's stream."""
        return STREAM in self.request.query_params

    async def show(self, name: str, read: Callable[[], Awaitable[Mapping[str, Any]]], **around: Any) -> Response:
        """Answer with the page, or with its stream if that was asked for.

        `read`: read what its fragments show; called again for as long as a browser shows the page. It must depend only
        on the address of the page and on what the viewer may see. `around`: what else the page shows, outside its
        fragments.
        """
        if self.wants_stream:

            async def render() -> Mapping[str, str]:
                return templates.fragments(name, {**everywhere, **await read()})

            self.request.state.slot.release()  # a stream may last for minutes, and costs next to nothing
            tenant = self.viewer.tenant
            everywhere = _everywhere(self.request, self.viewer.without_session())  # the stream is for others, too
            key = (self.request.scope["path"], self.request.scope["query_string"], tenant)
            return self.console.feed.answer(self.request, key, render, self.viewer.seconds_left, tenant)
        url = self.request.url
        stream = url.include_query_params(**{STREAM: "1"})
        context = {"stream": f"{stream.path}?{stream.query}", **around, **await read()}
        return templates.page(name, _everywhere(self.request, self.viewer) | context)

    def answer(self, name: str, **shown: Any) -> Response:
        """Answer with a page that is not live."""
        return templates.page(name, _everywhere(self.request, self.viewer) | shown)

    def actor(self, reason: str) -> AuditActor:
        """Return the viewer as the actor of an audit record."""
        return AuditActor(self.viewer.subject, reason)


@immutable
class ChangeRequest(PageRequest):
    """A checked form of an operator."""

    form: Form

    def field(self, name: str, default: str = "") -> str:
        """Return the only value of a field. Raises MalformedRequest."""
        return forms.one(self.form, name, default)

    def reason(self) -> str:
        """Return the operator's reason, from the field of `ui.reason`. Raises ValidationFailed."""
        try:
            return parse_reason(self.field("reason"))
        except ValueError as error:
            raise ValidationFailed(f"the reason {error}") from error


async def _page(request: Request) -> PageRequest:
    deps: ConsoleDeps = request.state.console
    viewer = await deps.sessions.read(request.cookies.get(COOKIE, ""))
    request.state.viewer = viewer
    if viewer.tenant is not None:
        log_fields.bind(tenant=viewer.tenant)
        await guards.count_request(request, viewer.tenant)
    return PageRequest(request, viewer)


async def _operator_page(request: Request) -> PageRequest:
    page = await _page(request)
    if not page.viewer.is_operator:
        raise InsufficientScope("only operators may do this: it needs the scope orders:operate", "orders:operate")
    return page


async def _change(request: Request) -> ChangeRequest:
    forms.require_own_origin(request)
    page = await _operator_page(request)
    content = await page.ops.bodies.read(request, page.viewer.source, forms.MEDIA_TYPE)
    form = forms.parse(content)
    forms.require_token(form, page.viewer.session)
    return ChangeRequest(request, page.viewer, form)


Page = Annotated[PageRequest, Depends(_page)]
OperatorPage = Annotated[PageRequest, Depends(_operator_page)]
Change = Annotated[ChangeRequest, Depends(_change)]


def go_to(address: str) -> Response:
    """Answer a form: the browser then loads this page (RFC 9110, section 15.4.4)."""
    return RedirectResponse(address, HTTPStatus.SEE_OTHER)


def show_error(request: Request, status: HTTPStatus, detail: str, headers: Mapping[str, str] | None = None) -> Response:
    """Answer with a page that says what went wrong."""
    viewer: Viewer | None = getattr(request.state, "viewer", None)
    context = _everywhere(request, viewer) | {"status": status, "detail": detail, "back": _find_form(request)}
    page = templates.page("error.html", context, status)
    for name in KEPT_HEADERS:
        if headers is not None and name in headers:
            page.headers[name] = headers[name]
    return page


def _refuse(request: Request, error: Unauthorized | InsufficientScope) -> Response:
    """Lead a visitor without a session to the login, and to this page after it."""
    if STREAM in request.query_params:
        return feed.expired()
    if isinstance(error, InsufficientScope):
        return show_error(request, HTTPStatus.FORBIDDEN, str(error))
    if request.method != "GET":
        return show_error(request, HTTPStatus.UNAUTHORIZED, f"{error}: log in, then send the form again")
    target = request.url.path + (f"?{request.url.query}" if request.url.query else "")
    return go_to(f"{LOGIN}?next={quote(target, safe='')}")


def _find_form(request: Request) -> str:
    """Return the address of the page that sent this form; empty: it is no form, or none of ours."""
    origin, sender = request.headers.get("origin", ""), request.headers.get("referer", "")
    is_form = request.method == "POST" and sender.startswith(f"{origin}/")
    return local_target(sender.removeprefix(origin)) if is_form else ""


def _everywhere(request: Request, viewer: Viewer | None) -> dict[str, Any]:
    """Return what every page shows."""
    deps: ConsoleDeps = request.state.console
    return {
        "viewer": viewer,
        "path": request.scope["path"],
        "form_token": forms.token_of(viewer.session) if viewer is not None and viewer.session else "",
        "is_open": deps.sessions.is_open,
        "playground_url": deps.playground_url,
    }


def local_target(address: str) -> str:
    """Return the address of a page of the console, from a query that any site may have written; else its first page."""
    is_ours = address == HOME or address.startswith((f"{HOME}/", f"{HOME}?"))
    return address if is_ours and address.isprintable() else HOME
