"""Keep the weights and bring them back bit for bit.

snapshot = Snapshot(model)      # memory is reserved here, once
for prompt in prompts:
    snapshot.take()             # into the same memory
    adapt(model, prompt)
    snapshot.restore()
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ttt_fast import ops
from ttt_fast.placement import Placement, layout
from ttt_fast.undo import UndoLog

__all__ = ["Snapshot"]

PLACES = ("device", "host", "undo")
_ALIGNMENT_BYTES = 64  # a cache line: no two copies share one
_LOGGED_DTYPES = (torch.bfloat16, torch.float16)


class Snapshot:
    """The weights of now, to be brought back later bit for bit. Taken on construction.

    "device" keeps a copy beside the weights, "host" a copy in CPU memory (pinned where there is a
    GPU). "undo" copies no 16-bit weights: the updates log the bits that they overwrite
    (:class:`ttt_fast.undo.UndoLog`), far less than a copy while steps are small. Runs of weights
    for which a copy is smaller, weights of other types and views that overlap are kept whole;
    :meth:`describe` says how many. Weights that are listed twice (tied) are kept once.

    :meth:`restore` only reads what is kept: it may be called again, also after an interruption.

    Args:
        params: a module (all its parameters); or an iterable of tensors, (name, tensor) pairs or
            :class:`ttt_fast.selection.Selection`; or a mapping of names to these. Any dense real
            dtype.
        where: "device", "host" or "undo". With "undo" every update must be given the log:
            ``ops.sgd_(snapshot.views, grads, lr=lr, undo=snapshot.undo)``.
        module: the model that holds ``params``, to notice when it holds another tensor under one
            of their names. Default: ``params`` where that is a module, else it is not noticed.
        backend: "auto", or what every op runs in that has it and can, on its tensors: "torch",
            "cpp", "triton" or "cuda".

    Attributes:
        names: name of each entry, "param 3" where it has none.
        views: the live memory of each entry.
        originals: the copy of each entry (``bases`` of ``ops.sgd_``), None where it is logged.

    Raises:
        TypeError: ``params`` is a tensor, or holds something that is not one.
        ValueError: unknown ``where``; an entry has no plain memory of its own (meta, sparse,
            quantised, inference, sharded, expanded, ...).
    """

    def __init__(
        self,
        params: Any,
        where: str = "device",
        *,
        module: nn.Module | None = None,
        backend: str = "auto",
    ) -> None:
        if where not in PLACES:
            places = ", ".join(map(repr, PLACES))
            raise ValueError(f"Snapshot: where={where!r} is unknown; use one of {places}.")
        self.where, self.backend = where, backend
        module = params if isinstance(params, nn.Module) else module
        entries = list(_entries(params))
        self.names = [name for name, _, _ in entries]
        self.views = [view for _, _, view in entries]
        self._placement = Placement([(name, owner) for name, owner, _ in entries], module)
        # Buffers that are made under inference_mode cannot be written outside of it.
        with torch.inference_mode(False), torch.no_grad():
            self._reserve()
        self.take()

    def _reserve(self) -> None:
        """Decide what is copied and what is logged, and reserve memory for both."""
        first: dict[str, int] = {}
        self._first = [first.setdefault(layout(view), i) for i, view in enumerate(self.views)]
        kept = list(first.values())
        logged: set[int] = set()
        if self.where == "undo":
            logged = {i for i in kept if self.views[i].dtype in _LOGGED_DTYPES}
            # Two logs of the same memory would have to be undone in the order of the writes.
            logged -= _sharing_memory({i: self.views[i] for i in kept})
        copied = {i: self.views[i] for i in kept if i not in logged}
        self._buffers, copy_of = _flat_copies(copied, self.where == "host")
        self.originals: list[Tensor | None] = [copy_of.get(i) for i in self._first]
        # One call of an op for each device.
        self._pairs = [
            ([self.views[i] for i in indices], [copy_of[i] for i in indices])
            for indices in self._by_device(copied).values()
        ]
        self._logged = self._by_device(sorted(logged))
        self._logs = {
            device: UndoLog([self.views[i] for i in indices])
            for device, indices in self._logged.items()
        }

    def _by_device(self, indices: Iterable[int]) -> dict[torch.device, list[int]]:
        groups: dict[torch.device, list[int]] = defaultdict(list)
        for i in indices:
            groups[self.views[i].device].append(i)
        return dict(groups)

    @torch.no_grad()
    def take(self) -> None:
        """Keep the weights of now instead, in the same memory.

        Raises:
            RuntimeError: a parameter was replaced, resized, moved or cast; nothing is written.
        """
        self._check("take")
        self._complete = False
        for views, copies in self._pairs:
            ops.copy_(copies, views, backend=self._backend_for("copy_", copies[0], views[0]))
        for log in self._logs.values():
            log.reset()
        logged = [i for indices in self._logged.values() for i in indices]
        self._checksums = {i: self._checksum(self.views[i]) for i in logged}
        self._complete = True

    @torch.no_grad()
    def restore(self) -> None:
        """Bring the weights back bit for bit, any number of times.

        Raises:
            RuntimeError: as :meth:`take`, or the last one did not finish; nothing is written. Or,
                with "undo", something that does not log changed a weight; the others are back.
        """
        self._check("restore")
        if not self._complete:
            raise RuntimeError(
                "Snapshot.restore: the last take() did not finish, so nothing was written. "
                "Call take() again with the weights you want."
            )
        for views, copies in self._pairs:
            ops.copy_(views, copies, backend=self._backend_for("copy_", copies[0], views[0]))
        for device, indices in self._logged.items():
            views = [self.views[i] for i in indices]
            backend = self._backend_for("undo_restore_", views[0])
            ops.undo_restore_(views, self._logs[device], backend=backend)
        changed = self._changed(self._checksums)
        if changed:
            raise RuntimeError(
                f"Snapshot.restore: {len(changed)} weights did not come back ({changed[0]}, ...): "
                f"weights were changed by something that does not log to this snapshot; give "
                f"undo=snapshot.undo to every ops.sgd_ and ops.adamw_, or use where='device'."
            )

    def verify(self) -> bool:
        """Whether the weights are, by checksum, those of :meth:`take`; it raises as that does."""
        self._check("verify")
        return not self._changed(self._first)

    def _changed(self, indices: Iterable[int]) -> list[str]:
        """Names of the entries whose checksum is not that of the copy, or of the last take."""

        def differs(i: int) -> bool:
            original = self.originals[i]
            expected = self._checksums[i] if original is None else self._checksum(original)
            return self._checksum(self.views[i]) != expected

        return [self.names[i] for i in sorted(set(indices)) if differs(i)]

    def _checksum(self, tensor: Tensor) -> int:
        return ops.checksum([tensor], backend=self._backend_for("checksum", tensor))

    def _backend_for(self, op: str, *tensors: Tensor) -> str:
        return ops.backend_for(op, self.backend, *(tensor.device.type for tensor in tensors))

    @property
    def undo(self) -> UndoLog | None:
        """Log for an update of all :attr:`views`; None where nothing is logged."""
        return self.undo_log(range(len(self.views)))

    def undo_log(self, indices: Sequence[int]) -> UndoLog | None:
        """Log for an update of some entries: one parameter group, one device.

        Args:
            indices: positions in :attr:`views` of the parameters that are updated, in their order.

        Raises:
            ValueError: they are logged on several devices.
        """
        devices = list(self._by_device(i for i in indices if self.originals[i] is None))
        if not devices:
            return None
        if len(devices) > 1:
            raise ValueError(
                f"Snapshot: weights are logged on {', '.join(map(str, devices))}; update one "
                f"device at a time, with undo=snapshot.undo_log(its indices)."
            )
        device = devices[0]
        position = {i: n for n, i in enumerate(self._logged[device])}
        return self._logs[device].select([position.get(self._first[i]) for i in indices])

    @property
    def memory(self) -> list[Tensor]:
        """All tensors that it writes to, copies and logs."""
        return [*self._buffers, *(t for log in self._logs.values() for t in log.tensors)]

    @property
    def nbytes(self) -> int:
        """Bytes in use: copies and, with "undo", what has been logged until now."""
        copies = sum(buffer.nbytes for buffer in self._buffers)
        return copies + sum(log.nbytes for log in self._logs.values())

    def describe(self) -> str:
        """One line: what is kept, how, and in how many bytes."""
        n_copies = sum(len(copies) for _, copies in self._pairs)
        copies = f"{n_copies} tensors kept whole, {sum(b.nbytes for b in self._buffers)} bytes"
        if not self._logs:
            none = "no 16-bit weights to log; " if self.where == "undo" else ""
            return f"{self.where}: {none}{copies}"
        logs = self._logs.values()
        return (
            f"undo: {len(self._checksums)} tensors logged, {sum(log.entries for log in logs)} "
            f"changes, {sum(log.paged_chunks for log in logs)} of "
            f"{sum(log.tensors[4].numel() for log in logs)} runs kept whole, "
            f"{sum(log.nbytes for log in logs)} bytes; {copies}; "
            f"a full copy takes {sum(self.views[i].nbytes for i in set(self._first))} bytes"
        )

    def __enter__(self) -> Snapshot:
        return self

    def __exit__(self, *exception: object) -> None:
        self.restore()

    def _check(self, action: str) -> None:
        """Raise unless every entry is still the memory that it was."""
        change = self._placement.change()
        if change is not None:
            raise RuntimeError(
                "Snapshot.{}: {} was {} and is {}: it was replaced, resized, moved or cast. "
                "Nothing was written; bring it back or make a new Snapshot.".format(action, *change)
            )


def _entries(params: Any) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(name, owner, live memory) of each entry of whatever :class:`Snapshot` accepts."""
    if isinstance(params, Tensor):
        raise TypeError("Snapshot: params is a single tensor; pass a list of them, or a module.")
    if isinstance(params, nn.Module):
        params = params.named_parameters()
    elif isinstance(params, Mapping):
        params = params.items()
    for i, item in enumerate(params):
        name = getattr(item, "name", None) or f"param {i}"
        if isinstance(item, tuple):
            name, item = item
        owner = getattr(item, "param", item)  # a Selection has one, a tensor has not
        if not isinstance(owner, Tensor):
            raise TypeError(f"Snapshot: {name} is a {type(owner).__name__}; pass tensors.")
        obstacle = _obstacle(owner)
        if obstacle is not None:
            raise ValueError(f"Snapshot: {name} {obstacle}.")
        yield name, owner, item.detach() if item is owner else item.view()


def _obstacle(tensor: Tensor) -> str | None:
    """Why the bits of a tensor cannot be kept, and what to do; None if they can."""
    if is_lazy(tensor):
        return "is not initialised yet; run the model once before"
    if tensor.is_meta:
        return "is on the meta device and has no values; load the weights before"
    if tensor.layout != torch.strided:
        return f"is not dense ({tensor.layout}); leave it out"
    if tensor.is_quantized:
        return f"is quantised ({tensor.dtype}); leave it out or dequantise it"
    if tensor.is_complex():
        return f"is {tensor.dtype}; pass torch.view_as_real of it"
    if tensor.is_inference():
        return "is an inference tensor; load the model outside of torch.inference_mode"
    if any(n > 1 and step == 0 for n, step in zip(tensor.shape, tensor.stride(), strict=True)):
        return "is expanded, one element stands for many; pass what it was expanded from"
    if tensor.numel() > 0 and tensor.data_ptr() == 0:
        return f"has no memory of its own ({type(tensor).__name__}); pass its local tensor"
    return None


def _flat_copies(views: Mapping[int, Tensor], host: bool) -> tuple[list[Tensor], dict[int, Tensor]]:
    """One flat buffer per (device, dtype), and the place of each view in them by its key."""
    lengths: dict[tuple[torch.device, torch.dtype], int] = defaultdict(int)
    places = {}
    for i, view in views.items():
        key = (torch.device("cpu") if host else view.device, view.dtype)
        places[i] = (key, lengths[key])
        line = _ALIGNMENT_BYTES // view.element_size()
        lengths[key] += -(-view.numel() // line) * line
    pin = host and torch.cuda.is_available()
    buffers = {
        key: torch.empty(length, dtype=key[1], device=key[0], pin_memory=pin)
        for key, length in lengths.items()
    }
    return list(buffers.values()), {
        i: buffers[key][start : start + views[i].numel()].view(views[i].shape)
        for i, (key, start) in places.items()
    }


def _sharing_memory(views: Mapping[int, Tensor]) -> set[int]:
    """Keys of the views whose address range meets that of another (the elements need not)."""
    spans = []
    for i, view in views.items():
        if view.numel() > 0:
            n_spanned = 1 + sum((n - 1) * s for n, s in zip(view.shape, view.stride(), strict=True))
            start = view.data_ptr()
            spans.append((str(view.device), start, start + n_spanned * view.element_size(), i))
    sharing: set[int] = set()
    reach = ("", 0, 0, -1)  # on this device and so far, the span that ends last
    for span in sorted(spans):
        if span[0] == reach[0] and span[1] < reach[2]:
            sharing |= {span[3], reach[3]}
        reach = max(reach, span, key=lambda s: (s[0], s[2]))
    return sharing
