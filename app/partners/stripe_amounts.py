"""Convert amounts to Stripe's minor units, which differ from those of ISO 4217 for some currencies.

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
# The other currencies that Stripe lists as chargeable, so they have two decimals.
TWO_DECIMAL = frozenset(
    """
    AED AFN ALL AMD AOA ARS AUD AWG AZN BAM BBD BDT BMD BND BOB BRL BSD BWP BYN BZD CAD CDF CHF CNY COP CRC CVE CZK DKK
    DOP DZD EGP ETB EUR FJD FKP GBP GEL GIP GMD GTQ GYD HKD HNL HTG HUF IDR ILS INR ISK JMD KES KGS KHR KYD KZT LAK LBP
    LKR LRD LSL MAD MDL MKD MMK MNT MOP MUR MVR MWK MXN MYR MZN NAD NGN NIO NOK NPR NZD PAB PEN PGK PHP PKR PLN QAR RON
    RSD RUB SAR SBD SCR SEK SGD SHP SLE SOS SRD SZL THB TJS TOP TRY TTD TWD TZS UAH UGX USD UYU UZS WST XCD YER ZAR ZMW
    """.split()  # noqa: SIM905 - the list would take a hundred lines
)


def is_known(currency: str) -> bool:
    """Return whether Stripe's number of decimals is known for this currency. Other currencies must not be charged."""
    return currency in TWO_DECIMAL | ZERO_DECIMAL | THREE_DECIMAL


def stripe_amount(amount_minor: int, currency: str) -> int | None:
    """Convert from the smallest unit of ISO 4217. Return None if Stripe cannot charge the exact amount; never round.

    With three decimals, the last must be 0, because Stripe's own partners accept only two. An unknown currency is
    treated as one with two decimals: earlier releases charged it like that, and an undo needs the same amount.
    """
    decimals = 0 if currency in ZERO_DECIMAL else 3 if currency in THREE_DECIMAL else 2
    exponent = iso4217.Currency(currency).exponent
    if exponent is None:
        return None
    amount = Decimal(amount_minor).scaleb(decimals - exponent)
    if amount != int(amount) or (currency in THREE_DECIMAL and amount % 10):
        return None
    return int(amount)
