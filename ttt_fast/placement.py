"""Where tensors lie: to notice one that was replaced, moved or cast, and what a look costs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Change(NamedTuple):
    """A tensor that is not what it was; ``was`` and ``now`` say what, in words."""

    name: str
    was: str
    now: str


class Placement:
    """What tensors are and where they lie. Noted on construction; their values do not matter.

    Args:
        tensors: (name, tensor) pairs.
        module: the model that holds them, to notice when it has another tensor under one of their
            names, tied ones under each; None not to look.
    """

    def __init__(
        self, tensors: Iterable[tuple[str, Tensor]], module: nn.Module | None = None
    ) -> None:
        self._module = module
        self._noted = [(name, tensor, layout(tensor), _kind(tensor)) for name, tensor in tensors]
        ours = {id(tensor) for _, tensor, _, _ in self._noted}
        self._held = {n: t for n, t in _held_tensors(module).items() if id(t) in ours}

    def change(self, address: bool = True) -> Change | None:
        """The first change since then, None if there is none.

        Args:
            address: whether it counts that a tensor lies elsewhere, or with other strides, while
                its dtype, shape and device are the same.
        """
        held = _held_tensors(self._module)
        for name, tensor in self._held.items():
            if held.get(name) is not tensor:
                return Change(name, layout(tensor), "another tensor" if name in held else "gone")
        for name, tensor, was, kind in self._noted:
            if layout(tensor) != was and (address or _kind(tensor) != kind):
                return Change(name, was, layout(tensor))
        return None


def look_waits(device: torch.device) -> bool:
    """Whether a look at a value makes the host wait for all that was launched on the device."""
    return device.type != "cpu"


def places(tensors: Iterable[Tensor]) -> list[tuple[int, torch.dtype, torch.Size, tuple[int, ...]]]:
    """Address, dtype, shape and strides of each tensor: all that a launch bakes in."""
    return [(t.data_ptr(), t.dtype, t.shape, t.stride()) for t in tensors]


def layout(tensor: Tensor) -> str:
    """All that says which memory a tensor is, in words."""
    dtype, shape = str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)
    place = f"strides {tensor.stride()}, {tensor.device}, address {tensor.data_ptr():#x}"
    return f"{dtype} {shape} ({place})"


def _kind(tensor: Tensor) -> tuple[torch.dtype, torch.Size, torch.device]:
    return tensor.dtype, tensor.shape, tensor.device


def _held_tensors(module: nn.Module | None) -> dict[str, Tensor]:
    """Parameters and buffers by name, tied ones under each of their names."""
    if module is None:
        return {}
    parameters = dict(module.named_parameters(remove_duplicate=False))
    return parameters | dict(module.named_buffers(remove_duplicate=False))
