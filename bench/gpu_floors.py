"""What a step cannot take less than on some GPUs: computed from bytes and operations, not measured.

The cost model of ``engine="auto"`` (:mod:`ttt_fast.engines.cost`) with the speeds of data sheets in
place of measured ones: every product runs at the peak rate of bfloat16 tensor cores or at the peak
bandwidth, whichever takes longer, launches take nothing, nothing is read twice. A real run takes
longer, most of all with small models, whose launches take more than their work.

``python -m bench.documents`` writes the table of docs/benchmarks.md.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from bench.cases import Case, loop_bytes, workload
from bench.tables import number
from ttt_fast.engines.cost import (
    Machine,
    Workload,
    dense_bytes,
    dense_ms,
    factored_bytes,
    factored_ms,
    frozen_ms,
)

LABEL = "computed, not measured"
_NOTHING = 1e-9  # launches and the like; a Machine wants more than 0


@dataclass(frozen=True)
class Gpu:
    """A data sheet.

    Attributes:
        name: of the card.
        tflops: dense bfloat16 products, fp32 accumulation, without sparsity.
        gb_s: memory bandwidth.
        memory_gb: memory.
    """

    name: str
    tflops: float
    gb_s: float
    memory_gb: int

    def machine(self) -> Machine:
        """Its peak as the speeds of the cost model, bfloat16."""
        size = 2
        read_ns = size / self.gb_s  # of one number
        ridge = self.tflops * 1e12 * read_ns * 1e-9 / 2  # rows from which operations bind
        rows = (ridge, 10 * ridge)
        product_ns = (read_ns, 10 * read_ns)
        return Machine(
            dtype="bfloat16",
            source=f"data sheet of {self.name}, {LABEL}",
            copy_gb_s=self.gb_s,
            update_gb_s=self.gb_s,
            rows=rows,
            product_ns=product_ns,
            weight_gradient_ns=product_ns,
            gram_ns=product_ns,
            ranks=(1.0,),
            delta_slowdown=(1.0,),
            module_us=_NOTHING,
            # An input is read and an output written, forward and backward; logits likewise.
            element_ns=2 * read_ns,
            logit_ns=2 * read_ns,
            dense_module_us=_NOTHING,
            factored_module_us=_NOTHING,
        )


# NVIDIA's data sheets; H100 and H200 as SXM, A100 as SXM with 80 GB.
GPUS = (
    Gpu("H100", 989.0, 3350.0, 80),
    Gpu("H200", 989.0, 4800.0, 141),
    Gpu("A100", 312.0, 2039.0, 80),
    Gpu("L40S", 362.0, 864.0, 48),
    Gpu("RTX 4090", 165.0, 1008.0, 24),
)
MODELS = ("Qwen2.5-0.5B", "Qwen2.5-1.5B", "Qwen2.5-7B")
CASES = (Case(20, 10, 16), Case(64, 20, 1), Case(256, 10, 1))
# Passes over 16-bit numbers between backward and the next forward, clip and momentum, no decay:
# the norm 1, clip 2, and momentum times μ 2, plus the gradient 3, update 3; or one fused step 5.
TORCH_PASSES = {"torch foreach": 1 + 2 + 2 + 3 + 3, "torch fused": 1 + 2 + 5}
OUR_PASSES = 1 + 5  # what dense_ms counts: the norm, and g, W and momentum with two written back
COLUMNS = ("products alone", *TORCH_PASSES, "dense", "factored")


def floors_ms(gpu: Gpu, work: Workload) -> dict[str, float]:
    """Milliseconds of a step of a prompt for each way to do it."""
    machine = gpu.machine()
    dense = dense_ms(work, machine)
    extra = {
        name: 2e-6 * (passes - OUR_PASSES) * work.adapted_parameters / gpu.gb_s
        for name, passes in TORCH_PASSES.items()
    }
    return {
        "products alone": frozen_ms(work, machine, work.deltas) / work.deltas,
        **{name: dense + ms for name, ms in extra.items()},
        "dense": dense,
        "factored": factored_ms(work, machine),
    }


def memory_bytes(work: Workload) -> dict[str, int]:
    """Of each way to do it, the model's own weights included."""
    model = work.itemsize * sum(x.count * x.out * x.in_ for x in work.layers if not x.tied)
    loop = loop_bytes(work)
    # Ours as if the prompts took turns where they do, each restored before the next.
    alone = replace(work, deltas=1)
    return {
        "products alone": model,
        **dict.fromkeys(TORCH_PASSES, model + loop),
        "dense": model + sum(dense_bytes(alone).values()),
        "factored": model + sum(factored_bytes(work).values()),
    }


def table() -> str:
    """A table for each case as Markdown, labelled."""
    parts = []
    for case in CASES:
        works = {
            name: workload(replace(case, model=name, dtype="bfloat16")) for name in MODELS
        }  # fmt: skip
        what = "one prompt" if case.D == 1 else f"{case.D} prompts"
        lines = [
            f"**{what} of {case.T} tokens, K = {case.K}, bfloat16: ms a step of a prompt,"
            f" {LABEL}**\n",
            f"| GPU | model | {' | '.join(COLUMNS)} |",
            "|---" * (2 + len(COLUMNS)) + "|",
        ]
        for gpu in GPUS:
            for name, work in works.items():
                lines.append(f"| {gpu.name} | {name} | {' | '.join(_cells(gpu, work))} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _cells(gpu: Gpu, work: Workload) -> list[str]:
    floors, needed = floors_ms(gpu, work), memory_bytes(work)
    return [
        number(floors[name]) if needed[name] <= gpu.memory_gb * 1e9 else "no memory"
        for name in COLUMNS
    ]
