"""Texts that are scored segment by segment and trained on, against the loop written by hand."""

import copy
import math

import pytest
import torch
from torch.nn import functional as F

from tests import study_cases as cases
from tests.loops import sgd_loop, weights
from ttt_fast.study import Grid, study
from ttt_fast.study.results import Results, key_of

SIZE = 4
GRID = Grid(lr=(1e-2, 1e-1), steps=(0, 1, 3), optimizer=("sgd",), weight_decay=(0.1,),
            momentum=(0.9,), max_grad_norm=(1.0,), scope=("ffn",))  # fmt: skip


def texts():
    """Of 19, 16, 13 and 10 tokens: 5 to 3 segments, the last of them of 3, 4, 1 and 2."""
    rows = cases.text_rows()
    return [
        row | {"prompt": " ".join(row["prompt"].split()[: 19 - 3 * n])}
        for n, row in enumerate(rows)
    ]


@pytest.fixture(scope="module")
def tokenizer():
    return cases.tokenizer()


@pytest.fixture
def run(tmp_path, tokenizer):
    """Runs a study of four texts in a folder."""

    def run(folder="out", grid=GRID, model=None, rows=None, size=SIZE, **options):
        rows = texts() if rows is None else rows
        data = cases.write_rows(tmp_path / "texts.jsonl", rows)
        model = cases.model(torch.float64) if model is None else model
        options |= {"grid": grid, "segment_tokens": size}
        return study("text-stream", model, tokenizer, data, tmp_path / folder, **options)

    return run


def by_key(report):
    return {key_of(line): line for line in report.lines}


def segment_loss(ids, first):
    """Mean NLL of the tokens from ``first`` on; none of the first token."""
    first = max(1, first)

    def loss(model):
        logits = model(input_ids=ids[None], use_cache=False).logits[0, first - 1 : -1]
        return F.cross_entropy(logits, ids[first:])

    return loss


def loop(model, ids, k, setting):
    """Score a segment, take k steps on it, go on.

    Returns:
        scores of the segments, the loss of the whole text at the end, the last gradient norm, and
        how far the weights are from where they began.
    """
    other = copy.deepcopy(model)
    named = [(name, p) for name, p in other.named_parameters() if ".mlp." in name]
    starts = range(0, ids.numel(), SIZE)
    losses = [segment_loss(ids[: s + SIZE], s) for s in starts for _ in range(k)]
    values, norms = sgd_loop(
        other, losses, lr=setting.lr, momentum=0.9, weight_decay=0.1, max_grad_norm=1.0,
        params=[p for _, p in named],
    )  # fmt: skip
    with torch.no_grad():
        end = float(segment_loss(ids, 0)(other))
        moved = sum(float((p - model.get_parameter(name)).square().sum()) for name, p in named)
    return values[::k], end, norms[-1], moved**0.5


@pytest.mark.parametrize("engine", ["factored", "dense"])
def test_numbers_are_those_of_the_loop(run, tokenizer, engine):
    model = cases.model(torch.float64)
    before = weights(model)
    lines = by_key(run(model=model, engine=engine))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    rows = {row["id"]: row for row in texts()}
    assert len(lines) == len(rows) * 2 * 3
    lengths = set()
    for (text, setting, step), line in lines.items():
        ids = torch.tensor(tokenizer(rows[text]["prompt"])["input_ids"])
        lengths.add(ids.numel())
        counts = [min(SIZE, ids.numel() - first) for first in range(0, ids.numel(), SIZE)]
        counts[0] -= 1
        if step:
            scores, end, norm, moved = loop(model, ids, step, setting)
            assert line["segments"] == pytest.approx(scores, rel=1e-10)
            assert line["loss"] == pytest.approx(end, rel=1e-10)
            assert line["grad_norm"] == pytest.approx(norm, rel=1e-9)
            assert line["delta_norm"] == pytest.approx(moved, rel=1e-8)
            total = math.fsum(s * n for s, n in zip(scores, counts, strict=True))
            assert line["nll"] == pytest.approx(total / sum(counts), rel=1e-10)
        else:
            with torch.no_grad():
                whole = float(segment_loss(ids, 0)(model))
            assert (line["nll"], line["loss"]) == pytest.approx((whole, whole), rel=1e-10)
            assert len(line["segments"]) == len(counts)
        assert line["group"] == rows[text]["domain"]
        assert line["update_landed"] == pytest.approx(1.0, abs=1e-6)
    assert lengths == {19, 16, 13, 10}  # side by side, and one after the other done


def test_what_comes_behind_changes_no_score(run):
    """A segment is scored before the weights have seen it, or anything behind it."""
    rows = cases.text_rows(1)
    words = rows[0]["prompt"].split()
    assert len(words) > 3 * SIZE
    changed = [rows[0] | {"prompt": " ".join([*words[: 2 * SIZE], *["pears"] * SIZE])}]
    first = by_key(run(rows=rows))
    other = by_key(run(rows=changed, folder="other"))
    for key, line in first.items():
        assert line["segments"][:2] == pytest.approx(other[key]["segments"][:2], rel=1e-12)
        assert line["segments"][2] != pytest.approx(other[key]["segments"][2], rel=1e-3)


def test_a_sum_over_tokens_is_scored_a_token(run):
    grid = Grid(lr=(1e-3,), steps=(0, 1), optimizer=("sgd",), weight_decay=(0.0,),
                momentum=(0.0,), max_grad_norm=(1.0,), scope=("ffn",))  # fmt: skip
    mean, total = (
        by_key(run(folder=reduction, grid=grid, reduction=reduction))
        for reduction in ("mean", "sum")
    )
    for key, line in total.items():
        # The first segment is scored by the original weights.
        assert line["segments"][0] == pytest.approx(mean[key]["segments"][0], rel=1e-10)
        assert line["nll"] == pytest.approx(mean[key]["nll"], rel=0.05)


@pytest.mark.parametrize("engine", ["factored", "dense"])
def test_what_diverges_is_a_line(run, engine):
    grid = Grid(lr=(1e-3, 1e30), steps=(0, 1), optimizer=("sgd",), weight_decay=(0.0,),
                momentum=(0.0,), max_grad_norm=(None,), scope=("ffn",))  # fmt: skip
    report = run(grid=grid, engine=engine, prompts=2, model=cases.model())
    lines = by_key(report)
    assert len(lines) == 2 * 2 * 2
    for (_, setting, step), line in lines.items():
        wild = setting.lr == 1e30 and step == 1
        assert (line["diverged_at"] == 2) is wild
        assert (line["nll"] is None) is wild
    assert report.n_diverged == 2


class Killed(BaseException):
    """As Ctrl-C or a lost process."""


@pytest.mark.parametrize("n", [1, 2, 3])
def test_a_killed_run_goes_on_with_the_same_digits(run, tmp_path, monkeypatch, n):
    report = run(folder="whole", memory_budget=1)  # one by one: several units
    count = [0]

    def dying(self, lines, append=Results.append):
        append(self, lines)
        count[0] += 1
        if count[0] == n:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Results, "append", dying)
        with pytest.raises(Killed):
            run(memory_budget=1)
    again = run(memory_budget=1)
    ours, whole = (tmp_path / name / "results.jsonl" for name in ("out", "whole"))
    assert ours.read_bytes() == whole.read_bytes()
    assert again.lines == report.lines


def test_adamw_streams_too(run):
    grid = Grid(lr=(1e-2,), steps=(0, 1), optimizer=("adamw",), weight_decay=(0.0,),
                momentum=(0.0,), max_grad_norm=(None,), scope=("ffn",))  # fmt: skip
    lines = by_key(run(grid=grid))
    assert all(line["nll"] is not None for line in lines.values())
    moved = [line for (_, _, step), line in lines.items() if step]
    assert all(line["delta_norm"] > 0 for line in moved)


def test_the_plan_counts_segments_and_short_texts(run):
    rows = [*texts(), {"id": "short", "text": "the cat sat on"}]
    pages = []
    report = run(rows=rows, show=pages.append, only_plan=True)
    assert "4 prompts of 10 to 19 tokens" in pages[0]
    assert "skipped, shorter than 5 tokens: 1 (short)" in pages[0]
    assert not report.lines


def test_its_own_steps_and_segments_by_default(run, tmp_path):
    rows = [cases.text_rows(1)[0] | {"prompt": "the cat sat on the mat " * 12}]
    model = cases.model(max_position_embeddings=128)
    report = run(rows=rows, grid=None, size=None, model=model, only_plan=True)
    identity = report.configuration["identity"]
    assert identity["steps"] == [0, 1]
    assert identity["segment_tokens"] == 64


@pytest.mark.parametrize(
    ("task", "size", "message"),
    [
        ("text-stream", 1, "it must be at least 2"),
        ("text-halves", 8, "text-halves has no segments"),
    ],
)
def test_bad_segments(tmp_path, tokenizer, task, size, message):
    data = cases.write_rows(tmp_path / "texts.jsonl", cases.text_rows())
    with pytest.raises(ValueError, match=message):
        study(task, cases.model(), tokenizer, data, tmp_path / "out", segment_tokens=size)
    assert not (tmp_path / "out").exists()
