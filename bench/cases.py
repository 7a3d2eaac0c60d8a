"""The adaptations that are measured, fixed before the first measurement, and the cap on them.

One axis at a time around the centre (T = 64, K = 20, 4 deltas, all parameters, float32), and four
corners. A case over the cap of operations or memory, which the cost model of ``engine="auto"``
predicts without running it, is listed as not run.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from bench.shapes import AMOUNT, MODELS, SMALL
from ttt_fast import TTTConfig, TTTTrainer
from ttt_fast.engines import cost, policy

OPTIONS: dict[str, Any] = {"lr": 1e-4, "momentum": 0.9, "max_grad_norm": 10.0}


@dataclass(frozen=True)
class Case:
    """One adaptation.

    Attributes:
        T: tokens of a prompt.
        K: steps.
        D: deltas, each of one prompt.
        scope: what adapts.
        dtype: of the weights.
        model: whose weights or shapes.
        name: of a corner.
        layers: decoder layers that adapt, in the words of TTTConfig; "" for the whole scope.
    """

    T: int = 64
    K: int = 20
    D: int = 4
    scope: str = "all"
    dtype: str = "float32"
    model: str = "SmolLM2-135M"
    name: str = ""
    layers: str = ""

    def __str__(self) -> str:
        deltas = "one prompt" if self.D == 1 else f"{self.D} prompts"
        text = f"{self.model}, {self.dtype}, {deltas}, T = {self.T}, K = {self.K}, {self.scope}"
        text += f", layers {self.layers}" if self.layers else ""
        return f"{self.name}: {text}" if self.name else text

    @property
    def torch_dtype(self) -> torch.dtype:
        """Of the weights."""
        return getattr(torch, self.dtype)

    def config(self, engine: str = "auto", steps: int | None = None) -> TTTConfig:
        """Our settings for it; fewer ``steps`` to warm up."""
        steps = self.K if steps is None else steps
        layers = self.layers or None
        return TTTConfig(steps=steps, scope=self.scope, layers=layers, engine=engine, **OPTIONS)

    def prompts(self) -> Tensor:
        """The same (D, T) ids everywhere: SmolLM2's of its built-in prompts, else random ones."""
        generator = torch.Generator().manual_seed(0)
        if self.model != "SmolLM2-135M" or SMALL:
            vocabulary = MODELS[self.model].vocab
            return torch.randint(3, vocabulary, (self.D, self.T), generator=generator)
        from transformers import AutoTokenizer

        from ttt_fast.demo import PROMPTS, demo_model_folder

        tokenizer = AutoTokenizer.from_pretrained(demo_model_folder())
        text = torch.cat([torch.tensor(tokenizer(prompt).input_ids) for prompt in PROMPTS])
        return text.repeat(1 + self.D * self.T // len(text))[: self.D * self.T].view(self.D, self.T)


CENTRE = Case()
AXES: dict[str, tuple[Any, ...]] = {
    "T": (16, 64, 256, 1024),
    "K": (1, 5, 20, 100),
    "D": (1, 4, 16, 64),
    "scope": ("all", "ffn", "attention", "query"),
    "dtype": ("float32", "bfloat16"),
}
CORNERS = (
    Case(20, 10, 1, name="one question"),
    Case(20, 10, 16, name="many questions"),
    Case(20, 10, 16, dtype="bfloat16", name="many questions in 16 bits"),
    Case(1024, 2, 1, name="a document"),
)
# Beside the sweep: between the corners, and parts of the model for many prompts.
BETWEEN = (
    Case(64, 10, 1),
    Case(256, 4, 1),
    Case(20, 10, 16, "attention"),
    Case(20, 10, 16, "ffn"),
)
# Shapes with random weights; 1.5B in float32 would not fit beside its loop.
LARGER = (("Qwen2.5-0.5B", "float32"), ("Qwen2.5-0.5B", "bfloat16"), ("Qwen2.5-1.5B", "bfloat16"))


def sweep() -> list[Case]:
    """The centre, the other points of each axis, and the corners."""
    around = [
        replace(CENTRE, **{axis: value})
        for axis, values in AXES.items()
        for value in values
        if value != getattr(CENTRE, axis)
    ]
    return [CENTRE, *around, *CORNERS]


def cases() -> list[Case]:
    """What ``TTT_FAST_BENCH`` asks for; "small" is a part of it with few tokens and steps."""
    if SMALL:
        small = [replace(CENTRE, T=8, K=2, D=2), replace(CORNERS[0], T=8, K=2)]
        return [*small, replace(CENTRE, T=4096)]
    larger = [replace(case, model=m, dtype=d) for m, d in LARGER for case in (CENTRE, *CORNERS[:2])]
    return [*sweep(), *BETWEEN, *larger] if AMOUNT == "full" else sweep()


# ---------------------------------------------------------------------------- what a case takes


@dataclass(frozen=True)
class Cap:
    """The most that a case may take.

    Attributes:
        operations: of forward, backward and gradients of all its prompts.
        memory_bytes: above the model, of the loop or of ours, whichever needs more.
    """

    operations: float
    memory_bytes: int

    def __str__(self) -> str:
        return f"{self.operations:.1e} operations and {self.memory_bytes / 2**30:.0f} GiB"


# Quick: about six and a half minutes for all on two cores. Full: some hours.
CAPS = {"quick": Cap(2.7e12, 6 << 30), "full": Cap(1e14, 14 << 30), "small": Cap(1e9, 1 << 30)}
CAP = CAPS[AMOUNT]


def over_cap(case: Case, cap: Cap = CAP) -> str:
    """Why a case is not run, "" if it is."""
    work = workload(case)
    found = []
    if operations(work) > cap.operations:
        found.append(f"{operations(work):.1e} operations")
    if memory_bytes(work) > cap.memory_bytes:
        found.append(f"{memory_bytes(work) / 2**30:.0f} GiB")
    return " and ".join(found)


def fitting(choice: policy.Choice, cap: Cap = CAP) -> list[str]:
    """The engines whose memory is within the cap; a case that is run has one at least."""
    return [name for name, size in choice.predicted_bytes.items() if size <= cap.memory_bytes]


def workload(case: Case) -> cost.Workload:
    """The numbers of a case, from its shapes: no weight is allocated."""
    return workload_of(meta_model(case.model, case.torch_dtype), case)


def workload_of(model: nn.Module, case: Case) -> cost.Workload:
    """The numbers of a case with a model that is there, on the meta device or not."""
    trainer = TTTTrainer(model, case.config())
    return policy.workload(model, trainer.selections, trainer.config, case.D, case.T)


@cache
def meta_model(name: str, dtype: torch.dtype) -> nn.Module:
    """A model without memory."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(MODELS[name].config(), dtype=dtype).eval()


def operations(work: cost.Workload) -> float:
    """Multiplications and additions of all prompts and steps, with each gradient formed once."""
    weights = work.forward_weights + work.backward_weights + work.gradient_weights
    return 2.0 * work.deltas * work.steps * work.tokens * weights


def memory_bytes(work: cost.Workload) -> int:
    """Above the model: the loop's, or what the leaner of our engines needs, if that is more."""
    ours = min(sum(cost.dense_bytes(work).values()), sum(cost.factored_bytes(work).values()))
    return max(loop_bytes(work), ours)


def loop_bytes(work: cost.Workload) -> int:
    """What the naive loop needs: one prompt at a time, with every gradient whole."""
    # rounding="torch" is the dense engine that forms each of them.
    alone = replace(work, deltas=1, rounding="torch")
    return sum(cost.dense_bytes(alone).values())
