"""The gate itself: each fault that it is there for, planted and seen."""

import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from tests.interpreter import bf16
from tests.interpreter.fences import signal_of
from ttt_fast.kernels import machine_code


@triton.jit
def increment_kernel(x, limit, BLOCK: tl.constexpr):
    """Add 1 to x[i], i < limit."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x + i, tl.load(x + i, mask=i < limit) + 1, mask=i < limit)


@triton.jit
def shift_kernel(x, limit, BLOCK: tl.constexpr):
    """Read x[i - 1], below the first element too."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x + i, tl.load(x + i - 1, mask=i < limit), mask=i < limit)


@triton.jit
def racy_kernel(x, BLOCK: tl.constexpr):
    """x[i] = x[i - BLOCK] + 1: reads what the program before it writes."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x + i, tl.load(x + i - BLOCK, mask=i >= BLOCK, other=0.0) + 1)


@triton.jit
def hinted_kernel(address, value):
    """Store to an address of which it says that it is a multiple of 16."""
    pointer = tl.multiple_of(tl.load(address).to(tl.pointer_type(tl.float32)), 16)
    tl.store(pointer, value)


@triton.jit
def bfloat16_kernel(a, b, product, difference, rounded, wide, BLOCK: tl.constexpr):
    """a·b + a and min(a, b) − b in bfloat16, and a float32 rounded to it."""
    i = tl.arange(0, BLOCK)
    x, y = tl.load(a + i), tl.load(b + i)
    tl.store(product + i, x * y + x)
    tl.store(difference + i, tl.where(x < y, x, -y) - y)
    tl.store(rounded + i, tl.load(wide + i).to(tl.bfloat16))


@triton.jit
def dot_kernel(a, b, c, SIZE: tl.constexpr):
    """The float32 product of two bfloat16 matrices."""
    i = tl.arange(0, SIZE)
    at = i[:, None] * SIZE + i[None, :]
    tl.store(c + at, tl.dot(tl.load(a + at), tl.load(b + at)))


def launch_increment(n: int, limit: int, x: torch.Tensor) -> None:
    increment_kernel[(triton.cdiv(limit, 64),)](x, limit, BLOCK=64)
    assert torch.equal(x, torch.ones(n))


@pytest.mark.parametrize("n", [1, 63, 64, 1000, 1024])
def test_a_mask_that_is_one_too_wide_crashes(n, fenced):
    x = fenced(torch.zeros(n))
    launch_increment(n, n, x)
    x.zero_()
    assert signal_of(lambda: launch_increment(n, n + 1, x)) == signal.SIGSEGV


def test_an_access_below_the_first_element_crashes(fenced):
    x = torch.zeros(100)
    for at_start, signal_number in ((False, 0), (True, signal.SIGSEGV)):
        fence = fenced(x, at_start=at_start)
        ended = signal_of(lambda fence=fence: shift_kernel[(2,)](fence, 100, BLOCK=64))
        assert ended == signal_number


def test_fenced_keeps_values_and_ends_where_it_says(fenced):
    for x in (torch.arange(7).bfloat16(), torch.randn(33, 5).double().t(), torch.zeros(0, 3)):
        assert torch.equal(fenced(x), x)
        assert torch.equal(fenced(x, at_start=True), x)
    assert fenced(torch.zeros(5)).data_ptr() % 4096 == 4096 - 20
    assert fenced(torch.zeros(5), at_start=True).data_ptr() % 4096 == 0


def test_a_race_shows_in_some_order(program_order):
    def run(seed):
        x = torch.zeros(8, 16)
        with program_order(seed):
            racy_kernel[(8,)](x, BLOCK=16)
        return x[:, 0].tolist()

    assert run(None) == list(range(1, 9))
    assert run(0) == run(0) != run(None)
    assert run(1) not in (run(0), run(None))


def test_tests_run_in_another_order_without_asking():
    x = torch.zeros(64, 16)
    racy_kernel[(64,)](x, BLOCK=16)
    assert x[:, 0].tolist() != list(range(1, 65))


def test_a_false_alignment_hint_is_seen():
    x = torch.zeros(8)
    hinted_kernel[(1,)](torch.tensor([x.data_ptr()]), 1.0)
    with pytest.raises(Exception, match=r"tl.multiple_of\(.*, \[16\]\), but the value is 0x"):
        hinted_kernel[(1,)](torch.tensor([x[1:].data_ptr()]), 1.0)
    assert x.tolist() == [1.0] + [0.0] * 7


def bfloat16_results() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """What the interpreter makes of bfloat16, and what torch does."""
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(256, generator=generator) * 10
    wide[:3] = torch.tensor([torch.inf, torch.nan, 1.0 + 2.0**-8])
    a, b = (torch.randn(256, generator=generator).bfloat16() for _ in range(2))
    results = [torch.zeros(256).bfloat16() for _ in range(3)]
    bfloat16_kernel[(1,)](a, b, *results, wide, BLOCK=256)
    expected = [a * b + a, torch.where(a < b, a, -b) - b, wide.bfloat16()]
    c = torch.zeros(16, 16)
    dot_kernel[(1,)](a, b, c, SIZE=16)
    return [*results, c], [*expected, a.view(16, 16).float() @ b.view(16, 16).float()]


def test_bfloat16_is_rounded_as_torch_does():
    for actual, expected in zip(*bfloat16_results(), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5 * (actual.dtype == torch.float32),
                                   atol=0, equal_nan=True)  # fmt: skip


def test_bfloat16_is_wrong_without_the_correction():
    with bf16.removed():
        actual, expected = bfloat16_results()
    wrong = [int((a != e).sum()) for a, e in zip(actual, expected, strict=True)]
    assert all(count > 50 for count in wrong)


def test_every_bfloat16_survives_both_ways():
    bits = np.arange(1 << 16).astype(np.uint16)
    there_and_back = bf16.from_float32(bf16.to_float32(bits))
    nan = np.isnan(bf16.to_float32(bits))
    assert (there_and_back[~nan] == bits[~nan]).all()
    assert np.isnan(bf16.to_float32(there_and_back[nan])).all()


def test_no_machine_code_is_read_off_the_interpreter():
    case = machine_code.Case("x", racy_kernel, {"x": "*fp32"}, {"BLOCK": 16}, num_warps=1)
    with pytest.raises(RuntimeError, match="in a process without TRITON_INTERPRET"):
        machine_code.build(case, 90)


def test_a_process_that_imported_triton_without_the_interpreter_is_refused():
    code = "import sys, triton, pytest; sys.exit(pytest.main(['tests/interpreter/test_gate.py']))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={"PATH": ""}
    )
    assert done.returncode != 0
    assert "imported without its interpreter" in done.stdout + done.stderr
