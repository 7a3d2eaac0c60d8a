"""Pieces of a model's own modules that one op computes: norms and gated units of known classes.

The user's modules stay in the model; while an engine holds it, the ``forward`` of those listed here
is one of the functions below, which do what the model's own code does, rounding included. A module
of any other class, or one that somebody changed, is left alone; so is every one where there is
nothing faster than torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ttt_fast import ops, reference
from ttt_fast.reference import compute_dtype

# Classes of transformers: y = w ∘ round(x / rms), round(w ∘ x / rms) and round((1 + w) ∘ x / rms),
# in float32 whatever the dtype of x.
_ROUND_FIRST = frozenset({
    "DeepseekV2RMSNorm", "DeepseekV3RMSNorm", "Glm4RMSNorm", "GlmRMSNorm", "GraniteRMSNorm",
    "LlamaRMSNorm", "MistralRMSNorm", "MixtralRMSNorm", "Phi3RMSNorm", "Qwen2RMSNorm",
    "Qwen3RMSNorm", "SmolLM3RMSNorm",
})  # fmt: skip
_ROUND_LAST = frozenset({"Olmo2RMSNorm", "Olmo3RMSNorm"})
_SHIFTED = frozenset({"Gemma2RMSNorm", "Gemma3RMSNorm", "GemmaRMSNorm"})
RMS_NORMS = _ROUND_FIRST | _ROUND_LAST | _SHIFTED
# down_proj(act_fn(gate_proj(x)) * up_proj(x))
GATED_MLPS = frozenset({
    "Gemma2MLP", "Gemma3MLP", "GemmaMLP", "GraniteMLP", "LlamaMLP", "MistralMLP", "Olmo2MLP",
    "Qwen2MLP", "Qwen3MLP", "SmolLM3MLP",
})  # fmt: skip
_ACTIVATIONS = {"SiLU": "silu", "SiLUActivation": "silu", "GELUTanh": "gelu_tanh"}


class RmsNorm(NamedTuple):
    """How a norm of a known class computes, and the ops that do."""

    eps: float
    round_first: bool
    shifted: bool  # its weight is 1 + w
    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor]]

    def __call__(self, x: Tensor, weight: Tensor) -> Tensor:
        """The norm of x (n, M, D) with weights (n, D) of the compute type, less the shift."""
        return _RmsNorm.apply(x, 1.0 + weight if self.shifted else weight, self)


class Glu(NamedTuple):
    """A gated unit's activation, and the ops that compute it."""

    activation: str
    forward: Callable[..., Tensor]
    backward: Callable[..., tuple[Tensor, Tensor]]

    def __call__(self, gate: Tensor, up: Tensor) -> Tensor:
        """act(gate) ∘ up."""
        return _Glu.apply(gate, up, self)


def _is_of(module: nn.Module, names: frozenset[str]) -> bool:
    kind = type(module)
    return kind.__name__ in names and kind.__module__.startswith("transformers.models.")


def rms_norm_of(module: nn.Module, backend: str) -> RmsNorm | None:
    """The arithmetic of a norm, None where it is not known or not in float32."""
    if not _is_of(module, RMS_NORMS) or set(module._parameters) != {"weight"}:
        return None
    if module.weight.dtype == torch.float64:
        return None  # some of them compute in float32 even then
    found = _fused("rms_norm", module, backend)
    if found is None:
        return None
    eps = getattr(module, "variance_epsilon", None)
    return RmsNorm(
        module.eps if eps is None else eps,
        type(module).__name__ in _ROUND_FIRST,
        type(module).__name__ in _SHIFTED,
        *found,
    )


def glu_of(module: nn.Module, backend: str) -> Glu | None:
    """The arithmetic of a gated MLP, None where it is not known."""
    if not _is_of(module, GATED_MLPS):
        return None
    activation = _ACTIVATIONS.get(type(module.act_fn).__name__)
    found = _fused("glu", module, backend)
    return None if activation is None or found is None else Glu(activation, *found)


def _fused(
    name: str, module: nn.Module, backend: str
) -> tuple[Callable[..., Any], Callable[..., Any]] | None:
    """The op and its backward where there is more than plain torch, which modules have already."""
    device = next(module.parameters()).device.type
    both = []
    for op in (name, f"{name}_backward"):
        run = ops.implementation(op, device, backend)
        if run is getattr(reference, op):
            return None
        both.append(run)
    return both[0], both[1]


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, norm: RmsNorm) -> Tensor:
        y, rstd = norm.forward(x, weight, eps=norm.eps, round_first=norm.round_first)
        ctx.save_for_backward(x, weight, rstd)
        ctx.norm = norm
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, rstd = ctx.saved_tensors
        norm, dy = ctx.norm, dy.contiguous()
        dx, dweight = norm.backward(dy, x, weight, rstd, round_first=norm.round_first)
        return dx, dweight, None


class _Glu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, glu: Glu) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.glu = glu
        return glu.forward(gate, up, activation=glu.activation)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        dgate, dup = ctx.glu.backward(dy.contiguous(), gate, up, activation=ctx.glu.activation)
        return dgate, dup, None


class _Piece:
    """Stands in for the ``forward`` of a module.

    Args:
        name: of the module.
        module: the module.
        arithmetic: what it computes.
        own_code: whether to leave an input to the module's own code.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        arithmetic: RmsNorm | Glu,
        own_code: Callable[[Tensor], bool],
    ) -> None:
        self.name, self.module = name, module
        self._arithmetic, self._own_code = arithmetic, own_code


class NormPiece(_Piece):
    """A norm that has one weight for all rows."""

    def forward(self, x: Tensor) -> Tensor:
        """The module's forward, in the dtype of x."""
        weight = self.module.weight
        if x.dtype != weight.dtype or self._own_code(x):
            return type(self.module).forward(self.module, x)
        rows = x.reshape(1, -1, x.shape[-1])
        return self._arithmetic(rows, weight.to(compute_dtype(weight.dtype))[None]).view(x.shape)


class GluPiece(_Piece):
    """A gated MLP; its linears are called as they are."""

    def forward(self, x: Tensor) -> Tensor:
        """The module's forward, in the dtype of x."""
        module = self.module
        if self._own_code(x):
            return type(module).forward(module, x)
        gate, up = module.gate_proj(x), module.up_proj(x)
        return module.down_proj(self._arithmetic(gate.contiguous(), up.contiguous()))


def pieces_of(
    model: nn.Module, backend: str, own_code: Callable[[Tensor], bool]
) -> Iterator[NormPiece | GluPiece]:
    """What stands in for modules of a model.

    Args:
        model: the model.
        backend: a setting for all ops.
        own_code: whether to leave an input to the modules' own code.
    """
    for name, module in model.named_modules():
        norm, glu = rms_norm_of(module, backend), glu_of(module, backend)
        if norm is not None:
            yield NormPiece(name, module, norm, own_code)
        elif glu is not None:
            yield GluPiece(name, module, glu, own_code)


@contextmanager
def standing_in(pieces: Iterable[NormPiece | GluPiece]) -> Iterator[None]:
    """Let pieces stand in for their modules, but where somebody's own forward does already."""
    taken = []
    try:
        for piece in pieces:
            if "forward" not in vars(piece.module):
                piece.module.forward = piece.forward
                taken.append(piece.module)
        yield
    finally:
        for module in taken:
            vars(module).pop("forward", None)
