"""The factored engine writes no weight at any moment, and gives every module back as it was."""

import functools
import gc
import weakref

import pytest
import torch

from tests import untouched
from tests.families import tiny_model
from tests.loops import prompt_ids, twin
from tests.untouched import IDS, STEPS, Boom, lived_in, look, unchanged
from ttt_fast import Batch, DivergedError, negative_log_likelihood, ops
from ttt_fast.engines.frozen import LinearPiece
from ttt_fast.engines.pieces import GluPiece, NormPiece

PROMPTS = [prompt_ids(n, seed=n)[0] for n in (6, 3, 8)]

# tests/test_safety.py has what holds for both engines.
trainer_of = functools.partial(untouched.trainer_of, engine="factored")
assert_adapts = functools.partial(untouched.assert_adapts, engine="factored")


def tensors_of(model):
    """Bits and places of everything that could be written to."""
    found = look(model)
    return found["bits"], found["where"]


def fail(*args, **options):
    raise Boom


# ---------------------------------------------------------------------------- nothing is written


@pytest.mark.parametrize("family", ["gpt2", "llama_tied", "opt", "gemma3"])
def test_no_weight_is_written_at_any_moment(family):
    """Before, in and after each forward and backward, in generate, and at the end."""
    model = lived_in(family)
    before, looks = tensors_of(model), []

    def note(*_):
        looks.append(tensors_of(model) == before)

    def in_forward(module, inputs, output):
        note()
        if output.requires_grad:
            output.register_hook(note)

    handles = [
        module.register_forward_hook(in_forward)
        for module in (model.get_input_embeddings(), model.get_output_embeddings())
    ]
    adapted = trainer_of(model).adapt(PROMPTS, deltas="independent", on_step=note)
    adapted.generate(max_new_tokens=3, do_sample=False)
    with adapted.weights_of(1):
        note()
    adapted.loss()
    note()
    adapted.restore()
    note()
    for handle in handles:
        handle.remove()
    # Forward and backward of head and embedding (or the head alone), and each step's end.
    assert len(looks) >= STEPS * 4 and all(looks)
    # Without the engine the same looks notice one bit.
    with torch.no_grad():
        model.get_output_embeddings().weight[0, 0] *= 1.0000002
    assert tensors_of(model) != before


def test_only_attributes_and_one_hook_differ_while_adapted():
    model = lived_in()
    with unchanged(model, but=("attributes", "hooks")):
        adapted = trainer_of(model).adapt(IDS)
    own = {name for name, module in model.named_modules() if "forward" in vars(module)}
    assert own == {n for n, m in model.named_modules() if list(m.parameters(recurse=False))}
    with unchanged(model):
        adapted.loss()
        adapted.generate(max_new_tokens=3, do_sample=False)
    adapted.restore()
    assert not any("forward" in vars(module) for module in model.modules())
    with unchanged(model):
        adapted.restore()


def test_modules_outside_the_scope_are_left_alone():
    model = tiny_model("llama")
    with trainer_of(model, scope="query").adapt(IDS):
        taken = {
            name: type(vars(module)["forward"].__self__)
            for name, module in model.named_modules()
            if "forward" in vars(module)
        }
    # What computes a norm, a gated unit, positions or a frozen product as one op records nothing.
    # The forward of an attention is its own code, bound to it.
    pieces = NormPiece, GluPiece, LinearPiece, type(model.model.layers[0].self_attn)
    recording = {name for name, kind in taken.items() if kind not in pieces}
    assert recording == {f"model.layers.{i}.self_attn.q_proj" for i in range(3)}


@pytest.mark.parametrize("where", ["in place", "elsewhere"])
def test_weights_that_their_owner_changed_between_prompts(where):
    model = tiny_model("llama_tied")
    trainer = trainer_of(model)
    trainer.adapt(IDS).restore()
    with torch.no_grad():
        for param in model.parameters():
            if where == "in place":
                param.mul_(1.1)
            else:
                param.data = 1.1 * param
    copy = twin(model)
    with trainer.adapt(IDS) as adapted, trainer_of(copy).adapt(IDS) as fresh:
        assert torch.equal(adapted.losses, fresh.losses)
        # They are the weights that the deltas belong to, wherever they lie now.
        ours, theirs = adapted.state_dict(), fresh.state_dict()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("what", ["cast", "replaced"])
def test_weights_that_are_others_are_refused(what):
    model = tiny_model("llama")
    trainer = trainer_of(model)
    trainer.adapt(IDS).restore()
    if what == "cast":
        model.bfloat16()
    else:
        model.model.norm.weight = torch.nn.Parameter(torch.ones(model.config.hidden_size))
    with pytest.raises(RuntimeError, match="adapt: .* was .* and is .*Make a new TTTTrainer"):
        trainer.adapt(IDS)
    assert not any("forward" in vars(module) for module in model.modules())
    trainer_of(model).adapt(IDS).restore()


# ---------------------------------------------------------------------------- from prompt to prompt


@pytest.mark.parametrize(
    "options",
    [dict(), dict(momentum=0.9, nesterov=True), dict(dampening=0.5), dict(scope="ffn")],
    ids=["momentum", "nesterov", "dampening", "ffn"],
)
@pytest.mark.parametrize("family", ["llama_tied", "gpt2"])
def test_nothing_leaks_from_prompt_to_prompt(family, options):
    """A trainer that has seen longer prompts, several deltas and NaN is as good as new."""
    model = tiny_model(family)

    def run(trainer):
        with trainer.adapt(PROMPTS, deltas="independent") as adapted, torch.no_grad():
            logits = model(PROMPTS[0].repeat(3, 1)).logits
            return adapted.losses, adapted.grad_norms, adapted.loss(), logits

    expected = run(trainer_of(model, **options))
    trainer = trainer_of(model, **options)
    trainer.adapt(prompt_ids(30, n_rows=5, seed=3), deltas="independent").restore()
    poison = trainer.objective
    trainer.objective = lambda outputs, batch: poison(outputs, batch) * torch.nan
    for prompt in (prompt_ids(20), prompt_ids(11, n_rows=4)):
        with pytest.raises(DivergedError):
            trainer.adapt(prompt, deltas="independent")
    trainer.objective = poison
    trainer.adapt(IDS).restore()
    for _ in range(2):
        found = run(trainer)
        for ours, theirs in zip(found, expected, strict=True):
            assert torch.equal(ours, theirs)


def test_a_stale_nan_does_not_reach_shorter_deltas():
    """Rows behind a shorter delta are memory of an earlier prompt, which held NaN."""
    model = tiny_model("llama")
    a, b, c = PROMPTS

    def run(trainer):
        session = trainer.begin(n_deltas=3)
        session.step(Batch(torch.stack([b, b, b]), delta_index=torch.tensor([0, 1, 1])))
        session.step(Batch(c[None], delta_index=torch.tensor([1])))
        session.step(Batch(torch.stack([a, a, a]), delta_index=torch.arange(3)))
        with session.end() as adapted:
            return adapted.losses, adapted.loss(torch.stack([a, a, a]))

    expected = run(trainer_of(model))
    trainer = trainer_of(model)
    own = trainer.objective
    trainer.objective = lambda outputs, batch: own(outputs, batch) * torch.nan
    with pytest.raises(DivergedError):
        trainer.adapt(prompt_ids(40, n_rows=3), deltas="independent")
    for inputs in trainer._engines["factored"]._inputs:
        inputs.buffer._storage.fill_(torch.nan)
    trainer.objective = own
    for ours, theirs in zip(run(trainer), expected, strict=True):
        assert torch.equal(ours.nan_to_num(), theirs.nan_to_num())


def test_a_hundred_prompts_take_the_memory_of_the_longest():
    model = tiny_model("llama", torch.bfloat16, num_hidden_layers=1)
    trainer = trainer_of(model, steps=2, lr=0.1)
    before, alive, sizes = tensors_of(model), [], set()
    for n in range(100):
        rows = [prompt_ids(2 + (n + i) % 7, seed=n)[0] for i in range(1 + n % 3)]
        with trainer.adapt(rows, deltas="independent") as adapted:
            if n % 10 == 0:
                adapted.generate(max_new_tokens=2)
            nbytes = adapted.nbytes
        assert tensors_of(model) == before
        if n >= 20:
            sizes.add(nbytes)
        if n in (26, 53, 98):  # three deltas each, and nothing was generated
            del adapted
            gc.collect()
            alive.append(sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects()))
    assert len(sizes) == 1
    assert alive[0] == alive[1] == alive[2]


@pytest.mark.parametrize("deltas", ["shared", "independent"])
def test_no_activation_outlives_its_step(deltas):
    model = tiny_model("llama_tied")
    references, alive = [], []

    def note(module, inputs, output):
        for tensor in (*inputs, output):
            if isinstance(tensor, torch.Tensor):
                references.append(weakref.ref(tensor))

    def count(report):
        gc.collect()
        kept = [reference() for reference in references]
        # Ids are the batch's own, not an activation.
        alive.append(sum(t is not None and t.is_floating_point() for t in kept))

    for module in model.modules():
        module.register_forward_hook(note)
    rows = prompt_ids(6, n_rows=2)
    with trainer_of(model).adapt(rows, deltas=deltas, on_step=count) as adapted:
        assert len(references) > 50 * STEPS and alive == [0] * STEPS
        adapted.loss()
        adapted.generate(max_new_tokens=3)
        count(None)
    assert alive[-1] == 0


# ---------------------------------------------------------------------------- exceptions


def test_a_begin_that_fails_half_way(monkeypatch):
    """The last module cannot be taken over: those before it are given back."""
    model = lived_in()
    trainer = trainer_of(model)
    trainer.adapt(IDS).restore()
    model.lm_head.forward = own = model.lm_head.forward
    with unchanged(model), pytest.raises(ValueError, match="lm_head has a forward of its own"):
        trainer.adapt(IDS)
    assert vars(model.lm_head).pop("forward") is own
    with monkeypatch.context() as patch:
        patch.setattr(model, "register_forward_pre_hook", fail)
        with unchanged(model), pytest.raises(Boom):
            trainer.begin()
    assert_adapts(model)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("clip", [None, 1.0])
def test_one_delta_that_diverges(value, clip):
    model = lived_in()
    for k in range(1, STEPS + 1):
        calls = []

        def broken(outputs, batch, k=k, calls=calls):
            calls.append(batch)
            ill = (batch.delta_index == 1) & (len(calls) == k)
            return negative_log_likelihood(outputs, batch) * torch.where(ill, value, 1)

        with unchanged(model), pytest.raises(DivergedError) as caught:
            trainer_of(model, objective=broken, max_grad_norm=clip).adapt(
                PROMPTS, deltas="independent"
            )
        assert (caught.value.step, caught.value.delta) == (k, 1)
    assert_adapts(model)


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_looking_seldom_stops_the_delta_that_was_not_finite_and_no_other(what):
    """check_every=4: delta 1 is NaN at step 2; it keeps its step 1, the others go on."""
    model = tiny_model("llama", torch.float64)
    rows, probe = prompt_ids(6, n_rows=3), prompt_ids(5, n_rows=3, seed=9)
    looks, calls = [], []

    def broken_once(outputs, batch):
        calls.append(batch)
        ill = (batch.delta_index == 1) & (len(calls) == 2)
        losses = negative_log_likelihood(outputs, batch)
        if what == "loss":
            return losses * torch.where(ill, torch.nan, 1)
        # The root of 0 is finite, its derivative is not.
        return losses + torch.where(ill, 0 * outputs.logits[:, 0, 0], 1).sqrt() - 1

    batch = Batch(rows, delta_index=torch.arange(3))
    session = trainer_of(model, check_every=4, objective=broken_once).begin(n_deltas=3)
    for _ in range(3):
        session.step(batch)
        with torch.no_grad():
            looks.append(model(probe).logits)
    with pytest.raises(DivergedError, match="step 2 of delta 1"):
        session.step(batch)
    session = trainer_of(model, check_every=4).begin(n_deltas=3)
    for look_ in looks:
        session.step(batch)
        with torch.no_grad():
            healthy = model(probe).logits
        assert torch.allclose(look_[[0, 2]], healthy[[0, 2]], rtol=1e-10)
    session.abort()
    assert torch.equal(looks[0][1], looks[1][1]) and torch.equal(looks[0][1], looks[2][1])


def test_buffers_go_with_the_trainer():
    """Not when Python next looks for cycles, which may be gigabytes later."""
    gc.disable()
    try:
        trainer = trainer_of(tiny_model("llama"))
        trainer.adapt(IDS).restore()
        engine = trainer._engine("factored")
        kept = [weakref.ref(each) for each in (engine, *engine._buffers())]
        del engine
        assert len(kept) > 10 and all(each() is not None for each in kept)
        del trainer
        assert all(each() is None for each in kept)
    finally:
        gc.enable()


def test_an_error_in_an_op(monkeypatch):
    model = lived_in("llama")
    trainer = trainer_of(model)
    with monkeypatch.context() as patch:
        patch.setattr(ops, "gram_norms", fail)
        with unchanged(model), pytest.raises(Boom):
            trainer.adapt(IDS)
    assert_adapts(model)
