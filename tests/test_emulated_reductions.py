"""The CUDA reductions and copies, run on the CPU, against the reference."""

import pytest
import torch

from tests.csrc import emulated
from tests.tolerances import assert_no_worse
from tests.update_cases import DTYPES, ODD_SIZES, assert_same_bits, make_case, row_slices
from ttt_fast import cuda_ops, reference

orders = pytest.mark.parametrize("order", emulated.ORDERS)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@orders
@pytest.mark.parametrize("dtypes", [[dtype] for dtype in DTYPES] + [DTYPES], ids=str)
def test_grad_norm(dtypes, order):
    grads = make_case(ODD_SIZES, dtypes).grads
    with emulated.running(order=order):
        norm = cuda_ops.grad_norm(grads)
    expected = reference.grad_norm(grads)
    assert norm.dtype == expected.dtype and norm.shape == ()
    torch.testing.assert_close(
        norm, expected, rtol=2**-23 if norm.dtype == torch.float32 else 1e-14, atol=0
    )


@dtypes
def test_grad_norm_does_not_depend_on_the_order_of_threads(dtype):
    grads = make_case([(40000,), (33,)], [dtype]).grads
    norms = []
    for order in emulated.ORDERS:
        with emulated.running(order=order):
            norms.append(cuda_ops.grad_norm(grads))
    assert len(set(norms)) == len(norms) and len({norm.item() for norm in norms}) == 1


def test_grad_norm_of_views_and_of_extreme_values():
    grads = row_slices(make_case([(96, 48), (128, 96), (80, 48), (12, 5)], [torch.float32]).grads)
    grads += [torch.full((5,), 1e30), torch.full((5,), 1e-30)]
    with emulated.running():
        torch.testing.assert_close(cuda_ops.grad_norm(grads), reference.grad_norm(grads))
        assert cuda_ops.grad_norm([]) == 0
        assert cuda_ops.grad_norm([torch.zeros(0)]) == 0
        assert cuda_ops.grad_norm([torch.tensor([1.0, float("nan")])]).isnan()


@orders
@dtypes
@pytest.mark.parametrize(("batch", "tokens"), [(1, 1), (2, 33), (3, 70)])
def test_gram_norm(dtype, batch, tokens, order):
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(batch, tokens, 72, generator=generator).to(dtype)
    dy = torch.randn(batch, tokens, 131, generator=generator).to(dtype)
    with emulated.running(order=order):
        norms = cuda_ops.gram_norm(x, dy)
    wide = reference.compute_dtype(dtype)
    oracle = (dy.double().mT @ x.double()).square().sum((1, 2))
    same_dtype = (dy.to(wide).mT @ x.to(wide)).square().sum((1, 2))
    assert_no_worse(norms, same_dtype, oracle, "gram_norm")


@dtypes
def test_gram_norm_of_views(dtype):
    x = torch.randn(2, 9, 40).to(dtype)[:, 1:6, 3:33]
    dy = torch.randn(2, 12, 5).to(dtype).transpose(1, 2)
    with emulated.running():
        norms = cuda_ops.gram_norm(x, dy)
    torch.testing.assert_close(norms, reference.gram_norm(x, dy), rtol=1e-5, atol=1e-6)


def test_gram_norm_of_nothing_and_of_cancelling_tokens():
    x = torch.randn(1, 2, 64)
    cancelling = torch.cat([x, -x], dim=1)
    dy = torch.randn(1, 2, 64).repeat(1, 2, 1)
    with emulated.running():
        assert cuda_ops.gram_norm(torch.zeros(2, 0, 3), torch.zeros(2, 0, 4)).tolist() == [0, 0]
        assert cuda_ops.gram_norm(torch.zeros(0, 4, 3), torch.zeros(0, 4, 4)).shape == (0,)
        assert 0 <= cuda_ops.gram_norm(cancelling, dy).item() < 1e-3
        assert cuda_ops.gram_norm(x * float("nan"), x).isnan().all()


COPIED = [*DTYPES, torch.int8, torch.bool, torch.int32, torch.int64, torch.complex128]


@pytest.mark.parametrize("dtype", COPIED, ids=str)
def test_copy_copies_every_bit(dtype):
    sizes = [(0,), (1,), (7,), (70000,), (), (3, 5, 7)]
    srcs = [(torch.randn(size) * 100).to(dtype) for size in sizes]
    srcs += [srcs[3][1:5001], srcs[3][:960].view(24, 40).narrow(1, 16, 16)]
    dsts = [torch.zeros_like(src) for src in srcs[:-2]]
    whole = torch.zeros(24, 40, dtype=dtype)
    dsts += [torch.zeros(5000, dtype=dtype), whole.narrow(1, 16, 16)]
    with emulated.running(order=2):
        cuda_ops.copy_(dsts, srcs)
    for dst, src in zip(dsts, srcs, strict=True):
        assert torch.equal(dst, src)
    assert not whole[:, :16].any() and not whole[:, 32:].any()


def test_copy_keeps_what_a_number_is_not():
    src = torch.tensor([0x7FA00001, 0x7FC00000, -0x80000000], dtype=torch.int64).to(torch.int32)
    dst = torch.zeros(3)
    with emulated.running():
        cuda_ops.copy_([dst], [src.view(torch.float32)])
    assert_same_bits([dst.view(torch.int32).float()], [src.float()], "bits")
