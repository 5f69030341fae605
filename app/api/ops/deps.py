"""What the operator routes use, and who may call them."""

from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Annotated, TypeVar

from fastapi import Depends, Request
from fastapi.security import HTTPBearer

from app import db
from app.api.body import Bodies, has_body, parse_json, validated
from app.api.params import StrictModel
from app.auth import guards
from app.errors import ValidationFailed
from app.observability.signals import Signals
from app.operations.dead_letters import DeadLetters

# Every route asks who calls before anything else, so that nobody else learns what a valid request is. The first
# dependency is for the OpenAPI document only; the second decides.
OPERATORS_ONLY = (
    Depends(
        HTTPBearer(
            auto_error=False,
            scheme_name="operator",
            description="`ORDERS_ADMIN_TOKEN`, or a token with the scope `orders:operate`",
        )
    ),
    Depends(guards.operator),
)
CurrentOperator = Annotated[guards.CurrentOperator, Depends(guards.operator)]

Kind = TypeVar("Kind", bound=StrictModel)

NO_STORE = {"Cache-Control": "no-store"}
NOT_OFFERED = {HTTPStatus.NOT_FOUND: ("not-found", "Not Found")}


@dataclass(frozen=True, slots=True)
class OpsDeps:
    """What the operator routes use. `pools`: of this process, by name. `dead_letters`: by the name of their queue."""

    pool: db.Pool
    pools: Mapping[str, db.Pool]
    dead_letters: Mapping[str, DeadLetters]
    signals: Signals
    bodies: Bodies

    def dead_letters_of(self, name: object, pointer: str) -> DeadLetters:
        """Return the dead letters of a queue, by its name or its dead-letter queue's; None: of the first queue.

        Raises ValidationFailed at `pointer`.
        """
        for letters in self.dead_letters.values():
            if name in (None, letters.queue.name, letters.queue.dead_letter_queue):  # not a set: JSON may be unhashable
                return letters
        names = ", ".join(
            f"{each.queue.name} (or {each.queue.dead_letter_queue})" for each in self.dead_letters.values()
        )
        detail = f"must be {names}: no other queue has dead letters"
        raise ValidationFailed("the queue is not valid", [{"pointer": pointer, "detail": detail}])


async def read_optional_body(request: Request, operator: guards.CurrentOperator, kind: type[Kind]) -> Kind:
    """Return the body of a change; no body, or an empty one, means `{}`.

    Raises ValidationFailed, and as `Bodies.read` does.
    """
    deps: OpsDeps = request.state.ops
    if not has_body(request):
        return kind()
    body = await deps.bodies.read(request, operator.source)
    return validated(kind, parse_json(body) if body.strip() else {}, "the body is not valid")
