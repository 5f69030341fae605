"""Money: what goes in comes out, to the last digit, and nothing is ever rounded."""

from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.orders import money

BY_EXPONENT = {"JPY": 0, "USD": 2, "KWD": 3}
CURRENCIES = st.sampled_from(sorted(money.EXPONENTS))


@given(minor=st.integers(0, 10**15), currency=CURRENCIES)
def test_every_amount_survives_the_way_out_and_back_in(minor: int, currency: str) -> None:
    assert money.to_minor(Decimal(money.from_minor(minor, currency)), currency) == minor


@given(minor=st.integers(0, 10**15), currency=CURRENCIES)
def test_an_amount_is_told_with_all_of_the_currencys_decimals_and_no_exponent(minor: int, currency: str) -> None:
    whole, _, decimals = money.from_minor(minor, currency).partition(".")
    assert whole.isdecimal()
    assert len(decimals) == money.EXPONENTS[currency]


@pytest.mark.parametrize(("currency", "exponent"), list(BY_EXPONENT.items()))
def test_the_decimals_are_those_of_iso_4217(currency: str, exponent: int) -> None:
    assert money.EXPONENTS[currency] == exponent


@pytest.mark.parametrize("currency", ["XAU", "XTS", "XXX", "XDR"])
def test_what_has_no_minor_unit_is_no_currency_to_sell_in(currency: str) -> None:
    assert currency not in money.EXPONENTS


@pytest.mark.parametrize(
    ("amount", "currency", "minor", "told"),
    [
        ("5", "JPY", 5, "5"),
        ("9.99", "USD", 999, "9.99"),
        ("9.990", "USD", 999, "9.99"),
        ("9.9900000000000000000000000", "USD", 999, "9.99"),
        ("0", "USD", 0, "0.00"),
        ("-0.0", "USD", 0, "0.00"),
        ("1E+2", "USD", 10_000, "100.00"),
        ("1.234", "KWD", 1234, "1.234"),
        ("9999999999.99", "USD", 999_999_999_999, "9999999999.99"),
    ],
)
def test_an_amount_counts_by_its_value_however_it_is_written(amount: str, currency: str, minor: int, told: str) -> None:
    assert money.to_minor(Decimal(amount), currency) == minor
    assert money.from_minor(minor, currency) == told


@pytest.mark.parametrize(
    ("amount", "currency"),
    [
        ("5.5", "JPY"),
        ("9.999", "USD"),
        ("1.2345", "KWD"),
        ("0.001", "USD"),
        ("1E-400", "USD"),
        ("9.99000000000000000000000000000000000001", "USD"),
        ("1E-999999999999999999", "USD"),
    ],
)
def test_more_decimals_than_the_currency_has_are_refused_however_small(amount: str, currency: str) -> None:
    with pytest.raises(ValueError, match=f"has more decimals than {currency}"):
        money.to_minor(Decimal(amount), currency)


@given(minor=st.integers(0, 10**12), currency=CURRENCIES, digit=st.integers(1, 9), further=st.integers(1, 60))
def test_no_digit_is_lost_however_far_behind_the_point(minor: int, currency: str, digit: int, further: int) -> None:
    text = money.from_minor(minor, currency)
    point = "" if "." in text else "."
    with pytest.raises(ValueError, match="has more decimals"):
        money.to_minor(Decimal(f"{text}{point}{'0' * (further - 1)}{digit}"), currency)


@pytest.mark.parametrize(
    ("currency", "largest"), [("JPY", 9_999_999_999), ("USD", 999_999_999_999), ("KWD", 9_999_999_999_990)]
)
def test_the_largest_total_is_the_same_number_of_units_in_every_currency(currency: str, largest: int) -> None:
    assert money.max_total_minor(currency) == largest
