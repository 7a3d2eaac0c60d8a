"""Every op's schema, fake and backends: what ``torch.ops.ttt_fast`` is, and what runs behind it.

Every op exists once as ``torch.ops.ttt_fast.<name>``, opaque to ``torch.compile``, and runs the
backend that :func:`ttt_fast.backend.resolve_backend` names: plain torch (``reference.py``), the C++
extension (``csrc/``, its part for the CPU or for CUDA) or a Triton kernel (``kernels/``).
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ttt_fast import reference
from ttt_fast.backend import BACKENDS, backends_on, resolve_backend
from ttt_fast.rounding import compute_dtype

# ---------------------------------------------------------------------------- registration

_LIBRARY = torch.library.Library("ttt_fast", "DEF")

_UPDATE_TENSORS = (
    "Tensor(d!)[] deltas, Tensor[] bases, Tensor? grad_norm, Tensor? grad_scale, "
    "Tensor? found_inf, Tensor(e!)? landed, Tensor(f!)[] undo, int[] undo_offsets, *, "
)


class OpSchema(NamedTuple):
    """One op: its arguments less ``backend``, what it returns and writes, who implements it."""

    arguments: str
    returned: str = "()"
    mutated: tuple[str, ...] = ()  # names of the tensors and lists whose versions are to be bumped
    backends: tuple[str, ...] = BACKENDS


_NOT_CUDA = ("torch", "cpp", "triton")

# csrc/ops.cpp registers the same arguments, of the ops that exist in "cpp", in the namespace
# ttt_fast_cpp; ttt_fast/cuda_ops.py and kernels/ have Python functions that take them.
SCHEMAS: dict[str, OpSchema] = {
    "sgd_": OpSchema(
        "Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momentum_buffers, " + _UPDATE_TENSORS
        + "float lr, float momentum, float dampening, bool nesterov, float weight_decay, "
        "bool decoupled_weight_decay, bool maximize, bool first_step, float max_grad_norm, "
        "str rounding, int seed",
        mutated=("params", "momentum_buffers", "deltas"),
    ),
    "adamw_": OpSchema(
        "Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
        + _UPDATE_TENSORS
        + "float lr, float beta1, float beta2, float eps, float weight_decay, bool maximize, "
        "int step_index, float max_grad_norm, str rounding, int seed",
        mutated=("params", "exp_avgs", "exp_avg_sqs", "deltas"),
    ),
    "grad_norm": OpSchema("Tensor[] grads", "Tensor"),
    "gram_norm": OpSchema("Tensor x, Tensor dy", "Tensor"),
    "gram_norms": OpSchema("Tensor[] xs, Tensor[] dys", "Tensor"),
    "delta_linear": OpSchema(
        "Tensor x, Tensor? weight, Tensor a, Tensor d, Tensor beta, Tensor? rho, "
        "Tensor(a!)? append", "Tensor",
        mutated=("append",), backends=_NOT_CUDA,
    ),
    "rank_update_": OpSchema(
        "Tensor(a!) weight, Tensor x, Tensor dy, Tensor beta, *, float scale, str rounding, "
        "int seed",
        mutated=("weight",), backends=("torch", "triton"),
    ),
    "rank_sgd_": OpSchema(
        "Tensor(a!)[] params, Tensor[] xs, Tensor[] dys, Tensor(b!)[] momentum_buffers, "
        "Tensor? grad_norm, Tensor? found_inf, Tensor(c!)? landed, *, float lr, float momentum, "
        "float dampening, bool nesterov, float weight_decay, bool decoupled_weight_decay, "
        "bool first_step, float max_grad_norm, str rounding, int seed",
        mutated=("params", "momentum_buffers"), backends=("torch", "triton"),
    ),
    "nll_": OpSchema(
        "Tensor(a!) logits, Tensor targets, *, int ignore_index", "Tensor", mutated=("logits",),
        backends=_NOT_CUDA,
    ),
    "rms_norm": OpSchema(
        "Tensor x, Tensor weight, *, float eps, bool round_first", "(Tensor, Tensor)",
        backends=_NOT_CUDA,
    ),
    "rms_norm_backward": OpSchema(
        "Tensor dy, Tensor x, Tensor weight, Tensor rstd, *, bool round_first",
        "(Tensor, Tensor)", backends=_NOT_CUDA,
    ),
    "linears": OpSchema("Tensor x, Tensor[] weights", "Tensor[]", backends=("torch", "cpp")),
    "linears_backward": OpSchema(
        "Tensor[] dys, Tensor[] weights", "Tensor", backends=("torch", "cpp")
    ),
    "glu": OpSchema("Tensor gate, Tensor up, *, str activation", "Tensor", backends=_NOT_CUDA),
    "glu_backward": OpSchema(
        "Tensor dy, Tensor gate, Tensor up, *, str activation", "(Tensor, Tensor)",
        backends=_NOT_CUDA,
    ),
    "rotary": OpSchema(
        "Tensor x, Tensor cos, Tensor sin, *, bool transposed", "Tensor", backends=_NOT_CUDA
    ),
    "attention_backward": OpSchema(
        "Tensor dy, Tensor q, Tensor k, Tensor v, Tensor? mask, *, float scale, bool causal",
        "(Tensor, Tensor, Tensor)", backends=("torch", "cpp"),
    ),
    "copy_": OpSchema("Tensor(a!)[] dsts, Tensor[] srcs", mutated=("dsts",)),
    "undo_restore_": OpSchema(
        "Tensor(a!)[] params, Tensor[] undo, int[] undo_offsets", mutated=("params",)
    ),
    "checksum": OpSchema("Tensor[] tensors", "Tensor", backends=_NOT_CUDA),
}  # fmt: skip


def on_its_device(launch: Callable[..., Any]) -> Callable[..., Any]:
    """Make the device of the first tensor the current one: that is where kernels are launched."""

    @functools.wraps(launch)
    def run(*args: Any, **kwargs: Any) -> Any:
        first = args[0] if isinstance(args[0], Tensor) or not args[0] else args[0][0]
        if not isinstance(first, Tensor) or not first.is_cuda:
            return launch(*args, **kwargs)
        with torch.cuda.device(first.device):
            return launch(*args, **kwargs)

    return run


@functools.cache
def _function(name: str, backend: str) -> Callable[..., Any]:
    """The function that runs an op in a backend; all take the arguments of the reference."""
    if backend == "torch":
        return getattr(reference, name)
    if backend == "triton":
        # Not before it is used: Triton is not everywhere.
        stem = name.removesuffix("_")
        module = importlib.import_module(f"ttt_fast.kernels.{stem}")
        return on_its_device(getattr(module, f"{stem}_launch"))
    if backend == "cuda":
        return on_its_device(getattr(importlib.import_module("ttt_fast.cuda_ops"), name))
    return getattr(getattr(torch.ops, f"ttt_fast_{backend}"), name).default


def _implementation(name: str) -> Callable[..., Any]:
    """The function behind ``torch.ops.ttt_fast.<name>``: call the backend, bump versions."""
    argument_names = [
        part.split("=")[0].split()[-1]
        for part in SCHEMAS[name].arguments.split(",")
        if "*" not in part.split()
    ]
    mutated = [argument_names.index(argument) for argument in SCHEMAS[name].mutated]

    def run(*args: Any, backend: str, **kwargs: Any) -> Any:
        result = _function(name, backend)(*args, **kwargs)
        if backend == "torch":
            return result
        for position in mutated:
            # Raw-memory writes do not show up in autograd's "modified in place" check by
            # themselves.
            written = args[position]
            if isinstance(written, Tensor) or written:
                torch.autograd.graph.increment_version(written)
        return result

    return run


def _register() -> None:
    """Define every op with its schema, implementation and, if it returns nothing, its fake."""
    for name, schema in SCHEMAS.items():
        separator = ", " if "*" in schema.arguments else ", *, "
        _LIBRARY.define(f"{name}({schema.arguments}{separator}str backend) -> {schema.returned}")
        _LIBRARY.impl(name, _implementation(name), "CompositeExplicitAutograd")
        if schema.returned == "()":
            torch.library.register_fake(
                f"ttt_fast::{name}", lambda *args, **kwargs: None, lib=_LIBRARY
            )


_register()


@torch.library.register_fake("ttt_fast::grad_norm", lib=_LIBRARY)
def _grad_norm_fake(grads: Sequence[Tensor], *, backend: str) -> Tensor:
    double = any(g.dtype == torch.float64 for g in grads)
    device = grads[0].device if grads else None
    return torch.empty((), dtype=torch.float64 if double else torch.float32, device=device)


@torch.library.register_fake("ttt_fast::gram_norm", lib=_LIBRARY)
def _gram_norm_fake(x: Tensor, dy: Tensor, *, backend: str) -> Tensor:
    return x.new_empty((x.shape[0],), dtype=compute_dtype(x.dtype))


@torch.library.register_fake("ttt_fast::gram_norms", lib=_LIBRARY)
def _gram_norms_fake(xs: Sequence[Tensor], dys: Sequence[Tensor], *, backend: str) -> Tensor:
    return xs[0].new_empty((len(xs), xs[0].shape[0]), dtype=compute_dtype(xs[0].dtype))


@torch.library.register_fake("ttt_fast::delta_linear", lib=_LIBRARY)
def _delta_linear_fake(
    x: Tensor,
    weight: Tensor | None,
    a: Tensor,
    d: Tensor,
    beta: Tensor,
    rho: Tensor | None,
    append: Tensor | None,
    *,
    backend: str,
) -> Tensor:
    return x.new_empty((x.shape[0], x.shape[1], d.shape[2]))


@torch.library.register_fake("ttt_fast::nll_", lib=_LIBRARY)
def _nll_fake(logits: Tensor, targets: Tensor, *, ignore_index: int, backend: str) -> Tensor:
    return logits.new_empty((logits.shape[0],), dtype=compute_dtype(logits.dtype))


@torch.library.register_fake("ttt_fast::rms_norm", lib=_LIBRARY)
def _rms_norm_fake(
    x: Tensor, weight: Tensor, *, eps: float, round_first: bool, backend: str
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), weight.new_empty(x.shape[:2])


@torch.library.register_fake("ttt_fast::rms_norm_backward", lib=_LIBRARY)
def _rms_norm_backward_fake(
    dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, *, round_first: bool, backend: str
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(weight)


@torch.library.register_fake("ttt_fast::linears", lib=_LIBRARY)
def _linears_fake(x: Tensor, weights: Sequence[Tensor], *, backend: str) -> list[Tensor]:
    return [x.new_empty((*x.shape[:-1], len(weight))) for weight in weights]


@torch.library.register_fake("ttt_fast::linears_backward", lib=_LIBRARY)
def _linears_backward_fake(
    dys: Sequence[Tensor], weights: Sequence[Tensor], *, backend: str
) -> Tensor:
    return dys[0].new_empty((*dys[0].shape[:-1], weights[0].shape[1]))


@torch.library.register_fake("ttt_fast::glu", lib=_LIBRARY)
def _glu_fake(gate: Tensor, up: Tensor, *, activation: str, backend: str) -> Tensor:
    return torch.empty_like(gate)


@torch.library.register_fake("ttt_fast::glu_backward", lib=_LIBRARY)
def _glu_backward_fake(
    dy: Tensor, gate: Tensor, up: Tensor, *, activation: str, backend: str
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(gate), torch.empty_like(gate)


@torch.library.register_fake("ttt_fast::rotary", lib=_LIBRARY)
def _rotary_fake(x: Tensor, cos: Tensor, sin: Tensor, *, transposed: bool, backend: str) -> Tensor:
    return torch.empty_like(x)


@torch.library.register_fake("ttt_fast::attention_backward", lib=_LIBRARY)
def _attention_backward_fake(
    dy: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    *,
    scale: float,
    causal: bool,
    backend: str,
) -> tuple[Tensor, ...]:
    return tuple(q.new_empty([x.shape[i] for i in (0, 2, 1, 3)]).transpose(1, 2) for x in (q, k, v))


@torch.library.register_fake("ttt_fast::checksum", lib=_LIBRARY)
def _checksum_fake(tensors: Sequence[Tensor], *, backend: str) -> Tensor:
    return torch.empty((), dtype=torch.int64)


# ---------------------------------------------------------------------------- backends


def backend_for(op: str, backend: str, *device_types: str) -> str:
    """Return what to ask ``op`` for when ``backend`` is a setting for all ops of a run.

    An op refuses a backend that it does not exist in, or that does not run on its tensors. A run
    that is set to "cpp" means C++ wherever there is any, so for the other ops this is "auto"; so it
    is for a copy to the host in a run that is set to "triton".

    Args:
        op: name of the op, as "delta_linear".
        backend: "auto" or one of ``ttt_fast.backend.BACKENDS``.
        device_types: "cpu", "cuda", ... of all its tensors; none: of any that the backend runs on.
    """
    if backend not in BACKENDS:
        return backend
    runs = all(backend in backends_on(device_type) for device_type in device_types)
    return backend if runs and backend in SCHEMAS[op].backends else "auto"


def choose(op: str, device_type: str, backend: str) -> str:
    """The backend that an op runs in, of those that have it."""
    return resolve_backend(device_type, backend, implemented=SCHEMAS[op].backends, op=op)


def choose_but_float16(op: str, lead: Tensor, backend: str) -> str:
    """The backend of an op that has no float16 in C++: torch then, unless C++ was asked for."""
    chosen = choose(op, lead.device.type, backend)
    if chosen != "cpp" or lead.dtype != torch.float16:
        return chosen
    if backend == "cpp":
        raise ValueError(
            f"{op}: tensors are float16, which backend='cpp' does not have; use backend='auto' or"
            " convert."
        )
    return "torch"


def implementation(op: str, device_type: str, backend: str = "auto") -> Callable[..., Any]:
    """The function that runs an op: without checks, without dispatcher, for calls in inner loops.

    It takes the op's arguments in their order; options after ``*`` as keywords.

    Args:
        op: name of the op.
        device_type: "cpu", "cuda", ...
        backend: a setting for all ops of a run, as for :func:`backend_for`.
    """
    return _function(op, choose(op, device_type, backend_for(op, backend, device_type)))


def choose_for_update(op: str, params: Sequence[Tensor], rounding: str, backend: str) -> str:
    """rounding="torch" *is* torch's foreach code, so it runs there and nowhere else."""
    chosen = choose_for(op, params, backend)
    if rounding != "torch":
        return chosen
    if backend not in ("auto", "torch"):
        raise ValueError(
            f"rounding='torch' runs torch's own operations, backend={backend!r} does not; "
            "use backend='auto', or rounding='nearest'."
        )
    return "torch"


def choose_for(op: str, tensors: Sequence[Tensor], backend: str) -> str:
    """The backend for a list; an empty one is nowhere, so that no backend is wrong for it."""
    if not tensors:
        return choose(op, "cpu", backend_for(op, backend, "cpu"))
    return choose(op, tensors[0].device.type, backend)
