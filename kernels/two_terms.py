"""A float32 number as the sum of two that tensor cores take without rounding.

What is accumulated in float32 and then goes into another product would lose digits as bfloat16 (8
of 24 bits stay) or as TF32 (11). As two terms, each with its own exponent, it keeps 16 or 22 for
one more product with the same other operand, which is in shared memory already.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def two_terms(value, dtype: tl.constexpr):
    """Split float32 numbers into high + low.

    bfloat16: both rounded to it; |value − high − low| <= 2⁻¹⁸ |value|.
    float32: both cut to the 11 bits of TF32, so that tensor cores change nothing; <= 2⁻²¹ |value|.

    The low term of an infinity is NaN: a sum that was infinite becomes NaN, not finite.
    """
    if dtype == tl.float32:
        high = _cut_to_tf32(value)
        low = _cut_to_tf32(value - high)
    else:
        high = value.to(dtype)
        low = (value - high.to(tl.float32)).to(dtype)
    return high, low


@triton.jit
def _cut_to_tf32(value):
    return (value.to(tl.uint32, bitcast=True) & 0xFFFFE000).to(tl.float32, bitcast=True)
