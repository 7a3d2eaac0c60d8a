"""Whole adaptations on the device: the numbers of the CPU, the weights back, the host not waiting.

In float64, where the two may differ in the order of their sums and in nothing else.
"""

import warnings

import pytest
import torch
import transformers.masking_utils

from tests.families import tiny_model
from tests.loops import prompt_ids, weights
from ttt_fast import Batch, TTTConfig, TTTTrainer
from ttt_fast.batch import complete_batch

pytestmark = pytest.mark.gpu
engines = pytest.mark.parametrize("engine", ["dense", "factored"])
PROMPTS = [prompt_ids(n, seed=n)[0] for n in (9, 6, 13)]
OPTIONS = dict(steps=5, lr=2e-2, momentum=0.9, weight_decay=0.01, max_grad_norm=1.0)
FAMILIES = ["llama_tied", "gpt2", "gemma2", "qwen3", "phi3", "opt"]


@engines
@pytest.mark.parametrize("family", FAMILIES)
def test_as_on_the_cpu(device, engine, family):
    found = []
    for where in (torch.device("cpu"), device):
        model = tiny_model(family, torch.float64).to(where)
        before = weights(model)
        trainer = TTTTrainer(model, TTTConfig(engine=engine, **OPTIONS))
        with trainer.adapt(PROMPTS, deltas="independent") as adapted:
            found.append((adapted.losses.cpu(), adapted.grad_norms.cpu(), adapted.loss().cpu()))
        assert all(torch.equal(value, before[n]) for n, value in model.state_dict().items())
    tolerance = 1e-5 if family.startswith("gemma") else 1e-9  # Gemma's norms work in float32
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=0)


@engines
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_the_weights_come_back(device, engine, dtype, backend):
    model = tiny_model("llama_tied", dtype).to(device)
    before = weights(model)
    trainer = TTTTrainer(model, TTTConfig(engine=engine, backend=backend, **OPTIONS))
    with trainer.adapt(PROMPTS[0]) as adapted:
        adapted.generate(max_new_tokens=3, do_sample=False)
        assert adapted.losses[0, -1] < adapted.losses[0, 0]
    assert all(torch.equal(value, before[n]) for n, value in model.state_dict().items())


@pytest.mark.parametrize("snapshot", ["device", "host", "undo"])
def test_every_snapshot(device, snapshot):
    model = tiny_model("llama", torch.bfloat16).to(device)
    before = weights(model)
    config = TTTConfig(engine="dense", snapshot=snapshot, **OPTIONS)
    for _ in range(2):
        with TTTTrainer(model, config).adapt(PROMPTS[0]):
            changed = [n for n, v in model.state_dict().items() if not torch.equal(v, before[n])]
            assert changed
        assert all(torch.equal(value, before[n]) for n, value in model.state_dict().items())


@engines
def test_twice_the_same(device, engine):
    model = tiny_model("llama_tied", torch.bfloat16).to(device)
    trainer = TTTTrainer(model, TTTConfig(engine=engine, **OPTIONS))
    runs = []
    for _ in range(2):
        with trainer.adapt(PROMPTS, deltas="independent") as adapted:
            runs.append(adapted.losses)
    assert torch.equal(*runs)


@pytest.mark.cuda
@engines
def test_a_step_waits_for_nothing(device, engine, monkeypatch):
    """As torch itself sees it; tests/test_host_sync.py counts without a GPU."""
    # transformers looks, once a forward, whether position ids are of several packed texts.
    monkeypatch.setattr(
        transformers.masking_utils, "find_packed_sequence_indices", lambda ids: None, raising=False
    )
    model = tiny_model("llama_tied").to(device)
    trainer = TTTTrainer(model, TTTConfig(engine=engine, **(OPTIONS | dict(steps=9))))
    with trainer.begin() as session:
        batch = Batch(prompt_ids(9))
        session.step(batch)
        parts = session.parts(complete_batch(batch, model, 1))
        _ = [rows.padded for _, rows in parts]
        session.step_parts(parts)
        torch.cuda.set_sync_debug_mode("error")
        try:
            session.step_parts(parts)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.cuda
def test_that_waiting_would_be_noticed(device):
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchroniz"), warnings.catch_warnings():
            torch.ones(1, device=device).item()
    finally:
        torch.cuda.set_sync_debug_mode("default")
