"""Small studies, run in a folder, and their lines."""

import pytest

from tests import study_cases as cases
from ttt_fast.study import Grid, study
from ttt_fast.study.results import key_of

ONE = dict(weight_decay=(0.0,), momentum=(0.9,), max_grad_norm=(1.0,), scope=("ffn",))
SGD = Grid(lr=(1e-2, 1e-1), steps=(0, 2, 3), optimizer=("sgd",), **ONE)
ONE_STEP = Grid(lr=(1e-2,), steps=(1,), optimizer=("sgd",), **ONE)
BOTH = Grid(lr=(1e-2,), steps=(0, 1, 2), **ONE)


@pytest.fixture(scope="module", name="tokenizer")
def words():
    return cases.tokenizer()


@pytest.fixture
def run(tmp_path, tokenizer):
    """Runs a study of six rows in a folder, by default always the same one."""

    def run(task="memo-trap", folder="out", grid=SGD, model=None, rows=None, **options):
        rows = cases.memo_trap_rows() if rows is None else rows
        data = cases.write_rows(tmp_path / f"{task}.jsonl", rows)
        model = cases.model() if model is None else model
        return study(task, model, tokenizer, data, tmp_path / folder, grid=grid, **options)

    return run


def lines_of(folder):
    return (folder / "results.jsonl").read_text().splitlines()


def by_key(report):
    return {key_of(line): line for line in report.lines}
