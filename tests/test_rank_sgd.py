"""rank_sgd_ is sgd_ of gradients that are products; the sums of these cases are exact."""

import pytest
import torch

from tests.update_cases import DTYPES, assert_same_bits, row_slices
from ttt_fast import ops
from ttt_fast.rounding import compute_dtype

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
OPTIONS = {
    "plain": {},
    "decay": {"weight_decay": 0.01},
    "momentum": {"momentum": 0.9, "dampening": 0.25, "weight_decay": 0.01},
    "first step": {"momentum": 0.9, "dampening": 0.25, "first_step": True},
    "nesterov": {
        "momentum": 0.9, "nesterov": True, "weight_decay": 0.01, "decoupled_weight_decay": True,
    },
    "stochastic": {"momentum": 0.9, "rounding": "stochastic", "seed": 7},
}  # fmt: skip
options = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
SHAPES = [(5, 3, 7), (40, 67, 70), (0, 5, 6), (1, 1, 1), (3, 0, 4)]


def case(dtype, shapes=SHAPES, wide_buffers=False, seed=0):
    """params, xs, dys, momentum buffers and the gradients, for (rank, out, width) of each."""
    generator = torch.Generator().manual_seed(seed)

    def integers(*shape):
        return torch.randint(-4, 5, shape, generator=generator).to(dtype)

    def random(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    wide = compute_dtype(dtype)
    xs = [integers(rank, width) for rank, _, width in shapes]
    dys = [integers(rank, out) for rank, out, _ in shapes]
    grads = [dy.to(wide).t() @ x.to(wide) for x, dy in zip(xs, dys, strict=True)]
    params = [random(*grad.shape).to(dtype) for grad in grads]
    buffers = [random(*grad.shape).to(wide if wide_buffers else dtype) for grad in grads]
    return params, xs, dys, buffers, grads


def taken(op, params, what, buffers, found_inf=0.0, copy=torch.clone, device=None, **options):
    """What a step of either op leaves of copies: weights, momentum buffers, update_landed."""
    params, buffers = [copy(p) for p in params], [copy(b) for b in buffers]
    landed = torch.zeros(2, dtype=torch.float64, device=device)
    norm, found_inf = (torch.tensor(x, device=device) for x in (10.0, found_inf))
    op(
        params, *what, buffers if options.get("momentum") else [], lr=0.125, max_grad_norm=3.0,
        grad_norm=norm, found_inf=found_inf, landed=landed, **options,
    )  # fmt: skip
    return params, buffers, landed


def assert_same_step(actual, expected):
    assert_same_bits(actual[0], expected[0], "params")
    assert_same_bits(actual[1], expected[1], "momentum_buffers")
    torch.testing.assert_close(actual[2], expected[2], rtol=1e-12, atol=1e-30)


@dtypes
@options
@pytest.mark.parametrize("wide_buffers", [False, True], ids=["", "wide buffers"])
def test_the_step_of_sgd(dtype, options, wide_buffers):
    params, xs, dys, buffers, grads = case(dtype, wide_buffers=wide_buffers)
    expected = taken(ops.sgd_, params, (grads,), buffers, backend="torch", **options)
    assert_same_step(taken(ops.rank_sgd_, params, (xs, dys), buffers, **options), expected)
    assert not torch.equal(expected[0][1], params[1])


@dtypes
def test_nothing_changes_where_a_step_is_not_finite(dtype):
    params, xs, dys, buffers, _ = case(dtype)
    dys[1][3, 4] = torch.nan
    stays = taken(ops.rank_sgd_, params, (xs, dys), buffers, found_inf=1.0, momentum=0.9)
    assert_same_step(stays, (params, buffers, torch.zeros(2, dtype=torch.float64)))
    moved = taken(ops.rank_sgd_, params, (xs, dys), buffers, momentum=0.9)[0]
    assert moved[1].isnan().any()


@dtypes
@pytest.mark.parametrize("kind", range(3))
def test_slices_of_fused_projections(dtype, kind):
    parameter = torch.randn(96, 96).to(dtype)
    view = row_slices([parameter] * 3)[kind]
    (alone,), xs, dys, (buffer,), _ = case(dtype, [(9, view.shape[:-1].numel(), view.shape[-1])])
    view.copy_(alone.view(view.shape))
    around, own = parameter.clone(), buffer.view(view.shape).clone()
    step = {"lr": 0.125, "momentum": 0.9}
    ops.rank_sgd_([alone], xs, dys, [buffer], **step)
    ops.rank_sgd_([view], xs, dys, [own], **step)
    assert_same_bits([view.reshape(alone.shape)], [alone], "weight")
    assert_same_bits([own.reshape(alone.shape)], [buffer], "momentum buffer")
    row_slices([around] * 3)[kind].copy_(view)
    assert torch.equal(parameter, around)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"momentum": 0.9}, "momentum=0.9 needs momentum_buffers; got none"),
        ({"max_grad_norm": 1.0}, "max_grad_norm needs grad_norm; compute it with ops.gram_norms"),
        ({"rounding": "torch"}, "rounding='torch' is unknown; use 'nearest' or 'stochastic'"),
        ({"xs": []}, "got 1 params, 0 xs and 1 dys"),
        ({"xs": [torch.ones(2, 5)]}, r"xs\[0\] has shape \(2, 5\); .* with in = 4"),
        ({"dys": [torch.ones(3, 3)]}, r"dys\[0\] has shape \(3, 3\); .* with R = 2"),
        ({"dys": [torch.ones(2, 3).double()]}, r"dys\[0\] is float64; it must be float32"),
        ({"params": [torch.ones(12)]}, r"params\[0\] has shape \(12,\); it must be \(out, in\)"),
        (
            {"momentum": 0.9, "momentum_buffers": [torch.ones(3)]},
            r"momentum_buffers\[0\] has shape \(3,\)",
        ),
    ],
)
def test_refusals(change, message):
    arguments = {"params": [torch.ones(3, 4)], "xs": [torch.ones(2, 4)], "dys": [torch.ones(2, 3)]}
    with pytest.raises(ValueError, match=f"rank_sgd_: {message}"):
        ops.rank_sgd_(**(arguments | change), lr=0.1)
