"""The one table of what "as good as torch" means, and the comparison that uses it."""

from __future__ import annotations

import torch
from torch import Tensor

# How far an op may be from the fp64 oracle: factor on the worst distance of torch in the same
# dtype, plus relative to the magnitude of the oracle, plus absolute.
_EXTRA: dict[torch.dtype, tuple[float, float, float]] = {
    torch.float64: (1.0, 1e-12, 1e-14),
    torch.float32: (1.0, 4 * 2.0**-23, 1e-9),
    torch.bfloat16: (1.0, 2 * 2.0**-8, 1e-6),
    torch.float16: (1.0, 2 * 2.0**-10, 2.0**-24),
}


def assert_no_worse(actual: Tensor, same_dtype: Tensor, oracle: Tensor, what: str = "") -> None:
    """Fail unless `actual` is as near to the oracle as torch in the same dtype, plus a few eps.

    Args:
        actual: result to judge.
        same_dtype: what torch gives in `actual`'s dtype.
        oracle: the float64 result.
        what: name in the message.
    """
    assert actual.dtype == same_dtype.dtype and oracle.dtype == torch.float64, what
    assert actual.shape == same_dtype.shape == oracle.shape, what
    if oracle.numel() == 0:
        return
    factor, relative, absolute = _EXTRA[actual.dtype]
    distance = (actual.detach().double() - oracle).abs()
    theirs = (same_dtype.detach().double() - oracle).abs().max()
    excess = distance - (factor * theirs + relative * oracle.abs() + absolute)
    # A NaN must fail: it compares false with everything.
    if not bool((excess <= 0).all()):
        worst = int(excess.nan_to_num(nan=torch.inf).argmax())
        raise AssertionError(
            f"{what}: element {worst} of {tuple(actual.shape)} {actual.dtype} is "
            f"{actual.flatten()[worst].item()!r}, the oracle {oracle.flatten()[worst].item()!r} "
            f"(distance {distance.flatten()[worst].item():.3g}, torch's worst {theirs.item():.3g})"
        )
