"""Ctrl-C at any moment leaves the model as it was, in either engine."""

import contextlib
import gc
import os
import random
import signal
import threading

import pytest
import torch

from tests.families import tiny_model
from tests.loops import prompt_ids
from tests.untouched import (
    IDS,
    assert_adapts,
    lived_in,
    trainer_of,
    unchanged,
)
from ttt_fast.interrupt import uninterrupted

PROMPTS = [prompt_ids(n, seed=n)[0] for n in (6, 3, 8)]

engines = pytest.mark.parametrize("engine", ["dense", "factored"])


@pytest.fixture
def ctrl_c():
    """Ctrl-C raises, also in a process that was started in the background, where it is ignored."""
    found = signal.signal(signal.SIGINT, signal.default_int_handler)
    # What is raised within a callback of the garbage collector is lost; hypothesis has one.
    callbacks = gc.callbacks[:]
    gc.callbacks.clear()
    yield
    gc.callbacks[:] = callbacks
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


@pytest.mark.parametrize(
    ("engine", "seed"),
    [*[("dense", seed) for seed in range(30)], *[("factored", seed) for seed in range(12)]],
)
@pytest.mark.parametrize("deltas", ["shared", "independent"])
def test_ctrl_c_at_any_moment(ctrl_c, engine, seed, deltas):
    """Many more steps than are taken, so that the signal always comes during one of them."""
    model = lived_in("llama")
    generator = random.Random(seed)
    forward, delay = generator.randint(1, 6), generator.randint(0, 200_000)
    trainer = trainer_of(model, steps=5000, lr=1e-6, engine=engine)
    with unchanged(model), pytest.raises(KeyboardInterrupt):
        with interrupted_at(model, forward, delay):
            trainer.adapt(prompt_ids(6, n_rows=2), deltas=deltas)
    assert_adapts(model, engine)


@engines
def test_ctrl_c_in_every_module(ctrl_c, engine):
    """In the forward of each module, in its backward, and in each step's end."""
    model = lived_in("llama")
    trainer = trainer_of(model, steps=2, engine=engine)

    def interrupt(*_):
        os.kill(os.getpid(), signal.SIGINT)

    def in_backward(module, inputs, output):
        if isinstance(output, torch.Tensor) and output.requires_grad:
            output.register_hook(interrupt)

    owners = [m for m in model.modules() if list(m.parameters(recurse=False))]
    for module in owners:
        for hook in (interrupt, in_backward):
            handle = module.register_forward_hook(hook)
            with unchanged(model), pytest.raises(KeyboardInterrupt):
                trainer.adapt(PROMPTS, deltas="independent")
            handle.remove()
    with unchanged(model), pytest.raises(KeyboardInterrupt):
        trainer.adapt(IDS, on_step=interrupt)
    assert_adapts(model, engine)


def test_ctrl_c_during_the_update_waits_for_its_end(ctrl_c, monkeypatch):
    """In the update and in giving things back it is held; the model is whole when it is raised."""
    model = lived_in("llama")
    trainer = trainer_of(model)
    trainer.adapt(IDS).restore()
    engine = trainer._engines["dense"]
    update, done = engine.update, []

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


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("during", ["attach", "detach", "update", "finish_step"])
def test_ctrl_c_at_the_edges_of_what_the_factored_engine_does(ctrl_c, monkeypatch, during, when):
    model = lived_in("llama")
    trainer = trainer_of(model, engine="factored")
    trainer.adapt(IDS).restore()
    engine = trainer._engines["factored"]
    original = getattr(engine, during)

    def interrupted(*args):
        if when == "before":
            signal.raise_signal(signal.SIGINT)
        found = original(*args)
        if when == "after":
            signal.raise_signal(signal.SIGINT)
        return found

    monkeypatch.setattr(engine, during, interrupted)
    with unchanged(model), pytest.raises(KeyboardInterrupt):
        with trainer.adapt(IDS):
            pass
    monkeypatch.undo()
    with unchanged(model), trainer.adapt(IDS) as adapted:
        assert adapted.losses.isfinite().all()


@engines
def test_ctrl_c_between_the_lines(monkeypatch, engine):
    """When the session has ended and the caller has nothing in hands yet."""
    model = lived_in("llama")
    trainer = trainer_of(model, engine=engine)
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
        assert_adapts(model, engine)


@engines
def test_ctrl_c_before_the_end_of_the_block_holds_it_back(monkeypatch, engine):
    model, enter = lived_in("llama"), uninterrupted.__enter__

    def interrupted(self):
        monkeypatch.undo()
        raise KeyboardInterrupt

    with unchanged(model), pytest.raises(KeyboardInterrupt):
        with trainer_of(model, engine=engine).adapt(IDS):
            monkeypatch.setattr(uninterrupted, "__enter__", interrupted)
    assert uninterrupted.__enter__ is enter
    assert_adapts(model, engine)


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


@engines
def test_outside_the_main_thread(engine):
    model, results = tiny_model("llama"), []

    def work():
        with trainer_of(model, engine=engine).adapt(IDS) as adapted:
            results.append(adapted.losses)

    with unchanged(model):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert results[0].isfinite().all()
