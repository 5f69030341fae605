"""Money in minor units (cents, yen, fils), exactly. Currencies and their decimals are ISO 4217's."""

from decimal import Decimal

import iso4217

MAX_TOTAL = Decimal("9999999999.99")  # in units of the currency, whatever its decimals

# Funds codes, metals and test codes have no minor unit: nothing can be sold in them.
EXPONENTS: dict[str, int] = {
    currency.code: currency.exponent for currency in iso4217.Currency if currency.exponent is not None
}


def to_minor(amount: Decimal, currency: str) -> int:
    """Express `amount`, at most MAX_TOTAL, in minor units. Raises ValueError if it has more decimals than the currency.

    The second comparison catches digits that the decimal context rounds away after 28.
    """
    exponent = EXPONENTS[currency]
    minor = amount.scaleb(exponent)
    if minor != minor.to_integral_value() or minor.scaleb(-exponent) != amount:
        raise ValueError(f"has more decimals than {currency} ({exponent})")
    return int(minor)


def from_minor(minor: int, currency: str) -> str:
    """Format minor units as a decimal string with all of the currency's decimals: 999 USD → "9.99", 5 JPY → "5"."""
    exponent = EXPONENTS[currency]
    if not exponent:
        return str(minor)
    units, rest = divmod(abs(minor), 10**exponent)
    return f"{'-' if minor < 0 else ''}{units}.{rest:0{exponent}}"


def max_total_minor(currency: str) -> int:
    """Return the largest total of an order, in minor units."""
    return int(MAX_TOTAL.scaleb(EXPONENTS[currency]))
