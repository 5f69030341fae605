"""The demo's first page is the playground; without one, the console."""

from fastapi import Request, Response

from app.console.deps import ConsoleDeps
from app.console.route import console_router, go_to

router = console_router()


@router.get("/")
async def home(request: Request) -> Response:
    """Lead to the playground. No script of another site can read where this leads."""
    deps: ConsoleDeps = request.state.console
    return go_to(deps.playground_url or "/console")
