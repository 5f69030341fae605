"""Inventory over HTTP. Idempotency keys contain only the saga's id and the step, so every call can be repeated."""

from collections.abc import Sequence
from uuid import UUID

from app.partners.client import Agreement, PartnerClient
from app.partners.ports import Outcome, PartnerItem, Unknown

HOLD = Agreement(201, ("reservation_id", "expires_at"), {(409, "out-of-stock")})
COMMIT = Agreement(200, (), {(409, "hold-expired")})
RELEASE = Agreement(None)
STATES = frozenset({"held", "committed", "released", "expired"})


class HttpInventory:
    """The `Inventory` port over HTTP."""

    def __init__(self, client: PartnerClient) -> None:
        self._client = client

    async def hold(self, saga_id: UUID, items: Sequence[PartnerItem], seconds: int) -> Outcome:
        """Reserve all items or none for `seconds`."""
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
        """Return what is held or sold: the undo of both inventory steps."""
        body = {"saga_id": str(saga_id)}
        return await self._client.call("/v1/inventory/release", f"{saga_id}:reserve_inventory:undo", body, RELEASE)

    async def state(self, saga_id: UUID) -> str | Unknown | None:
        """Return `held`, `committed`, `released` or `expired`; None if it was never seen (a call may be in flight)."""
        return await self._client.state(f"/v1/inventory/holds/{saga_id}", STATES)
