"""bfloat16 in Triton's interpreter as GPUs have it.

The interpreter (Triton 3.9) keeps bfloat16 as 16-bit integers. Arithmetic and ``tl.dot`` work on
the bit patterns, and a cast to bfloat16 cuts bits off. Here each operation is done in float32 and
rounded to nearest even. For the tests only; kernels know nothing of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

_REPLACED = ("cast_impl", "create_fp_to_fp", "unary_op", "binary_op", "ternary_op", "create_fma",
             "create_dot")  # fmt: skip
_STOCK = {name: getattr(InterpreterBuilder, name) for name in _REPLACED}
_COMPARISONS = (np.less, np.less_equal, np.greater, np.greater_equal, np.equal, np.not_equal)


def to_float32(bits: np.ndarray) -> np.ndarray:
    """Widen bfloat16 bits; exact."""
    wide = np.ascontiguousarray(bits).astype(np.uint32) << 16
    return wide.view(np.float32).reshape(np.shape(bits))


def from_float32(values: np.ndarray) -> np.ndarray:
    """Round to bfloat16 bits, to nearest even; a NaN stays one."""
    values = np.asarray(values, dtype=np.float32)
    raw = np.ascontiguousarray(values).view(np.uint32).reshape(values.shape)
    rounded = ((raw + (0x7FFF + ((raw >> 16) & 1))) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FFF), rounded)


def _is_bfloat16(dtype: tl.dtype) -> bool:
    return dtype.scalar == tl.bfloat16


def _widened(handle: Any) -> Any:
    """The handle with float32 data, if it is bfloat16."""
    if _is_bfloat16(handle.dtype):
        return TensorHandle(to_float32(handle.data), tl.float32)
    return handle


def _rounded(handle: Any) -> Any:
    return TensorHandle(from_float32(handle.data), tl.bfloat16)


def _cast(self: InterpreterBuilder, source: Any, dtype: tl.dtype) -> Any:
    if source.dtype.scalar == dtype.scalar:
        return source
    if _is_bfloat16(dtype):
        return _rounded(_widened(source))
    wide = _widened(source)
    return wide if dtype.scalar == wide.dtype.scalar else _STOCK["cast_impl"](self, wide, dtype)


def _fp_to_fp(self: InterpreterBuilder, source: Any, dtype: tl.dtype, mode: Any) -> Any:
    if _is_bfloat16(source.dtype) or _is_bfloat16(dtype):
        return _cast(self, source, dtype)
    return _STOCK["create_fp_to_fp"](self, source, dtype, mode)


def _in_float32(name: str) -> Callable[..., Any]:
    """An operation on operands of one dtype, the last of which says which."""
    stock = _STOCK[name]

    def operation(self: InterpreterBuilder, *arguments: Any) -> Any:
        handles = [a for a in arguments if isinstance(a, TensorHandle)]
        # Selecting is exact as it is, for every NaN too.
        if not _is_bfloat16(handles[-1].dtype) or arguments[-1] is np.where:
            return stock(self, *arguments)
        wide = [_widened(a) if isinstance(a, TensorHandle) else a for a in arguments]
        if arguments[-1] in _COMPARISONS:
            return TensorHandle(arguments[-1](wide[0].data, wide[1].data), tl.int1)
        return _rounded(stock(self, *wide))

    return operation


def _dot(self: InterpreterBuilder, a: Any, b: Any, d: Any, *options: Any) -> Any:
    return _STOCK["create_dot"](self, _widened(a), _widened(b), d, *options)


_CORRECTED = {
    "cast_impl": _cast,
    "create_fp_to_fp": _fp_to_fp,
    **{name: _in_float32(name) for name in ("unary_op", "binary_op", "ternary_op", "create_fma")},
    "create_dot": _dot,
}


def install() -> None:
    """Correct the interpreter of this process."""
    for name, function in _CORRECTED.items():
        setattr(InterpreterBuilder, name, function)


@contextmanager
def removed() -> Iterator[None]:
    """Have the interpreter as it came: what the correction is measured against."""
    for name, function in _STOCK.items():
        setattr(InterpreterBuilder, name, function)
    try:
        yield
    finally:
        install()
