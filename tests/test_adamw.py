import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tolerances import assert_no_worse
from tests.update_cases import (
    DTYPES,
    SLICE_SHAPES,
    adamw_step,
    as_row_slices,
    assert_same_bits,
    backend_params,
    make_case,
    odd_case,
    steps_of_grads,
)
from ttt_fast import ops
from ttt_fast.reference import _square_root

backends = pytest.mark.parametrize("backend", backend_params())
needs_cpp = pytest.mark.parametrize("backend", backend_params()[1:])
OPTIONS = {
    "plain": {"weight_decay": 0.0},
    "decay": {"weight_decay": 0.1},
    "betas": {"betas": (0.5, 0.99), "eps": 1e-4},
    "maximize": {"maximize": True, "weight_decay": 0.01},
}
options = pytest.mark.parametrize("kwargs", OPTIONS.values(), ids=OPTIONS.keys())


def run_stock(params, grads_of_steps, max_norm, **kwargs):
    params = [torch.nn.Parameter(p.clone()) for p in params]
    optimizer = torch.optim.AdamW(params, lr=0.01, foreach=True, **kwargs)
    for grads in grads_of_steps:
        for p, g in zip(params, grads, strict=True):
            p.grad = g.to(p.dtype, copy=True)
        torch.nn.utils.clip_grad_norm_(params, max_norm, foreach=True)
        optimizer.step()
    return [p.detach() for p in params]


def run_ours(params, grads_of_steps, max_norm, backend, **kwargs):
    params = [p.clone() for p in params]
    exp_avgs = [torch.zeros_like(p) for p in params]
    exp_avg_sqs = [torch.zeros_like(p) for p in params]
    for step, grads in enumerate(grads_of_steps):
        if kwargs.get("rounding") == "torch":
            norm = torch.nn.utils.get_total_norm(grads, foreach=True)
        else:
            norm = ops.grad_norm(grads, backend=backend)
        ops.adamw_(
            params, grads, exp_avgs, exp_avg_sqs, lr=0.01, step_index=step + 1, grad_norm=norm,
            max_grad_norm=max_norm, backend=backend, **kwargs,
        )  # fmt: skip
    return params


@backends
@options
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("max_norm", [1.0, 1e4])
def test_as_near_to_fp64_as_torch_after_20_steps(backend, kwargs, dtype, max_norm):
    if dtype == torch.float16:
        kwargs = kwargs | {"eps": 1e-4}  # 1e-8 is 0 in float16
    params = make_case([(7, 11), (64,), (), (4097,)], [dtype]).params
    grads = steps_of_grads(params)
    wide = [[g.double() for g in step] for step in grads]
    oracle = run_stock([p.double() for p in params], wide, max_norm, **kwargs)
    stock = run_stock(params, grads, max_norm, **kwargs)
    mine = run_ours(params, grads, max_norm, backend, **kwargs)
    # All at once: torch's distance on a tensor of one element is luck.
    flat = [torch.cat([p.flatten() for p in params]) for params in (mine, stock, oracle)]
    assert_no_worse(*flat, "params")


@options
def test_rounding_torch_is_bitwise_stock_in_bf16(kwargs):
    params = make_case([(7, 11), (64,), (4097,), (3, 5, 7)], [torch.bfloat16]).params
    grads = steps_of_grads(params)
    stock = run_stock(params, grads, 1.0, **kwargs)
    mine = run_ours(params, grads, 1.0, "auto", rounding="torch", **kwargs)
    assert_same_bits(mine, stock, "params")


@needs_cpp
@options
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("accumulate", [False, True], ids=["weight", "delta"])
@pytest.mark.parametrize("wide", ["nothing", "grads", "states"])
def test_backends_agree_bit_for_bit(backend, kwargs, rounding, accumulate, wide):
    expected = odd_case(2, wide, accumulate)
    assert_backends_agree(expected, expected.clone(), backend, rounding=rounding, **kwargs)


@needs_cpp
@options
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_backends_agree_on_strided_views(backend, kwargs, dtype):
    expected = as_row_slices(make_case(SLICE_SHAPES, [dtype], n_states=2, accumulate=True))
    assert_backends_agree(expected, expected.clone(), backend, rounding="stochastic", **kwargs)


def assert_backends_agree(expected, actual, backend, **kwargs):
    for step in range(3):
        norm = ops.grad_norm(expected.grads, backend="torch")
        for case, name in ((expected, "torch"), (actual, backend)):
            adamw_step(
                case, name, lr=0.05, step_index=step + 1, seed=step, grad_norm=norm,
                max_grad_norm=3.0, grad_scale=torch.tensor(4.0), **kwargs,
            )  # fmt: skip
        actual.assert_same(expected)


@needs_cpp
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_backends_agree_on_anything(backend, data):
    shapes = data.draw(
        st.lists(st.lists(st.integers(0, 70), min_size=0, max_size=3).map(tuple), max_size=5)
    )
    expected = make_case(
        shapes, data.draw(st.lists(st.sampled_from(DTYPES), min_size=1, max_size=4)), n_states=2,
        wide_grads=data.draw(st.booleans()), wide_states=data.draw(st.booleans()),
        accumulate=data.draw(st.booleans()),
    )  # fmt: skip
    actual = expected.clone()
    kwargs = {
        "lr": data.draw(st.sampled_from([0.0, 1e-6, 0.1])),
        "betas": data.draw(st.sampled_from([(0.9, 0.999), (0.0, 0.5)])),
        "eps": data.draw(st.sampled_from([1e-8, 1e-3])),
        "weight_decay": data.draw(st.sampled_from([0.0, 0.1])),
        "maximize": data.draw(st.booleans()),
        "rounding": data.draw(st.sampled_from(["nearest", "stochastic"])),
        "step_index": data.draw(st.sampled_from([1, 2, 1000])),
    }
    for seed in range(2):
        adamw_step(expected, "torch", seed=seed, **kwargs)
        adamw_step(actual, backend, seed=seed, **kwargs)
    actual.assert_same(expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_square_root_is_correctly_rounded(dtype):
    generator = torch.Generator().manual_seed(0)
    exponent = torch.randint(-18, 18, (100000,), generator=generator)
    x = (torch.rand(100000, generator=generator, dtype=torch.float64) * 10.0**exponent).to(dtype)
    x[:4] = torch.tensor([0.0, torch.inf, torch.nan, 1.0])
    expected = torch.tensor([math.sqrt(v) for v in x.tolist()], dtype=torch.float64).to(dtype)
    assert_same_bits([_square_root(x)], [expected], "square root")


@backends
def test_empty_lists_and_found_inf_change_nothing(backend):
    ops.adamw_([], [], [], [], lr=0.1, step_index=1, backend=backend)
    case = make_case([(100,)], [torch.bfloat16], n_states=2)
    before = case.clone()
    adamw_step(case, backend, lr=0.5, step_index=1, found_inf=torch.tensor(1.0))
    case.assert_same(before)


@backends
def test_300_tiny_tensors(backend):
    case = make_case([(1 + i % 7,) for i in range(300)], DTYPES, n_states=2)
    single = case.clone()
    adamw_step(case, backend, measure=False, lr=0.5, step_index=3)
    for i in range(300):
        ops.adamw_(
            [single.params[i]], [single.grads[i]], [single.states[0][i]], [single.states[1][i]],
            lr=0.5, step_index=3, backend="torch",
        )  # fmt: skip
    assert_same_bits(case.params, single.params, "params")


@backends
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step_index": 0}, "counts from 1"),
        ({"exp_avgs": []}, "got 1 params but 0 exp_avgs"),
        ({"exp_avg_sqs": [torch.zeros(3, dtype=torch.int32)]}, r"exp_avg_sqs\[0\] is int32"),
        ({"max_grad_norm": 1.0}, "needs grad_norm"),
    ],
)
def test_errors_say_what_is_wrong(backend, change, message):
    arguments = {
        "params": [torch.zeros(3)], "grads": [torch.ones(3)], "exp_avgs": [torch.zeros(3)],
        "exp_avg_sqs": [torch.zeros(3)], "lr": 0.1, "step_index": 1, "backend": backend,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        ops.adamw_(**(arguments | change))
