"""Tensors that are kept and changed, and ways to compare their bits."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ttt_fast import ops
from ttt_fast.reference import UNDO_CHUNK
from ttt_fast.snapshot import Snapshot

WHERE = ("device", "host", "undo")
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
DTYPES = (*FLOATS, torch.int8, torch.uint8, torch.int16, torch.int64, torch.float8_e4m3fn)
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(tensor: Tensor) -> Tensor:
    """The elements as integers, in memory of their own: == on them compares bits."""
    return tensor.detach().clone().view(INTEGERS[tensor.element_size()])


def same_bits(tensors: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    return all(torch.equal(bits(t), e) for t, e in zip(tensors, expected, strict=True))


def random_bits(shape: Sequence[int], dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Any bit pattern: NaN payloads, infinities, -0.0 and denormals included."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.empty((), dtype=dtype).element_size()
    raw = torch.randint(0, 256, (*shape, size), dtype=torch.uint8, generator=generator)
    return raw.view(dtype).view(tuple(shape))


def scramble(tensors: Sequence[Tensor]) -> None:
    """Change every bit, by something that does not log."""
    for tensor in tensors:
        integers = tensor.detach().view(INTEGERS[tensor.element_size()])
        integers.copy_(~integers)


def step(snapshot: Snapshot, lr: float, seed: int, backend: str) -> None:
    """One SGD step on all weights, logged where the snapshot logs."""
    generator = torch.Generator().manual_seed(seed)
    grads = [torch.randn(view.shape, generator=generator).to(view.dtype) for view in snapshot.views]
    ops.sgd_(snapshot.views, grads, lr=lr, undo=snapshot.undo, backend=backend)


def weights(dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    """Odd sizes, more than one run of an undo log, one strided and one empty tensor."""
    generator = torch.Generator().manual_seed(1)
    strided = torch.randn(6, 70, generator=generator).to(dtype).t()
    shapes = [(1,), (7, 13), (4097,), (2, UNDO_CHUNK + 5), (0, 3)]
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes] + [strided]
