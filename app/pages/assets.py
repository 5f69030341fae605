"""Serve the styles and scripts of the pages. Their addresses contain their content, so browsers keep them for good."""

import hashlib
from collections.abc import Sequence
from http import HTTPStatus
from importlib import resources
from pathlib import PurePath

from fastapi import APIRouter, HTTPException, Response

KEPT = {"Cache-Control": "public, max-age=31536000, immutable"}
MEDIA_TYPES = {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}


class Assets:
    """The files in the folders `static` of these packages, served below `prefix`. No two have a name in common."""

    def __init__(self, prefix: str, packages: Sequence[str]) -> None:
        self._prefix = prefix
        self._files = {
            file.name: file.read_bytes()
            for package in packages
            for file in resources.files(package).joinpath("static").iterdir()
        }
        self._versions = {name: hashlib.sha256(content).hexdigest()[:12] for name, content in self._files.items()}
        self.router = APIRouter(include_in_schema=False)
        self.router.add_api_route(f"{prefix}/{{version}}/{{name}}", self._serve)

    def url(self, name: str) -> str:
        """Return the address of a file."""
        return f"{self._prefix}/{self._versions[name]}/{name}"

    async def _serve(self, version: str, name: str) -> Response:
        if name not in self._files:
            raise HTTPException(HTTPStatus.NOT_FOUND)
        # While releases change, another one's page may ask here. A file that nearly fits beats none, but for once only.
        headers = KEPT if self._versions[name] == version else {}
        return Response(self._files[name], headers=headers, media_type=MEDIA_TYPES[PurePath(name).suffix])
