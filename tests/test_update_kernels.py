"""The arithmetic in the machine code of the update kernels: what "bit for bit" rests on."""

import re
import sys

import pytest

if sys.platform != "linux":  # where pyproject.toml asks for Triton
    pytest.importorskip("triton")

from ttt_fast.kernels import adamw, sgd
from ttt_fast.kernels.machine_code import Case, build

CASES = [
    pytest.param(case, id=f"{module.__name__.rpartition('.')[2]}-{case.name}")
    for module, names in (
        (sgd, ("bfloat16, momentum", "float64, momentum")),
        (adamw, ("float32", "float64", "float16, stochastic")),
    )
    for case in module.CASES
    if case.name in names
]


def inexact(ptx: str) -> list[str]:
    """Instructions that round twice or not at all where the reference rounds once."""
    return re.findall(r"fma\.\S+|\S+\.(?:approx|full|ftz)\S*", ptx)


@pytest.mark.parametrize("case", CASES)
def test_every_operation_is_rounded_by_itself(case: Case):
    ptx = build(case, 90).ptx
    assert inexact(ptx) == []
    assert "mul.rn" in ptx or "mul.f" in ptx
    if "adamw" in case.kernel.__name__:
        assert "sqrt.rn" in ptx and "div.rn" in ptx


def test_fused_multiply_add_would_be_seen():
    assert inexact(build(sgd.CASES[0], 90, enable_fp_fusion=True).ptx)
