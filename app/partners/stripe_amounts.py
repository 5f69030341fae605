"""Amounts as Stripe counts them, which is not everywhere as ISO 4217 does.

Source: https://docs.stripe.com/currencies, "Minor units in API amounts" and "Special cases". ISK and UGX have no
decimals in ISO 4217, but Stripe wants two (always 00); MGA has two, but Stripe wants none. HUF and TWD are special for
payouts only.
"""

from decimal import Decimal

import iso4217

ZERO_DECIMAL = frozenset(
    {"BIF", "CLP", "DJF", "GNF", "JPY", "KMF", "KRW", "MGA", "PYG", "RWF", "VND", "VUV", "XAF", "XOF", "XPF"}
)
THREE_DECIMAL = frozenset({"BHD", "JOD", "KWD", "OMR", "TND"})


def stripe_amount(amount_minor: int, currency: str) -> int | None:
    """Convert from ISO 4217's smallest unit; None for what Stripe cannot charge exactly. Nothing is ever rounded.

    The last of three decimals must be 0, as Stripe's own partners take two.
    """
    decimals = 0 if currency in ZERO_DECIMAL else 3 if currency in THREE_DECIMAL else 2
    exponent = iso4217.Currency(currency).exponent
    if exponent is None:
        return None
    amount = Decimal(amount_minor).scaleb(decimals - exponent)
    if amount != int(amount) or (currency in THREE_DECIMAL and amount % 10):
        return None
    return int(amount)
