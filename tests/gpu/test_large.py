"""Tensors of 2³¹ elements and more: an index that is kept in 32 bits shows here.

The last run of elements of each tensor is compared; it lies behind the limit.
"""

import pytest
import torch

from tests.gpu.device_cases import backends_of
from ttt_fast import ops, reference

NUMEL = (1 << 31) + 4099
TAIL = 8192
# bfloat16: weight, gradient and momentum, and one more for the copy.
NEEDED_GIB = 4 * 2 * NUMEL / 2**30
FREE_GIB = torch.cuda.mem_get_info()[0] / 2**30 if torch.cuda.is_available() else 0.0
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.cuda,
    pytest.mark.skipif(
        FREE_GIB < 1.2 * NEEDED_GIB,
        reason=f"needs {1.2 * NEEDED_GIB:.0f} GiB free on the GPU, {FREE_GIB:.0f} are",
    ),
]


@pytest.fixture(autouse=True)
def memory_back():
    """The next test needs the memory of this one."""
    yield
    torch.cuda.empty_cache()


def values(device, seed):
    """Cheap to make, different in every run of the tensor."""
    tensor = torch.arange(NUMEL, dtype=torch.int32, device=device).remainder_(251 + seed)
    return tensor.to(torch.bfloat16).mul_(1 / 256)


@pytest.mark.parametrize("backend", backends_of("sgd_"))
def test_update(device, backend):
    param, grad = values(device, 0), values(device, 1)
    buffer = torch.zeros_like(param)
    tail = [t[-TAIL:].cpu() for t in (param, grad, buffer)]
    ops.sgd_([param], [grad], [buffer], lr=0.1, momentum=0.9, backend=backend)
    reference.sgd_([tail[0]], [tail[1]], [tail[2]], lr=0.1, momentum=0.9)
    assert torch.equal(param[-TAIL:].cpu(), tail[0])
    assert torch.equal(buffer[-TAIL:].cpu(), tail[2])


@pytest.mark.parametrize("backend", backends_of("copy_"))
def test_copy(device, backend):
    src = values(device, 0)
    dst = torch.zeros_like(src)
    ops.copy_([dst], [src], backend=backend)
    assert torch.equal(dst[-TAIL:], src[-TAIL:])
    assert torch.equal(dst[: 1 << 20], src[: 1 << 20])


@pytest.mark.parametrize("backend", backends_of("grad_norm"))
def test_norm(device, backend):
    grad = torch.zeros(NUMEL, dtype=torch.bfloat16, device=device)
    grad[-1], grad[0] = 3.0, 4.0
    assert ops.grad_norm([grad], backend=backend).item() == 5.0


@pytest.mark.parametrize("backend", backends_of("nll_"))
def test_nll(device, backend):
    """Rows of a vocabulary that lie behind the limit."""
    vocabulary = 1 << 17
    rows = NUMEL // vocabulary + 2
    logits = torch.zeros(rows, vocabulary, dtype=torch.bfloat16, device=device)
    logits[-1, 5] = 4.0
    expected = logits[-1:].cpu()
    targets = torch.full((rows,), 5, device=device)
    losses = ops.nll_(logits, targets, backend=backend)
    theirs = reference.nll_(expected, targets[-1:].cpu())
    torch.testing.assert_close(losses[-1:].cpu(), theirs, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(logits[-1:].cpu(), expected, rtol=1e-2, atol=1e-6)
