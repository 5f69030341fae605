"""The route class for operators: authenticate, then read the body within its limits, then let FastAPI validate.

FastAPI reads and parses a body before it calls any dependency. Without this class a caller without a token could make
the service read and parse bodies, and would learn from the answers what a valid request looks like.
"""

from collections.abc import Callable, Coroutine
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request, Response
from fastapi.routing import APIRoute
from fastapi.security import HTTPBearer

from app.api.body import has_body, parse_json
from app.api.ops.deps import OpsDeps
from app.api.params import StrictModel, refuse_repeated_names
from app.auth import guards
from app.errors import ValidationFailed

# For the OpenAPI document only: `OperatorRoute` authenticates.
SCHEME = HTTPBearer(
    auto_error=False,
    scheme_name="operator",
    description="`ORDERS_ADMIN_TOKEN`, or a token with the scope `orders:operate`",
)


class _ParsedRequest(Request):
    """A request whose body has been read and parsed: FastAPI gets it from here, not from the client."""

    def __init__(self, request: Request, content: bytes, value: object) -> None:
        super().__init__(request.scope, request.receive)
        self._content = content
        self._value = value

    async def body(self) -> bytes:
        """Return the body. FastAPI only checks whether it is empty."""
        return self._content

    async def json(self) -> Any:
        """Return the parsed body."""
        return self._value


class OperatorRoute(APIRoute):
    """A route that authenticates the operator before anything else."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return FastAPI's handler, behind the guard."""
        handle = super().get_route_handler()
        body, has_query = self.body_field, bool(self.dependant.query_params)

        async def handle_authenticated(request: Request) -> Response:
            operator = await guards.authenticate_operator(request)
            request.state.operator = operator
            if has_query:
                await refuse_repeated_names(request)
            if body is not None:
                request = await _parse(request, operator, required=body.field_info.is_required())
            return await handle(request)

        return handle_authenticated


async def _parse(request: Request, operator: guards.CurrentOperator, *, required: bool) -> Request:
    """Read and parse the body. If it is optional, a body of only spaces counts as none.

    Raises MalformedRequest, ValidationFailed, and the errors of `Bodies.read`.
    """
    deps: OpsDeps = request.state.ops
    if not required and not has_body(request):
        return _ParsedRequest(request, b"", None)
    content = await deps.bodies.read(request, operator.source)
    if not required and not content.strip():
        return _ParsedRequest(request, b"", None)
    value = parse_json(content)
    # FastAPI validates a body by its attributes too: a Decimal has none of the model's fields, and would pass as `{}`.
    if not isinstance(value, dict):
        raise ValidationFailed("the body is not valid", [{"pointer": "", "detail": "must be a JSON object"}])
    return _ParsedRequest(request, content, value)


def operator_router(prefix: str) -> APIRouter:
    """Return a router for operators' routes below `prefix`."""
    return APIRouter(
        prefix=prefix,
        tags=["operators"],
        dependencies=[Depends(SCHEME)],
        route_class=OperatorRoute,
        strict_content_type=False,  # a body without a Content-Type is JSON; `Bodies.read` refuses every other type
    )


async def _get_operator(request: Request) -> guards.CurrentOperator:
    """Return the operator that `OperatorRoute` has authenticated."""
    operator: guards.CurrentOperator = request.state.operator
    return operator


async def _get_deps(request: Request) -> OpsDeps:
    deps: OpsDeps = request.state.ops
    return deps


Operator = Annotated[guards.CurrentOperator, Depends(_get_operator)]
Deps = Annotated[OpsDeps, Depends(_get_deps)]


class NoParameters(StrictModel):
    """The query of a route that takes none."""


NoQuery = Annotated[NoParameters, Query()]
