"""A tiny model with a tokenizer, and rows of our own for every task of the study."""

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from tests.families import tiny_model
from ttt_fast.study import Setting, StudyReport

WORDS = (
    "write a quote that ends in the word heavy light stone river absence makes heart grow fonder"
    " cat sat on mat Q A Let s think step by 1 2 3 4 5 6 7 8 9 10 . : , \" ' ? As an expert problem"
    " solver solve following mathematical questions how many apples are there and pears"
).split()


def tokenizer() -> PreTrainedTokenizerFast:
    """Words to ids; what it does not know is <unk>."""
    words = dict.fromkeys(["<pad>", "<unk>", "</s>", *WORDS])
    model = models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", pad_token="<pad>", eos_token="</s>"
    )


def model(dtype: torch.dtype = torch.float32, **overrides: Any) -> PreTrainedModel:
    """A tiny Llama that never ends an answer by itself."""
    options = {"num_hidden_layers": 2, "pad_token_id": 0, "attn_implementation": "sdpa"}
    found = tiny_model("llama_tied", dtype, **(options | overrides))
    found.generation_config.eos_token_id = None
    return found


def memo_trap_rows(n: int = 6) -> list[dict[str, Any]]:
    """Prompts of different lengths; the right option stands first and second in turn."""
    middles = ["the cat sat on the", "absence makes the heart grow", "a stone in the river"]
    rows = []
    for i in range(n):
        classes, right = [[" heavy.", " light."], [" stone.", " mat."]][i % 2], i % 2
        asked = classes[right].strip(" .")
        prompt = f'write a quote that ends in the word "{asked}": {middles[i % 3]}' + " cat" * i
        rows.append({"id": f"row-{i}", "prompt": prompt, "classes": classes, "answer_index": right})
    return rows


def gsm_rows(n_templates: int = 2, n_instances: int = 2) -> list[dict[str, Any]]:
    """Questions of a few templates."""
    return [
        {
            "id": template,
            "instance": instance,
            "question": f"how many apples are there : {instance} and {template} pears ?",
            "answer": f"{instance} and 1,00{template} make\n#### 1,00{template}.0",
        }
        for template in range(n_templates)
        for instance in range(n_instances)
    ]


def math_rows() -> list[dict[str, Any]]:
    """In the format of MATH-Perturb's files, where an answer may be a number."""
    common = {"level": "Level 5", "original_split": "test"}
    return [
        {"problem_id": 2, "problem": "What is a third of one half?", "answer": "\\frac{1}{6}",
         "type": "Algebra", **common},
        {"problem_id": 5, "problem": "What is $1+2$?", "answer": 3, "type": "Algebra", **common},
        {"problem_id": 9, "problem": "Halve a half.", "answer": 0.25, "type": "Precalculus",
         **common},
    ]  # fmt: skip


def aime_rows() -> list[dict[str, Any]]:
    """In the formats of the copies that are about."""
    return [
        {"id": 60, "problem": "Find $xy$ where $x = y = 5$.", "solution": "", "answer": "25",
         "url": "", "year": "2024"},
        {"ID": "2024-II-4", "Problem": "Find the remainder.", "Solution": "", "Answer": "033"},
    ]  # fmt: skip


def text_rows(n: int = 4) -> list[dict[str, Any]]:
    """Texts of two domains."""
    text = "the cat sat on the mat and absence makes the heart grow fonder"
    return [
        {"id": f"text-{i}", "domain": "ab"[i % 2], "prompt": " ".join([text, *WORDS[i : i + 6]])}
        for i in range(n)
    ]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    """A file of JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def line(
    prompt: str, setting: Setting, step: int, right: bool = True, loss: float = 2.0, **values: Any
) -> dict[str, Any]:
    """A result made up: right or wrong by both metrics, all else plausible."""
    shown = {"likelihood": right, "generation": right}
    return {
        "prompt": prompt, "setting": setting.as_dict(), "step": step, "loss": loss,
        "grad_norm": 1.0 + step, "delta_norm": setting.lr * step, "update_landed": 1.0,
        "diverged_at": None, "correct": shown,
    } | values  # fmt: skip


def report_of(lines: list[dict[str, Any]], task: str = "memo-trap") -> StudyReport:
    """Their report."""
    identity = {"task": task, "seed": 3, "dtype": "bfloat16", "weights": "[7]"}
    about = {"model": "a<b>", "file": "rows.jsonl", "known_file": True, "versions": {"torch": "9"}}
    return StudyReport(lines, {"identity": identity, "about": about, "prompts": 9}, "the plan")
