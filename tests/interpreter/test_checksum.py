import pytest
import torch

from tests.test_copy import random_bytes
from tests.update_cases import DTYPES, row_slices
from ttt_fast import ops, reference
from ttt_fast.kernels.checksum import BLOCK, CHUNK, checksum_launch

SIZES = [(0,), (1,), (7,), (), (3, 5, 7), (BLOCK,), (CHUNK + BLOCK + 3,)]


@pytest.mark.parametrize("dtype", [*DTYPES, torch.int8, torch.int64, torch.complex64], ids=str)
def test_is_the_number_of_the_reference(dtype):
    tensors = [random_bytes(shape, dtype, seed=i) for i, shape in enumerate(SIZES)]
    expected = reference.checksum(tensors)
    actual = checksum_launch(tensors)
    assert actual.shape == () and actual.dtype == torch.int64
    assert actual == expected
    assert ops.checksum(tensors, backend="triton") == int(expected)


def test_lists_of_mixed_sizes_and_views():
    tensors = row_slices([random_bytes((96, 96), d, seed=i) for i, d in enumerate([*DTYPES] * 2)])
    tensors += [random_bytes((40,), torch.float32)[1:], torch.tensor([True, False])]
    assert checksum_launch(tensors) == reference.checksum(tensors)
    assert checksum_launch([]) == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sees_every_change(dtype):
    tensors = [random_bytes((CHUNK + 5000,), dtype, seed=i) for i in range(2)]
    seen = {int(checksum_launch(tensors)), int(checksum_launch(tensors[::-1]))}
    positions = (0, 1, CHUNK - 1, CHUNK, CHUNK + 4999)
    for position in positions:
        raw = tensors[0].view(torch.uint8).view(CHUNK + 5000, -1)
        raw[position, 0] ^= 1
        seen.add(int(checksum_launch(tensors)))
        raw[position, 0] ^= 1
    assert len(seen) == 2 + len(positions)


@pytest.mark.parametrize("at_start", [False, True])
def test_touches_nothing_outside(fenced, at_start):
    tensor = random_bytes((BLOCK + 77,), torch.int16)
    assert checksum_launch([fenced(tensor, at_start=at_start)]) == reference.checksum([tensor])


def test_wide_elements_are_refused():
    with pytest.raises(ValueError, match="at most 8 are supported"):
        checksum_launch([torch.zeros(3, dtype=torch.complex128)])
