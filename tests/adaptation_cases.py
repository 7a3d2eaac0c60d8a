"""Factored adaptations of tiny models, and what to compare them with."""

import torch

from tests.families import tiny_model
from tests.loops import prompt_ids
from ttt_fast import TTTConfig, TTTTrainer
from ttt_fast.engines import deltas

IDS = prompt_ids(8)
QUESTION = prompt_ids(6, seed=5)
STEPS = 4
RICH = dict(lr=2e-2, momentum=0.9, weight_decay=0.05, max_grad_norm=1.0)

# Tied weights with both uses, Conv1D with a tied head, and the query rows of a fused projection.
CASES = [("llama_tied", "all"), ("gpt2", "all"), ("phi3", "query"), ("gpt2", "query")]


def trainer_of(model, **options):
    options = dict(engine="factored", steps=STEPS) | RICH | options
    return TTTTrainer(model, TTTConfig(**options))


def adapted_of(family="llama_tied", dtype=torch.float64, ids=IDS, **options):
    model = tiny_model(family, dtype, attn_implementation="sdpa")
    rows = None if len(ids) == 1 else "independent"
    return model, trainer_of(model, **options).adapt(ids, deltas=rows)


def assert_near(state, other, tolerance=1e-12):
    assert state.keys() == other.keys()
    for name in state:
        assert torch.allclose(state[name], other[name], rtol=0, atol=tolerance), name


def distance_of(state, before, model):
    """‖W − W₀‖ over the parameters, each tied one once."""
    names = [name for name, _ in model.named_parameters()]
    squares = [(state[n].double() - before[n].double()).square().sum() for n in names]
    return torch.stack(squares).sum().sqrt().item()


@torch.no_grad()
def logits_of(model, ids=QUESTION):
    return model(input_ids=ids, use_cache=False).logits


def model_with(family, state):
    """The plain model of a family with a state dict."""
    dtype = next(iter(state.values())).dtype
    model = tiny_model(family, dtype, attn_implementation="sdpa")
    model.load_state_dict(state)
    return model


def exact_weight(factors, delta=0):
    """ρ·W₀ − Σ β_s G_s in float64, each G_s formed whole."""
    coefficients = factors.track.coefficients
    weight = factors.selection.param.detach().double().clone()
    view = factors.selection.view(weight)
    view.mul_(coefficients.rho[delta])
    if isinstance(factors, deltas.VectorFactors):
        grads, steps = deltas.vector_rows(factors, delta)
        change = coefficients.beta[delta][steps] @ grads.double()
        view.sub_(change.view(view.shape))
        return weight
    x, dy, steps = deltas.linear_rows(factors, delta)
    beta = coefficients.beta[delta][steps]
    change = dy.double().t() @ (beta[:, None] * x.double())
    matrix = deltas.as_matrix(factors, weight)
    matrix.sub_(change.view(matrix.shape))
    ids, e, steps = deltas.lookup_rows(factors, delta)
    for token, row, step in zip(ids.tolist(), e.double(), steps.tolist(), strict=True):
        weight[token] -= coefficients.beta[delta, step] * row
    return weight
