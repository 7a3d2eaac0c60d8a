"""What a step costs in either engine: time and memory, from numbers alone.

A :class:`Workload` says what is done, a :class:`Machine` how fast. With T tokens a delta at a step,
D deltas, s(M) the time of a product of M rows with one weight, and for step t of K:

    dense     D · (W·s(T) + dX·s(T) + dW·w(T) + norm + update + 4 copies of the weights / K)
    factored  W·s(D·T) + dX·s(D·T) + D · (Gram 2T²·Σ(in + out) + delta products 4T·tT·Σ(in + out))

so many short prompts favour the factored engine, which reads the weights once for all deltas, and a
high rank t·T favours the dense one.

Memory is of tensors that live at the same time at the end of a forward, when most do; the bytes
that a step saves are stated once, in :func:`saved_bytes`. What an allocator holds
beyond that is not among them: glibc keeps freed memory of some sizes, a tenth to a half more,
unless ``MALLOC_MMAP_THRESHOLD_=65536`` is in the environment.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ttt_fast.engines.head_kinds import most_tokens
from ttt_fast.engines.machine import Machine
from ttt_fast.engines.products import Products

# Operations of attention for each pair of positions and channel: 2 products forward, 5 backward
# (the scores are computed again), 2 operations each.
_ATTENTION_FLOPS = 14
# To frozen keys and values: 2 products forward, 3 backward.
_FROZEN_FLOPS = 10


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
        saved: numbers that a step saves for each token where the gradient crosses the layer.
        statistics: numbers of 4 bytes, likewise.
        pairs: numbers for each pair of tokens, likewise: attention that is written out.
        wide_pairs: numbers in float32, likewise, where the model's are narrower.
        window: tokens from which on attention has a mask; 0 where only padding asks for one.
        mask_pairs: numbers of the mask for each pair of tokens.
        masked: numbers for each token on top of ``saved`` where there is a mask, or below it.
        normalised: numbers that the factored engine keeps of a norm that trains, x / rms or the
            like, in float32 at least; if x is narrower, a wide copy of it, too.
        keeps_input: its input is among what is saved, whether it trains or not.
        inside: of a decoder layer.
        head: it gives the logits.
        count: how many there are.
    """

    out: int
    in_: int = 1
    kind: str = "linear"
    adapted_out: int = 0
    differentiated: bool = True
    shares_input: bool = False
    tied: bool = False
    saved: int = 0
    statistics: int = 0
    pairs: int = 0
    wide_pairs: int = 0
    window: int = 0
    mask_pairs: int = 0
    masked: int = 0
    normalised: int = 0
    keeps_input: bool = False
    inside: bool = False
    head: bool = False
    count: int = 1


@dataclass(frozen=True)
class Workload:
    """What is to be adapted, in numbers.

    Attributes:
        layers: every module with a weight, frozen ones too: forward and backward cross them.
        tokens: T, tokens of a delta at a step, the longest where they differ.
        n_rows: prompts that a delta's tokens are of.
        steps: K.
        deltas: D, adapted side by side where the engine can.
        in_turn: the dense engine restores each delta before the next one, so it keeps no copies.
        dtype: of the weights.
        optimizer: "sgd" or "adamw".
        momentum: SGD keeps a momentum buffer.
        accumulate_delta: the dense engine keeps a float32 Δ.
        rounding: as in TTTConfig.
        vocabulary: width of the logits.
        loss_in_head: the head computes the losses, a few tokens at a time, and gives no logits.
        capped: behind the head a tanh caps the logits, and keeps what it gives.
        padded_from: deltas in a forward from which on it has padding; 0 where it never has.
        n_labels: tokens of a delta that have a label, the most where they differ; None for all.
        attention_width: heads · head_dim, summed over the layers that attend.
        hidden_width: of the hidden states between decoder layers.
        context: tokens of a delta's prompts whose keys and values are frozen; 0 if none are.
        kv_width: numbers of keys and values of a token, summed over the layers.
        joined: each layer gets frozen ones in a copy, together with those of the span.
        blocks: decoder layers that the gradient enters.
        checkpointing: those are computed again in the backward pass; "auto" where they have to.
        obstacle: why the factored engine cannot do this, None if it can.
        available_bytes: memory above the model, None for no limit.
    """

    layers: tuple[Layer, ...]
    tokens: int
    steps: int
    deltas: int = 1
    in_turn: bool = False
    dtype: str = "float32"
    optimizer: str = "sgd"
    momentum: bool = True
    accumulate_delta: bool = False
    rounding: str = "nearest"
    n_rows: int = 1
    vocabulary: int = 0
    loss_in_head: bool = False
    capped: bool = False
    padded_from: int = 0
    n_labels: int | None = None
    attention_width: int = 0
    hidden_width: int = 0
    context: int = 0
    kv_width: int = 0
    joined: bool = False
    blocks: int = 0
    checkpointing: bool | str = False
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
    def gives_logits(self) -> bool:
        """Whether the logits of all tokens are there at the same time, for a loss behind them."""
        return not self.loss_in_head or self.rounding == "torch"

    @property
    def predicted(self) -> int:
        """Tokens of a delta that have logits."""
        return self.tokens if self.n_labels is None or self.gives_logits else self.n_labels

    @property
    def forward_weights(self) -> float:
        """Weights that a forward multiplies by, the mean over the steps."""
        return sum(self._calls(x) * x.out * x.in_ for x in self._linears)

    @property
    def backward_weights(self) -> int:
        """Weights that the gradient crosses on its way down."""
        return sum(x.count * x.out * x.in_ for x in self._linears if x.differentiated)

    @property
    def recomputed_weights(self) -> int:
        """Weights that a forward multiplies by once more."""
        if self.checkpointing is not True:
            return 0
        return sum(x.count * x.out * x.in_ for x in self._linears if x.inside and x.differentiated)

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
    def head_factor_width(self) -> int:
        """Those of them that only tokens with logits have."""
        heads = (x for x in self._adapted_linears if x.head)
        return sum(x.count * (x.adapted_out + x.in_) for x in heads)

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
        (work.forward_weights + work.backward_weights + work.recomputed_weights)
        * machine.product(tokens)
        + 1e3 * machine.module_us * work.modules
        + machine.element_ns * tokens * work.width
        + machine.logit_ns * tokens * work.vocabulary
        + _ATTENTION_FLOPS * tokens * work.tokens * work.attention_width * machine.flop_ns
        # A span is drawn anywhere: half of the context is before it, in the mean.
        + _FROZEN_FLOPS * tokens * work.context / 2 * work.attention_width * machine.flop_ns
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


def saved_bytes(work: Workload, engine: str, rows: int = 1) -> int:
    """Bytes that autograd saves in a forward of ``rows`` times ``work.tokens`` tokens.

        Σ over what the gradient crosses      a norm: its input and 1 / rms
        for each token                        attention: query, key, value, result, log-sum-exp,
                                              and its mask, where it has one
                                              a gated MLP: gate and up
                                              the head with the loss: the gradient of its input
        + Σ over the linears that train       the input, in the dense engine, where neither a
                                              sibling nor attention has it
        + the head, if it trains              in the dense engine its input and the gradient of
                                              the logits, of tokens with a label, and no other

    and nothing for frozen linears, nor below the lowest module that trains. In the factored engine
    inputs and the logits' gradient are among the factors. Where the model gives its logits, the
    loss saves their gradient, which is not among these. What other modules keep, and these with
    the model's own code, is in :mod:`ttt_fast.engines.shapes`.

    Args:
        work: what is to be done.
        engine: "dense" or "factored".
        rows: how many times ``work.tokens`` tokens go through the model together.
    """
    return rows * sum(_saved_bytes(work, layer, engine, rows) for layer in work.layers)


def activation_bytes(work: Workload, engine: str, rows: int = 1) -> int:
    """Bytes of what is saved that are there at the peak: all.

    With checkpointing, the inputs of the layers and what is saved outside of them; and what one of
    them saves, or the dense engine's factors of gradients that are not formed, which it keeps until
    the update. By then the logits are gone, so that only what exceeds them counts.

    Args:
        work: what is to be done.
        engine: "dense" or "factored".
        rows: how many times ``work.tokens`` tokens go through the model together.
    """
    saved = saved_bytes(work, engine, rows)
    if work.checkpointing is not True or not work.blocks:
        return saved
    tokens = rows * work.tokens
    layers = [layer for layer in work.layers if layer.inside]
    inside = rows * sum(_saved_bytes(work, layer, engine, rows) for layer in layers)
    whole = tokens * work.blocks * work.hidden_width * work.itemsize + saved - inside
    kept = 0
    if engine == "dense":
        linears = [x for x in layers if x.kind == "linear" and _stays_factors(work, x)]
        widths = (x.count * (x.adapted_out + (0 if x.shares_input else x.in_)) for x in linears)
        kept = tokens * work.itemsize * sum(widths)
    later = max(kept, -(-inside // work.blocks))
    gone = tokens * work.vocabulary * work.itemsize
    if not work.gives_logits:
        gone = _logit_bytes(work, rows, engine)
    return whole + max(0, later - gone)


def _saved_bytes(work: Workload, layer: Layer, engine: str, rows: int) -> int:
    """Of the layers of one shape, a share of 1 / ``rows``: for ``work.tokens`` tokens."""
    numbers = statistics = pairs = wide_pairs = wide = labelled = 0
    narrow = work.itemsize < work.wide_itemsize
    if layer.differentiated:
        numbers, statistics, pairs = layer.saved, layer.statistics, layer.pairs
        wide_pairs = layer.wide_pairs if narrow else 0
        if _is_masked(work, layer, rows):
            numbers, pairs = numbers + layer.masked, pairs + layer.mask_pairs
    if engine == "factored" and layer.adapted_out and layer.normalised:
        wide = layer.normalised * (2 if narrow else 1)
        numbers = 0 if narrow else numbers
    trains_whole = engine == "dense" and layer.kind == "linear" and layer.adapted_out
    if trains_whole and layer.head and not work.gives_logits:
        labelled = layer.in_ + layer.out
    elif trains_whole:
        kept = layer.shares_input or (layer.keeps_input and layer.differentiated)
        numbers += 0 if kept else layer.in_
    elif layer.head and not work.gives_logits:
        numbers += layer.in_ * layer.differentiated
    seen = -(-(work.tokens + work.context) // work.n_rows)
    return layer.count * (
        work.itemsize * (work.predicted * labelled + work.tokens * (numbers + pairs * seen))
        + work.wide_itemsize * work.tokens * (wide + wide_pairs * seen)
        + 4 * work.tokens * statistics
    )


def _is_masked(work: Workload, layer: Layer, rows: int) -> bool:
    """Whether an attention is given a mask; spans before frozen keys make do without."""
    padded = 0 < work.padded_from <= rows
    full = 0 < layer.window * work.n_rows <= work.tokens
    return not work.context and (padded or full)


def dense_bytes(work: Workload) -> dict[str, int]:
    """Memory above the model, by use."""
    selected = work.adapted_parameters * work.itemsize
    wide = work.adapted_parameters * work.wide_itemsize
    whole = [x for x in work.layers if not (x.tied or _stays_factors(work, x))]
    gradients = work.itemsize * sum(x.count * x.adapted_out * x.in_ for x in whole)
    held = 1 if work.in_turn else work.deltas
    state = selected if work.momentum else 0
    if work.optimizer == "adamw":
        state = 2 * (selected if work.rounding == "torch" else wide)
    return {
        "snapshot": selected,
        "gradients": gradients,
        "optimizer": held * state,
        "delta": held * wide if work.accumulate_delta else 0,
        # The weights hold one delta; the others wait in copies.
        "weights": held * selected if held > 1 else 0,
        **_frozen_bytes(work, 1),
        **_forward_bytes(work, 1, "dense"),
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
    head = work.head_factor_width
    numbers = work.tokens * (work.factor_width - head) + work.predicted * head
    vectors = 4 * work.vector_parameters
    return {
        "factors": work.deltas * work.steps * (numbers * work.itemsize + vectors),
        **_frozen_bytes(work, at_once or work.deltas),
        **_forward_bytes(work, at_once or work.deltas, "factored"),
    }


def _frozen_bytes(work: Workload, rows: int) -> dict[str, int]:
    """Keys and values of all deltas' contexts; and what attention copies of ``rows`` of them."""
    if not work.context:
        return {}
    # Copies for each query head are kept for the backward pass.
    copies = rows * 2 * work.attention_width if work.joined else 0
    return {"keys_values": work.context * work.itemsize * (work.deltas * work.kv_width + copies)}


def _forward_bytes(work: Workload, rows: int, engine: str) -> dict[str, int]:
    """What ``rows`` times ``work.tokens`` tokens keep until their backward pass."""
    return {
        "activations": activation_bytes(work, engine, rows),
        "logits": _logit_bytes(work, rows, engine),
    }


def _logit_bytes(work: Workload, rows: int, engine: str) -> int:
    """Of the logits that are there at the same time, those not counted that the head keeps."""
    tokens, token_bytes = rows * work.predicted, work.vocabulary * work.itemsize
    if not work.gives_logits:
        trains = any(layer.head and layer.adapted_out for layer in work.layers)
        if engine == "dense" and trains:
            return 0  # they become a factor of the gradient, and that is saved
        return (tokens if trains else min(tokens, most_tokens(token_bytes))) * token_bytes
    # The logits, and their gradient in a copy; stock torch's loss has a log-softmax in fp32 at
    # least, and a cast of 16-bit logits.
    numbers = 2 * work.itemsize
    if work.rounding == "torch":
        numbers = work.itemsize + work.wide_itemsize * (1 if work.itemsize >= 4 else 2)
    if work.capped:
        numbers += work.itemsize
    return tokens * work.vocabulary * numbers


def deltas_at_once(work: Workload) -> int:
    """Deltas that the factored engine can train side by side; 0 if not even one fits.

    The factors of all of them are kept whatever the number; activations and logits only of those
    in a batch.
    """
    if work.available_bytes is None:
        return work.deltas

    def fits(n: int) -> bool:
        return sum(factored_bytes(work, n).values()) <= work.available_bytes

    return largest(work.deltas, fits)


def largest(limit: int, fits: Callable[[int], bool]) -> int:
    """The largest number up to a limit that fits, 0 if not even 1 does; so do all smaller ones."""
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
