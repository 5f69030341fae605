"""`/docs`: Swagger UI, allowed to load its own files and to run its own script, nothing else."""

import base64
import functools
import hashlib
import re

from fastapi import APIRouter, Response
from fastapi.openapi.docs import get_swagger_ui_html

router = APIRouter(include_in_schema=False)

SOURCE = "https://cdn.jsdelivr.net"


@functools.cache
def _page() -> tuple[bytes, str]:
    """Return the page and its Content-Security-Policy, which knows the inline script by its hash (CSP 3, 8.4)."""
    page = bytes(get_swagger_ui_html(openapi_url="/openapi.json", title="Orders").body)
    script = re.search(rb"<script>(.*?)</script>", page, re.DOTALL)
    if script is None:
        raise AssertionError("bug: Swagger UI's page has no inline script")
    digest = base64.b64encode(hashlib.sha256(script[1]).digest()).decode()
    policy = (
        f"default-src 'none'; script-src {SOURCE} 'sha256-{digest}'; style-src {SOURCE} 'unsafe-inline'; "
        "img-src 'self' data: https://fastapi.tiangolo.com; connect-src 'self'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )
    return page, policy


@router.get("/docs")
async def docs() -> Response:
    """Return the page."""
    page, policy = _page()
    return Response(page, headers={"Content-Security-Policy": policy}, media_type="text/html")
