import signal

import pytest
import torch

from tests.interpreter.fences import signal_of
from tests.update_cases import DTYPES, SLICE_SHAPES, as_row_slices, assert_same_bits, make_case
from ttt_fast import ops
from ttt_fast.kernels import grad_norm

CHUNK = grad_norm.CHUNK
SIZES = [(1,), (0,), (7,), (CHUNK,), (), (CHUNK + 4097,), (3, 5, 7), (4096,)]


def assert_right(grads: list[torch.Tensor]) -> torch.Tensor:
    norm = ops.grad_norm(grads, backend="triton")
    oracle = torch.cat([g.double().flatten() for g in grads]).square().sum().sqrt()
    double = any(g.dtype == torch.float64 for g in grads)
    assert norm.dtype == (torch.float64 if double else torch.float32) and norm.dim() == 0
    torch.testing.assert_close(norm.double(), oracle, rtol=2 * torch.finfo(norm.dtype).eps, atol=0)
    return norm


@pytest.mark.parametrize("dtypes", [[d] for d in DTYPES] + [list(DTYPES)], ids=str)
def test_against_fp64(dtypes):
    assert_right(make_case(SIZES, dtypes).grads)


def test_of_strided_expanded_and_misaligned_gradients():
    grads = as_row_slices(make_case([(96, 48), (8, 96), *SLICE_SHAPES[2:]], [torch.float32])).grads
    assert_right([*grads, torch.randn(3, 1).expand(3, 4100), torch.randn(4100)[1:]])


@pytest.mark.parametrize("grads", [[], [torch.zeros(0)], [torch.zeros(5)]], ids=str)
def test_of_nothing_is_zero(grads):
    norm = ops.grad_norm(grads, backend="triton")
    assert norm.item() == 0.0 and norm.dtype == torch.float32


def test_of_huge_and_tiny_numbers_does_not_overflow():
    grads = [torch.full((5000,), 1e30), torch.full((5,), 1e-30)]
    assert_right(grads)
    assert_right(grads[1:])
    grads[0][17] = torch.nan
    assert ops.grad_norm(grads, backend="triton").isnan()


def test_does_not_depend_on_the_order_of_programs(program_order):
    grads = make_case([(3 * CHUNK + 5,), (100,), (40000,)], [torch.float32, torch.bfloat16]).grads
    norms = []
    for order in range(3):
        with program_order(order):
            norms.append(ops.grad_norm(grads, backend="triton"))
    assert_same_bits(norms[1:], [norms[0]] * 2, "norm")


@pytest.mark.parametrize("size", [1, 4097, CHUNK])
@pytest.mark.parametrize("at_start", [False, True])
def test_nothing_beyond_the_tensors_is_read(size, at_start, fenced):
    assert_right([fenced(torch.randn(size).bfloat16(), at_start=at_start)])


def test_a_chunk_that_is_taken_for_full_crashes(fenced, monkeypatch):
    grads = [fenced(torch.randn(CHUNK - 1))]
    tables = grad_norm.pointer_tables([grads], CHUNK)
    for more, ended in ((0, 0), (1, signal.SIGSEGV)):
        taken = [table._replace(numel=table.numel + more) for table in tables]
        monkeypatch.setattr(grad_norm, "pointer_tables", lambda *args, taken=taken: taken)
        assert signal_of(lambda: grad_norm.grad_norm_launch(grads)) == ended
