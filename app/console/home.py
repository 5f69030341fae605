"""The demo's first page is the console."""

from fastapi import Response

from app.console.route import console_router, go_to

router = console_router()


@router.get("/")
async def home() -> Response:
    """Lead to the console."""
    return go_to("/console")
