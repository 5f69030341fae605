"""The pages for a browser: `GET /`, and Swagger UI at `/docs`.

The service serves every file they load; Swagger UI's files come from a package. The pages have no inline script or
style, so their policies allow none.
"""

import functools
import html
from http import HTTPStatus
from importlib import resources
from string import Template

from fastapi import APIRouter, HTTPException, Request, Response
from fastapi_csp_docs import get_swagger_ui_html, get_swagger_ui_init_js

from app.api.openapi import VERSION

router = APIRouter(include_in_schema=False)

DENY_ALL = "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
LANDING_POLICY = DENY_ALL + "style-src 'self'; img-src 'self'"
DOCS_POLICY = DENY_ALL + "script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'"
CACHED = {"Cache-Control": "public, max-age=3600"}
SWAGGER_UI = {
    "swagger-ui-bundle.js": "text/javascript",
    "swagger-ui.css": "text/css",
    "favicon-32x32.png": "image/png",
}
CONSOLE = '<li><a href="/console">Console</a> <span>what waits, what is stuck, and why; for operators</span></li>\n'


@functools.cache
def _read_file(package: str, name: str) -> bytes:
    return resources.files(package).joinpath(name).read_bytes()


@router.get("/")
async def landing(request: Request) -> Response:
    """Return the landing page. Its examples use the address of the request."""
    page = Template(_read_file("app.api", "page/landing.html").decode())
    address = html.escape(f"{request.url.scheme}://{request.url.netloc}")
    return Response(
        page.substitute(address=address, version=VERSION, console=CONSOLE if request.state.console else ""),
        headers={"Content-Security-Policy": LANDING_POLICY},
        media_type="text/html",
    )


@router.get("/page.css")
async def style() -> Response:
    """Return the landing page's style."""
    return Response(_read_file("app.api", "page/page.css"), headers=CACHED, media_type="text/css")


@router.get("/docs")
async def docs() -> Response:
    """Return Swagger UI's page."""
    page = get_swagger_ui_html(
        title="Orders: the API",
        swagger_js_url="/docs/swagger-ui-bundle.js",
        swagger_css_url="/docs/swagger-ui.css",
        swagger_favicon_url="/docs/favicon-32x32.png",
        swagger_ui_init_script_url="/docs/swagger-initializer.js",
    )
    page.headers["Content-Security-Policy"] = DOCS_POLICY
    return page


@router.get("/docs/swagger-initializer.js")
async def initializer() -> Response:
    """Return the script that starts Swagger UI, configured not to call a validator on another host."""
    return get_swagger_ui_init_js(openapi_url="/openapi.json", swagger_ui_parameters={"validatorUrl": None})


@router.get("/docs/{name}")
async def swagger_ui(name: str) -> Response:
    """Return one of Swagger UI's own files."""
    if name not in SWAGGER_UI:
        raise HTTPException(HTTPStatus.NOT_FOUND)
    return Response(_read_file("fastapi_swagger", f"resources/{name}"), headers=CACHED, media_type=SWAGGER_UI[name])
