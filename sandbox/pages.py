"""Serve the pages for a browser: `GET /`, and Swagger UI at `/docs`. They need no internet access."""

import functools
import html
from importlib import resources
from string import Template

from fastapi import APIRouter, Request, Response
from fastapi_csp_docs import get_swagger_ui_html, get_swagger_ui_init_js

from sandbox.problems import ProblemError

router = APIRouter(include_in_schema=False)

DENY_ALL = "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
LANDING_POLICY = DENY_ALL + "style-src 'self'; img-src 'self'"
DOCS_POLICY = DENY_ALL + "script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'"
SWAGGER_UI = {
    "swagger-ui-bundle.js": "text/javascript",
    "swagger-ui.css": "text/css",
    "favicon-32x32.png": "image/png",
}


@functools.cache
def _read_file(package: str, name: str) -> bytes:
    return resources.files(package).joinpath(name).read_bytes()


@router.get("/")
async def landing(request: Request) -> Response:
    """Serve the start page. Its examples use the address of the request."""
    page = Template(_read_file("sandbox", "page/landing.html").decode())
    address = html.escape(f"{request.url.scheme}://{request.url.netloc}")
    policy = {"Content-Security-Policy": LANDING_POLICY}
    return Response(page.substitute(address=address), headers=policy, media_type="text/html")


@router.get("/page.css")
async def style() -> Response:
    """Serve the style sheet of the start page."""
    return Response(_read_file("sandbox", "page/page.css"), media_type="text/css")


@router.get("/docs")
async def docs() -> Response:
    """Serve the page of Swagger UI."""
    page = get_swagger_ui_html(
        title="Partner sandbox: the API",
        swagger_js_url="/docs/swagger-ui-bundle.js",
        swagger_css_url="/docs/swagger-ui.css",
        swagger_favicon_url="/docs/favicon-32x32.png",
        swagger_ui_init_script_url="/docs/swagger-initializer.js",
    )
    page.headers["Content-Security-Policy"] = DOCS_POLICY
    return page


@router.get("/docs/swagger-initializer.js")
async def initializer() -> Response:
    """Serve the script that starts Swagger UI."""
    return get_swagger_ui_init_js(openapi_url="/openapi.json", swagger_ui_parameters={"validatorUrl": None})


@router.get("/docs/{name}")
async def swagger_ui(name: str) -> Response:
    """Serve one of Swagger UI's own files."""
    if name not in SWAGGER_UI:
        raise ProblemError(404, "not-found", "This file does not exist.")
    return Response(_read_file("fastapi_swagger", f"resources/{name}"), media_type=SWAGGER_UI[name])
