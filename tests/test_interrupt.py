"""Ctrl-C at any moment leaves the model as it was."""

import contextlib
import os
import random
import signal
import threading

import pytest

from tests.families import tiny_model
from tests.loops import prompt_ids
from tests.untouched import (
    IDS,
    assert_adapts,
    lived_in,
    trainer_of,
    unchanged,
)

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
