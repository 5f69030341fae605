"""The page of the playground, its stream, and the one form of all buttons."""

import contextlib
import socket
from collections.abc import AsyncIterator, Mapping
from http import HTTPStatus
from typing import TypedDict

from fastapi import APIRouter, FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.responses import RedirectResponse

from app import db
from app.api import problems
from app.api.body import Bodies
from app.api.middleware import RequestMiddleware
from app.api.server import listener as server_listener
from app.api.tracing import NO_FASTAPI_TELEMETRY
from app.demo.children import Child
from app.demo.playground.access import Access
from app.demo.playground.actions import PARTNER_FAULTS, PROCESS_FAULTS, Actions
from app.demo.playground.customers import Customers
from app.demo.playground.events import Events
from app.demo.playground.invariants import Invariants
from app.demo.playground.partners import Partners
from app.demo.playground.state import State, format_money
from app.errors import OrdersError, Unauthorized
from app.observability.signals import Signals
from app.pages import forms
from app.pages.assets import Assets
from app.pages.feed import STREAM, Feed, expired
from app.pages.templates import Templates
from app.partners.http import HttpClient
from app.settings import Verification
from app.values import immutable

PAGE = "playground.html"
MAX_IN_FLIGHT = 200  # more than streams
POOL_SIZE, POOL_WAIT_SECONDS, STATEMENT_SECONDS = 3, 0.5, 10.0
BODY_SECONDS, BODIES = 5.0, 10
SHUTDOWN_SECONDS = 2.0

assets = Assets("/files", ["app.pages", "app.demo.playground"])
templates = Templates(
    "app.demo.playground",
    assets,
    process_faults=PROCESS_FAULTS,
    partner_faults=PARTNER_FAULTS,
    money=format_money,
)
router = APIRouter(include_in_schema=False, default_response_class=Response)


@immutable
class Stage:
    """What the playground breaks and watches: the children of the supervisor, and where they are."""

    database: Child
    sandbox: Child
    service: Child
    service_url: str
    sandbox_url: str
    settings: Verification


class RequestState(TypedDict):
    """What the routes find in `request.state`."""

    access: Access
    actions: Actions
    bodies: Bodies
    feed: Feed
    stage: Stage
    state: State


@router.get("/")
async def show(request: Request) -> Response:
    """Show the page or, if asked for, its stream. With the token, let the browser in."""
    access: Access = request.state.access
    entering = access.enter(request)
    if entering is not None:
        return entering
    state: State = request.state.state
    stage: Stage = request.state.stage
    links = {"service_url": stage.service_url, "sandbox_url": stage.sandbox_url}
    if STREAM in request.query_params:
        return _stream(request, access, state, links)
    access.require_session(request)
    around = {"stream": f"/?{STREAM}=1", "form_token": access.form_token, "settings": stage.settings}
    return templates.page(PAGE, {**links, **around, **await state.read()})


@router.post("/")
async def press(request: Request) -> Response:
    """Do what a button says."""
    forms.require_own_origin(request)
    access: Access = request.state.access
    access.require_session(request)
    bodies: Bodies = request.state.bodies
    form = forms.parse(await bodies.read(request, "playground", forms.MEDIA_TYPE))
    access.require_own_form(form)
    actions: Actions = request.state.actions
    await actions.run(forms.one(form, "do"))
    feed: Feed = request.state.feed
    feed.wake()
    return RedirectResponse("/", HTTPStatus.SEE_OTHER)


def _stream(request: Request, access: Access, state: State, links: Mapping[str, str]) -> Response:
    try:
        access.require_session(request)
    except Unauthorized:
        return expired()  # the page is one of an earlier run: loaded again, it says so

    async def render() -> Mapping[str, str]:
        return templates.fragments(PAGE, {**links, **await state.read()})

    request.state.slot.release()  # a stream may last for hours, and costs next to nothing
    feed: Feed = request.state.feed
    return feed.answer(request, PAGE, render)


async def _show_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, OrdersError)  # noqa: S101 - registered for it
    status = HTTPStatus(problems.answer_to(error).status_code)  # the same as in the API
    name = "closed.html" if isinstance(error, Unauthorized) else "error.html"
    return templates.page(name, {"title": status.phrase, "detail": str(error)}, status)


async def _show_http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)  # noqa: S101 - registered for it
    status = HTTPStatus(error.status_code)
    page = templates.page("error.html", {"title": status.phrase, "detail": str(error.detail)}, status)
    page.headers.update(error.headers or {})
    return page


def create_app(stage: Stage, access: Access, events: Events, feed: Feed) -> FastAPI:
    """Make the application."""

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[RequestState]:
        async with contextlib.AsyncExitStack() as stack:
            url = stage.settings.database_url.get_secret_value()
            pool = await stack.enter_async_context(db.open_pool(url, POOL_SIZE, STATEMENT_SECONDS, POOL_WAIT_SECONDS))
            http = await stack.enter_async_context(HttpClient())
            partners = Partners(http, stage.sandbox_url)
            customers = Customers(http, stage.service_url, events)
            stack.push_async_callback(customers.close)
            invariants = Invariants(pool, http, stage.settings, feed.wake)
            stack.push_async_callback(invariants.close)
            stack.push_async_callback(feed.close)
            events.changed = feed.wake
            children = (stage.database, stage.sandbox, stage.service)
            yield {
                "access": access,
                "actions": Actions(stage.service, stage.database, partners, customers, events),
                "bodies": Bodies(BODY_SECONDS, BODIES),
                "feed": feed,
                "stage": stage,
                "state": State(children, pool, partners, customers, invariants, events),
            }

    app = FastAPI(lifespan=lifespan, openapi_url=None, docs_url=None, redoc_url=None, telemetry=NO_FASTAPI_TELEMETRY)
    app.add_middleware(RequestMiddleware, signals=Signals(), max_in_flight=MAX_IN_FLIGHT)
    app.add_exception_handler(OrdersError, _show_error)
    app.add_exception_handler(HTTPException, _show_http_error)
    app.include_router(router)
    app.include_router(assets.router)
    return app


def make_server(listener: socket.socket, stage: Stage, access: Access, events: Events) -> server_listener.Server:
    """Make the server of the playground."""
    feed = Feed()
    app = create_app(stage, access, events, feed)
    return server_listener.Server(app, listener, SHUTDOWN_SECONDS, stopping=feed.stop)
