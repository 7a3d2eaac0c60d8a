"""How fast a machine is: the speeds from which the cost of a step is predicted."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Machine:
    """Speeds of one machine in one dtype; measured by :mod:`ttt_fast.calibration`.

    Times of products are for cold weights, a weight being one number of a matrix. Between measured
    points they follow a power law; beyond the last they grow with the rows.

    Attributes:
        dtype: of the weights, "float32" or "bfloat16".
        source: where the numbers come from.
        copy_gb_s: bytes read and written by a copy.
        update_gb_s: bytes read and written by the gradient norm and the fused SGD update.
        rows: numbers of rows M at which products were measured, ascending.
        product_ns: x Wᵀ and dy W with M rows, their mean, for each weight.
        weight_gradient_ns: dyᵀ x over M tokens, written to memory, for each weight.
        gram_ns: x xᵀ of M rows in fp32, for each number of x.
        ranks: ranks at which delta products were measured, ascending.
        delta_slowdown: their time over that of a plain product of the same size.
        module_us: a linear module's share of what a forward and backward does besides products.
        element_ns: the same for each token and each in + out of a linear.
        logit_ns: the loss, forward and backward, for each token and entry of the vocabulary.
        dense_module_us: what the dense engine adds at each adapted module and step.
        factored_module_us: what the factored engine adds.

    Raises:
        ValueError: a number is not positive, or the times of a table are not those of a machine: a
            product with more rows takes longer, but not for each row.
    """

    dtype: str
    source: str
    copy_gb_s: float
    update_gb_s: float
    rows: tuple[float, ...]
    product_ns: tuple[float, ...]
    weight_gradient_ns: tuple[float, ...]
    gram_ns: tuple[float, ...]
    ranks: tuple[float, ...]
    delta_slowdown: tuple[float, ...]
    module_us: float
    element_ns: float
    logit_ns: float
    dense_module_us: float
    factored_module_us: float

    def __post_init__(self) -> None:
        for f in fields(self):
            if f.name in ("dtype", "source"):
                continue
            value = getattr(self, f.name)
            numbers = value if isinstance(value, tuple) else (value,)
            if not all(isinstance(x, int | float) and 0 < x < math.inf for x in numbers):
                raise ValueError(f"Machine: {f.name}={value!r}; speeds are finite and above 0.")
        for name in ("product_ns", "weight_gradient_ns", "gram_ns"):
            table = getattr(self, name)
            if not is_smooth(self.rows, table):
                raise ValueError(
                    f"Machine: {name}={table} at rows={self.rows}; times have to rise with the"
                    " rows, no faster than they do. Pass measured ones through smooth()."
                )
        rising = [r * s for r, s in zip(self.ranks, self.delta_slowdown, strict=False)]
        if len(self.ranks) != len(self.delta_slowdown) or rising != sorted(rising):
            raise ValueError(
                f"Machine: delta_slowdown={self.delta_slowdown} at ranks={self.ranks}; there must"
                " be one for each, and a higher rank cannot take less time."
            )

    @property
    def flop_ns(self) -> float:
        """Nanoseconds of an operation of the longest product that was measured."""
        return self.product_ns[-1] / (2 * self.rows[-1])

    def product(self, rows: float) -> float:
        """Nanoseconds of one weight in a product with ``rows`` rows."""
        return _interpolate(self.rows, self.product_ns, rows)

    def weight_gradient(self, tokens: float) -> float:
        """Nanoseconds of one weight's gradient over ``tokens`` tokens."""
        return _interpolate(self.rows, self.weight_gradient_ns, tokens)

    def gram(self, tokens: float) -> float:
        """Nanoseconds of one of the numbers of x (tokens, in) in x xᵀ."""
        return _interpolate(self.rows, self.gram_ns, tokens)

    def delta_product(self, tokens: float, rank: float) -> float:
        """Nanoseconds of one number of the factors (rank, in) in a product with ``tokens`` rows."""
        clamped = min(max(rank, self.ranks[0]), self.ranks[-1])
        return self.product(tokens) * _interpolate(self.ranks, self.delta_slowdown, clamped)


def smooth(rows: Sequence[float], times: Sequence[float]) -> tuple[float, ...]:
    """Make measured times rise with the rows and no faster: what noise and short calls broke.

    The last one is kept, being of the longest calls.
    """
    result = list(times)
    for i in reversed(range(len(result) - 1)):
        least = result[i + 1] * rows[i] / rows[i + 1]
        result[i] = min(max(result[i], least), result[i + 1])
    return tuple(result)


def is_smooth(rows: Sequence[float], times: Sequence[float]) -> bool:
    """Whether ``smooth`` would leave the times as they are, to one part in a million."""
    return (
        len(rows) == len(times) > 0
        and list(rows) == sorted(set(rows))
        and all(
            math.isclose(a, b, rel_tol=1e-6)
            for a, b in zip(times, smooth(rows, times), strict=True)
        )
    )


def _interpolate(points: Sequence[float], values: Sequence[float], at: float) -> float:
    """A power law between points, constant before the first, linear in ``at`` after the last."""
    if at <= points[0]:
        return values[0]
    if at >= points[-1]:
        return values[-1] * at / points[-1]
    i = bisect_right(points, at)
    share = math.log(at / points[i - 1]) / math.log(points[i] / points[i - 1])
    return values[i - 1] * (values[i] / values[i - 1]) ** share
