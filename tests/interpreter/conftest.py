"""The gate that runs every Triton kernel on the CPU, in a process of its own.

Triton decides on import whether kernels are compiled or interpreted. ``make test`` starts this
folder as ``pytest tests/interpreter``; plain ``pytest`` leaves it out (pyproject.toml).
"""

import os
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import pytest
import torch

if "triton" in sys.modules and not sys.modules["triton"].knobs.runtime.interpret:
    raise pytest.UsageError(
        "tests/interpreter: Triton was imported without its interpreter in this process; run these "
        "tests by themselves: pytest tests/interpreter"
    )
os.environ["TRITON_INTERPRET"] = "1"

from torch import Tensor

from tests.interpreter import bf16, fences, programs

bf16.install()
programs.check_hints()


def pytest_configure(config: pytest.Config) -> None:
    """Let masked elements be divided by what they are: nobody reads the result."""
    config.addinivalue_line("filterwarnings", "ignore::RuntimeWarning:triton.runtime.interpreter")


@pytest.fixture(autouse=True)
def any_order(request: pytest.FixtureRequest) -> Iterator[None]:
    """Programs run in another order in each test, the same one each time."""
    with programs.program_order(zlib.crc32(request.node.nodeid.encode())):
        yield


@pytest.fixture(autouse=True)
def empty_is_nan() -> Iterator[None]:
    """Memory from ``torch.empty`` is NaN, integers their largest: what a kernel skips shows.

    Memory as it comes may be that of the result before, with the right values in it.
    """
    torch.use_deterministic_algorithms(True)  # fills what ``torch.empty`` returns
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def fenced() -> Callable[..., Tensor]:
    """``fenced(tensor)``: a copy that ends at a protected page (tests/interpreter/fences.py)."""
    return fences.fenced


@pytest.fixture
def program_order() -> Callable[[int | None], AbstractContextManager[None]]:
    """One order within a test: a context manager of a seed, None for ascending."""
    return programs.program_order
