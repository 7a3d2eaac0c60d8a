"""What is computed from factors: adapted weights, norms, angles."""

import math

import pytest
import torch

from tests.adaptation_cases import (
    CASES,
    IDS,
    STEPS,
    adapted_of,
    distance_of,
    exact_weight,
    model_with,
)
from tests.loops import prompt_ids, row_loss, weights
from tests.untouched import unchanged
from ttt_fast.engines import inner_products


@pytest.mark.parametrize(("family", "scope"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapted_weights_are_rounded_once(family, scope, dtype):
    """Against the sum of the same factors in float64."""
    model, adapted = adapted_of(family, dtype, scope=scope)
    before = weights(model)
    with unchanged(model):
        state = adapted.state_dict()
    moved = 0
    params = dict(model.named_parameters(remove_duplicate=False))
    exact = {id(f.selection.param): exact_weight(f) for f in adapted._engine.factors}
    for name, value in state.items():
        assert value.dtype == before[name].dtype
        expected = exact.get(id(params.get(name)), before[name].double())
        # One rounding to the dtype, after sums in float32.
        bound = torch.finfo(dtype).eps / 2 * expected.abs() + 2e-6 * expected.abs().max()
        assert ((value.double() - expected).abs() <= bound).all(), name
        moved += not torch.equal(value, before[name])
    assert moved
    if dtype == torch.bfloat16:
        wrong = {n: v.double() for n, v in before.items()}
        assert any((wrong[n] - state[n].double()).abs().max() > 1e-3 for n in state)


@pytest.mark.parametrize(("family", "scope"), [*CASES, ("gemma3", "all"), ("opt", "all")])
@pytest.mark.parametrize("options", [{}, dict(weight_decay=0.0), dict(momentum=0.0)])
@pytest.mark.parametrize("rows", [3, 128])
def test_the_norm_of_the_delta(monkeypatch, rows, family, scope, options):
    monkeypatch.setattr(inner_products, "_GRAM_ROWS", rows)
    model, adapted = adapted_of(
        family, torch.float64, prompt_ids(8, n_rows=2), scope=scope, **options
    )
    before = weights(model)
    for steps in range(STEPS + 1):
        adapted.rewind(steps)
        expected = [distance_of(adapted.state_dict(d), before, model) for d in range(2)]
        assert adapted.delta_norm().tolist() == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert expected[0] != pytest.approx(expected[1], rel=1e-6)


@pytest.mark.parametrize(("family", "scope"), CASES)
def test_cosines_between_the_gradients_of_steps(family, scope):
    model, adapted = adapted_of(family, torch.float64, scope=scope)
    selections = adapted._engine.selections
    gradients = []
    for steps in range(STEPS):
        with adapted.at(steps):
            other = model_with(family, adapted.state_dict())
        params = [other.get_parameter(selection.name) for selection in selections]
        grads = torch.autograd.grad(row_loss(other, IDS[0]), params)
        parts = [s.view(g).flatten() for s, g in zip(selections, grads, strict=True)]
        gradients.append(torch.cat(parts))
    for s in range(STEPS):
        for t in range(STEPS):
            expected = torch.cosine_similarity(gradients[s], gradients[t], dim=0).item()
            assert adapted.grad_cosine(s, t).item() == pytest.approx(expected, rel=1e-9)
    assert adapted.grad_cosine(1, -1).item() == adapted.grad_cosine(1, STEPS - 1).item()
    assert abs(adapted.grad_cosine(0, 1).item()) < 1 - 1e-3
    with pytest.raises(ValueError, match=f"step {STEPS} was asked for; there are {STEPS} steps"):
        adapted.grad_cosine(0, STEPS)


def test_without_a_step_there_is_no_norm_and_no_cosine():
    _, adapted = adapted_of(steps=0)
    assert adapted.delta_norm().tolist() == [0.0]
    with pytest.raises(ValueError, match="there are 0 steps"):
        adapted.grad_cosine(0, 0)
    with adapted.at(0):
        assert math.isfinite(adapted.loss().item())
