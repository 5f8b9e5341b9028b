"""Arithmetic that gives the same bits on every host: logarithm, exponential, 128-bit integers.

The C library's ``log`` and ``exp`` differ between versions in the last bit, which would break deterministic replay. These use only
IEEE additions, multiplications and divisions (the algorithms of fdlibm, ``e_log.c`` and ``e_exp.c``); their error is below 1 ulp.
128-bit values are pairs of 64-bit halves, so that sums of price x quantity are exact.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tickmesh.transports.toolbox import bits_f64, f64_bits, inlined

_LN2_HI, _LN2_LO = 6.93147180369123816490e-01, 1.90821492927058770002e-10
_INV_LN2 = 1.44269504088896338700e00
_LG1, _LG2, _LG3, _LG4 = 6.666666666666735130e-01, 3.999999999940941908e-01, 2.857142874366239149e-01, 2.222219843214978396e-01
_LG5, _LG6, _LG7 = 1.818357216161805012e-01, 1.531383769920937332e-01, 1.479819860511658591e-01
_P1, _P2, _P3 = 1.66666666666666019037e-01, -2.77777777770155933842e-03, 6.61375632143793436117e-05
_P4, _P5 = -1.65339022054652515390e-06, 4.13813679705723846039e-08
_EXP_MAX, _EXP_MIN = 7.09782712893383973096e02, -7.45133219101941108420e02
_TWO_54, _TWO_64, _SUBNORMAL = 18014398509481984.0, 18446744073709551616.0, 2.2250738585072014e-308
_MANTISSA, _ONE_BITS, _SIGN_ROOM = 0x000F_FFFF_FFFF_FFFF, 0x3FF0_0000_0000_0000, 0x95F64_0000_0000
_U = np.uint64
_LOW_32, _32 = np.uint64(0xFFFF_FFFF), np.uint64(32)


@inlined
def log(x: Any) -> Any:
    """Natural logarithm, float64, error < 1 ulp; NaN for negative x and NaN, -inf for 0."""
    if not x > 0.0:
        return -np.inf if x == 0.0 else np.nan
    if x == np.inf:
        return x
    k = np.int64(0)
    if x < _SUBNORMAL:
        x = x * _TWO_54
        k = np.int64(-54)
    bits = f64_bits(x)
    mantissa = bits & np.int64(_MANTISSA)
    carry = (mantissa + np.int64(_SIGN_ROOM)) & np.int64(1 << 52)
    k += (bits >> np.int64(52)) - np.int64(1023) + (carry >> np.int64(52))
    f = bits_f64(mantissa | (carry ^ np.int64(_ONE_BITS))) - 1.0
    s = f / (2.0 + f)
    z = s * s
    w = z * z
    r = z * (_LG1 + w * (_LG3 + w * (_LG5 + w * _LG7))) + w * (_LG2 + w * (_LG4 + w * _LG6))
    half = 0.5 * f * f
    n = np.float64(k)
    return n * _LN2_HI - ((half - (s * (half + r) + n * _LN2_LO)) - f)


@inlined
def exp(x: Any) -> Any:
    """e to the power x, float64, error < 1 ulp; 0 below -745.14, inf above 709.79."""
    if x != x:
        return x
    if x > _EXP_MAX:
        return np.inf
    if x < _EXP_MIN:
        return 0.0
    k = np.int64(_INV_LN2 * x + (0.5 if x >= 0.0 else -0.5))
    high = x - np.float64(k) * _LN2_HI
    low = np.float64(k) * _LN2_LO
    r = high - low
    t = r * r
    c = r - t * (_P1 + t * (_P2 + t * (_P3 + t * (_P4 + t * _P5))))
    y = 1.0 - ((low - (r * c) / (2.0 - c)) - high)
    if k > 1023:
        return y * 2.0 * bits_f64((k - np.int64(1) + np.int64(1023)) << np.int64(52))
    if k >= -1021:
        return y * bits_f64((k + np.int64(1023)) << np.int64(52))
    return y * bits_f64((k + np.int64(1023 + 1000)) << np.int64(52)) * 9.33263618503218878990e-302


@inlined
def multiply_wide(a: Any, b: Any) -> Any:
    """u64 x u64 -> ``(high, low)``, the exact 128-bit product as two u64."""
    a_low, a_high, b_low, b_high = a & _LOW_32, a >> _32, b & _LOW_32, b >> _32
    low_low = a_low * b_low
    low_high = a_low * b_high
    high_low = a_high * b_low
    middle = (low_low >> _32) + (low_high & _LOW_32) + (high_low & _LOW_32)
    high = a_high * b_high + (low_high >> _32) + (high_low >> _32) + (middle >> _32)
    return high, (low_low & _LOW_32) | ((middle & _LOW_32) << _32)


@inlined
def multiply_saturating(high: Any, low: Any, factor: Any) -> Any:
    """``(high, low) * factor`` as ``(high, low)``, or the largest 128-bit value if it does not fit. All u64."""
    carry, new_low = multiply_wide(low, factor)
    over, new_high = multiply_wide(high, factor)
    total = new_high + carry
    if over != _U(0) or total < carry:
        return _U(0xFFFF_FFFF_FFFF_FFFF), _U(0xFFFF_FFFF_FFFF_FFFF)
    return total, new_low


@inlined
def magnitude(value: Any) -> Any:
    """Absolute value of an i64 as u64; exact for the lowest i64 too."""
    return _U(-(value + np.int64(1))) + _U(1) if value < 0 else _U(value)


@inlined
def add_product(high: Any, low: Any, a: Any, b: Any) -> Any:
    """Signed 128-bit sum ``(high i64, low u64) + a * b`` of i64 factors; wraps beyond 2**127."""
    product_high, product_low = multiply_wide(magnitude(a), magnitude(b))
    if (a < 0) != (b < 0):
        borrow = np.int64(1) if low < product_low else np.int64(0)
        return high - np.int64(product_high) - borrow, low - product_low
    new_low = low + product_low
    carry = np.int64(1) if new_low < low else np.int64(0)
    return high + np.int64(product_high) + carry, new_low


@inlined
def wide_float(high: Any, low: Any) -> Any:
    """Signed 128-bit ``(high i64, low u64)`` as float64, within 1 ulp."""
    if high >= 0:
        return np.float64(high) * _TWO_64 + np.float64(low)
    flipped = ~low + _U(1)
    carry = np.int64(1) if flipped == _U(0) else np.int64(0)
    return -(np.float64(~high + carry) * _TWO_64 + np.float64(flipped))
