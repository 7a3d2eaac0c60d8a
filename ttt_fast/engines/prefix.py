"""The frozen prefix: decoder layers that nothing adapted reaches, computed once for a batch."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from ttt_fast.batch import Batch
from ttt_fast.scope import decoder_layers, is_compiled

# What configurations have where a model returns something of each of its layers.
_SHOWN = ("output_hidden_states", "output_attentions", "output_router_logits")


@dataclass
class _Kept:
    """What the first forward on a batch found out."""

    rows: weakref.ref[Batch]
    versions: list[int]
    n_layers: int = 0
    hidden: Tensor | None = None  # of the last of these layers, (N, T, D)


class FrozenPrefix:
    """Keeps the hidden states that frozen layers give, and skips the layers in later steps.

    Autograd says which layers these are: all up to the last whose output needs no gradient when a
    batch comes for the first time. They see the same tokens with the same weights in every later
    step on that batch, so what they gave is what they would give, bit for bit.

    A layer in which somebody watches (forward hooks), that has a forward of its own on the
    instance, or that returns more than its hidden states, runs every time, with all above it. So do
    all layers while there are global hooks, of a model that is set to return what each of them
    gives, and where a layer above writes into what the last of them gave.

    Args:
        model: the model; without one stack of decoder layers, or under torch.compile, nothing is
            skipped.
        dropout: whether layers drop out, and so give something else at every step.
    """

    def __init__(self, model: nn.Module, dropout: bool = False) -> None:
        settings = getattr(model, "config", None)
        shown = any(getattr(settings, name, False) for name in _SHOWN)
        others = dropout or shown or is_compiled(model)
        self._layers = [] if others else decoder_layers(model)
        self._kept: dict[int, _Kept] = {}

    def forget(self) -> None:
        """Keep nothing."""
        self._kept.clear()

    @contextmanager
    def reused(self, rows: Batch) -> Iterator[None]:
        """Around a forward that is differentiated; the same object comes again in later steps."""
        kept = self._find(rows)
        if not self._layers or not _can_be_known_again(rows):
            yield
        elif kept is None:
            kept = _Kept(weakref.ref(rows), _versions(rows))
            with self._watched(kept):
                yield
            key = id(rows)
            self._kept[key] = kept
            weakref.finalize(rows, self._kept.pop, key, None).atexit = False
        elif not kept.n_layers or any(map(_is_watched, self._layers[: kept.n_layers])):
            yield
        else:
            with self._skipped(kept):
                yield

    def _find(self, rows: Batch) -> _Kept | None:
        kept = self._kept.get(id(rows))
        found = kept is not None and kept.rows() is rows and kept.versions == _versions(rows)
        return kept if found else None

    @contextmanager
    def _watched(self, kept: _Kept) -> Iterator[None]:
        """Note the outputs of the layers, from the first on, that need no gradient."""
        version = 0

        def look(layer: nn.Module, args: Any, output: Any) -> None:
            nonlocal version
            follows = kept.n_layers < len(self._layers) and self._layers[kept.n_layers] is layer
            if not follows or not isinstance(output, Tensor):
                return
            if not output.requires_grad and not output.is_inference():
                kept.n_layers, kept.hidden = kept.n_layers + 1, output
                version = output._version

        handles = []
        try:
            for layer in self._layers:
                if _is_watched(layer):
                    break
                handles.append(layer.register_forward_hook(look))
            yield
        finally:
            for handle in handles:
                handle.remove()
        if kept.hidden is None:
            return
        if kept.hidden._version != version:
            kept.n_layers, kept.hidden = 0, None  # a layer above wrote into it
            return
        kept.hidden = kept.hidden.detach().clone()

    @contextmanager
    def _skipped(self, kept: _Kept) -> Iterator[None]:
        """Let the layers return what the last of them gave."""

        def again(*args: Any, **kwargs: Any) -> Tensor:
            # A copy, as a layer above may write into its input.
            return kept.hidden.clone()

        skipped = self._layers[: kept.n_layers]
        try:
            for layer in skipped:
                layer.forward = again
            yield
        finally:
            for layer in skipped:
                vars(layer).pop("forward", None)


def _is_watched(layer: nn.Module) -> bool:
    watched = _has_any_global_hook() or "forward" in vars(layer)
    return watched or any(
        module._forward_hooks or module._forward_pre_hooks for module in layer.modules()
    )


def _tensors(rows: Batch) -> list[Tensor]:
    values = (getattr(rows, field.name) for field in fields(rows))
    return [value for value in values if isinstance(value, Tensor)]


def _can_be_known_again(rows: Batch) -> bool:
    """Whether a change of the batch would show; a cache in front of the rows may grow."""
    return rows.past_key_values is None and not any(t.is_inference() for t in _tensors(rows))


def _versions(rows: Batch) -> list[int]:
    return [tensor._version for tensor in _tensors(rows)]
