"""Make the gateway to the partners that the settings name."""

import contextlib
from collections.abc import Callable
from functools import partial

from app.observability.signals import Signals
from app.observability.traces import trace_headers
from app.partners.client import PartnerClient
from app.partners.http import HttpClient
from app.partners.inventory import HttpInventory
from app.partners.payment import HttpPayment
from app.partners.ports import PartnerPorts
from app.partners.shipping import HttpShipping
from app.partners.stripe_payment import API_URL, StripePayment
from app.saga.gateway import CircuitConfig, PartnerGateway
from app.saga.pauses import PartnerPauses
from app.settings import Partners, Settings


async def open_gateway(
    stack: contextlib.AsyncExitStack, settings: Settings, signals: Signals, pauses: PartnerPauses
) -> PartnerGateway:
    """Return the gateway; its connections end with `stack`."""
    http = await stack.enter_async_context(HttpClient())
    client = partial(
        PartnerClient,
        http,
        timeout_seconds=settings.partner_timeout_seconds,
        extra_headers=trace_headers,
        signals=signals,
    )
    ports = PartnerPorts(
        HttpInventory(client(settings.inventory_url)),
        make_payment(settings, client),
        HttpShipping(client(settings.shipping_url)),
    )
    config = CircuitConfig(settings.partner_circuit_failures, settings.partner_circuit_open_seconds)
    return PartnerGateway(ports, config, signals, pauses=pauses)


def make_payment(settings: Partners, client: Callable[..., PartnerClient]) -> HttpPayment | StripePayment:
    """Return the payment partner that the settings name. `client` makes a client from a URL."""
    if settings.payment_provider == "http":
        return HttpPayment(client(settings.payment_url))
    # Stripe is not part of our traces, so it gets none of their headers.
    stripe = client(settings.payment_url or API_URL, extra_headers=dict)
    return StripePayment(stripe, settings.stripe_api_key.get_secret_value(), settings.partner_timeout_seconds)
