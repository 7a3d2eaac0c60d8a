"""The benchmarks: each runs on tiny shapes, and what is made of their numbers is right."""

import copy
import json
import os
import runpy
import subprocess
import sys
from dataclasses import asdict, replace

import pytest
import torch
from matplotlib.image import imread

from bench import bench_latency, bench_policy, cases, conftest, peak_memory, plots, report, tables
from bench.cases import AXES, CENTRE, CORNERS, Cap, Case
from bench.compare import Ratio, compare
from bench.documents import ROOT
from bench.shapes import MODELS, parameter_count, parameter_list
from ttt_fast.engines import cost, policy

DOCUMENT = (
    "# A title\n<!-- bench:start -->\nold\n<!-- bench:end -->\n"
    "<!-- parts:start -->\nold\n<!-- parts:end -->\nan end\n"
)


# ---------------------------------------------------------------------------- all of them, small


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    """The JSON of every benchmark on tiny models, one round each."""
    output = tmp_path_factory.mktemp("bench") / "benchmark.json"
    command = [
        sys.executable, "-m", "pytest", "bench", "-q", "--benchmark-enable",
        f"--benchmark-json={output}", "-o", "python_files=bench_*.py",
        "-o", "python_functions=bench_*", "-p", "no:cacheprovider",
    ]  # fmt: skip
    environment = os.environ | {"TTT_FAST_BENCH": "small"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout.partition("-- benchmark")[0][-5000:]
    return json.loads(output.read_text())


@pytest.fixture
def result(raw, monkeypatch):
    monkeypatch.setattr(report, "AMOUNT", "small")
    return report.condense([raw])


def test_every_benchmark_runs(raw, result):
    """None rots: each file leaves numbers."""
    groups = {entry["group"].split(",")[0] for entry in result["benchmarks"]}
    named = {"clip + SGD", "clip + AdamW", "grad_norm", "copy", "snapshot + restore", "step + undo"}
    named |= {
        "checksum",
        "gram_norm",
        "delta_linear",
        "rank_update",
        "nll",
        "glu",
        "rms_norm",
        "rotary",
    }
    assert groups >= named
    assert len(result["latency"]) == 3 and len(result["peers"]) == 2
    assert result["study"] and result["policy"]["not_run"]
    kinds = [each["parts"] for each in result["parts"]]
    assert {kind: kinds.count(kind) for kind in kinds} == {
        "frozen": 4, "step": 3, "layers": 1, "not run": 1
    }  # fmt: skip


def test_the_report_of_a_run(raw, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "AMOUNT", "small")
    readme = tmp_path / "README.md"
    readme.write_text(DOCUMENT)
    file = report.write([raw], tmp_path / "results", readme, readme)
    text = readme.read_text()
    assert text.startswith("# A title\n") and text.endswith("an end\n") and "old" not in text
    assert "| one question: " in text and "Least gain beside the loop: " in text
    assert "4 prompts, T = 4096, K = 20, all (" in text  # not run
    assert text.count("| RMSNorm, gated unit, rotary |") == 2 * 3  # README's, and docs/'s
    written = json.loads(file.read_text())
    assert written["latency"][0]["peaks"]["naive"]["stated_bytes"] > 0
    again, slower = compare(written, written)
    assert not slower and "0 of " in again


def test_a_full_run_makes_tables_and_figures(raw, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "AMOUNT", "full")
    document = tmp_path / "benchmarks.md"
    document.write_text(DOCUMENT.replace("bench:", "measured:"))
    report.write([raw], tmp_path / "results", tmp_path / "README.md", document)
    text = document.read_text()
    assert "| naive loop |" in text and "not the same update" in text and "make bench-full" in text
    for name in ("benchmark-scaling.png", "benchmark-engines.png"):
        assert imread(tmp_path / name)[..., :3].std() > 0.05
        assert f"({name})" in text


def test_what_measures_nothing_is_not_written_down(raw, monkeypatch, tmp_path):
    monkeypatch.setattr(report, "AMOUNT", "small")
    with pytest.raises(ValueError, match="TTT_FAST_BENCH=small measures nothing"):
        report.write([raw], tmp_path, ROOT / "README.md", ROOT / "README.md")


# ---------------------------------------------------------------------------- cases


def test_cases_are_those_that_were_fixed_before_measuring():
    assert AXES == {
        "T": (16, 64, 256, 1024),
        "K": (1, 5, 20, 100),
        "D": (1, 4, 16, 64),
        "scope": ("all", "ffn", "attention", "query"),
        "dtype": ("float32", "bfloat16"),
    }
    assert Case() == CENTRE == Case(64, 20, 4, "all", "float32", "SmolLM2-135M")
    sweep = cases.sweep()
    assert len(sweep) == len(set(sweep)) == 1 + 3 + 3 + 3 + 3 + 1 + 4
    for case in sweep[: -len(CORNERS)]:
        assert sum(getattr(case, axis) != getattr(CENTRE, axis) for axis in AXES) <= 1
    assert len({case.name for case in CORNERS} - {""}) == 4


def test_the_cap_names_what_is_too_much():
    small = Case(16, 1, 1)
    work = cases.workload(small)
    n_operations, n_bytes = cases.operations(work), cases.memory_bytes(work)
    # Forward, backward and gradients of the blocks and the head, 2 operations each.
    weights = sum(s[0] * s[1] for s in MODELS["SmolLM2-135M"].parameter_shapes() if len(s) == 2)
    assert n_operations == 6 * 16 * weights
    # Snapshot, gradients and momentum, and a little for 16 tokens.
    assert 3 * 4 * parameter_count("SmolLM2-135M") < n_bytes < 1.1 * 12 * 134.6e6
    assert cases.over_cap(small, Cap(n_operations, n_bytes)) == ""
    assert "operations" in cases.over_cap(small, Cap(n_operations - 1, n_bytes))
    assert cases.over_cap(small, Cap(n_operations, n_bytes - 1)).endswith("GiB")
    twice = replace(work, steps=2, deltas=3)
    assert cases.operations(twice) == 6 * n_operations
    assert cases.loop_bytes(twice) == cases.loop_bytes(work)  # one prompt after the other


def test_the_centre_fits_a_full_run_and_not_a_quick_one():
    assert cases.over_cap(CENTRE, cases.CAPS["full"]) == ""
    assert "operations" in cases.over_cap(CENTRE, cases.CAPS["quick"])
    assert sum(not cases.over_cap(case, cases.CAPS["quick"]) for case in cases.sweep()) >= 8


def test_parameter_lists_are_those_of_the_models():
    counts = {name: parameter_count(name) for name in MODELS}
    known = {
        "SmolLM2-135M": 134_515_008,
        "Qwen2.5-0.5B": 494_032_768,
        "Llama-3.1-8B": 8_030_261_248,
    }
    known |= {"Qwen2.5-1.5B": 1_543_714_304, "Qwen2.5-3B": 3_085_938_688}
    known |= {"Qwen2.5-7B": 7_615_616_512, "Llama-3.2-1B": 1_235_814_400}
    known |= {"Llama-3.2-3B": 3_212_749_824}
    assert known == {name: counts[name] for name in known}
    assert sum(p.numel() for p in parameter_list("Llama-3.1-8B", device="meta")) == 8_030_261_248


@pytest.mark.parametrize("name", ["Qwen2.5-0.5B", "Llama-3.2-3B"])
def test_models_are_built_in_these_shapes(name):
    model = cases.meta_model(name, torch.bfloat16)
    assert [tuple(p.shape) for p in model.parameters()] == MODELS[name].parameter_shapes()
    assert model.dtype == torch.bfloat16


# ---------------------------------------------------------------------------- what is recorded


def test_times_are_those_of_a_prompt_and_a_step():
    rounds = [
        bench_latency.phases(start=0.0, adapted=a, generated=a + 1, end=a + 1.5, written=7)
        for a in (8.0, 10.0, 12.0)
    ]
    row = bench_latency.summary(rounds, Case(K=5), prompts=4)
    assert row["prompt_ms"] == {"median": 10500 / 4, "min": 8500 / 4, "max": 12500 / 4}
    assert row["step_ms"]["median"] == 10000 / 20
    assert row["first_token_ms"]["median"] == 250 and row["restore_ms"]["median"] == 500
    assert row["written_bytes"] == 7


def test_other_losses_than_the_loops_are_an_error():
    losses = {"naive": {0: torch.tensor([3.0, 2.0])}, "factored": {0: torch.tensor([3.0, 2.1])}}
    with pytest.raises(AssertionError, match="factored"):
        bench_latency.require_same_losses(losses, CENTRE)
    bench_latency.require_same_losses(losses, replace(CENTRE, dtype="bfloat16"))


def test_an_engine_over_the_cap_of_memory_is_left_out():
    sizes = {"dense": 100, "factored": 101}
    choice = policy.Choice("dense", "", dict.fromkeys(sizes, 1.0), sizes)
    assert cases.fitting(choice, Cap(1.0, 100)) == ["dense"]
    row = bench_policy.Row(CENTRE, choice, {"dense": 5.0})
    assert row.auto_slowdown is None
    assert replace(row, measured_ms={"dense": 5.0, "factored": 4.0}).auto_slowdown == 1.25


def test_written_bytes_are_counted():
    model = torch.nn.Linear(3, 2, bias=False)
    with torch.no_grad():
        assert bench_latency.bytes_written(model, lambda: None) == 0
        assert bench_latency.bytes_written(model, lambda: model.weight.add_(1)) == 24


def test_rates_are_shares_of_what_the_machine_does():
    side = conftest.Side(lambda: None, moved=50, operations=30.0)
    found = conftest.rates(side, seconds=2.0, copy_rate=100.0, gemm_rate=60.0)
    assert found["gb_per_s"] == 25e-9 and found["share_of_copy_bandwidth"] == 0.25
    assert found["gflop_per_s"] == 15e-9 and found["share_of_gemm_rate"] == 0.25
    assert conftest.rates(conftest.Side(lambda: None), 2.0, 100.0, 60.0) == {}


def test_sides_take_turns():
    order = []
    sides = {name: (lambda name=name: order.append(name),) for name in "ab"}
    seconds = conftest.interleave(sides, 3)
    assert order == list("ab" * 4) and [len(v) for v in seconds.values()] == [3, 3]


def test_only_a_full_run_compiles(monkeypatch):
    assert conftest.compiled(lambda: None) == {}
    monkeypatch.setattr(conftest, "AMOUNT", "full")
    (side,) = conftest.compiled(lambda: torch.ones(3) + 1, 12, backend="eager").values()
    assert side[0]().tolist() == [2, 2, 2] and side[1] == 12


def test_peaks_are_asked_of_another_process(monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(peak_memory, "measure", lambda *args: asked.append(args) or {"x": 1})
    peak_memory.main("factored", json.dumps(asdict(CORNERS[0])))
    assert asked == [("factored", CORNERS[0])] and json.loads(capsys.readouterr().out) == {"x": 1}


def test_unknown_amounts_are_refused(monkeypatch):
    monkeypatch.setenv("TTT_FAST_BENCH", "much")
    with pytest.raises(ValueError, match="'much' is unknown; use one of quick, full, small"):
        runpy.run_path(str(ROOT / "bench" / "shapes.py"))


# ---------------------------------------------------------------------------- two results


def times(low, typical, high):
    return {"min_ms": low, "median_ms": typical, "max_ms": high}


def result_of(ours, baseline=(90, 100, 110)):
    shared = {"group": "clip + SGD", "baseline": "torch"}
    sides = {"torch": times(*baseline), "ours": times(*ours)}
    return {
        "machine": "a CPU", "commit": "abc", "datetime": "2026-11-22T10:00",
        "benchmarks": [shared | {"side": name} | found for name, found in sides.items()],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("ours", "baseline", "slower"),
    [
        ((45, 50, 55), (90, 100, 110), False),  # the same
        ((55, 60, 65), (90, 100, 110), False),  # within the noise
        ((95, 100, 105), (90, 100, 110), True),  # half as fast
        ((90, 100, 110), (180, 200, 220), False),  # the machine was in a slow hour
        ((20, 22, 25), (90, 100, 110), False),  # faster
    ],
    ids=["same", "noise", "slower", "slow hour", "faster"],
)
def test_a_regression_is_beyond_the_noise(ours, baseline, slower):
    text, found = compare(result_of((45, 50, 55)), result_of(ours, baseline))
    assert bool(found) is slower
    assert ("SLOWER" in text) is slower and ("faster\n" in text) is (ours[0] == 20)


def test_the_range_of_a_ratio():
    ratio = Ratio.of({"median": 100, "min": 90, "max": 110}, {"median": 50, "min": 45, "max": 60})
    assert (ratio.typical, ratio.low, ratio.high) == (2.0, 1.5, 110 / 45)


def test_latency_and_peers_are_compared_too(result):
    worse = copy.deepcopy(result)
    (engine,) = worse["latency"][0]["sides"].keys() - {"naive", "best stock"}
    restore = worse["latency"][0]["sides"][engine]["restore_ms"]
    restore.update({name: 1e3 * value for name, value in restore.items()})
    row = worse["peers"][0]["rows"]["ours, dense"]
    row.update({name: 1e3 * row[name] for name in ("median_ms", "min_ms", "max_ms")})
    _, slower = compare(result, worse)
    assert [name.split(", ")[-1] for name in slower] == ["restore", "dense"]


def test_comparing_from_the_command_line(tmp_path, capsys):
    paths = [tmp_path / "old.json", tmp_path / "new.json"]
    for path, ours in zip(paths, [(45, 50, 55), (95, 100, 105)], strict=True):
        path.write_text(json.dumps(result_of(ours)))
    assert report.main(["--compare", *map(str, paths)]) == 1
    assert "1 of 1 became slower" in capsys.readouterr().out
    assert report.main(["--compare", str(paths[0]), str(paths[0])]) == 0


def test_results_without_a_common_benchmark_are_refused():
    other = result_of((45, 50, 55))
    other["benchmarks"] = [entry | {"group": "copy"} for entry in other["benchmarks"]]
    with pytest.raises(ValueError, match="no benchmark is in both files"):
        compare(result_of((45, 50, 55)), other)


# ---------------------------------------------------------------------------- tables and plots


def test_a_loss_is_said_where_there_is_one():
    """Where we are slower the table says so."""
    unit = {"median": 100.0, "min": 90.0, "max": 110.0}
    side = {name: unit for name in ("prompt_ms", "step_ms", "first_token_ms", "restore_ms")}
    slow = {name: {n: 2 * v for n, v in unit.items()} for name in side}
    case = {
        "what": "a document", "auto": "factored",
        "sides": {
            "naive": side, "best stock": side,
            "dense": {**slow, "written_bytes": 1 << 20},
        },
    }  # fmt: skip
    fast = {name: {n: v / 4 for n, v in unit.items()} for name in side} | {"written_bytes": 0}
    other = {"what": "a question", "auto": "factored", "sides": {"naive": side, "factored": fast}}
    text = tables.adaptations([other, case])
    assert "| a question (factored) |" in text and "| 4.00x |" in text
    assert "| a document (dense; auto takes factored) |" in text and "| 0.50x |" in text
    assert "Least gain beside the loop: 0.50x, a document, dense engine." in text
    assert "1 MiB written" in text


def test_predicted_times_are_drawn_beside_measured_ones():
    """Lines through what was predicted, marks where it was measured, both axes logarithmic."""
    points = [
        plots.Point(
            replace(plots.MIDDLE, T=T),
            predicted_ms={"dense": T, "factored": 2 * T},
            measured_ms={"dense": T + 1, "factored": 3} if T > 8 else {"factored": 3},
        )
        for T in (8, 32, 128)
    ]
    panel = plots.scaling(points, "a machine").axes[0]
    assert panel.get_xscale() == panel.get_yscale() == "log"
    lines = {line.get_label(): list(line.get_ydata()) for line in panel.get_lines()}
    assert lines["dense, predicted"] == [8, 32, 128]
    assert lines["dense, measured"] == [None, 33, 129]
    assert lines["factored, measured"] == [3, 3, 3]


def test_the_map_is_the_ratio_of_the_predictions():
    work = cases.workload(plots.MIDDLE)
    machine = plots.Machine(**asdict(cases_machine()))
    here = replace(work, tokens=64, steps=7)
    expected = cost.factored_ms(here, machine) / cost.dense_ms(here, machine)
    assert plots._advantage(work, machine, 64, 7) == expected


def cases_machine():
    from ttt_fast.calibration import default_machine

    return default_machine("float32")
