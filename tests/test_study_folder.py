"""The folder of a study: whose it is, what is missing in it, and processes that share it."""

import json

import pytest
import torch

from tests import study_cases as cases
from ttt_fast.study import Grid, ResultsError, StudyReport, study
from ttt_fast.study import shards as shards_module
from ttt_fast.study.results import read_configuration, require_shared
from ttt_fast.study.shards import own_device

GRID = Grid(lr=(1e-2, 1e-1), steps=(0, 2), optimizer=("sgd",), weight_decay=(0.0,),
            momentum=(0.9,), max_grad_norm=(None,), scope=("ffn",))  # fmt: skip


@pytest.fixture
def run(tmp_path):
    """Runs a study of a few rows, the second of which is too long for the model's context."""

    def run(n_rows=4, **options):
        rows = cases.memo_trap_rows(n_rows)
        rows[1]["prompt"] += " cat" * 60
        data = cases.write_rows(tmp_path / "rows.jsonl", rows)
        out = tmp_path / "out"
        return study("memo-trap", cases.model(), cases.tokenizer(), data, out, grid=GRID, **options)

    return run


@pytest.mark.parametrize("content", ["[1]", '{"a": 1}', '{"identity": {}, "prompts": "9"}'])
def test_a_configuration_of_something_else(run, tmp_path, content):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "study.json").write_text(content)
    with pytest.raises(ResultsError, match="no configuration of a study"):
        run()
    with pytest.raises(ResultsError, match="no configuration of a study"):
        StudyReport.read(tmp_path / "out")
    assert (tmp_path / "out" / "study.json").read_text() == content


def test_what_was_skipped_is_in_every_report(run, tmp_path):
    for _ in range(2):  # from nothing, and from what is there
        assert "skipped, longer than the model's context: 1 prompts (row-1)" in run().page()
    read = StudyReport.read(tmp_path / "out")
    assert "1 prompts (row-1)" in read.page()
    assert "4 prompts, looked at after 0, 2 steps" in read.plan
    assert "sgd on ffn: 2 settings" in read.plan
    assert "NOT COMPLETE" not in read.page()


def test_what_is_skipped_grows_with_the_prompts(run, tmp_path):
    counts = []
    for prompts in (1, 2, 4):
        run(prompts=prompts)
        counts.append(len(read_configuration(tmp_path / "out")["skipped"]["too_long"]))
    assert counts[0] <= counts[1] <= counts[2] == 1
    assert counts[0] == 0


def test_a_cut_off_study_says_so_though_all_settings_have_equally_much(run, tmp_path):
    run()
    path = tmp_path / "out" / "results.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    first = {json.loads(lines[0])["prompt"]}
    path.write_text("".join(line for line in lines if json.loads(line)["prompt"] in first))
    assert "NOT COMPLETE: settings have 1 to 1 prompts" in StudyReport.read(tmp_path / "out").page()


def test_a_process_that_does_not_see_the_folder(run, tmp_path):
    run()
    agreed = read_configuration(tmp_path / "out")
    require_shared(tmp_path / "out", agreed)
    with pytest.raises(ResultsError, match="a folder that all machines share"):
        require_shared(tmp_path / "elsewhere", agreed)
    other = agreed | {"identity": agreed["identity"] | {"seed": 1}}
    with pytest.raises(ResultsError, match="a folder that all machines share"):
        require_shared(tmp_path / "out", other)


def test_each_process_has_a_gpu_of_its_own(monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(shards_module.torch.cuda, "device_count", lambda: 2)
    assert [own_device(), own_device("cuda"), own_device("cpu")] == ["cuda", "cuda", "cpu"]
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert [own_device(), own_device("cuda"), own_device("cuda:0")] == [
        "cuda:1",
        "cuda:1",
        "cuda:0",
    ]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert own_device() == "cpu"
