"""Peak resident memory of one adaptation in a fresh process.

    python -m bench.peak_memory CASE DTYPE

CASE is "naive" or where ours keeps the weights: "device", "host", "undo". Prints one JSON object.
"""

from __future__ import annotations

import json
import sys

import torch

from ttt_fast import TTTConfig, TTTTrainer
from ttt_fast.demo import load_demo_model
from ttt_fast.naive import naive_adapt


def main(case: str, dtype_name: str) -> None:
    """Adapt twice (the second prompt must not need more) and print the peak."""
    from bench.bench_adapt import OPTIONS, prompt

    model, _ = load_demo_model(getattr(torch, dtype_name))
    for param in model.parameters():
        param.data = param.data.clone()  # out of the file mapping: pages that are all resident
    ids = prompt()
    peaks: list[int] = []
    for _ in range(2):
        if case == "naive":
            result = naive_adapt(model, ids, **OPTIONS)
            result.restore()
            peak_bytes = result.phases.peak_bytes
            del result
        else:
            if not peaks:
                trainer = TTTTrainer(model, TTTConfig(snapshot=case, **OPTIONS))
            with trainer.adapt(ids) as adapted:
                peak_bytes = adapted.peak_bytes
        peaks.append(max(peak for peak in peak_bytes.values() if peak is not None))
    weights_bytes = sum(p.nbytes for p in model.parameters())
    print(json.dumps({"peak_bytes": peaks[0], "stated_bytes": 3 * weights_bytes}))


if __name__ == "__main__":
    main(*sys.argv[1:])
