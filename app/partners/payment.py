"""Payment over HTTP. Idempotency keys contain only the saga's id and the step, so every call can be repeated."""

from uuid import UUID

from app.partners.client import Agreement, PartnerClient
from app.partners.ports import ChargeRequest, Outcome, Unknown

CHARGE = Agreement(201, ("payment_id",), {(402, "card-declined")})
REFUND = Agreement(None)
STATES = frozenset({"charged", "declined", "refunded"})


class HttpPayment:
    """The `Payment` port over HTTP."""

    def __init__(self, client: PartnerClient) -> None:
        self._client = client

    async def charge(self, charge: ChargeRequest) -> Outcome:
        """Charge the amount, in the currency's smallest unit."""
        body = {
            "saga_id": str(charge.saga_id),
            "amount_minor": charge.amount_minor,
            "currency": charge.currency,
            "payment_method": charge.payment_method,
        }
        return await self._client.call("/v1/payments/charge", f"{charge.saga_id}:charge_payment", body, CHARGE)

    async def refund(self, charge: ChargeRequest) -> Outcome:
        """Refund what was charged."""
        body = {"saga_id": str(charge.saga_id)}
        return await self._client.call("/v1/payments/refund", f"{charge.saga_id}:charge_payment:undo", body, REFUND)

    async def state_of(self, charge: ChargeRequest) -> str | Unknown | None:
        """Return the state of a charge, as `state` does."""
        return await self.state(charge.saga_id)

    async def state(self, saga_id: UUID) -> str | Unknown | None:
        """Return `charged`, `declined` or `refunded`; None if it was never seen (a call may be in flight)."""
        return await self._client.state(f"/v1/payments/{saga_id}", STATES)
