"""What the factored engine is held against the loops with: models, prompts and comparisons."""

import math

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from tests.families import FAMILIES, tiny_model
from tests.loops import params_of, prompt_ids, row_loss, sgd_loop, twin
from ttt_fast import Batch, TTTConfig, TTTTrainer, select_parameters
from ttt_fast.batch import pad_rows

DENSE = [family for family in FAMILIES if "mix" not in family and "moe" not in family]
RICH = dict(lr=2e-2, momentum=0.9, nesterov=True, weight_decay=0.1, max_grad_norm=2.0)
OPTIONS = dict(lr=2e-2, momentum=0.9, weight_decay=0.01, max_grad_norm=1.0)
# Within a sliding window of 8 of each other: a padded query that sees no token at all is NaN in
# transformers' own eager attention in float64.
LENGTHS = (9, 6, 13, 7, 11)
STEPS = 4


def fp64(family="llama_tied", attention="sdpa", n_layers=2):
    """A tiny model in float64; its many shapes are in the families, not in its depth."""
    attention = "eager" if family == "gemma2" else attention
    name = "n_layer" if family == "gpt2" else "num_hidden_layers"
    return tiny_model(family, torch.float64, attn_implementation=attention, **{name: n_layers})


def tolerance_of(family):
    """Gemma's norms work in float32 in a float64 model too: sums over a batch round there."""
    return 1e-5 if family.startswith("gemma") else 1e-10


def trainer_of(model, objective=None, **options):
    options = dict(engine="factored", steps=STEPS) | OPTIONS | options
    return TTTTrainer(model, TTTConfig(**options), objective=objective)


def prompts_of(lengths=LENGTHS):
    return [prompt_ids(length, seed=length)[0] for length in lengths]


def padded(prompts, side, dirt=0):
    """Rows with padding on a side, which holds other tokens than any row's own."""
    ids, mask = pad_rows(prompts, 0, side)
    ids = torch.where(mask != 0, ids, torch.full_like(ids, dirt))
    return ids, mask


@torch.no_grad()
def shown(model):
    """What each module with weights computes from a probe that shows all of them.

    Nothing is written to the weights, so this is how they look from outside.
    """
    outputs = {}
    for name, module in model.named_modules():
        if not list(module.parameters(recurse=False)):
            continue
        weight = module.weight
        if isinstance(module, nn.Linear | Conv1D):
            width = weight.shape[0 if isinstance(module, Conv1D) else 1]
            probe = torch.cat([torch.eye(width), torch.zeros(1, width)])
            outputs[name] = module(probe.to(weight.dtype))
        elif isinstance(module, nn.Embedding):
            shifted = "Learned" in type(module).__name__  # OPT adds 2 to the positions
            ids = torch.arange(weight.shape[0] - 2 * shifted)[None]
            outputs[name] = module(None, 0, ids) if shifted else module(ids)
        else:
            wave = torch.linspace(-1, 2, weight.numel()).cos().to(weight.dtype)
            outputs[name] = module(torch.stack([wave, -wave])[None])
    return {name: output.double() for name, output in outputs.items()}


def assert_same_deltas(ours, theirs, base, tolerance=1e-10):
    """What changed in three looks at weights: the same in every module, and something did."""
    sizes = {name: float((theirs[name] - base[name]).norm()) for name in base}
    whole = math.hypot(*sizes.values())
    assert whole > 1e-6, "nothing was adapted"
    for name, size in sizes.items():
        error = float((ours[name] - theirs[name]).norm())
        # A gradient that is zero but for rounding (the bias of keys) is held to the others' size.
        assert error <= tolerance * (size + 1e-3 * whole), (name, error, size)


def assert_as_loop(model, ids, scope="all", layers=None, tolerance=1e-10, **options):
    """Adapt to one prompt; losses, norms and every module as after the loop."""
    options = OPTIONS | options
    other, base = twin(model), shown(model)
    loop_options = {n: v for n, v in options.items() if n != "decoupled_weight_decay"}
    losses, norms = sgd_loop(
        other,
        [lambda m: row_loss(m, ids[0])] * STEPS,
        params=params_of(other, select_parameters(model, scope, layers)),
        decoupled=options.get("decoupled_weight_decay", False),
        **loop_options,
    )
    with trainer_of(model, scope=scope, layers=layers, **options).adapt(ids) as adapted:
        assert adapted.losses[0].tolist() == pytest.approx(losses, rel=tolerance, abs=0)
        assert adapted.grad_norms[0].tolist() == pytest.approx(norms, rel=tolerance, abs=0)
        assert_same_deltas(shown(model), shown(other), base, tolerance)
        probe = prompt_ids(7, seed=40)
        assert adapted.loss(probe).item() == pytest.approx(
            row_loss(other, probe[0]).item(), rel=tolerance
        )
    assert_same_deltas(shown(other), shown(other), shown(model))


def assert_as_loops(model, prompts, tolerance=1e-10, trainer_options=None, **options):
    """Adapt prompts side by side; each as if a loop had taken it alone, without padding."""
    options = OPTIONS | options
    base, twins = shown(model), [twin(model) for _ in prompts]
    expected = [
        sgd_loop(other, [lambda m, row=prompt: row_loss(m, row)] * STEPS, **options)
        for other, prompt in zip(twins, prompts, strict=True)
    ]
    trainer = trainer_of(model, **options, **(trainer_options or {}))
    with trainer.adapt(prompts, deltas="independent") as adapted:
        for delta, (losses, norms) in enumerate(expected):
            assert adapted.losses[delta].tolist() == pytest.approx(losses, rel=tolerance)
            assert adapted.grad_norms[delta].tolist() == pytest.approx(norms, rel=tolerance)
            with adapted.weights_of(delta):
                assert_same_deltas(shown(model), shown(twins[delta]), base, tolerance)
        final = [row_loss(o, p).item() for o, p in zip(twins, prompts, strict=True)]
        assert adapted.loss().tolist() == pytest.approx(final, rel=tolerance)


def run_schedule(model, schedule, n_deltas, tolerance=1e-10, **options):
    """Steps of (rows, delta of each row); the losses and weights of each delta against a loop."""
    options = OPTIONS | options
    base, twins = shown(model), [twin(model) for _ in range(n_deltas)]
    session = trainer_of(model, **options).begin(n_deltas=n_deltas)
    for rows, deltas in schedule:
        ids, mask = padded(rows, "right")
        session.step(Batch(ids, attention_mask=mask, delta_index=torch.tensor(deltas)))
    with session.end() as adapted:
        for delta, other in enumerate(twins):
            mine = [
                [row for row, d in zip(rows, deltas, strict=True) if d == delta]
                for rows, deltas in schedule
                if delta in deltas
            ]
            losses, norms = sgd_loop(
                other,
                [
                    lambda m, rows=rows: torch.stack([row_loss(m, row) for row in rows]).mean()
                    for rows in mine
                ],
                **options,
            )
            kept = ~adapted.losses[delta].isnan()
            assert adapted.losses[delta][kept].tolist() == pytest.approx(losses, rel=tolerance)
            assert adapted.grad_norms[delta][kept].tolist() == pytest.approx(norms, rel=tolerance)
            with adapted.weights_of(delta):
                assert_same_deltas(shown(model), shown(other), base, tolerance)
    return adapted
