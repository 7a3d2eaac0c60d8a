"""Random bits and stochastic rounding inside kernels: the same bits as on every other backend.

Nothing is launched from here; the update kernels inline these functions. Integer arithmetic only,
about 20 instructions an element for the bits, which hide behind the memory traffic.

Reference: random_bits and round_stochastic in ttt_fast/rounding.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ttt_fast.rounding import splitmix64


def seed_key(seed: int) -> int:
    """The part of a random key that all tensors of a call share, as a signed 64-bit number."""
    key = splitmix64(seed & 0xFFFFFFFFFFFFFFFF)
    return key - (1 << 64) if key >> 63 else key


@triton.jit
def random_key(seed_key, tensor_index):
    """Key of a tensor, uint64: splitmix64(splitmix64(seed) + tensor_index)."""
    key = tl.full((), seed_key, tl.int64).to(tl.uint64) + tensor_index.to(tl.uint64)
    key += 0x9E3779B97F4A7C15
    key = (key ^ (key >> 30)) * 0xBF58476D1CE4E5B9
    key = (key ^ (key >> 27)) * 0x94D049BB133111EB
    return key ^ (key >> 31)


@triton.jit
def _lowbias32(x):
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= x >> 15
    x *= 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def random_bits(key, index):
    """32 random bits, uint32, for each element; ``index`` is its place in the tensor, int64."""
    high = (key >> 32).to(tl.uint32) + (index >> 32).to(tl.uint32) * 0x9E3779B9
    return _lowbias32(_lowbias32(index.to(tl.uint32) ^ key.to(tl.uint32)) ^ high)


@triton.jit
def round_stochastic(x, bits, DTYPE: tl.constexpr):
    """Round float32 to a 16-bit type up or down, with probability in proportion to the distance."""
    raw = x.to(tl.uint32, bitcast=True)
    if DTYPE == tl.bfloat16:
        rounded = ((raw + (bits & 0xFFFF)) >> 16).to(tl.uint16)
    else:
        noise = bits & 0x1FFF
        kept = ((raw + noise) & 0xFFFFE000).to(tl.float32, bitcast=True)
        normal = kept.to(tl.float16).to(tl.uint16, bitcast=True)
        # Below 2^-14 float16 is a grid of 2^-24. The sum is below 1025, so that cutting it to an
        # integer is the floor, and the integer is the result's bits.
        magnitude = raw & 0x7FFFFFFF
        small = magnitude < 0x38800000
        absolute = tl.where(small, magnitude, 0).to(tl.float32, bitcast=True)
        units = absolute * 16777216.0 + noise.to(tl.float32) * 0.0001220703125
        subnormal = units.to(tl.int32).to(tl.uint16) | ((raw >> 16) & 0x8000).to(tl.uint16)
        rounded = tl.where(small, subnormal, normal)
    finite = (raw & 0x7F800000) != 0x7F800000
    return tl.where(finite, rounded.to(DTYPE, bitcast=True), x.to(DTYPE))
