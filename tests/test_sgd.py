import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tolerances import assert_no_worse
from tests.update_cases import (
    DTYPES,
    ODD_SIZES,
    SLICE_SHAPES,
    Case,
    as_row_slices,
    assert_same_bits,
    backend_params,
    for_each_number_of_threads,
    make_case,
    odd_case,
    sgd_step,
    steps_of_grads,
)
from ttt_fast import ops
from ttt_fast.rounding import random_bits, round_stochastic

backends = pytest.mark.parametrize("backend", backend_params())
needs_cpp = pytest.mark.parametrize("backend", backend_params()[1:])
OPTIONS = {
    "plain": {},
    "momentum": {"momentum": 0.9},
    "dampening": {"momentum": 0.9, "dampening": 0.1, "weight_decay": 0.01},
    "nesterov": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
    "maximize": {"momentum": 0.5, "maximize": True, "weight_decay": 0.1},
    "decoupled": {"momentum": 0.9, "weight_decay": 0.1, "decoupled_weight_decay": True},
}
options = pytest.mark.parametrize("kwargs", OPTIONS.values(), ids=OPTIONS.keys())


def run_stock(
    params: list[torch.Tensor], grads_of_steps: list[list[torch.Tensor]], max_norm: float, **kwargs
) -> list[torch.Tensor]:
    """torch.optim.SGD and clip_grad_norm_ on copies; decoupled decay by hand."""
    params = [torch.nn.Parameter(p.clone()) for p in params]
    decay = kwargs.pop("weight_decay", 0.0)
    decoupled = kwargs.pop("decoupled_weight_decay", False)
    optimizer = torch.optim.SGD(
        params, lr=0.1, weight_decay=0.0 if decoupled else decay, foreach=True, **kwargs
    )
    for grads in grads_of_steps:
        for p, g in zip(params, grads, strict=True):
            p.grad = g.to(p.dtype, copy=True)
        torch.nn.utils.clip_grad_norm_(params, max_norm, foreach=True)
        if decoupled:
            with torch.no_grad():
                torch._foreach_mul_(params, 1.0 - 0.1 * decay)
        optimizer.step()
    return [p.detach() for p in params]


def run_ours(
    params: list[torch.Tensor], grads_of_steps: list[list[torch.Tensor]], max_norm: float,
    backend: str, **kwargs,
) -> list[torch.Tensor]:  # fmt: skip
    params = [p.clone() for p in params]
    buffers = [torch.full_like(p, float("nan")) for p in params]  # not read on the first step
    for step, grads in enumerate(grads_of_steps):
        if kwargs.get("rounding") == "torch":
            norm = torch.nn.utils.get_total_norm(grads, foreach=True)
        else:
            norm = ops.grad_norm(grads, backend=backend)
        ops.sgd_(
            params, grads, buffers, lr=0.1, grad_norm=norm, max_grad_norm=max_norm,
            first_step=step == 0, backend=backend, **kwargs,
        )  # fmt: skip
    return params


@backends
@options
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("max_norm", [1.0, 1e4])
def test_as_near_to_fp64_as_torch_after_20_steps(backend, kwargs, dtype, max_norm):
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
    nearest = run_ours(params, grads, 1.0, "auto", rounding="nearest", **kwargs)
    with pytest.raises(AssertionError, match="elements differ"):
        assert_same_bits(nearest, stock, "params")


@needs_cpp
@options
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("accumulate", [False, True], ids=["weight", "delta"])
@pytest.mark.parametrize("wide", ["nothing", "grads", "states"])
def test_backends_agree_bit_for_bit(backend, kwargs, rounding, accumulate, wide):
    expected = odd_case(1, wide, accumulate)
    actual = expected.clone()
    assert_backends_agree(expected, actual, backend, rounding=rounding, **kwargs)


@needs_cpp
@options
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("accumulate", [False, True], ids=["weight", "delta"])
def test_backends_agree_on_strided_views(backend, kwargs, dtype, accumulate):
    whole = make_case(SLICE_SHAPES, [dtype], n_states=1, accumulate=accumulate)
    untouched = whole.clone()
    expected = as_row_slices(whole)
    actual = expected.clone()
    assert_backends_agree(expected, actual, backend, rounding="stochastic", **kwargs)
    # What lies between the rows of a slice belongs to somebody else.
    outside = torch.ones(96, 48, dtype=torch.bool)
    outside.unflatten(0, (-1, 32)).narrow(1, 16, 16)[:] = False
    assert torch.equal(whole.params[0][outside], untouched.params[0][outside])
    around = actual.params[0]._base if actual.params[0]._is_view() else None
    assert around is not None
    assert torch.equal(around.view(96, 48)[outside], untouched.params[0][outside])


def assert_backends_agree(expected: Case, actual: Case, backend: str, **kwargs) -> None:
    scale = torch.tensor(4.0)
    for step in range(3):
        norm = ops.grad_norm(expected.grads, backend="torch")
        for case, name in ((expected, "torch"), (actual, backend)):
            sgd_step(
                case, name, lr=0.05, first_step=step == 0, seed=step, grad_norm=norm,
                max_grad_norm=3.0, grad_scale=scale, **kwargs,
            )  # fmt: skip
        actual.assert_same(expected)


@needs_cpp
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_backends_agree_on_anything(backend, data):
    shapes = data.draw(
        st.lists(st.lists(st.integers(0, 70), min_size=0, max_size=3).map(tuple), max_size=5)
    )
    dtypes = data.draw(st.lists(st.sampled_from(DTYPES), min_size=1, max_size=4))
    expected = make_case(
        shapes, dtypes, n_states=1, wide_grads=data.draw(st.booleans()),
        wide_states=data.draw(st.booleans()), accumulate=data.draw(st.booleans()),
    )  # fmt: skip
    actual = expected.clone()
    kwargs = {
        "lr": data.draw(st.sampled_from([0.0, 1e-6, 0.1, 3.0])),
        "momentum": data.draw(st.sampled_from([0.0, 0.9])),
        "dampening": data.draw(st.sampled_from([0.0, 0.3])),
        "nesterov": data.draw(st.booleans()),
        "weight_decay": data.draw(st.sampled_from([0.0, 0.1])),
        "decoupled_weight_decay": data.draw(st.booleans()),
        "maximize": data.draw(st.booleans()),
        "rounding": data.draw(st.sampled_from(["nearest", "stochastic"])),
        "seed": data.draw(st.integers(-(2**63), 2**63 - 1)),
    }
    for step in range(2):
        sgd_step(expected, "torch", first_step=step == 0, **kwargs)
        sgd_step(actual, backend, first_step=step == 0, **kwargs)
    actual.assert_same(expected)


@needs_cpp
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_extreme_values_agree(backend, dtype, rounding):
    values = [0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-45, 6e-8, 5.9e-8, 65504.0, 65519.9]
    values += [3.0e38, 3.4e38, 1e-38, 6.1e-5, -6.1035e-5, 2.0**-24, 2.0**-25, 1.0, -1.0]
    pairs = list(itertools.product(values, values))
    params = torch.tensor([a for a, _ in pairs], dtype=torch.float64).to(dtype)
    grads = torch.tensor([b for _, b in pairs], dtype=torch.float64).to(dtype)
    expected = Case([params], [grads], [])
    actual = expected.clone()
    sgd_step(expected, "torch", measure=False, lr=1.0, rounding=rounding, seed=3)
    sgd_step(actual, backend, measure=False, lr=1.0, rounding=rounding, seed=3)
    assert_same_bits(actual.params, expected.params, "params")


@backends
def test_empty_lists_change_nothing(backend):
    ops.sgd_([], [], lr=0.1, backend=backend)
    assert ops.grad_norm([], backend=backend).item() == 0.0


@backends
def test_300_tiny_tensors(backend):
    case = make_case([(1 + i % 7,) for i in range(300)], DTYPES, n_states=1)
    before = case.clone()
    sgd_step(case, backend, lr=0.5, momentum=0.9, first_step=True)
    for p, b, g in zip(case.params, before.params, before.grads, strict=True):
        assert torch.equal(p, (b.double() - 0.5 * g.double()).to(p.dtype))


@backends
def test_found_inf_changes_nothing(backend):
    case = make_case([(100,)], [torch.bfloat16], n_states=1, accumulate=True)
    before = case.clone()
    sgd_step(case, backend, lr=0.5, momentum=0.9, found_inf=torch.tensor(1.0))
    case.assert_same(before)
    sgd_step(case, backend, lr=0.5, momentum=0.9, found_inf=torch.tensor(0.0))
    assert not torch.equal(case.params[0], before.params[0])


@backends
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_stochastic_rounding_is_unbiased_and_reproducible(backend, dtype):
    # 0.3 of the way between two neighbours: up with probability 0.3.
    unit = torch.finfo(dtype).eps
    start = torch.ones(20000, dtype=dtype)
    grads = torch.full((20000,), -0.3 * unit, dtype=torch.float32)
    ups = []
    for seed in range(20):
        param = start.clone()
        ops.sgd_([param], [grads], lr=1.0, rounding="stochastic", seed=seed, backend=backend)
        again = start.clone()
        ops.sgd_([again], [grads], lr=1.0, rounding="stochastic", seed=seed, backend=backend)
        assert torch.equal(param, again)
        assert set(param.unique().tolist()) == {1.0, 1.0 + unit}
        ups.append((param > 1).double().mean())
    n = 20 * 20000
    assert abs(torch.stack(ups).mean() - 0.3) < 5 * (0.3 * 0.7 / n) ** 0.5 + 2.0**-13
    assert len({u.item() for u in ups}) > 1, "the seed has no effect"


def test_stochastic_rounding_of_float16_subnormals_is_unbiased():
    x = torch.full((200000,), 3.3 * 2.0**-24)
    rounded = round_stochastic(x, torch.float16, random_bits(1, 0, x.numel(), x.device))
    units = rounded.double() * 2.0**24
    assert set(units.unique().tolist()) == {3.0, 4.0}
    assert abs(units.mean() - 3.3) < 5 * (0.21 / x.numel()) ** 0.5 + 2.0**-12


@backends
def test_landed_tells_what_rounding_swallowed(backend):
    landed = {}
    for dtype, lr in ((torch.float32, 1e-2), (torch.bfloat16, 1e-2), (torch.bfloat16, 1e-6)):
        case = make_case([(5000,)], [dtype])
        sgd_step(case, backend, lr=lr)
        landed[dtype, lr] = (case.landed[0] / case.landed[1]).item()
    assert landed[torch.float32, 1e-2] == pytest.approx(1.0, abs=1e-3)
    assert landed[torch.bfloat16, 1e-2] == pytest.approx(1.0, abs=0.2)
    assert landed[torch.bfloat16, 1e-6] < 0.1


@backends
def test_delta_keeps_what_bf16_weights_cannot(backend):
    case = make_case([(1000,)], [torch.bfloat16], accumulate=True)
    case.deltas[0].zero_()
    expected = -20 * 1e-4 * case.grads[0].float()
    for _ in range(20):
        sgd_step(case, backend, lr=1e-4)
    torch.testing.assert_close(case.deltas[0], expected, rtol=1e-5, atol=1e-9)
    assert torch.equal(case.params[0], (case.bases[0].float() + case.deltas[0]).bfloat16())


@backends
@pytest.mark.parametrize("dtypes", [[d] for d in DTYPES] + [list(DTYPES)], ids=str)
def test_grad_norm_against_fp64(backend, dtypes):
    grads = make_case(ODD_SIZES, dtypes).grads
    norm = ops.grad_norm(grads, backend=backend)
    oracle = torch.cat([g.double().flatten() for g in grads]).square().sum().sqrt()
    assert norm.dtype == (torch.float64 if torch.float64 in dtypes else torch.float32)
    torch.testing.assert_close(norm.double(), oracle, rtol=2 * torch.finfo(norm.dtype).eps, atol=0)


@backends
def test_grad_norm_of_strided_views(backend):
    grads = as_row_slices(make_case(SLICE_SHAPES, [torch.float32])).grads
    oracle = torch.cat([g.double().flatten() for g in grads]).norm()
    norm = ops.grad_norm(grads, backend=backend)
    torch.testing.assert_close(norm.double(), oracle, rtol=1e-7, atol=0)


@needs_cpp
def test_results_do_not_depend_on_the_number_of_threads(backend):
    def run():
        case = make_case([(400000,), (7,), (131075,)], [torch.bfloat16, torch.float32])
        norm = ops.grad_norm(case.grads, backend=backend)
        sgd_step(case, backend, lr=0.1, grad_norm=norm, max_grad_norm=1.0, rounding="stochastic")
        return case, norm

    results = for_each_number_of_threads(run, (1, 2, 3))
    for case, norm in results[1:]:
        assert_same_bits([norm], [results[0][1]], "norm")
        assert_same_bits(case.params, results[0][0].params, "params")
        assert_same_bits([case.landed], [results[0][0].landed], "landed")


@backends
def test_nan_norm_poisons_every_weight(backend):
    # As torch: clip_grad_norm_ multiplies by NaN; whoever wants to skip such a step sets found_inf.
    case = make_case([(10,)], [torch.float32])
    sgd_step(case, backend, lr=0.1, grad_norm=torch.tensor(torch.nan), max_grad_norm=1.0)
    assert case.params[0].isnan().all()


@backends
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grads": []}, "got 2 params but 0 grads"),
        ({"grads": [torch.zeros(3), torch.zeros(5)]}, r"grads\[1\] has shape"),
        ({"grads": [torch.zeros(3), torch.zeros(4).double()]}, r"grads\[1\] is float64"),
        ({"params": [torch.zeros(3).int(), torch.zeros(4)]}, r"params\[0\] is int32"),
        ({"momentum": 0.9, "momentum_buffers": []}, "needs momentum_buffers"),
        ({"max_grad_norm": 1.0}, "needs grad_norm"),
        ({"rounding": "up"}, "rounding='up' is unknown"),
        ({"deltas": [torch.zeros(3)] * 2, "bases": []}, r"deltas\[1\] has shape"),
    ],
)
def test_errors_say_what_is_wrong(backend, change, message):
    arguments = {
        "params": [torch.zeros(3), torch.zeros(4)], "grads": [torch.ones(3), torch.ones(4)],
        "lr": 0.1, "backend": backend,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        ops.sgd_(**(arguments | change))


@needs_cpp
def test_expanded_parameter_is_refused(backend):
    with pytest.raises(RuntimeError, match="several elements share memory"):
        ops.sgd_([torch.zeros(1).expand(4)], [torch.ones(4)], lr=0.1, backend=backend)


@needs_cpp
def test_rounding_torch_is_refused_by_an_explicit_backend(backend):
    param = torch.zeros(3)
    with pytest.raises(ValueError, match="runs torch's own operations"):
        ops.sgd_([param], [torch.ones(3)], lr=0.1, rounding="torch", backend=backend)
    with pytest.raises(RuntimeError, match="rounds .nearest. or .stochastic."):
        torch.ops.ttt_fast_cpp.sgd_(
            [param], [torch.ones(3)], [], [], [], None, None, None, None, [], [], lr=0.1,
            momentum=0.0, dampening=0.0, nesterov=False, weight_decay=0.0,
            decoupled_weight_decay=False, maximize=False, first_step=False, max_grad_norm=-1.0,
            rounding="torch", seed=0,
        )  # fmt: skip
    assert torch.equal(param, torch.zeros(3))
