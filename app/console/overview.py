"""The first page: what is wrong first."""

from collections.abc import Mapping
from typing import Any

from fastapi import Response

from app.console.route import OperatorPage, console_router
from app.operations import stats

router = console_router()


@router.get("/console")
async def show(page: OperatorPage) -> Response:
    """Show what needs attention, then how the service does."""

    async def read() -> Mapping[str, Any]:
        return {"stats": await stats.read(page.ops.pool, page.ops.pools)}

    return await page.show("overview.html", read)
