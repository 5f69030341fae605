"""Log in with a token, and log out."""

from http import HTTPStatus
from ipaddress import ip_address

from fastapi import Request, Response

from app.api.ops.deps import OpsDeps
from app.console.deps import ConsoleDeps
from app.console.links import assets, templates
from app.console.route import HOME, Page, console_router, go_to, local_target
from app.console.sessions import COOKIE, Viewer
from app.errors import InsufficientScope, Unauthorized
from app.pages import forms

router = console_router()
router.include_router(assets.router)

NEEDS_HTTPS = "the console needs HTTPS here: without it, browsers keep its session only on the machine itself"


@router.get("/console/")
async def lead_home() -> Response:
    """Lead to the first page."""
    return go_to(HOME)


@router.get("/console/login")
async def show(request: Request) -> Response:
    """Show the form. In the demo, log the visitor in."""
    deps: ConsoleDeps = request.state.console
    target = local_target(request.query_params.get("next", ""))
    if deps.sessions.is_open:
        if not _is_loopback(request.url.hostname):
            raise InsufficientScope("the demo's console is for this machine only", "orders:operate")
        return _enter(request, await deps.sessions.open_to_everybody(), target)
    return _show_form(target)


@router.post("/console/login")
async def log_in(request: Request) -> Response:
    """Check the token, and give the browser a session."""
    forms.require_own_origin(request)
    deps: ConsoleDeps = request.state.console
    ops: OpsDeps = request.state.ops
    peer = request.client.host if request.client else ""
    form = forms.parse(await ops.bodies.read(request, f"peer\n{peer}", forms.MEDIA_TYPE))
    target = local_target(forms.one(form, "next"))
    if _needs_secure(request) and request.headers["origin"].startswith("http:"):
        return _show_form(target, NEEDS_HTTPS, HTTPStatus.BAD_REQUEST)
    try:
        viewer = await deps.sessions.log_in(forms.one(form, "token"))
    except (Unauthorized, InsufficientScope) as error:
        return _show_form(target, str(error), HTTPStatus.UNAUTHORIZED)
    if not viewer.is_operator and target == HOME:
        target = "/console/orders"  # the overview is for operators
    return _enter(request, viewer, target)


@router.post("/console/logout")
async def log_out(request: Request, page: Page) -> Response:
    """Take the session from the browser."""
    forms.require_own_origin(request)
    content = await page.ops.bodies.read(request, page.viewer.source, forms.MEDIA_TYPE)
    forms.require_token(forms.parse(content), page.viewer.session)
    answer = go_to("/console/login")
    answer.delete_cookie(COOKIE, path="/console")
    return answer


def _show_form(target: str, mistake: str = "", status: HTTPStatus = HTTPStatus.OK) -> Response:
    return templates.page("login.html", {"next": target, "mistake": mistake, "viewer": None}, status)


def _enter(request: Request, viewer: Viewer, target: str) -> Response:
    answer = go_to(target)
    answer.set_cookie(
        COOKIE,
        viewer.session,
        max_age=max(1, int(viewer.seconds_left)),
        path="/console",
        secure=_needs_secure(request),
        httponly=True,
        samesite="lax",
    )
    return answer


def _needs_secure(request: Request) -> bool:
    """Return whether the cookie must be `Secure`: everywhere but on this machine over plain HTTP."""
    origin = request.headers.get("origin", f"{request.url.scheme}:")
    return not (_is_loopback(request.url.hostname) and origin.startswith("http:"))


def _is_loopback(host: str | None) -> bool:
    try:
        return host == "localhost" or ip_address(host or "").is_loopback
    except ValueError:
        return False
