"""`make gpu-check` without a GPU: what it says then, and what it makes of tests that fail."""

import json
import os
import subprocess
import sys

import pytest
import torch

from bench import gpu_check, profile_adapt
from tests.families import tiny_model

MIXED = """
import os
import pytest
pytestmark = pytest.mark.gpu

def test_good():
    pass

def test_bad():
    assert 1 == 2, "one is not two"

@pytest.mark.skip(reason="no second GPU")
def test_skipped():
    pass

@pytest.mark.slow
def test_large():
    assert False

def test_of_something_else():
    "Not on the device."
"""
CRASH = """
import os
import pytest

@pytest.mark.gpu
def test_crash():
    print("an illegal memory access", flush=True)
    os._exit(134)
"""
GPU = {"name": "NVIDIA H100 80GB HBM3", "capability": "9.0", "memory_gib": 79.6}


@pytest.fixture
def fake_gpu(monkeypatch, tmp_path):
    """Somebody's GPU, on which the tests are those that a test writes into the folder."""
    (tmp_path / "tests").mkdir()
    environment = {
        "gpus": [GPU],
        "datetime": "2026-11-22T09:50:38+00:00",
        "system": {"backends": {"torch": "ok", "cpp": "no g++", "triton": "ok", "cuda": "no nvcc"}},
    }
    monkeypatch.setattr(gpu_check, "no_gpu", lambda: None)
    monkeypatch.setattr(gpu_check, "environment", lambda: environment)
    monkeypatch.setattr(gpu_check, "ROOT", tmp_path)
    monkeypatch.setattr(gpu_check, "TESTS", tmp_path / "tests")
    monkeypatch.setattr(gpu_check, "RESULTS", tmp_path / "results")
    return tmp_path


@pytest.mark.parametrize(
    ("built", "advice"), [(None, "built for the CPU only"), ("13.0", "nvidia-smi says")]
)
def test_without_a_gpu_it_says_so(monkeypatch, capsys, built, advice):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", built)
    assert gpu_check.main([]) == 2
    said = capsys.readouterr().err
    assert "no CUDA device can be used" in said and advice in said


def test_a_failure_is_reported_and_kept(fake_gpu, capsys):
    (fake_gpu / "tests" / "test_mixed.py").write_text(MIXED)
    assert gpu_check.main(["--quick"]) == 1
    said = capsys.readouterr().out
    assert "2 passed, 1 failed, 1 skipped" in said
    assert "FAILED tests/test_mixed.py::test_bad" in said and "skipped 1: no second GPU" in said
    assert "backend cuda was not tested: no nvcc" in said and "Something failed" in said
    (path,) = (fake_gpu / "results").iterdir()
    assert path.name == "gpu-nvidia-h100-80gb-hbm3-20261122T095038.json"
    assert f"Please send {path.relative_to(fake_gpu)}" in said
    (failure,) = json.loads(path.read_text())["tests"]["tests/test_mixed.py"]["failures"]
    assert failure["fails_alone"] and "one is not two" in failure["message"]


def test_a_crash_is_a_failure_of_its_file(fake_gpu, capsys):
    (fake_gpu / "tests" / "test_crash.py").write_text(CRASH)
    assert gpu_check.main(["--quick"]) == 1
    assert "pytest ended with status 134" in capsys.readouterr().out


def test_all_is_well(fake_gpu, monkeypatch, capsys):
    (fake_gpu / "tests" / "test_good.py").write_text(MIXED.partition("def test_bad")[0])
    bench = {"benchmarks": [{"group": "copy"}], "failures": []}
    monkeypatch.setattr(gpu_check, "run_benchmarks", lambda: bench)
    assert gpu_check.main([]) == 0
    assert "Everything passed" in capsys.readouterr().out
    bench["failures"].append({"group": "copy", "error": "too slow"})
    assert gpu_check.main([]) == 1


def test_nothing_that_ran_is_no_success(fake_gpu):
    (fake_gpu / "tests" / "test_none.py").write_text("def test_unmarked():\n    pass\n")
    assert gpu_check.main(["--quick"]) == 1


def test_the_benchmarks_are_run_in_a_process_and_read(monkeypatch):
    monkeypatch.setattr(sys, "executable", "false")
    (failure,) = gpu_check.run_benchmarks()["failures"]
    assert "ended with status 1" in failure["error"]


@pytest.mark.slow
def test_rehearsal_of_the_tests():
    """Every test of the device that can run on a CPU does, and passes there."""
    environment = os.environ | {"TTT_FAST_GPU_REHEARSAL": "1"}
    command = [sys.executable, "-m", "pytest", "tests/gpu", "-m", "gpu"]
    done = subprocess.run(command, cwd=gpu_check.ROOT, env=environment, capture_output=True)
    assert done.returncode == 0, done.stdout.decode()[-3000:]


@pytest.mark.slow
def test_rehearsal_of_the_benchmarks(tmp_path):
    output = tmp_path / "bench.json"
    command = [sys.executable, "-m", "bench.gpu_bench", "--device", "cpu", "--small"]
    subprocess.run([*command, "--output", str(output)], cwd=gpu_check.ROOT, check=True)
    result = json.loads(output.read_text())
    assert result["failures"] == [] and len(result["benchmarks"]) > 100


# ---------------------------------------------------------------------------- profile_adapt


def test_without_a_gpu_there_is_nothing_to_profile(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert profile_adapt.main([]) == 2
    assert "no CUDA device" in capsys.readouterr().err


def test_what_is_profiled_runs(monkeypatch, capsys):
    monkeypatch.setattr(profile_adapt, "load", lambda name, dtype: tiny_model("llama", dtype))
    small = ["--dtype", "float32", "--steps", "2", "--tokens", "6", "--deltas", "2"]
    assert profile_adapt.main(["--device", "cpu", "--engine", "factored", *small]) == 0
    assert "backward" in capsys.readouterr().out
