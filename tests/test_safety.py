"""Whatever happens, the model is afterwards what it was before, to the bit, in either engine."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn

from tests.families import tiny_model
from tests.loops import prompt_ids
from tests.untouched import (
    IDS,
    STEPS,
    Boom,
    assert_adapts,
    bits,
    failing_backward,
    failing_forward,
    lived_in,
    look,
    trainer_of,
    unchanged,
)
from ttt_fast import Batch, DivergedError, negative_log_likelihood

RAISED = [Boom, KeyboardInterrupt, SystemExit]
PROMPTS = [prompt_ids(n, seed=n)[0] for n in (6, 3, 8)]

engines = pytest.mark.parametrize("engine", ["dense", "factored"])

# ---------------------------------------------------------------------------- as found


@pytest.mark.parametrize(
    ("engine", "family"),
    [
        *[("dense", family) for family in ("gpt2", "llama_tied", "opt", "mixtral")],
        *[("factored", f) for f in ("gpt2", "llama_tied", "opt", "phi3", "gemma2", "gpt_neox")],
    ],
)
@pytest.mark.parametrize("dropout", [False, True])
def test_all_is_as_found_after_a_normal_exit(engine, family, dropout):
    model = lived_in(family)
    trainer = trainer_of(model, engine=engine, dropout=dropout)
    for prompts, deltas in ((IDS, "shared"), (PROMPTS, "independent")):
        with unchanged(model), trainer.adapt(prompts, deltas=deltas) as adapted:
            adapted.generate(max_new_tokens=3, do_sample=False)
            adapted.loss()


def test_all_but_the_weights_is_as_found_while_adapted():
    model = lived_in()
    with unchanged(model, but=("bits", "attributes")):
        adapted = trainer_of(model).adapt(IDS)
    with unchanged(model, but=("attributes",)):
        adapted.loss()
        adapted.generate(max_new_tokens=3, do_sample=False)
    adapted.restore()
    with unchanged(model):
        adapted.restore()


@pytest.mark.parametrize("where", ["device", "host", "undo"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_snapshots_end_to_end(where, optimizer, dtype):
    model = tiny_model("llama_tied", dtype)
    expected = []
    for snapshot in ("device", where):
        trainer = trainer_of(model, snapshot=snapshot, optimizer=optimizer, lr=1e-3)
        with unchanged(model):
            for ids in (prompt_ids(5), IDS):
                with trainer.adapt(ids) as adapted:
                    expected.append(bits(model.lm_head.weight))
                    assert where not in ("undo",) or snapshot in adapted.report()
            with pytest.raises(Boom), trainer.adapt(IDS):
                raise Boom
    assert expected[:2] == expected[2:]


@engines
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("n_rows", [1, 2])
def test_inside_any_grad_mode(engine, mode, n_rows):
    rows = prompt_ids(8, n_rows=n_rows)
    model = tiny_model("qwen2")
    trainer = trainer_of(model, engine=engine)
    with trainer.adapt(rows, deltas="independent") as adapted:
        expected = adapted.losses, adapted.loss()
    for used in (trainer, trainer_of(model, engine=engine)):
        with mode(), unchanged(model):
            # These rows are inference tensors in inference mode.
            with used.adapt(rows + 0, deltas="independent") as adapted:
                assert torch.equal(adapted.losses, expected[0])
                assert torch.equal(adapted.loss(), expected[1])
                adapted.generate(max_new_tokens=2)
                adapted.state_dict(n_rows - 1)
    assert_adapts(model, engine)


@engines
def test_tensors_made_in_inference_mode(engine):
    model = tiny_model("llama")
    with torch.inference_mode():
        rows, ones = prompt_ids(8, n_rows=2), torch.ones(2, 8)
        row_weights, mask = torch.ones(2), torch.ones(2, 8, dtype=torch.int64)
    trainer = trainer_of(model, engine=engine)
    with trainer.adapt(
        rows, token_weights=ones, row_weights=row_weights, attention_mask=mask, labels=rows,
        deltas="shared",
    ) as adapted:  # fmt: skip
        assert adapted.losses.isfinite().all()
    with trainer.begin(n_deltas=2) as session, torch.inference_mode():
        session.step(Batch(rows, delta_index=torch.tensor([1, 0]), token_weights=ones))


def test_weights_made_in_inference_mode_are_refused():
    with torch.inference_mode():
        model = tiny_model("llama")
    with pytest.raises(ValueError, match="inference tensor, which can never be trained"):
        trainer_of(model)


def test_two_hundred_prompts():
    model = tiny_model("llama", torch.bfloat16, num_hidden_layers=1)
    trainer = trainer_of(model, steps=1, lr=0.1)
    before, places, sizes, alive = look(model)["bits"], None, set(), []
    for n in range(200):
        with trainer.adapt(prompt_ids(2 + n % 5, seed=n)) as adapted:
            sizes.add(adapted.nbytes)
        engine = trainer._engines["dense"]
        tensors = [*engine.snapshot._buffers, *engine._states[0].state["momentum_buffers"]]
        here = [t.data_ptr() for t in tensors]
        places = places or here
        assert here == places
        if n in (20, 199):
            gc.collect()
            alive.append(sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects()))
        assert look(model)["bits"] == before
    assert len(sizes) == 1
    assert alive[0] == alive[1]


@engines
def test_an_adaptation_that_was_dropped_does_not_keep_the_model_alive(engine):
    model = tiny_model("llama")
    adapted = trainer_of(model, engine=engine).adapt(IDS)
    gone = weakref.ref(model)
    del model, adapted
    gc.collect()
    assert gone() is None


def test_a_copy_of_a_held_model_is_free():
    model = tiny_model("llama")
    with trainer_of(model).adapt(IDS):
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert bits(other.lm_head.weight) == bits(model.lm_head.weight)
            trainer_of(other).adapt(IDS).restore()
            assert_adapts(other)
    assert_adapts(model)


# ---------------------------------------------------------------------------- exceptions


@engines
@pytest.mark.parametrize("raised", RAISED)
@pytest.mark.parametrize("deltas", ["shared", "independent"])
def test_a_callback_that_raises_at_any_step(engine, raised, deltas):
    model = lived_in()
    trainer = trainer_of(model, engine=engine)
    for callback in ("on_step", "stop"):
        seen = []
        trainer.adapt(PROMPTS[:2], deltas=deltas, **{callback: seen.append}).restore()
        for k in range(1, len(seen) + 1):
            reports = []

            def fail(report, k=k, reports=reports):
                reports.append(report)
                if len(reports) == k:
                    raise raised

            with unchanged(model):
                with pytest.raises(raised):
                    trainer.adapt(PROMPTS[:2], deltas=deltas, **{callback: fail})
                assert len(reports) == k
        assert len(seen) >= STEPS
    assert_adapts(model, engine)


@engines
@pytest.mark.parametrize("raised", RAISED)
@pytest.mark.parametrize("failing", [failing_forward, failing_backward])
def test_a_forward_or_backward_that_raises(engine, failing, raised):
    model = lived_in()
    trainer = trainer_of(model, engine=engine)
    with trainer.adapt(PROMPTS, deltas="shared") as adapted:
        losses = adapted.losses
    for call in range(1, STEPS + 1):
        with unchanged(model), failing(model, raised, call), pytest.raises(raised):
            trainer.adapt(PROMPTS, deltas="independent")
        # The same trainer goes on as if nothing had been.
        with trainer.adapt(PROMPTS, deltas="shared") as adapted:
            assert torch.equal(adapted.losses, losses)
    assert_adapts(model, engine)


@engines
@pytest.mark.parametrize("raised", RAISED)
def test_an_objective_that_raises(engine, raised):
    model = lived_in()
    for k in range(1, STEPS + 1):
        calls = []

        def fail(outputs, batch, k=k, calls=calls):
            calls.append(batch)
            if len(calls) == k:
                raise raised
            return negative_log_likelihood(outputs, batch)

        with unchanged(model), pytest.raises(raised):
            trainer_of(model, objective=fail, engine=engine).adapt(IDS)
    assert_adapts(model, engine)


@engines
@pytest.mark.parametrize("raised", RAISED)
@pytest.mark.parametrize("n_rows", [1, 2])
def test_generate_that_raises(engine, raised, n_rows):
    model = lived_in()
    trainer = trainer_of(model, engine=engine)
    rows = prompt_ids(6, n_rows=n_rows)
    with unchanged(model):
        with pytest.raises(raised), trainer.adapt(rows, deltas="independent") as adapted:
            with failing_forward(model, raised, 1):
                adapted.generate(max_new_tokens=3)
    # Without `with` the adaptation goes on, and can be used again.
    adapted = trainer.adapt(rows, deltas="independent")
    expected = adapted.loss()
    for call in (1, 2):
        with unchanged(model), pytest.raises(raised), failing_forward(model, raised, call):
            adapted.generate(max_new_tokens=3)
        assert torch.equal(adapted.loss(), expected)
    adapted.restore()
    assert_adapts(model, engine)


@engines
@pytest.mark.parametrize("raised", RAISED)
def test_a_with_body_that_raises(engine, raised):
    model = lived_in()
    trainer = trainer_of(model, engine=engine)
    with unchanged(model):
        with pytest.raises(raised), trainer.adapt(IDS):
            raise raised
        with pytest.raises(raised), trainer.begin(n_deltas=2) as session:
            session.step(Batch(IDS))
            raise raised
        with pytest.raises(raised), trainer.adapt(PROMPTS, deltas="independent") as adapted:
            with adapted.weights_of(1):
                raise raised
        with trainer.adapt(PROMPTS, deltas="independent") as adapted:
            expected = adapted.loss()
            with pytest.raises(raised), adapted.weights_of(1):
                raise raised
            assert torch.equal(adapted.loss(), expected)
    assert_adapts(model, engine)


def test_a_begin_that_fails_half_way(monkeypatch):
    """The dense engine could not make room for the second of three deltas."""
    model = lived_in()
    trainer = trainer_of(model)
    trainer.adapt(prompt_ids(5, 2), deltas="independent").restore()
    engine = trainer._engines["dense"]
    fresh, made = engine._new_state, []

    def fail():
        made.append(fresh())
        if len(made) == 2:
            raise Boom
        return made[-1]

    monkeypatch.setattr(engine, "_new_state", fail)
    with unchanged(model), pytest.raises(Boom):
        trainer.begin(n_deltas=3)
    monkeypatch.undo()
    with trainer.begin(n_deltas=3):
        assert len({id(state) for state in engine._states}) == 3
    assert_adapts(model)


# ---------------------------------------------------------------------------- not finite


@engines
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("clip", [None, 1.0])
def test_a_loss_that_is_not_finite(engine, value, clip):
    model = lived_in()
    for k in range(1, STEPS + 1):
        calls = []

        def broken(outputs, batch, k=k, calls=calls):
            calls.append(batch)
            return negative_log_likelihood(outputs, batch) * (value if len(calls) == k else 1)

        with unchanged(model), pytest.raises(DivergedError) as caught:
            trainer_of(model, objective=broken, max_grad_norm=clip, engine=engine).adapt(IDS)
        message = str(caught.value)
        assert caught.value.step == k and f"step {k} is not finite" in message
        assert "lr smaller than 0.02" in message
        assert "max_grad_norm" in message
    assert_adapts(model, engine)


@engines
def test_a_gradient_that_is_not_finite_behind_a_finite_loss(engine):
    model = tiny_model("llama")

    def broken(outputs, batch):
        # The derivative of sqrt at 0 is infinite.
        return negative_log_likelihood(outputs, batch) + (outputs.logits * 0).sum().abs().sqrt()

    with unchanged(model), pytest.raises(DivergedError, match=r"step 1 .*gradient norm nan"):
        trainer_of(model, objective=broken, engine=engine).adapt(IDS)


@engines
def test_a_step_size_that_overflows(engine):
    model = tiny_model("llama")
    trainer = trainer_of(model, lr=1e30, max_grad_norm=None, steps=6, engine=engine)
    with unchanged(model), pytest.raises(DivergedError, match="no clipping was asked for"):
        trainer.adapt(IDS)
    assert_adapts(model, engine)


# ---------------------------------------------------------------------------- who holds the model


@engines
def test_a_second_adaptation_while_one_is_attached(engine):
    model = tiny_model("llama")
    trainer = trainer_of(model, engine=engine)
    for start in (lambda: trainer.adapt(IDS), trainer.begin):
        first = start()
        for other in (trainer, trainer_of(model), trainer_of(model, engine="factored")):
            with unchanged(model), pytest.raises(RuntimeError, match="model is held by"):
                other.adapt(IDS)
            with unchanged(model), pytest.raises(RuntimeError, match="model is held by"):
                other.begin()
        trainer.restore()
        assert_adapts(model, engine)
        with pytest.raises(RuntimeError, match="was restored|is over"):
            first.loss(Batch(IDS) if start == trainer.begin else IDS)
    with unchanged(model):
        trainer.restore()


class Wrapping(nn.Module):
    """Another model with the same weights, as peft makes one."""

    def __init__(self, model):
        super().__init__()
        self.base, self.config = model, model.config
        self.get_input_embeddings = model.get_input_embeddings

    def forward(self, input_ids, use_cache=None):
        return self.base(input_ids, use_cache=use_cache)


@engines
def test_a_model_whose_weights_another_model_holds(engine):
    """Or whoever ends last would write back the other's adapted weights."""
    model = tiny_model("llama")
    pair = model, Wrapping(model)
    for one, other in (pair, pair[::-1]):
        with unchanged(model):
            with trainer_of(one, engine=engine).adapt(IDS):
                with pytest.raises(RuntimeError, match="model is held by"):
                    trainer_of(other, engine=engine).adapt(IDS)
            trainer_of(other, engine=engine).adapt(IDS).restore()


@engines
@pytest.mark.parametrize("n_rows", [1, 2])
def test_an_adaptation_after_restore(engine, n_rows):
    model = tiny_model("llama")
    trainer = trainer_of(model, engine=engine)
    adapted = trainer.adapt(prompt_ids(6, n_rows=n_rows), deltas="independent")
    adapted.restore()
    with unchanged(model):
        for use in (
            lambda: adapted.generate(max_new_tokens=2),
            lambda: adapted.loss(),
            lambda: adapted.state_dict(),
            lambda: adapted.merge(0),
            lambda: adapted.weights_of(0).__enter__(),
            lambda: adapted.__enter__(),
        ):
            with pytest.raises(RuntimeError, match="was restored; its deltas are gone"):
                use()
        adapted.restore()
    # An old one cannot take the weights from under a new one.
    with trainer_of(model, engine=engine).adapt(IDS) as new:
        expected = new.loss()
        adapted.restore()
        assert torch.equal(new.loss(), expected)


@engines
def test_a_model_whose_weights_were_replaced(engine):
    model = tiny_model("llama")
    trainer = trainer_of(model, engine=engine)
    trainer.adapt(IDS).restore()
    model.lm_head.weight = nn.Parameter(2 * model.lm_head.weight.detach())
    with unchanged(model), pytest.raises(RuntimeError, match=r"lm_head.weight .*replaced"):
        trainer.adapt(IDS)
    assert_adapts(model, engine)
