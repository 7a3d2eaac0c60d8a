"""Steps of an adaptation, several on one model, and what either engine does not do."""

import gc
import signal
import weakref

import pytest
import torch
from torch import nn

from tests.adaptation_cases import (
    CASES,
    IDS,
    QUESTION,
    STEPS,
    adapted_of,
    assert_near,
    distance_of,
    logits_of,
    model_with,
    trainer_of,
)
from tests.families import tiny_model
from tests.loops import prompt_ids, weights
from tests.untouched import Boom, unchanged
from ttt_fast import Adaptation, Batch


def dense_states(family, ids=IDS, dtype=torch.float64, **options):
    """State dicts of the dense engine after 0, 1, ..., STEPS steps: the oracle."""
    model = tiny_model(family, dtype, attn_implementation="sdpa")
    states = []
    for steps in range(STEPS + 1):
        trainer = trainer_of(model, engine="dense", **(options | dict(steps=steps)))
        with trainer.adapt(ids) as adapted:
            states.append(adapted.state_dict())
    return states


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
    # The norm reads W₀ where weights decay.
    calls = adapted.attach, adapted.state_dict, adapted.delta_norm, lambda: adapted.save("x")
    for call in (*calls, lambda: adapted.to_lora(4, decay="drop")):
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
    _, factored = adapted_of("llama")
    factored_only = set(dir(factored)) - set(dir(Adaptation)) - set(vars(factored))
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
        public = {name for name in factored_only if not name.startswith("_")}
        assert public == calls.keys() | {"attached"}
        for name in (*public, "at_step"):
            with pytest.raises(AttributeError, match=f"^{name}: .*Adapt with engine='factored'"):
                getattr(adapted, name)
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
