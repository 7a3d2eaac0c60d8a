"""Fixtures that several test files share."""

import os
from pathlib import Path

import pytest
import torch

from ttt_fast.demo import load_demo_model


@pytest.fixture(scope="session")
def demo_model():
    """The real model, float32; tests leave its weights as they were."""
    return load_demo_model()


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of evaluation files; tests that use it carry the marker `data`."""
    return Path(os.environ["TTT_FAST_DATA"])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip `data` tests where no folder is named, `gpu` tests where there is no GPU, and say so."""
    no_data = pytest.mark.skip(reason="TTT_FAST_DATA names no folder of evaluation files")
    no_gpu = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        if "data" in item.keywords and not os.environ.get("TTT_FAST_DATA"):
            item.add_marker(no_data)
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(no_gpu)
