"""Pieces of a model's own modules that one op computes: norms, gated units, rotary, frozen linears.

The user's modules stay in the model; while an engine holds it, the ``forward`` of those listed here
is one of the functions below, which do what the model's own code does, rounding included. A module
of any other class, or one that somebody changed, is left alone; so is every one where there is
nothing faster than torch.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from types import FunctionType, MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ttt_fast import ops, reference
from ttt_fast.engines.attention import Interfaces
from ttt_fast.engines.frozen import LinearPiece, SameInput, frozen_mlp
from ttt_fast.engines.products import most_rows
from ttt_fast.op_checks import DTYPES, with_rows
from ttt_fast.rounding import compute_dtype

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
# Their forward calls this function of their own file: x ∘ cos + rotate_half(x) ∘ sin of queries and
# keys; of the first columns, as many as there are angles; and with angles in float32.
_ROTARY = "apply_rotary_pos_emb"
# And, where they have them, these on the same tensor.
_ATTENTION_INPUTS = ("q_proj", "k_proj", "v_proj")
# And one of these functions.
_ATTENTIONS = "ALL_ATTENTION_FUNCTIONS"
_TURN_WHOLE = frozenset({
    "Gemma2Attention", "Gemma3Attention", "GemmaAttention", "GraniteAttention", "LlamaAttention",
    "MistralAttention", "MixtralAttention", "PhiAttention", "Qwen2Attention", "Qwen2MoeAttention",
    "Qwen3Attention", "Qwen3MoeAttention", "SmolLM3Attention", "StableLmAttention",
    "Starcoder2Attention",
})  # fmt: skip
_TURN_PART = frozenset({"GPTNeoXAttention", "Phi3Attention"})
_TURN_WIDE = frozenset({"Olmo2Attention", "Olmo3Attention", "OlmoAttention"})
ATTENTIONS = _TURN_WHOLE | _TURN_PART | _TURN_WIDE


class RmsNorm(NamedTuple):
    """How a norm of a known class computes, and the ops that do."""

    eps: float
    round_first: bool
    shifted: bool  # its weight is 1 + w
    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor]]

    def __call__(self, x: Tensor, weight: Tensor) -> Tensor:
        """The norm of x (n, ..., D) with weights (n, D) of the compute type, less the shift.

        With one weight, of x (..., D).
        """
        return _RmsNorm.apply(x, 1.0 + weight if self.shifted else weight, self)


class Glu(NamedTuple):
    """A gated unit's activation, and the ops that compute it."""

    activation: str
    forward: Callable[..., Tensor]
    backward: Callable[..., tuple[Tensor, Tensor]]

    def __call__(self, gate: Tensor, up: Tensor) -> Tensor:
        """act(gate) ∘ up."""
        return _Glu.apply(gate, up, self)


class Rotary(NamedTuple):
    """How an attention turns its queries and keys, and the op that does."""

    part: bool  # may columns be left as they are?
    wide: bool  # angles are in the compute type, or made so
    own: Callable[..., tuple[Tensor, Tensor]]  # the function of the model's own code
    op: Callable[..., Tensor]

    def __call__(
        self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *more: Any, **options: Any
    ) -> tuple[Tensor, Tensor]:
        """Turn queries and keys (B, H, T, D) by angles (B or 1, T, R), as :attr:`own` does."""
        asked = more or options
        if asked or not (self._takes(q, cos, sin) and self._takes(k, cos, sin)):
            return self.own(q, k, cos, sin, *more, **options)
        if self.wide:
            cos, sin = (t.to(compute_dtype(q.dtype)) for t in (cos, sin))
        return _Rotary.apply(q, k, cos, sin, self.op)

    def _takes(self, x: Tensor, cos: Tensor, sin: Tensor) -> bool:
        if x.dim() != 4 or cos.dim() != 3 or cos.shape != sin.shape or cos.dtype != sin.dtype:
            return False
        rows, tokens, turned = cos.shape
        fits = rows in (1, x.shape[0]) and tokens == x.shape[2] and turned % 2 == 0
        whole = turned == x.shape[3] or (self.part and turned < x.shape[3])
        usual = x.dtype in DTYPES and cos.dtype == (torch.float32 if self.wide else x.dtype)
        return fits and whole and usual and not (cos.requires_grad or sin.requires_grad)


def _is_of(module: nn.Module, names: frozenset[str]) -> bool:
    kind = type(module)
    return kind.__name__ in names and kind.__module__.startswith("transformers.models.")


def rms_norm_of(module: nn.Module, backend: str) -> RmsNorm | None:
    """The arithmetic of a norm, None where it is not known or not in float32."""
    if not _is_of(module, RMS_NORMS) or set(module._parameters) != {"weight"}:
        return None
    if module.weight.dtype == torch.float64:
        return None  # some of them compute in float32 even then
    found = _fused(module, backend, "rms_norm", "rms_norm_backward")
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
    found = _fused(module, backend, "glu", "glu_backward")
    return None if activation is None or found is None else Glu(activation, *found)


def rotary_of(module: nn.Module, backend: str) -> Rotary | None:
    """The arithmetic of an attention's positions, None where it is not known.

    All of it must be as its file has it: the forward of the class, the function that the forward
    calls, and what that calls. Who replaced or wrapped one of them has it run.
    """
    if not _is_of(module, ATTENTIONS):
        return None
    kind = type(module)
    file = vars(sys.modules[kind.__module__])
    functions = (vars(kind).get("forward"), file.get(_ROTARY), file.get("rotate_half"))
    found = _fused(module, backend, "rotary")
    if found is None or any(getattr(f, "__globals__", None) is not file for f in functions):
        return None
    name = kind.__name__
    return Rotary(name in _TURN_PART, name in _TURN_WIDE, functions[1], *found)


def attends_again(module: nn.Module, implementation: str | None, backend: str) -> bool:
    """Whether the backward of an attention computes it again, from what it was given."""
    usual = implementation == "sdpa" and next(module.parameters()).dtype in DTYPES
    return usual and all(of(module, backend) for of in (rotary_of, _attention_backward_of))


def _attention_backward_of(module: nn.Module, backend: str) -> Callable[..., Any] | None:
    found = _fused(module, backend, "attention_backward")
    return None if found is None else found[0]


def has_product(module: nn.Module, backend: str) -> bool:
    """Whether there is a product for a plain linear layer that may be faster than torch's."""
    known = (
        type(module).forward is nn.Linear.forward
        and {"weight", "bias"} <= set(module._parameters)
        and module.weight.device.type == "cpu"
        and most_rows(module.weight.dtype) > 0
    )
    return known and _fused(module, backend, "linears", "linears_backward") is not None


def _fused(module: nn.Module, backend: str, *names: str) -> list[Callable[..., Any]] | None:
    """The ops of these names where there is more than plain torch, which modules have already."""
    device = next(module.parameters()).device.type
    device = "cpu" if device == "meta" else device  # only shapes are asked for
    found = [ops.implementation(name, device, backend) for name in names]
    plain = any(run is getattr(reference, name) for name, run in zip(names, found, strict=True))
    return None if plain else found


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, norm: RmsNorm) -> Tensor:
        rows = x.reshape(len(weight), -1, x.shape[-1])
        y, rstd = norm.forward(rows, weight, eps=norm.eps, round_first=norm.round_first)
        ctx.save_for_backward(x, weight, rstd)
        ctx.norm = norm
        return _shaped_like(x, y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, rstd = ctx.saved_tensors
        norm, shape = ctx.norm, (len(weight), -1, x.shape[-1])
        dy, rows = dy.contiguous().view(shape), x.reshape(shape)
        dx, dweight = norm.backward(dy, rows, weight, rstd, round_first=norm.round_first)
        return dx.view(x.shape), dweight, None


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


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, op: Callable[..., Tensor]
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        ctx.op = op
        ctx.set_materialize_grads(False)
        cos, sin = with_rows(cos), with_rows(sin)
        turned = [op(with_rows(x), cos, sin, transposed=False) for x in (q, k)]
        # One function for both is less to pay for each layer, but only what needs it gets one.
        needed = zip(turned, ctx.needs_input_grad, strict=False)
        ctx.mark_non_differentiable(*(y for y, needs_grad in needed if not needs_grad))
        return turned[0], turned[1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq: Tensor | None, dk: Tensor | None) -> tuple[Tensor | None, ...]:
        cos, sin = (with_rows(t) for t in ctx.saved_tensors)
        back = [
            None if dy is None else ctx.op(with_rows(dy), cos, sin, transposed=True)
            for dy in (dq, dk)
        ]
        return *back, None, None, None


def _shaped_like(x: Tensor, y: Tensor) -> Tensor:
    """y, to autograd no view: a model may write into what it gets."""
    return y if y.shape == x.shape else torch.ops.aten._unsafe_view(y, x.shape)


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
        arithmetic: RmsNorm | Glu | Rotary | Callable[..., Tensor],
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
        return self._arithmetic(x, weight.to(compute_dtype(weight.dtype))[None])


class GluPiece(_Piece):
    """A gated MLP; its linears are called as they are, unless all of it is computed here."""

    def forward(self, x: Tensor) -> Tensor:
        """The module's forward, in the dtype of x."""
        module = self.module
        if self._own_code(x):
            return type(module).forward(module, x)
        whole = frozen_mlp(module, self._arithmetic, x)
        if whole is not None:
            return whole
        gate, up = module.gate_proj(x), module.up_proj(x)
        return module.down_proj(self._arithmetic(gate.contiguous(), up.contiguous()))


class AttentionPiece(_Piece):
    """An attention whose queries and keys are turned by one op; the rest is its own code.

    But for torch's attention on a CPU, whose backward is ours (:mod:`ttt_fast.engines.attention`).

    Its forward is that of its class with globals of its own: those of the class's file, but for the
    function that turns and those that attend, as they are when the piece is made. So neither the
    file nor the class is changed, nor any other model's module.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        arithmetic: Rotary,
        own_code: Callable[[Tensor], bool],
        backward: Callable[..., Any] | None,
    ) -> None:
        super().__init__(name, module, arithmetic, own_code)
        own = type(module).forward
        # Nothing that refers to this piece: it would be a cycle, and keep what own_code belongs to.
        shared = own.__globals__ | {_ROTARY: partial(_turned, arithmetic, own_code)}
        if _ATTENTIONS in shared and backward is not None:
            shared[_ATTENTIONS] = Interfaces(shared[_ATTENTIONS], own_code, backward)
        forward = FunctionType(
            own.__code__, shared, own.__name__, own.__defaults__, own.__closure__
        )
        forward.__kwdefaults__ = own.__kwdefaults__
        self.forward = MethodType(forward, module)


def _turned(
    rotary: Rotary,
    own_code: Callable[[Tensor], bool],
    q: Tensor,
    k: Tensor,
    *more: Any,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    turn = rotary.own if own_code(q) or own_code(k) else rotary
    return turn(q, k, *more, **options)


Piece = NormPiece | GluPiece | AttentionPiece | LinearPiece


def pieces_of(
    model: nn.Module, backend: str, own_code: Callable[[Tensor], bool]
) -> Iterator[Piece]:
    """What stands in for modules of a model.

    Args:
        model: the model.
        backend: a setting for all ops.
        own_code: whether to leave an input to the modules' own code.
    """
    beside: dict[int, SameInput] = {}
    for name, module in model.named_modules():
        for known, piece in ((rms_norm_of, NormPiece), (glu_of, GluPiece)):
            arithmetic = known(module, backend)
            if arithmetic is not None:
                yield piece(name, module, arithmetic, own_code)
        rotary = rotary_of(module, backend)
        if rotary is not None:
            backward = _attention_backward_of(module, backend)
            yield AttentionPiece(name, module, rotary, own_code, backward)
            same = SameInput()
            children = (getattr(module, name, None) for name in _ATTENTION_INPUTS)
            beside |= {id(child): same for child in children if child is not None}
        if has_product(module, backend):
            yield LinearPiece(name, module, own_code, beside.get(id(module)))


@contextmanager
def standing_in(pieces: Iterable[Piece]) -> Iterator[None]:
    """Let pieces stand in for their modules, but where somebody's own forward does already."""
    taken = []
    try:
        for piece in pieces:
            own = vars(piece.module)  # past setattr of nn.Module, which is slow
            if "forward" not in own:
                own["forward"] = piece.forward
                taken.append(piece)
        yield
    finally:
        for piece in taken:
            vars(piece.module).pop("forward", None)
            if isinstance(piece, LinearPiece):
                piece.beside.forget()
