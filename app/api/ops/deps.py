"""The dependencies of the operator routes."""

from collections.abc import Callable, Mapping
from http import HTTPStatus

from app import db
from app.api.body import Bodies
from app.errors import ValidationFailed
from app.observability.signals import Signals
from app.operations.dead_letters import DeadLetters
from app.partners.circuit import CircuitState
from app.values import immutable

NO_STORE = {"Cache-Control": "no-store"}
NOT_OFFERED = {HTTPStatus.NOT_FOUND: ("not-found", "Not Found")}


@immutable
class OpsDeps:
    """Dependencies of the operator routes. `pools`: those of this process, by name. `dead_letters`: by queue name.

    `circuit_state`: of a partner; None: this process calls none.
    """

    pool: db.Pool
    pools: Mapping[str, db.Pool]
    dead_letters: Mapping[str, DeadLetters]
    circuit_state: Callable[[str], CircuitState] | None
    signals: Signals
    bodies: Bodies

    @property
    def consumer(self) -> str:
        """The inbox name of the saga's consumer."""
        return next(iter(self.dead_letters.values())).queue.consumer

    def dead_letters_of(self, name: object, pointer: str) -> DeadLetters:
        """Return the dead letters of the queue with this name or dead-letter queue; None means the first queue.

        Raises ValidationFailed at `pointer`.
        """
        for letters in self.dead_letters.values():
            # A tuple, not a set: a name from a JSON body may not be hashable.
            if name in (None, letters.queue.name, letters.queue.dead_letter_queue):
                return letters
        names = ", ".join(
            f"{letters.queue.name} (or {letters.queue.dead_letter_queue})" for letters in self.dead_letters.values()
        )
        detail = f"must be {names}: no other queue has dead letters"
        raise ValidationFailed("the queue is not valid", [{"pointer": pointer, "detail": detail}])
