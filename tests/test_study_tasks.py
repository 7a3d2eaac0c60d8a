"""Rows of every task: read, refused, encoded and judged."""

import hashlib
import json
import re
from dataclasses import replace

import pytest
import torch

from tests import study_cases as cases
from ttt_fast.study.tasks import TASKS, Example, find_task, last_number, load_examples

ROWS = {
    "memo-trap": cases.memo_trap_rows,
    "gsm-symbolic": cases.gsm_rows,
    "math-perturb": cases.math_rows,
    "aime": cases.aime_rows,
    "text-halves": cases.text_rows,
    "text-stream": cases.text_rows,
}


def loaded(tmp_path, task, rows=None, **options):
    path = cases.write_rows(tmp_path / "rows.jsonl", ROWS[task]() if rows is None else rows)
    return load_examples(TASKS[task], path, **options)


@pytest.mark.parametrize("task", TASKS)
def test_rows_in_their_order(tmp_path, task):
    found = loaded(tmp_path, task)
    assert len(found.rows) == len(ROWS[task]())
    assert not found.known
    assert found.sha256 == hashlib.sha256((tmp_path / "rows.jsonl").read_bytes()).hexdigest()


def test_a_memo_trap_row(tmp_path):
    second = loaded(tmp_path, "memo-trap").rows[1]
    assert second.options == (" stone.", " mat.")
    assert (second.answer_index, second.answer, second.trap) == (1, "mat", "stone")


def test_a_gsm_row_is_of_its_template(tmp_path):
    rows = loaded(tmp_path, "gsm-symbolic").rows
    assert [row.cluster for row in rows] == ["0", "0", "1", "1"]
    assert [row.id for row in rows] == ["0-0", "0-1", "1-0", "1-1"]
    assert rows[2].answer == "1001.0"
    assert rows[0].prompt.endswith("A: Let's think step by step.")


def test_a_known_file_is_known(tmp_path, monkeypatch):
    path = cases.write_rows(tmp_path / "rows.jsonl", cases.text_rows())
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    task = replace(TASKS["text-halves"], sha256=("0" * 16, digest[:16]))
    assert load_examples(task, path).known
    assert load_examples(task, path, sha256=digest[:8].upper())
    path.write_bytes(path.read_bytes() + b"\n")
    assert not load_examples(task, path).known
    with pytest.raises(ValueError, match="was asked for"):
        load_examples(task, path, sha256=digest[:8])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "no row in it"),
        (cases.gsm_rows(), "line 1 is no row of task 'memo-trap': no field 'classes'"),
        ([cases.memo_trap_rows()[0], {"prompt": "x"}], "line 2"),
        ([cases.memo_trap_rows()[0]] * 2, "line 2 has the id 'row-0' of line 1"),
        ([cases.memo_trap_rows()[0] | {"classes": [" a"]}], "two classes"),
        ([cases.memo_trap_rows()[0] | {"answer_index": 2}], "two classes"),
        ([cases.memo_trap_rows()[0] | {"classes": [" .", " a"]}], "without a word"),
        ([cases.memo_trap_rows()[0] | {"prompt": " "}], "empty"),
        ([[1, 2]], "a list, not an object"),
    ],
)
def test_rows_of_another_file(tmp_path, rows, message):
    with pytest.raises(ValueError, match=message):
        loaded(tmp_path, "memo-trap", rows)


@pytest.mark.parametrize(
    ("task", "change", "message"),
    [
        ("aime", {"answer": "1000"}, "'1000'; those of AIME are 0 to 999"),
        ("aime", {"answer": "336^\\circ"}, "those of AIME are"),
        ("aime", {"problem": ""}, "empty"),
        ("aime", {"problem": "with \frac{1}{2}"}, "this copy of the file is damaged"),
        ("aime", {"problem": "the \triangle ABC"}, "this copy of the file is damaged"),
        ("math-perturb", {"answer": " "}, "answer is empty"),
    ],
)
def test_rows_of_a_damaged_file(tmp_path, task, change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        loaded(tmp_path, task, [ROWS[task]()[0] | change])


def test_a_math_row_asks_for_a_box(tmp_path):
    first, second, third = loaded(tmp_path, "math-perturb").rows
    assert first.prompt.startswith("What is a third of one half?\nPlease reason step by step")
    assert first.prompt.endswith("\\boxed{}.")
    assert (first.id, first.group, first.answer) == ("2", "Algebra", "\\frac{1}{6}")
    assert (second.answer, third.answer) == ("3", "0.25")  # numbers in the file


def test_an_aime_row_with_either_spelling(tmp_path):
    first, second = loaded(tmp_path, "aime").rows
    assert (first.id, first.answer) == ("60", "25")
    assert (second.id, second.answer) == ("2024-II-4", "033")
    assert second.prompt.startswith("Find the remainder")


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "no row"), (b"\n \n", "no row"), (b"prompt,classes\n", "line 1 is not JSON"),
     (b"\xff\xfe", "not a text file")],
)  # fmt: skip
def test_files_that_are_not_json_lines(tmp_path, content, message):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_examples(TASKS["memo-trap"], path)


def test_line_separators_inside_a_string_end_no_line(tmp_path):
    row = cases.text_rows()[0] | {"prompt": "the cat\u2028sat on the mat"}
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row, ensure_ascii=False), encoding="utf-8")
    assert len(load_examples(TASKS["text-halves"], path).rows) == 1


def test_unknown_task():
    with pytest.raises(ValueError, match="'memo' is unknown; use one of memo-trap, gsm-symbolic"):
        find_task("memo")


# ---------------------------------------------------------------------------- tokens


def test_options_are_what_follows_the_prompt(tmp_path):
    tokenizer = cases.tokenizer()
    example = loaded(tmp_path, "memo-trap").rows[0]
    encoded = TASKS["memo-trap"].encode(example, tokenizer)
    assert encoded.prompt.tolist() == tokenizer(example.prompt)["input_ids"]
    assert [tokenizer.decode(option) for option in encoded.continuations] == ["heavy .", "light ."]


def test_halves_are_the_whole_text(tmp_path):
    tokenizer = cases.tokenizer()
    example = loaded(tmp_path, "text-halves").rows[1]
    encoded = TASKS["text-halves"].encode(example, tokenizer)
    both = torch.cat([encoded.prompt, *encoded.continuations])
    assert both.tolist() == tokenizer(example.prompt)["input_ids"]
    assert encoded.prompt.numel() == both.numel() // 2


def test_chat(tmp_path):
    tokenizer = cases.tokenizer()
    tokenizer.chat_template = "{% for m in messages %}Q : {{ m['content'] }} A :{% endfor %}"
    example = loaded(tmp_path, "memo-trap").rows[0]
    encoded = TASKS["memo-trap"].encode(example, tokenizer, chat=True)
    plain = TASKS["memo-trap"].encode(example, tokenizer)
    assert tokenizer.decode(encoded.prompt[:2]) == "Q :"
    assert encoded.prompt.numel() == plain.prompt.numel() + 4
    assert encoded.continuations[0].tolist() == plain.continuations[0].tolist()


# ---------------------------------------------------------------------------- what is right

WORD = Example("x", "p", answer="heavy", trap="fonder")
CASE = Example("x", "p", answer="End", trap="end")
SUM = Example("x", "p", answer="50.0")
AIME = Example("x", "p", answer="033")
SIXTH = Example("x", "p", answer="\\frac{1}{6}")


@pytest.mark.parametrize(
    ("task", "example", "text", "expected"),
    [
        ("memo-trap", WORD, " heavy.", ("heavy", True)),
        ("memo-trap", WORD, ' "Heavy" and fonder', ("Heavy", True)),
        ("memo-trap", WORD, " fonder, heavy", ("fonder", False)),
        ("memo-trap", WORD, " heavyweight", ("heavyweight", False)),
        ("memo-trap", WORD, " ...", (None, False)),
        ("memo-trap", CASE, " End.", ("End", True)),
        ("memo-trap", CASE, " end.", ("end", False)),  # the trap differs by its case only
        ("gsm-symbolic", SUM, "so 25 + 25 = 50", ("50", True)),
        ("gsm-symbolic", SUM, "50.00.", ("50.00", True)),
        ("gsm-symbolic", SUM, "it is 1,050", ("1050", False)),
        ("gsm-symbolic", SUM, "it is 50.\n\nQ: 7 apples", ("50", True)),
        ("gsm-symbolic", SUM, "no idea", (None, False)),
        ("gsm-symbolic", SUM, "-50", ("-50", False)),
        ("aime", AIME, "so $m+n = \\boxed{33}$.", ("33", True)),
        ("aime", AIME, "\\boxed{34}, no: \\boxed{033}", ("033", True)),
        ("aime", AIME, "\\boxed{33}, no: \\boxed{34}", ("34", False)),
        ("aime", AIME, "the answer is 33", (None, False)),
        ("math-perturb", SIXTH, "\\boxed{1/6}", ("1/6", True)),
        ("math-perturb", SIXTH, "\\boxed{0.1667}", ("0.1667", False)),
    ],
)
def test_judgement(task, example, text, expected):
    assert TASKS[task].judge(example, text) == expected


def test_last_number():
    assert last_number("#### 1,234.5") == "1234.5"
    assert last_number("none") is None


@pytest.mark.parametrize(
    ("text", "over"), [(" hea", False), (" heavy", False), (" heavy.", True), (" \n", True)]
)
def test_a_word_is_over(text, over):
    assert TASKS["memo-trap"].complete(text) == over


# ---------------------------------------------------------------------------- the real files


@pytest.mark.data
@pytest.mark.parametrize(
    ("task", "name", "count"),
    [("memo-trap", "memo_trap", 860), ("gsm-symbolic", "gsm_symbolic_p2", 2500),
     ("text-halves", "text_domains", 180), ("text-stream", "text_domains", 180)],
)  # fmt: skip
def test_the_files_that_the_loaders_were_written_for(data_dir, task, name, count):
    found = load_examples(TASKS[task], data_dir / f"{name}.jsonl")
    assert found.known
    assert len(found.rows) == count


@pytest.mark.data
def test_gold_answers_are_right(data_dir):
    task = TASKS["memo-trap"]
    for example in load_examples(task, data_dir / "memo_trap.jsonl").rows:
        right, wrong = example.answer_index, 1 - example.answer_index
        assert task.judge(example, example.options[right])[1]
        assert not task.judge(example, example.options[wrong])[1]
    task = TASKS["gsm-symbolic"]
    path = data_dir / "gsm_symbolic_p2.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines()
    for line, example in zip(lines, load_examples(task, path).rows, strict=True):
        assert task.judge(example, json.loads(line)["answer"])[1]
