"""The type in which ops compute, random bits, and how what is computed is rounded to storage.

The specification of ``csrc/rounding.h`` and ``kernels/rounding.py``, which give the same bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

MASK32 = 0xFFFFFFFF
GOLDEN64 = 0x9E3779B97F4A7C15


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the type in which an op computes on storage of type ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def splitmix64(x: int) -> int:
    """Finaliser of the SplitMix64 generator (Steele et al., 2014) on a 64-bit integer."""
    x = (x + GOLDEN64) & 0xFFFFFFFFFFFFFFFF
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return x ^ (x >> 31)


def _lowbias32(x: Tensor) -> Tensor:
    """Mix 32-bit integers held in int64 (Wellons' "lowbias32" hash)."""
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & MASK32
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & MASK32
    return x ^ (x >> 16)


def random_bits(
    seed: int, tensor_index: int, numel: int, device: torch.device, start: int = 0
) -> Tensor:
    """Counter-based random bits: 32 for each element, the same on every backend.

        key = splitmix64(splitmix64(seed) + tensor_index)
        bits_i = h(h(lo(i) ^ lo(key)) ^ (hi(key) + hi(i)·0x9E3779B9)),   h = lowbias32

    Returns:
        (numel,) int64, values below 2³², for i = start, start + 1, ...
    """
    key = splitmix64((splitmix64(seed & 0xFFFFFFFFFFFFFFFF) + tensor_index) & 0xFFFFFFFFFFFFFFFF)
    i = torch.arange(start, start + numel, dtype=torch.int64, device=device)
    high = ((key >> 32) + (i >> 32) * 0x9E3779B9) & MASK32
    return _lowbias32(_lowbias32((i & MASK32) ^ (key & MASK32)) ^ high)


def round_stochastic(x: Tensor, dtype: torch.dtype, bits: Tensor) -> Tensor:
    """Round float32 to ``dtype`` up or down with probability in proportion to the distance.

    bfloat16 and normal float16: add random bits below the last kept one and cut. Subnormal float16:
    floor(|x|·2²⁴ + u), u of 13 bits. Infinities, NaN and wider types are rounded to nearest.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return x.to(dtype)
    cut = 16 if dtype == torch.bfloat16 else 13
    mask = (1 << cut) - 1
    noise = (bits & mask).reshape(x.shape)
    raw = x.contiguous().view(torch.int32).to(torch.int64) & MASK32
    kept = (raw + noise) & (MASK32 ^ mask)
    kept = torch.where(kept >= 1 << 31, kept - (1 << 32), kept).to(torch.int32)
    rounded = kept.view(torch.float32).to(dtype)
    if dtype == torch.float16:
        small = torch.floor(x.abs() * 2.0**24 + noise.to(torch.float32) * 2.0**-13) * 2.0**-24
        rounded = torch.where(x.abs() < 2.0**-14, torch.copysign(small, x).to(dtype), rounded)
    return torch.where(x.isfinite(), rounded, x.to(dtype))
