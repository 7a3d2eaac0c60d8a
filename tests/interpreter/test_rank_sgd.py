import pytest
import torch

from tests.interpreter.compilations import Launches, kernel_of
from tests.test_rank_sgd import assert_same_step, case, dtypes, options, taken
from tests.tolerances import assert_no_worse
from tests.update_cases import DTYPES, assert_same_bits, row_slices
from ttt_fast import reference
from ttt_fast.kernels import rank_sgd
from ttt_fast.kernels.rank_sgd import CASES, rank_sgd_launch
from ttt_fast.rounding import compute_dtype


@dtypes
@options
@pytest.mark.parametrize("wide_buffers", [False, True], ids=["", "wide buffers"])
def test_the_bits_of_the_reference(fenced, dtype, options, wide_buffers):
    params, xs, dys, buffers, _ = case(dtype, wide_buffers=wide_buffers)
    expected = taken(reference.rank_sgd_, params, (xs, dys), buffers, **options)
    factors = [fenced(x) for x in xs], [fenced(dy) for dy in dys]
    actual = taken(rank_sgd_launch, params, factors, buffers, copy=fenced, **options)
    assert_same_step(actual, expected)


@dtypes
def test_as_near_to_fp64_as_torch(dtype):
    generator = torch.Generator().manual_seed(3)
    x, dy, weight = (
        torch.randn(s, generator=generator).to(dtype) for s in ((37, 33), (37, 65), (65, 33))
    )
    step = {"lr": 0.1, "weight_decay": 0.01}

    def after(like):
        result = weight.to(like)
        grad = dy.to(like).t() @ x.to(like)
        reference.sgd_([result], [grad], **step)
        return result

    oracle, theirs = after(torch.float64), after(compute_dtype(dtype)).to(dtype)
    rank_sgd_launch([weight], [x], [dy], **step)
    assert_no_worse(weight, theirs, oracle)


def test_the_comparison_notices_a_row_too_few():
    params, xs, dys, buffers, _ = case(torch.float32)
    expected = taken(reference.rank_sgd_, params, (xs, dys), buffers)
    fewer = [x[:-1] for x in xs], [dy[:-1] for dy in dys]
    with pytest.raises(AssertionError, match="elements differ"):
        assert_same_step(taken(rank_sgd_launch, params, fewer, buffers), expected)


@dtypes
def test_nothing_changes_where_a_step_is_not_finite(dtype):
    params, xs, dys, buffers, _ = case(dtype)
    dys[1][3, 4] = torch.nan
    stays = taken(rank_sgd_launch, params, (xs, dys), buffers, found_inf=1.0, momentum=0.9)
    assert_same_step(stays, (params, buffers, torch.zeros(2, dtype=torch.float64)))
    assert taken(rank_sgd_launch, params, (xs, dys), buffers, momentum=0.9)[0][1].isnan().any()


@dtypes
@pytest.mark.parametrize("kind", range(5))
def test_slices_and_strides(dtype, kind):
    parameter = torch.randn(96, 96).to(dtype)
    view = row_slices([parameter] * 5)[kind]
    if kind == 1:  # the weight of a Conv1D is (in, out)
        view = view.permute(1, 2, 0)
    (alone,), xs, dys, (buffer,), _ = case(dtype, [(9, view.shape[:-1].numel(), view.shape[-1])])
    view.copy_(alone.view(view.shape))
    around, own = parameter.clone(), torch.empty_like(view).copy_(buffer.view(view.shape))
    step = {"lr": 0.125, "momentum": 0.9, "rounding": "stochastic", "seed": 3}
    reference.rank_sgd_([alone], xs, dys, [buffer], **step)
    rank_sgd_launch([view], xs, dys, [own], **step)
    assert_same_bits([view.reshape(alone.shape)], [alone], "weight")
    assert_same_bits([own.reshape(alone.shape)], [buffer], "momentum buffer")
    view.copy_(around.as_strided(view.shape, view.stride(), view.storage_offset()))
    assert torch.equal(parameter, around)


def test_one_kernel_serves_every_prompt_and_every_weight(monkeypatch):
    kernels = [
        Launches(rank_sgd.rank_sgd_kernel),
        Launches(rank_sgd.rank_sgd_kernel, do_not_specialize=()),
    ]
    for kernel in kernels:
        monkeypatch.setattr(rank_sgd, "rank_sgd_kernel", kernel)
        params, xs, dys, buffers, _ = case(torch.bfloat16, [(400, 64, 48)] * 3)
        for seed, rank in enumerate((1, 2, 15, 16, 20, 400)):
            shorter = [x[:rank] for x in xs], [dy[:rank] for dy in dys]
            rank_sgd_launch(params, *shorter, buffers, lr=0.1 / (1 + seed), momentum=0.9, seed=seed)
    # And the count notices ranks that are specialised.
    assert len(kernels[0].kernels) == 1 < len(kernels[1].kernels)


def test_the_machine_code_gate_compiles_what_is_launched(monkeypatch):
    kernel = Launches(rank_sgd.rank_sgd_kernel)
    monkeypatch.setattr(rank_sgd, "rank_sgd_kernel", kernel)
    monkeypatch.setattr(rank_sgd, "add_landed", lambda sums, landed: None)
    scalars = {"grad_norm": torch.tensor(1.0), "found_inf": torch.tensor(0.0), "lr": 0.1}
    for dtype in DTYPES:
        params, xs, dys, buffers, _ = case(dtype, [(20, 64, 48)])
        for momentum in (0.0, 0.9):
            for landed in (None, torch.zeros(2, dtype=torch.float64)):
                for rounding in ("nearest", "stochastic"):
                    rank_sgd_launch(
                        params, xs, dys, buffers, landed=landed, rounding=rounding,
                        momentum=momentum, weight_decay=0.01, max_grad_norm=1.0, **scalars,
                    )  # fmt: skip
    assert [c.name for c in CASES if kernel_of(c) not in kernel.kernels] == []
    assert kernel_of(CASES[0]._replace(num_stages=9)) not in kernel.kernels
