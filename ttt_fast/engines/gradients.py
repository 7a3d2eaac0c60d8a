"""Gradients that stay factors, or land in buffers which live from step to step.

Autograd allocates every weight gradient anew at each step, and sums the two gradients of a tied
embedding and head in a third tensor. While :meth:`GradientBuffers.recording` is active, the plain
``nn.Linear``, ``Conv1D`` and ``nn.Embedding`` modules that own selected parameters keep the factors
of theirs (:class:`Products`) where that pays, and write it straight into a buffer where it does
not, only the selected rows. Whatever else uses a selected parameter goes through autograd as always
and is added: nothing is silently frozen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

from ttt_fast.engines.products import Gradient, Products, linear
from ttt_fast.selection import Selection


class _Slot:
    """Gradient of one selection at the current step: products, or in the buffer, never both.

    Attributes:
        selection: what it is the gradient of.
        arrived: the buffer holds (part of) this step's gradient.
    """

    def __init__(self, selection: Selection) -> None:
        self.selection = selection
        self.arrived = False
        self._products: Products | None = None
        self._buffer: Tensor | None = None

    def clear(self) -> None:
        """Forget this step's gradient; the buffer stays."""
        self.arrived, self._products = False, None

    @property
    def has_buffer(self) -> bool:
        """Whether it was needed yet."""
        return self._buffer is not None

    @property
    def buffer(self) -> Tensor:
        """Contiguous, of the shape of the selection's view; allocated at its first use."""
        if self._buffer is None:
            view = self.selection.view()
            self._buffer = torch.empty(view.shape, dtype=view.dtype, device=view.device)
        return self._buffer

    def select(self, dy: Tensor) -> Tensor:
        """Columns of dy (M, out) that belong to the selected output rows, (M, selected)."""
        rows = self.selection.rows
        if rows is None:
            return dy
        groups = dy.shape[1] // rows.period
        return dy.view(-1, groups, rows.period).narrow(2, rows.start, rows.length).flatten(1)

    def add_product(self, a: Tensor, b: Tensor) -> None:
        """Add aᵀ b, (n, m) for a (M, n) and b (M, m)."""
        products = self._paying(a.shape[1], b.shape[1], pair_rows=len(a))
        if products is not None:
            products.add_pair(a, b)
            return
        self._form()
        out = self.buffer.view(a.shape[1], b.shape[1])
        if self.arrived:
            out.addmm_(a.t(), b)
        else:
            torch.mm(a.t(), b, out=out)
        self.arrived = True

    def add_sum(self, dy: Tensor) -> None:
        """Add the sum over tokens of dy (M, n): a bias' gradient."""
        out = self.buffer.view(-1)
        if self.arrived:
            out.add_(dy.sum(0))
        else:
            torch.sum(dy, 0, out=out)
        self.arrived = True

    def add_rows(self, index: Tensor, dy: Tensor) -> None:
        """Add each row of dy (M, D) to the row that index (M,) names: an embedding's gradient."""
        products = self._paying(*self.selection.param.shape, lookup_rows=len(index))
        if products is not None:
            products.add_lookup(index, dy)
            return
        self._form()
        if not self.arrived:
            self.buffer.zero_()
        self.buffer.index_add_(0, index, dy)
        self.arrived = True

    def collect(self) -> Gradient | None:
        """This step's whole gradient, autograd's share included; None if there was none."""
        grad = self.selection.param.grad
        if grad is None and self._products is not None:
            return self._products
        self._form()
        if grad is None:
            return self.buffer if self.arrived else None
        grad = self.selection.view(grad)
        return self.buffer.add_(grad) if self.arrived else grad

    def _paying(self, n: int, m: int, **rows: int) -> Products | None:
        """The products, if with so many rows more they cost less than a gradient in the buffer."""
        if self.arrived:
            return None
        products = Products(n, m) if self._products is None else self._products
        if not products.pays(**rows):
            return None
        self._products = products
        return products

    def _form(self) -> None:
        """Put what are products until now into the buffer."""
        if self._products is not None:
            self._products.write_rows(0, self.buffer.view(self._products.n, self._products.m))
            self.arrived, self._products = True, None


class LinearSlots(NamedTuple):
    """Where the gradients of a linear module go, None for what does not train."""

    weight: _Slot | None
    bias: _Slot | None
    transposed: bool = False  # the weight is (in, out), as Conv1D's

    def add(self, x: Tensor | None, dy: Tensor) -> None:
        """Add what rows x (M, in), if the weight trains, and dy (M, out) give."""
        if self.weight is not None:
            selected = self.weight.select(dy)
            self.weight.add_product(*((x, selected) if self.transposed else (selected, x)))
        if self.bias is not None:
            self.bias.add_sum(self.bias.select(dy))


class _Linear(torch.autograd.Function):
    """y = x Wᵀ + b, or x W + b for Conv1D's (in, out) weight; dW and db go to their slots."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        slots: LinearSlots,
    ) -> Tensor:
        needs_x = slots.weight is not None or weight.requires_grad
        ctx.save_for_backward(x if needs_x else None, weight)
        ctx.slots = slots
        y = linear(x, weight.t() if slots.transposed else weight)
        return y if bias is None else y.add_(bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        slots, transposed = ctx.slots, ctx.slots.transposed
        rows = dy.reshape(-1, dy.shape[-1])
        inputs = None if x is None else x.reshape(-1, x.shape[-1])
        slots.add(inputs, rows)
        dx = dweight = dbias = None
        if slots.weight is None and ctx.needs_input_grad[1]:
            # Not a parameter but computed from one (a parametrization, weight_norm).
            dweight = inputs.t() @ rows if transposed else rows.t() @ inputs
        if slots.bias is None and ctx.needs_input_grad[2]:
            dbias = rows.sum(0)
        if ctx.needs_input_grad[0]:
            dx = linear(dy, weight if transposed else weight.t())
        return dx, dweight, dbias, None


class _Embedding(torch.autograd.Function):
    """y = W[ids]; dW goes to its slot. The row ``padding_idx`` gets none, as in torch."""

    @staticmethod
    def forward(
        ctx: Any, ids: Tensor, weight: Tensor, padding_idx: int | None, slot: _Slot
    ) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.padding_idx, ctx.slot = padding_idx, slot
        return F.embedding(ids, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[None, ...]:
        (ids,) = ctx.saved_tensors
        index, rows = ids.reshape(-1), dy.reshape(-1, dy.shape[-1])
        if ctx.padding_idx is not None:
            rows = rows.masked_fill((index == ctx.padding_idx)[:, None], 0)
        ctx.slot.add_rows(index, rows)
        return None, None, None, None


class GradientBuffers:
    """The gradients of a selection; buffers live from step to step and from prompt to prompt.

    Args:
        model: the model that owns the parameters.
        selections: what to take gradients of.
        reuse: write into buffers; False leaves everything to autograd (bitwise what stock torch
            computes).
    """

    def __init__(
        self, model: nn.Module, selections: Sequence[Selection], reuse: bool = True
    ) -> None:
        self._slots = [_Slot(selection) for selection in selections]
        by_param = {id(slot.selection.param): slot for slot in self._slots}
        self._takeovers: list[tuple[nn.Module, partial[Tensor]]] = []
        for module in model.modules() if reuse else ():
            forward = _forward_into_slots(module, by_param)
            if forward is not None:
                self._takeovers.append((module, forward))

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Take the modules over for one forward and backward; give them back whatever happens."""
        for slot in self._slots:
            slot.clear()
            slot.selection.param.grad = None
        taken = []
        try:
            if not torch.is_autocast_enabled(self._device_type()):
                for module, forward in self._takeovers:
                    # Somebody else's forward on the instance (accelerate's hooks) stays in charge,
                    # and a hook on a parameter has to see its gradient.
                    if "forward" not in vars(module) and not _has_hooks(module):
                        module.forward = forward
                        taken.append(module)
            yield
        finally:
            for module in taken:
                del module.forward
            for slot in self._slots:
                # Products hold activations, which are not to outlive the step.
                slot.clear()

    def collect(self) -> list[Gradient | None]:
        """One gradient for each selection, None for a parameter that the loss did not reach.

        They are good until the recording ends.
        """
        return [slot.collect() for slot in self._slots]

    def taken(self, module: nn.Module) -> tuple[LinearSlots, Callable[..., Tensor]] | None:
        """Slots of a linear module, and its forward while recording; None if it keeps its own."""
        for each, forward in self._takeovers:
            if each is module and forward.func is _linear_forward:
                return forward.args[1], forward
        return None

    @property
    def memory(self) -> list[Tensor]:
        """The buffers there are."""
        return [slot.buffer for slot in self._slots if slot.has_buffer]

    def _device_type(self) -> str:
        return self._slots[0].selection.param.device.type


def _has_hooks(module: nn.Module) -> bool:
    """Whether a parameter of the module itself has hooks on its gradient."""
    return any(
        param._backward_hooks or getattr(param, "_post_accumulate_grad_hooks", None)
        for param in module.parameters(recurse=False)
    )


def _forward_into_slots(module: nn.Module, slots: dict[int, _Slot]) -> partial[Tensor] | None:
    """The replacement of ``module.forward``, None if the module cannot be taken over."""
    weight = getattr(module, "weight", None)
    weight_slot = slots.get(id(weight))
    bias_slot = slots.get(id(getattr(module, "bias", None)))
    if weight_slot is None and bias_slot is None:
        return None
    forward = type(module).forward
    if forward is nn.Linear.forward or forward is Conv1D.forward:
        slots = LinearSlots(weight_slot, bias_slot, forward is Conv1D.forward)
        return partial(_linear_forward, module, slots)
    plain = weight_slot is not None and weight_slot.selection.rows is None
    if forward is nn.Embedding.forward and plain:
        if module.max_norm is None and not module.scale_grad_by_freq and not module.sparse:
            return partial(_embedding_forward, module, weight_slot)
    return None


def _linear_forward(module: nn.Module, slots: LinearSlots, x: Tensor) -> Tensor:
    return _Linear.apply(x, module.weight, module.bias, slots)


def _embedding_forward(module: nn.Embedding, slot: _Slot, ids: Tensor) -> Tensor:
    return _Embedding.apply(ids, module.weight, module.padding_idx, slot)
