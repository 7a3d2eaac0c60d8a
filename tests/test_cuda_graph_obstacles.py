"""Loops that are not recorded, recordings that fail, replays that are wrong: each is told, and why.

On the CPU, with :mod:`tests.emulated_graph` in the place of a CUDA graph.
"""

import warnings

import pytest
import torch

from tests.emulated_graph import EmulatedGraph, emulate
from tests.graph_cases import (
    OPTIONS,
    adapt_both,
    engines,
    prompts,
    small_model,
    trainer_of,
    twins,
)
from tests.untouched import unchanged
from ttt_fast import TTTConfig, TTTTrainer, graphs
from ttt_fast.engines import head


@pytest.fixture(autouse=True)
def emulated(monkeypatch):
    emulate(monkeypatch)


# ---------------------------------------------------------------------------- what goes wrong


def looking(reduce_rows):
    """The reduction of losses, with a look at one while a graph is recorded."""

    def reduce(losses, *more):
        if torch.cuda.is_current_stream_capturing():
            losses.sum().item()
        return reduce_rows(losses, *more)

    return reduce


def interrupted(*args):
    raise KeyboardInterrupt


@engines
@pytest.mark.parametrize("fault", ["look", "interrupt"])
def test_recording_that_fails(engine, fault, monkeypatch):
    graphed, eager = twins(engine)
    adapt_both(graphed, eager, seeds=[0])
    faulty = interrupted if fault == "interrupt" else looking(head.reduce_rows)
    monkeypatch.setattr(head, "reduce_rows", faulty)
    with unchanged(graphed.model):
        if fault == "interrupt":
            with pytest.raises(KeyboardInterrupt):
                graphed.adapt(prompts(1))
            return
        with pytest.warns(UserWarning, match=r"recording failed \(LooksError"):
            (status,) = adapt_both(graphed, eager, seeds=[1])
        assert "recording failed" in status
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert "recording failed" in adapt_both(graphed, eager, seeds=[2])[0]
        demanding = trainer_of(graphed.model, engine, True)
        demanding.adapt(prompts(0)).restore()
        with pytest.raises(RuntimeError, match="cuda_graph=True: recording failed"):
            demanding.adapt(prompts(1))


@engines
def test_a_replay_that_fails(engine, monkeypatch):
    def fail(graph):
        raise torch.OutOfMemoryError("too small")

    graphed, eager = twins(engine)
    adapt_both(graphed, eager, seeds=[0])
    monkeypatch.setattr(EmulatedGraph, "on_replay", fail)
    with unchanged(graphed.model), pytest.warns(UserWarning, match="a replay failed .*too small"):
        (status,) = adapt_both(graphed, eager, seeds=[1])
    assert "too small" in status


@engines
def test_a_replay_that_gives_other_numbers(engine, monkeypatch):
    def spoil(graph):
        """Leave the last softmax out."""
        names = [call.func.name() for call in graph.calls]
        del graph.calls[len(names) - 1 - names[::-1].index("ttt_fast::nll_")]

    graphed, eager = twins(engine)
    with unchanged(graphed.model):
        adapt_both(graphed, eager, seeds=[0])
        monkeypatch.setattr(EmulatedGraph, "on_replay", spoil)
        wrong = "a replay gave a loss of nan at step 2, one by one it is"
        with pytest.warns(UserWarning, match=wrong):
            (status,) = adapt_both(graphed, eager, seeds=[1])
        assert wrong in status
        assert wrong in adapt_both(graphed, eager, seeds=[2])[0]
        demanding = trainer_of(graphed.model, engine, True)
        demanding.adapt(prompts(0)).restore()
        with pytest.raises(RuntimeError, match=f"cuda_graph=True: {wrong}"):
            demanding.adapt(prompts(1))


# ---------------------------------------------------------------------------- what is not recorded


REFUSED = {
    "on_step": (dict(), dict(on_step=lambda report: None), "on_step and stop look"),
    "stop": (dict(), dict(stop=lambda report: False), "on_step and stop look"),
    "check_every": (dict(check_every=1), dict(), "check_every=1 looks"),
    "dropout": (dict(dropout=True), dict(), "dropout=True"),
    "torch": (dict(rounding="torch"), dict(), "looks at found_inf"),
    "backend": (dict(backend="torch", engine="dense"), dict(), "looks at found_inf"),
    "spans": (dict(kv="frozen"), dict(), "kv='frozen' takes another span"),
    "no steps": (dict(steps=0), dict(), "steps=0"),
    "positions": (dict(), dict(position_ids=torch.tensor([0, 1, 2, 3, 0, 1, 2, 3, 4])),
                  "position ids other than"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_recorded(name):
    options, given, reason = REFUSED[name]
    options = {"engine": "dense"} | options
    model = small_model()
    trainer = trainer_of(model, cuda_graph="auto", **options)
    for _ in range(3):
        with trainer.adapt(prompts(0), **given) as adapted:
            assert reason in adapted.cuda_graph
    with unchanged(model), pytest.raises(ValueError, match=f"cuda_graph=True, but .*{reason}"):
        trainer_of(model, cuda_graph=True, **options).adapt(prompts(0), **given)
    assert not EmulatedGraph.made


def test_objectives_hooks_and_budgets_are_not_recorded():
    model, options = small_model(), OPTIONS | {"cuda_graph": "auto"}
    trainer = TTTTrainer(model, TTTConfig(**options), objective=lambda outputs, batch: None)
    assert "Python of your objective" in trainer._graph_obstacle(watched=False)
    trainer = TTTTrainer(model, TTTConfig(**options))
    assert trainer._graph_obstacle(watched=False) is None
    handle = model.model.layers[0].register_forward_hook(lambda *args: None)
    assert "would not run the hooks" in trainer._graph_obstacle(watched=False)
    handle.remove()
    handle = model.model.norm.weight.register_hook(lambda grad: grad)
    assert "would not run the hooks" in trainer._graph_obstacle(watched=False)
    handle.remove()
    model.model.layers[0].mlp.forward = model.model.layers[0].mlp.forward
    assert "forwards of their own" in trainer._graph_obstacle(watched=False)
    del model.model.layers[0].mlp.forward
    trainer = TTTTrainer(model, TTTConfig(memory_budget=10**9, **options))
    assert "memory_budget" in trainer._graph_obstacle(watched=False)
    trainer = TTTTrainer(model, TTTConfig(memory_budget=10**9, **options | {"cuda_graph": True}))
    assert trainer._graph_obstacle(watched=False) is None


def test_none_on_the_cpu(monkeypatch):
    monkeypatch.delitem(graphs.RECORDERS, "cpu")
    model = small_model()
    with trainer_of(model, "dense").adapt(prompts(0)) as adapted:
        assert adapted.cuda_graph == (
            "steps ran one by one: the model is on cpu, not on a CUDA device"
        )
    with unchanged(model), pytest.raises(ValueError, match="cuda_graph=True, but the model is on"):
        trainer_of(model, "dense", True).adapt(prompts(0))
    with trainer_of(model, "dense", False).adapt(prompts(0)) as adapted:
        assert adapted.cuda_graph == "steps ran one by one: cuda_graph=False"
