"""Trainers that may replay a graph beside ones that take every step, and what both leave."""

import pytest
import torch
from torch import Tensor

from tests.families import tiny_model
from tests.loops import prompt_ids
from ttt_fast import TTTConfig, TTTTrainer

OPTIONS = dict(steps=2, lr=2e-2, weight_decay=0.01, max_grad_norm=1.0)
engines = pytest.mark.parametrize("engine", ["dense", "factored"])


def small_model(family="llama_tied", dtype=torch.float32, layers=1, **options):
    name = "n_layer" if family == "gpt2" else "num_hidden_layers"
    return tiny_model(family, dtype, **{name: layers}, **options)


def trainer_of(model, engine, cuda_graph="auto", **options):
    return TTTTrainer(model, TTTConfig(engine=engine, cuda_graph=cuda_graph, **OPTIONS | options))


def twins(engine, family="llama_tied", dtype=torch.float32, model=None, **options):
    """Trainers of one model: one that may replay, and one that takes every step."""
    model = small_model(family, dtype) if model is None else model
    return trainer_of(model, engine, **options), trainer_of(model, engine, False, **options)


def results(adapted, whole=True) -> dict[str, Tensor]:
    """Everything that an adaptation says and, as a whole, does."""
    found = {
        "losses": adapted.losses, "grad_norms": adapted.grad_norms, "steps": adapted.steps,
        "landed": adapted.update_landed, "loss": adapted.loss(), "diverged": adapted.diverged,
    }  # fmt: skip
    if not whole:
        return found
    found["generated"] = adapted.generate(max_new_tokens=3, do_sample=False)
    for delta in range(adapted.n_deltas):
        found |= {f"{delta} {n}": t for n, t in adapted.state_dict(delta).items()}
    if hasattr(adapted, "rewind"):
        found["delta_norm"] = adapted.delta_norm()
        found["cosine"] = adapted.grad_cosine(0, -1)
        adapted.rewind(1)
        found["loss after 1"] = adapted.loss()
    return found


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name in found:
        assert torch.equal(nan_as_number(found[name]), nan_as_number(expected[name])), name


def nan_as_number(tensor: Tensor) -> Tensor:
    return tensor.nan_to_num(nan=-1e9) if tensor.is_floating_point() else tensor


def prompts(seed, lengths=(9,)):
    return [prompt_ids(n, seed=10 * seed + i)[0] for i, n in enumerate(lengths)]


def adapt_both(graphed, eager, lengths=(9,), seeds=range(3), **given):
    """Statuses of the prompts of one trainer; the results of both are the same."""
    statuses = []
    given = {"deltas": "independent"} | given
    for seed in seeds:
        found = []
        for trainer in (graphed, eager):
            with trainer.adapt(prompts(seed, lengths), **given) as adapted:
                statuses += [adapted.cuda_graph] if trainer is graphed else []
                found.append(results(adapted, whole=statuses[-1].startswith("replayed")))
        assert_same(*found)
    return statuses


def assert_replayed(statuses):
    assert "the first prompt" in statuses[0]
    assert "recorded, and checked" in statuses[1]
    assert all(status.startswith("replayed") for status in statuses[2:])
