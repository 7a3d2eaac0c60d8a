"""Peak resident memory of one adaptation in a fresh process.

    python -m bench.peak_memory CASE DTYPE [TOKENS STEPS]

CASE is "naive", "factored", or where the dense engine keeps the weights: "device", "host", "undo".
Prints one JSON object: the peak above the model, and the bytes that are stated for it.
"""

from __future__ import annotations

import json
import sys

import torch

from ttt_fast import TTTConfig, TTTTrainer
from ttt_fast.demo import load_demo_model
from ttt_fast.engines import policy
from ttt_fast.naive import naive_adapt


def main(case: str, dtype_name: str, tokens: str = "64", steps: str = "10") -> None:
    """Adapt and print the peak."""
    from bench.bench_adapt import OPTIONS, prompt

    options = {**OPTIONS, "steps": int(steps)}
    ids = prompt()[:, : int(tokens)]
    if ids.shape[1] != int(tokens):
        raise ValueError(f"peak_memory: tokens={tokens}; at most {ids.shape[1]}.")
    model, _ = load_demo_model(getattr(torch, dtype_name))
    for param in model.parameters():
        param.data = param.data.clone()  # out of the file mapping: pages that are all resident
    stated = {"weights, gradients, momentum": 3 * sum(p.nbytes for p in model.parameters())}
    if case == "naive":
        result = naive_adapt(model, ids, **options)
        result.restore()
        peak_bytes = result.phases.peak_bytes
    else:
        where = {"engine": case} if case == "factored" else {"engine": "dense", "snapshot": case}
        trainer = TTTTrainer(model, TTTConfig(**where, **options))
        if case == "factored":
            work = policy.workload(model, trainer.selections, trainer.config, 1, ids.shape[1])
            stated = policy.factored_bytes(work)
        with trainer.adapt(ids) as adapted:
            peak_bytes = adapted.peak_bytes
    print(
        json.dumps(
            {
                "peak_bytes": max(peak for peak in peak_bytes.values() if peak is not None),
                "stated_bytes": sum(stated.values()),
                "stated": ", ".join(f"{use} {n / 2**20:.0f}" for use, n in stated.items()),
            }
        )
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
