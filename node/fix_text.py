"""Values of FIX fields, compiled: numbers, times, identifiers and names, read from text exactly and checked to the last character.

Every reader takes ``buf[p:e]`` of a u8 array with 64 readable bytes behind it, and returns ``(value, problem)``; the problem is 0, or
one of NOT_A_NUMBER, TOO_PRECISE, TOO_LARGE, BAD_TIME. Eight characters are read at a time, as one word.

Source: FIX data types (FIX 5.0 SP2 volume 1, "FIX Datatypes").
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tickmesh.node.instruments import mix
from tickmesh.transports.toolbox import count_trailing_zeros, inlined, le64, outlined

NOT_A_NUMBER, TOO_PRECISE, TOO_LARGE, BAD_TIME = 1, 2, 3, 4

_U, _I = np.uint64, np.int64
_FULL = _U(0xFFFFFFFFFFFFFFFF)
_ZERO_DIGITS, _SIXES, _HIGH_NIBBLES = _U(0x3030303030303030), _U(0x0606060606060606), _U(0xF0F0F0F0F0F0F0F0)
_ONES, _TOPS, _DOTS = _U(0x0101010101010101), _U(0x8080808080808080), _U(0x2E2E2E2E2E2E2E2E)
_CLOCK, _CLOCK_MARKS = _U(0x30303A30303A3030), _U(0x0000FF0000FF0000)
_POWERS = np.array([10**n for n in range(19)], np.int64)
_MAX = _I((1 << 63) - 1)
_DAY_NS, _SECOND_NS = _I(86_400_000_000_000), _I(1_000_000_000)
_HASHED = _U(1 << 62)
_NAME_BYTES = 24
_DIGITS_MAX = 18
"""Digits of a number that always fits an i64."""


# ---------------------------------------------------------------- words


@inlined
def low_bytes(word: Any, count: Any) -> Any:
    """The first `count` (0 to 8) bytes of a little-endian word; the rest is zero."""
    return word & (_FULL >> (_U(64 - 8 * count) & _U(63))) if count > 0 else _U(0)


@inlined
def first_equal(word: Any, pattern: Any) -> Any:
    """Index (8: none) of the first byte of a word that equals the byte repeated in `pattern`."""
    x = word ^ pattern
    found = (x - _ONES) & ~x & _TOPS
    return _I(count_trailing_zeros(found) >> _U(3))


@inlined
def not_digits(nibbles: Any) -> Any:
    """Nonzero if some byte of a word is above 9."""
    return ((nibbles + _SIXES) | nibbles) & _HIGH_NIBBLES


@inlined
def eight_digits(nibbles: Any) -> Any:
    """Bytes of 0 to 9, the first the most significant, as one number (u64)."""
    word = (nibbles * _U(2561)) >> _U(8) & _U(0x00FF00FF00FF00FF)
    word = (word * _U(6553601)) >> _U(16) & _U(0x0000FFFF0000FFFF)
    return (word * _U(42949672960001)) >> _U(32)


@inlined
def _last_digits(buf: Any, p: Any, count: Any) -> Any:
    """`count` (1 to 8) characters at p as nibbles of a word whose last byte is the last character."""
    shift = _U(64 - 8 * count)
    return (le64(buf, p) ^ _ZERO_DIGITS) << shift


# ---------------------------------------------------------------- numbers


@outlined
def _decimal_slowly(buf: Any, p: Any, e: Any, decimals: Any) -> Any:
    """Any decimal: a sign, digits, a point, digits. No exponent: FIX has none."""
    negative = p < e and buf[p] == 45
    if negative:
        p += 1
    value, fraction, digits, too_large, too_precise = _I(0), _I(-1), _I(0), False, False
    while p < e:
        c = _I(buf[p])
        p += 1
        if c == 46 and fraction < 0:
            fraction = _I(0)
            continue
        if c < 48 or c > 57:
            return _I(0), NOT_A_NUMBER
        digits += 1
        if fraction >= 0:
            if fraction >= decimals:
                too_precise = too_precise or c != 48
                continue
            fraction += 1
        if value > (_MAX - (c - 48)) // 10:
            too_large = True
            value = _I(0)
        value = value * 10 + (c - 48)
    if digits == 0:
        return _I(0), NOT_A_NUMBER
    for _ in range(decimals - max(fraction, _I(0))):
        if value > _MAX // 10:
            too_large = True
            value = _I(0)
        value *= 10
    if too_large:
        return _I(0), TOO_LARGE
    if too_precise:
        return _I(0), TOO_PRECISE
    return -value if negative else value, 0


@inlined
def price(buf: Any, p: Any, e: Any) -> Any:
    """A price in units of 1e-9, i64."""
    size = e - p
    word = le64(buf, p)
    point = first_equal(word, _DOTS)
    whole = min(point, size)
    after = size - whole - 1
    if whole < 1 or whole > 7 or after > 8:
        return _decimal_slowly(buf, p, e, _I(9))
    nibbles = (word ^ _ZERO_DIGITS) << _U(64 - 8 * whole)
    value = _I(eight_digits(nibbles)) * _SECOND_NS
    bad = not_digits(nibbles)
    if after > 0:
        fraction = low_bytes(le64(buf, p + whole + 1) ^ _ZERO_DIGITS, after)
        bad |= not_digits(fraction)
        value += _I(eight_digits(fraction)) * 10
    if bad != _U(0):
        return _decimal_slowly(buf, p, e, _I(9))
    return value, 0


@inlined
def quantity(buf: Any, p: Any, e: Any, decimals: Any) -> Any:
    """A quantity in units of 10**-decimals (0 to 18), i64."""
    size = e - p
    if size < 1 or size > 8:
        return _decimal_slowly(buf, p, e, decimals)
    nibbles = _last_digits(buf, p, size)
    if not_digits(nibbles) != _U(0) or decimals > 10:
        return _decimal_slowly(buf, p, e, decimals)
    return _I(eight_digits(nibbles)) * _POWERS[_U(decimals)], 0


@inlined
def whole_number(buf: Any, p: Any, e: Any) -> Any:
    """A number without sign or decimals, i64."""
    size = e - p
    if size < 1 or size > 8:
        return _long_number(buf, p, e)
    nibbles = _last_digits(buf, p, size)
    return _I(eight_digits(nibbles)), NOT_A_NUMBER if not_digits(nibbles) != _U(0) else 0


@outlined
def _long_number(buf: Any, p: Any, e: Any) -> Any:
    value = _I(0)
    if p >= e:
        return value, NOT_A_NUMBER
    for at in range(p, e):
        digit = _I(buf[at]) - 48
        if digit < 0 or digit > 9:
            return _I(0), NOT_A_NUMBER
        if value > (_MAX - digit) // 10:
            return _I(0), TOO_LARGE
        value = value * 10 + digit
    return value, 0


@outlined
def decimals_seen(buf: Any, p: Any, e: Any) -> Any:
    """Of a plain decimal: digits before the point without leading zeros, and after it without trailing ones."""
    before, after, zeros, point = _I(0), _I(0), _I(0), False
    for at in range(p, e):
        c = buf[at]
        if c == 46:
            point = True
        elif c >= 48 and c <= 57:
            if not point:
                before += 1 if before or c != 48 else 0
            else:
                zeros = zeros + 1 if c == 48 else _I(0)
                after += 1
    return before, after - (zeros if point else 0)


# ---------------------------------------------------------------- times


@outlined
def midnight_ns(date: Any) -> Any:
    """Midnight (UTC) of a YYYYMMDD number, ns since 1970: ``(ns, problem)``. Howard Hinnant, "days_from_civil"."""
    year, month, day = _I(date) // 10000, _I(date) // 100 % 100, _I(date) % 100
    leap = year % 4 == 0 and (year % 100 != 0 or year % 400 == 0)
    length = 28 + _I(leap) if month == 2 else 30 if month in (4, 6, 9, 11) else 31
    if year < 1970 or year > 2200 or month < 1 or month > 12 or day < 1 or day > length:
        return _I(0), BAD_TIME
    year -= month <= 2
    of_era = year % 400
    of_year = (153 * (month + (-3 if month > 2 else 9)) + 2) // 5 + day - 1
    days = year // 400 * 146097 + of_era * 365 + of_era // 4 - of_era // 100 + of_year - 719468
    return days * _DAY_NS, 0


@outlined
def _new_date(buf: Any, p: Any, cache: Any) -> Any:
    nibbles = le64(buf, p) ^ _ZERO_DIGITS
    if not_digits(nibbles) != _U(0):
        return BAD_TIME
    ns, problem = midnight_ns(eight_digits(nibbles))
    if problem == 0:
        cache[0], cache[1] = _I(le64(buf, p)), ns
    return problem


@inlined
def date(buf: Any, p: Any, cache: Any) -> Any:
    """YYYYMMDD at p as ns since 1970; `cache` i64[2] holds the last date's text and value (zeros at first)."""
    problem = 0
    if _I(le64(buf, p)) != cache[0]:
        problem = _new_date(buf, p, cache)
    return cache[1], problem


@inlined
def time_of_day(buf: Any, p: Any, e: Any) -> Any:
    """HH:MM:SS with up to twelve decimals, ns since midnight, picoseconds cut off; a leap second is the next minute's first."""
    size = e - p
    x = le64(buf, p) ^ _CLOCK
    pairs = x * _U(10) + (x >> _U(8))
    hour, minute, second = _I(pairs & _U(0xFF)), _I(pairs >> _U(24) & _U(0xFF)), _I(pairs >> _U(48) & _U(0xFF))
    bad = not_digits(x) | (x & _CLOCK_MARKS)
    ns = (hour * 3600 + minute * 60 + second) * _SECOND_NS
    decimals = size - 9
    if size != 8:
        if decimals < 1 or decimals > 8:
            fraction, problem = _long_fraction(buf, p + 8, e)
            bad |= _U(problem)
            ns += fraction
        else:
            digits = low_bytes(le64(buf, p + 9) ^ _ZERO_DIGITS, decimals)
            bad |= not_digits(digits) | _U(buf[p + 8] ^ 46)
            ns += _I(eight_digits(digits)) * 10
    if bad != _U(0) or hour > 23 or minute > 59 or second > 60:
        return _I(0), BAD_TIME
    return ns, 0


@outlined
def _long_fraction(buf: Any, p: Any, e: Any) -> Any:
    """A point and nine to twelve decimals, as ns; picoseconds are cut off."""
    first, rest = le64(buf, p + 1) ^ _ZERO_DIGITS, low_bytes(le64(buf, p + 9) ^ _ZERO_DIGITS, e - p - 9)
    if e - p < 10 or e - p > 13 or buf[p] != 46 or (not_digits(first) | not_digits(rest)) != _U(0):
        return _I(0), BAD_TIME
    return _I(eight_digits(first)) * 10 + _I(rest & _U(0xFF)), 0


@inlined
def timestamp(buf: Any, p: Any, e: Any, cache: Any) -> Any:
    """UTCTimestamp, YYYYMMDD-HH:MM:SS with decimals, as ns since 1970, i64; `cache` as for :func:`date`."""
    if e - p < 17:
        return _I(0), BAD_TIME
    midnight, wrong = date(buf, p, cache)
    ns, problem = time_of_day(buf, p + 9, e)
    if buf[p + 8] != 45 or wrong != 0:
        problem = BAD_TIME
    return midnight + ns, problem


# ---------------------------------------------------------------- names and ids


@inlined
def name_words(buf: Any, p: Any, e: Any) -> Any:
    """Text of up to 24 bytes as three words, zero padded; what is longer is cut (the caller looks at the length)."""
    size = min(e - p, _NAME_BYTES)
    w0 = low_bytes(le64(buf, p), min(size, 8))
    if size <= 8:
        return w0, _U(0), _U(0)
    return w0, low_bytes(le64(buf, p + 8), min(size - 8, 8)), low_bytes(le64(buf, p + 16), max(size - 16, 0))


@inlined
def identity(buf: Any, p: Any, e: Any) -> Any:
    """An id as a number, u64: its digits if it has up to 18 and nothing else, otherwise 62 bits of a hash of its text with bit 62 set."""
    size = e - p
    if size >= 1 and size <= 8:
        nibbles = _last_digits(buf, p, size)
        if not_digits(nibbles) == _U(0):
            return eight_digits(nibbles)
    return _long_identity(buf, p, e)


@outlined
def _long_identity(buf: Any, p: Any, e: Any) -> Any:
    if e - p > 8 and e - p <= _DIGITS_MAX:
        value, problem = _long_number(buf, p, e)
        if problem == 0:
            return _U(value)
    h = _U(e - p)
    while p < e:
        h = mix(h ^ low_bytes(le64(buf, p), min(e - p, 8)))
        p += 8
    return (h & (_HASHED - _U(1))) | _HASHED
