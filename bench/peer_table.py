"""What each peer can do, as the table of docs/benchmarks.md; tests/test_peers.py shows every "no".

python -m bench.peer_table          # prints it
"""

from __future__ import annotations

QUESTIONS = {
    "update": "numbers of `clip_grad_norm_` + `SGD`",
    "clip": "clip by the global norm",
    "release": "clip without all gradients at once",
    "momentum": "momentum",
    "restore": "exact restore",
    "prompts": "independent prompts at once",
    "tied": "tied weights",
}
COPY = "by a copy of the weights"

# Each answer begins with yes, no, or only; MeZO, our writing of a paper, has no package.
ANSWERS: dict[str, dict[str, str]] = {
    "naive loop; torch SGD, foreach or fused": {
        "update": "yes",
        "clip": "yes",
        "release": "no: the norm needs all of them",
        "momentum": "yes",
        "restore": f"yes, {COPY}",
        "prompts": "no: one set of weights",
        "tied": "yes",
    },
    "torch-optimi 0.3, gradient release": {
        "update": "only without clip",
        "clip": "no: weights change before the norm is known",
        "release": "no",
        "momentum": "yes",
        "restore": f"yes, {COPY}",
        "prompts": "no: one set of weights",
        "tied": "yes",
    },
    "lomo-optim 0.1": {
        "update": "only without momentum",
        "clip": "yes",
        "release": "yes, by a second backward pass",
        "momentum": "no: no such argument",
        "restore": f"yes, {COPY}; its hooks stay on the parameters",
        "prompts": "no: one set of weights",
        "tied": "yes",
    },
    "opacus 1.6, ghost clipping": {
        "update": "yes, of one prompt",
        "clip": "yes, of each row",
        "release": "no: its second backward pass forms them",
        "momentum": "yes",
        "restore": f"yes, {COPY}",
        "prompts": "no: clips each row, trains one set of weights",
        "tied": "no: NotImplementedError",
    },
    "peft LoRA, AdamW": {
        "update": "no: low rank, AdamW",
        "clip": "yes, of the adapters",
        "release": "no: the norm needs all of them, which are small",
        "momentum": "yes, AdamW's",
        "restore": "yes, the weights are not written",
        "prompts": "only in eval mode (`adapter_names`)",
        "tied": "yes, adapting the linear layers of the blocks",
    },
    "torch-ttt 0.0.2": {
        "update": "no: Adam is its only optimizer",
        "clip": "no: no place for it",
        "release": "no",
        "momentum": "no: Adam is its only optimizer",
        "restore": "yes, it trains a deep copy, which it drops with the answer",
        "prompts": "no: one loss for all",
        "tied": "yes",
    },
    "MeZO": {
        "update": "no: zeroth order",
        "clip": "no: no gradient",
        "release": "no: no gradient",
        "momentum": "no: it would be as large as the weights",
        "restore": "no: walking back rounds, so by a copy of the weights",
        "prompts": "no: one set of weights",
        "tied": "yes",
    },
    "ttt_fast": {
        "update": "yes",
        "clip": "yes",
        "release": "yes, from factors",
        "momentum": "yes",
        "restore": "yes; nothing is written with the factored engine",
        "prompts": "yes",
        "tied": "yes",
    },
}


def table() -> str:
    """Return the answers as Markdown."""
    lines = ["| | " + " | ".join(QUESTIONS.values()) + " |", "|---" * (len(QUESTIONS) + 1) + "|"]
    for name, answers in ANSWERS.items():
        lines.append(f"| {name} | " + " | ".join(answers[key] for key in QUESTIONS) + " |")
    return "\n".join(lines)
