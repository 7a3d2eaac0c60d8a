"""Keys and values of an adapted prompt: kept where no adapted parameter can change them.

A parameter changes them unless everything that it acts on comes after the last layer's keys and
values: an output head that is not the embedding, the final norm, and of the last decoder layer the
query, the attention's output, and what follows. That is known by name; any other is taken to.

With ``kv="frozen"`` they are those of the unadapted weights by definition, whatever adapts.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ttt_fast.frozen_keys import FrozenKeys
from ttt_fast.scope import decoder_layers
from ttt_fast.selection import Selection

# Of a decoder layer: what comes after its keys and values.
_AFTER = re.compile(
    r"mlp\.|(self_attn|attn|attention)\.(q_proj|q_norm|o_proj|out_proj|c_proj|dense)\."
    r"|(post_attention_layernorm|pre_feedforward_layernorm|post_feedforward_layernorm)\."
)
# Beside the stack of layers: what comes after it.
_FINAL_NORM = re.compile(r"(model\.|transformer\.)?(norm|ln_f)\.(weight|bias)")
# Arguments of generate that leave one row a prompt and one token a step.
_PLAIN = frozenset({
    "max_new_tokens", "min_new_tokens", "max_length", "do_sample", "temperature", "top_k", "top_p",
    "min_p", "eos_token_id", "pad_token_id", "repetition_penalty", "generation_config",
})  # fmt: skip
# Those that look on.
_WATCHING = frozenset({
    "streamer", "stopping_criteria", "return_dict_in_generate", "output_scores", "output_logits",
})  # fmt: skip


def changed_by(model: nn.Module, selections: Sequence[Selection]) -> str | None:
    """Name of an adapted parameter that may change keys and values; None if none does."""
    layers = decoder_layers(model)
    shared = {id(param) for layer in layers[:-1] for param in layer.parameters()}
    last = {id(p): name for layer in layers[-1:] for name, p in layer.named_parameters()}
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    heads = set() if head is None else {id(param) for param in head.parameters()}
    embedded = {id(param) for param in model.get_input_embeddings().parameters()}
    for selection in selections:
        param = id(selection.param)
        late = param in heads - embedded or (
            param not in shared and _AFTER.match(last.get(param, ""))
        )
        if not (layers and (late or _FINAL_NORM.fullmatch(selection.name))):
            return selection.name
    return None


def takes_cache(model: nn.Module, options: dict[str, Any]) -> bool:
    """Whether ``generate`` with these arguments can go on from a cache of its rows."""
    # What the given one leaves open is the model's own.
    given, own = options.get("generation_config"), getattr(model, "generation_config", None)
    # Of a model's own settings (Gemma's), transformers takes "hybrid" for the usual cache.
    kind = getattr(own, "cache_implementation", None)
    usual = kind in (None, "hybrid") and getattr(given, "cache_implementation", None) is None
    return set(options) <= _PLAIN and usual and _is_plain(given) and _is_plain(own)


def _is_plain(config: Any) -> bool:
    """Whether settings of ``generate``, None for none, ask for one row each and a cache."""
    one_each = all(
        (getattr(config, name, None) or 1) == 1 for name in ("num_beams", "num_return_sequences")
    )
    return one_each and getattr(config, "use_cache", None) is not False


@torch.no_grad()
def keys_values(
    model: nn.Module, ids: Tensor, mask: Tensor, arguments: frozenset[str]
) -> Any | None:
    """The model's cache of all tokens of rows (N, T) but the last, None if it has none.

    Args:
        model: the model.
        ids: rows of tokens, padded on the left.
        mask: (N, T), 0 at padding.
        arguments: names that the model's forward takes.
    """
    if "past_key_values" not in arguments or ids.shape[1] < 2:
        return None
    inputs = {
        "input_ids": ids[:, :-1],
        "attention_mask": mask[:, :-1],
        "position_ids": (mask.cumsum(1) - 1).clamp_(min=0)[:, :-1],
        "use_cache": True,
        "logits_to_keep": 1,
    }
    outputs = model(**{name: value for name, value in inputs.items() if name in arguments})
    return getattr(outputs, "past_key_values", None)


class KeptPrompts:
    """Caches of the prompts of an adaptation, one for each way in which they go on.

    Attributes:
        reused: whether the last :meth:`options` had a cache from before; None without any.
        frozen: keys and values to go on from, whatever has adapted; None with kv="exact".
    """

    def __init__(self, model: nn.Module, selections: Sequence[Selection]) -> None:
        self.reused: bool | None = None
        self.frozen: FrozenKeys | None = None
        self._model, self._selections = model, selections
        self._kept: dict[int | None, Any] = {}

    @cached_property
    def changed_by(self) -> str | None:
        """As the function of that name; not before somebody generates."""
        return changed_by(self._model, self._selections)

    def forget(self) -> None:
        """Keep nothing."""
        self._kept.clear()
        self.frozen = None

    def options(
        self,
        key: int | None,
        ids: Tensor,
        mask: Tensor,
        arguments: frozenset[str],
        options: dict[str, Any],
    ) -> dict[str, Any]:
        """Arguments of ``generate`` for a prompt, with its cache where there can be one.

        Args:
            key: which prompt; None for all together.
            ids: (N, T), the prompt.
            mask: (N, T), 0 at padding.
            arguments: names that the model's forward takes.
            options: what the user gave.

        Raises:
            ValueError: there are frozen keys and values, and these arguments cannot go on from any.
        """
        if self.frozen is not None:
            return options | {"past_key_values": self._frozen_cache(key, ids, options)}
        self.reused = False
        if self.changed_by is not None or not takes_cache(self._model, options):
            return options
        cache = self._kept.get(key)
        self.reused = cache is not None
        if cache is None:
            cache = keys_values(self._model, ids, mask, arguments)
            if cache is None:
                return options
            self._kept[key] = cache
        # generate appends to the one that it is given.
        return options | {"past_key_values": copy.deepcopy(cache)}

    def _frozen_cache(self, key: int | None, ids: Tensor, options: dict[str, Any]) -> Any:
        plain = {name: value for name, value in options.items() if name not in _WATCHING}
        if not takes_cache(self._model, plain):
            can = ", ".join(sorted(_PLAIN | _WATCHING))
            raise ValueError(
                f"generate: got {', '.join(sorted(options)) or 'no arguments'}; with kv='frozen' an"
                " answer goes on from the prompt's keys and values, one row a prompt and one token"
                f" a step, and may have {can}; neither a generation_config nor the model's own may"
                " ask for beams, several sequences, no cache or another kind. Pass input_ids to"
                " have keys and values computed with the adapted weights."
            )
        self.reused = True
        rows = range(len(self.frozen.ids)) if key is None else [key]
        return self.frozen.cache(rows, ids.shape[1] - 1)
