"""The Triton kernels behind the ops: schemas, arguments, and nothing in their place."""

import inspect

import pytest
import torch
from torch import Tensor

from tests.test_ops_contract import arguments_of
from ttt_fast import backend, ops, reference

OPS = [name for name, schema in ops.SCHEMAS.items() if "triton" in schema.backends]
with_ops = pytest.mark.parametrize("name", OPS)


@with_ops
def test_schema(name):
    """Nothing is written but what the schema says, and results have the shapes that it promises."""
    args, options = arguments_of(name)
    torch.library.opcheck(
        getattr(torch.ops.ttt_fast, name).default, args, options | {"backend": "triton"},
        test_utils=("test_schema", "test_faketensor"),
    )  # fmt: skip


@with_ops
def test_a_launch_takes_the_arguments_of_the_reference(name):
    def arguments(function):
        parameters = inspect.signature(function).parameters.values()
        return [(p.name, p.kind, p.default) for p in parameters]

    launch = ops.implementation(name, "cpu", "triton")
    assert launch.__name__ == f"{name.removesuffix('_')}_launch"
    assert arguments(launch) == arguments(getattr(reference, name))


@with_ops
def test_autograd_sees_what_was_written(name):
    args, options = arguments_of(name)

    def versions():
        tensors = [t for arg in args for t in ([arg] if isinstance(arg, Tensor) else arg or [])]
        return [t._version for t in tensors if isinstance(t, Tensor)]

    before = versions()
    getattr(torch.ops.ttt_fast, name)(*args, **options, backend="triton")
    # opcheck knows which ones; that there are any is what raw writes would miss.
    assert (versions() != before) == bool(ops.SCHEMAS[name].mutated)


def test_triton_runs_here_and_only_when_asked():
    assert backend.available_backends()["triton"] == "ok"
    assert backend.resolve_backend("cpu") == "cpp"
    assert backend.resolve_backend("cpu", "triton") == "triton"


def test_an_explicit_request_does_not_fall_back():
    with pytest.raises(ValueError, match="rounding='torch' runs torch's own operations"):
        ops.sgd_([torch.ones(3)], [torch.ones(3)], lr=0.1, rounding="torch", backend="triton")
    with pytest.raises(
        ValueError, match="rank_update_: backend='cpp' .* only in 'torch', 'triton'"
    ):
        factors = torch.ones(2, 3), torch.ones(2, 4), torch.ones(2)
        ops.rank_update_(torch.ones(4, 3), *factors, backend="cpp")
