"""The final number of a worked answer, and whether two answers give the same number: exactly, never by substring ("5" is not in "15").

GSM8K's convention comes first: what follows the last "####". An answer without that mark is judged by the last number in its text.
"""

import re
from decimal import Decimal
from fractions import Fraction

_MARK = "####"
_NUMBER = re.compile(
    r"""(?<![A-Za-z\d.]) (?<![A-Za-z\d]_)        # not inside a word, an identifier or a dotted number; _5_ is emphasis
        ([-+]?) [$€£¥]?                           # -$5 is below 0
        ( (?:\d{1,3}(?:,\d{3})+(?!\d) | \d+)     # 1,000,000 or 1000000
            (?:\.\d+)? (?:/\d+)?                 # decimals, denominator
          | \.\d+ )""",
    re.ASCII | re.VERBOSE,
)


def numbers_in(text: str) -> list[Fraction]:
    """All numbers in a text, in order and exact: 1,000 = 1000 = 1000.0, 0.5 = 1/2. A minus counts unless it follows a digit (a range)."""
    literals = _NUMBER.findall(text.replace("\N{MINUS SIGN}", "-"))
    return [number for sign, digits in literals if (number := _exact(sign + digits.replace(",", ""))) is not None]


def _exact(literal: str) -> Fraction | None:
    """None for a division by zero, which is no number."""
    numerator, _, denominator = literal.partition("/")
    try:  # by way of Decimal: int() refuses a text of more than 4,300 digits, which a model in a loop writes easily
        return Fraction(Decimal(numerator)) / Fraction(Decimal(denominator or "1"))
    except ZeroDivisionError:
        return None


def final_number(text: str) -> Fraction | None:
    """The answer's final number: the first after the last "####", else the last in the text; None if there is none there."""
    _, mark, after = text.rpartition(_MARK)
    if mark:
        return next(iter(numbers_in(after)), None)
    numbers = numbers_in(after)
    return numbers[-1] if numbers else None


def same_answer(answer: str, reference: str) -> bool:
    """Whether both texts have a final number and it is the same. ValueError if the reference has none: nothing could equal it."""
    expected = final_number(reference)
    if expected is None:
        raise ValueError(f"the reference answer has no final number: {reference[-80:]!r}")
    return final_number(answer) == expected
