"""What a step costs in either engine: time and memory, from numbers alone.

A :class:`Workload` says what is done, a :class:`Machine` how fast. With T tokens a delta at a step,
D deltas, s(M) the time of a product of M rows with one weight, and for step t of K:

    dense     D · (W·s(T) + dX·s(T) + dW·w(T) + norm + update + 4 copies of the weights / K)
    factored  W·s(D·T) + dX·s(D·T) + D · (Gram 2T²·Σ(in + out) + delta products 4T·tT·Σ(in + out))

so many short prompts favour the factored engine, which reads the weights once for all deltas, and a
high rank t·T favours the dense one.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch

from ttt_fast.engines.products import Products

# Operations of attention for each pair of positions and channel: 2 products forward, 5 backward
# (the scores are computed again), 2 operations each.
_ATTENTION_FLOPS = 14
# fp32 logits, their gradient in a copy, and the log-softmax of stock torch's loss. Whether the
# loss is our own, without the last, is not asked: with it, the factored engine's peak on
# SmolLM2-135M in fp32 (64 tokens, 2 steps) is stated as 284 MB and was 302 MB.
_LOGITS_BYTES = 12


# ---------------------------------------------------------------------------- the machine


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


# ---------------------------------------------------------------------------- the work


@dataclass(frozen=True)
class Layer:
    """Modules of one shape.

    Attributes:
        out: output width; of a vector (norm, bias) its length.
        in_: input width; of an embedding the number of its rows.
        kind: "linear" (a Conv1D too), "embedding" (out is the hidden width), or "vector".
        adapted_out: how many of the outputs train: 0 for frozen, all, or those of a slice.
        differentiated: whether the backward pass crosses it (dx = dy W).
        shares_input: a sibling before it has recorded the same input.
        tied: its weight is another layer's, which counts its bytes.
        count: how many there are.
    """

    out: int
    in_: int = 1
    kind: str = "linear"
    adapted_out: int = 0
    differentiated: bool = True
    shares_input: bool = False
    tied: bool = False
    count: int = 1


@dataclass(frozen=True)
class Workload:
    """What is to be adapted, in numbers.

    Attributes:
        layers: every module with a weight, frozen ones too: forward and backward cross them.
        tokens: T, tokens of a delta at a step, the longest where they differ.
        steps: K.
        deltas: D, adapted side by side where the engine can.
        dtype: of the weights.
        optimizer: "sgd" or "adamw".
        momentum: SGD keeps a momentum buffer.
        accumulate_delta: the dense engine keeps a float32 Δ.
        rounding: as in TTTConfig.
        vocabulary: width of the logits.
        attention_width: heads · head_dim, summed over the layers that attend.
        obstacle: why the factored engine cannot do this, None if it can.
        available_bytes: memory above the model, None for no limit.
    """

    layers: tuple[Layer, ...]
    tokens: int
    steps: int
    deltas: int = 1
    dtype: str = "float32"
    optimizer: str = "sgd"
    momentum: bool = True
    accumulate_delta: bool = False
    rounding: str = "nearest"
    vocabulary: int = 0
    attention_width: int = 0
    obstacle: str | None = None
    available_bytes: int | None = None

    def __post_init__(self) -> None:
        if self.tokens < 1 or self.steps < 0 or self.deltas < 1:
            raise ValueError(
                f"Workload: tokens={self.tokens}, steps={self.steps}, deltas={self.deltas}; there"
                " must be at least one token, no negative number of steps, and one delta."
            )

    @property
    def itemsize(self) -> int:
        """Bytes of a weight."""
        return getattr(torch, self.dtype).itemsize

    @property
    def wide_itemsize(self) -> int:
        """Bytes of a number that is kept in fp32 at least."""
        return max(4, self.itemsize)

    @property
    def forward_weights(self) -> float:
        """Weights that a forward multiplies by, the mean over the steps."""
        return sum(self._calls(x) * x.out * x.in_ for x in self._linears)

    @property
    def backward_weights(self) -> int:
        """Weights that the gradient crosses on its way down."""
        return sum(x.count * x.out * x.in_ for x in self._linears if x.differentiated)

    @property
    def adapted_parameters(self) -> int:
        """Numbers that train, those of a tied weight once."""
        return sum(x.count * x.adapted_out * x.in_ for x in self.layers if not x.tied)

    @property
    def gradient_weights(self) -> int:
        """Weights whose gradient is a product, those of a tied head too."""
        return sum(x.count * x.adapted_out * x.in_ for x in self._adapted_linears)

    @property
    def vector_parameters(self) -> int:
        """Numbers of norms and biases that train."""
        return sum(x.count * x.adapted_out for x in self.layers if x.kind == "vector")

    @property
    def width(self) -> float:
        """Σ in + out of the linears of a step, which elementwise work grows with."""
        return sum(self._calls(x) * (x.out + x.in_) for x in self._linears)

    @property
    def saved_width(self) -> int:
        """Σ in + out of the linears that the gradient crosses."""
        return sum(x.count * (x.out + x.in_) for x in self._linears if x.differentiated)

    @property
    def delta_width(self) -> int:
        """Σ in + out of the adapted linears: what delta products and Grams grow with."""
        return sum(x.count * (x.adapted_out + x.in_) for x in self._adapted_linears)

    @property
    def factor_width(self) -> int:
        """Numbers recorded for each token: inputs that siblings share once, embeddings' outputs."""
        inputs = sum(x.count * x.in_ for x in self._adapted_linears if not x.shares_input)
        outputs = sum(x.count * x.adapted_out for x in self.layers if x.kind != "vector")
        return inputs + outputs

    @property
    def modules(self) -> float:
        """Calls of linear modules in a step."""
        return sum(self._calls(x) for x in self._linears)

    @property
    def adapted_modules(self) -> int:
        """Calls of modules of any kind that train."""
        return sum(x.count for x in self.layers if x.adapted_out)

    def _calls(self, layer: Layer) -> float:
        """How often a layer runs in a step, in the mean: what nothing adapted reaches, once."""
        reached = layer.differentiated or layer.adapted_out
        return layer.count * (1 if reached else 1 / max(1, self.steps))

    @property
    def _linears(self) -> list[Layer]:
        return [x for x in self.layers if x.kind == "linear"]

    @property
    def _adapted_linears(self) -> list[Layer]:
        return [x for x in self._linears if x.adapted_out]


# ---------------------------------------------------------------------------- time


def frozen_ms(work: Workload, machine: Machine, rows: int = 1) -> float:
    """Milliseconds of forward, loss and input gradients, as if nothing trained.

    Args:
        work: what is to be done.
        machine: what it is done on.
        rows: how many times ``work.tokens`` tokens go through the model together.
    """
    tokens = rows * work.tokens
    return 1e-6 * (
        (work.forward_weights + work.backward_weights) * machine.product(tokens)
        + 1e3 * machine.module_us * work.modules
        + machine.element_ns * tokens * work.width
        + machine.logit_ns * tokens * work.vocabulary
        + _ATTENTION_FLOPS * tokens * work.tokens * work.attention_width * machine.flop_ns
    )


def dense_ms(work: Workload, machine: Machine) -> float:
    """Milliseconds of one step of one delta in the dense engine; the deltas take turns.

    A short prompt's gradient, which stays factors (:mod:`ttt_fast.engines.products`), saves memory
    but takes as long: what it saves in traffic the Gram matrices and the smaller calls cost.
    """
    size = work.itemsize
    # The weight is read and written, and so is what the optimizer keeps.
    moved = 2 * size + 2 * (size if work.momentum and work.optimizer == "sgd" else 0)
    if work.optimizer == "adamw":
        moved += 4 * (size if work.rounding == "torch" else work.wide_itemsize)
    if work.accumulate_delta:
        moved += 2 * work.wide_itemsize + size
    # The gradient is written as it is formed; the norm and the update read it.
    gradient_ns = machine.weight_gradient(work.tokens) + 2 * size / machine.update_gb_s
    # Taken and given back, a read and a write each.
    snapshot = 4 * size * work.adapted_parameters / max(1, work.steps)
    return frozen_ms(work, machine) + 1e-6 * (
        gradient_ns * work.gradient_weights
        + moved * work.adapted_parameters / machine.update_gb_s
        + snapshot / machine.copy_gb_s
        + 1e3 * machine.dense_module_us * work.adapted_modules
    )


def factored_ms(work: Workload, machine: Machine, at_once: int | None = None) -> float:
    """Milliseconds of one step of one delta in the factored engine, the mean over the steps.

    Args:
        work: what is to be done.
        machine: what it is done on.
        at_once: how many deltas a batch holds, by default all.
    """
    T, D = work.tokens, at_once or work.deltas
    own = 1e-3 * machine.factored_module_us * work.adapted_modules
    record = 2 * T * work.factor_width * work.itemsize / machine.copy_gb_s
    gram = T * work.delta_width * machine.gram(T)
    # Every number of the factors takes part in one product of the forward and one of the backward.
    ranks = [t * T for t in range(1, work.steps)]
    deltas = 2 * work.delta_width * sum(r * machine.delta_product(T, r) for r in ranks)
    return (frozen_ms(work, machine, D) + own) / D + 1e-6 * (
        record + gram + deltas / max(1, work.steps)
    )


# ---------------------------------------------------------------------------- memory


def dense_bytes(work: Workload) -> dict[str, int]:
    """Memory above the model, by use."""
    selected = work.adapted_parameters * work.itemsize
    wide = work.adapted_parameters * work.wide_itemsize
    whole = [x for x in work.layers if not (x.tied or _stays_factors(work, x))]
    gradients = work.itemsize * sum(x.count * x.adapted_out * x.in_ for x in whole)
    state = selected if work.momentum else 0
    if work.optimizer == "adamw":
        state = 2 * (selected if work.rounding == "torch" else wide)
    return {
        "snapshot": selected,
        "gradients": gradients,
        "optimizer": work.deltas * state,
        "delta": work.deltas * wide if work.accumulate_delta else 0,
        # The weights hold one delta; the others wait in copies.
        "weights": work.deltas * selected if work.deltas > 1 else 0,
        **_forward_bytes(work, 1),
    }


def _stays_factors(work: Workload, layer: Layer) -> bool:
    """Whether the dense engine never forms a layer's gradient whole."""
    if work.rounding == "torch" or not layer.adapted_out or layer.kind == "vector":
        return False
    if layer.kind == "embedding":
        tied = any(x.tied for x in work.layers)
        products = Products(layer.in_, layer.adapted_out)
        return products.pays(pair_rows=tied * work.tokens, lookup_rows=work.tokens)
    products = Products(layer.adapted_out, layer.in_)
    return products.pays(pair_rows=work.tokens, lookup_rows=layer.tied * work.tokens)


def factored_bytes(work: Workload, at_once: int | None = None) -> dict[str, int]:
    """Memory above the model, by use; ``at_once`` deltas in a forward, by default all."""
    per_token = work.factor_width * work.itemsize
    vectors = 4 * work.vector_parameters
    return {
        "factors": work.deltas * work.steps * (work.tokens * per_token + vectors),
        **_forward_bytes(work, at_once or work.deltas),
    }


def _forward_bytes(work: Workload, rows: int) -> dict[str, int]:
    """What ``rows`` times ``work.tokens`` tokens keep until their backward pass."""
    tokens = rows * work.tokens
    return {
        # Autograd keeps about as many numbers a token as the linears have inputs and outputs;
        # SmolLM2-135M: 1.01 times as many, the loss not counted.
        "activations": tokens * work.saved_width * work.itemsize,
        "logits": tokens * work.vocabulary * _LOGITS_BYTES,
    }


def deltas_at_once(work: Workload) -> int:
    """Deltas that the factored engine can train side by side; 0 if not even one fits.

    The factors of all of them are kept whatever the number; activations and logits only of those
    in a batch.
    """
    if work.available_bytes is None:
        return work.deltas
    kept = factored_bytes(work, 1)["factors"]
    each = sum(_forward_bytes(work, 1).values())
    if each == 0:
        return work.deltas if kept <= work.available_bytes else 0
    return max(0, min(work.deltas, (work.available_bytes - kept) // each))
