"""What a snapshot refuses: an error that names the parameter, and nothing is written."""

import dataclasses
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tests.snapshot_cases import WHERE, bits, same_bits, scramble
from ttt_fast.snapshot import Snapshot


def _cast(model: nn.Module) -> None:
    model[1].half()


def _moved(model: nn.Module) -> None:
    model[1].weight.data = model[1].weight.data.clone()


def _transposed(model: nn.Module) -> None:
    model[1].weight.data = model[1].weight.data.t()


def _resized(model: nn.Module) -> None:
    model[1].weight.data = model[1].weight.data[:2, :2]  # at the same address


def _freed(model: nn.Module) -> None:
    model[1].weight.untyped_storage().resize_(0)


def _to_meta(model: nn.Module) -> None:
    model[1].to("meta")


def _replaced(model: nn.Module) -> None:
    model[1].weight = nn.Parameter(model[1].weight.detach())


def _deleted(model: nn.Module) -> None:
    del model[1].weight


def _retied(model: nn.Module) -> None:
    model[2].weight = nn.Parameter(model[2].weight.detach().clone())


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize(
    ("change", "name", "now"),
    [
        (_cast, "1.weight", "is float16 (3, 3)"),
        (_moved, "1.weight", "is float32 (3, 3)"),
        (_transposed, "1.weight", "strides (1, 3)"),
        (_resized, "1.weight", "is float32 (2, 2)"),
        (_freed, "1.weight", "address 0x0"),
        (_to_meta, "1.weight", "is another tensor"),
        (_replaced, "1.weight", "is another tensor"),
        (_deleted, "1.weight", "is gone"),
        (_retied, "2.weight", "is another tensor"),
    ],
)
def test_changed_parameters_are_named_and_nothing_is_written(
    where: str, change: Callable[[nn.Module], None], name: str, now: str
) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3, bias=False), nn.Linear(3, 3))
    model[2].weight = model[0].weight
    snapshot = Snapshot(model, where)
    assert snapshot.verify()
    first, last = model[0].weight, model[2].bias
    scramble([first, last])
    expected = [bits(first), bits(last)]
    kept = [bits(copy) for copy in snapshot.originals]
    change(model)
    for action in (snapshot.restore, snapshot.take, snapshot.verify):
        message = f"Snapshot.{action.__name__}: {name} was float32 (3, 3) "
        with pytest.raises(RuntimeError, match=re.escape(message)) as error:
            action()
        assert now in str(error.value)
        assert "Nothing was written; bring it back or make a new Snapshot" in str(error.value)
    assert same_bits([first, last], expected)
    assert same_bits(snapshot.originals, kept)


def test_a_parameter_that_is_brought_back_can_be_restored() -> None:
    model = nn.Linear(3, 3)
    expected = [bits(p) for p in model.parameters()]
    snapshot = Snapshot(model)
    weight = model.weight
    scramble([weight])
    model.weight = nn.Parameter(torch.zeros(3, 3))
    with pytest.raises(RuntimeError, match="weight was float32"):
        snapshot.restore()
    model.weight = weight
    snapshot.restore()
    assert same_bits(list(model.parameters()), expected)


def test_replacement_is_noticed_for_a_list_when_the_module_is_given() -> None:
    model = nn.Linear(3, 3)
    snapshot = Snapshot([model.weight], module=model)
    model.weight = nn.Parameter(torch.zeros(3, 3))
    with pytest.raises(RuntimeError, match="weight was float32"):
        snapshot.restore()


def _inference_tensor() -> Tensor:
    with torch.inference_mode():
        return torch.zeros(2)


@dataclasses.dataclass
class NotATensor:
    param: int = 3


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: torch.empty(2, device="meta"), "b is on the meta device and has no values"),
        (lambda: torch.eye(2).to_sparse(), r"b is not dense \(torch.sparse_coo\)"),
        (lambda: torch.zeros(2, dtype=torch.complex64), "b is torch.complex64; pass torch.view_as"),
        (_inference_tensor, "b is an inference tensor; load the model outside"),
        (lambda: torch.zeros(1).expand(2), "b is expanded, one element stands for many"),
        (lambda: nn.LazyLinear(2).weight, "b is not initialised yet; run the model once"),
        (
            lambda: torch.quantize_per_tensor(torch.ones(2), 1.0, 0, torch.qint8),
            r"b is quantised \(torch.qint8\)",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_tensors_that_cannot_be_kept_are_named(make: Callable[[], Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=f"Snapshot: {message}"):
        Snapshot({"a": torch.zeros(2), "b": make()})


def test_a_tensor_without_memory_is_named() -> None:
    param = torch.ones(3)
    param.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match=r"param 1 has no memory of its own \(Tensor\)"):
        Snapshot([torch.ones(2), param])


def test_arguments_that_are_not_understood() -> None:
    with pytest.raises(ValueError, match="where='disk' is unknown; use one of 'device', 'host'"):
        Snapshot([torch.zeros(2)], "disk")
    with pytest.raises(TypeError, match="params is a single tensor"):
        Snapshot(torch.zeros(2))
    with pytest.raises(TypeError, match="param 1 is a int; pass tensors"):
        Snapshot([torch.zeros(2), 3])
    with pytest.raises(TypeError, match="param 0 is a int; pass tensors"):
        Snapshot([NotATensor()])
    with pytest.raises(ValueError, match="backend='vulkan' is unknown"):
        Snapshot([torch.zeros(2)], backend="vulkan")
