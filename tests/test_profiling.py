"""Milliseconds and bytes by phase."""

import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch

from tests.families import tiny_model
from tests.loops import prompt_ids
from ttt_fast import TTTConfig, TTTTrainer, profiling
from ttt_fast.profiling import Phases

linux = pytest.mark.skipif(sys.platform != "linux", reason="peaks are read from /proc")


def test_phases_add_up_in_their_order():
    phases = Phases()
    for name in ("forward", "backward", "forward"):
        with phases(name):
            torch.ones(10).sum()
    first = phases.ms
    assert list(first) == ["forward", "backward"] == list(phases.peak_bytes)
    with phases("forward"):
        torch.ones(10).sum()
    assert phases.ms["forward"] > first["forward"] > 0
    assert phases.ms["backward"] == first["backward"]


def test_a_body_that_raises_is_measured_and_raises():
    phases = Phases()
    with pytest.raises(KeyError), phases("forward"):
        raise KeyError
    assert phases.ms["forward"] > 0


@linux
def test_peak_bytes_are_those_of_the_phase():
    # In a process of its own: what an earlier test freed would be used again and not show.
    program = """
import torch
from ttt_fast.profiling import Phases
phases = Phases()
with phases("large"):
    torch.ones(64 * 2**20, dtype=torch.uint8)
with phases("small"):
    torch.ones(1)
print(phases.peak_bytes["large"], phases.peak_bytes["small"])
"""
    output = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
    large, small = map(int, output.stdout.split())
    assert large >= 60 * 2**20
    assert small < 30 * 2**20


def test_a_system_without_proc(monkeypatch, tmp_path):
    monkeypatch.setattr(profiling, "_STATUS", tmp_path / "status")
    monkeypatch.setattr(profiling, "_CLEAR_REFS", tmp_path / "no folder" / "clear_refs")
    phases = Phases()
    with phases("forward"):
        torch.ones(1)
    assert phases.peak_bytes == {"forward": None}
    assert phases.ms["forward"] > 0


class FakeNvtx:
    """Ranges as Nsight would show them, each with those that it is in."""

    def __init__(self):
        self.seen, self._open = [], []

    @contextmanager
    def range(self, name):
        self._open.append(name)
        self.seen.append(" > ".join(self._open))
        try:
            yield
        finally:
            assert self._open.pop() == name


@pytest.mark.parametrize("engine", ["dense", "factored"])
def test_ranges_of_an_adaptation(monkeypatch, engine):
    nvtx = FakeNvtx()
    monkeypatch.setattr(torch.cuda, "nvtx", nvtx)
    cuda, annotate = torch.device("cuda"), profiling.annotate
    monkeypatch.setattr(profiling, "annotate", lambda name, device: annotate(name, cuda))
    trainer = TTTTrainer(tiny_model("llama"), TTTConfig(steps=2, engine=engine))
    with trainer.adapt(prompt_ids(5)):
        pass
    step = [
        "adapt > step",
        "adapt > step > forward",
        "adapt > step > backward",
        "adapt > step > update",
        "adapt > step > update > norm",
    ]
    assert nvtx.seen == ["adapt", "adapt > snapshot", *step, *step, "restore"]


def test_no_ranges_on_a_cpu(monkeypatch):
    nvtx = FakeNvtx()
    monkeypatch.setattr(torch.cuda, "nvtx", nvtx)
    with TTTTrainer(tiny_model("llama"), TTTConfig(steps=1)).adapt(prompt_ids(5)):
        pass
    assert nvtx.seen == []
