"""Does test-time training help this model on this task, and with which settings?

from ttt_fast.study import Grid, study

report = study("memo-trap", model, tokenizer, "memo_trap.jsonl", "results",
grid=Grid(lr=(1e-4, 1e-3), steps=(0, 20, 40)), prompts=32, show=print)
print(report)
report.write("results")
"""

from ttt_fast.study.grid import Grid, Setting
from ttt_fast.study.report import StudyReport
from ttt_fast.study.results import ResultsError
from ttt_fast.study.runner import study
from ttt_fast.study.tasks import TASKS

__all__ = ["TASKS", "Grid", "ResultsError", "Setting", "StudyReport", "study"]
