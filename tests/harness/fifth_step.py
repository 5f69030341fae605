"""A plan with a fifth step before the last one: loyalty points, at a partner that no release has."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from uuid import UUID

from app.orders.model import Reason
from app.partners.ports import Done, Outcome, Refused
from app.saga.steps import NEWEST, PLANS, Plans, StepSpec

AWARD_POINTS = "award_points"
NO_ACCOUNT = Reason("no-account")
VERSION = max(PLANS) + 1


@dataclass
class Loyalty:
    """The partner. It answers with `script` first, then decides each saga's award once; an undo blocks it."""

    script: list[Outcome] = field(default_factory=list)
    awarded: set[UUID] = field(default_factory=set)
    revoked: set[UUID] = field(default_factory=set)
    calls: list[str] = field(default_factory=list)

    async def award(self, saga_id: UUID) -> Outcome:
        """Award the points of the saga."""
        self.calls.append("award")
        if self.script:
            return self.script.pop(0)
        if saga_id in self.revoked:
            return Refused("undone")
        self.awarded.add(saga_id)
        return Done({"award_id": f"award_{saga_id}"})

    async def revoke(self, saga_id: UUID, award_id: str | None) -> Outcome:
        """Take the points back. `award_id`: from the recorded reply."""
        self.calls.append(f"revoke {award_id}")
        if self.script:
            return self.script.pop(0)
        self.revoked.add(saga_id)
        self.awarded.discard(saga_id)
        return Done()


def plans_with(loyalty: Loyalty, versions: Iterable[int] = PLANS) -> Plans:
    """Return the plans of this release and the next one, which has one row more."""
    *first, last = PLANS[NEWEST]
    fifth = StepSpec(
        step=AWARD_POINTS,
        partner="loyalty",
        do=lambda _, request: loyalty.award(request.order.id),
        undo=lambda _, request: loyalty.revoke(request.order.id, (request.do_reply or {}).get("award_id")),
        refusals=frozenset({NO_ACCOUNT}),
        undo_reads_reply=True,
    )
    return {**{version: PLANS[version] for version in versions}, VERSION: (*first, fifth, last)}
