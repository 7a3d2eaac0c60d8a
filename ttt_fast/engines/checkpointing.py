"""Activation checkpointing: a layer keeps its input and is computed again in the backward pass.

Hugging Face's own does that in train mode only, which steps do not run in. This one wraps the
``forward`` of decoder layers for one step at a time, whatever the mode.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

from torch import nn
from torch.nn.modules.module import _has_any_global_hook
from torch.utils.checkpoint import checkpoint

from ttt_fast.batch import Batch
from ttt_fast.scope import decoder_layers, is_compiled
from ttt_fast.span_cache import SpanCache


class Checkpointing:
    """Lets the decoder layers of a model forget what they compute until the backward needs it.

    A layer that has a forward of its own on the instance keeps everything, and so does one with
    forward hooks inside, or any while there are global ones: they are to be called once a step.
    Losses and gradients are those of the same operations on the same numbers.

    Args:
        model: the model.
        dropout: whether layers drop out; the second time the same numbers as the first.
        recomputing: entered around what is computed again.

    Raises:
        ValueError: the model has no stack of decoder layers, or is compiled.
    """

    def __init__(
        self,
        model: nn.Module,
        dropout: bool,
        recomputing: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self._layers = [] if is_compiled(model) else decoder_layers(model)
        if not self._layers:
            raise ValueError(
                f"checkpointing=True: {type(model).__name__} has no stack of decoder layers to"
                " compute again, or is compiled. Use checkpointing=False."
            )
        self._model, self._dropout, self._recomputing = model, dropout, recomputing

    @contextmanager
    def around(self, rows: Batch) -> Iterator[None]:
        """During the forward and backward of a step.

        Raises:
            ValueError: there is a cache in front of the rows that forwards append to.
        """
        if not isinstance(rows.past_key_values, SpanCache | None):
            raise ValueError(
                "checkpointing=True: a layer that is computed again would append to"
                " past_key_values twice. Use checkpointing=False."
            )
        wrapped = [layer for layer in self._layers if not _is_watched(layer)]
        own = [m for m in self._model.modules() if getattr(m, "gradient_checkpointing", False)]
        try:
            for module in own:
                module.gradient_checkpointing = False
            for layer in wrapped:
                layer.forward = partial(self._forward, layer)
            yield
        finally:
            for layer in wrapped:
                vars(layer).pop("forward", None)
            for module in own:
                module.gradient_checkpointing = True

    def _forward(self, layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return checkpoint(
            partial(type(layer).forward, layer),
            *args,
            use_reentrant=False,
            preserve_rng_state=self._dropout,
            context_fn=lambda: (nullcontext(), self._recomputing()),
            **kwargs,
        )


def _is_watched(layer: nn.Module) -> bool:
    """Whether someone would notice that it runs again; hooks of the layer itself do not."""
    inside = (module for module in layer.modules() if module is not layer)
    watched = _has_any_global_hook() or "forward" in vars(layer)
    return watched or any(module._forward_hooks or module._forward_pre_hooks for module in inside)
