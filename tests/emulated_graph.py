"""A CUDA graph on the CPU: what is dangerous about the real one, and nothing else.

While it records, every operation that torch dispatches is noted with the very memory that it reads
and writes, and with every number. A replay does them again on that memory. So, as with the real
one, no Python runs, numbers of the host are those of the recording, and addresses are, too:

- what was there before the recording is known by address only: freeing it is noticed at the next
  replay, as reading stale memory;
- what is made while it records is the graph's own, filled with NaN before each replay;
- nothing seems to have run when the recording is over: own memory is NaN, all other is put back;
- a look at a value, or a copy from the host, raises.

Our ops must come through the dispatcher: :func:`emulate` sees to that.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from ttt_fast import dispatch, graphs, ops, placement

# These only reserve memory.
NO_LAUNCH = ("aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty")
# Their results depend on values in a way that the host has to know: a number, or a shape.
LOOKS = (
    "aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal",
    "aten::_unique2", "aten::unique_dim", "aten::bincount", "aten::repeat_interleave.Tensor",
)  # fmt: skip
# These take numbers from the host, or hand it tensors.
HOST = (
    torch.tensor, torch.as_tensor, torch.from_numpy, Tensor.new_tensor, Tensor.tolist, Tensor.cpu,
    Tensor.numpy, Tensor.pin_memory,
)  # fmt: skip


class LooksError(RuntimeError):
    """The host looked at a value, or copied one, while a graph was recorded."""


class StaleError(RuntimeError):
    """A replay used memory that had been freed."""


def storage_id(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def poison(storage: torch.UntypedStorage) -> None:
    """NaN in every floating type, −1 in every integer."""
    torch.empty(0, dtype=torch.uint8).set_(storage).fill_(0xFF)


@dataclass(frozen=True)
class Own:
    """A tensor in memory of the graph."""

    tensor: Tensor

    def get(self) -> Tensor:
        return self.tensor


@dataclass(frozen=True)
class Known:
    """A tensor of which the graph knows where it lies."""

    storage: StorageWeakRef
    dtype: torch.dtype
    offset: int
    shape: torch.Size
    stride: tuple[int, ...]

    def get(self) -> Tensor:
        storage = torch.UntypedStorage._new_with_weak_ptr(self.storage.cdata)
        if storage is None:
            raise StaleError(f"a {self.dtype} tensor {tuple(self.shape)} that was freed")
        return view(storage, self.dtype, self.offset, self.shape, self.stride)


def view(storage, dtype, offset, shape, stride) -> Tensor:
    return torch.empty(0, dtype=dtype).set_(storage, offset, shape, stride)


class Call(NamedTuple):
    """One operation; tensors are :class:`Own` or :class:`Known`."""

    func: Any
    args: Any
    kwargs: Any
    results: dict[int, Own]  # those that are not views of arguments, by their place


class EmulatedGraph(TorchDispatchMode):
    """See above. Takes the place of :class:`ttt_fast.graphs.CudaGraph`.

    Attributes:
        launches: how often each operation was recorded, views and reservations left out.
        replays: how often it was replayed.
        nbytes: of its own memory.
        on_replay: called before each replay.
    """

    made: list[EmulatedGraph] = []
    on_replay: Callable[[EmulatedGraph], None] | None = None

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.launches: Counter[str] = Counter()
        self.replays = 0
        self._own: dict[int, torch.UntypedStorage] = {}
        self._known: dict[int, StorageWeakRef] = {}
        self._found: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}
        self.made.append(self)

    @property
    def nbytes(self) -> int:
        return sum(storage.nbytes() for storage in self._own.values())

    @contextmanager
    def recording(self) -> Iterator[None]:
        found = torch.cuda.is_current_stream_capturing
        torch.cuda.is_current_stream_capturing = lambda: True
        try:
            with self, NoHost():
                yield
        finally:
            torch.cuda.is_current_stream_capturing = found
            for storage, before in self._found.values():
                storage.copy_(before)
            self._found.clear()
            for storage in self._own.values():
                poison(storage)

    @torch.no_grad()
    def replay(self) -> None:
        self.replays += 1
        if EmulatedGraph.on_replay is not None:
            EmulatedGraph.on_replay(self)
        for storage in self._own.values():
            poison(storage)
        for call in self.calls:
            if call.func.name().split(".")[0] in NO_LAUNCH:
                continue
            args, kwargs = tree_map(get, (call.args, call.kwargs))
            out = tree_leaves(call.func(*args, **kwargs))
            for place, mine in call.results.items():
                mine.tensor.copy_(out[place])

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.name()
        if name in LOOKS or name.split(".")[0] in LOOKS or looks_at_mask(name, args):
            raise LooksError(f"{name} waits for the device while a graph is recorded")
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        for tensor in given:
            if tensor.device.type != "meta":
                self._meet(tensor)
        for tensor in written(func, args, kwargs):
            self._keep(tensor)
        out = func(*args, **kwargs)
        ids = {storage_id(tensor) for tensor in given}
        leaves = enumerate(tree_leaves(out))
        made = {i: t for i, t in leaves if isinstance(t, Tensor) and storage_id(t) not in ids}
        if any(tensor.device.type == "meta" for tensor in (*given, *made.values())):
            return out  # no memory, so nothing to launch
        for tensor in made.values():
            self._own[storage_id(tensor)] = tensor.untyped_storage()
        if made or func._schema.is_mutable:
            results = {place: self._note(tensor) for place, tensor in made.items()}
            noted = tree_map(self._note, (args, kwargs))
            self.calls.append(Call(func, *noted, results))
            if name.split(".")[0] not in NO_LAUNCH:
                self.launches[name.split(".")[0]] += 1
        return out

    def _meet(self, tensor: Tensor) -> None:
        storage = storage_id(tensor)
        if storage not in self._own and storage not in self._known:
            self._known[storage] = StorageWeakRef(tensor.untyped_storage())

    def _keep(self, tensor: Tensor) -> None:
        """What is written to, and was there before, for it to be put back."""
        storage = storage_id(tensor)
        if storage in self._known and storage not in self._found:
            memory = tensor.untyped_storage()
            self._found[storage] = memory, memory.clone()

    def _note(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        place = value.dtype, value.storage_offset(), value.shape, value.stride()
        storage = storage_id(value)
        if storage in self._own:
            return Own(view(self._own[storage], *place))
        return Known(self._known[storage], *place)


class NoHost(TorchFunctionMode):
    """Raises where numbers come from the host or go to it."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in HOST:
            raise LooksError(f"{func.__name__} copies from or to the host")
        return func(*args, **(kwargs or {}))


def get(value: Any) -> Any:
    return value.get() if isinstance(value, Own | Known) else value


def looks_at_mask(name: str, args: tuple[Any, ...]) -> bool:
    """Indexing by a mask has a result whose shape depends on values."""
    if name.split(".")[0] not in ("aten::index", "aten::index_put", "aten::index_put_"):
        return False
    return any(t is not None and t.dtype in (torch.bool, torch.uint8) for t in args[1])


def written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Tensor]:
    """The tensors that an operation writes to, by its schema."""
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        value = kwargs.get(argument.name, args[position] if position < len(args) else None)
        yield from (t for t in tree_leaves(value) if isinstance(t, Tensor))


def emulate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let graphs be recorded on the CPU, which is from now on a device that is waited for."""

    def implementation(name: str, device_type: str, backend: str = "auto") -> Callable[..., Any]:
        chosen = dispatch.choose(name, device_type, ops.backend_for(name, backend, device_type))
        return partial(getattr(torch.ops.ttt_fast, name), backend=chosen)

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(ops, "implementation", implementation)
    monkeypatch.setattr(placement, "look_waits", lambda device: True)
    monkeypatch.setitem(graphs.RECORDERS, "cpu", EmulatedGraph)
    monkeypatch.setattr(EmulatedGraph, "made", [])
    monkeypatch.setattr(EmulatedGraph, "on_replay", None)
