"""An amount means the same in ISO 4217's minor units and in Stripe's, or it is not sent."""

from decimal import Decimal

import pytest

from app.orders.money import EXPONENTS, to_minor
from app.partners.stripe_amounts import THREE_DECIMAL, TWO_DECIMAL, ZERO_DECIMAL, is_known, stripe_amount

# From https://docs.stripe.com/currencies, with Stripe's own examples where it has any.
DOCUMENTED = [
    ("10", "USD", 1000),
    ("9.99", "EUR", 999),
    ("10", "JPY", 10),
    ("500", "KRW", 500),
    ("5", "ISK", 500),
    ("5", "UGX", 500),
    ("10.45", "HUF", 1045),
    ("800.45", "TWD", 80045),
    ("7", "MGA", 7),
    ("5.120", "KWD", 5120),
]


@pytest.mark.parametrize(("price", "currency", "amount"), DOCUMENTED)
def test_amounts_match_stripes_documentation(price: str, currency: str, amount: int) -> None:
    assert stripe_amount(to_minor(Decimal(price), currency), currency) == amount


@pytest.mark.parametrize(("price", "currency"), [("5.124", "KWD"), ("0.001", "BHD"), ("7.20", "MGA"), ("1.005", "IQD")])
def test_amounts_are_never_rounded(price: str, currency: str) -> None:
    """An amount that Stripe cannot charge exactly is None."""
    assert stripe_amount(to_minor(Decimal(price), currency), currency) is None


@pytest.mark.parametrize("currency", EXPONENTS)
def test_whole_units_keep_their_value(currency: str) -> None:
    """Whole units have the same value at Stripe in every currency."""
    decimals = 0 if currency in ZERO_DECIMAL else 3 if currency in THREE_DECIMAL else 2
    assert stripe_amount(to_minor(Decimal(1234), currency), currency) == 1234 * 10**decimals


@pytest.mark.parametrize("currency", ["CLF", "IQD", "LYD", "UYW", "XAD", "MRU"])
def test_unlisted_currency_is_unknown(currency: str) -> None:
    assert not is_known(currency)


def test_every_currency_has_one_number_of_decimals() -> None:
    known = TWO_DECIMAL | ZERO_DECIMAL | THREE_DECIMAL
    assert len(known) == len(TWO_DECIMAL) + len(ZERO_DECIMAL) + len(THREE_DECIMAL)
    assert set(EXPONENTS) >= known


def test_currency_without_minor_unit_has_no_amount() -> None:
    assert stripe_amount(5, "XAU") is None
