"""A tiny model with a tokenizer, and rows of our own for every task of the study."""

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from tests.families import tiny_model

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
