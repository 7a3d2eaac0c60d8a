"""Merging: for good, with a way back, and into a copy."""

import pytest
import torch

from tests.adaptation_cases import IDS, adapted_of, assert_near, exact_weight, logits_of, trainer_of
from tests.families import tiny_model
from tests.loops import prompt_ids, weights
from tests.untouched import Boom, unchanged
from ttt_fast.engines import deltas


@pytest.mark.parametrize("family", ["llama_tied", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge_for_good(family, dtype):
    model, adapted = adapted_of(family, dtype)
    state = adapted.state_dict()
    logits = logits_of(model)
    assert adapted.merge() is model
    assert_near(weights(model), state, 0)
    assert not any("forward" in vars(module) for module in model.modules())
    if dtype == torch.float32:
        assert torch.allclose(logits_of(model), logits, atol=1e-4)
    adapted.restore()
    assert_near(weights(model), state, 0)
    with pytest.raises(RuntimeError, match="was merged; its deltas are gone: call adapt again"):
        adapted.merge()
    # The next adaptation starts from there.
    with trainer_of(model).adapt(IDS) as following:
        assert following.losses[0, 0] < adapted.losses[0, 0]


@pytest.mark.parametrize("engine", ["factored", "dense"])
@pytest.mark.parametrize("n_rows", [1, 2])
def test_merge_with_a_way_back(engine, n_rows):
    model = tiny_model("llama_tied", torch.bfloat16)
    rows = prompt_ids(7, n_rows=n_rows)
    trainer = trainer_of(model, engine=engine)
    with unchanged(model):
        with trainer.adapt(rows, deltas="independent") as adapted:
            state = adapted.state_dict(n_rows - 1)
            assert adapted.merge(n_rows - 1, snapshot=True) is model
            assert_near(weights(model), state, 0)
            # Plain modules now, held until they are given back.
            assert not any("forward" in vars(module) for module in model.modules())
            with pytest.raises(RuntimeError, match="model is held by"):
                trainer.adapt(IDS)
            with pytest.raises(RuntimeError, match=r"was merged; .* restore\(\) undoes it"):
                adapted.generate()
            assert "merged" in repr(adapted)
        assert "restored" in repr(adapted)
        with trainer.adapt(IDS):
            pass


@pytest.mark.parametrize("engine", ["factored", "dense"])
def test_merge_into_a_copy(engine):
    model = tiny_model("llama_tied", torch.float64)
    rows = prompt_ids(7, n_rows=2)
    with unchanged(model), trainer_of(model, engine=engine).adapt(rows, deltas="independent") as a:
        copies = [a.merge(delta, copy=True) for delta in range(2)]
        for delta, other in enumerate(copies):
            assert_near(other.state_dict(), a.state_dict(delta), 0)
            assert other.lm_head.weight is other.model.embed_tokens.weight
            with a.weights_of(delta):
                assert torch.allclose(logits_of(model), logits_of(other), atol=1e-11)
            with trainer_of(other).adapt(IDS) as nested:
                assert nested.loss().item() < nested.losses[0, 0].item()
        with pytest.raises(ValueError, match="pass one of them"):
            a.merge(0, copy=True, snapshot=True)
        with pytest.raises(ValueError, match="there are 2 deltas; say which"):
            a.merge(copy=True)
        with pytest.raises(ValueError, match="delta 2 of 2; they count from 0"):
            a.merge(2)


def test_stochastic_merging_is_right_on_average():
    model, adapted = adapted_of(dtype=torch.bfloat16, lr=1e-3)
    name = "model.layers.0.mlp.up_proj.weight"
    factors = next(f for f in adapted._engine.factors if f.selection.name == name)
    exact = exact_weight(factors)
    nearest = adapted.merge(copy=True).get_parameter(name).detach().double()
    draws = [
        adapted.merge(rounding="stochastic", seed=seed, copy=True).state_dict()
        for seed in range(24)
    ]
    again = adapted.merge(rounding="stochastic", seed=3, copy=True).state_dict()
    assert_near(again, draws[3], 0)
    assert not torch.equal(draws[3][name], draws[4][name])
    mean = torch.stack([draw[name].double() for draw in draws]).mean(0)
    base = weights(model)[name].double()

    def landed(weight):
        return (((weight - base) * (exact - base)).sum() / (exact - base).square().sum()).item()

    # 24 draws of 1536 weights: the mean lands within a few percent, nearest far away.
    assert landed(mean) == pytest.approx(1, abs=0.15)
    assert abs(landed(nearest) - 1) > 0.3
    tied = [draw["lm_head.weight"] - weights(model)["lm_head.weight"] for draw in draws[:2]]
    assert all(change.abs().max() > 0 for change in tied)
    with pytest.raises(ValueError, match="rounding='up' is unknown"):
        adapted.merge(rounding="up")
    assert adapted.attached


def fails_at(number, monkeypatch):
    """Adapting the weight of this number raises."""
    whole = deltas.adapt_
    calls = []

    def failing(*args):
        calls.append(args)
        if len(calls) == number:
            raise Boom
        whole(*args)

    monkeypatch.setattr(deltas, "adapt_", failing)


def test_a_merge_that_fails_with_a_way_back(monkeypatch):
    model, adapted = adapted_of()
    logits = logits_of(model)
    # Taking the modules over again registers the model's hook under another number.
    with unchanged(model, but=("hooks",)):
        fails_at(5, monkeypatch)
        with pytest.raises(Boom):
            adapted.merge(snapshot=True)
        assert torch.equal(logits_of(model), logits)


def test_a_merge_for_good_that_fails_is_not_gone_on_with(monkeypatch):
    """Some weights are adapted by then: deltas on top of them would be wrong without a word."""
    model, adapted = adapted_of()
    before = weights(model)
    fails_at(5, monkeypatch)
    with pytest.raises(Boom):
        adapted.merge()
    assert any(not torch.equal(tensor, before[name]) for name, tensor in weights(model).items())
    assert not any("forward" in vars(module) for module in model.modules())
    with pytest.raises(RuntimeError, match="was merged in part; its deltas are gone"):
        adapted.loss()
    with trainer_of(model).adapt(IDS):
        pass
