import pytest
import torch
import triton
import triton.language as tl

from ttt_fast import rounding
from ttt_fast.kernels.rounding import random_bits, random_key, seed_key


@triton.jit
def bits_kernel(bits, first, tensor_index, key: tl.int64, BLOCK: tl.constexpr):
    """Random bits of the elements from first[0] on of a tensor."""
    lanes = tl.arange(0, BLOCK)
    drawn = random_bits(random_key(key, tl.load(tensor_index)), tl.load(first) + lanes)
    tl.store(bits + lanes, drawn.to(tl.int64))


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, -(2**63), 2**64 + 5])
@pytest.mark.parametrize("tensor_index", [0, 299])
@pytest.mark.parametrize("first", [0, 4096, 2**32 - 7, 2**33 + 5, 2**40 - 3])
def test_same_bits_as_the_reference(seed, tensor_index, first):
    bits = torch.empty(64, dtype=torch.int64)
    number = torch.tensor([tensor_index], dtype=torch.int32)
    bits_kernel[(1,)](bits, torch.tensor([first]), number, seed_key(seed), BLOCK=64)
    expected = rounding.random_bits(seed, tensor_index, 64, torch.device("cpu"), first)
    assert torch.equal(bits, expected)
