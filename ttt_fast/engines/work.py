"""What is to be adapted, in numbers: what the cost of a step is predicted from."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


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
        held_bytes: of buffers that the factored engine has from before and fills anew: not among
            what is available, and there for it all the same.
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
    held_bytes: int = 0

    def __post_init__(self) -> None:
        if self.tokens < 1 or self.steps < 0 or self.deltas < 1:
            raise ValueError(
                f"Workload: tokens={self.tokens}, steps={self.steps}, deltas={self.deltas}; there"
                " must be at least one token, no negative number of steps, and one delta."
            )

    def limit(self, engine: str) -> float:
        """Bytes above the model that an engine can have."""
        if self.available_bytes is None:
            return math.inf
        return self.available_bytes + (self.held_bytes if engine == "factored" else 0)

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
