"""What doctor reports about the machine's speeds and the engine that would run."""

import json
import re

import pytest
import torch

from families import tiny_model
from ttt_fast import TTTConfig, calibration, doctor


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def test_the_machine_alone():
    report = doctor.report(TTTConfig())
    assert set(report) == {"system", "machine"}
    assert set(report["machine"]) == {"float32", "bfloat16"}
    assert "defaults for a" in doctor.page(report)
    assert json.loads(json.dumps(report))["system"] == report["system"]
    # What setup.py says it built is what is there.
    built = report["system"]["extension"]
    assert built in doctor.page(report)
    with_cuda = hasattr(torch.ops.ttt_fast_cuda, "sgd_")
    assert re.match(
        r"with CUDA kernels for sm_\d+" if with_cuda else "without CUDA kernels: ", built
    )


def test_the_engine_and_its_memory(folder):
    config = TTTConfig(steps=5, engine="factored")
    report = doctor.report(config, model=folder, tokens=8, deltas=3)
    assert report["engine"]["engine"] == report["memory"]["engine"] == "factored"
    assert set(report["engine"]["predicted_ms"]) == {"factored", "dense"}
    alone = doctor.report(config, model=folder, tokens=8)["memory"]["bytes"]
    several = report["memory"]["bytes"]
    assert set(several) == {"factors", "activations", "logits"}
    assert several == {use: 3 * number for use, number in alone.items()}
    page = doctor.page(report)
    assert "factored engine for 5 steps on 3 prompts" in page
    assert report["engine"]["reason"] in page
    for part in ("memory", "engine"):
        assert json.loads(json.dumps(report))[part] == report[part]


def test_experts_are_counted_too(tmp_path):
    """Which tokens they get depends on values; how many does not."""
    tiny_model("mixtral").save_pretrained(tmp_path)
    report = doctor.report(TTTConfig(), model=str(tmp_path), tokens=8)
    assert report["memory"]["bytes"]["activations"] > 0
    assert "unknown" not in doctor.page(report)


def test_the_dense_engine_and_its_reason(folder):
    report = doctor.report(TTTConfig(optimizer="adamw"), model=folder, tokens=8)
    assert report["memory"]["engine"] == "dense"
    assert "adamw" in doctor.page(report)
    assert set(report["memory"]["bytes"]) >= {"snapshot", "gradients", "optimizer", "activations"}


def test_an_engine_that_cannot_do_it(folder):
    with pytest.raises(ValueError, match="optimizer=.adamw. asks for something that only"):
        doctor.report(TTTConfig(optimizer="adamw", engine="factored"), model=folder)


@pytest.mark.parametrize(
    ("dtype", "measured"), [("auto", ["float32", "bfloat16"]), ("float32", ["float32"])]
)
def test_calibrate_measures_what_is_used(monkeypatch, dtype, measured):
    asked = []
    monkeypatch.setattr(calibration, "calibrate", lambda name, device: asked.append(name))
    doctor.report(TTTConfig(), dtype=dtype, calibrate=True)
    assert asked == measured
    doctor.report(TTTConfig(), dtype=dtype)
    assert asked == measured
