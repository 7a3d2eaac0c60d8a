"""The three ways in which the dense engine has gradients, for the tests of each."""

import pytest
import torch

from tests.loops import prompt_ids
from ttt_fast.engines import dense, products

OPTIONS = dict(lr=2e-2, momentum=0.9, weight_decay=0.01, max_grad_norm=1.0)
IDS = prompt_ids(8)
NEVER, ALWAYS = 0.0, 1e12


PATHS = {"buffers": (NEVER, False), "products": (ALWAYS, False), "factors": (ALWAYS, True)}


@pytest.fixture(params=PATHS.values(), ids=PATHS, autouse=True)
def path(request, monkeypatch):
    """Every test runs with gradients in buffers, as products, and as factors that a kernel takes.

    Plain torch stands in for that kernel.
    """
    flops, taken = request.param
    monkeypatch.setattr(products, "FLOPS_PER_BYTE", flops)
    monkeypatch.setattr(dense, "takes_factors", lambda device_type, backend: taken)
    return flops


def formed(gradient, like):
    """A gradient of the shape of ``like``, whatever form it has."""
    if isinstance(gradient, products.Products):
        out = torch.empty(gradient.n, gradient.m, dtype=like.dtype)
        return gradient.write_rows(0, out).view(like.shape)
    return None if gradient is None else gradient.clone()
