import pytest
import torch

from tests.interpreter.compilations import Launches, kernel_of
from tests.test_glu import activations, assert_right, case
from tests.update_cases import DTYPES
from ttt_fast import ops
from ttt_fast.kernels import glu, glu_backward
from ttt_fast.kernels.glu import glu_launch
from ttt_fast.kernels.glu_backward import glu_backward_launch

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
# Blocks of 1024 elements.
SHAPES = [(1,), (3, 7, 97), (1024,), (2, 1025), (0, 5), ()]


def launched(gate, up, dy, activation="silu"):
    """y, dgate and dup."""
    y = glu_launch(gate, up, activation=activation)
    return y, *glu_backward_launch(dy, gate, up, activation=activation)


@dtypes
@activations
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_as_near_to_fp64_as_torch(dtype, activation, shape):
    gate, up, dy = case(shape, dtype)
    options = {"activation": activation, "backend": "triton"}
    y = ops.glu(gate, up, **options)
    gradients = ops.glu_backward(dy, gate, up, **options)
    assert_right((y, *gradients), gate, up, dy, activation)


def test_another_activation_is_noticed():
    inputs = case((3, 7, 97), torch.float32)
    with pytest.raises(AssertionError, match="the oracle"):
        assert_right(launched(*inputs, "gelu_tanh"), *inputs, "silu")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@activations
def test_the_activation_is_rounded_before_the_product(dtype, activation):
    """As in the reference; a value in the middle of two may go either way."""
    gate, up, dy = case((4, 1000), dtype)
    y, _, dup = launched(gate, up, dy, activation)
    differ = y != ops.glu(gate, up, activation=activation, backend="torch")
    expected = ops.glu_backward(dy, gate, up, activation=activation, backend="torch")[1]
    assert differ.float().mean() < 1e-2 and (dup != expected).float().mean() < 1e-2
    once = ops.glu(gate.double(), up.double(), activation=activation).to(dtype)
    assert (y != once).float().mean() > 0.1


@dtypes
def test_touches_nothing_outside(fenced, monkeypatch, dtype):
    monkeypatch.setattr(torch, "empty_like", fenced)
    for n in (5, 1024, 2049):
        inputs = [fenced(t) for t in case((n,), dtype)]
        assert_right(launched(*inputs), *inputs, "silu")


@dtypes
def test_views(dtype):
    around = case((40, 60), dtype)
    for change in (
        lambda t: t[3:33],
        lambda t: t[:, 1:8],
        lambda t: t[::3, ::2],
        lambda t: t.t(),
        lambda t: t[:1].expand(5, -1),
        lambda t: t.flatten()[1:2050],
    ):
        inputs = [change(t) for t in around]
        assert_right(launched(*inputs), *inputs, "silu")


@pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered")
@activations
def test_gates_that_are_large_or_not_finite(activation):
    gate = torch.tensor([torch.inf, torch.nan, -1e4, 1e4, -90.0, 90.0, 0.0])
    y, dgate, dup = launched(gate, torch.full((7,), 3.0), torch.ones(7), activation)
    assert torch.equal(y[[0, 3, 5]], 3.0 * gate[[0, 3, 5]]) and y[1].isnan() and dgate[1].isnan()
    assert (y[[2, 4, 6]].abs() < 1e-30).all() and (dgate[[2, 4]].abs() < 1e-30).all()
    assert dgate[[3, 5, 6]].tolist() == [3.0, 3.0, 1.5]
    assert torch.equal(dup[[0, 3, 5]], gate[[0, 3, 5]])


def test_the_machine_code_gate_compiles_what_is_launched(monkeypatch):
    forward, backward = Launches(glu.glu_kernel), Launches(glu_backward.glu_backward_kernel)
    monkeypatch.setattr(glu, "glu_kernel", forward)
    monkeypatch.setattr(glu_backward, "glu_backward_kernel", backward)
    for dtype in DTYPES:
        for n in (1, 16, 1000):
            for activation in ("silu", "gelu_tanh"):
                launched(*case((n,), dtype), activation)
    # Whatever their number, elements of a dtype share a kernel.
    assert len(forward.kernels) == len(backward.kernels) == 2 * len(DTYPES)
    cases = [*glu.CASES, *glu_backward.CASES]
    launches = forward.kernels | backward.kernels
    assert [c.name for c in cases if kernel_of(c) not in launches] == []
    assert kernel_of(cases[0]._replace(num_stages=9)) not in launches
