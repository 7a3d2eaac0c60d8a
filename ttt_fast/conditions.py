"""What the numbers of a run depend on, and numbers as JSON has them."""

from __future__ import annotations

import math
import platform
from typing import Any

import torch
from torch import Tensor, nn


def finite(value: Tensor | float | None) -> float | None:
    """A number that JSON has, None for the others."""
    return float(value) if value is not None and math.isfinite(value) else None


def model_name(model: nn.Module) -> str:
    """Where a model came from, as its configuration says, else its class."""
    return getattr(model.config, "name_or_path", "") or type(model).__name__


def versions() -> dict[str, Any]:
    """Versions of what computes."""
    import transformers

    from ttt_fast import __version__

    return {
        "ttt_fast": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
