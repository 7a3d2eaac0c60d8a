"""Tiny randomly initialised models of every supported family, for everybody's tests.

`tiny_model("llama")` builds in milliseconds and needs no download. What makes real models differ
is kept: grouped-query attention, heads * head_dim unlike the hidden size (Qwen3, Gemma), sliding
windows, soft caps, fused projections, tied and untied heads, padding_idx, biases, experts. Dropout
is on in the families that have it by default, so that code which forgets eval mode shows.
"""

from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    Phi3Config,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
)

# What every family takes under these names; token ids have to lie inside the tiny vocabulary.
_COMMON = dict(
    vocab_size=101,
    max_position_embeddings=64,
    bos_token_id=1,
    eos_token_id=2,
    tie_word_embeddings=False,
)
_LLAMA_LIKE = _COMMON | dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
)
_GEMMA = _LLAMA_LIKE | dict(
    head_dim=16,
    query_pre_attn_scalar=16,
    sliding_window=8,
    pad_token_id=0,
    tie_word_embeddings=True,
)

# family -> (config class, its tiny values)
FAMILIES: dict[str, tuple[Callable[..., PretrainedConfig], dict[str, Any]]] = {
    "llama": (LlamaConfig, _LLAMA_LIKE),
    "llama_tied": (LlamaConfig, _LLAMA_LIKE | dict(tie_word_embeddings=True)),
    "qwen2": (Qwen2Config, _LLAMA_LIKE | dict(tie_word_embeddings=True)),
    "qwen3": (Qwen3Config, _LLAMA_LIKE | dict(head_dim=16)),
    "mistral": (MistralConfig, _LLAMA_LIKE | dict(sliding_window=8)),
    "gemma2": (Gemma2Config, _GEMMA),
    "gemma3": (Gemma3TextConfig, _GEMMA | dict(sliding_window_pattern=2)),
    "phi3": (Phi3Config, _LLAMA_LIKE | dict(pad_token_id=0)),
    "gpt2": (
        GPT2Config,
        dict(
            vocab_size=101,
            n_positions=64,
            n_embd=32,
            n_layer=3,
            n_head=4,
            bos_token_id=1,
            eos_token_id=2,
            resid_pdrop=0.1,
            embd_pdrop=0.1,
            attn_pdrop=0.1,
        ),
    ),
    "gpt_neox": (
        GPTNeoXConfig,
        _COMMON
        | dict(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            attention_dropout=0.1,
            hidden_dropout=0.1,
        ),
    ),
    "opt": (
        OPTConfig,
        _COMMON
        | dict(
            hidden_size=32,
            ffn_dim=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            word_embed_proj_dim=32,
            pad_token_id=0,
            dropout=0.1,
            attention_dropout=0.1,
            tie_word_embeddings=True,
        ),
    ),
    "mixtral": (MixtralConfig, _LLAMA_LIKE | dict(num_local_experts=4, num_experts_per_tok=2)),
    "qwen2_moe": (
        Qwen2MoeConfig,
        _LLAMA_LIKE
        | dict(
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=24,
            shared_expert_intermediate_size=40,
        ),
    ),
}

# Their queries are rows of a larger projection.
FUSED_QUERY = ("phi3", "gpt2", "gpt_neox")


def tiny_config(family: str, **config_overrides: Any) -> PretrainedConfig:
    """Build the tiny configuration of a family; keyword arguments replace its values."""
    config_class, values = FAMILIES[family]
    return config_class(**(values | config_overrides))


def tiny_model(
    family: str,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    attn_implementation: str = "eager",
    **config_overrides: Any,
) -> PreTrainedModel:
    """Build a tiny model of a family, in eval mode, without touching the global random state.

    The same seed gives the same weights in every dtype, up to that dtype's rounding. Matrices are
    drawn with standard deviation 0.2, about 1 / sqrt(hidden size), so that logits are not flat;
    norms and biases are 0.1 away from their usual ones and zeros, so that a wrong decay or a
    missing gradient on them shows.

    Args:
        family: a key of FAMILIES.
        dtype: of the parameters; buffers keep the dtype that the model gives them.
        seed: of the weights.
        attn_implementation: "eager" or "sdpa" (Gemma 2 has only "eager", because of its soft caps).
        config_overrides: replace values of the configuration, e.g. `num_hidden_layers=2`.
    """
    config = tiny_config(family, **config_overrides)
    # transformers 5 multiplies experts with grouped_mm, which has no float64; 4 ignores this.
    config._experts_implementation = "eager"
    with torch.random.fork_rng(devices=[]):
        model = AutoModelForCausalLM.from_config(
            config, attn_implementation=attn_implementation, dtype=dtype
        )
    norm_center = 0.0 if family.startswith("gemma") else 1.0  # Gemma's norms multiply by 1 + weight
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, param in model.named_parameters():
            noise = torch.randn(param.shape, generator=generator)
            if param.ndim > 1:
                param.copy_(0.2 * noise)
            else:
                param.copy_(0.1 * noise + (0.0 if name.endswith("bias") else norm_center))
    return model.eval()
