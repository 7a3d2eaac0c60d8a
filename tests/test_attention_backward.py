import pytest
import torch
import torch.nn.functional as F

from tests.update_cases import DTYPES, backend_params, for_each_number_of_threads
from ttt_fast import ops
from ttt_fast.rounding import compute_dtype

backends = pytest.mark.parametrize("backend", backend_params())
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
# Batch, heads of queries, of keys, queries, keys, width.
SHAPES = [
    (1, 1, 1, 1, 1, 1), (2, 4, 2, 19, 19, 8), (1, 9, 3, 20, 20, 64), (1, 2, 2, 49, 49, 40),
    (1, 3, 1, 130, 130, 16), (2, 2, 1, 5, 70, 7), (1, 2, 1, 70, 5, 7), (2, 6, 2, 1, 33, 16),
]  # fmt: skip
EMPTY = [(0, 2, 1, 3, 3, 8), (2, 2, 1, 0, 3, 8), (2, 2, 1, 3, 0, 8)]
MASKS = [None, "causal", "bool", "added", "by head"]


def case(shape, dtype, mask=None, seed=0):
    """dy, q, k, v as projections give them, and a mask in which query 1 attends to nothing."""
    generator = torch.Generator().manual_seed(seed)
    batch, heads, groups, queries, keys, width = shape

    def random(heads, tokens):
        x = torch.randn(batch, tokens, heads, width, generator=generator)
        return x.to(dtype).transpose(1, 2)

    tensors = [random(heads, queries) for _ in range(2)] + [random(groups, keys) for _ in range(2)]
    if mask in (None, "causal"):
        return *tensors, None
    of = (batch, heads, queries, keys) if mask == "by head" else (batch, 1, queries, keys)
    chosen = torch.rand(of, generator=generator) < 0.7
    chosen[:, :, 1:2] = False
    if mask == "added":
        scores = torch.randn(of, generator=generator)
        return *tensors, scores.masked_fill(~chosen, -torch.inf).to(dtype)
    return *tensors, chosen


def options(shape, mask):
    return {"scale": 0.3 / shape[-1] ** 0.5, "causal": mask == "causal"}


def autograd(dy, q, k, v, mask, *, scale, causal):
    """What torch's attention gives."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    group = q.shape[1] // k.shape[1]
    keys, values = (x.repeat_interleave(group, 1) for x in leaves[1:])
    y = F.scaled_dot_product_attention(
        leaves[0], keys, values, attn_mask=mask, is_causal=causal, scale=scale
    )
    return torch.autograd.grad(y, leaves, dy)


def wide(tensors, dtype=torch.float64):
    return [t.to(dtype) if t is not None and t.is_floating_point() else t for t in tensors]


def distances(actual, expected):
    """By gradient, as a part of its norm, or of 1 (of one key, those at q and k are 0)."""
    return [
        float((a.double() - e).norm() / e.norm().clamp_min(1))
        for a, e in zip(actual, expected, strict=True)
    ]


@backends
@dtypes
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_are_those_of_float64_rounded_once(backend, dtype, mask, shape):
    tensors, how = case(shape, dtype, mask), options(shape, mask)
    found = ops.attention_backward(*tensors, **how, backend=backend)
    expected = autograd(*wide(tensors), **how)
    eps = torch.finfo(compute_dtype(dtype)).eps
    # Sums of the compute type, then half a unit of the last place of the storage type.
    bound = 20 * eps + (torch.finfo(dtype).eps / 2 if compute_dtype(dtype) != dtype else 0)
    for gradient, x, away in zip(found, tensors[1:], distances(found, expected), strict=False):
        assert gradient.dtype == dtype and gradient.shape == x.shape
        assert away <= bound
        assert gradient.transpose(1, 2).is_contiguous()


@backends
@pytest.mark.parametrize("change", ["scale", "causal", "mask", "dy"])
def test_the_comparison_notices_another_attention(backend, change):
    shape = SHAPES[1]
    tensors, how = case(shape, torch.float32, "bool"), options(shape, "bool")
    expected = autograd(*wide(tensors), **how)
    dy, q, k, v, mask = tensors
    if change == "mask":
        mask = mask.clone()
        mask[0, 0, 5, 3] ^= True
    elif change == "dy":
        dy = dy.clone()
        dy[0, 0, 5, 3] += 0.1
    else:
        how |= {"scale": 1.01 * how["scale"]} if change == "scale" else {"causal": True}
    found = ops.attention_backward(dy, q, k, v, mask, **how, backend=backend)
    assert max(distances(found, expected)) > 1e-4


@backends
@dtypes
@pytest.mark.parametrize("mask", [None, "bool"])
@pytest.mark.parametrize("shape", EMPTY, ids=str)
def test_nothing_gives_nothing(backend, dtype, mask, shape):
    tensors = case(shape, dtype, mask)
    for _ in range(3):
        used = [torch.full_like(x, torch.nan) for x in tensors[1:4]]  # memory that is not zero
        del used
        found = ops.attention_backward(*tensors, **options(shape, mask), backend=backend)
        for gradient, x in zip(found, tensors[1:], strict=False):
            assert gradient.shape == x.shape and not gradient.any()


@backends
@dtypes
def test_who_attends_to_nothing_gets_and_gives_nothing(backend, dtype):
    shape = SHAPES[1]
    dy, q, k, v, mask = case(shape, dtype, "bool")
    found = ops.attention_backward(dy, q, k, v, mask, **options(shape, "bool"), backend=backend)
    assert not found[0][:, :, 1].any() and found[0][:, :, 0].any()
    other = dy.clone()
    other[:, :, 1] = 7
    again = ops.attention_backward(other, q, k, v, mask, **options(shape, "bool"), backend=backend)
    assert all(map(torch.equal, found, again))


@backends
@pytest.mark.parametrize("where", ["q", "k", "v", "dy"])
def test_a_nan_stays_where_attention_carries_it(backend, where):
    shape = (2, 2, 1, 6, 6, 8)
    tensors = dict(zip(("dy", "q", "k", "v"), case(shape, torch.float32), strict=False))
    tensors[where][0, 0, 3, 2] = torch.nan
    found = ops.attention_backward(**tensors, scale=0.3, causal=True, backend=backend)
    assert any(gradient[0].isnan().any() for gradient in found)
    assert not any(gradient[1].isnan().any() for gradient in found)


@backends
def test_large_scores_do_not_overflow(backend):
    shape = SHAPES[1]
    dy, q, k, v, _ = case(shape, torch.float32)
    how = {"scale": 100.0, "causal": True}
    assert (100 * (q @ k.repeat_interleave(2, 1).mT)).abs().max() > 500
    found = ops.attention_backward(dy, q, k, v, **how, backend=backend)
    expected = autograd(*wide((dy, q, k, v, None)), **how)
    assert max(distances(found, expected)) < 1e-3


@backends
@dtypes
def test_views_give_the_same_bits(backend, dtype):
    shape = (2, 4, 2, 19, 19, 8)
    *tensors, mask = case(shape, dtype, "bool")
    how = options(shape, "bool")
    expected = ops.attention_backward(*tensors, mask, **how, backend=backend)
    wider = [
        torch.randn(2, 19, x.shape[1], 20).to(dtype)[..., 5:13].transpose(1, 2) for x in tensors
    ]
    for view, x in zip(wider, tensors, strict=True):
        view.copy_(x)
    across = mask.mT.contiguous().mT
    each = mask.expand(2, 4, 19, 19)
    for views in (
        [x.contiguous() for x in tensors] + [mask], [*wider, across],
        [x.mT.contiguous().mT for x in tensors] + [each], [*tensors, each.contiguous()],
    ):  # fmt: skip
        found = ops.attention_backward(*views, **how, backend=backend)
        assert all(map(torch.equal, found, expected))


@backends
def test_masks_of_one_row_or_one_query_are_those_of_all(backend):
    shape = (3, 2, 1, 7, 9, 8)
    *tensors, mask = case(shape, torch.bfloat16, "bool")
    how = options(shape, "bool")
    for one in (mask[:1], mask[:, :, :1], mask[:1, :, 2:3]):
        found = ops.attention_backward(*tensors, one, **how, backend=backend)
        whole = one.expand(3, 1, 7, 9).contiguous()
        expected = ops.attention_backward(*tensors, whole, **how, backend=backend)
        assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("backend", backend_params()[1:])
@dtypes
def test_results_depend_neither_on_threads_nor_on_other_rows(backend, dtype):
    shape = (3, 9, 3, 70, 70, 64)
    dy, q, k, v, mask = case(shape, dtype, "bool")
    how = options(shape, "bool")

    def run(rows=slice(None)):
        tensors = (t[rows] for t in (dy, q, k, v, mask))
        return ops.attention_backward(*tensors, **how, backend=backend)

    first, *others = for_each_number_of_threads(run)
    for other in others:
        assert all(map(torch.equal, first, other))
    for gradient, alone in zip(first, run(slice(1, 2)), strict=True):
        assert torch.equal(gradient[1:2], alone)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.ones(2, 5, 8)}, r"q has shape \(2, 5, 8\); it must be \(B, H, T, D\)"),
        ({"dy": torch.ones(2, 4, 6, 8)}, r"dy has shape \(2, 4, 6, 8\).*T = 5"),
        ({"k": torch.ones(2, 2, 7, 9)}, r"k has shape \(2, 2, 7, 9\).*D = 8"),
        ({"v": torch.ones(2, 2, 6, 8)}, r"v has shape \(2, 2, 6, 8\).*S = 7"),
        ({"v": torch.ones(2, 2, 7, 8).double()}, "v is float64; it must be float32"),
        ({"mask": torch.ones(2, 1, 5, 6, dtype=torch.bool)}, r"mask has shape \(2, 1, 5, 6\)"),
        ({"mask": torch.ones(5, 7, dtype=torch.bool)}, r"mask has shape \(5, 7\)"),
        ({"mask": torch.ones(2, 3, 5, 7, dtype=torch.bool)}, r"\(2, 3, 5, 7\).*H = 4"),
        ({"mask": torch.ones(2, 1, 5, 7).double()}, "mask is float64; it must be bool or float32"),
        ({"k": torch.ones(2, 3, 7, 8), "v": torch.ones(2, 3, 7, 8)}, "4 heads and k 3"),
        ({"k": torch.ones(2, 0, 7, 8), "v": torch.ones(2, 0, 7, 8)}, "4 heads and k 0"),
    ],
)
def test_bad_arguments(change, message):
    arguments = {"dy": torch.ones(2, 4, 5, 8), "q": torch.ones(2, 4, 5, 8), "scale": 1.0}
    arguments |= {"k": torch.ones(2, 2, 7, 8), "v": torch.ones(2, 2, 7, 8)}
    with pytest.raises(ValueError, match=f"attention_backward: .*{message}"):
        ops.attention_backward(**(arguments | change))


@pytest.mark.parametrize("backend", backend_params()[1:])
def test_the_extension_refuses_what_it_would_read_wrongly(backend):
    run = ops.implementation("attention_backward", "cpu", backend)
    dy, q, k, v, mask = case((2, 4, 2, 5, 7, 8), torch.float32, "bool")
    for arguments in (
        (dy[:, :, :4], q, k, v, mask), (dy, q.mT.contiguous().mT, k, v, mask),
        (dy, q, k, v[:, :1], mask),
        (dy, q, k, v.double(), mask), (dy, q, k[..., :7], v, mask), (dy, q, k, v[:, :, :6], mask),
        (dy, q, k, v, mask[..., :6]), (dy, q, k, v, mask.byte()), (dy, q, k, v, mask[0]),
        (dy, q, k[:, :0], v[:, :0], mask), (dy[0], q[0], k, v, mask), (dy, q, k, v, mask.double()),
        (dy.int(), q.int(), k.int(), v.int(), mask), (dy[:1], q[:1], k, v, mask),
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match="attention_backward: "):
            run(*arguments, scale=1.0, causal=False)
