"""Where the time of a step goes: a profile's own times summed into parts, and a floor for each.

torch.profiler sees every operation of torch and of ours, every node of a backward pass, and ranges
that are given a name. Each has its own time, without what runs inside of it; all of them together
are the time of the whole, to the last microsecond. A part is the sum over what belongs to it:

    in a forward      what a range or an operation's name says, the innermost
    in a backward     that of the operation in the forward whose node it is (autograd numbers both)

and whatever is left is the rest, of which the largest are named. Floors are operations of products,
counted by :mod:`ttt_fast.engines.cost`, at the GEMM rate of the same run.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from sys import modules as imported
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, record_function

import ttt_fast.naive
from ttt_fast.engines import cost
from ttt_fast.engines.pieces import AttentionPiece, GluPiece, NormPiece, pieces_of

LINEARS = "linear layers"
DELTAS = "delta products; weight gradients"
UPDATE = "norm, clip and update; Grams"
HEAD = "head and loss"
PIECES = "RMSNorm, gated unit, rotary"
ATTENTION = "attention"
SNAPSHOT = "snapshot and restore"
REST = "rest"
PARTS = (LINEARS, DELTAS, UPDATE, HEAD, PIECES, ATTENTION, SNAPSHOT, REST)
# Of ours: W₀ and the deltas in one product, to be divided.
ADAPTED = "adapted linear layers"

# The ranges around a whole adaptation and each of its steps; their own time is Python's.
ADAPT, STEP = "adapt", "step"
PYTHON = "Python between operations"
_RANGE = "part: "
_NODE = "autograd::engine::evaluate_function: "
_NAMES = {
    "aten::linear": LINEARS,
    "_FrozenLinears": LINEARS,
    "_FrozenMlp": PIECES,
    "ttt_fast_cpp::delta_linear": LINEARS,
    "ttt_fast_cpp::linears": LINEARS,
    "ttt_fast_cpp::linears_backward": LINEARS,
    "aten::addmm_": LINEARS,
    "_Linear": ADAPTED,
    "_Lookup": DELTAS,
    "aten::embedding_dense_backward": DELTAS,
    "_HeadLoss": HEAD,
    "_RmsNorm": PIECES,
    "_Glu": PIECES,
    "_Rotary": PIECES,
    "_Attention": ATTENTION,
    "aten::scaled_dot_product_attention": ATTENTION,
    "Optimizer.step#SGD.step": UPDATE,
    "Optimizer.zero_grad#SGD.zero_grad": UPDATE,
}
# What other parts are called from: a gated MLP has linear layers inside.
_OPEN = (REST, PIECES)


# ---------------------------------------------------------------------------- names for a profile


def ranged(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, which a profile shows as a range of that part."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with record_function(_RANGE + part):
            return function(*args, **kwargs)

    return run


@contextmanager
def loop_named(model: nn.Module) -> Iterator[None]:
    """Ranges around the parts of the naive loop on a model; what is computed stays the same.

    Around the modules that ours computes by one op, the rotary function of their file, the head
    with the loss, and the clip.
    """
    with ExitStack() as stack:

        def name(owner: Any, attribute: str, part: str) -> None:
            function = ranged(part, getattr(owner, attribute))
            stack.enter_context(patch.object(owner, attribute, function))

        pieces = list(pieces_of(model, "auto", lambda x: False))
        for piece in pieces:
            if isinstance(piece, NormPiece | GluPiece):
                name(piece.module, "forward", PIECES)
        for file in {type(p.module).__module__ for p in pieces if isinstance(p, AttentionPiece)}:
            name(imported[file], "apply_rotary_pos_emb", PIECES)
        name(model.get_output_embeddings(), "forward", HEAD)
        name(model, "forward", REST)
        name(ttt_fast.naive, "prompt_loss", HEAD)
        name(nn.utils, "clip_grad_norm_", UPDATE)
        yield


def profile(run: Callable[[], Any]) -> FunctionEvent:
    """Run something under the profiler; return the one range that is around all of it.

    Raises:
        AssertionError: something ran outside of that range, and would be missing.
    """
    with torch.profiler.profile(activities=[ProfilerActivity.CPU], record_shapes=True) as found:
        run()
    roots = [event for event in found.events() if event.cpu_parent is None]
    if len(roots) != 1:
        raise AssertionError(f"outside of {ADAPT}: {[event.name for event in roots][:9]}")
    return roots[0]


# ---------------------------------------------------------------------------- sums


def labelled(root: FunctionEvent, tokens: int = 0) -> Iterator[tuple[FunctionEvent, str]]:
    """Every event inside of a range, and the part that it belongs to.

    Args:
        root: a whole adaptation, or one step.
        tokens: of which weight gradients are sums: the product over so many, in a backward pass,
            is one. 0 where autograd forms none.
    """
    creators: dict[int, str] = {}

    def visit(event: FunctionEvent, part: str, backward: bool) -> Iterator[Any]:
        if event.name.startswith(_NODE):
            backward, part = True, creators.get(event.sequence_nr, REST)
            part = DELTAS if event.name.endswith("::AccumulateGrad") else part
        elif backward and tokens and _sums_over(event, tokens):
            part = DELTAS
        else:
            part = _named(event, part)
        if not backward and event.sequence_nr >= 0:
            # The number of the next node: the last operation that shows it makes that node.
            creators[event.sequence_nr] = part
        yield event, part
        for child in event.cpu_children:
            yield from visit(child, part, backward)

    yield from visit(root, REST, False)


def _named(event: FunctionEvent, part: str) -> str:
    """The part of an event inside of another part."""
    if event.name.startswith(_RANGE):
        return event.name.removeprefix(_RANGE)
    parent = event.cpu_parent
    if event.name == "aten::clone" and parent is not None and parent.name == ADAPT:
        return SNAPSHOT
    return _NAMES.get(event.name, part) if part in _OPEN else part


def _sums_over(event: FunctionEvent, tokens: int) -> bool:
    """Whether it is a product (n, tokens) (tokens, m), which a gradient of a weight is."""
    return event.name == "aten::mm" and event.input_shapes[0][1] == tokens


def milliseconds(root: FunctionEvent, tokens: int = 0) -> dict[str, float]:
    """Own time of everything inside of a range, by part; together the time of the range.

    Of ours the products of adapted layers have W₀ and the deltas in one sum. In the first step
    there are no deltas: what the later ones take beyond it is the deltas'.
    """
    found = _summed(labelled(root, tokens))
    steps = [_summed(labelled(e))[ADAPTED] for e, _ in labelled(root) if e.name == STEP]
    adapted = found.pop(ADAPTED, 0.0)
    without = steps[0] * len(steps) if steps else 0.0
    found[LINEARS] += without
    found[DELTAS] += adapted - without
    return {part: found[part] for part in PARTS}


def _summed(events: Iterator[tuple[FunctionEvent, str]]) -> Counter[str]:
    found: Counter[str] = Counter()
    for event, part in events:
        found[part] += 1e-3 * event.self_cpu_time_total
    return found


def largest(root: FunctionEvent, count: int = 5, tokens: int = 0) -> dict[str, float]:
    """What takes most of the rest: name -> milliseconds, and all others together."""
    found: Counter[str] = Counter()
    for event, part in labelled(root, tokens):
        if part == REST:
            python = event.name in (ADAPT, STEP) or event.name.startswith(_RANGE)
            name = PYTHON if python else event.name.removeprefix(_NODE)
            found[name] += 1e-3 * event.self_cpu_time_total
    most = dict(found.most_common(count))
    return most | {"others": sum(found.values()) - sum(most.values())}


# ---------------------------------------------------------------------------- the floor


def operations(work: cost.Workload) -> dict[str, float]:
    """Multiplications and additions of one step of one delta, the mean over the steps, by part.

        linear layers    2T · weights, for the forward and again for the gradients of inputs
        deltas           4T · rank · Σ (in + out), the rank T (K − 1) / 2 in the mean
        Grams            T (T + 1) · Σ (in + out), every pair of tokens once
        head             the same of the T − 1 tokens that have a label

    Whatever is no product counts nothing here: norms, attention, the softmax.
    """
    head = replace(work, layers=tuple(layer for layer in work.layers if layer.head))
    body = replace(work, layers=tuple(layer for layer in work.layers if not layer.head))

    def deltas(part: cost.Workload, tokens: int) -> float:
        return 4.0 * tokens * part.delta_width * tokens * (work.steps - 1) / 2

    T = work.tokens
    grams = T * (T + 1) * body.delta_width + (T - 1) * T * head.delta_width
    return {
        LINEARS: frozen_operations(body, T),
        DELTAS: deltas(body, T),
        UPDATE: float(grams),
        HEAD: frozen_operations(head, T - 1) + deltas(head, T - 1),
    }


def frozen_operations(work: cost.Workload, tokens: int) -> float:
    """Of products with the weights: a forward, and the gradients of inputs."""
    return 2.0 * tokens * (work.forward_weights + work.backward_weights)


def at_rate(counts: dict[str, float], gflop_per_s: float) -> dict[str, float]:
    """Milliseconds of so many operations."""
    return {part: 1e-6 * count / gflop_per_s for part, count in counts.items()}


def frozen_workload(layers: Sequence[cost.Layer], tokens: int) -> cost.Workload:
    """Layers of which none trains, and the gradient crosses all."""
    crossed = tuple(replace(x, adapted_out=0, differentiated=True) for x in layers)
    return cost.Workload(crossed, tokens=tokens, steps=1)
