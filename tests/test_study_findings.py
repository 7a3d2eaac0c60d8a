"""What others found, checked on results made up so that it holds, does not, or cannot be told."""

import csv
import io
import math
import random

import pytest

from tests.study_cases import line, report_of
from ttt_fast.study import Setting
from ttt_fast.study.analysis import Analysis
from ttt_fast.study.findings import HOLDS, OPEN, OPPOSITE, correlation, findings
from ttt_fast.study.intervals import mean_estimate
from ttt_fast.study.sensitivity import sensitivities

SGD = Setting("sgd", 1e-3)
ADAMW = Setting("adamw", 1e-3)


def results(chances, n_prompts=60, step=10, prompts=None, **values):
    """Lines of settings, each right on a share of the prompts, the same ones as far as it goes."""
    names = [f"p{n}" for n in range(n_prompts)] if prompts is None else prompts
    return [
        line(name, setting, step, n < chance * len(names), **values)
        for setting, chance in chances.items()
        for n, name in enumerate(names)
    ]


def found(lines, claim, metric="likelihood"):
    (finding,) = (f for f in findings(Analysis(lines, metric)) if claim in f.claim)
    return finding


@pytest.mark.parametrize(
    ("sgd", "adamw", "verdict"), [(0.8, 0.4, HOLDS), (0.4, 0.8, OPPOSITE), (0.5, 0.51, OPEN)]
)
def test_the_optimizers_at_their_best(sgd, adamw, verdict):
    lines = results({SGD: sgd, ADAMW: adamw, Setting("sgd", 1e-3, momentum=0.9): 0.1})
    finding = found(lines, "learning rate, each at its best")
    assert finding.verdict == verdict
    assert finding.values == pytest.approx((sgd, adamw), abs=0.01)
    assert finding.n_places == (2, 1)  # AdamW has no momentum to be equal in
    assert finding.difference.n == 60


def test_only_what_has_a_counterpart_counts():
    """A learning rate that the other side did not try must not make it look better."""
    lines = results({SGD: 0.4, ADAMW: 0.5, Setting("sgd", 1e-5): 1.0})
    lines += results({SGD: 1.0}, step=20)
    finding = found(lines, "learning rate, each at its best")
    assert finding.values == pytest.approx((0.4, 0.5), abs=0.01)


def test_the_parts():
    ffn, attention = (Setting("sgd", 1e-3, scope=scope) for scope in ("ffn", "attention"))
    lines = results({SGD: 0.5, ffn: 0.9, attention: 0.45})
    lines += results({SGD: 0.1, ffn: 0.0, attention: 0.4}, step=20)
    assert found(lines, "Feed-forward weights alone do better than all, each").verdict == HOLDS
    assert found(
        lines, "Feed-forward weights alone do better than all, each"
    ).values == pytest.approx((0.9, 0.5), abs=0.01)
    assert found(lines, "Attention weights alone are safer than all, each").verdict == HOLDS
    assert found(lines, "Attention weights alone are safer than all, each").values == pytest.approx(
        (0.4, 0.1), abs=0.01
    )


def test_clipping():
    lrs = (1e-4, 1e-2)
    free = {Setting("sgd", lr): chance for lr, chance in zip(lrs, (0.8, 0.1), strict=True)}
    clipped = {Setting("sgd", lr, max_grad_norm=10.0): 0.7 for lr in lrs}
    lines = results(free | clipped)
    assert found(lines, "spares drops, each at its worst").verdict == HOLDS
    spread = found(lines, "matter less")
    assert spread.verdict == HOLDS
    assert spread.values == pytest.approx((0.0, 0.7), abs=0.01)
    assert spread.difference.mean == pytest.approx(0.7, abs=0.01)
    assert not any("Momentum" in f.claim for f in findings(Analysis(lines, "likelihood")))


def test_of_a_likelihood_less_is_better():
    momentum = Setting("sgd", 1e-3, momentum=0.9)
    lines = [
        line(f"p{n}", setting, 10, nll=base + 0.1 * n)
        for n in range(9)
        for setting, base in [(SGD, 3.0), (momentum, 2.5)]
    ]
    finding = found(lines, "Momentum helps", "nll")
    assert finding.verdict == HOLDS
    assert finding.values == pytest.approx((2.9, 3.4))
    assert finding.difference.mean == pytest.approx(0.5)


def test_the_interval_is_that_of_the_paired_difference():
    draw = random.Random(0)
    momentum = Setting("sgd", 1e-3, momentum=0.9)
    pairs = [(draw.gauss(3, 1), draw.gauss(0.1, 0.2)) for _ in range(80)]
    lines = [line(f"p{n}", SGD, 10, nll=a) for n, (a, _) in enumerate(pairs)]
    lines += [line(f"p{n}", momentum, 10, nll=a - d) for n, (a, d) in enumerate(pairs)]
    difference = found(lines, "Momentum helps", "nll").difference
    expected = mean_estimate([d for _, d in pairs])
    assert difference.mean == pytest.approx(expected.mean)
    half = (expected.high - expected.low) / 2
    assert difference.low == pytest.approx(expected.low, abs=0.15 * half)
    assert difference.high == pytest.approx(expected.high, abs=0.15 * half)


def test_clusters_are_drawn_whole():
    momentum = Setting("sgd", 1e-3, momentum=0.9)
    lines = results({SGD: 0.5, momentum: 0.7})
    alone = found(lines, "Momentum helps").difference
    clustered = [each | {"cluster": str(int(each["prompt"][1:]) // 12)} for each in lines]
    whole = found(clustered, "Momentum helps").difference
    assert whole.mean == alone.mean
    assert whole.high - whole.low > 1.5 * (alone.high - alone.low)


def test_only_prompts_that_both_sides_have():
    lines = results({SGD: 0.5}) + results({ADAMW: 0.5}, n_prompts=40)
    assert found(lines, "learning rate, each at its best").difference.n == 40
    assert found(lines, "learning rate, each at its best").values[0] == pytest.approx(
        0.75
    )  # of the first 40


def test_what_is_not_finite_is_left_out():
    wild, tame = Setting("sgd", 1.0), Setting("sgd", 1.0, momentum=0.9)
    momentum = Setting("sgd", 1e-3, momentum=0.9)
    lines = [line(f"p{n}", s, 10, nll=2.0) for n in range(4) for s in (SGD, momentum, tame)]
    lines += [line(f"p{n}", wild, 10, nll=None, diverged_at=3) for n in range(4)]
    assert found(lines, "Momentum helps", "nll").n_places == (1, 1)


def test_one_prompt_tells_nothing():
    lines = results({SGD: 1.0, ADAMW: 0.0}, n_prompts=1)
    assert found(lines, "learning rate, each at its best").verdict == OPEN


def test_the_correlation_has_an_interval():
    draw = random.Random(1)
    settings = [Setting("sgd", lr) for lr in (1e-5, 1e-4, 1e-3, 1e-2)]

    def lines(tells):
        return [
            line(f"p{n}", s, 10, nll=3.0 - rank + draw.gauss(0, 1),
                 loss=2.0 - tells * rank + draw.gauss(0, 1))
            for n in range(60)
            for rank, s in enumerate(settings)
        ]  # fmt: skip

    told = correlation(Analysis(lines(1), "nll"), "loss")
    assert (told.mean, told.n) == (pytest.approx(1.0), 60)
    assert told.low > 0
    guess = correlation(Analysis(lines(0), "nll"), "loss")
    assert guess.low < 0 < guess.high
    assert math.isnan(correlation(Analysis([], "nll"), "loss").mean)


def test_adapting_against_not_adapting():
    """Right on 60 % before; then on 30 and 80 %, of the same prompts as far as it goes."""
    lines = results({SGD: 0.6}, step=0) + results({SGD: 0.3}) + results({SGD: 0.8}, step=20)
    hows = ("not adapting, in the mean", "even at its best", "adapting, at its worst")
    mean, best, worst = (found(lines, how) for how in hows)
    assert mean.values == pytest.approx((0.6, 0.55), abs=0.02)
    assert best.values == pytest.approx((0.6, 0.8))
    assert worst.values == pytest.approx((0.6, 0.3))
    assert (best.verdict, worst.verdict) == (OPPOSITE, HOLDS)
    assert not any("Adapting" in f.claim for f in findings(Analysis(lines[60:], "likelihood")))


def test_the_loss_falls_faster():
    lines = [line(f"p{n}", s, 10, loss=loss + 0.01 * n) for n in range(20)
             for s, loss in ((SGD, 3.0), (ADAMW, 1.0))]  # fmt: skip
    (finding,) = findings(Analysis(lines, "loss"))
    assert "AdamW lowers the loss" in finding.claim
    assert finding.values == pytest.approx((1.095, 3.095))
    assert finding.verdict == HOLDS
    report = report_of(lines)
    assert report.findings_table("loss")[1][0][1:3] == ["AdamW: 1.0950", "SGD: 3.0950"]


def test_optimizers_at_the_same_loss():
    """At the same rate AdamW is right more often; where the loss is the same, less often."""
    fast = Setting("sgd", 1e-1)
    lines = results({SGD: 0.2}, loss=4.0) + results({fast: 0.9}, loss=1.1)
    lines += results({ADAMW: 0.5}, loss=1.0)
    assert found(lines, "learning rate, in the mean").verdict == OPPOSITE
    finding = found(lines, "where the loss of the prompts is equal")
    assert finding.values == pytest.approx((0.9, 0.5))
    assert finding.n_places == (1, 1)
    assert finding.verdict == HOLDS
    apart = results({SGD: 0.9}, loss=4.0) + results({ADAMW: 0.5}, loss=1.0)
    assert not any("equal" in f.claim for f in findings(Analysis(apart, "likelihood")))


# ---------------------------------------------------------------------------- how much it matters


def test_a_choice_that_matters():
    lrs = {Setting("sgd", 1e-4): 0.8, Setting("sgd", 1e-2): 0.3}
    lines = results(lrs) + results({s: chance - 0.1 for s, chance in lrs.items()}, step=20)
    rows = {row.axis: row for row in sensitivities(Analysis(lines, "likelihood"))}
    assert rows.keys() == {"lr", "steps"}
    assert rows["lr"].means == pytest.approx({1e-4: 0.75, 1e-2: 0.25}, abs=0.02)
    assert rows["lr"].spread == pytest.approx(0.5, abs=0.02)
    assert rows["lr"].by_chance < 0.3
    assert rows["lr"].p == pytest.approx(1 / 1001)
    assert (rows["lr"].n_groups, rows["lr"].n_prompts) == (2, 60)
    assert rows["steps"].means == pytest.approx({10: 0.55, 20: 0.45}, abs=0.02)


def test_chance_alone_is_no_sensitivity():
    """Four settings that differ by chance only: p is small now and then, as often as it should."""
    small, spreads = 0, 0.0
    for seed in range(40):
        draw = random.Random(seed)
        lines = [line(f"p{n}", Setting("sgd", 10.0**-k), 10, draw.random() < 0.5)
                 for n in range(12) for k in range(4)]  # fmt: skip
        (row,) = sensitivities(Analysis(lines, "likelihood"))
        spreads += row.spread
        small += row.p < 0.1
    assert spreads / 40 > 0.1  # of a share; what looks like a difference, and is none
    assert small <= 10  # 4 expected; above 10 in one case of a thousand


def test_clusters_are_exchanged_whole():
    settings = (Setting("sgd", 1e-4), Setting("sgd", 1e-2))
    lines = [line(f"p{n}", s, 10, s.lr < 1e-3, cluster=str(n // 20))
             for n in range(60) for s in settings]  # fmt: skip
    (row,) = sensitivities(Analysis(lines, "likelihood"))
    assert row.p > 0.2  # three clusters cannot tell more: one draw in four is as extreme
    alone = [{k: v for k, v in each.items() if k != "cluster"} for each in lines]
    assert sensitivities(Analysis(alone, "likelihood"))[0].p < 0.01


def test_groups_compare_the_same_values():
    """A rate that one clip did not try is left out of both means."""
    lines = results({Setting("sgd", lr): 0.5 for lr in (1e-4, 1e-3, 1e-2)})
    lines += results({Setting("sgd", lr, scope="ffn"): 0.5 for lr in (1e-4, 1e-3)})
    lines += results({Setting("sgd", lr, scope="attention"): 0.5 for lr in (1e-4, 1e-3)})
    rows = {row.axis: row for row in sensitivities(Analysis(lines, "likelihood"))}
    assert list(rows["lr"].means) == [1e-4, 1e-3]
    assert rows["lr"].n_groups == 3
    assert rows["scope"].n_groups == 2
    assert rows["lr"].p == 1.0  # nothing differs


def test_the_report_says_so(tmp_path):
    report = report_of(results({SGD: 0.8, ADAMW: 0.4}), "gsm-symbolic")
    assert "SGD does better than AdamW" in report.page()
    files = {path.name: path for path in report.write(tmp_path)}
    rows = list(csv.DictReader(io.StringIO(files["generation_findings.csv"].read_text())))
    row = next(row for row in rows if "at its best" in row["reported"])
    assert (row["one side"], row["other side"], row["here"]) == ("SGD: 80.0", "AdamW: 40.0", HOLDS)
    assert (row["settings and steps"], row["prompts"]) == ("1 and 1", "60")
    assert "and whether it holds here" in files["report.html"].read_text()
    assert "AdamW" not in report_of(results({SGD: 0.8})).page()
