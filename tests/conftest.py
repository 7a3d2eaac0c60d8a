"""Fixtures that several test files share."""

import os
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="session")
def demo_model():
    """The real model, float32; tests leave its weights as they were."""
    # Not before it is used: transformers imports Triton, for which tests/interpreter has to decide
    # first how it runs.
    from ttt_fast.demo import load_demo_model

    return load_demo_model()


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of evaluation files; tests that use it carry the marker `data`."""
    return Path(os.environ["TTT_FAST_DATA"])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip `data` tests where no folder is named, `gpu` tests where there is no GPU, and so on."""
    no_data = pytest.mark.skip(reason="TTT_FAST_DATA names no folder of evaluation files")
    no_gpu = pytest.mark.skip(reason="no CUDA device")
    no_nvcc = pytest.mark.skip(reason="nvcc is not on PATH")
    no_harness = pytest.mark.skip(
        reason="lm-eval is not installed; pip install 'ttt-fast[lm-eval]'"
    )
    for item in items:
        if "data" in item.keywords and not os.environ.get("TTT_FAST_DATA"):
            item.add_marker(no_data)
        # tests/gpu/conftest.py says what a rehearsal is.
        rehearsal = os.environ.get("TTT_FAST_GPU_REHEARSAL") == "1"
        if "gpu" in item.keywords and not (rehearsal or torch.cuda.is_available()):
            item.add_marker(no_gpu)
        if "nvcc" in item.keywords and not shutil.which("nvcc"):
            item.add_marker(no_nvcc)
        if "lm_eval" in item.keywords and find_spec("lm_eval") is None:
            item.add_marker(no_harness)
        for package, module in (marker.args for marker in item.iter_markers("peer")):
            if find_spec(module) is None:
                reason = f"{package} is not installed; pip install 'ttt-fast[peers]'"
                item.add_marker(pytest.mark.skip(reason=reason))
