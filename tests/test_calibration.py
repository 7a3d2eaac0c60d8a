"""Measured speeds: what measurements become, and the file that keeps them."""

import dataclasses
import json

import pytest
import torch

from ttt_fast import calibration
from ttt_fast.calibration import RANKS, ROWS, default_machine, machine
from ttt_fast.engines import cost
from ttt_fast.engines.machine import is_smooth


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "ttt_fast"


def nanoseconds(speeds) -> dict:
    """What a machine of these speeds would have measured."""
    narrow = calibration._decoder_workload("narrow", speeds.dtype)
    ns = {
        "copy": 1 / speeds.copy_gb_s,
        "update": 1 / speeds.update_gb_s,
        "loss": speeds.logit_ns,
        ("adapt", "dense"): 1e6 * cost.dense_ms(narrow, speeds),
        ("adapt", "factored"): 1e6 * cost.factored_ms(narrow, speeds),
    }
    for name in calibration._DECODERS:
        work = calibration._decoder_workload(name, speeds.dtype)
        decoder = calibration._without_vocabulary(work)
        ns["decoder", name] = 1e6 * cost.frozen_ms(decoder, speeds)
    for M in ROWS:
        ns["product", M] = speeds.product(M)
        ns["weight_gradient", M] = speeds.weight_gradient(M)
        ns["gram", M] = speeds.gram(M)
    for R, slowdown in zip(RANKS, speeds.delta_slowdown, strict=True):
        ns["delta", R] = slowdown * speeds.product(20)
    return ns


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_speeds_come_back_from_what_they_would_measure(dtype):
    truth = default_machine(dtype)
    found = calibration._speeds(dtype, nanoseconds(truth))
    for field in dataclasses.fields(truth):
        if field.name != "source":
            want = getattr(truth, field.name)
            got = getattr(found, field.name)
            want = want if isinstance(want, str) else pytest.approx(want, rel=1e-5)
            assert got == want, field.name


def test_noise_still_makes_a_machine():
    ns = nanoseconds(default_machine("float32"))
    noisy = ns | {("product", 64): 100 * ns["product", 64], ("decoder", "wide"): 1.0}
    noisy |= {("adapt", "dense"): 1.0, ("delta", 128): 1e-9}
    found = calibration._speeds("float32", noisy)
    assert is_smooth(found.rows, found.product_ns)
    assert found.element_ns > 0 < found.dense_module_us


def test_units_of_work_are_those_of_the_calls():
    done = {
        "product": lambda call: call.args[1].numel(),
        "weight_gradient": lambda call: call.keywords["out"].numel(),
        "gram": lambda call: sum(x.numel() for x in call.args),
        "delta": lambda call: sum(x.numel() for x in call.args[2:4]),
    }
    cpu = torch.device("cpu")
    cases = calibration._product_cases(torch.float32, cpu)
    cases |= calibration._delta_cases(torch.float32, cpu)
    for name, (calls, units) in cases.items():
        assert units == sum(map(done[name[0]], calls)), name


# ---------------------------------------------------------------------------- the file


def save(speeds) -> None:
    calibration._save(speeds, torch.device("cpu"))


def test_without_a_file_there_are_defaults():
    assert machine(torch.float32) == default_machine("float32")
    assert machine("float64").dtype == "float64"
    assert machine("float16").product_ns == default_machine("bfloat16").product_ns
    assert "not measured" in default_machine("bfloat16", "cuda").source


def test_what_was_measured_is_used(cache):
    measured = dataclasses.replace(default_machine("float32"), source="measured", copy_gb_s=3.0)
    save(measured)
    assert machine(torch.float32) == measured
    assert machine(torch.bfloat16) == default_machine("bfloat16")
    assert [file.suffix for file in cache.iterdir()] == [".json"]  # nothing unfinished is left


def test_the_file_is_read_once_for_each_calibration(monkeypatch):
    first, second = (
        dataclasses.replace(default_machine("float32"), source="measured", copy_gb_s=speed)
        for speed in (3.0, 4.0)
    )
    reads, read_bytes = [], calibration.Path.read_bytes
    monkeypatch.setattr(
        calibration.Path, "read_bytes", lambda path: reads.append(path) or read_bytes(path)
    )
    for measured in (first, second):
        save(measured)
        assert [machine(torch.float32) for _ in range(3)] == [measured] * 3
    assert len(reads) == 2


def test_other_threads_are_another_machine():
    save(dataclasses.replace(default_machine("float32"), source="measured"))
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        assert machine("float32").source != "measured"
    finally:
        torch.set_num_threads(threads)
    assert machine("float32").source == "measured"


def rewrite(**changes) -> None:
    path = calibration.cache_file("float32")
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | changes))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: path.write_text(path.read_text()[:-20]),
        lambda path: path.write_text(""),
        lambda path: path.write_bytes(b"\xff\xfe\x00"),
        lambda path: path.write_text("[]"),
        lambda path: rewrite(format=0),
        lambda path: rewrite(key={"torch": "1.0"}),
        lambda path: rewrite(machine={}),
        lambda path: rewrite(machine=None),
        lambda path: rewrite(machine=dataclasses.asdict(default_machine("float32")) | {"new": 1}),
        lambda path: rewrite(
            machine=dataclasses.asdict(default_machine("float32")) | {"copy_gb_s": -1.0}
        ),
        lambda path: rewrite(machine=dataclasses.asdict(default_machine("float32")) | {"rows": 5}),
    ],
    ids=[
        "cut",
        "empty",
        "binary",
        "list",
        "format",
        "key",
        "none",
        "null",
        "unknown",
        "negative",
        "type",
    ],
)
def test_a_spoiled_file_is_ignored_with_a_warning(spoil):
    save(dataclasses.replace(default_machine("float32"), source="measured"))
    assert machine("float32").source == "measured"
    spoil(calibration.cache_file("float32"))
    with pytest.warns(UserWarning, match="--calibrate"):
        assert machine("float32") == default_machine("float32")


def test_no_home_is_no_reason_to_fail(monkeypatch):
    def no_home() -> None:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(calibration.Path, "home", no_home)
    assert machine("float32") == default_machine("float32")


def test_a_failed_write_leaves_the_old_file(cache, monkeypatch):
    old = dataclasses.replace(default_machine("float32"), source="old")
    save(old)

    def fail(*args: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(calibration.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        save(dataclasses.replace(old, source="new"))
    assert machine("float32") == old
    assert len(list(cache.iterdir())) == 1


@pytest.mark.slow
def test_measuring_for_real():
    state = torch.get_rng_state()
    measured = calibration.calibrate("float32", rounds=1, progress=False)
    assert torch.equal(torch.get_rng_state(), state)
    assert machine("float32") == measured
    assert measured.source.startswith("measured on ")
    # A product of 1024 rows is nowhere near 1024 times that of one: the weights are read once.
    assert measured.product(1024) < 500 * measured.product(1)
