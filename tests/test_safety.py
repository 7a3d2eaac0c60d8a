"""Whatever happens, the model is afterwards what it was before, to the bit."""

import contextlib
import copy
import gc
import os
import pickle
import random
import re
import signal
import threading
import weakref

import numpy as np
import pytest
import torch
from torch import nn

from tests.families import tiny_model
from tests.loops import prompt_ids
from ttt_fast import Batch, DivergedError, TTTConfig, TTTTrainer, negative_log_likelihood

IDS = prompt_ids(8)
STEPS = 4


class Boom(Exception):
    """Raised by the tests, and by nothing else."""


def trainer_of(model, objective=None, **options):
    options = dict(steps=STEPS, lr=2e-2, weight_decay=0.01, max_grad_norm=1.0) | options
    return TTTTrainer(model, TTTConfig(**options), objective=objective)


def bits(tensor):
    return tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes()


def look(model):
    """Everything about a model and the process that an adaptation could leave changed."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    modules = dict(model.named_modules())
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return {
        "bits": {name: bits(t) for name, t in tensors.items()},
        "where": {name: (t.data_ptr(), id(t)) for name, t in tensors.items()},
        "flags": {name: t.requires_grad for name, t in tensors.items()},
        "grads": {n: (id(p.grad), None if p.grad is None else bits(p.grad))
                  for n, p in model.named_parameters()},
        "training": {name: module.training for name, module in modules.items()},
        "attributes": {name: sorted(vars(module)) for name, module in modules.items()},
        "hooks": {name: [list(getattr(m, h)) for h in hooks] for name, m in modules.items()},
        "random": (bits(torch.get_rng_state()), random.getstate(),
                   np.random.get_state()[1].tobytes()),
        "modes": (torch.get_default_dtype(), torch.is_grad_enabled(),
                  torch.is_inference_mode_enabled(), signal.getsignal(signal.SIGINT)),
    }  # fmt: skip


@contextlib.contextmanager
def unchanged(model, but=()):
    """Look before and after; ``but`` names what may differ."""
    before = look(model)
    yield
    after = look(model)
    for name in before.keys() - set(but):
        assert before[name] == after[name], f"{name} changed"


def lived_in(family="gpt2", dtype=torch.float32):
    """A model that somebody has been using: flags, gradients, modes, dropout and hooks mixed."""
    model = tiny_model(family, dtype).train()
    model.get_submodule(list(dict(model.named_children()))[0]).eval()
    params = list(model.parameters())
    for param in params[::3]:
        param.requires_grad_(False)
    for param in params[::4]:
        param.grad = torch.randn_like(param)
    next(model.children()).register_forward_hook(lambda *call: None)
    return model


def assert_adapts(model):
    """A model and its trainer are in order: an adaptation learns, and gives everything back."""
    with unchanged(model), trainer_of(model).adapt(IDS) as adapted:
        assert adapted.loss().item() < adapted.losses[0, 0].item()


# ---------------------------------------------------------------------------- as found


@pytest.mark.parametrize("family", ["gpt2", "llama_tied", "opt", "mixtral"])
@pytest.mark.parametrize("dropout", [False, True])
def test_all_is_as_found_after_a_normal_exit(family, dropout):
    model = lived_in(family)
    with unchanged(model):
        with trainer_of(model, dropout=dropout).adapt(IDS) as adapted:
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


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("n_rows", [1, 2])
def test_inside_any_grad_mode(mode, n_rows):
    rows = prompt_ids(8, n_rows=n_rows)
    model = tiny_model("qwen2")
    trainer = trainer_of(model)
    with trainer.adapt(rows, deltas="independent") as adapted:
        expected = adapted.losses
    for used in (trainer, trainer_of(model)):
        with mode(), unchanged(model):
            # These rows are inference tensors in inference mode.
            with used.adapt(rows + 0, deltas="independent") as adapted:
                assert torch.equal(adapted.losses, expected)
                adapted.loss()
                adapted.generate(max_new_tokens=2)
                adapted.state_dict(n_rows - 1)
    assert_adapts(model)


def test_tensors_made_in_inference_mode():
    model = tiny_model("llama")
    with torch.inference_mode():
        rows, ones = prompt_ids(8, n_rows=2), torch.ones(2, 8)
        row_weights, mask = torch.ones(2), torch.ones(2, 8, dtype=torch.int64)
    with trainer_of(model).adapt(
        rows, token_weights=ones, row_weights=row_weights, attention_mask=mask, labels=rows,
        deltas="shared",
    ) as adapted:  # fmt: skip
        assert adapted.losses.isfinite().all()
    session = trainer_of(model).begin(n_deltas=2)
    with session, torch.inference_mode():
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
        engine = trainer._engine
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


def test_an_adaptation_that_was_dropped_does_not_keep_the_model_alive():
    model = tiny_model("llama")
    adapted = trainer_of(model).adapt(IDS)
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

RAISED = [Boom, KeyboardInterrupt, SystemExit]


@pytest.mark.parametrize("raised", RAISED)
@pytest.mark.parametrize("deltas", ["shared", "independent"])
def test_a_callback_that_raises_at_any_step(raised, deltas):
    model = lived_in()
    rows = prompt_ids(6, n_rows=2)
    trainer = trainer_of(model)
    total = STEPS * (2 if deltas == "independent" else 1)
    for callback in ("on_step", "stop"):
        for k in range(total):
            seen = []

            def fail(report, k=k, seen=seen):
                seen.append(report)
                if len(seen) == k + 1:
                    raise raised

            with unchanged(model):
                with pytest.raises(raised):
                    trainer.adapt(rows, deltas=deltas, **{callback: fail})
                assert len(seen) == k + 1
    assert_adapts(model)


@contextlib.contextmanager
def failing_forward(model, raised, call):
    """The ``call``-th forward of the model's last linear raises."""
    calls = []

    def hook(module, inputs, output):
        calls.append(module)
        if len(calls) == call:
            raise raised

    handle = model.get_output_embeddings().register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def failing_backward(model, raised, call):
    """The ``call``-th backward through the model's last linear raises."""
    calls = []

    def fail(gradient):
        calls.append(gradient)
        if len(calls) == call:
            raise raised

    def hook(module, inputs, output):
        if output.requires_grad:
            output.register_hook(fail)

    handle = model.get_output_embeddings().register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize("raised", RAISED)
@pytest.mark.parametrize("failing", [failing_forward, failing_backward])
def test_a_forward_or_backward_that_raises(failing, raised):
    model = lived_in()
    trainer = trainer_of(model)
    for call in range(1, STEPS + 1):
        with unchanged(model), failing(model, raised, call), pytest.raises(raised):
            trainer.adapt(IDS)
    assert_adapts(model)


@pytest.mark.parametrize("raised", RAISED)
def test_an_objective_that_raises(raised):
    model = lived_in()
    for k in range(STEPS):
        calls = []

        def fail(outputs, batch, k=k, calls=calls):
            calls.append(batch)
            if len(calls) == k + 1:
                raise raised
            return negative_log_likelihood(outputs, batch)

        with unchanged(model), pytest.raises(raised):
            trainer_of(model, objective=fail).adapt(IDS)
    assert_adapts(model)


@pytest.mark.parametrize("raised", RAISED)
@pytest.mark.parametrize("n_rows", [1, 2])
def test_generate_that_raises(raised, n_rows):
    model = lived_in()
    trainer = trainer_of(model)
    rows = prompt_ids(6, n_rows=n_rows)
    with unchanged(model):
        with pytest.raises(raised), trainer.adapt(rows, deltas="independent") as adapted:
            with failing_forward(model, raised, 1):
                adapted.generate(max_new_tokens=3)
    # Without `with` the adaptation goes on, and can be used again.
    adapted = trainer.adapt(rows, deltas="independent")
    expected = adapted.loss()
    with unchanged(model), pytest.raises(raised), failing_forward(model, raised, 1):
        adapted.generate(max_new_tokens=3)
    assert torch.equal(adapted.loss(), expected)
    adapted.restore()
    assert_adapts(model)


@pytest.mark.parametrize("raised", RAISED)
def test_a_with_body_that_raises(raised):
    model = lived_in()
    trainer = trainer_of(model)
    with unchanged(model):
        with pytest.raises(raised), trainer.adapt(IDS):
            raise raised
        with pytest.raises(raised), trainer.begin() as session:
            session.step(Batch(IDS))
            raise raised
        with pytest.raises(raised), trainer.adapt(prompt_ids(5, 2), deltas="independent") as a:
            with a.weights_of(1):
                raise raised
    assert_adapts(model)


def test_a_begin_that_fails_half_way(monkeypatch):
    model = lived_in()
    trainer = trainer_of(model)
    trainer.adapt(prompt_ids(5, 2), deltas="independent").restore()
    engine, fresh, made = trainer._engine, trainer._engine._new_state, []

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


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("clip", [None, 1.0])
def test_a_loss_that_is_not_finite(value, clip):
    model = lived_in()
    for k in range(1, STEPS + 1):
        calls = []

        def broken(outputs, batch, k=k, calls=calls):
            calls.append(batch)
            return negative_log_likelihood(outputs, batch) * (value if len(calls) == k else 1)

        with unchanged(model), pytest.raises(DivergedError) as caught:
            trainer_of(model, objective=broken, max_grad_norm=clip).adapt(IDS)
        message = str(caught.value)
        assert caught.value.step == k and f"step {k} is not finite" in message
        assert "lr smaller than 0.02" in message
        assert "max_grad_norm" in message
    assert_adapts(model)


def test_a_gradient_that_is_not_finite_behind_a_finite_loss():
    model = tiny_model("llama")

    def broken(outputs, batch):
        # The derivative of sqrt at 0 is infinite.
        return negative_log_likelihood(outputs, batch) + (outputs.logits * 0).sum().abs().sqrt()

    with unchanged(model), pytest.raises(DivergedError, match=r"step 1 .*gradient norm nan"):
        trainer_of(model, objective=broken).adapt(IDS)


def test_a_step_size_that_overflows():
    model = tiny_model("llama")
    with unchanged(model), pytest.raises(DivergedError, match="no clipping was asked for"):
        trainer_of(model, lr=1e30, max_grad_norm=None, steps=6).adapt(IDS)
    assert_adapts(model)


# ---------------------------------------------------------------------------- Ctrl-C


@pytest.fixture
def ctrl_c():
    """Ctrl-C raises, also in a process that was started in the background, where it is ignored."""
    found = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, found)


@contextlib.contextmanager
def interrupted_at(model, forward, delay):
    """A real SIGINT from another thread, ``delay`` turns of a counter after the forward begins."""
    begun, calls = threading.Event(), []

    def hook(module, inputs):
        calls.append(module)
        if len(calls) == forward:
            begun.set()

    def send():
        begun.wait()
        for _ in range(delay):
            pass
        os.kill(os.getpid(), signal.SIGINT)

    handle = model.register_forward_pre_hook(hook)
    thread = threading.Thread(target=send)
    thread.start()
    try:
        yield
    finally:
        begun.set()
        thread.join()
        handle.remove()


@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize("deltas", ["shared", "independent"])
def test_ctrl_c_at_any_moment(ctrl_c, seed, deltas):
    """Many more steps than are taken, so that the signal always comes during one of them."""
    model = lived_in("llama")
    generator = random.Random(seed)
    forward, delay = generator.randint(1, 6), generator.randint(0, 200_000)
    trainer = trainer_of(model, steps=5000, lr=1e-6)
    with unchanged(model), pytest.raises(KeyboardInterrupt):
        with interrupted_at(model, forward, delay):
            trainer.adapt(prompt_ids(6, n_rows=2), deltas=deltas)
    assert_adapts(model)


def test_ctrl_c_during_the_update_waits_for_its_end(ctrl_c, monkeypatch):
    """In the update and in giving things back it is held; the model is whole when it is raised."""
    model = lived_in("llama")
    trainer = trainer_of(model)
    trainer.adapt(IDS).restore()
    engine, update, done = trainer._engine, trainer._engine.update, []

    def interrupted_update(*args):
        signal.raise_signal(signal.SIGINT)
        norm = update(*args)
        done.append(norm)
        return norm

    monkeypatch.setattr(engine, "update", interrupted_update)
    with unchanged(model), pytest.raises(KeyboardInterrupt):
        trainer.adapt(IDS)
    assert len(done) == 1
    monkeypatch.undo()
    restore, restored = engine.restore, []

    def interrupted_restore():
        signal.raise_signal(signal.SIGINT)
        restore()
        restored.append(True)

    monkeypatch.setattr(engine, "restore", interrupted_restore)
    with unchanged(model), pytest.raises(KeyboardInterrupt):
        with trainer.adapt(IDS):
            pass
    assert restored == [True]
    monkeypatch.undo()
    assert_adapts(model)


def test_ctrl_c_between_the_lines(monkeypatch):
    """When the session has ended and the caller has nothing in hands yet."""
    model = lived_in("llama")
    trainer = trainer_of(model)
    session_class = type(trainer.begin())
    trainer.restore()
    for name in ("end", "__enter__"):
        original = getattr(session_class, name)

        def interrupted(self, original=original):
            original(self)
            raise KeyboardInterrupt

        monkeypatch.setattr(session_class, name, interrupted)
        with unchanged(model), pytest.raises(KeyboardInterrupt):
            trainer.adapt(IDS)
        monkeypatch.undo()
        assert_adapts(model)


@pytest.mark.parametrize("handler", [signal.SIG_IGN, signal.default_int_handler])
def test_other_handlers_of_ctrl_c_stay_in_charge(handler):
    model = tiny_model("llama")
    found = signal.signal(signal.SIGINT, handler)
    try:
        with contextlib.suppress(KeyboardInterrupt):
            with trainer_of(model).adapt(IDS, on_step=lambda _: signal.raise_signal(2)):
                assert handler == signal.SIG_IGN
        assert signal.getsignal(signal.SIGINT) == handler
    finally:
        signal.signal(signal.SIGINT, found)
    assert_adapts(model)


def test_outside_the_main_thread():
    model, results = tiny_model("llama"), []

    def work():
        with trainer_of(model).adapt(IDS) as adapted:
            results.append(adapted.losses)

    with unchanged(model):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert results[0].isfinite().all()


# ---------------------------------------------------------------------------- who holds the model


def test_a_second_adaptation_while_one_is_attached():
    model = tiny_model("llama")
    trainer = trainer_of(model)
    for start in (lambda: trainer.adapt(IDS), trainer.begin):
        first = start()
        for other in (trainer, trainer_of(model)):
            with unchanged(model), pytest.raises(RuntimeError, match="model is held by"):
                other.adapt(IDS)
            with unchanged(model), pytest.raises(RuntimeError, match="model is held by"):
                other.begin()
        trainer.restore()
        assert_adapts(model)
        with pytest.raises(RuntimeError, match="was restored|is over"):
            first.loss(Batch(IDS) if start == trainer.begin else IDS)
    with unchanged(model):
        trainer.restore()


@pytest.mark.parametrize("n_rows", [1, 2])
def test_an_adaptation_after_restore(n_rows):
    model = tiny_model("llama")
    adapted = trainer_of(model).adapt(prompt_ids(6, n_rows=n_rows), deltas="independent")
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
    with trainer_of(model).adapt(IDS) as new:
        expected = new.loss()
        adapted.restore()
        assert torch.equal(new.loss(), expected)


def test_a_model_whose_weights_were_replaced():
    model = tiny_model("llama")
    trainer = trainer_of(model)
    trainer.adapt(IDS).restore()
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    with unchanged(model), pytest.raises(RuntimeError, match=r"lm_head.weight .*replaced"):
        trainer.adapt(IDS)
    assert_adapts(model)


# ---------------------------------------------------------------------------- bad input

BAD_INPUT = {
    "an empty prompt": (dict(prompt=[]), ValueError, "the prompt is empty"),
    "an empty tensor": (dict(prompt=torch.empty(0)), ValueError, "the prompt is empty"),
    "an empty row": (
        dict(prompt=torch.empty(1, 0, dtype=torch.int64)), ValueError, "the prompt is empty"),
    "no rows": (
        dict(prompt=torch.empty(0, 4, dtype=torch.int64)), ValueError, "the prompt is empty"),
    "an empty row among others": (
        dict(prompt=[[5, 6], []], deltas="shared"), ValueError, "the prompt is empty"),
    "one token": (dict(prompt=[5]), ValueError, "prompt 0 has 1 token, .*nothing to predict"),
    "one token among others": (
        dict(prompt=[[5, 6, 7], [5]], deltas="independent"), ValueError, "prompt 1 has 1 token,"),
    "all labels masked": (
        dict(prompt=IDS, labels=torch.full_like(IDS, -100)), ValueError, "labels mask out every"),
    "only the first label": (
        dict(prompt=IDS, labels=torch.where(torch.arange(8) == 0, IDS, -100)),
        ValueError, "labels mask out every token of prompt 0"),
    "everything is padding": (
        dict(prompt=IDS, attention_mask=torch.zeros_like(IDS)), ValueError, "has 0 tokens"),
    "ids above the vocabulary": (
        dict(prompt=IDS + 100), ValueError, r"token ids run from .* vocabulary has 101 entries"),
    "ids below zero": (dict(prompt=IDS - 200), ValueError, "token ids run from -"),
    "labels outside the vocabulary": (
        dict(prompt=IDS, labels=IDS + 100), ValueError, "labels has value 1.*token ids below 101"),
    "longer than the context": (
        dict(prompt=prompt_ids(65)), ValueError, "has 65 tokens but the model's context is 64"),
    "several rows": (
        dict(prompt=prompt_ids(5, n_rows=3)), ValueError, "got 3 rows; say deltas='independent'"),
    "deltas of another kind": (
        dict(prompt=IDS, deltas="both"), ValueError, "deltas='both' is unknown"),
    "ids that are not integers": (dict(prompt=IDS.float()), TypeError, "dtype torch.float32"),
    "three dimensions": (dict(prompt=IDS[None]), ValueError, r"shape \(1, 1, 8\)"),
    "a list of matrices": (
        dict(prompt=[prompt_ids(5, 2)], deltas="shared"), ValueError, r"prompt 0 has shape"),
    "no prompt": (dict(prompt=None), TypeError, "got NoneType"),
    "a mapping without ids": (
        dict(prompt={"labels": IDS}), ValueError, r"\['labels'\]; it needs 'input_ids'"),
    "a mask of another shape": (
        dict(prompt=IDS, attention_mask=torch.ones(1, 3)), ValueError, "attention_mask is"),
    "labels that are no tensor": (dict(prompt=IDS, labels=[1]), ValueError, "labels is list"),
    "weights that are not finite": (
        dict(prompt=IDS, token_weights=torch.full((1, 8), torch.nan)),
        ValueError, "token_weights must be finite"),
    "weights that are all zero": (
        dict(prompt=IDS, token_weights=torch.zeros(1, 8)), ValueError, "must not sum to 0"),
    "too many row weights": (
        dict(prompt=IDS, row_weights=torch.ones(3)), ValueError, r"row_weights has shape \(3,\)"),
    "row weights that are not finite": (
        dict(prompt=IDS, row_weights=torch.tensor([torch.inf])), ValueError, "must be finite"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input(case):
    call, error, message = BAD_INPUT[case]
    model = lived_in()
    trainer = trainer_of(model)
    with unchanged(model), pytest.raises(error, match=message):
        trainer.adapt(**call)
    assert_adapts(model)


BAD_CONFIG = {
    "lr nan": (dict(lr=float("nan")), "lr=nan"),
    "lr infinite": (dict(lr=float("inf")), "lr=inf"),
    "lr negative": (dict(lr=-1e-3), "lr=-0.001"),
    "steps negative": (dict(steps=-1), "steps=-1"),
    "scope unknown": (dict(scope="fnn"), "scope 'fnn'"),
    "scope empty": (dict(scope="lora"), "scope 'lora' selects nothing"),
    "callable that selects nothing": (dict(scope=lambda name, param: False), "selects nothing"),
    "group without parameters": (
        dict(scope="ffn", param_groups=[{"params": "norm", "lr": 0.1}]),
        r"param_groups\[0\] .* no parameter of scope 'ffn' left"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_CONFIG)
def test_bad_configuration(case):
    options, message = BAD_CONFIG[case]
    model = lived_in()
    with unchanged(model), pytest.raises(ValueError, match=message):
        trainer_of(model, **options).adapt(IDS)
    assert_adapts(model)


def test_a_schedule_that_goes_wrong_on_the_way():
    model = lived_in()
    with unchanged(model), pytest.raises(ValueError, match="lr=-1.0 at step 3"):
        trainer_of(model, lr=lambda step: -1.0 if step == 2 else 0.01).adapt(IDS)
    with unchanged(model), trainer_of(model, lr=[0.1] * STEPS).begin() as session:
        for _ in range(STEPS):
            session.step(Batch(IDS))
        with pytest.raises(ValueError, match="lr has 4 values but step 5"):
            session.step(Batch(IDS))


def test_quantised_weights():
    model = tiny_model("llama")
    down = model.model.layers[0].mlp.down_proj
    down.weight = nn.Parameter(down.weight.detach().to(torch.int8), requires_grad=False)
    with unchanged(model), pytest.raises(ValueError, match=re.escape("down_proj.weight")):
        trainer_of(model, scope="ffn")
