"""Parameter lists of real models, from their published configurations; tied weights appear once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


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


MODELS: dict[str, DecoderShape] = {
    "SmolLM2-135M": DecoderShape(576, 30, 1536, 9, 3, 64, 49152, tied=True),
    "SmolLM2-360M": DecoderShape(960, 32, 2560, 15, 5, 64, 49152, tied=True),
    "Qwen2.5-0.5B": DecoderShape(896, 24, 4864, 14, 2, 64, 151936, tied=True, qkv_bias=True),
    "Llama-3.2-1B": DecoderShape(2048, 16, 8192, 32, 8, 64, 128256, tied=True),
    "Qwen2.5-3B": DecoderShape(2048, 36, 11008, 16, 2, 128, 151936, tied=True, qkv_bias=True),
    "Llama-3.1-8B": DecoderShape(4096, 32, 14336, 32, 8, 128, 128256, tied=False),
}


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
