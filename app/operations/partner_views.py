"""The views of partners for operators, the same from `/ops/partners` and from the commands' `--json`."""

from collections.abc import Callable
from typing import Literal, Self

from pydantic import BaseModel

from app import db
from app.operations.partners import PartnerAction, PauseOutcome
from app.orders.model import rfc3339
from app.partners.circuit import CircuitState
from app.saga import pauses
from app.saga.pauses import LateOrders, PartnerPause
from app.saga.steps import partners

CIRCUITS: dict[CircuitState, Literal["closed", "half-open", "open"]] = {
    CircuitState.CLOSED: "closed",
    CircuitState.HALF_OPEN: "half-open",
    CircuitState.OPEN: "open",
}


class PauseView(BaseModel):
    """A pause in force: since when, until when, by whom and why."""

    paused_at: str
    ends_at: str
    actor: str
    reason: str

    @classmethod
    def of(cls, pause: PartnerPause) -> Self:
        """Return the view of a pause."""
        return cls(
            paused_at=rfc3339(pause.paused_at), ends_at=rfc3339(pause.ends_at), actor=pause.actor, reason=pause.reason
        )


class PartnerView(BaseModel):
    """A partner. `pause`: null while it is not paused. `sagas`: how many unfinished ones are at a step of the partner.

    `circuit`: as this process sees it; null: this process calls no partner.
    """

    partner: str
    pause: PauseView | None
    circuit: Literal["closed", "half-open", "open"] | None
    sagas: int


class PartnersAnswer(BaseModel):
    """Every partner, in the order of the steps."""

    partners: list[PartnerView]


class PartnerChanged(BaseModel):
    """The result of an operator's action. `message`: the outcome as text. `pause`: null after a resume.

    `orders_too_late`: unfinished orders that reach their deadline before the end of the pause, so that they would be
    rejected; they are counted up to 10000; null: they could not be counted in time. `warning`: says so, and whether
    new orders would be; null: neither.
    """

    partner: str
    action: str
    outcome: str
    message: str
    pause: PauseView | None
    orders_too_late: int | None
    warning: str | None

    @classmethod
    def of_pause(cls, pause: PartnerPause, outcome: PauseOutcome, late: LateOrders | None) -> Self:
        """Return the view of a pause that has just begun. `late` None: the orders could not be counted."""
        view = PauseView.of(pause)
        before = ", instead of the pause before" if outcome is PauseOutcome.REPLACED else ""
        return cls(
            partner=pause.partner,
            action=PartnerAction.PAUSE,
            outcome=outcome,
            message=f"calls to {pause.partner} are paused until {view.ends_at}{before}",
            pause=view,
            orders_too_late=None if late is None else late.number,
            warning=warn(late),
        )

    @classmethod
    def of_resume(cls, partner: str, outcome: PauseOutcome) -> Self:
        """Return the view of the end of a pause."""
        resumed = f"calls to {partner} are resumed"
        unchanged = f"calls to {partner} were not paused: nothing was changed"
        return cls(
            partner=partner,
            action=PartnerAction.RESUME,
            outcome=outcome,
            message=resumed if outcome is PauseOutcome.RESUMED else unchanged,
            pause=None,
            orders_too_late=0,
            warning=None,
        )


def warn(late: LateOrders | None) -> str | None:
    """Return what a pause costs, as text; None: nothing. `late` None: the orders could not be counted."""
    if late is None:
        return "the orders that reach their deadline before then, and would be rejected, could not be counted"
    new = None if late.placed_before is None else f"orders placed before {rfc3339(late.placed_before)}"
    if late.number:
        reach = "order reaches its" if late.number == 1 else "orders reach their"
        number = f"more than {late.number:,}" if late.has_more else f"{late.number}"
        warning = f"{number} unfinished {reach} deadline before then, and would be rejected"
        return warning + (f"; so would {new}" if new else "")
    return f"{new} reach their deadline before then, and would be rejected" if new else None


async def read_partners(pool: db.Pool, circuit_state: Callable[[str], CircuitState] | None = None) -> PartnersAnswer:
    """Return every partner with its pause. `circuit_state` None: unknown. Raises DatabaseUnavailable."""
    async with db.connection(pool) as conn:
        in_force = {pause.partner: PauseView.of(pause) for pause in await pauses.list_in_force(conn)}
        sagas = await pauses.count_sagas(conn)
    return PartnersAnswer(
        partners=[
            PartnerView(
                partner=partner,
                pause=in_force.get(partner),
                circuit=None if circuit_state is None else CIRCUITS[circuit_state(partner)],
                sagas=sagas.get(partner, 0),
            )
            for partner in partners()
        ]
    )
