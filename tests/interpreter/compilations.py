"""Which launches share a kernel: Triton compiles one for each set of argument properties.

It looks at types, at whether an integer is 1 or a multiple of 16 and whether an address is one of
16, and at every compile-time constant and launch option.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction, create_function_from_signature

from ttt_fast.kernels.machine_code import Case

Key = tuple[Any, ...]


class Launches:
    """Stands in for a kernel: takes its launches down, and runs none of them.

    Args:
        kernel: that was made while the interpreter is on.
        options: of ``triton.jit`` in place of the kernel's own, as ``do_not_specialize=()``.

    Attributes:
        kernels: what identifies a compiled kernel, once for each.
        count: launches.
    """

    def __init__(self, kernel: InterpretedFunction, **options: Any) -> None:
        compiled = JITFunction(kernel.fn, **(kernel.kwargs | options))
        self._name = kernel.__name__
        self._bind = create_function_from_signature(
            compiled.signature, compiled.params, make_backend(GPUTarget("cuda", 90, 32))
        )
        self.kernels: set[Key] = set()
        self.count = 0

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        assert all(grid), f"nothing to launch in {grid}"

        def launch(*args: Any, **kwargs: Any) -> None:
            _, specialization, options = self._bind(*args, **kwargs)
            self.kernels.add(_key(self._name, specialization, options))
            self.count += 1

        return launch


def kernel_of(case: Case) -> Key:
    """What identifies the kernel that the machine-code gate compiles for a case."""
    specialization = [
        ("constexpr", case.constexprs[name])
        if name in case.constexprs
        else (case.signature[name], "D" if name in case.divisible else None)
        for name in case.kernel.arg_names
    ]
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    return _key(case.kernel.__name__, specialization, options | {"enable_fp_fusion": False})


def _key(name: str, specialization: Sequence[Any], options: Mapping[str, Any]) -> Key:
    # Triton says "" where it looked at a value and found nothing, None where it did not look.
    known = tuple((kind, None if value == "" else value) for kind, value in specialization)
    return name, known, frozenset(options.items())
