"""Studies that are killed, damaged, repeated or run twice: nothing is lost, nothing repeated."""

import gc
import weakref

import pytest
import torch

from tests import study_cases as cases
from tests import study_runs
from tests.study_runs import BOTH, ONE, ONE_STEP, SGD, by_key, lines_of
from ttt_fast import TTTConfig
from ttt_fast.engines.dense import DenseEngine
from ttt_fast.engines.factored import FactoredEngine
from ttt_fast.study import Grid, ResultsError
from ttt_fast.study import results as results_module
from ttt_fast.study.results import Results
from ttt_fast.study.trajectories import SideBySide, factored_states

run, tokenizer = study_runs.run, study_runs.words


class Killed(BaseException):
    """As Ctrl-C or a lost process."""


def killed_after(monkeypatch, n):
    """Let the process die behind the n-th time that lines were written."""
    append, count = Results.append, [0]

    def dying(self, lines):
        append(self, lines)
        count[0] += 1
        if count[0] == n:
            raise Killed

    monkeypatch.setattr(Results, "append", dying)


def test_the_same_seed_gives_the_same_lines(run, tmp_path):
    run(folder="one", grid=BOTH)
    run(folder="two", grid=BOTH)
    assert lines_of(tmp_path / "one") == lines_of(tmp_path / "two")
    drawn = {}
    for seed in range(4):
        report = run(folder=f"seed {seed}", grid=ONE_STEP, seed=seed, prompts=3)
        drawn[seed] = {line["prompt"] for line in report.lines}
        assert len(drawn[seed]) == 3
    assert len(set(map(frozenset, drawn.values()))) > 1


@pytest.mark.parametrize("n", [1, 4, 7])
def test_a_killed_run_goes_on_with_the_same_digits(run, tmp_path, monkeypatch, n):
    run(folder="whole", grid=BOTH)
    with monkeypatch.context() as patch:
        killed_after(patch, n)
        with pytest.raises(Killed):
            run(grid=BOTH)
    begun = lines_of(tmp_path / "out")
    assert 0 < len(begun) < len(lines_of(tmp_path / "whole"))
    report = run(grid=BOTH)
    assert lines_of(tmp_path / "out") == lines_of(tmp_path / "whole")
    assert len(by_key(report)) == len(lines_of(tmp_path / "out"))  # none twice


def test_a_torn_line_is_made_again(run, tmp_path):
    run()
    path = tmp_path / "out" / "results.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-30])
    run()
    assert path.read_bytes() == whole


def test_a_complete_study_computes_nothing(run, monkeypatch):
    run()
    model = cases.model()
    model.register_forward_pre_hook(lambda *call: pytest.fail("it ran"))
    assert len(run(model=model).lines) == 6 * 2 * 3


def test_more_prompts_are_added(run, tmp_path):
    run(prompts=2)
    first = lines_of(tmp_path / "out")
    report = run(prompts=5)
    assert lines_of(tmp_path / "out")[: len(first)] == first
    assert report.n_prompts == 5
    assert len(by_key(report)) == len(lines_of(tmp_path / "out")) == 5 * 2 * 3
    with pytest.raises(ResultsError, match="a study of 5 prompts, and now it is to be of 3"):
        run(prompts=3)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"grid": Grid(lr=(1e-2,), steps=(0, 2, 3), optimizer=("sgd",), **ONE)}, "lr"),
        ({"seed": 1}, "seed"),
        ({"max_new_tokens": 3}, "max_new_tokens"),
        ({"layers": "1:"}, "options"),
        ({"rows": cases.memo_trap_rows(7)}, "data"),
        ({"model": cases.model(torch.float64)}, "weights"),
    ],
)
def test_another_study_in_the_same_folder_is_refused(run, tmp_path, change, name):
    run()
    before = lines_of(tmp_path / "out")
    with pytest.raises(ResultsError, match=f"made with {name}="):
        run(**change)
    assert lines_of(tmp_path / "out") == before


def test_results_without_their_configuration_are_refused(run, tmp_path):
    run()
    (tmp_path / "out" / "study.json").unlink()
    with pytest.raises(ResultsError, match=r"results without a study\.json"):
        run()


def test_a_full_disk_loses_nothing(run, tmp_path, monkeypatch):
    run(folder="whole")
    room = [6000]

    def write(file, data):
        part = data[: room[0]]
        results_module.os.write(file, part)
        room[0] -= len(part)
        if len(part) < len(data):
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(results_module, "_write", write)
        with pytest.raises(ResultsError, match="No space left on device.*are safe"):
            run()
    content = (tmp_path / "out" / "results.jsonl").read_bytes()
    assert 0 < len(content) <= 6000
    assert content.endswith(b"\n")
    run()
    assert lines_of(tmp_path / "out") == lines_of(tmp_path / "whole")


def test_two_processes_do_not_write_to_one_file(run, tmp_path):
    (tmp_path / "out").mkdir()
    with Results(tmp_path / "out"):
        with pytest.raises(ResultsError, match="another process is writing"):
            Results(tmp_path / "out")
    Results(tmp_path / "out").close()


def test_a_damaged_line_is_named(run, tmp_path):
    run()
    path = tmp_path / "out" / "results.jsonl"
    lines = path.read_bytes().split(b"\n")
    lines[2] = b'{"prompt": "x"}'
    path.write_bytes(b"\n".join(lines))
    with pytest.raises(ResultsError, match="line 3 is damaged"):
        run()


def test_the_weights_come_back_when_it_is_killed(run, monkeypatch):
    model = cases.model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    killed_after(monkeypatch, 9)  # in a dense trajectory
    with pytest.raises(Killed):
        run(model=model, grid=BOTH, engine="dense")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    monkeypatch.undo()
    run(model=model, grid=BOTH, engine="dense")  # nobody holds it


@pytest.mark.parametrize("engine", ["auto", "dense"])
def test_one_engine_at_a_time(run, monkeypatch, engine):
    """Its buffers go before the next one's come, not when Python next looks for cycles."""
    made, most = [], 0

    for kind in (DenseEngine, FactoredEngine):

        def remember(self, *args, begin=kind.__init__):
            nonlocal most
            made.append(weakref.ref(self))
            begin(self, *args)
            most = max(most, sum(each() is not None for each in made))

        monkeypatch.setattr(kind, "__init__", remember)
    gc.disable()
    try:
        run(grid=Grid(lr=(1e-2, 1e30), steps=(0, 2), **ONE), engine=engine, prompts=2)
        assert (len(made) >= 3, most) == (True, 1)
        assert not any(each() for each in made)
    finally:
        gc.enable()


def test_deltas_that_take_turns_are_counted_once():
    """They go in parts where they do not fit together; the bar is of all."""
    counted = []
    config = TTTConfig(steps=3, lr=1e-3, engine="factored", check_every=1, max_batch_tokens=8)
    trainer = SideBySide(cases.model(), config)
    prompts = [torch.arange(1, 9)] * 4
    settings = SGD.settings()[:1] * 4
    for _ in factored_states(trainer, prompts, settings, (0, 3), counted.append):
        pass
    assert counted == [1] * 12
