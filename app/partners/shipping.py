"""Shipping over HTTP. Idempotency keys contain only the saga's id and the step, so every call can be repeated."""

from collections.abc import Mapping, Sequence
from typing import Any
from uuid import UUID

from app.partners.client import Agreement, PartnerClient
from app.partners.ports import Outcome, PartnerItem, Unknown

CREATE = Agreement(201, ("tracking_id",), {(409, "undeliverable")})
CANCEL = Agreement(None)
STATES = frozenset({"created", "refused", "cancelled"})


class HttpShipping:
    """The `Shipping` port over HTTP."""

    def __init__(self, client: PartnerClient) -> None:
        self._client = client

    async def create(self, saga_id: UUID, items: Sequence[PartnerItem], address: Mapping[str, Any] | None) -> Outcome:
        """Hand the parcel over."""
        body = {
            "saga_id": str(saga_id),
            "items": [{"item_id": item.sku, "qty": item.quantity} for item in items],
            "address": address,
        }
        return await self._client.call("/v1/shipments", f"{saga_id}:create_shipment", body, CREATE)

    async def cancel(self, saga_id: UUID) -> Outcome:
        """Cancel the shipment, if there is one."""
        body = {"saga_id": str(saga_id)}
        return await self._client.call("/v1/shipments/cancel", f"{saga_id}:create_shipment:undo", body, CANCEL)

    async def state(self, saga_id: UUID) -> str | Unknown | None:
        """Return `created`, `refused` or `cancelled`; None if it was never seen (a call may be in flight)."""
        return await self._client.state(f"/v1/shipments/{saga_id}", STATES)
