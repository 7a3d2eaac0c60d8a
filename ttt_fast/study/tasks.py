"""What a study adapts to and how the adapted model is scored: tasks, read from JSON lines.

A file holds one JSON object a line. Its bytes are compared with those that the loader was written
for, and the result is part of the report: another file is not wrong, but other numbers follow.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ttt_fast.study.answers import agree, boxed

NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
WORD = re.compile(r"[\w'-]+")


@dataclass(frozen=True)
class Example:
    """One row of a task's file.

    Attributes:
        id: unique in the file.
        prompt: what is adapted to; for plain text, the whole of it.
        cluster: rows of one cluster are not independent; None where rows are.
        group: a part of the file that the report also shows on its own; None without parts.
        options: continuations between which the likelihood decides.
        answer_index: the right one.
        answer: what a generated answer has to be: a word, or a number.
        trap: the word that a model which ignores the instruction says.
    """

    id: str
    prompt: str
    cluster: str | None = None
    group: str | None = None
    options: tuple[str, ...] = ()
    answer_index: int = 0
    answer: str = ""
    trap: str = ""


@dataclass(frozen=True)
class Encoded:
    """An example in tokens.

    Attributes:
        example: likewise.
        prompt: (T,) ids, what is adapted to.
        continuations: ids behind the prompt whose log-likelihoods are measured.
    """

    example: Example
    prompt: Tensor
    continuations: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class Task:
    """A task.

    Attributes:
        name: on the command line.
        title: in the report.
        read: makes an example of a row; raises KeyError, ValueError or TypeError for a row of
            another file.
        metrics: name -> words; all but "nll" are shares of right answers.
        max_new_tokens: of a generated answer; 0 where nothing is generated.
        judge: ``(example, text) -> (answer, right)`` of a generated text.
        complete: whether nothing that follows can change what ``judge`` says of a text.
        halves: adapt to the first half of the text and score the second.
        segment_tokens: score a text in segments of so many tokens, each before the weights train on
            it; 0 for tasks that adapt to a prompt first.
        steps: numbers of steps to look at by default; empty for those of :class:`Grid`.
        sha256: first 16 digits of the files that the loader was written for.
        note: what to know of the file.
    """

    name: str
    title: str
    read: Callable[[int, Mapping[str, Any]], Example]
    metrics: Mapping[str, str]
    max_new_tokens: int = 0
    judge: Callable[[Example, str], tuple[str | None, bool]] | None = None
    complete: Callable[[str], bool] = field(default=lambda text: False)
    halves: bool = False
    segment_tokens: int = 0
    steps: tuple[int, ...] = ()
    sha256: tuple[str, ...] = ()
    note: str = ""

    @property
    def plain_text(self) -> bool:
        """Whether a row is a text, with nothing to answer."""
        return self.halves or self.segment_tokens > 0

    @property
    def least_tokens(self) -> int:
        """Tokens that a prompt needs for there to be something to learn and to score."""
        return max(2, self.segment_tokens + 1)

    @property
    def axes(self) -> dict[str, tuple[Any, ...]]:
        """The axes of a grid whose defaults are not those of :class:`Grid`."""
        return {"steps": self.steps} if self.steps else {}

    def encode(self, example: Example, tokenizer: Any, chat: bool = False) -> Encoded:
        """Tokens of an example; ``chat`` wraps the prompt in the tokenizer's chat template."""
        if self.plain_text:
            ids = torch.tensor(tokenizer(example.prompt)["input_ids"], dtype=torch.int64)
            if not self.halves:
                return Encoded(example, ids)
            half = ids.numel() // 2
            return Encoded(example, ids[:half], (ids[half:],))
        text = example.prompt
        if chat:
            turns = [{"role": "user", "content": text}]
            text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)

        def ids_of(text: str) -> Tensor:
            ids = tokenizer(text, add_special_tokens=not chat)["input_ids"]
            return torch.tensor(ids, dtype=torch.int64)

        prompt = ids_of(text)
        # Tokenised together and cut where the prompt ends: alone, a leading space may become a
        # token of its own.
        options = tuple(ids_of(text + option)[prompt.numel() :] for option in example.options)
        return Encoded(example, prompt, options)


@dataclass(frozen=True)
class Examples:
    """What a file held.

    Attributes:
        rows: in the order of the file.
        sha256: of the file.
        known: whether it is, byte for byte, the file that the loader was written for.
    """

    rows: list[Example]
    sha256: str
    known: bool


def load_examples(task: Task, path: str | Path, sha256: str | None = None) -> Examples:
    """Read a task's file.

    Args:
        task: which one.
        path: JSON lines.
        sha256: refuse a file whose hash does not begin with this.

    Raises:
        ValueError: empty, not JSON lines, another hash, or rows of another task; names the line.
        OSError: it cannot be read.
    """
    path = Path(path)
    content = path.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    if sha256 is not None and not digest.startswith(sha256.lower()):
        raise ValueError(
            f"{path}: its sha256 is {digest[:16]}..., but {sha256} was asked for. Give the file"
            " that was meant, or leave the hash out."
        )
    try:
        lines = content.decode("utf-8").split("\n")  # U+2028 inside of a string ends no line
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a text file ({error.reason}); give JSON lines.") from error
    rows: list[Example] = []
    seen: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        example = _read_line(task, path, number, line)
        if example.id in seen:
            raise ValueError(
                f"{path}: line {number} has the id {example.id!r} of line {seen[example.id]};"
                " results are kept by id, so each has to be unique."
            )
        seen[example.id] = number
        rows.append(example)
    if not rows:
        raise ValueError(f"{path}: no row in it; give a file of JSON lines for task {task.name!r}.")
    return Examples(rows, digest, digest.startswith(task.sha256))


def _read_line(task: Task, path: Path, number: int, line: str) -> Example:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{path}: line {number} is not JSON ({error}); give JSON lines.") from None
    try:
        if not isinstance(row, dict):
            raise TypeError(f"a {type(row).__name__}, not an object")
        return task.read(number, row)
    except (KeyError, ValueError, TypeError, IndexError) as error:
        what = f"no field {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(
            f"{path}: line {number} is no row of task {task.name!r}: {what}. Give the file of this"
            " task, or the name of another."
        ) from None


def find_task(name: str) -> Task:
    """The task of a name.

    Raises:
        ValueError: there is none; lists them.
    """
    if name not in TASKS:
        raise ValueError(f"study: task {name!r} is unknown; use one of {', '.join(TASKS)}.")
    return TASKS[name]


# ---------------------------------------------------------------------------- Memo-Trap


def _first_word(text: str) -> str | None:
    found = WORD.search(text)
    return found.group() if found else None


def _memo_trap_row(number: int, row: Mapping[str, Any]) -> Example:
    classes, right = [str(option) for option in row["classes"]], int(row["answer_index"])
    if len(classes) != 2 or right not in (0, 1):
        raise ValueError(f"{len(classes)} classes and answer_index {right}; there are two classes")
    answer, trap = _first_word(classes[right]), _first_word(classes[1 - right])
    if answer is None or trap is None:
        raise ValueError("a class without a word")
    return Example(
        id=str(row.get("id", number)),
        prompt=_text(row["prompt"]),
        options=tuple(classes),
        answer_index=right,
        answer=answer,
        trap=trap,
    )


def _judge_word(example: Example, text: str) -> tuple[str | None, bool]:
    """Whether the first word is the one asked for; case counts only where it is all there is."""
    word = _first_word(text)
    if word is None:
        return None, False
    if example.answer.lower() == example.trap.lower():
        return word, word == example.answer
    return word, word.lower() == example.answer.lower()


def _word_is_over(text: str) -> bool:
    found = WORD.search(text)
    return "\n" in text or found is not None and found.end() < len(text)


# ---------------------------------------------------------------------------- GSM-Symbolic

_INSTRUCTION = (
    "As an expert problem solver, solve step by step the following mathematical questions."
)


def last_number(text: str) -> str | None:
    """The last number of a text, commas left out; as the benchmark's authors score."""
    numbers = NUMBER.findall(text.replace(",", ""))
    return numbers[-1] if numbers else None


def _gsm_row(number: int, row: Mapping[str, Any]) -> Example:
    answer = last_number(str(row["answer"]))
    if answer is None:
        raise ValueError("an answer without a number")
    template = str(row["id"])
    return Example(
        id=f"{template}-{row['instance']}",
        prompt=f"{_INSTRUCTION}\n\nQ: {_text(row['question'])}\nA: Let's think step by step.",
        cluster=template,
        answer=answer,
    )


def _judge_number(example: Example, text: str) -> tuple[str | None, bool]:
    number = last_number(text.split("Q:")[0])
    # As floats: many right answers look like 50.0.
    return number, number is not None and float(number) == float(example.answer)


# ---------------------------------------------------------------------------- competitions

_BOXED = "Please reason step by step, and put your final answer within \\boxed{}."
# What JSON makes of \frac, \binom and \triangle written with a single backslash.
_LOST_BACKSLASH = re.compile(r"[\b\v\f]|\t(?=riangle|imes|heta|ext|an\b|o\b)")


def _problem(row: Mapping[str, Any]) -> str:
    text = _text(row["problem"] if "problem" in row else row["question"])
    if _LOST_BACKSLASH.search(text):
        raise ValueError(
            "a control character where a LaTeX command was (\\frac, \\triangle, ...): this copy of"
            " the file is damaged"
        )
    return f"{text}\n{_BOXED}"


def _math_row(number: int, row: Mapping[str, Any]) -> Example:
    answer = str(row["answer"]).strip()
    if not answer:
        raise ValueError("its answer is empty")
    return Example(
        id=str(row.get("problem_id", number)),
        prompt=_problem(row),
        group=str(row["type"]),
        answer=answer,
    )


def _aime_row(number: int, row: Mapping[str, Any]) -> Example:
    row = {name.lower(): value for name, value in row.items()}  # some copies have Problem, Answer
    answer = str(row["answer"]).strip()
    if not re.fullmatch(r"\d{1,3}", answer):
        raise ValueError(f"its answer is {answer!r}; those of AIME are 0 to 999")
    return Example(id=str(row.get("id", number)), prompt=_problem(row), answer=answer)


def _judge_boxed(example: Example, text: str) -> tuple[str | None, bool]:
    answer = boxed(text)
    return answer, answer is not None and agree(answer, example.answer)


# ---------------------------------------------------------------------------- plain text


def _text_row(number: int, row: Mapping[str, Any]) -> Example:
    text = _text(row["prompt"] if "prompt" in row else row["text"])
    group = row.get("domain")
    return Example(
        id=str(row.get("id", number)),
        prompt=text,
        group=None if group is None else str(group),
    )


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError("its text is empty or no text")
    return value


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(
            name="memo-trap",
            title="Memo-Trap",
            read=_memo_trap_row,
            metrics={
                "likelihood": "the word asked for is likelier than the one that is known by heart",
                "generation": "greedy decoding says the word asked for",
            },
            max_new_tokens=8,
            judge=_judge_word,
            complete=_word_is_over,
            sha256=("918ce75c83a027e0",),
            note="The first subtask of Memo-Trap: 860 rows, of which 837 prompts are distinct.",
        ),
        Task(
            name="gsm-symbolic",
            title="GSM-Symbolic",
            read=_gsm_row,
            metrics={"generation": "the last number of the greedy answer is right"},
            max_new_tokens=512,
            judge=_judge_number,
            complete=lambda text: "Q:" in text,
            sha256=("f7d6701619f824f4",),
            note=(
                "Zero-shot, chain of thought. Rows of one template are not independent: intervals"
                " are clustered by template."
            ),
        ),
        Task(
            name="math-perturb",
            title="MATH-Perturb",
            read=_math_row,
            metrics={"generation": "the boxed answer of greedy decoding agrees with the right one"},
            max_new_tokens=2048,
            judge=_judge_boxed,
            sha256=("2130821d4235dc1f", "418ca51e02f3b639"),
            note=(
                "Zero-shot, asked to reason and to box the answer. Shares depend much on"
                " max_new_tokens: compare only those of the same. Its authors ask that nobody"
                " trains on it; adapting to a problem does, for as long as it is answered."
            ),
        ),
        Task(
            name="aime",
            title="AIME",
            read=_aime_row,
            metrics={"generation": "the boxed answer of greedy decoding is the right integer"},
            max_new_tokens=4096,
            judge=_judge_boxed,
            note=(
                "Zero-shot, asked to reason and to box the answer. A year has 30 problems, so one"
                " more of them right is 3.3 points."
            ),
        ),
        Task(
            name="text-halves",
            title="Text by halves",
            read=_text_row,
            metrics={"nll": "negative log-likelihood a token of the second half, after the first"},
            halves=True,
            sha256=("defd50018ab65a90",),
            note="The model adapts to the first half of a text; the second is scored behind it.",
        ),
        Task(
            name="text-stream",
            title="Text, scored and then trained on",
            read=_text_row,
            metrics={
                "nll": "negative log-likelihood a token, each segment scored before the weights"
                " train on it"
            },
            segment_tokens=64,
            steps=(0, 1),
            sha256=("defd50018ab65a90",),
            note=(
                "Dynamic evaluation: a text goes by in segments, each scored behind all that came"
                " before it, by weights that took so many steps on each earlier segment. Steps are"
                " those on each segment; the loss is that of the whole text under the last weights,"
                " which have seen it."
            ),
        ),
    )
}
