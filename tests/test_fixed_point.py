"""Decimal text to integers, compared with Decimal."""

from __future__ import annotations

from decimal import Decimal, InvalidOperation

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tickmesh.node.fixed_point import INT64_MAX, BadNumber, decimals_of, fixed_point

NUMBERS = st.one_of(
    st.decimals(allow_nan=False, allow_infinity=False, min_value=-(10**12), max_value=10**12).map(lambda d: format(d, "f")),
    st.from_regex(r"[-+]?[0-9]{0,22}(\.[0-9]{0,14})?([eE][-+]?[0-9]{1,3})?", fullmatch=True),
    st.text(alphabet="0123456789.-+eE_ ٣x", max_size=12),
)


def slow(text: str, decimals: int) -> int | str:
    if not text.isascii() or any(c not in "0123456789.-+eE" for c in text):
        return "not_a_number"
    try:
        value = Decimal(text)
    except InvalidOperation:
        return "not_a_number"
    value_scaled = int(Decimal(value.as_tuple()._replace(exponent=0)))
    exponent = int(value.as_tuple().exponent) + decimals
    if exponent < 0:
        if value_scaled % 10**-exponent:
            return "too_precise"
        result = abs(value_scaled) // 10**-exponent
    else:
        result = abs(value_scaled) * 10**exponent
    if result > INT64_MAX:
        return "too_large"
    return -result if value < 0 else result


@given(NUMBERS, st.integers(0, 18))
def test_agrees_with_decimal(text: str, decimals: int) -> None:
    expected = slow(text, decimals)
    try:
        found: int | str = fixed_point(text, decimals)
    except BadNumber as error:
        found = error.reason
    assert found == expected


@pytest.mark.parametrize("text", ["", ".", "-", "1.2.3", "1_000", " 1", "1 ", "0x10", "nan", "inf", "1e", "1e99999", "١", "--1", "+-1"])
def test_refused(text: str) -> None:
    with pytest.raises(BadNumber) as caught:
        fixed_point(text, 9)
    assert caught.value.reason == "not_a_number"


def test_range() -> None:
    assert fixed_point("9223372036854775807", 0) == INT64_MAX
    assert fixed_point("-9223372036854775807", 0) == -INT64_MAX
    with pytest.raises(BadNumber, match="too_large"):
        fixed_point("9223372036854775808", 0)
    with pytest.raises(BadNumber, match="too_large"):
        fixed_point("1e400", 9)
    assert fixed_point("0." + "0" * 60 + "e5", 9) == 0
    assert decimals_of("61837.63000000") == 2
    assert decimals_of("5") == 0
