"""Modules that compute with a delta: W₀ is read, W₀ + Δ is what they act as.

The user's modules stay in the model. While a store of factors is attached, the ``forward`` of those
that own selected parameters is one of the functions below:

    y  = ρ·x W₀ᵀ − ((x Xᵀ)∘β) dY        dx = ρ·dy W₀ − ((dy dYᵀ)∘β) X

with X and dY the rows of all earlier steps; several deltas at once are a batch of such products on
the rows of one reading of W₀. In a forward that is recorded, x and dy are written behind those
rows: that is the gradient, and nothing else is saved for the backward.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode
from transformers.pytorch_utils import Conv1D

from ttt_fast import reference
from ttt_fast.engines.desk import Desk, Layout
from ttt_fast.engines.factors import (
    MatrixFactors,
    Padding,
    VectorFactors,
    add_product_,
    batched_product,
)
from ttt_fast.engines.rows import Start


class LinearSite:
    """Stands in for the ``forward`` of an ``nn.Linear`` or a ``Conv1D``.

    Args:
        name: of the module.
        module: the module.
        matrix: its weight's factors, None if the weight is not selected.
        bias: its bias' factors, likewise.
        desk: shared state.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        matrix: MatrixFactors | None,
        bias: VectorFactors | None,
        desk: Desk,
    ) -> None:
        self.name, self.module, self.matrix, self.bias, self.desk = name, module, matrix, bias, desk

    def forward(self, x: Tensor) -> Tensor:
        """The module's forward with the deltas of the layout."""
        layout, bias = self.desk.layout, self.effective_bias()
        if self.matrix is None:
            weight = self.module.weight.detach()
            y = F.linear(x, weight.t() if isinstance(self.module, Conv1D) else weight)
            shifted = layout.split(y, self.name) + bias[:, None]
            return shifted.to(y.dtype).view(y.shape)
        if layout.recording:
            return _Linear.apply(x, bias, self.desk.anchor, self)
        y = self.product(layout.split(x, self.name), bias, layout)
        return y.view(*x.shape[:-1], -1)

    def effective_bias(self) -> Tensor | None:
        """The bias of each delta (n, out), None where it is the module's own."""
        return None if self.bias is None else effective_vector(self.bias, self.desk.layout)

    def product(
        self, x: Tensor, bias: Tensor | None, layout: Layout, append: Tensor | None = None
    ) -> Tensor:
        """The formula for x (n, M, in).

        Args:
            x: the input.
            bias: (n, out), or None for the module's own.
            layout: of the forward.
            append: where x is to be written.
        """
        matrix = self.matrix
        rho = layout.rho(matrix.track, self.desk.wide)
        X, dY, beta = self._earlier(x, layout)
        if matrix.selection.rows is None:
            differentiated = self.desk.is_differentiated(x)
            op = reference.delta_linear if differentiated else self.desk.delta_linear
            y = op(x, matrix.weight, X, dY, beta, rho, append)
        else:
            if append is not None:
                append.copy_(x)
            y = F.linear(x, matrix.weight)
            selected = matrix.select(y)
            if rho is not None:
                selected.mul_(rho[:, None, None, None])
            add_product_(selected, _scores(x, X, beta), dY)
        if matrix.lookups is not None:
            e, ids, beta = self._earlier_lookups(layout)
            scores = _scores(x, e, beta)
            y.scatter_add_(2, ids.expand_as(scores), scores)
        if bias is not None:
            y.add_(bias[:, None])
        elif self.module.bias is not None:
            y.add_(self.module.bias)
        return y

    def input_gradient(self, dy: Tensor, layout: Layout, append: Tensor | None) -> Tensor:
        """The gradient at x (n, M, in) for dy (n, M, out), which goes to ``append``, too.

        That is the formula, transposed.
        """
        matrix = self.matrix
        rho = layout.rho(matrix.track, self.desk.wide)
        X, dY, beta = self._earlier(dy, layout)
        if matrix.selection.rows is None:
            dx = self.desk.delta_linear(dy, matrix.weight_t, dY, X, beta, rho, append)
        else:
            scores = _scores(matrix.select(dy).flatten(2), dY, beta)
            if rho is not None:
                dy = dy.clone()
                matrix.select(dy).mul_(rho[:, None, None, None])
            dx = dy.matmul(matrix.weight)
            add_product_(dx, scores, X)
        if matrix.lookups is not None:
            e, ids, beta = self._earlier_lookups(layout)
            scores = dy.gather(2, ids.expand(-1, dy.shape[1], -1)).mul_(-beta[:, None])
            add_product_(dx, scores, e)
        return dx

    def _earlier(self, like: Tensor, layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
        """X, dY and β of all earlier steps: (n, R, in), (n, R, selected), (n, R)."""
        matrix, deltas, wide = self.matrix, layout.deltas, self.desk.wide
        if matrix.inputs is None:
            # Used before the first step.
            shapes = (layout.n, 0, matrix.weight.shape[1]), (layout.n, 0, matrix.dy.width)
            X, dY = (like.new_empty(shape) for shape in shapes)
            return X, dY, like.new_empty(layout.n, 0, dtype=wide)
        beta = layout.beta(matrix.inputs.rows, matrix.track, wide)
        R = beta.shape[1]
        return matrix.inputs.buffer.first(deltas, R), matrix.dy.first(deltas, R), beta

    def _earlier_lookups(self, layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
        """DE, ids and β of all earlier steps: (n, R, in), (n, 1, R), (n, R)."""
        lookups, deltas = self.matrix.lookups, layout.deltas
        beta = layout.beta(lookups.rows, self.matrix.track, self.desk.wide)
        R = beta.shape[1]
        return lookups.dy.first(deltas, R), lookups.ids.first(deltas, R).transpose(1, 2), beta

    def record(
        self, x: Tensor, rows: Tensor, layout: Layout, padding: Padding | None
    ) -> tuple[Start, Tensor | None]:
        """The start of x's rows in X, and where the product is to write them, if it is."""
        matrix, desk = self.matrix, self.desk
        if matrix.inputs is None:
            newest = desk.newest
            joins = newest is not None and newest.is_new and newest.is_last(x)
            matrix.inputs = newest if joins else desk.new_inputs(x)
        desk.newest = matrix.inputs
        return matrix.inputs.record(x, rows, layout.deltas, layout.step, padding)

    def record_gradient(
        self, dy: Tensor, start: Start, layout: Layout, padding: Padding | None, needs_dx: bool
    ) -> tuple[Tensor | None, Tensor]:
        """Write dy (n, M, out) beside the rows of X that begin at ``start``.

        Returns:
            dx, if it is needed, and dy as it was recorded: 0 at padding.
        """
        append = self.matrix.room_for_dy(layout.deltas, start, dy.shape[1]) if needs_dx else None
        if append is None:
            dy = dy if padding is None else padding.blanked(dy)
            self.matrix.record_dy(layout.deltas, start, dy)
        dx = self.input_gradient(dy, layout, append) if needs_dx else None
        if append is None:
            return dx, dy
        if padding is not None:
            padding.blank_(append)
            padding.blank_(dx)
        return dx, append


class _Linear(torch.autograd.Function):
    """A recorded product; the gradient of its weight is two rows of factors a token."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor | None, anchor: Tensor, site: LinearSite
    ) -> Tensor:
        layout = site.desk.layout
        rows = layout.split(x, site.name)
        padding, append = layout.padding_among(rows.shape[1]), None
        if not site.desk.recomputing:
            ctx.start, append = site.record(x, rows, layout, padding)
        ctx.site, ctx.layout, ctx.shape = site, layout, x.shape
        y = site.product(rows, bias, layout, append)
        if append is not None and padding is not None:
            padding.blank_(append)
        # To autograd no view, so that a model may write into what it gets.
        return torch.ops.aten._unsafe_view(y, (*x.shape[:-1], y.shape[-1]))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        site, layout = ctx.site, ctx.layout
        dy = dy.reshape(layout.n, -1, dy.shape[-1]).contiguous()
        padding = layout.padding_among(dy.shape[1])
        dx, recorded = site.record_gradient(dy, ctx.start, layout, padding, ctx.needs_input_grad[0])
        dbias = None
        if ctx.needs_input_grad[1]:
            dbias = recorded.sum(1, dtype=site.bias.base.dtype)
        return dx if dx is None else dx.view(ctx.shape), dbias, None, None


class EmbeddingSite:
    """Stands in for the ``forward`` of an ``nn.Embedding``, or around the lookup of a subclass.

    Gemma scales inside its embedding module and OPT shifts position ids there: the lookup itself
    is what is replaced.
    """

    def __init__(self, name: str, module: nn.Embedding, matrix: MatrixFactors, desk: Desk) -> None:
        self.name, self.module, self.matrix, self.desk = name, module, matrix, desk

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The module's forward with the deltas of the layout."""
        original = type(self.module).forward
        if original is nn.Embedding.forward:
            return self.lookup(*args, **kwargs)
        with _Intercept(self):
            return original(self.module, *args, **kwargs)

    def lookup(self, input: Tensor) -> Tensor:
        """Rows of W₀ + Δ for ids (N, T), or (1, T) ids that all rows share: (N, T, D)."""
        layout = self.desk.layout
        if input.shape[0] == 1 and layout.n > 1:
            # Each row's positions move in its own way.
            input = input.expand(layout.n_rows, *input.shape[1:])
        ids = layout.split(input[..., None], self.name)[..., 0]
        if layout.recording:
            y = _Lookup.apply(ids, self.desk.anchor, self)
        else:
            y = self.rows_of(ids, layout)
        return y.view(*input.shape, -1)

    def rows_of(self, ids: Tensor, layout: Layout) -> Tensor:
        """The formula, for ids (n, M): (n, M, D)."""
        matrix, deltas = self.matrix, layout.deltas
        wide, lookups, inputs = self.desk.wide, matrix.lookups, matrix.inputs
        y = F.embedding(ids, matrix.weight).to(wide)
        rho = layout.rho(matrix.track, wide)
        if rho is not None:
            y.mul_(rho[:, None, None])
        beta = layout.beta(lookups.rows, matrix.track, wide)
        if beta.shape[1]:
            earlier = lookups.ids.first(deltas, beta.shape[1]).transpose(1, 2)
            scores = (ids[:, :, None] == earlier) * -beta[:, None]
            add_product_(y, scores, lookups.dy.first(deltas, beta.shape[1]).to(wide))
        if inputs is not None and inputs.rows.longest(deltas):
            beta = layout.beta(inputs.rows, matrix.track, wide)
            dy = matrix.dy.first(deltas, beta.shape[1])
            columns = dy.gather(2, ids[:, None].expand(-1, beta.shape[1], -1)).transpose(1, 2)
            earlier = inputs.buffer.first(deltas, beta.shape[1]).to(wide)
            add_product_(y, columns * -beta[:, None], earlier)
        return y.to(matrix.weight.dtype)


class _Lookup(torch.autograd.Function):
    """A recorded lookup."""

    @staticmethod
    def forward(ctx: Any, ids: Tensor, anchor: Tensor, site: EmbeddingSite) -> Tensor:
        layout = site.desk.layout
        if not site.desk.recomputing:
            ctx.start = site.matrix.lookups.record_ids(layout.deltas, layout.step, ids)
        ctx.site, ctx.layout = site, layout
        ctx.save_for_backward(ids)
        return site.rows_of(ids, layout)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[None, ...]:
        (ids,) = ctx.saved_tensors
        padding = ctx.layout.padding_among(ids.shape[1])
        if padding is not None:
            dy = padding.blanked(dy)
        padding_idx = ctx.site.module.padding_idx
        if padding_idx is not None:
            # torch gives that row no gradient from the lookup; a tied head still gives it one.
            dy = dy.masked_fill((ids == padding_idx)[:, :, None], 0)
        ctx.site.matrix.lookups.record_dy(ctx.layout.deltas, ctx.start, dy)
        return None, None, None


class _Intercept(TorchFunctionMode):
    """Hand the lookup inside an embedding module's own forward to its site."""

    def __init__(self, site: EmbeddingSite) -> None:
        super().__init__()
        self.site = site

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is F.embedding and args[1] is self.site.module.weight:
            return self.site.lookup(args[0])
        return func(*args, **(kwargs or {}))


def _scores(x: Tensor, rows: Tensor, beta: Tensor) -> Tensor:
    """−(x rowsᵀ)∘β, (n, M, R)."""
    return batched_product(x, rows.transpose(1, 2)).mul_(-beta[:, None])


def effective_vector(vector: VectorFactors, layout: Layout) -> Tensor:
    """The effective bias or norm weight of each delta, (n, size); a leaf while recording."""
    if layout.recording and vector.current_leaf is not None:
        return vector.current_leaf
    track, dtype = vector.track, vector.base.dtype
    with torch.no_grad():
        effective = vector.effective(
            layout.rho(track, dtype), layout.beta(vector.rows, track, dtype), layout.deltas
        )
    return vector.leaf(effective, layout.step) if layout.recording else effective
