"""A study from file to lines: the right numbers, each once, whatever comes in between."""

import copy
import json
from dataclasses import replace

import pytest
import torch

from tests import study_cases as cases
from tests import study_runs
from tests.loops import row_loss, sgd_loop
from tests.study_runs import BOTH, ONE, SGD, by_key, lines_of
from ttt_fast.study import Grid, ResultsError, Setting, StudyReport
from ttt_fast.study import runner as runner_module
from ttt_fast.study.results import read_lines

run, tokenizer = study_runs.run, study_runs.words


# ---------------------------------------------------------------------------- the numbers


@pytest.mark.parametrize("engine", ["factored", "dense"])
def test_numbers_are_those_of_the_loop(run, tokenizer, engine):
    model = cases.model(torch.float64)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report = run(model=model, grid=SGD, prompts=3, engine=engine)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    lines = by_key(report)
    assert len(lines) == 3 * 2 * 3
    rows = {row["id"]: row for row in cases.memo_trap_rows()}
    for (prompt, setting, step), line in lines.items():
        row = rows[prompt]
        ids = torch.tensor(tokenizer(row["prompt"])["input_ids"])
        other = copy.deepcopy(model)
        losses = [lambda m, ids=ids: row_loss(m, ids)] * step
        params = [param for name, param in other.named_parameters() if ".mlp." in name]
        options = dict(lr=setting.lr, momentum=0.9, max_grad_norm=1.0, params=params)
        _, norms = sgd_loop(other, losses, **options)
        other.requires_grad_(False)
        assert line["loss"] == pytest.approx(float(row_loss(other, ids)), rel=1e-10)
        if step:
            assert line["grad_norm"] == pytest.approx(norms[-1], rel=1e-10)
        distance = sum(
            float((param - before[name]).square().sum())
            for name, param in other.named_parameters()
        ) ** 0.5  # fmt: skip
        assert line["delta_norm"] == pytest.approx(distance, rel=1e-8, abs=1e-12)
        assert line["update_landed"] == pytest.approx(1.0, abs=1e-6)
        assert line["diverged_at"] is None
        expected = [option_likelihood(other, tokenizer, row, option) for option in row["classes"]]
        assert line["likelihoods"] == pytest.approx(expected, rel=1e-9)
        right = max(range(2), key=expected.__getitem__) == row["answer_index"]
        assert line["correct"]["likelihood"] == right
        answer = other.generate(ids[None], max_new_tokens=1, do_sample=False)[0, -1]
        if (word := tokenizer.decode(answer)).isalpha():
            assert line["answer"] == word


@torch.no_grad()
def option_likelihood(model, tokenizer, row, option):
    """Without padding, one row, all logits."""
    start = len(tokenizer(row["prompt"])["input_ids"])
    ids = torch.tensor([tokenizer(row["prompt"] + option)["input_ids"]])
    logs = model(ids).logits[0].log_softmax(-1)
    return sum(float(logs[i - 1, ids[0, i]]) for i in range(start, ids.shape[1]))


def test_the_second_half_is_scored_behind_the_first(run, tokenizer):
    model = cases.model(torch.float64)
    report = run("text-halves", model=model, rows=cases.text_rows(), grid=SGD)
    rows = {row["id"]: row for row in cases.text_rows()}
    for line in report.lines:
        assert line["group"] == rows[line["prompt"]]["domain"]
        if line["step"] == 0:
            ids = torch.tensor([tokenizer(rows[line["prompt"]]["prompt"])["input_ids"]])
            half = ids.shape[1] // 2
            with torch.no_grad():
                logs = model(ids).logits[0, half - 1 : -1].log_softmax(-1)
            expected = -logs.gather(1, ids[0, half:, None]).mean()
            assert line["nll"] == pytest.approx(float(expected), rel=1e-9)


@pytest.mark.parametrize(
    "option",
    [
        {"nesterov": True},
        {"dampening": 0.5},
        {"decoupled_weight_decay": True},
        {"reduction": "sum"},
        {"param_groups": [{"params": "down_proj", "lr": 1e-3}]},
    ],
)
def test_an_option_of_all_settings_is_one_of_both_engines(run, option):
    grid = Grid(lr=(1e-2, 1e-1), steps=(3,), optimizer=("sgd",),
                **ONE | dict(weight_decay=(0.1,), max_grad_norm=(None,)))  # fmt: skip

    def losses(engine, **options):
        folder = f"{engine} {len(options)}"
        options |= {"prompts": 2, "engine": engine, "model": cases.model(torch.float64)}
        lines = by_key(run(grid=grid, folder=folder, **options))
        return [lines[key]["loss"] for key in sorted(lines, key=str)]

    ours = losses("factored", **option)
    assert ours == pytest.approx(losses("dense", **option), rel=1e-9)
    assert ours != pytest.approx(losses("factored"), rel=1e-3)


def test_a_log_of_the_overwritten_bits_is_enough_without_distances(run):
    options = {"model": cases.model(torch.bfloat16), "engine": "dense", "delta_norm": False}
    logged = by_key(run(snapshot="undo", **options))
    copied = by_key(run(snapshot="device", folder="copied", **options))
    assert logged == copied
    assert {line["delta_norm"] for key, line in logged.items() if key[2]} == {None}


def test_gsm_has_answers_and_templates(run):
    report = run("gsm-symbolic", rows=cases.gsm_rows(), grid=BOTH, max_new_tokens=5)
    assert {line["cluster"] for line in report.lines} == {"0", "1"}
    assert all("answer" in line and "generation" in line["correct"] for line in report.lines)


def test_both_optimizers_in_one_folder(run):
    report = run(grid=BOTH)
    settings = {line["setting"]["optimizer"] for line in report.lines}
    assert settings == {"sgd", "adamw"}
    assert len(report.lines) == 6 * 2 * 3
    step_0 = {(line["prompt"], *line["likelihoods"]) for line in report.lines if not line["step"]}
    assert len(step_0) == 6  # the original weights are scored once


# ---------------------------------------------------------------------------- divergence


@pytest.mark.parametrize("engine", ["factored", "dense"])
def test_what_diverges_is_a_line(run, engine):
    grid = Grid(lr=(1e-3, 1e30), steps=(0, 1, 3), optimizer=("sgd",),
                **(ONE | dict(max_grad_norm=(None,), momentum=(0.0,))))  # fmt: skip
    report = run(grid=grid, engine=engine, prompts=2)
    lines = by_key(report)
    assert len(lines) == 2 * 2 * 3
    wild = [line for key, line in lines.items() if key[1].lr == 1e30]
    assert [line["diverged_at"] is None for line in wild if line["step"] == 0] == [True, True]
    for line in (line for line in wild if line["step"] == 3):
        assert line["diverged_at"] in (1, 2)
        assert line["loss"] is None
        assert line["correct"] == {"likelihood": False, "generation": False}
    assert all(line["diverged_at"] is None for key, line in lines.items() if key[1].lr == 1e-3)
    assert report.n_diverged == 2


@pytest.mark.parametrize("engine", ["factored", "dense"])
def test_what_came_before_the_divergence_is_kept(run, engine):
    """Weights that grow tenfold a step: the first states are sound, the last is not."""
    grid = Grid(lr=(0.1,), steps=tuple(range(40)), optimizer=("sgd",), weight_decay=(300.0,),
                momentum=(0.0,), max_grad_norm=(None,), scope=("ffn",))  # fmt: skip
    report = run(grid=grid, engine=engine, prompts=1)
    by_step = sorted(report.lines, key=lambda line: line["step"])
    bad = [line["step"] for line in by_step if line["diverged_at"] is not None]
    assert 3 < bad[0] <= bad[-1] == 39
    assert bad == list(range(bad[0], 40))
    for line in by_step[: bad[0]]:
        assert None not in (line["loss"], line["delta_norm"], line["grad_norm"])
    assert by_step[2]["delta_norm"] > 5 * by_step[1]["delta_norm"]


def test_a_model_that_cannot_be_scored_is_refused(run, tmp_path):
    # Eager attention in float64 gives NaN behind padding, and there are no other likelihoods.
    model = cases.model(torch.float64, attn_implementation="eager")
    with pytest.raises(ValueError, match="not finite, so nothing can be measured"):
        run(model=model)
    assert lines_of(tmp_path / "out") == []


# ---------------------------------------------------------------------------- the plan


def test_the_plan_comes_before_the_work(run, monkeypatch):
    seen = []
    monkeypatch.setattr(runner_module._Run, "all", lambda *a: seen.append("work"))
    run(grid=BOTH, show=seen.append)
    plan, work = seen
    assert work == "work"
    assert "6 prompts of 16 to 21 tokens" in plan
    assert "12 trajectories, 36 results" in plan
    assert "predicted:" in plan
    assert "adamw is not linear in the gradient" in plan


def test_prompts_that_are_too_long_are_skipped_and_counted(run):
    rows = cases.memo_trap_rows()
    rows[1]["prompt"] += " cat" * 60  # the model's context is 64
    pages = []
    report = run(rows=rows, show=pages.append)
    assert report.n_prompts == 5
    assert "row-1" not in {line["prompt"] for line in report.lines}
    assert "skipped, longer than the model's context: 1 (row-1)" in pages[0]
    with pytest.raises(ValueError, match="none of the 6 prompts can be used"):
        run(rows=[row | {"prompt": "cat " * 70} for row in rows], folder="other")


def test_what_is_side_by_side_is_kept(run, tmp_path):
    run(prompts=4, memory_budget=1)
    portions = json.loads((tmp_path / "out" / "study.json").read_text())["portions"]
    assert [portion["at_once"] for portion in portions] == [1]
    run(prompts=5)  # with all the memory that there is
    assert json.loads((tmp_path / "out" / "study.json").read_text())["portions"] == portions


def test_side_by_side_or_alone_the_numbers_are_the_same(run):
    many = by_key(run(model=cases.model(torch.float64)))
    one = by_key(run(model=cases.model(torch.float64), folder="one", memory_budget=1))
    assert many.keys() == one.keys()
    for key, line in many.items():
        assert line["loss"] == pytest.approx(one[key]["loss"], rel=1e-10)
        assert line["likelihoods"] == pytest.approx(one[key]["likelihoods"], rel=1e-9)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": 0}, "prompts=0"),
        ({"prompts": 7}, "the file has 1 to 6"),
        ({"momentum": 0.5}, "momentum is what the grid varies"),
        ({"momentun": 0.5}, "momentun is not a setting"),
        ({"engine": "fast"}, "'fast' is unknown"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"grid": Grid(scope=("nonsense",))}, "nonsense"),
        ({"task": "sudoku"}, "sudoku"),
        ({"snapshot": "undo"}, "keeps no copy"),
        ({"task": "text-halves", "chat": True}, "not a turn of a chat"),
        ({"nesterov": True, "grid": Grid(momentum=(0.0, 0.9))}, "nesterov"),
    ],
)
def test_bad_input(run, tmp_path, change, message):
    model = cases.model()
    model.register_forward_pre_hook(lambda *call: pytest.fail("it ran"))
    with pytest.raises(ValueError, match=message):
        run(model=model, **change)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lr": ()}, "at least one value"),
        ({"lr": 1e-3}, "in a list"),
        ({"lr": (0.0,)}, "> 0"),
        ({"lr": ("fast",)}, "give floats"),
        ({"lr": (None,)}, "give floats"),
        ({"steps": (0, 2.5)}, "give ints"),
        ({"steps": (float("inf"),)}, "give ints"),
        ({"steps": (0,)}, "at least 1"),
        ({"steps": (-1, 5)}, ">= 0"),
        ({"optimizer": ("adam",)}, "'adam' is unknown"),
        ({"max_grad_norm": (0.0,)}, "max_grad_norm"),
        ({"momentum": (-1.0,)}, "momentum"),
    ],
)
def test_bad_grid(change, message):
    with pytest.raises(ValueError, match=message):
        Grid(**change)


def test_the_published_sweep():
    settings = Grid().settings()
    assert len(settings) == len(set(settings)) == 3 * (7 * 3 * 2 * 2 + 7 * 3 * 2)
    assert {s.momentum for s in settings if s.optimizer == "adamw"} == {0.0}
    assert Grid(lr=(1e-3, 1e-5, 1e-3)).lr == (1e-5, 1e-3)
    assert Setting.of(settings[5].as_dict()) == settings[5]


def test_the_report_of_a_folder(run, tmp_path):
    report = run()
    assert StudyReport.read(tmp_path / "out").page() == report.page()
    (tmp_path / "out" / "results.jsonl").write_bytes(b'{"torn')
    with pytest.raises(ResultsError, match="no results yet"):
        StudyReport.read(tmp_path / "out")
    with pytest.raises(ResultsError, match="cannot be read"):
        StudyReport.read(tmp_path / "nowhere")


def test_the_report_of_two_folders(run, tmp_path):
    """SGD on more prompts beside AdamW on the first of them: compared on those that both have."""
    more = run(prompts=4)
    run(folder="adamw", grid=replace(SGD, optimizer=("adamw",)), prompts=3)
    assert not [f for f in more.findings["likelihood"] if "AdamW" in f.claim]
    both = StudyReport.read(tmp_path / "out", tmp_path / "adamw")
    found = [f for f in both.findings["likelihood"] if "AdamW" in f.claim]
    assert found and {finding.difference.n for finding in found} == {3}
    assert both.configuration["identity"]["optimizer"] == ["sgd", "adamw"]
    assert "2 studies: settings have 3 to 4 prompts" in both.page()
    assert "NOT COMPLETE" not in both.page()
    run(folder="other", seed=1, prompts=3)
    with pytest.raises(ResultsError, match="with seed=1, those of .* with 0"):
        StudyReport.read(tmp_path / "out", tmp_path / "other")
    with pytest.raises(ResultsError, match="no folder"):
        StudyReport.read()


def test_lines_of_all_files_are_read(tmp_path, run):
    run()
    path = tmp_path / "out" / "results.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:10]))
    (tmp_path / "out" / "results-1.jsonl").write_bytes(b"".join(lines[10:]) + b'{"torn')
    assert len(list(read_lines(tmp_path / "out"))) == len(lines)
