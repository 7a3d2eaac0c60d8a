"""The output head and the loss in one piece: the logits of a few tokens at a time, none kept.

Where the objective is our own negative log-likelihood and a model gives its head's logits as they
are, nobody needs them. While such a model runs, the ``forward`` of its head computes, where it is
frozen a chunk of tokens after the other,

    z = h Wᵀ + b,    loss = −log softmax(z)[target],    dz = s ∘ (softmax(z) − onehot),    dh = dz W

with s the weight of each token in the loss of its delta, and returns a tensor without memory. Only
dh is kept for the backward pass; of a head that trains, the factored engine records dz as it is
made, and the dense one keeps it. Tokens without a label have no logits at all.

That a model does nothing else with its logits is not believed but seen: the tensor that the head
returned has to come out of the model, the same object, unchanged. It is on the device "meta", so
whatever else is computed from it has no numbers. When a model turns out to be another kind, at its
first forward, that forward runs once more with logits, as do all later ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules import module as torch_module

from ttt_fast import placement
from ttt_fast.batch import IGNORE_INDEX, Batch, text_config
from ttt_fast.engines.frozen import is_watched, stand_in_of
from ttt_fast.engines.head_kinds import Asked, FrozenHead
from ttt_fast.objective import next_tokens, reduce_rows, row_losses, token_scale
from ttt_fast.op_checks import DTYPES
from ttt_fast.rounding import compute_dtype


class _HeadLoss(torch.autograd.Function):
    """Loss of each delta; its gradient, that of the sum of them all, is made in the forward."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, call: _Call
    ) -> Tensor:
        ctx.head, ctx.asked, ctx.needs_dx = call.head, call.asked, ctx.needs_input_grad[0]
        losses, saved = call.head.forward(x, bias, call.asked, ctx.needs_dx)
        ctx.save_for_backward(*saved)
        return call.reduced(losses)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dlosses: Tensor) -> tuple[Tensor | None, ...]:
        waits = placement.look_waits(dlosses.device)
        assert waits or bool((dlosses == 1).all()), "of the sum, only"
        dx, dbias = ctx.head.backward(ctx.asked, ctx.saved_tensors, ctx.needs_dx)
        return dx, None, dbias, None


# ---------------------------------------------------------------------------- one forward


class _Call:
    """A forward of the model in which its head is to compute the losses.

    Attributes:
        losses: (n_deltas,); None as long as the head was not called.
        placeholder: what the head returned.
        count: how often it was called.
        open: whether it is to compute losses; otherwise it is what it was.
    """

    def __init__(self, head: FrozenHead, rows: Batch, n_deltas: int, reduction: str) -> None:
        self.head, self._own = head, head.module.forward
        self._rows, self._n_deltas, self._reduction = rows, n_deltas, reduction
        self._targets = next_tokens(rows.labels)
        self.losses: Tensor | None = None
        self.placeholder: Tensor | None = None
        self.count, self.open = 0, False

    def forward(self, x: Tensor) -> Tensor:
        """Compute the losses from what the head is given; return a tensor without memory."""
        self.count += self.open
        weight = self.head.module.weight
        fits = x.dim() == 3 and x.shape[:2] == self._targets.shape
        fits = fits and (x.dtype, x.device) == (weight.dtype, weight.device)
        fits = fits and x.device == self._targets.device
        if not (self.open and self.count == 1 and fits):
            return self._own(x)
        dtype = compute_dtype(x.dtype)
        scale = token_scale(self._targets, self._rows, self._reduction, self._n_deltas, dtype)
        self.asked = Asked(self._targets, scale, self.head.groups())
        if torch.is_grad_enabled():
            self.losses = _HeadLoss.apply(x, *self.head.leaves(), self)
        else:
            self.losses = self.reduced(self._token_losses(x))
        with torch.inference_mode(False):  # whose tensors would not count changes
            shape = *x.shape[:2], len(weight)
            self.placeholder = torch.empty(shape, dtype=x.dtype, device="meta")
        return self.placeholder

    def reduced(self, token_losses: Tensor) -> Tensor:
        """Loss of each delta (n_deltas,) from those of the tokens that were asked for."""
        by_token = self.asked.spread(token_losses)
        by_row = row_losses(by_token, self._targets, self._rows, self._reduction)
        return reduce_rows(by_row, self._rows.row_weights, self._n_deltas)

    def _token_losses(self, x: Tensor) -> Tensor:
        """Losses (n, M'), without a gradient."""
        rows, losses = self.asked.rows(x), self.asked.scale.new_empty(self.asked.scale.shape)
        for part in self.head.chunks(self.asked):
            z = self.head.logits(rows[:, part])
            z = z.to(losses.dtype).flatten(0, 1)
            targets = self.asked.targets[:, part]
            found = F.cross_entropy(
                z, targets.reshape(-1), ignore_index=IGNORE_INDEX, reduction="none"
            )
            losses[:, part] = found.view(targets.shape)
        return losses

    def is_answered_by(self, outputs: Any) -> bool:
        """Whether the model gave what its head returned, as it was."""
        whole = self.placeholder
        same = getattr(outputs, "logits", None) is whole
        return same and whole._version == 0 and self.count == 1


class OutputHead:
    """The head of a model, and whether its logits are needed.

    Args:
        model: the model.
        head: how its head trains; None where there is none that is known.

    Attributes:
        plain: whether the model gives the head's logits as they are; None before its first forward.
    """

    def __init__(self, model: nn.Module, head: FrozenHead | None) -> None:
        self._head, self.plain = head, None
        self._around = [] if head is None else _around(model, head.module)

    @contextmanager
    def answering(
        self, rows: Batch, n_deltas: int, reduction: str | None
    ) -> Iterator[_Call | None]:
        """Be ready for a forward on rows; outside of where Ctrl-C may come between two lines.

        Args:
            rows: a complete batch.
            n_deltas: number of deltas that the rows belong to.
            reduction: of the negative log-likelihood, None for any other objective.

        Yields:
            what :meth:`run` is to be given; None where the model is left as it is.
        """
        if reduction is None or not self._is_free(torch.is_grad_enabled()):
            yield None
            return
        module, call = self._head.module, _Call(self._head, rows, n_deltas, reduction)
        found = vars(module).get("forward")
        try:
            module.forward = call.forward
            yield call
        finally:
            vars(module).pop("forward", None)
            if found is not None:
                module.forward = found

    def run(
        self,
        call: _Call | None,
        forward: Callable[[], Any],
        mark: Callable[[], Callable[[], None]],
    ) -> tuple[Any, Tensor | None]:
        """Run a model forward; without logits where that is possible.

        Args:
            call: from :meth:`answering`.
            forward: runs the model on the rows.
            mark: notes what has been recorded, and returns what takes back the rest.

        Returns:
            What the model returned, and the loss of each delta; None for the losses where the
            outputs have logits.

        Raises:
            RuntimeError: the model gave its head's logits at its first forward, but does not now.
        """
        if call is None:
            return forward(), None
        undo = mark() if self.plain is None else None
        outputs, call.open = None, True
        try:
            outputs = forward()
        except Exception:
            # Maybe because there was a tensor without numbers: with logits, we shall know.
            if self.plain is not None or call.placeholder is None:
                raise
        finally:
            call.open = False
        if call.placeholder is None:
            return outputs, None
        if call.is_answered_by(outputs):
            self.plain = True
            return outputs, call.losses
        if self.plain is not None:
            raise RuntimeError(
                "adapt: the model changed its head's logits, or called the head twice, which it did"
                " not do before, so that the loss would be another. Pass an objective of your own,"
                " which sees the logits, or make a new TTTTrainer for each kind of batch."
            )
        undo()
        outputs = forward()
        self.plain = False
        return outputs, None

    def _is_free(self, recording: bool) -> bool:
        """Whether the head can be replaced without anybody noticing."""
        if self._head is None or self.plain is False or torch_module._has_any_global_hook():
            return False
        module = self._head.module
        if torch.is_autocast_enabled(module.weight.device.type):
            return False
        if recording and not self._head.trains:
            if any(param.requires_grad for param in module.parameters()):
                return False
        found, own = vars(module).get("forward"), self._head.stand_in(recording)
        if own is None and stand_in_of(module) is not None:
            own = found  # it computes what the head does
        return found == own and not (
            module._forward_pre_hooks
            or is_watched(module)
            or any("forward" in vars(each) or is_watched(each) for each in self._around)
        )


def output_head(model: nn.Module) -> nn.Linear | None:
    """The module that gives a model's logits, where it is a plain linear one."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if not isinstance(head, nn.Linear) or head not in model.modules():
        return None
    plain = type(head).forward is nn.Linear.forward and set(head._parameters) == {"weight", "bias"}
    if not plain or not isinstance(head.weight, nn.Parameter) or head.weight.dtype not in DTYPES:
        return None
    return head


# What configurations have where logits are scaled, shifted or capped behind the head.
_CAP = "final_logit_softcapping"
_CHANGES = (_CAP, "logits_scaling", "logit_scale", "lm_head_multiplier")


def expects_no_logits(model: nn.Module) -> bool:
    """Whether the head will compute the losses, as far as can be told before a forward.

    For predictions of memory; what happens, the first forward decides.
    """
    config = text_config(model)
    changed = any(getattr(config, name, None) is not None for name in _CHANGES)
    return not changed and output_head(model) is not None


def caps_logits(model: nn.Module) -> bool:
    """Whether a tanh behind the head keeps logits for its backward."""
    return getattr(text_config(model), _CAP, None) is not None


def _around(model: nn.Module, head: nn.Module) -> list[nn.Module]:
    """The modules that the head is inside of."""
    (name,) = [name for name, module in model.named_modules() if module is head]
    parts = name.split(".")[:-1]
    return [model.get_submodule(".".join(parts[:depth])) for depth in range(len(parts) + 1)]
