"""Which engine the settings of a study run in, and how many trajectories side by side."""

import pytest

from ttt_fast import TTTConfig
from ttt_fast.engines.policy import Choice, _decide
from ttt_fast.engines.work import Workload
from ttt_fast.study import Setting
from ttt_fast.study.plan import _portion


class Predicted:
    """A trainer that predicts: the dense engine keeps a copy of the weights for each delta."""

    def __init__(self, budget, dense_ms):
        self.config = TTTConfig(memory_budget=budget, max_batch_tokens=None)
        self.dense_ms = dense_ms

    def plan(self, n, n_tokens, in_turn=False):
        ms = {"factored": 100 / n + 20, "dense": self.dense_ms}
        sizes = {"factored": 10 * n, "dense": 100 if in_turn else 100 + 50 * (n > 1) * n}
        work = Workload((), n_tokens, 1, n, available_bytes=self.config.memory_budget)
        return Choice(*_decide(work, ms, sizes), ms, sizes)


@pytest.mark.parametrize(
    ("budget", "dense_ms", "expected"),
    [
        (None, 500, ("factored", 8, 80)),
        (None, 5, ("dense", 1, 100)),  # one by one: the memory of one
        (100, 5, ("dense", 1, 100)),  # eight copies of the weights would not fit, but one does
        (99, 5, ("factored", 8, 80)),  # dense is faster and does not fit
        (35, 500, ("factored", 3, 30)),
        (9, 5, ("factored", 1, 10)),  # neither fits
    ],
)
def test_memory_of_what_goes_one_by_one(budget, dense_ms, expected):
    portion = _portion(Predicted(budget, dense_ms), (Setting(),), [9], 8)
    assert (portion.engine, portion.at_once, portion.nbytes) == expected


class PredictedByLength(Predicted):
    """The factored engine's time and memory grow faster with the length of a prompt."""

    def plan(self, n, n_tokens, in_turn=False):
        ms = {"factored": n_tokens**2, "dense": 25 * n_tokens}
        sizes = {"factored": n * n_tokens**2, "dense": 30 * n_tokens}
        work = Workload((), n_tokens, 1, n, available_bytes=self.config.memory_budget)
        return Choice(*_decide(work, ms, sizes), ms, sizes)


@pytest.mark.parametrize(
    ("budget", "lengths", "expected"),
    [
        (None, [10, 10, 40], ("factored", 8, 20**2, 8 * 40**2)),  # time of the mean, memory of all
        (None, [25, 30, 40], ("dense", 1, 25 * 32, 30 * 40)),
        (4 * 40**2, [10, 10, 40], ("factored", 4, 20**2, 4 * 40**2)),
        (1300, [10, 10, 40], ("dense", 1, 25 * 40, 30 * 40)),  # the longest has no factors
    ],
)
def test_one_long_prompt_does_not_decide_for_all(budget, lengths, expected):
    portion = _portion(PredictedByLength(budget, 0), (Setting(),), lengths, 8)
    assert (portion.engine, portion.at_once, portion.ms, portion.nbytes) == expected
