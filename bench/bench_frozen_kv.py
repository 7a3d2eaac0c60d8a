"""A step of query-only test-time training on a long context beside the loop, and the exact step.

"loop" is what a researcher writes: the cache of the prefill is copied, cropped in front of the span
and given to the model. "views" is the best that stock torch does with the same model: nothing is
copied beforehand, and each layer joins what is before the span with it. "exact" is a step of
``kv="exact"`` on the whole context: another objective, here for what a step costs. The context is
random tokens, as no time depends on them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from statistics import median
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache

from bench.conftest import interleave, note
from bench.shapes import AMOUNT, SMALL, load_model
from ttt_fast import Batch, Session, TTTConfig, TTTTrainer, select_parameters

MODEL = "SmolLM2-135M"
LENGTHS = {"quick": (768,), "full": (2048, 8192), "small": (40,)}[AMOUNT]
SPAN = 8 if SMALL else 128
ROUNDS = {"quick": 2, "full": 5, "small": 1}[AMOUNT]
OPTIONS = dict(lr=1e-4, momentum=0.9)
CLIP = 1.0
# The exact step, of a full run, is worth a minute up to this many tokens.
LONGEST_EXACT = 0 if AMOUNT == "quick" else 2048

Step = Callable[[], float]


@pytest.mark.parametrize("length", LENGTHS)
def bench_frozen_kv(benchmark: Any, length: int) -> None:
    model = load_model(MODEL, torch.float32)
    ids = torch.randint(model.config.vocab_size, (1, length), generator=torch.manual_seed(0))
    span = (length - SPAN - 1, length)  # the last: all of the context is before it
    sides = {
        "loop (cache copied and cropped)": loop(model, ids, span, copied),
        "views (each layer joins)": loop(model, ids, span, viewed),
    }
    with TTTTrainer(copy.deepcopy(model), config()).begin() as session:
        frozen = session.prefill(Batch(ids))
        sides["ours"] = lambda: float(session.step(frozen.spans([span])).losses[0])
        losses = [side() for side in sides.values()]
        if max(losses) - min(losses) > 1e-3 * losses[0]:
            raise AssertionError(f"{dict(zip(sides, losses, strict=True))} should be one loss")
        with TTTTrainer(copy.deepcopy(model), config()).begin() as whole:
            if length <= LONGEST_EXACT:
                sides["exact (another objective)"] = exact(whole, ids)
            seconds = interleave({name: (side,) for name, side in sides.items()}, ROUNDS)
    typical = {name: 1e3 * median(values) for name, values in seconds.items()}
    for name, ms in typical.items():
        print(f"\nT = {length}, span {SPAN}, {name:34} {ms:10.1f} ms a step", end="")
    print(f"\nfrozen keys and values: {frozen.nbytes / 2**20:.1f} MiB")
    note(benchmark, {"frozen_kv": typical, "tokens": length, "span": SPAN})


def config() -> TTTConfig:
    """Of ours; the dense engine, whose steps all cost the same."""
    return TTTConfig(engine="dense", scope="query", max_grad_norm=CLIP, **OPTIONS)


def exact(session: Session, ids: Tensor) -> Step:
    """A step on all of the context."""
    batch = Batch(ids)
    return lambda: float(session.step(batch).losses[0])


def loop(model: nn.Module, ids: Tensor, span: tuple[int, int], cache_of: Any) -> Step:
    """A step in plain torch, on a model of its own."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        prefilled = model(ids, use_cache=True, logits_to_keep=1).past_key_values
    params = [selection.param for selection in select_parameters(model, "query")]
    model.requires_grad_(False)
    for param in params:
        param.requires_grad_(True)
    optimizer = torch.optim.SGD(params, **OPTIONS)
    start, stop = span

    def step() -> float:
        cache = cache_of(prefilled, start)
        logits = model(ids[:, start:stop], past_key_values=cache, use_cache=True).logits
        loss = F.cross_entropy(logits[0, :-1], ids[0, start + 1 : stop])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, CLIP)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def copied(prefilled: DynamicCache, start: int) -> DynamicCache:
    """A copy of the cache, cropped to what is before the span."""
    cache = copy.deepcopy(prefilled)
    cache.crop(start - cache.get_seq_length())
    return cache


def viewed(prefilled: DynamicCache, start: int) -> DynamicCache:
    """Views of what is before the span."""
    cache = copy.copy(prefilled)
    cache.layers = [copy.copy(layer) for layer in prefilled.layers]
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys[:, :, :start], layer.values[:, :, :start]
    return cache
