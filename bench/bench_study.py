"""The SGD part of a study beside the same study by naive loops: seconds of a trajectory.

A trajectory is a prompt with a setting, adapted and looked at after each number of steps: two
likelihoods, a greedy answer, the loss, and ‖W − W₀‖. Ours is ``ttt_fast.study`` as users call it,
plan and results on the disk included. The loop is ``bench/naive.py`` on a sample of the same
trajectories, one of each prompt (its time depends on the length of the prompt, hardly on the
setting), scored by the study's own code; half of the sample runs before ours and half behind it.
Both are divided by their trajectories, and their losses have to be the same.

A full run also leaves out the distances, which cost a loop a pass over the weights and ours the
products of all steps with each other; and it has 100 steps. Less is to be gained there: the factors
of K steps of T tokens take memory and time in proportion to K · T, so fewer trajectories go side by
side and each step costs more, while the loop's steps cost the same. The printed line says how many.
"""

from __future__ import annotations

import json
import random
from itertools import count
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from bench.conftest import no_collection, note
from bench.shapes import AMOUNT, SMALL, load_model
from ttt_fast import select_parameters
from ttt_fast.naive import naive_adapt, prompt_loss
from ttt_fast.study import Grid, Setting, StudyReport, study
from ttt_fast.study.results import key_of
from ttt_fast.study.scoring import score
from ttt_fast.study.tasks import TASKS, Encoded, load_examples

TASK = TASKS["memo-trap"]
MODEL = "SmolLM2-135M"
STEPS = {"quick": (10,), "full": (40, 100), "small": (2,)}[AMOUNT]
SCOPES = ("all", "ffn", "attention") if AMOUNT == "full" else ("all",)
# One round of 100 steps: it takes several times as long.
ROUNDS = {40: 3} if AMOUNT == "full" else {}
# Endings that everybody knows, and others: of Memo-Trap's form, and its length.
PROVERBS = (
    ("Absence makes the heart grow", "fonder", "heavy"),
    ("Actions speak louder than", "words", "stones"),
    ("All that glitters is not", "gold", "rain"),
    ("The early bird catches the", "worm", "train"),
)


class Study(NamedTuple):
    """What both sides run.

    Attributes:
        model: with its weights.
        tokenizer: its tokenizer.
        grid: the settings and steps.
        data: the task's file.
    """

    model: nn.Module
    tokenizer: Any
    grid: Grid
    data: Path

    @property
    def n_trajectories(self) -> int:
        """Prompts times settings."""
        return len(PROVERBS) * len(self.grid.settings())


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("scope", SCOPES)
def bench_study(benchmark: Any, tmp_path: Path, scope: str, steps: int) -> None:
    grid = Grid(
        lr=(1e-5, 1e-4, 1e-3), steps=(0, steps // 2, steps), optimizer=("sgd",),
        weight_decay=(0.0,), momentum=(0.9,), max_grad_norm=(None, 10.0), scope=(scope,),
    )  # fmt: skip
    whole = Study(load_model(MODEL, torch.float32), tokenizer(), grid, write_rows(tmp_path))
    folders = (tmp_path / str(n) for n in count())
    warm_up = whole._replace(grid=Grid(**(grid.as_dict() | {"steps": (1,), "lr": (1e-5,)})))
    run_study(warm_up, next(folders))
    pairs = sample(whole)
    run_loops(warm_up, pairs[:1])
    middle = len(pairs) // 2
    seconds: dict[str, list[float]] = {"naive": [], "ours": []}
    with no_collection():
        for _ in range(ROUNDS.get(steps, 1)):
            losses, before_s = run_loops(whole, pairs[:middle])
            report, ours_s = run_study(whole, next(folders))
            more, after_s = run_loops(whole, pairs[middle:])
            seconds["naive"].append((before_s + after_s) / len(pairs))
            seconds["ours"].append(ours_s / whole.n_trajectories)
            require_same_losses(losses | more, report.lines)
            if AMOUNT == "full":
                _, without_s = run_study(whole, next(folders), delta_norm=False)
                own = seconds.setdefault("ours, no distances", [])
                own.append(without_s / whole.n_trajectories)
    rows = {
        name: {"median_s": median(values), "min_s": min(values), "max_s": max(values)}
        for name, values in seconds.items()
    }
    (portion,) = report.configuration["portions"]
    what = (
        f"study, {MODEL}, float32, SGD on {scope}, {whole.n_trajectories} trajectories of {steps}"
        f" steps, {portion['at_once']} side by side (the loop: {len(pairs)} of them)"
    )
    note(benchmark, {"study": what, "rows": rows})
    print(f"\n{what}, {torch.get_num_threads()} threads: seconds a trajectory")
    for name, row in rows.items():
        ratio = rows["naive"]["median_s"] / row["median_s"]
        print(
            f"{name:20}{row['median_s']:8.2f} [{row['min_s']:.2f}, {row['max_s']:.2f}] {ratio:.2f}x"
        )


# ---------------------------------------------------------------------------- what is adapted to


def write_rows(folder: Path) -> Path:
    """The prompts as a file of the task."""
    rows = [
        {
            "id": str(n),
            "prompt": f'Write a quote that ends in the word "{asked}": {beginning}',
            "classes": [f" {asked}.", f" {known}."],
            "answer_index": 0,
        }
        for n, (beginning, known, asked) in enumerate(PROVERBS)
    ]
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def tokenizer() -> Any:
    """SmolLM2's; for a tiny model one of the words that there are."""
    if not SMALL:
        from transformers import AutoTokenizer

        from ttt_fast.demo import demo_model_folder

        return AutoTokenizer.from_pretrained(demo_model_folder())
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    texts = [word for row in PROVERBS for text in row for word in text.split()]
    words = dict.fromkeys(
        ["<pad>", "<unk>", *texts, *'Write a quote that ends in the " : .'.split()]
    )
    backend = Tokenizer(
        models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>")
    )
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", pad_token="<pad>", eos_token="<pad>"
    )


def sample(whole: Study) -> list[tuple[Encoded, Setting]]:
    """Every prompt with a setting that is drawn.

    Not one of the largest learning rate: it takes as long, and without a clip rounding grows in it
    until the losses of two right runs differ.
    """
    draw = random.Random(0)
    settings = [s for s in whole.grid.settings() if s.lr < whole.grid.lr[-1]]
    examples = load_examples(TASK, whole.data).rows
    return [(TASK.encode(each, whole.tokenizer), draw.choice(settings)) for each in examples]


# ---------------------------------------------------------------------------- both sides


def run_study(whole: Study, folder: Path, delta_norm: bool = True) -> tuple[StudyReport, float]:
    """Ours, and its seconds."""
    start = perf_counter()
    report = study(
        TASK.name, whole.model, whole.tokenizer, whole.data, folder, grid=whole.grid,
        delta_norm=delta_norm,
    )  # fmt: skip
    return report, perf_counter() - start


def run_loops(
    whole: Study, pairs: list[tuple[Encoded, Setting]]
) -> tuple[dict[tuple, float], float]:
    """The naive loop on some trajectories: losses before the update of each look, and seconds."""
    params = [s.param for s in select_parameters(whole.model, whole.grid.scope[0])]
    originals = [param.detach().clone() for param in params]
    found = {}
    start = perf_counter()
    for prompt, setting in pairs:

        def look(step: int, *_: float, prompt: Encoded = prompt) -> None:
            if step in whole.grid.steps:
                score(whole.model, TASK, [prompt], whole.tokenizer, TASK.max_new_tokens)
                distance(params, originals)

        look(0)
        options = {"lr": setting.lr, "momentum": setting.momentum,
                   "max_grad_norm": setting.max_grad_norm}  # fmt: skip
        result = naive_adapt(
            whole.model, prompt.prompt[None], steps=whole.grid.steps[-1], params=params,
            on_step=look, **options,
        )  # fmt: skip
        with torch.no_grad():
            prompt_loss(whole.model, prompt.prompt[None])
        result.restore()
        for step in whole.grid.steps[:-1]:
            found[prompt.example.id, setting, step] = float(result.losses[step])
    return found, perf_counter() - start


@torch.no_grad()
def distance(params: list[nn.Parameter], originals: list[torch.Tensor]) -> float:
    """‖W − W₀‖ as a loop would measure it."""
    norms = [(now - before).norm() for now, before in zip(params, originals, strict=True)]
    return float(torch.stack(norms).norm())


def require_same_losses(losses: dict[tuple, float], lines: list[dict[str, Any]]) -> None:
    """Both sides have to have done the same work."""
    ours = {key_of(line): line["loss"] for line in lines}
    for key, loss in losses.items():
        # After many steps rounding has grown; another update would be farther away.
        if abs(ours[key] - loss) > 1e-2:
            raise AssertionError(f"{key}: the loop's loss is {loss}, ours {ours[key]}")
