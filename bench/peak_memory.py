"""Peak resident memory of one adaptation, in a fresh process.

    python -m bench.peak_memory SIDE '{"T": 64, "K": 10, "D": 1}'

SIDE is "naive", "auto", "dense", "factored", or where the dense engine keeps the weights: "host",
"undo". The case is the fields of :class:`bench.cases.Case`. Prints one JSON object: the peak above
the model, and the bytes that are stated for it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, replace
from typing import Any

from bench import cases
from bench.cases import OPTIONS, Case
from bench.documents import ROOT
from bench.shapes import SMALL, load_model
from ttt_fast import TTTTrainer
from ttt_fast.engines import cost
from ttt_fast.naive import naive_adapt

# Peaks of the loop do not depend on the steps after the second.
LOOP_STEPS = 2


def measure(side: str, case: Case) -> dict[str, Any]:
    """Adapt and return the peak above the model, in this process."""
    model = load_model(case.model, case.torch_dtype)
    for param in model.parameters():
        param.data = param.data.clone()  # out of the file mapping: pages that are all resident
    work = cases.workload_of(model, case)
    ids = case.prompts()
    if side == "naive":
        params = [selection.param for selection in TTTTrainer(model, case.config()).selections]
        steps = min(case.K, LOOP_STEPS)
        result = naive_adapt(model, ids[:1], params=params, steps=steps, **OPTIONS)
        result.restore()
        peaks, stated = result.phases.peak_bytes, cases.loop_bytes(work)
    else:
        where = {"snapshot": side} if side in ("host", "undo") else {}
        config = replace(case.config("dense" if where else side), **where)
        trainer = TTTTrainer(model, config)
        engine = trainer.plan(case.D, case.T).engine
        with trainer.adapt(ids, deltas="independent") as adapted:
            peaks = adapted.peak_bytes
        count = cost.factored_bytes if engine == "factored" else cost.dense_bytes
        stated = sum(count(work).values())
    return {
        "peak_bytes": max(peak for peak in peaks.values() if peak is not None),
        "stated_bytes": stated,
    }


def in_fresh_process(side: str, case: Case) -> dict[str, Any]:
    """As :func:`measure`, where nothing else has touched memory; small cases stay here."""
    if SMALL:
        return measure(side, case)
    command = [sys.executable, "-m", "bench.peak_memory", side, json.dumps(asdict(case))]
    output = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT)
    return json.loads(output.stdout)


def main(side: str, case: str) -> None:
    """Print the peak."""
    print(json.dumps(measure(side, Case(**json.loads(case)))))


if __name__ == "__main__":
    main(*sys.argv[1:])
