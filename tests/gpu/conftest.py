"""Fixtures of the tests that need a CUDA device; ``make gpu-check`` runs them.

With ``TTT_FAST_GPU_REHEARSAL=1`` the same bodies run on the CPU with what it has, but for those
that are about streams and devices: so that what nobody has tried on a GPU has at least been run.
"""

import os

import pytest
import torch

REHEARSAL = os.environ.get("TTT_FAST_GPU_REHEARSAL") == "1"


def pytest_configure(config: pytest.Config) -> None:
    """Markers that only this folder has."""
    config.addinivalue_line("markers", "cuda: cannot be rehearsed on the CPU")
    config.addinivalue_line("markers", "devices: needs two CUDA devices")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark everything here `gpu`; skip what a machine has not, and say so."""
    n_devices = torch.cuda.device_count()
    for item in items:
        if "tests/gpu" not in item.path.as_posix():
            continue
        if "devices" in item.keywords and n_devices < 2:
            reason = f"needs two CUDA devices, there are {n_devices}"
            item.add_marker(pytest.mark.skip(reason=reason))
        if "cuda" in item.keywords and n_devices == 0:
            item.add_marker(pytest.mark.skip(reason="no CUDA device: nothing to rehearse"))


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The device under test."""
    return torch.device("cpu" if REHEARSAL else "cuda")


@pytest.fixture(autouse=True)
def exact_products():
    """Products of float32 in float32: TF32 has 10 bits, and no promise is about it."""
    found = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = found
