"""A model as the layers of a workload: shapes, what trains, and what a step keeps for each token.

Weights are not looked at, so a model on the meta device will do; it is read as on the CPU.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterator, Sequence
from dataclasses import replace

from torch import nn
from transformers.pytorch_utils import Conv1D

from ttt_fast.batch import text_config
from ttt_fast.engines.pieces import attends_again, glu_of, rms_norm_of
from ttt_fast.engines.work import Layer
from ttt_fast.scope import decoder_layers
from ttt_fast.selection import Selection

# Siblings that read the same tensor, so that it is recorded once.
_SAME_INPUT = (
    frozenset({"q_proj", "k_proj", "v_proj"}),
    frozenset({"gate_proj", "up_proj"}),
    frozenset({"w1", "w3"}),
)
# Of an attention module, the projection of what it gives.
_ATTENTION_OUTPUTS = ("o_proj", "out_proj", "c_proj", "dense")
# Of an MLP, what its activation reads, and what reads it.
_MLP_INPUTS = ("gate_proj", "up_proj", "gate_up_proj", "fc1", "c_fc", "dense_h_to_4h")
_MLP_OUTPUTS = ("down_proj", "fc2", "c_proj", "dense_4h_to_h")
# Of these, one projection gives queries, keys and values, and the first two are turned: copies,
# while the values are a part of all three.
_TURNED_OF_ONE = ("GPTNeoXAttention", "Phi3Attention")
# Our norm of their queries leaves heads before tokens, so that the output projection reads a copy.
_HEADS_FIRST = ("Gemma3Attention",)
# Written out, its softmax is in the dtype of the scores; that of all others in float32.
_NARROW_SOFTMAX = ("GPT2Attention",)
# Modules are registered in the order in which they run, but for these.
_RUNS = {
    "input_layernorm": -2, "self_attn_layer_norm": -2, "self_attn": -1, "attention": -1,
    "post_attention_layernorm": 0, "pre_feedforward_layernorm": 1, "mlp": 2,
    "post_feedforward_layernorm": 3, "q_norm": 1, "k_norm": 1, "o_proj": 2, "out_proj": 2,
    "final_layer_norm": 1, "fc1": 2, "fc2": 3,
}  # fmt: skip


def layers_of(
    model: nn.Module, selected: dict[int, Selection], backend: str, stock: bool
) -> tuple[Layer, ...]:
    """All modules with weights, those of one shape in one entry.

    Args:
        model: the model.
        selected: id of a parameter -> what of it trains.
        backend: a setting for all ops.
        stock: norms and gated units run the model's own code.
    """
    layers: Counter[Layer] = Counter()
    seen: set[int] = set()
    recorded: set[tuple[str, frozenset[str]]] = set()
    blocks = {id(module) for block in decoder_layers(model) for module in block.modules()}
    keep = _Keeping(model, backend, stock)
    started = False
    for name, parent, module in _as_they_run(model):
        parent_name, _, leaf = name.rpartition(".")
        for attribute, param in module.named_parameters(recurse=False):
            selection = selected.get(id(param))
            numel = 0 if selection is None else selection.view().numel()
            layer = _layer(module, param, numel, started)
            layer = keep.noted(layer, attribute, leaf, module, parent)
            siblings = next((s for s in _SAME_INPUT if leaf in s), None)
            if layer.kind == "linear" and layer.adapted_out and siblings is not None:
                layer = replace(layer, shares_input=(parent_name, siblings) in recorded)
                recorded.add((parent_name, siblings))
            layer = replace(layer, tied=id(param) in seen, inside=id(module) in blocks)
            layers[layer] += 1
            seen.add(id(param))
            started = started or selection is not None
    return tuple(replace(layer, count=count) for layer, count in layers.items())


def attention_width(model: nn.Module) -> int:
    """Return heads · head_dim of all layers, 0 where the configuration does not say."""
    config, heads = text_config(model), _heads(model)
    hidden = getattr(config, "hidden_size", 0)
    if not (isinstance(hidden, int) and heads and hidden):
        return 0
    head_dim = getattr(config, "head_dim", None) or hidden // heads
    return heads * head_dim * getattr(config, "num_hidden_layers", 0)


def kv_width(model: nn.Module) -> int:
    """Return the keys and values of a token in all layers, 0 where it is not said."""
    heads = getattr(text_config(model), "num_key_value_heads", None) or _heads(model)
    return 2 * attention_width(model) * heads // max(1, _heads(model))


def hidden_width(model: nn.Module) -> int:
    """Return the width of the hidden states between decoder layers, 0 where it is not said."""
    hidden = getattr(text_config(model), "hidden_size", 0)
    return hidden if isinstance(hidden, int) else 0


def crossed_blocks(model: nn.Module, selected: Container[int]) -> int:
    """Number of decoder layers that the gradient enters.

    Args:
        model: the model.
        selected: ids of the parameters that train.
    """
    blocks = decoder_layers(model)
    if not blocks:
        return 0
    embeddings = (module for module in model.modules() if isinstance(module, nn.Embedding))
    if any(id(param) in selected for each in embeddings for param in each.parameters()):
        return len(blocks)
    trained = [any(id(p) in selected for p in block.parameters()) for block in blocks]
    return len(blocks) - trained.index(True) if True in trained else 0


def _heads(model: nn.Module) -> int:
    heads = getattr(text_config(model), "num_attention_heads", 0)
    return heads if isinstance(heads, int) else 0


def _as_they_run(model: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Module]]:
    """Names, parents and modules in the order in which they run, as far as names tell."""
    seen: set[int] = set()
    waiting: list[tuple[str, nn.Module, nn.Module]] = [("", model, model)]
    while waiting:
        name, parent, module = waiting.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        yield name, parent, module
        children = sorted(module.named_children(), key=lambda child: _RUNS.get(child[0], 0))
        prefix = f"{name}." if name else ""
        waiting += [(prefix + leaf, module, child) for leaf, child in reversed(children)]


def _layer(module: nn.Module, param: nn.Parameter, selected: int, started: bool) -> Layer:
    """One parameter as a layer; ``selected`` of its numbers train."""
    if param.ndim < 2:
        return Layer(param.numel(), 1, "vector", selected, started or selected > 0)
    if isinstance(module, nn.Embedding):
        n_rows, width = param.shape
        return Layer(width, n_rows, "embedding", selected // n_rows)
    # Experts of three dimensions are read whole: a prompt's tokens reach nearly all of them.
    transposed = type(module).forward is Conv1D.forward
    width = param.shape[0] if transposed else param.shape[-1]
    return Layer(param.numel() // width, width, "linear", selected // width, started)


class _Keeping:
    """What autograd keeps for each token where the gradient crosses a module.

    To the number for norms, attention and MLPs of the families in README's table, with what stands
    in for them; of modules with other names, as many numbers are expected as go in and come out.
    """

    def __init__(self, model: nn.Module, backend: str, stock: bool) -> None:
        self._backend, self._stock = backend, stock
        self._config = text_config(model)
        self._heads = _heads(model)
        self._implementation = getattr(self._config, "_attn_implementation", None)
        self._experts = getattr(self._config, "num_experts_per_tok", None) or 1
        has_head = hasattr(model, "get_output_embeddings")
        self._head = model.get_output_embeddings() if has_head else None

    def noted(
        self, layer: Layer, attribute: str, leaf: str, module: nn.Module, parent: nn.Module
    ) -> Layer:
        """The layer of a parameter, with what its module keeps."""
        if layer.kind == "embedding":
            return replace(layer, statistics=2 if layer.adapted_out else 0)  # ids of 8 bytes
        if layer.kind == "vector":
            return self._norm(layer, leaf, module, parent) if attribute == "weight" else layer
        if module is self._head:
            return replace(layer, head=True)
        if "Attention" in type(parent).__name__:
            return self._attention(layer, parent) if leaf in _ATTENTION_OUTPUTS else layer
        if leaf in _MLP_INPUTS:
            return layer
        if leaf in _MLP_OUTPUTS:
            return self._mlp(layer, leaf, parent)
        shape = module._parameters[attribute].shape
        if len(shape) > 2:
            return self._of_experts(layer, attribute, shape[1:])
        if type(module).__name__.endswith("Router"):
            # All probabilities in float32, and of the best their numbers, of 8 bytes, and sum.
            return replace(layer, statistics=shape[0] + 3 * self._experts + 1)
        return replace(layer, saved=layer.in_ + layer.out, keeps_input=True)

    def _norm(self, layer: Layer, leaf: str, module: nn.Module, parent: nn.Module) -> Layer:
        if "norm" not in type(module).__name__.lower():
            return layer
        # A norm of queries or keys works on each head.
        projection = getattr(parent, leaf.replace("_norm", "_proj"), None)
        width = layer.out if projection is None else projection.weight.shape[0]
        rows = width // layer.out
        if isinstance(module, nn.LayerNorm):
            # Where attention and MLP are side by side, both their norms read the same tensor.
            again = leaf == "post_attention_layernorm"
            again = again and getattr(parent, "use_parallel_residual", False)
            kept = 0 if again else width
            return replace(layer, saved=kept, statistics=2 * rows, normalised=width)
        if not self._stock and rms_norm_of(module, self._backend) is not None:
            return replace(layer, saved=width, statistics=rows)
        wide = max(1, 4 // module.weight.itemsize)
        trained = width if layer.adapted_out else 0
        return replace(layer, saved=wide * width + trained, statistics=rows)

    def _attention(self, layer: Layer, parent: nn.Module) -> Layer:
        """Query, key, value and result; written-out attention has keys and values of each head.

        Where the backward computes the attention again, not the result.
        """
        kind, groups = type(parent).__name__, getattr(parent, "num_key_value_groups", 1)
        of_one = kind in _TURNED_OF_ONE
        if self._implementation == "eager":
            # Values of each head are a copy, but where they have as many heads as the queries.
            whole = 2 * layer.in_ if of_one and groups == 1 else 0
            capped = getattr(self._config, "attn_logit_softcapping", None) is not None
            return replace(
                layer,
                saved=3 * layer.in_ + whole,
                pairs=self._heads * (1 + capped),
                wide_pairs=0 if kind in _NARROW_SOFTMAX else self._heads,
            )
        projections = [
            child.weight.numel() // child.weight.shape[type(child).forward is not Conv1D.forward]
            for name, child in parent.named_children()
            if name not in _ATTENTION_OUTPUTS and name.find("norm") < 0 and hasattr(child, "weight")
        ]
        saved = sum(projections)
        if of_one:
            saved += layer.in_ + layer.in_ // groups
        if not self._stock and attends_again(parent, self._implementation, self._backend):
            return replace(layer, saved=saved)  # and the mask that all layers share
        saved += layer.in_
        copied = kind in _HEADS_FIRST and not self._stock
        layer = replace(layer, saved=saved, statistics=self._heads, keeps_input=not copied)
        if self._implementation != "sdpa":
            return layer
        # With a mask, keys and values are copied for each head of the queries.
        return replace(
            layer,
            window=self._window(parent),
            mask_pairs=1,
            masked=4 * layer.in_ - saved if groups > 1 else 0,
        )

    def _window(self, attention: nn.Module) -> int:
        """How far an attention looks back; 0 for all the way."""
        whole = getattr(self._config, "sliding_window", None)
        window = getattr(attention, "sliding_window", whole)
        return window if isinstance(window, int) else 0

    def _mlp(self, layer: Layer, leaf: str, parent: nn.Module) -> Layer:
        """What the activation keeps: of a gated one gate and up, and by the own code act(gate)."""
        if leaf == "down_proj":
            ours = not self._stock and glu_of(parent, self._backend) is not None
            return replace(layer, saved=(2 if ours else 3) * layer.in_)
        kinds = {type(child).__name__ for child in parent.children()}
        # GPT-2's is written out in four elementwise operations; ReLU keeps what it gives.
        kept = 4 if "NewGELUActivation" in kinds else 1
        return replace(layer, saved=kept * layer.in_, keeps_input="ReLU" in kinds)

    def _of_experts(self, layer: Layer, attribute: str, shape: Sequence[int]) -> Layer:
        """What the experts of each token keep, of weights of this shape; each gets a copy of it."""
        kept, statistics = sum(shape), 0
        if attribute == "gate_up_proj":
            # Gate, up and act(gate); the number of the token, of 8 bytes twice, and a weight.
            kept, statistics = shape[0] + shape[0] // 2, 5
        elif attribute == "down_proj":
            kept = 2 * shape[0]  # before and after the weight
        kept += shape[-1] if layer.adapted_out else 0
        each = self._experts
        return replace(layer, saved=each * kept, statistics=each * statistics, keeps_input=True)
