"""Tensors that end at a page which must not be touched: an access too many ends the process."""

from __future__ import annotations

import ctypes
import faulthandler
import math
import mmap
import os
import traceback
from collections.abc import Callable

import torch
from torch import Tensor

_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_NO_ACCESS = 0


def fenced(tensor: Tensor, *, at_start: bool = False) -> Tensor:
    """Copy a tensor to the end of a page, before one that can be neither read nor written.

    There is such a page at either side, but the copy touches only one of them. It is contiguous and
    aligned to its elements only; a length that is a multiple of 16 bytes aligns it to 16.

    Args:
        tensor: values to copy; for a view, fence its base and take the view of that.
        at_start: touch the page before, to see accesses below the first element.
    """
    if tensor.numel() == 0:
        return tensor.clone()
    page = mmap.PAGESIZE
    n_bytes = tensor.numel() * tensor.element_size()
    inside = math.ceil(n_bytes / page) * page
    # The tensor holds this memory; it goes, protection and all, when the tensor does.
    memory = mmap.mmap(-1, inside + 2 * page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for fence in (start, start + page + inside):
        if _LIBC.mprotect(fence, page, _NO_ACCESS) != 0:
            raise OSError(ctypes.get_errno(), "mprotect failed")
    offset = page if at_start else page + inside - n_bytes
    flat = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=offset)
    return flat.view(tensor.shape).copy_(tensor)


def signal_of(function: Callable[[], object]) -> int:
    """Call a function in a forked child; return the signal that ended it, 0 if it returned.

    Raises:
        AssertionError: it raised an exception (printed).
    """
    child = os.fork()
    if child == 0:
        faulthandler.disable()
        try:
            function()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert not os.WIFEXITED(status) or os.WEXITSTATUS(status) == 0, "the child raised an exception"
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
