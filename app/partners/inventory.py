"""Inventory over HTTP. Calls carry keys made of the saga's id alone, so that any may be sent again."""

from collections.abc import Sequence
from uuid import UUID

from app.partners.client import Agreement, PartnerClient
from app.partners.ports import Outcome, PartnerItem, Unknown

HOLD = Agreement(201, ("reservation_id", "expires_at"), {(409, "out-of-stock")})
COMMIT = Agreement(200, (), {(409, "hold-expired")})
RELEASE = Agreement(None)
STATES = frozenset({"held", "committed", "released", "expired"})


class HttpInventory:
    """The `Inventory` of the ports."""

    def __init__(self, client: PartnerClient) -> None:
        self._client = client

    async def hold(self, saga_id: UUID, items: Sequence[PartnerItem], seconds: int) -> Outcome:
        """Reserve all items or none, for so long."""
        body = {
            "saga_id": str(saga_id),
            "items": [{"item_id": item.sku, "qty": item.quantity} for item in items],
            "ttl_seconds": seconds,
        }
        return await self._client.call("/v1/inventory/hold", f"{saga_id}:reserve_inventory", body, HOLD)

    async def commit(self, saga_id: UUID) -> Outcome:
        """Turn the hold into a sale."""
        body = {"saga_id": str(saga_id)}
        return await self._client.call("/v1/inventory/commit", f"{saga_id}:commit_inventory", body, COMMIT)

    async def release(self, saga_id: UUID) -> Outcome:
        """Return whatever is held or sold; the one undo of both steps."""
        body = {"saga_id": str(saga_id)}
        return await self._client.call("/v1/inventory/release", f"{saga_id}:reserve_inventory:undo", body, RELEASE)

    async def state(self, saga_id: UUID) -> str | Unknown | None:
        """`held`, `committed`, `released` or `expired`; None if never seen, which proves nothing."""
        return await self._client.state(f"/v1/inventory/holds/{saga_id}", STATES)
