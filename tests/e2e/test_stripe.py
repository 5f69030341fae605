"""The service as a user runs it with ORDERS_PAYMENT_PROVIDER=stripe, against a fake of Stripe's API."""

from tests.e2e.conftest import System, order
from tests.harness.stripe_fake import API_KEY, StripeFake


async def test_orders_paid_and_declined_through_stripe(system: System, stripe: StripeFake) -> None:
    """The API key never appears in a log or an answer."""
    stripe.fail("error", "create", "confirm", times=2)
    service = await system.start(
        payment_provider="stripe", payment_url=stripe.url, stripe_api_key=API_KEY, log_level="DEBUG"
    )
    for method in ("pm_card_visa", "pm_card_visa_chargeDeclined"):
        await system.place([service], method, order(payment_method=method))
    await system.all_ended()
    assert await system.statuses() == {("confirmed", None), ("rejected", "card-declined")}
    assert [(what, amount) for _, what, amount in stripe.ledger] == [("charge", 2997)]
    assert all("traceparent" not in headers for _, _, headers in stripe.requests)
    log = service.log.read_text()
    assert "saga.finished" in log
    assert API_KEY not in log
    assert (
        await system.pool.fetchval("SELECT count(*) FROM saga_steps WHERE to_jsonb(saga_steps)::text LIKE '%sk_%'") == 0
    )
