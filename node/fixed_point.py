"""Decimal text to scaled integers and back, exactly and without floats: the numbers of JSON and CSV feeds."""

from __future__ import annotations

from functools import lru_cache

CACHED_TEXTS = 1 << 16
"""Texts whose numbers are remembered: a feed names the same prices again and again."""
INT64_MAX = (1 << 63) - 1
_POWERS: list[int] = [10**n for n in range(40)]


class BadNumber(ValueError):
    """A text is not a number that fits.

    Attributes:
        reason: `not_a_number`, `too_precise` or `too_large`: the key that it is counted under.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@lru_cache(maxsize=CACHED_TEXTS)
def fixed_point(text: str, decimals: int) -> int:
    """Decimal text -> integer scaled by ``10**decimals``, e.g. ``fixed_point("61837.63000000", 9) == 61837630000000``.

    Digits, an optional sign and one point; an exponent (``1e-5``) is understood too. No spaces, underscores, or other alphabets.

    Raises:
        BadNumber: not a number, more decimals than fit, or outside int64.
    """
    whole, _, fraction = text.partition(".")
    digits = whole + fraction
    if not (digits.isdigit() and digits.isascii() and whole):
        return _unusual(text, decimals)
    missing = decimals - len(fraction)
    if missing < 0:
        kept = fraction[:decimals]
        if fraction[decimals:].strip("0"):
            raise BadNumber("too_precise")
        digits, missing = whole + kept, 0
    if len(digits) > 40 or missing > 38:
        return _unusual(text, decimals)
    value = int(digits) * _POWERS[missing]
    if value > INT64_MAX:
        raise BadNumber("too_large")
    return value


def _unusual(text: str, decimals: int) -> int:
    """Signs, exponents, a missing whole part, leading zeros beyond measure."""
    body = text[1:] if text[:1] in ("-", "+") else text
    mantissa, mark, exponent_text = body.lower().partition("e")
    whole, _, fraction = mantissa.partition(".")
    digits = whole + fraction
    if not (digits.isascii() and digits.isdigit()) or len(text) > 400:
        raise BadNumber("not_a_number")
    exponent = _exponent(exponent_text) if mark else 0
    shift = decimals + exponent - len(fraction)
    value = int(digits)
    if shift > 400 and value:
        raise BadNumber("too_large")
    if shift >= 0:
        value *= 10**shift if value else 0
    else:
        value, lost = divmod(value, 10 ** min(-shift, 1000))
        if lost:
            raise BadNumber("too_precise")
    if value > INT64_MAX:
        raise BadNumber("too_large")
    return -value if text[:1] == "-" else value


def _exponent(text: str) -> int:
    body = text[1:] if text[:1] in ("-", "+") else text
    if not (body.isascii() and body.isdigit()) or len(body) > 4:
        raise BadNumber("not_a_number")
    return -int(body) if text[:1] == "-" else int(body)


def decimals_of(text: str) -> int:
    """Decimals of a plain decimal text that are not trailing zeros: ``decimals_of("61837.630") == 2``."""
    return len(text.partition(".")[2].rstrip("0"))
