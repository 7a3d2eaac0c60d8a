"""Recorded loops on the device: what they leave is what steps one by one leave.

A rehearsal on the CPU takes the emulation of tests/emulated_graph.py, and a few of the cases: those
in tests/test_cuda_graph.py are more.
"""

import pytest
import torch

from tests.emulated_graph import emulate
from tests.families import tiny_model
from tests.loops import prompt_ids, weights
from ttt_fast import TTTConfig, TTTTrainer
from ttt_fast.history import History

pytestmark = pytest.mark.gpu
engines = pytest.mark.parametrize("engine", ["dense", "factored"])
OPTIONS = dict(steps=5, lr=2e-2, momentum=0.9, weight_decay=0.01, max_grad_norm=1.0)
CASES = {
    "one": dict(),
    "untied": dict(family="llama"),
    "sdpa": dict(attn_implementation="sdpa"),
    "gpt2": dict(family="gpt2"),
    "gemma2": dict(family="gemma2", layers=2),
    "several": dict(lengths=(9, 6, 13)),
    "schedule": dict(lr=[0.05, 0.01, 0.02, 0.01, 0.03]),
    "nesterov": dict(nesterov=True),
    "checkpointing": dict(checkpointing=True),
}


REHEARSED = ("one", "several")


@pytest.fixture(autouse=True)
def somewhere(device, monkeypatch):
    if device.type == "cpu":
        emulate(monkeypatch)


def small_model(family="llama_tied", dtype=torch.float64, layers=1, **options):
    name = "n_layer" if family == "gpt2" else "num_hidden_layers"
    return tiny_model(family, dtype, **{name: layers}, **options)


def both(device, engine, dtype=torch.float64, lengths=(9,), count=3, **options):
    """Statuses of the prompts of one trainer, and the results of it and of one without graphs."""
    attention = options.pop("attn_implementation", "eager")
    shape = {name: options.pop(name) for name in ("family", "layers") if name in options}
    model = small_model(dtype=dtype, attn_implementation=attention, **shape).to(device)
    before = weights(model)
    trainers = [
        TTTTrainer(model, TTTConfig(engine=engine, cuda_graph=graph, **(OPTIONS | options)))
        for graph in (True, False)
    ]
    statuses, pairs = [], []
    for seed in range(count):
        found = []
        for trainer in trainers:
            prompts = [prompt_ids(n, seed=10 * seed + n)[0] for n in lengths]
            with trainer.adapt(prompts, deltas="independent") as adapted:
                tokens = adapted.generate(max_new_tokens=3, do_sample=False)
                found.append((adapted.losses, adapted.grad_norms, adapted.loss(), tokens.cpu()))
                statuses += [adapted.cuda_graph] if trainer is trainers[0] else []
        pairs.append(found)
    assert all(torch.equal(value, before[n]) for n, value in model.state_dict().items())
    return statuses, pairs


@engines
@pytest.mark.parametrize(
    "name",
    [name if name in REHEARSED else pytest.param(name, marks=pytest.mark.cuda) for name in CASES],
)
def test_as_steps_one_by_one(device, engine, name):
    statuses, pairs = both(device, engine, **CASES[name])
    assert [status.startswith("replayed") for status in statuses] == [False, False, True]
    tolerance = 1e-5 if name.startswith("gemma") else 1e-9  # Gemma's norms work in float32
    for mine, theirs in pairs:
        for found, expected in zip(mine, theirs, strict=True):
            torch.testing.assert_close(found, expected, rtol=tolerance, atol=0)


@pytest.mark.cuda
@engines
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_in_the_dtypes_of_models(device, engine, dtype):
    statuses, pairs = both(device, engine, dtype)
    assert statuses[-1].startswith("replayed")
    for mine, theirs in pairs:
        torch.testing.assert_close(mine[0], theirs[0], rtol=torch.finfo(dtype).eps ** 0.5, atol=0)


@pytest.mark.cuda
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_what_only_the_dense_engine_does(device, optimizer, rounding):
    options = dict(optimizer=optimizer, rounding=rounding, accumulate="delta")
    statuses, pairs = both(device, "dense", torch.bfloat16, **options)
    assert statuses[-1].startswith("replayed")
    for mine, theirs in pairs:
        torch.testing.assert_close(mine[0], theirs[0], rtol=0.1, atol=0)


@pytest.mark.cuda
@engines
def test_longer_prompts_in_between(device, engine):
    model = small_model().to(device)
    graphed, eager = (
        TTTTrainer(model, TTTConfig(engine=engine, cuda_graph=graph, **OPTIONS))
        for graph in ("auto", False)
    )
    for seed, length in enumerate((9, 9, 9, 30, 9, 9, 30, 30)):
        losses = []
        for trainer in (graphed, eager):
            with trainer.adapt(prompt_ids(length, seed=seed)) as adapted:
                losses.append(adapted.losses)
                assert "recording failed" not in adapted.cuda_graph
        torch.testing.assert_close(*losses, rtol=1e-9, atol=0)


@engines
def test_a_recording_that_breaks_is_got_over(device, engine, monkeypatch):
    """The host waits in the middle of the second prompt; it, and all that follow, are as usual."""
    open_step = History.open_step

    def looking(self):
        row = open_step(self)
        if torch.cuda.is_current_stream_capturing():
            row.sum().item()
        return row

    model = small_model().to(device)
    before = weights(model)
    trainer = TTTTrainer(model, TTTConfig(engine=engine, cuda_graph="auto", **OPTIONS))
    expected = trainer.adapt(prompt_ids(9))
    expected.restore()
    monkeypatch.setattr(History, "open_step", looking)
    with pytest.warns(UserWarning, match="recording failed"):
        trainer.adapt(prompt_ids(9)).restore()
    with trainer.adapt(prompt_ids(9)) as adapted:
        torch.testing.assert_close(adapted.losses, expected.losses, rtol=1e-9, atol=0)
    assert all(torch.equal(value, before[n]) for n, value in model.state_dict().items())


@pytest.mark.cuda
@engines
def test_on_another_stream(device, engine):
    with torch.cuda.stream(torch.cuda.Stream(device)):
        statuses, pairs = both(device, engine)
    assert statuses[-1].startswith("replayed")
    for mine, theirs in pairs:
        torch.testing.assert_close(mine[0], theirs[0], rtol=1e-9, atol=0)


@pytest.mark.cuda
@engines
def test_graphs_that_are_forgotten_give_their_memory_back(device, engine):
    model = small_model(dtype=torch.float32, layers=3).to(device)
    trainer = TTTTrainer(model, TTTConfig(engine=engine, cuda_graph=True, **OPTIONS))
    reserved = []
    for length in (40, *range(4, 24)):
        for seed in range(3):
            trainer.adapt(prompt_ids(length, seed=seed)).restore()
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        reserved.append(torch.cuda.memory_reserved(device))
    assert max(reserved[12:]) <= 1.1 * max(reserved[:12])
