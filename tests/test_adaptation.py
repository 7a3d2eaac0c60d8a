"""What can be done with the factors of an adaptation: steps, coexistence, files, LoRA, norms."""

import copy
import gc
import json
import math
import re
import signal
import warnings
import weakref

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tests.families import tiny_model
from tests.loops import prompt_ids, row_loss, weights
from tests.untouched import Boom, unchanged
from ttt_fast import Adaptation, Batch, TTTConfig, TTTTrainer
from ttt_fast.engines import deltas
from ttt_fast.lora import LoraAdapter

IDS = prompt_ids(8)
QUESTION = prompt_ids(6, seed=5)
STEPS = 4
RICH = dict(lr=2e-2, momentum=0.9, weight_decay=0.05, max_grad_norm=1.0)
PLAIN = RICH | dict(weight_decay=0.0)

# Tied weights with both uses, Conv1D with a tied head, and the query rows of a fused projection.
CASES = [("llama_tied", "all"), ("gpt2", "all"), ("phi3", "query"), ("gpt2", "query")]


def trainer_of(model, **options):
    options = dict(engine="factored", steps=STEPS) | RICH | options
    return TTTTrainer(model, TTTConfig(**options))


def adapted_of(family="llama_tied", dtype=torch.float64, ids=IDS, **options):
    model = tiny_model(family, dtype, attn_implementation="sdpa")
    rows = None if len(ids) == 1 else "independent"
    return model, trainer_of(model, **options).adapt(ids, deltas=rows)


def dense_states(family, ids=IDS, dtype=torch.float64, **options):
    """State dicts of the dense engine after 0, 1, ..., STEPS steps: the oracle."""
    model = tiny_model(family, dtype, attn_implementation="sdpa")
    states = []
    for steps in range(STEPS + 1):
        trainer = trainer_of(model, engine="dense", **(options | dict(steps=steps)))
        with trainer.adapt(ids) as adapted:
            states.append(adapted.state_dict())
    return states


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


# ---------------------------------------------------------------------------- earlier steps


@pytest.mark.parametrize(("family", "scope"), CASES)
def test_rewinding_is_having_taken_fewer_steps(family, scope):
    states = dense_states(family, scope=scope)
    model, adapted = adapted_of(family, scope=scope)
    before = weights(model)
    assert adapted.at_step.tolist() == [STEPS]
    for steps in (2, 0, STEPS, 1, 3):
        adapted.rewind(steps)
        assert adapted.at_step.tolist() == [steps]
        assert_near(adapted.state_dict(), states[steps])
        assert torch.allclose(
            logits_of(model), logits_of(model_with(family, states[steps])), atol=1e-11
        )
        if steps < STEPS:
            assert adapted.loss().item() == pytest.approx(adapted.losses[0, steps].item(), 1e-11)
    # The states differ, so the comparisons above mean something.
    assert distance_of(states[3], states[2], model) > 1e-3
    assert_near(weights(model), before, 0)
    adapted.restore()


def test_at_step_zero_no_bit_is_different():
    model, adapted = adapted_of(dtype=torch.bfloat16)
    adapted.rewind(0)
    assert_near(adapted.state_dict(), weights(model), 0)
    assert adapted.delta_norm().tolist() == [0.0]


def test_at_comes_back_to_where_it_was():
    model, adapted = adapted_of()
    adapted.rewind(3)
    here = logits_of(model)
    with adapted.at(1) as inside:
        assert inside is model
        assert not torch.equal(logits_of(model), here)
        with adapted.at(2):
            assert adapted.at_step.tolist() == [2]
        assert adapted.at_step.tolist() == [1]
    assert adapted.at_step.tolist() == [3]
    assert torch.equal(logits_of(model), here)


@pytest.mark.parametrize("raised", [Boom, KeyboardInterrupt])
def test_an_exception_inside_at_leaves_the_state_as_it_was(raised):
    model, adapted = adapted_of()
    adapted.rewind(3)
    here = logits_of(model)
    with unchanged(model):
        with pytest.raises(raised), adapted.at(1):
            if raised is KeyboardInterrupt:
                signal.raise_signal(signal.SIGINT)
            raise raised
        assert adapted.at_step.tolist() == [3]
        assert torch.equal(logits_of(model), here)


def test_rewinding_reaches_generation_and_single_deltas():
    rows = prompt_ids(7, n_rows=2)
    model, adapted = adapted_of(ids=rows, dtype=torch.float32, lr=0.3)
    options = dict(max_new_tokens=6, do_sample=False)
    adapted.rewind(1)
    states = [adapted.state_dict(delta) for delta in range(2)]
    out = adapted.generate(**options)
    for delta, state in enumerate(states):
        plain = model_with("llama_tied", state)
        row = rows[delta : delta + 1]
        alone = plain.generate(row, attention_mask=torch.ones_like(row), **options)
        assert torch.equal(out[delta : delta + 1, : alone.shape[1]], alone)
        with adapted.weights_of(delta) as inside:
            assert torch.allclose(logits_of(inside), logits_of(plain), atol=1e-4)
            # Going to another step inside is seen, and still holds outside.
            adapted.rewind(STEPS)
            assert not torch.allclose(logits_of(inside), logits_of(plain), atol=1e-3)
            adapted.rewind(1)
    assert torch.equal(adapted.generate(**options), out)


def test_deltas_that_went_through_the_model_one_after_the_other():
    """The session counts the steps of all parts; a delta counts its own."""
    rows = prompt_ids(7, n_rows=3)
    _, together = adapted_of(ids=rows)
    _, adapted = adapted_of(ids=rows, max_batch_tokens=14)
    assert adapted.steps.tolist() == [STEPS] * 3
    for steps in range(STEPS):
        with adapted.at(steps), together.at(steps):
            assert torch.allclose(adapted.loss(), adapted.losses[:, steps], rtol=1e-11)
            for delta in range(3):
                assert_near(adapted.state_dict(delta), together.state_dict(delta))
            assert torch.allclose(adapted.delta_norm(), together.delta_norm(), rtol=1e-11)
    assert torch.allclose(adapted.grad_cosine(0, 2), together.grad_cosine(0, 2), rtol=1e-9)


def test_each_delta_at_a_step_of_its_own():
    model, adapted = adapted_of(ids=prompt_ids(7, n_rows=2))
    states = []
    for steps in (3, 1):
        adapted.rewind(steps)
        states.append([adapted.state_dict(delta) for delta in range(2)])
    adapted.rewind(torch.tensor([3, 1]))
    assert adapted.at_step.tolist() == [3, 1]
    assert_near(adapted.state_dict(0), states[0][0], 0)
    assert_near(adapted.state_dict(1), states[1][1], 0)
    both = adapted.loss()
    with adapted.at([3, 1]):
        assert torch.equal(adapted.loss(), both)
    assert torch.allclose(both, adapted.losses[[0, 1], [3, 1]], rtol=1e-11)


def test_a_delta_that_stopped_early_stays_where_it_stopped():
    model = tiny_model("llama", torch.float64)
    session = trainer_of(model).begin(n_deltas=2)
    rows = prompt_ids(7, n_rows=2)
    session.step(Batch(rows[1:], delta_index=torch.tensor([1])))
    for _ in range(2):
        session.step(Batch(rows, delta_index=torch.arange(2)))
    adapted = session.end()
    assert adapted.steps.tolist() == [2, 3]
    adapted.rewind(3)
    assert adapted.at_step.tolist() == [2, 3]
    last = [adapted.state_dict(delta) for delta in range(2)]
    adapted.rewind(1)
    for delta in range(2):
        alone = trainer_of(model_of := tiny_model("llama", torch.float64), steps=1)
        with alone.adapt(rows[delta : delta + 1]) as expected:
            assert_near(adapted.state_dict(delta), expected.state_dict())
        assert distance_of(last[delta], adapted.state_dict(delta), model_of) > 1e-3
    with pytest.raises(ValueError, match="step 3 of delta 0 was asked for; it has steps 0 to 2"):
        adapted.rewind([3, 3])
    assert adapted.grad_cosine(0, 2).isnan().tolist() == [True, False]
    assert not adapted.grad_cosine(0, -1).isnan().any()


def test_steps_that_do_not_exist():
    model, adapted = adapted_of()
    with unchanged(model):
        for step in (-1, STEPS + 1):
            with pytest.raises(ValueError, match=f"step {step} was asked for; there are steps 0"):
                adapted.rewind(step)
        with pytest.raises(TypeError, match="give a number of steps"):
            adapted.rewind(1.0)
        with pytest.raises(ValueError, match="for 1 deltas; give"):
            adapted.rewind([1, 2])
        with pytest.raises(ValueError, match="at: step 9"), adapted.at(9):
            pass
    assert adapted.at_step.tolist() == [STEPS]


# ---------------------------------------------------------------------------- coexistence


@pytest.mark.parametrize(("family", "scope"), CASES)
def test_two_detached_adaptations(family, scope):
    model = tiny_model(family, torch.float64)
    before = logits_of(model)
    trainer = trainer_of(model, scope=scope)
    with unchanged(model):
        kept, outputs = [], []
        for seed in (1, 2):
            adapted = trainer.adapt(prompt_ids(8, seed=seed))
            outputs.append(logits_of(model))
            adapted.detach()
            assert not adapted.attached
            assert torch.equal(logits_of(model), before)
            kept.append(adapted)
        assert not torch.equal(*outputs)
        for i in (0, 1, 1, 0):
            kept[i].attach()
            assert torch.equal(logits_of(model), outputs[i])
            kept[i].detach()
        assert torch.equal(logits_of(model), before)
        # One may end while the other is in use.
        kept[0].attach()
        kept[1].restore()
        assert torch.equal(logits_of(model), outputs[0])
        with pytest.raises(RuntimeError, match="model is held by"):
            trainer.adapt(IDS)
        kept[0].restore()
        assert torch.equal(logits_of(model), before)


def test_a_restored_adaptations_buffers_are_used_again():
    model = tiny_model("llama")
    trainer = trainer_of(model)
    first = trainer.adapt(IDS)
    engine = trainer._engine("factored")
    first.restore()
    assert trainer._engine("factored") is engine
    second = trainer.adapt(IDS)
    second.detach()
    assert trainer._engine("factored") is not engine
    gone = weakref.ref(engine)
    del engine
    second.restore()
    gc.collect()
    # The adaptation is kept for its losses, the factors are not.
    assert gone() is None and second.losses.shape == (1, STEPS)


def test_being_attached_is_exclusive():
    model = tiny_model("llama")
    trainer = trainer_of(model)
    first = trainer.adapt(IDS)
    with pytest.raises(RuntimeError, match="the model is held by <FactoredAdaptation of 1 delta"):
        trainer.adapt(IDS)
    assert first.attached
    first.detach()
    second = trainer.adapt(QUESTION)
    with unchanged(model), pytest.raises(RuntimeError, match="attach: the model is held by <Fact"):
        first.attach()
    assert second.attached and not first.attached
    for call in (first.generate, first.loss, first.merge):
        with pytest.raises(RuntimeError, match=r"is detached; call attach\(\)"):
            call()
    second.restore()
    with first:
        assert first.attached
        first.attach()
    for call in (first.attach, first.detach, first.delta_norm, first.state_dict):
        with pytest.raises(RuntimeError, match="was restored; its deltas are gone: call adapt"):
            call()


def test_a_detached_adaptation_can_be_looked_at():
    model, adapted = adapted_of()
    state, norm = adapted.state_dict(), adapted.delta_norm()
    adapted.detach()
    with unchanged(model):
        assert_near(adapted.state_dict(), state, 0)
        assert torch.equal(adapted.delta_norm(), norm)
        adapted.rewind(2)
        merged = adapted.merge(copy=True)
        assert_near(merged.state_dict(), adapted.state_dict(), 0)
        assert "detached" in repr(adapted)


def test_weights_that_changed_meanwhile_are_refused():
    model, adapted = adapted_of()
    adapted.detach()
    adapted.detach()
    with trainer_of(model, engine="dense").adapt(QUESTION):
        with pytest.raises(RuntimeError, match=r"embed_tokens.weight has other values \(it is he"):
            adapted.state_dict()
    adapted.state_dict()
    with torch.no_grad():
        model.model.norm.weight[3] += 1e-6
    for call in (adapted.attach, adapted.state_dict, lambda: adapted.save("x")):
        with pytest.raises(RuntimeError, match=r"its model.norm.weight has other values\. Bring"):
            call()
    with torch.no_grad():
        model.model.norm.weight[3] -= 1e-6
    model.model.norm.weight = nn.Parameter(torch.ones(16, dtype=torch.float64))
    with pytest.raises(RuntimeError, match=r"its model.norm.weight was replaced, moved or cast"):
        adapted.attach()


def test_a_parameter_that_was_replaced_under_an_attached_adaptation_is_not_merged():
    model, adapted = adapted_of()
    param = model.model.layers[0].mlp.up_proj.weight
    param.data = param.data.clone()
    for call in (adapted.merge, adapted.state_dict, lambda: adapted.merge(copy=True)):
        with pytest.raises(RuntimeError, match="up_proj.weight was replaced, moved or cast"):
            call()
    adapted.restore()


def test_attaching_that_fails_leaves_the_model_free(monkeypatch):
    model, adapted = adapted_of()
    adapted.detach()
    with unchanged(model):
        with monkeypatch.context() as patch, pytest.raises(Boom):
            patch.setattr(adapted._engine, "show", lambda *a: (_ for _ in ()).throw(Boom))
            adapted.attach()
        assert not adapted.attached
    adapted.attach()
    assert adapted.loss().item() < adapted.losses[0, -1].item()


# ---------------------------------------------------------------------------- weights


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


def test_a_merge_that_fails_with_a_way_back(monkeypatch):
    model, adapted = adapted_of()
    whole = deltas.adapt_
    calls = []

    def failing(*args):
        calls.append(args)
        if len(calls) == 5:
            raise Boom
        whole(*args)

    logits = logits_of(model)
    # Taking the modules over again registers the model's hook under another number.
    with unchanged(model, but=("hooks",)):
        monkeypatch.setattr(deltas, "adapt_", failing)
        with pytest.raises(Boom):
            adapted.merge(snapshot=True)
        assert torch.equal(logits_of(model), logits)


# ---------------------------------------------------------------------------- files


@pytest.mark.parametrize(("family", "scope"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_round_trip_through_a_file(tmp_path, family, scope, dtype):
    rows = prompt_ids(8, n_rows=2)
    model, adapted = adapted_of(family, dtype, rows, scope=scope, max_batch_tokens=8)
    path = tmp_path / "adapted.safetensors"
    adapted.rewind([3, 4])
    adapted.save(path)
    logits = logits_of(model, prompt_ids(6, n_rows=2))
    results = adapted.loss(), adapted.delta_norm(), adapted.grad_cosine(0, 1)
    state = adapted.state_dict(1)
    adapted.restore()
    assert [entry.name for entry in tmp_path.iterdir()] == ["adapted.safetensors"]

    fresh = tiny_model(family, dtype, attn_implementation="sdpa")
    with unchanged(fresh):
        loaded = Adaptation.load(path, fresh)
        assert loaded.attached and loaded.at_step.tolist() == [3, 4]
        assert torch.equal(logits_of(fresh, prompt_ids(6, n_rows=2)), logits)
        for ours, theirs in zip(
            (loaded.loss(), loaded.delta_norm(), loaded.grad_cosine(0, 1)), results, strict=True
        ):
            assert torch.equal(ours, theirs)
        assert_near(loaded.state_dict(1), state, 0)
        for name in ("losses", "grad_norms", "steps", "update_landed"):
            assert torch.equal(getattr(loaded, name), getattr(adapted, name)), name
        assert loaded.config == adapted.config
        assert loaded.generate(max_new_tokens=3).shape[0] == 2
        # All steps are there, and it can be put away and saved again.
        with loaded.at(1):
            assert torch.allclose(loaded.loss().float(), loaded.losses[:, 1].float(), rtol=2e-2)
        loaded.detach()
        loaded.attach()
        loaded.save(tmp_path / "again.safetensors")
        assert torch.equal(logits_of(fresh, prompt_ids(6, n_rows=2)), logits)
        loaded.restore()
    first, second = (load_file(tmp_path / f"{n}.safetensors") for n in ("adapted", "again"))
    assert_near(first, second, 0)


def test_settings_that_are_functions_come_back_as_what_they_gave(tmp_path):
    model = tiny_model("llama", torch.float64)
    options = dict(
        lr=lambda step: 1e-2 / (step + 1),
        scope=lambda name, param: "mlp" in name or "norm" in name,
        layers=slice(1, None),
        param_groups=[{"params": re.compile("norm"), "weight_decay": 0.0}],
    )
    adapted = trainer_of(model, **options).adapt(IDS)
    logits = logits_of(model)
    adapted.save(tmp_path / "a")
    adapted.restore()
    with Adaptation.load(tmp_path / "a", model) as loaded:
        assert torch.equal(logits_of(model), logits)
        assert list(loaded.config.lr) == [1e-2 / (step + 1) for step in range(STEPS)]
        assert loaded.config.layers == "1:"
    # The settings can be used to do the same again.
    with TTTTrainer(model, loaded.config).adapt(IDS):
        assert torch.equal(logits_of(model), logits)


def test_another_models_weights_are_refused_by_name(tmp_path):
    model, adapted = adapted_of("llama", dtype=torch.float32, scope="ffn")
    path = tmp_path / "a"
    adapted.save(path)
    with pytest.raises(RuntimeError, match="model is held by"):
        Adaptation.load(path, model)
    adapted.restore()
    others = {
        "embed_tokens.weight has other values": tiny_model("llama", seed=1),
        r"embed_tokens.weight is bfloat16 \(101, 32\), not float32": tiny_model(
            "llama", torch.bfloat16
        ),
        "it has no parameter model.": tiny_model("gpt2"),
        "it has no parameter lm_head.weight": tiny_model("llama_tied"),
        r"gate_proj.weight is float32 \(40, 32\), not float32 \(48, 32\)": tiny_model(
            "llama", intermediate_size=40
        ),
    }
    with torch.no_grad():
        nudged = tiny_model("llama")
        nudged.lm_head.weight[-1, -1] += 1e-6
    # A weight outside the scope counts as well: the logits would be others.
    others["lm_head.weight has other values"] = nudged
    others["it has a parameter extra more"] = larger = tiny_model("llama")
    larger.register_parameter("extra", nn.Parameter(torch.zeros(1)))
    for words, other in others.items():
        with (
            unchanged(other),
            pytest.raises(ValueError, match=f"made for another model: .*{words}"),
        ):
            Adaptation.load(path, other)
    Adaptation.load(path, tiny_model("llama")).restore()


def test_files_that_are_no_adaptations(tmp_path):
    model = tiny_model("llama")
    (tmp_path / "text").write_text("hello")
    with unchanged(model), pytest.raises(ValueError, match="is not a safetensors file"):
        Adaptation.load(tmp_path / "text", model)
    save_file({"a": torch.ones(1)}, tmp_path / "other")
    with unchanged(model), pytest.raises(ValueError, match=r"write one with adapted.save\(path\)"):
        Adaptation.load(tmp_path / "other", model)
    save_file({}, tmp_path / "newer", metadata={"ttt_fast": json.dumps({"format": 99})})
    with unchanged(model), pytest.raises(ValueError, match="has format 99, this version reads 1"):
        Adaptation.load(tmp_path / "newer", model)
    with unchanged(model), pytest.raises(FileNotFoundError):
        Adaptation.load(tmp_path / "missing", model)


def test_a_load_that_fails_half_way_leaves_the_model_free(tmp_path, monkeypatch):
    model, adapted = adapted_of()
    adapted.save(tmp_path / "a")
    adapted.restore()
    with unchanged(model):
        with monkeypatch.context() as patch, pytest.raises(Boom):
            patch.setattr(deltas.Trajectory, "__init__", lambda *a: (_ for _ in ()).throw(Boom))
            Adaptation.load(tmp_path / "a", model)
        Adaptation.load(tmp_path / "a", model).restore()


def test_text_and_an_objective_of_ones_own_after_loading(tmp_path):
    model, adapted = adapted_of()
    adapted.save(tmp_path / "a")
    adapted.restore()

    def objective(outputs, batch):
        return outputs.logits.sum((1, 2)) * 0 + 7

    class Tokenizer:
        def __call__(self, text):
            return {"input_ids": IDS[0].tolist()}

    with Adaptation.load(tmp_path / "a", model, objective=objective, tokenizer=Tokenizer()) as a:
        assert a.loss("some text").item() == 7
    with Adaptation.load(tmp_path / "a", model) as a:
        assert a.loss().item() == a.loss(IDS).item() < a.losses[0, -1].item()


# ---------------------------------------------------------------------------- LoRA


def with_peft(model, path):
    """The model with an adapter that peft has read."""
    with warnings.catch_warnings():
        # Tied weights, biases that some modules lack, Conv1D: peft says what it does about them.
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(copy.deepcopy(model), path).eval()


LORA_CASES = [
    ("llama", "all"),
    ("llama_tied", "all"),
    ("qwen2", "attention"),
    ("qwen3", "all"),
    ("gpt2", "ffn"),
    ("gpt2", "query"),
    ("phi3", "query"),
    ("llama", "embedding"),
    ("opt", "attention"),
]


@pytest.mark.parametrize(("family", "scope"), LORA_CASES)
def test_peft_computes_the_same_at_full_rank(tmp_path, family, scope):
    model, adapted = adapted_of(family, torch.float64, scope=scope, **dict(weight_decay=0.0))
    adapter = adapted.to_lora(64, tmp_path / "lora")
    assert isinstance(adapter, LoraAdapter)
    expected = logits_of(model, IDS)
    adapted.restore()
    assert adapter.rank <= 32 and adapter.error < 1e-12 and max(adapter.errors.values()) < 1e-12
    loaded = with_peft(model, tmp_path / "lora")
    assert torch.allclose(logits_of(loaded, IDS), expected, atol=1e-6)
    assert not torch.allclose(logits_of(model, IDS), expected, atol=1e-3)
    with loaded.disable_adapter():
        assert torch.allclose(logits_of(loaded, IDS), logits_of(model, IDS), atol=1e-12)
    written = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    with warnings.catch_warnings():
        # peft 0.21 takes the biases of lora_B for matrices of a wrong shape here.
        warnings.simplefilter("ignore")
        ours = peft.get_peft_model_state_dict(loaded, save_embedding_layers=False)
    assert written.keys() == ours.keys()


def test_a_truncated_adapter_says_what_it_lost(tmp_path):
    model, adapted = adapted_of("llama", torch.float64, **dict(weight_decay=0.0))
    errors = []
    for rank in (1, 4, 16):
        adapter = adapted.to_lora(rank)
        assert adapter.rank == rank
        errors.append(adapter.error)
        state = adapted.state_dict()
        for name in ("lm_head.weight", "model.layers.1.mlp.down_proj.weight"):
            change = state[name] - model.state_dict()[name]
            s = torch.linalg.svdvals(change)
            best = (s[rank:].square().sum() / s.square().sum()).sqrt().item()
            assert adapter.errors[name] == pytest.approx(best, rel=1e-6, abs=1e-12)
        assert adapter.errors["model.norm.weight"] == 0.0
    assert errors[0] > errors[1] > errors[2] > 0
    expected = logits_of(model, IDS)
    adapted.restore()
    adapter.save(tmp_path)
    near = (logits_of(with_peft(model, tmp_path), IDS) - expected).norm()
    assert near < 0.2 * (logits_of(model, IDS) - expected).norm()


def test_an_adapter_of_one_of_several_deltas_at_an_earlier_step(tmp_path):
    model, adapted = adapted_of(
        "llama", torch.float64, prompt_ids(7, n_rows=2), **dict(weight_decay=0.0)
    )
    with pytest.raises(ValueError, match="to_lora: there are 2 deltas; say which"):
        adapted.to_lora(8)
    adapted.rewind(2)
    adapted.to_lora(64, tmp_path, delta=1)
    with adapted.weights_of(1):
        expected = logits_of(model)
    adapted.restore()
    assert torch.allclose(logits_of(with_peft(model, tmp_path)), expected, atol=1e-6)


def test_weight_decay_is_refused_or_dropped(tmp_path):
    model, adapted = adapted_of("llama", torch.float64, scope="ffn")
    with pytest.raises(ValueError, match=r"has scaled model\.layers\.0\.mlp.* decay='drop'"):
        adapted.to_lora(64)
    adapter = adapted.to_lora(64, decay="drop")
    name = "model.layers.0.mlp.up_proj.weight"
    factors = next(f for f in adapted._engine.factors if f.selection.name == name)
    drop = float(factors.track.coefficients.rho[0]) - 1
    base = model.state_dict()[name]
    change = (adapted.state_dict()[name] - base).norm()
    assert adapter.errors[name] == pytest.approx((-drop * base.norm() / change).item(), rel=1e-9)
    assert adapter.error > 0
    # At the start nothing has decayed, and nothing is lost.
    with adapted.at(0):
        assert adapted.to_lora(4).error == 0.0
    # Norms are kept whole, so their decay is no obstacle.
    with trainer_of(tiny_model("llama"), scope="norm").adapt(IDS) as norms:
        assert norms.to_lora(1).error < 1e-6


def test_what_no_adapter_can_hold_is_refused():
    with trainer_of(tiny_model("gemma3"), scope="embedding", weight_decay=0.0).adapt(IDS) as a:
        with pytest.raises(ValueError, match="is a Gemma3TextScaledWordEmbedding, which scales"):
            a.to_lora(4)
    with trainer_of(tiny_model("qwen2"), weight_decay=0.0).adapt(IDS) as adapted:
        with pytest.raises(ValueError, match="biases of linears and the embedding .* have both"):
            adapted.to_lora(4)
        for rank in (0, 1.5, True):
            with pytest.raises(ValueError, match="it must be an integer >= 1"):
                adapted.to_lora(rank)
        with pytest.raises(ValueError, match="decay='keep' is unknown"):
            adapted.to_lora(4, decay="keep")
    wrapped = peft.get_peft_model(tiny_model("llama"), peft.LoraConfig(target_modules=["up_proj"]))
    with trainer_of(wrapped, scope="lora", weight_decay=0.0).adapt(IDS) as adapted:
        with pytest.raises(ValueError, match="is a peft model already"):
            adapted.to_lora(4)


def test_rounding_of_norms_is_reported():
    model, adapted = adapted_of("llama", torch.bfloat16, scope="norm", lr=1e-3)
    errors = adapted.to_lora(1).errors
    name = "model.norm.weight"
    factors = next(f for f in adapted._engine.factors if f.selection.name == name)
    exact, base = exact_weight(factors), model.get_parameter(name).detach().double()
    lost = adapted.state_dict()[name].double() - exact
    assert errors[name] == pytest.approx((lost.norm() / (exact - base).norm()).item(), rel=1e-3)
    assert errors[name] > 0.1


# ---------------------------------------------------------------------------- norms and angles


@pytest.mark.parametrize(("family", "scope"), [*CASES, ("gemma3", "all"), ("opt", "all")])
@pytest.mark.parametrize("options", [{}, dict(weight_decay=0.0), dict(momentum=0.0)])
def test_the_norm_of_the_delta(family, scope, options):
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


# ---------------------------------------------------------------------------- both engines


def test_report_and_bytes():
    _, adapted = adapted_of("llama", torch.float32, prompt_ids(8, n_rows=2))
    line = adapted.report().splitlines()[0]
    assert line.startswith("engine factored: weights never written")
    assert f"for 2 deltas, rank at most {8 * STEPS}" in line
    assert adapted.update_landed.tolist() == [1.0, 1.0]
    # Rows of X and dY at least; X is shared by q, k and v, and by gate and up.
    rows, layers = 2 * 8 * STEPS, 3
    widths = layers * ((32 + 32 + 16 + 16) + (32 + 32) + (32 + 48 + 48) + (48 + 32))
    assert adapted.nbytes >= 4 * rows * (widths + (32 + 101))
    adapted.restore()
    assert adapted.report().splitlines()[0] == line
    _, dense = adapted_of("llama", torch.float32, engine="dense")
    assert dense.report().startswith("engine dense: weights in place")


def test_what_only_factors_can_do_is_refused_by_the_dense_engine(tmp_path):
    model = tiny_model("llama")
    with trainer_of(model, engine="dense").adapt(IDS) as adapted:
        calls = {
            "rewind": lambda: adapted.rewind(1),
            "at": lambda: adapted.at(1),
            "attach": lambda: adapted.attach(),
            "detach": lambda: adapted.detach(),
            "save": lambda: adapted.save(tmp_path / "a"),
            "to_lora": lambda: adapted.to_lora(4),
            "delta_norm": lambda: adapted.delta_norm(),
            "grad_cosine": lambda: adapted.grad_cosine(0, 1),
        }
        for name, call in calls.items():
            with pytest.raises(AttributeError, match=f"^{name}: .*Adapt with engine='factored'"):
                call()
        with pytest.raises(AttributeError, match=r"state_dict\(\) has the adapted weights"):
            adapted.save(tmp_path / "a")
        with pytest.raises(AttributeError, match="has no attribute 'rewing'"):
            adapted.rewing  # noqa: B018
        with pytest.raises(ValueError, match="has rounded the weights at every step"):
            adapted.merge(rounding="stochastic")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_weights_are_untouched_by_all_of_it(tmp_path, dtype):
    model = tiny_model("llama_tied", dtype)
    with unchanged(model):
        trainer = trainer_of(model, **dict(weight_decay=0.0))
        with trainer.adapt(prompt_ids(8, n_rows=2), deltas="independent") as adapted:
            before = weights(model)
            adapted.rewind(2)
            with adapted.at(1), adapted.weights_of(1):
                adapted.loss(prompt_ids(6, n_rows=2))
            adapted.delta_norm(), adapted.grad_cosine(0, 1), adapted.state_dict(1)
            adapted.merge(1, copy=True, rounding="stochastic")
            adapted.to_lora(3, tmp_path / "lora", delta=0)
            adapted.save(tmp_path / "a")
            adapted.detach()
            adapted.attach()
            assert_near(weights(model), before, 0)
        with Adaptation.load(tmp_path / "a", model):
            assert_near(weights(model), before, 0)
