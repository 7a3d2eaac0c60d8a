"""A parameter to adapt, or the rows of it that are the query's."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class RowSlice:
    """Output rows r of dimension `dim` with  start <= r % period < start + length.

    A fused projection that lays q, k and v side by side has its whole output as period (Phi-3:
    dim 0; GPT-2, whose Conv1D weight is (in, out): dim 1); GPT-NeoX, which interleaves them head
    by head, has 3 * head_dim.
    """

    dim: int
    start: int
    length: int
    period: int

    def view(self, tensor: Tensor) -> Tensor:
        """Return these rows of `tensor` as a view with one more dimension.

        Args:
            tensor: the parameter or a tensor of its shape, any strides; size n at `dim`.

        Returns:
            `dim` replaced by (n / period, length); shares storage with `tensor`.

        Raises:
            ValueError: n is not a multiple of the period.
        """
        size = tensor.shape[self.dim]
        if size % self.period:
            raise ValueError(
                f"RowSlice: dimension {self.dim} of a tensor of shape {tuple(tensor.shape)} has to "
                f"be a multiple of the period {self.period}."
            )
        blocks = tensor.unflatten(self.dim, (size // self.period, self.period))
        return blocks.narrow(self.dim + 1, self.start, self.length)


@dataclass(frozen=True, eq=False)  # equality of tensors is elementwise: compare by identity
class Selection:
    """A parameter to adapt, whole or (rows) in part.

    Attributes:
        name: as in `model.named_parameters()`; of tied parameters the first name.
        param: the parameter itself.
        rows: None for the whole parameter.
    """

    name: str
    param: nn.Parameter
    rows: RowSlice | None = None

    def view(self, tensor: Tensor | None = None) -> Tensor:
        """Return the selected part of `tensor`, by default of the parameter, as a view.

        Args:
            tensor: of the parameter's shape, e.g. its gradient or a momentum buffer. None means
                the parameter, detached from autograd: writing to the view changes the weight.

        Raises:
            ValueError: `tensor` has another shape than the parameter.
        """
        tensor = self.param.detach() if tensor is None else tensor
        if tensor.shape != self.param.shape:
            raise ValueError(
                f"{self.name}: view of a tensor of shape {tuple(tensor.shape)}, but the parameter "
                f"is {tuple(self.param.shape)}. Pass its gradient, a buffer of its shape, or None."
            )
        return tensor if self.rows is None else self.rows.view(tensor)

    @property
    def numel(self) -> int:
        """Number of selected elements."""
        if self.rows is None:
            return self.param.numel()
        return self.param.numel() // self.rows.period * self.rows.length
