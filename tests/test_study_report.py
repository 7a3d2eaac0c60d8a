"""Intervals, correlations, tables, figures and the page, on results made up for them."""

import csv
import io
import math
import random
import re
import statistics

import pytest
from matplotlib import transforms
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.lines import Line2D

from tests.study_cases import line, report_of
from ttt_fast.study import Grid, Setting
from ttt_fast.study import figures as figures_module
from ttt_fast.study.analysis import Analysis
from ttt_fast.study.drawing import draw_line, short
from ttt_fast.study.intervals import mean_estimate, share_estimate, spearman, wilson
from ttt_fast.study.plan import duration

GRID = Grid(
    lr=(1e-4, 1e-2), steps=(0, 10, 20), weight_decay=(0.0, 0.5), momentum=(0.0, 0.9),
    max_grad_norm=(None, 10.0), scope=("all", "ffn"),
)  # fmt: skip
SMALL = Setting("sgd", 1e-4)
LARGE = Setting("sgd", 1e-2)


def whole_grid():
    """Every setting of a grid; large learning rates hurt, the smallest do not land."""
    draw = random.Random(0)
    lines = []
    for setting in GRID.settings():
        for prompt in range(8):
            for step in GRID.steps:
                hurt = step / 20 if setting.lr > 1e-3 else 0.0
                right = draw.random() > 0.2 + 0.5 * hurt
                landed = 0.1 if setting.lr < 1e-3 and step else 1.0
                values = {"update_landed": landed, "loss": 3.0 - 2 * hurt + 0.01 * prompt}
                lines.append(line(f"p{prompt}", setting, step, right, **values))
    return lines


# ---------------------------------------------------------------------------- intervals


@pytest.mark.parametrize(
    ("k", "n", "low", "high"),
    [(0, 10, 0.0, 0.2775), (5, 10, 0.2366, 0.7634), (10, 10, 0.7225, 1.0),
     (81, 263, 0.2553, 0.3662)],
)  # fmt: skip
def test_wilson_is_the_published_one(k, n, low, high):
    assert wilson(k, n) == pytest.approx((low, high), abs=1e-4)


def test_wilson_solves_its_equation():
    z = statistics.NormalDist().inv_cdf(0.975)
    for k, n in [(1, 7), (3, 7), (200, 860)]:
        for end in wilson(k, n):
            assert abs(k / n - end) == pytest.approx(z * math.sqrt(end * (1 - end) / n))


def test_clusters_that_agree_count_once():
    """Ten rows in each of six templates, all of a template alike: no more than six answers."""
    right = [template < 2 for template in range(6) for _ in range(10)]
    clusters = [template for template in range(6) for _ in range(10)]
    clustered, rows = share_estimate(right, clusters), share_estimate(right)
    six = share_estimate([template < 2 for template in range(6)])
    assert clustered.mean == rows.mean
    assert clustered.high - clustered.low > 2 * (rows.high - rows.low)
    # Of six clusters the variance is estimated with five degrees of freedom.
    assert clustered.high - clustered.low == pytest.approx(six.high - six.low, rel=0.1)
    alone = share_estimate(right, list(range(60)))
    assert (alone.low, alone.high) == pytest.approx((rows.low, rows.high), abs=0.005)


def test_all_right_in_few_clusters_is_not_certain():
    found = share_estimate([True] * 100, [n % 4 for n in range(100)])
    assert (found.low, found.high) == pytest.approx(wilson(4, 4))


def test_mean_interval():
    values = [1.0, 2.0, 4.0, 7.0]
    found = mean_estimate(values)
    half = 1.959964 * statistics.stdev(values) / 2
    assert (found.mean, found.low, found.high) == pytest.approx((3.5, 3.5 - half, 3.5 + half))
    assert math.isnan(mean_estimate([1.0]).low)
    assert mean_estimate([]).n == 0


def test_spearman():
    assert spearman([1, 2, 3, 4], [10, 20, 40, 80]) == pytest.approx(1.0)
    assert spearman([1, 2, 3, 4], [9, 7, 5, 1]) == pytest.approx(-1.0)
    assert spearman([1, 2, 3, 4, 5], [2, 1, 4, 3, 5]) == pytest.approx(0.8)
    assert spearman([1, 2, 2, 3], [1, 2, 3, 4]) == pytest.approx(0.9486833)  # ties
    assert math.isnan(spearman([1, 1, 1], [1, 2, 3]))


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(40, "40 s"), (600, "10 min"), (7200, "2.0 h"), (86400 * 12, "12.0 days")],
)
def test_duration(seconds, words):
    assert duration(seconds) == words


# ---------------------------------------------------------------------------- curves


def small():
    """Two settings on four prompts: the large lr hurts, with a lower loss."""
    lines = []
    for prompt in range(4):
        for setting, right, loss in [(SMALL, 3, 2.0), (LARGE, 1, 1.0)]:
            lines.append(line(f"p{prompt}", setting, 0, prompt < 2, 3.0))
            lines.append(line(f"p{prompt}", setting, 10, prompt < right, loss))
    return lines


def test_a_curve_and_its_change():
    curve = Analysis(small(), "likelihood").curves[SMALL]
    assert [cell.step for cell in curve] == [0, 10]
    assert [cell.value.mean for cell in curve] == [0.5, 0.75]
    assert (curve[1].value.low, curve[1].value.high) == wilson(3, 4)
    assert curve[1].change.mean == 0.25
    assert curve[1].change.low < 0 < curve[1].change.high
    assert curve[1].means["loss"] == 2.0


def test_what_diverged_is_wrong_and_counted():
    lines = small() + [
        line("p9", LARGE, 0, True, 3.0),
        line("p9", LARGE, 10, False, None, diverged_at=4, delta_norm=None),
    ]
    last = Analysis(lines, "likelihood").curves[LARGE][-1]
    assert last.value.mean == 1 / 5
    assert (last.n_prompts, last.n_diverged) == (5, 1)
    assert last.means["loss"] == 1.0  # of the others
    assert report_of(lines).n_diverged == 1
    row = next(r for r in report_of(lines).steps_table("likelihood")[1] if "0.01" in r[0])
    assert row[-1] == "1"


def test_robustness():
    rows = {row.setting: row for row in Analysis(small(), "likelihood").robustness()}
    assert rows[SMALL].best == rows[SMALL].worst == (0.75, 10)
    assert rows[LARGE].area == pytest.approx(-0.125)  # from 0 to -0.25 along the steps
    assert rows[SMALL].lr_spread == rows[LARGE].lr_spread == 0.5


def test_the_lowest_loss_chooses_the_worst_here():
    loss, *_ = Analysis(small(), "likelihood").choices()
    assert (loss.predictor, loss.setting, loss.cell.step) == ("loss", LARGE, 10)
    assert (loss.cell.value.mean, loss.cell.change.mean) == (0.25, -0.25)
    assert loss.correlation == pytest.approx(-1.0)
    (sentence,) = report_of(small()).conclusions("likelihood")
    assert "Chosen by the lowest loss" in sentence
    assert "25.0; not adapted 50.0; the best in hindsight 75.0" in sentence
    assert "-1.00 [-1.00, +0.00] over 2 settings" in sentence


def test_of_a_likelihood_less_is_better():
    lines = [
        line(f"p{p}", setting, step, nll=nll + p, group="ab"[p])
        for p in range(2)
        for setting, values in [(SMALL, (3.0, 2.0)), (LARGE, (3.0, 4.0))]
        for step, nll in zip((0, 10), values, strict=True)
    ]
    analysis = Analysis(lines, "nll")
    assert analysis.best()[0] == SMALL
    assert Analysis(lines, "nll", "b").curves[SMALL][0].value.mean == 4.0
    report = report_of(lines, "text-halves")
    assert list(report.groups("nll")) == ["a", "b"]
    assert "3.5000" in report.page()


# ---------------------------------------------------------------------------- tables and files


def test_the_order_of_the_lines_does_not_matter():
    lines = whole_grid()

    def mixed(lines):
        return random.Random(1).sample(lines, len(lines)) + lines[:5]  # and some are there twice

    assert report_of(mixed(lines)).csv() == report_of(lines).csv()
    assert report_of(mixed(small())).page() == report_of(small()).page()


def test_csv_has_every_setting_and_step():
    rows = list(csv.DictReader(io.StringIO(report_of(whole_grid()).csv())))
    assert len(rows) == len(GRID.settings()) * len(GRID.steps)
    first = rows[0]
    assert (first["optimizer"], first["max_grad_norm"], first["step"]) == ("sgd", "", "0")
    assert {row["prompts"] for row in rows} == {"8"}
    assert float(first["likelihood_low"]) < float(first["likelihood"])
    assert {row["update_landed"] for row in rows} == {"0.1", "1.0"} | {
        row["update_landed"] for row in rows if row["update_landed"].startswith("0.0999")
    }


def test_table_shows_interval_and_landed():
    heads, rows = report_of(small()).steps_table("likelihood")
    assert heads == ["setting", "step 0", "step 10", "landed", "n", "diverged"]
    assert rows[0][1:] == ["50.0 [15.0, 85.0]", "75.0 [30.1, 95.4]", "1.000", "4", "0"]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A folder with the report of a whole grid; one metric, for the figures take their time."""
    folder = tmp_path_factory.mktemp("report")
    return folder, report_of(whole_grid(), "gsm-symbolic").write(folder)


def test_everything_is_written(written):
    folder, files = written
    names = {path.name for path in files}
    assert {path.name for path in folder.iterdir()} == names
    axes = ("lr", "optimizer", "weight_decay", "max_grad_norm", "momentum", "scope")
    assert {f"generation_by_{axis}.png" for axis in axes} <= names
    assert {"loss_by_lr.png", "generation_predictors.png", "table.csv", "report.html"} <= names
    for name in names:
        if name.endswith(".png"):
            pixels = imread(folder / name)[..., :3]
            assert (pixels.min(-1) < 0.9).mean() > 0.01, name  # not empty


def test_page_is_self_contained(written):
    page = (written[0] / "report.html").read_text()
    assert page.count("<img ") == page.count('src="data:image/png;base64,') == 10
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert "a&lt;b&gt;" in page and "a<b>" not in page
    assert page.count("<table>") == page.count("</table>") == 7
    assert "the plan" in page


def test_few_results_make_a_report(tmp_path):
    report_of([line("p0", SMALL, 5)]).write(tmp_path)
    assert (tmp_path / "report.html").stat().st_size > 10_000
    assert "sgd lr 0.0001" in report_of([line("p0", SMALL, 5)]).page()


def test_a_study_that_is_not_complete_says_so():
    assert "NOT COMPLETE" not in report_of(small()).page()
    fewer = [each for each in small() if each["prompt"] != "p3" or each["setting"]["lr"] < 1e-3]
    report = report_of(fewer)
    assert "NOT COMPLETE: settings have 3 to 4 prompts" in report.page()
    # What compares settings is over the three that both have: p3 is wrong before and after.
    assert report.analyses["likelihood"].unadapted.mean == 0.5
    assert report.compared["likelihood"].unadapted.mean == pytest.approx(2 / 3)
    robust = {row.setting: row for row in report.compared["likelihood"].robustness()}
    assert robust[SMALL].best[0] == 1.0
    assert "the best in hindsight 100.0" in report.conclusions("likelihood")[0]


def test_a_mean_over_fewer_prompts_says_so():
    later = [line(f"p{p}", SMALL, 100, True) for p in range(2)]
    heads, rows = report_of(small() + later).steps_table("likelihood")
    assert heads[3] == "step 100"
    assert rows[0][1].endswith(", n 4")
    assert rows[0][3].endswith(", n 2")
    assert rows[0][-2] == "2 to 4"
    assert rows[1][-2] == "4"


def test_shared_prompts():
    lines = small() + [line("p9", SMALL, 0, True), line("p9", SMALL, 10, True)]
    analysis = Analysis(lines, "likelihood")
    assert analysis.curves[SMALL][1].n_prompts == 5
    assert analysis.shared().curves[SMALL][1].n_prompts == 4
    assert analysis.shared([SMALL]).curves[SMALL][1].n_prompts == 5
    assert list(analysis.shared([SMALL]).curves) == [SMALL]
    same = analysis.shared()
    assert same.shared() is same
    assert Analysis(small(), "likelihood").shared().n_prompts == 4
    apart = [line("p0", SMALL, 10), line("p1", LARGE, 10)]
    assert not Analysis(apart, "likelihood").shared().curves


def test_what_each_prompt_would_have_chosen():
    """The least loss of p0 is with the small rate, of p1 with the large one, where it is wrong."""
    lines = [
        line("p0", SMALL, 0, False), line("p1", SMALL, 0, True),
        line("p0", SMALL, 10, True, 1.0), line("p1", SMALL, 10, True, 2.0),
        line("p0", LARGE, 10, False, 1.5), line("p1", LARGE, 10, False, 0.5),
    ]  # fmt: skip
    value, change = Analysis(lines, "likelihood").chosen_by_prompt("loss")
    assert (value.mean, value.n) == (0.5, 2)
    assert change.mean == 0.0
    rows = {row[0]: row for row in report_of(lines).choices_table("likelihood")[1]}
    assert "loss of the prompt, of each prompt" in rows


# ---------------------------------------------------------------------------- figures


def settings_of(panels):
    return [{value: sorted(own) for value, own in panel.items()} for panel in panels]


def panels_of(settings, axis):
    lines = [line("p0", setting, 10) for setting in settings]
    return settings_of(figures_module._panels_of(Analysis(lines, "likelihood"), axis))


def test_adamw_has_no_momentum_to_draw():
    settings = [Setting("sgd", 1e-3, momentum=0.9), Setting("adamw", 1e-3)]
    assert panels_of(settings, "momentum") == []
    assert panels_of(settings, "optimizer") == [{"sgd": [1e-3], "adamw": [1e-3]}]
    more = [*settings, Setting("sgd", 1e-3)]
    assert panels_of(more, "momentum") == [{0.0: [1e-3], 0.9: [1e-3]}]


def test_a_row_for_each_part_and_only_rates_that_both_have():
    sgd = [Setting("sgd", lr, scope=scope) for lr in (1e-4, 1e-2) for scope in ("all", "ffn")]
    panels = panels_of([*sgd, Setting("adamw", 1e-4), Setting("adamw", 1, scope="ffn")],
                       "optimizer")  # fmt: skip
    assert panels == [{"sgd": [1e-4, 1e-2], "adamw": [1e-4]}]  # ffn has no rate in common
    clipped = [Setting("sgd", 1e-4, max_grad_norm=10.0, scope="ffn")]
    assert panels_of(sgd + clipped, "max_grad_norm") == [{None: [1e-4, 1e-2], 10.0: [1e-4]}]
    assert len(panels_of(sgd + clipped, "scope")) == 1  # with the clip there is one part only


class Panel:
    """Remembers what is drawn."""

    def __init__(self):
        self.lines, self.intervals = [], []
        self.transData = transforms.IdentityTransform()
        self.figure = Figure()

    def plot(self, x, y, **look):
        self.lines.append((look.get("fillstyle"), list(x), list(y)))
        return [Line2D(x, y)]

    def vlines(self, x, low, high, **look):
        self.intervals += list(zip(x, low, high, strict=True))
        return Line2D([], [])


def drawn(n_lines):
    curve = Analysis(whole_grid(), "likelihood").curves[SMALL]
    panel = Panel()
    draw_line(panel, [(cell.step, cell) for cell in curve], "likelihood", "", 0, n_lines)
    return curve, panel


def test_hollow_points_are_those_that_did_not_land():
    curve, panel = drawn(2)
    percent = [100 * cell.value.mean for cell in curve]
    assert ("full", [0], percent[:1]) in panel.lines
    assert ("none", [10, 20], percent[1:]) in panel.lines


def test_every_point_has_its_interval_while_there_is_room():
    curve, panel = drawn(3)
    ends = [(c.step, 100 * c.value.low, 100 * c.value.high) for c in curve]
    assert panel.intervals == ends
    assert drawn(4)[1].intervals == ends[-1:]


@pytest.mark.parametrize(("lr", "words"), [(1e-4, "1e-4"), (5e-5, "5e-5"), (0.25, "2.5e-1")])
def test_a_learning_rate_in_a_figure(lr, words):
    assert short(lr) == words


def test_without_matplotlib(monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'ttt-fast\[demo\]'"):
        report_of(small()).write(tmp_path)
    assert not list(tmp_path.iterdir())
