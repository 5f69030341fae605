"""Build what verifies the invariants, for `orders verify` and for the janitor."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from app import db
from app.bootstrap.consumers import CONSUMERS
from app.bootstrap.partners import make_payment
from app.errors import PartnerUnavailable
from app.messaging.broker import Broker
from app.messaging.topology import QueueSpec
from app.operations.verify import books
from app.operations.verify.books import LEDGER_PAGE, Book, LedgerBook, Query, QueryBook
from app.operations.verify.broker_side import BrokerSide
from app.operations.verify.run import Verifier, VerifyConfig
from app.partners.client import PartnerClient
from app.partners.http import HttpClient
from app.partners.inventory import HttpInventory
from app.partners.ledger import LedgerClient
from app.partners.shipping import HttpShipping
from app.settings import Verification
from app.values import immutable

NOT_SET = "{} is not set"


@immutable
class PartnerAccess:
    """How the partners can be asked. `missing`: why one cannot be, by its name."""

    books: list[Book]
    missing: dict[str, str]


async def find_books(
    http: HttpClient,
    settings: Verification,
    is_circuit_open: Callable[[str], bool] = lambda _: False,
    page_size: int = LEDGER_PAGE,
) -> PartnerAccess:
    """Find out which partners have ledgers. One whose circuit is open is not asked."""
    access = PartnerAccess([], {})
    ledgers: dict[str, set[str]] = {}
    for partner, url in _urls(settings).items():
        if not url:
            access.missing[partner] = NOT_SET.format(f"ORDERS_{partner.upper()}_URL")
        elif is_circuit_open(partner):
            access.missing[partner] = f"the circuit of {partner} is open"
        else:
            ledgers.setdefault(url.rstrip("/"), set()).add(partner)
    if settings.payment_provider == "stripe":
        _add_stripe(access, settings, http)
    for url, partners in ledgers.items():
        client = LedgerClient(http, url, settings.partner_timeout_seconds)
        try:
            if await client.exists():
                access.books.append(LedgerBook(client, frozenset(partners), page_size))
            else:
                access.books.extend(QueryBook(name, _query(name, url, settings, http)) for name in sorted(partners))
        except PartnerUnavailable as error:
            access.missing.update(dict.fromkeys(partners, f"{', '.join(sorted(partners))}: {error}"))
    return access


def make_config(settings: Verification) -> VerifyConfig:
    """Return what a pass needs to know of a service with these settings."""
    return VerifyConfig(
        consumer=CONSUMERS[0].queue.consumer,
        outbox_retention_seconds=settings.outbox_retention_seconds,
        inbox_retention_seconds=settings.inbox_retention_seconds,
        saga_retention_seconds=settings.saga_retention_seconds,
        grace_seconds=settings.saga_lease_seconds + settings.partner_timeout_seconds,
        max_pending=settings.outbox_max_pending,
    )


def make_verifier(
    pool: db.Pool, broker: Broker, specs: Sequence[QueueSpec], access: PartnerAccess, config: VerifyConfig
) -> Verifier:
    """Return the verifier of a service."""
    return Verifier(pool, BrokerSide(broker, specs), access.books, access.missing, config)


def _urls(settings: Verification) -> Mapping[str, str]:
    urls = {"inventory": settings.inventory_url, "payment": settings.payment_url, "shipping": settings.shipping_url}
    if settings.payment_provider == "stripe":
        del urls["payment"]
    return urls


def _add_stripe(access: PartnerAccess, settings: Verification, http: HttpClient) -> None:
    if not settings.stripe_api_key.get_secret_value():
        access.missing["payment"] = NOT_SET.format("ORDERS_STRIPE_API_KEY")
        return
    client = partial(PartnerClient, http, timeout_seconds=settings.partner_timeout_seconds)
    access.books.append(QueryBook("payment", books.query_payment(make_payment(settings, client))))


def _query(partner: str, url: str, settings: Verification, http: HttpClient) -> Query:
    client = partial(PartnerClient, http, timeout_seconds=settings.partner_timeout_seconds)
    if partner == "inventory":
        return books.query_inventory(HttpInventory(client(url)))
    if partner == "payment":
        return books.query_payment(make_payment(settings, client))
    return books.query_shipping(HttpShipping(client(url)))
