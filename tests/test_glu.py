import pytest
import torch
import torch.nn.functional as F

from tests.tolerances import assert_no_worse
from tests.update_cases import DTYPES, backend_params, for_each_number_of_threads
from ttt_fast import ops

backends = pytest.mark.parametrize("backend", backend_params())
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
ACTIVATIONS = {"silu": F.silu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}
activations = pytest.mark.parametrize("activation", ACTIVATIONS)
# Blocks of 1024 elements in C++.
SHAPES = [(1,), (3, 7, 577), (2, 1025), (0, 5), ()]


def case(shape, dtype, seed=0):
    """gate, up and dy; the gate reaches to where the activation is flat."""
    generator = torch.Generator().manual_seed(seed)
    gate, up, dy = (
        torch.randn(shape, generator=generator, dtype=torch.float64) * scale
        for scale in (6.0, 1.0, 1.0)
    )
    if dtype == torch.float64:
        # Below, torch's tanh is -1 and its derivative 0, which is right to 1e-14 only.
        gate = gate.clamp(min=-5.0)
    return gate.to(dtype), up.to(dtype), dy.to(dtype)


def torchs(gate, up, dy, activation):
    """y, dgate and dup of torch's own operations."""
    gate, up = gate.clone().requires_grad_(), up.clone().requires_grad_()
    y = ACTIVATIONS[activation](gate) * up
    return y.detach(), *torch.autograd.grad(y, (gate, up), dy)


def assert_right(results, gate, up, dy, activation):
    """y, dgate and dup are as near to fp64 as those of torch."""
    theirs = torchs(gate, up, dy, activation)
    exact = torchs(gate.double(), up.double(), dy.double(), activation)
    for name, ours, same, oracle in zip(("y", "dgate", "dup"), results, theirs, exact, strict=True):
        assert_no_worse(ours, same, oracle, name)


@backends
@dtypes
@activations
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_and_both_gradients(backend, dtype, activation, shape):
    gate, up, dy = case(shape, dtype)
    y = ops.glu(gate, up, activation=activation, backend=backend)
    gradients = ops.glu_backward(dy, gate, up, activation=activation, backend=backend)
    assert_right((y, *gradients), gate, up, dy, activation)


def test_another_activation_is_noticed():
    gate, up, dy = case((3, 7, 577), torch.float32)
    theirs = torchs(gate, up, dy, "silu")
    exact = torchs(gate.double(), up.double(), dy.double(), "silu")
    with pytest.raises(AssertionError, match="the oracle"):
        assert_no_worse(ops.glu(gate, up, activation="gelu_tanh"), theirs[0], exact[0])


@backends
def test_infinite_and_nan_gates(backend):
    gate = torch.tensor([-torch.inf, torch.inf, torch.nan, -1e30, 1e30])
    y = ops.glu(gate, torch.ones(5), activation="silu", backend=backend)
    assert torch.equal(y[[1, 4]], gate[[1, 4]]) and y[2].isnan()
    assert y[3] == 0


@pytest.mark.parametrize("backend", backend_params()[1:])
def test_results_do_not_depend_on_the_number_of_threads(backend):
    gate, up, dy = case((300, 577), torch.float32)

    def run():
        return [
            ops.glu(gate, up, backend=backend),
            *ops.glu_backward(dy, gate, up, backend=backend),
        ]

    first, *others = for_each_number_of_threads(run)
    for other in others:
        assert all(map(torch.equal, first, other))


def test_views_are_taken():
    gate, up, dy = (each.t() for each in case((40, 30), torch.float32))
    plain = [each.contiguous() for each in (gate, up, dy)]
    assert torch.equal(ops.glu(gate, up), ops.glu(plain[0], plain[1]))
    for ours, theirs in zip(
        ops.glu_backward(dy, gate, up), ops.glu_backward(plain[2], *plain[:2]), strict=True
    ):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(2, 3), torch.ones(2, 4)), r"up has shape \(2, 4\)"),
        ((torch.ones(2, 3), torch.ones(2, 3).double()), "up is float64"),
        ((torch.ones(2, dtype=torch.int32), torch.ones(2)), "tensors of int32"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        ops.glu(*arguments)
    with pytest.raises(ValueError, match="activation='relu' is unknown; use one of 'silu'"):
        ops.glu(torch.ones(2), torch.ones(2), activation="relu")
