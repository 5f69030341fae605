"""Find card numbers in text, so that none is stored, sent to partners or logged.

A card number has the first digits and the length that a card network issues (ISO/IEC 7812), and a valid check digit.
It is written without separators, or in groups with the same separator throughout. Dates, times, phone numbers and most
other numbers do not match. Visa's first cards had 13 digits; they were withdrawn long ago, and one in ten German and
Japanese article numbers (EAN-13) would match, so they are not searched for.
"""

import re
import unicodedata

LONGEST = 19
SHORTEST = 14  # Diners Club
SHORTEST_IN_SKU = 15  # article numbers (GTIN) have up to 14 digits

# https://en.wikipedia.org/wiki/Payment_card_number#Issuer_identification_number_(IIN)
NETWORKS = re.compile(
    r"""
      4 (?: [0-9]{15} | [0-9]{18} )                                                    # Visa
    | (?: 5[1-5][0-9]{2} | 222[1-9] | 22[3-9][0-9] | 2[3-6][0-9]{2} | 27[01][0-9] | 2720 ) [0-9]{12}  # Mastercard
    | 3[47] [0-9]{13}                                                                  # American Express
    | (?: 30[0-5] | 309 | 36[0-9] | 3[89][0-9] ) [0-9]{11,16}                          # Diners Club
    | 35 (?: 2[89] | [3-8][0-9] ) [0-9]{12,15}                                         # JCB
    | (?: 6011 | 64[4-9][0-9] | 65[0-9]{2} | 62[0-9]{2} | 81[0-9]{2} ) [0-9]{12,15}    # Discover, UnionPay
    | (?: 5018 | 5020 | 5038 | 5893 | 6304 | 6759 | 676[1-3] ) [0-9]{10,15}            # Maestro
    | 220[0-4] [0-9]{12,15}                                                            # Mir
    | 60 [0-9]{14} | 508[0-9]{13} | 9792 [0-9]{12}                                     # RuPay, Troy
    """,
    re.VERBOSE,
)
# From the start of each group of digits: up to six groups with the same separator. Cards are written in groups of three
# to six digits; matching shorter groups would make a long text of numbers expensive.
GROUPS = re.compile(r"(?<![0-9])(?=([2-69][0-9]{2,18}(?:([^0-9A-Za-z])[0-9]{1,18}(?:\2[0-9]{1,18}){0,4})?)(?![0-9]))")
ONE_BY_ONE = re.compile(r"(?<![0-9])([0-9]([^0-9A-Za-z])(?:[0-9]\2)+[0-9])(?![0-9])")
MANY_DIGITS = re.compile(rf"[0-9](?:[^0-9A-Za-z]?[0-9]){{{SHORTEST - 1}}}")
DOUBLED = bytes(sum(divmod(2 * digit, 10)) for digit in range(10)).ljust(256)  # the sum of a doubled digit's digits


def has_card_number(text: str, shortest: int = SHORTEST) -> bool:
    """Return whether the text contains a card number of at least `shortest` digits."""
    text = unicodedata.normalize("NFKC", text)  # full-width digits are digits
    if MANY_DIGITS.search(text) is None:
        return False
    if any(_is_card(match[1], match[2], shortest) for match in GROUPS.finditer(text)):
        return True
    spelled = (match[1].replace(match[2], "") for match in ONE_BY_ONE.finditer(text))
    return any(_is_card(digits, None, shortest) for digits in spelled)


def _is_card(written: str, separator: str | None, shortest: int) -> bool:
    """Return whether the first groups of `written`, any number of them, form a card number."""
    digits = ""
    for group in written.split(separator) if separator else (written,):
        digits += group
        if len(digits) > LONGEST:
            return False
        if len(digits) >= shortest and NETWORKS.fullmatch(digits) and _luhn(digits):
            return True
    return False


def _luhn(digits: str) -> bool:
    """Return whether the check digit is valid (ISO/IEC 7812-1, annex B)."""
    values = bytes(map(int, reversed(digits)))
    return (sum(values[::2]) + sum(values[1::2].translate(DOUBLED))) % 10 == 0
