"""Parameter lists of real models, from their published configurations; tied weights appear once.

``TTT_FAST_BENCH`` says how much is measured: "quick" (`make bench`), "full" (`make bench-full`), or
"small", where every model is a tiny one: it shows that the benchmarks run, and its times mean
nothing.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

AMOUNTS = ("quick", "full", "small")
AMOUNT = os.environ.get("TTT_FAST_BENCH", "quick")
if AMOUNT not in AMOUNTS:
    raise ValueError(f"TTT_FAST_BENCH={AMOUNT!r} is unknown; use one of {', '.join(AMOUNTS)}.")
SMALL = AMOUNT == "small"


@dataclass(frozen=True)
class DecoderShape:
    """A Llama-like decoder. ``qkv_bias``: Qwen2's biases on the projections."""

    hidden: int
    layers: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool
    qkv_bias: bool = False

    def parameter_shapes(self) -> list[tuple[int, ...]]:
        """Shapes in the order of ``model.named_parameters()``."""
        query, key = self.heads * self.head_dim, self.kv_heads * self.head_dim
        shapes: list[tuple[int, ...]] = [(self.vocab, self.hidden)]
        for _ in range(self.layers):
            for width in (query, key, key):
                shapes.append((width, self.hidden))
                if self.qkv_bias:
                    shapes.append((width,))
            shapes.append((self.hidden, query))
            shapes += [(self.intermediate, self.hidden)] * 2 + [(self.hidden, self.intermediate)]
            shapes += [(self.hidden,)] * 2
        shapes.append((self.hidden,))
        if not self.tied:
            shapes.append((self.vocab, self.hidden))
        return shapes

    def config(self) -> Any:
        """The configuration of transformers' model of these shapes."""
        from transformers import LlamaConfig, Qwen2Config

        family = Qwen2Config if self.qkv_bias else LlamaConfig
        config = family(
            vocab_size=self.vocab,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            tie_word_embeddings=self.tied,
        )
        config.head_dim = self.head_dim
        return config


_REAL: dict[str, DecoderShape] = {
    "SmolLM2-135M": DecoderShape(576, 30, 1536, 9, 3, 64, 49152, tied=True),
    "SmolLM2-360M": DecoderShape(960, 32, 2560, 15, 5, 64, 49152, tied=True),
    "Qwen2.5-0.5B": DecoderShape(896, 24, 4864, 14, 2, 64, 151936, tied=True, qkv_bias=True),
    "Qwen2.5-1.5B": DecoderShape(1536, 28, 8960, 12, 2, 128, 151936, tied=True, qkv_bias=True),
    "Qwen2.5-3B": DecoderShape(2048, 36, 11008, 16, 2, 128, 151936, tied=True, qkv_bias=True),
    "Qwen2.5-7B": DecoderShape(3584, 28, 18944, 28, 4, 128, 152064, tied=False, qkv_bias=True),
    "Llama-3.2-1B": DecoderShape(2048, 16, 8192, 32, 8, 64, 128256, tied=True),
    "Llama-3.2-3B": DecoderShape(3072, 28, 8192, 24, 8, 128, 128256, tied=True),
    "Llama-3.1-8B": DecoderShape(4096, 32, 14336, 32, 8, 128, 128256, tied=False),
}
_TINY = DecoderShape(32, 2, 48, 4, 2, 8, 128, tied=True)
MODELS = {name: _TINY if SMALL else shape for name, shape in _REAL.items()}


# Models whose parameter lists are measured, as far as memory goes.
LISTS = list(MODELS) if AMOUNT == "full" else ["SmolLM2-135M"]


def parameter_count(model: str) -> int:
    """Numbers in a model, tied weights once."""
    return sum(math.prod(shape) for shape in MODELS[model].parameter_shapes())


def parameter_list(
    model: str,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    scale: float = 0.02,
    seed: int = 0,
) -> list[Tensor]:
    """Random tensors with the shapes of a model's parameters; ``device="meta"`` takes no memory."""
    shapes = MODELS[model].parameter_shapes()
    if device == "meta":
        return [torch.empty(shape, dtype=dtype, device="meta") for shape in shapes]
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(s, generator=generator) * scale).to(dtype) for s in shapes]


def load_model(name: str, dtype: torch.dtype) -> nn.Module:
    """SmolLM2-135M with its weights; any other model with random ones of its shapes."""
    if name == "SmolLM2-135M" and not SMALL:
        from ttt_fast.demo import load_demo_model

        return load_demo_model(dtype)[0]
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(MODELS[name].config(), dtype=dtype).eval()
