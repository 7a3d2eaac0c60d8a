"""``ttt-fast study`` on a tiny model in a folder, alone and on two processes."""

import json
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from tests import study_cases as cases
from ttt_fast import TTTConfig, cli
from ttt_fast.arguments import build_parser, study_settings
from ttt_fast.config import SPAN_OPTIONS
from ttt_fast.study import Grid
from ttt_fast.study.results import Results, key_of, read_lines

ROOT = Path(__file__).parents[1]
AXES = ("--lr", 1e-2, 1e-3, "--steps", 0, 2, "--optimizer", "sgd", "adamw", "--weight-decay", 0,
        "--momentum", 0.9, "--max-grad-norm", "none", "--scope", "ffn")  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    cases.tokenizer().save_pretrained(path)
    cases.model().save_pretrained(path)
    return path


@pytest.fixture
def arguments(folder, tmp_path):
    """Of a small study."""
    data = cases.write_rows(tmp_path / "rows.jsonl", cases.memo_trap_rows(4))
    out = tmp_path / "out"
    return ["study", "memo-trap", "--model", folder, "--data", data, "--out", out, *AXES]


def run(capsys, arguments):
    try:
        code = cli.main([str(argument) for argument in arguments])
    except SystemExit as stop:  # argparse
        code = stop.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_a_study(arguments, tmp_path, capsys):
    code, out, err = run(capsys, arguments)
    assert code == 0, err
    assert "4 prompts of 16 to" in err  # the plan
    assert "32/32" in err  # the bar, in steps
    assert "sgd lr 0.01, decay 0, momentum 0.9, no clip, ffn" in out
    assert str(tmp_path / "out" / "report.html") in out
    lines = list(read_lines(tmp_path / "out"))
    assert len({key_of(line) for line in lines}) == len(lines) == 4 * 4 * 2
    before = (tmp_path / "out" / "results.jsonl").read_bytes()
    assert run(capsys, arguments)[0] == 0
    assert (tmp_path / "out" / "results.jsonl").read_bytes() == before


def test_the_report_of_what_is_there(arguments, tmp_path, capsys):
    assert run(capsys, arguments)[0] == 0
    page = (tmp_path / "out" / "table.csv").read_bytes()
    code, out, err = run(capsys, ["study-report", tmp_path / "out", "--out", tmp_path / "page"])
    assert code == 0, err
    assert "sgd lr 0.01, decay 0, momentum 0.9, no clip, ffn" in out
    assert (tmp_path / "page" / "table.csv").read_bytes() == page
    code, _, err = run(capsys, ["study-report", tmp_path])
    assert code == 2
    assert "study.json: cannot be read" in err


def test_the_plan_alone(arguments, tmp_path, capsys):
    code, out, err = run(capsys, [*arguments, "--plan"])
    assert code == 0
    assert "predicted:" in err
    assert out == ""
    assert not (tmp_path / "out").exists()


def test_ctrl_c_says_how_to_go_on(arguments, tmp_path, capsys, monkeypatch):
    def interrupted(self, lines):
        raise KeyboardInterrupt

    monkeypatch.setattr(Results, "append", interrupted)
    code, out, err = run(capsys, arguments)
    assert code == 130
    assert out == ""
    assert f"the same command goes on from what is in {tmp_path / 'out'}" in err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--prompts", 9], "the file has 1 to 4"),
        (["--sha256", "123"], "123 was asked for"),
        (["--data", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--optimizer", "adam"], "'adam' is unknown"),
        (["--lr", "fast"], "invalid float value"),
        (["--steps", 0], "at least 1"),
        (["--scope", "nonsense"], "nonsense"),
        (["--model", "no/such/folder"], "no/such/folder"),
    ],
)
def test_bad_input_is_one_line(arguments, tmp_path, capsys, change, message):
    code, out, err = run(capsys, [*arguments, *change])
    assert code == 2
    last = err.strip().splitlines()[-1]
    assert message in last
    assert "Traceback" not in err
    assert out == ""
    assert not (tmp_path / "out").exists()


def test_unknown_task_and_another_study(arguments, tmp_path, capsys):
    assert "use one of memo-trap" in run(capsys, [arguments[0], "sudoku", *arguments[2:]])[2]
    assert run(capsys, arguments)[0] == 0
    code, _, err = run(capsys, [*arguments, "--steps", 0, 3])
    assert code == 2
    assert "made with steps=[0, 2], and now it is [0, 3]" in err


def test_every_axis_and_setting_is_an_option():
    args = build_parser().parse_args(
        "study t --model m --data f --lr 1 2 --steps 0 3 --optimizer sgd --weight-decay 0 .1"
        " --momentum .5 --max-grad-norm none 1 --scope ffn all --layers=-2: --nesterov --seed 4"
        " --max-batch-tokens 99".split()
    )
    axes, others = study_settings(args)
    assert Grid(**axes) == Grid(lr=(1, 2), steps=(0, 3), optimizer=("sgd",), momentum=(0.5,),
                                weight_decay=(0, 0.1), max_grad_norm=(None, 1.0),
                                scope=("ffn", "all"))  # fmt: skip
    assert others == {"layers": "-2:", "nesterov": True, "max_batch_tokens": 99}


def test_help_names_every_setting(capsys):
    text = run(capsys, ["study", "--help"])[1]
    for name in {f.name for f in fields(TTTConfig)} - {
        "param_groups",
        "check_every",
        *SPAN_OPTIONS,
    }:
        assert "--" + name.replace("_", "-") in text, name


def test_lm_eval_without_the_harness(monkeypatch, capsys):
    monkeypatch.setattr(cli, "find_spec", lambda name: None)
    assert cli.main(["lm-eval", "run", "--model", "ttt_fast"]) == 2
    assert "pip install 'ttt-fast[lm-eval]'" in capsys.readouterr().err


# The command line, but for the second process: it is lost behind the first lines that it writes.
LOST = """
import os, signal, sys
from ttt_fast import cli
from ttt_fast.study.results import Results

def append(self, lines, append=Results.append):
    append(self, lines)
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)

Results.append = append
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_two_processes_share_a_study_and_one_is_lost(arguments, tmp_path, capsys):
    assert run(capsys, arguments)[0] == 0
    alone = {key_of(line): line for line in read_lines(tmp_path / "out")}
    shared = [tmp_path / "shared" if a == tmp_path / "out" else a for a in arguments]
    (tmp_path / "lost.py").write_text(LOST)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}

    def start(*program):
        command = [*launcher, "--nproc-per-node", "2", *program, *shared]
        return subprocess.run(
            list(map(str, command)), cwd=ROOT, env=environment, capture_output=True, text=True,
            check=False,
        )  # fmt: skip

    assert start(tmp_path / "lost.py").returncode != 0
    left = list(read_lines(tmp_path / "shared"))
    assert 0 < len(left) < len(alone)
    done = start("-m", "ttt_fast")  # the same command finishes its share
    assert done.returncode == 0, done.stderr
    files = sorted(path.name for path in (tmp_path / "shared").glob("results*"))
    assert files == ["results-0.jsonl", "results-1.jsonl"]
    lines = list(read_lines(tmp_path / "shared"))
    assert len(lines) == len(alone)  # none twice
    for line in lines:
        assert json.dumps(line) == json.dumps(alone[key_of(line)])
    assert (tmp_path / "shared" / "report.html").exists()
