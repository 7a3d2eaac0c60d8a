"""What modules that compute with a delta share: rows and their deltas, and the product."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ttt_fast import ops
from ttt_fast.engines.factors import Inputs, Padding, Track
from ttt_fast.engines.products import reads_as_it_lies
from ttt_fast.engines.rows import Rows
from ttt_fast.rounding import compute_dtype


@dataclass
class Layout:
    """Whose rows of tokens a forward works on: consecutive ones belong to consecutive deltas.

    So which delta a token belongs to is known from its place in memory, whatever shape a model
    gives its hidden states: (N, T, D), or (N·T, D) as OPT's.

    Attributes:
        deltas: the deltas, a slice.
        n_rows: rows N of the batch, a multiple of their number.
        step: number of the step that is recorded; None in a forward that is not.
        n_tokens: M, tokens of each delta in a recorded forward, padding included.
        padding: where there is any.
    """

    deltas: slice
    n_rows: int
    step: int | None = None
    n_tokens: int = 0
    padding: Padding | None = None
    _cache: dict[Any, Any] = field(default_factory=dict, repr=False)

    @property
    def n(self) -> int:
        """Number of deltas."""
        return self.deltas.stop - self.deltas.start

    @property
    def recording(self) -> bool:
        """Whether this forward is a step's."""
        return self.step is not None

    def split(self, x: Tensor, name: str) -> Tensor:
        """Return x (..., width) as (n, tokens of each delta, width)."""
        tokens = x.numel() // x.shape[-1] if x.shape[-1] else 0
        whole = self.n * self.n_tokens if self.recording else self.n
        fits = self.recording or x.shape[0] % self.n == 0
        if self.n > 1 and not (fits and tokens % whole == 0 and tokens >= self.n_rows):
            raise ValueError(
                f"{name} was given an input of shape {tuple(x.shape)} in a batch of {self.n_rows}"
                f" rows for {self.n} deltas, so which row belongs to which delta cannot be told."
                " Adapt the prompts one by one, or use engine='dense'."
            )
        return x.reshape(self.n, -1, x.shape[-1]).contiguous()

    def padding_among(self, count: int) -> Padding | None:
        """The padding among ``count`` vectors of each delta, None where they are not one a token.

        Heads come before or after the tokens, as a model likes; their padding gets no gradient
        from attention anyway.
        """
        return self.padding if count == self.n_tokens else None

    def rho(self, track: Track, dtype: torch.dtype) -> Tensor | None:
        """Coefficient of W₀, (n,); None where it is 1 by definition."""
        if not track.decays:
            return None
        key = (id(track), "rho", dtype)
        if key not in self._cache:
            rho = track.coefficients.rho
            self._cache[key] = rho[self.deltas].to(dtype).contiguous()
        return self._cache[key]

    def beta(self, rows: Rows, track: Track, dtype: torch.dtype) -> Tensor:
        """β of every row of a buffer, (n, longest)."""
        key = (id(track), rows, dtype)
        if key not in self._cache:
            count = rows.longest(self.deltas)
            beta = track.coefficients.beta
            # One column more, of zeros, for what lies behind the rows of a shorter delta.
            columns = rows.columns(beta.device)[self.deltas, :count]
            columns = torch.where(columns < 0, beta.shape[1], columns)
            padded = F.pad(beta[self.deltas], (0, 1))
            self._cache[key] = padded.gather(1, columns).to(dtype)
        return self._cache[key]


class Desk:
    """What the taken-over modules of an engine share: the layout of the forward in progress.

    Attributes:
        layout: None while nothing is attached.
        anchor: an input of every recorded product, so that autograd comes by even where nothing in
            front of it needs a gradient.
        newest: the X that was recorded last; a module that is given the same tensor joins it.
        recomputing: a part of a recorded forward is computed once more; it is not recorded again.
        new_inputs: makes room for an X like the tensor it is given.
        wide: the compute type; coefficients are in it.
        delta_linear: the op of that name.
    """

    def __deepcopy__(self, memo: dict[int, Any]) -> Desk:
        raise RuntimeError(
            "a model cannot be copied while a factored adaptation is attached to it: the copy would"
            " compute with the deltas, too. Call adapted.detach() or restore() first, or"
            " adapted.merge(copy=True) for a copy that has the adapted weights."
        )

    def __init__(self, param: Tensor, backend: str, new_inputs: Callable[[Tensor], Inputs]) -> None:
        device = param.device
        self.wide = compute_dtype(param.dtype)
        if param.dtype == torch.float16 and device.type == "cpu":
            backend = "torch"  # C++ has no float16
        self.delta_linear = ops.implementation("delta_linear", device.type, backend)
        if device.type == "cpu" and param.dtype in (torch.float32, torch.bfloat16):
            self.delta_linear = _with_torchs_products(self.delta_linear)
        self.layout: Layout | None = None
        self.anchor = torch.zeros((), device=device, requires_grad=True)
        self.newest: Inputs | None = None
        self.recomputing = False
        self.new_inputs = new_inputs

    def is_differentiated(self, x: Tensor) -> bool:
        """Whether someone takes a gradient through the adapted model, which needs torch's own."""
        return not self.layout.recording and x.requires_grad and torch.is_grad_enabled()


def _with_torchs_products(delta_linear: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """delta_linear whose products with W are torch's where those are faster (products.most_rows).

    Both add the delta before they round, so a delta below the rounding of x Wᵀ is not lost.
    """
    onednn = getattr(torch.ops.mkldnn, "_linear_pointwise", None)

    def run(
        x: Tensor,
        weight: Tensor,
        a: Tensor,
        d: Tensor,
        beta: Tensor,
        rho: Tensor | None,
        append: Tensor | None,
    ) -> Tensor:
        tokens, narrow = x.shape[0] * x.shape[1], x.dtype == torch.bfloat16
        few = reads_as_it_lies(x, weight, tokens) or (narrow and tokens < _MANY_TOKENS)
        if rho is not None or few or (narrow and onednn is None):
            return delta_linear(x, weight, a, d, beta, rho, append)
        rows = x.view(tokens, -1)
        if beta.shape[1] == 0:
            if append is not None:
                append.copy_(x)
            return F.linear(rows, weight).view(*x.shape[:2], -1)
        delta = delta_linear(x, None, a, d, beta, None, append)
        if narrow:
            y = onednn.binary(rows, delta.view(tokens, -1), weight, None, "add")
        else:
            y = delta.view(tokens, -1).addmm_(rows, weight.t())
        return y.view(delta.shape)

    return run


# Below this many tokens reading the weight takes longer than the arithmetic, whatever its type.
# With tiles (products.most_rows) our own product has bfloat16 arithmetic, too.
_MANY_TOKENS = 48
