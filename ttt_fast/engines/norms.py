"""Norms with a weight, and a bias, for each delta."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ttt_fast.engines.desk import Desk
from ttt_fast.engines.factors import VectorFactors
from ttt_fast.engines.pieces import rms_norm_of
from ttt_fast.engines.takeover import effective_vector


class NormSite:
    """Stands in for the ``forward`` of a norm: one op, or its own code, with a weight a delta.

    Args:
        name: of the module.
        module: the module.
        vectors: factors of its weight and bias, of those that are selected.
        desk: shared state.
        backend: a setting for all ops.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        vectors: dict[str, VectorFactors],
        desk: Desk,
        backend: str,
    ) -> None:
        self.name, self.module, self.vectors, self.desk = name, module, vectors, desk
        self._norm = rms_norm_of(module, backend)

    def forward(self, x: Tensor) -> Tensor:
        """The module's forward with the deltas of the layout; in the dtype of x."""
        layout, module = self.desk.layout, self.module
        rows = layout.split(x, self.name)
        padding = layout.padding_among(rows.shape[1]) if layout.recording else None
        if padding is not None:
            # The gradient of a norm's weight sums over tokens: padding must not be among them.
            rows = padding.blanked(rows)
        values = {name: effective_vector(v, layout) for name, v in self.vectors.items()}
        known = self._norm is not None and x.dtype == module.weight.dtype
        if known and not self.desk.is_differentiated(x):
            return self._norm(rows, values["weight"]).view(x.shape)
        values = {name: value[:, None] for name, value in values.items()}
        if isinstance(module, nn.LayerNorm | nn.RMSNorm):
            y = self._normalise(rows.to(self.desk.wide), values)
        else:
            y = self._substitute(rows, values)
        return y.to(x.dtype).view(x.shape)

    def _normalise(self, rows: Tensor, values: dict[str, Tensor]) -> Tensor:
        """Norms of torch take one weight for the whole batch, so it is applied afterwards."""
        module = self.module
        if isinstance(module, nn.LayerNorm):
            y = F.layer_norm(rows, module.normalized_shape, None, None, module.eps)
        else:
            y = F.rms_norm(rows, module.normalized_shape, None, module.eps)
        y = y * values.get("weight", module.weight)
        bias = values.get("bias", getattr(module, "bias", None))
        return y if bias is None else y + bias

    def _substitute(self, rows: Tensor, values: dict[str, Tensor]) -> Tensor:
        """Run the model's own code with another weight; it broadcasts over (n, tokens, width)."""
        own = vars(self.module)
        try:
            own.update(values)
            return type(self.module).forward(self.module, rows)
        finally:
            for name in values:
                own.pop(name, None)
