"""Ops and adaptations on streams other than the default, and on several devices."""

import pytest
import torch

from tests.families import tiny_model
from tests.gpu.device_cases import assert_same_case, backends_of, case_on
from tests.loops import prompt_ids
from tests.update_cases import make_case, sgd_step
from ttt_fast import TTTConfig, TTTTrainer, ops

pytestmark = pytest.mark.gpu
backends = pytest.mark.parametrize("backend", backends_of("sgd_"))
LONG_CYCLES = 50_000_000  # a few hundredths of a second


@pytest.mark.cuda
@backends
def test_an_op_runs_on_the_current_stream(device, backend):
    """The gradients are written late on a side stream: an op on another one would miss them."""
    expected = make_case([(4097,), (65537,)], [torch.float32, torch.bfloat16], n_states=1)
    late = case_on(device, expected)
    actual = case_on(device, expected)
    for grad in actual.grads:
        grad.zero_()
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        torch.cuda._sleep(LONG_CYCLES)
        for grad, value in zip(actual.grads, late.grads, strict=True):
            grad.copy_(value)
        sgd_step(actual, backend, lr=0.1, momentum=0.9)
    torch.cuda.current_stream(device).wait_stream(stream)
    sgd_step(expected, "torch", lr=0.1, momentum=0.9)
    assert_same_case(actual, expected)


@pytest.mark.cuda
@pytest.mark.parametrize("engine", ["dense", "factored"])
def test_an_adaptation_on_a_side_stream(device, engine):
    model = tiny_model("llama").to(device)
    config = TTTConfig(steps=4, engine=engine, weight_decay=0.01)
    ids = prompt_ids(9).to(device)
    with TTTTrainer(model, config).adapt(ids) as adapted:
        expected = adapted.losses
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        torch.cuda._sleep(LONG_CYCLES)
        with TTTTrainer(model, config).adapt(ids) as adapted:
            assert torch.equal(adapted.losses, expected)


@pytest.mark.devices
@backends
def test_an_op_on_another_device_than_the_current_one(backend):
    expected = make_case([(4097,), (65537,)], [torch.float32, torch.bfloat16], n_states=1)
    actual = case_on(torch.device("cuda:1"), expected)
    with torch.cuda.device(0):
        sgd_step(actual, backend, lr=0.1, momentum=0.9)
    sgd_step(expected, "torch", lr=0.1, momentum=0.9)
    assert_same_case(actual, expected)


@pytest.mark.devices
def test_a_norm_over_several_devices():
    grads = [torch.randn(4097, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    spread = [grad.to(f"cuda:{i % 2}") for i, grad in enumerate(grads)]
    norm = ops.grad_norm(spread)
    assert norm.device == spread[0].device
    torch.testing.assert_close(norm.cpu(), ops.grad_norm(grads), rtol=1e-6, atol=0)


@pytest.mark.devices
@pytest.mark.parametrize("engine", ["dense", "factored"])
def test_a_model_on_the_second_device(engine):
    config = TTTConfig(steps=4, engine=engine, weight_decay=0.01)
    losses = []
    for name in ("cuda:0", "cuda:1"):
        model = tiny_model("llama").to(name)
        with torch.cuda.device(0), TTTTrainer(model, config).adapt(prompt_ids(9)) as adapted:
            losses.append(adapted.losses)
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-6)
