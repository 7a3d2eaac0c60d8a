"""Which parameters a run adapts: named scopes, patterns, layers, query rows of fused projections.

Architectures are recognised by the names of their parameters, not by their class, so that a
fine-tuned, subclassed or wrapped model (PEFT, DistributedDataParallel, torch.compile) works as the
plain one does. `_MODULES` and `_QUERY` are the only places that know names.
"""

import difflib
import operator
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from ttt_fast.selection import RowSlice, Selection

Scope = str | re.Pattern[str] | Sequence[str] | Callable[[str, nn.Parameter], bool]
Layers = int | str | slice | Iterable[int]

FAMILIES = (
    "Llama, Qwen2, Qwen3, Mistral, Gemma 2, Gemma 3 (text), Phi-3, GPT-2, GPT-NeoX, OPT, Mixtral, "
    "Qwen2-MoE"
)

# Role -> modules that play it: regular expressions that end where the module's path ends.
_MODULES = {
    "embedding": (
        r"embed_tokens",
        r"wte|wpe",  # GPT-2: tokens, learned positions
        r"embed_in",  # GPT-NeoX
        r"embed_positions|project_in",  # OPT; project_in where embeddings are narrower (350m)
    ),
    "head": (
        r"lm_head",
        r"embed_out",  # GPT-NeoX before transformers 5
        r"project_out",  # OPT-350m
    ),
    "attention": (
        r"self_attn\.(q|k|v|o|out)_proj",  # Llama-likes; out_proj: OPT
        r"self_attn\.qkv_proj",  # Phi-3
        r"attn\.c_(attn|proj)",  # GPT-2
        r"attention\.(query_key_value|dense)",  # GPT-NeoX
    ),
    "ffn": (
        r"mlp\.(gate|up|down)_proj",
        r"mlp\.gate_up_proj",  # Phi-3
        r"mlp\.c_(fc|proj)",  # GPT-2
        r"mlp\.dense_(h_to_4h|4h_to_h)",  # GPT-NeoX
        r"layers\.\d+\.fc[12]",  # OPT
        r"block_sparse_moe\.(gate|experts\.\d+\.w[123])",  # Mixtral before transformers 5
        r"mlp\.gate",  # routers of Mixtral and Qwen2-MoE
        r"mlp\.experts\.(gate_up_proj|down_proj)",  # 3-D parameters, without ".weight"
        r"mlp\.experts\.\d+\.(gate|up|down)_proj",  # Qwen2-MoE before transformers 5
        r"mlp\.(shared_expert\.(gate|up|down)_proj|shared_expert_gate)",  # Qwen2-MoE
    ),
    "norm": (
        r"norm",
        r"(input|post_attention|pre_feedforward|post_feedforward)_layernorm",
        r"self_attn\.(q|k)_norm",  # Qwen3, Gemma 3
        r"ln_1|ln_2|ln_f",  # GPT-2
        r"self_attn_layer_norm|final_layer_norm",  # OPT, GPT-NeoX
    ),
}
_ROLES = {
    role: re.compile(rf"(?:^|\.)(?:{'|'.join(modules)})(?:\.(?:weight|bias|qweight))?$")
    for role, modules in _MODULES.items()
}
_LORA = re.compile(r"(?:^|\.)lora_")
_LAYER = re.compile(r"^((?:.*?\.)?(?:layers|h))\.(\d+)\.")
# Path components that wrappers put inside a model. What they put in front needs no treatment.
_WRAPPER = re.compile(
    r"(?:^|(?<=\.))(?:base_layer|original_module|modules_to_save\.[^.]+"
    r"|_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\."
)
KNOWN_SCOPES = ("all", *_MODULES, "query", "lora")


def select_parameters(
    model: nn.Module, scope: Scope = "all", layers: Layers | None = None
) -> list[Selection]:
    r"""Select the parameters that a run adapts.

    Args:
        model: a Hugging Face causal language model, possibly wrapped. Not changed.
        scope: one of

            - "all": every parameter.
            - "ffn": weights and biases of the feed-forward linears; all experts, shared experts
              and routers of mixture-of-experts models.
            - "attention": weights and biases of the q, k, v and output projections. The norms of
              q and k belong to "norm".
            - "query": the q projection, weight and bias; of a fused qkv projection its query rows.
            - "norm": weights and biases of every LayerNorm and RMSNorm, those of q and k included.
            - "embedding": token embeddings, learned positions, OPT's project_in.
            - "head": the language-model head, OPT's project_out. A head tied to the embedding is
              one weight that both scopes give.
            - "lora": the adapters of a PEFT model (parameters named lora_*), which no other named
              scope but "all" includes.
            - any other string: a regular expression, searched in the parameter names (all names
              of tied parameters), e.g. r"layers\.\d+\.mlp\.down_proj".
            - a list of names: of parameters, or of modules for all their parameters.
            - a callable (name, param) -> bool.
        layers: keep only parameters inside these decoder layers, by Python's indexing rules: an
            int, a slice or its text ("-4:", "2:6"), a list or range of ints or its text ("0,3,5").
            With "all" this leaves out embedding, head and final norm.

    Returns:
        In the order of `model.named_parameters()`, tied parameters once, never empty.

    Raises:
        TypeError: model, scope or layers are of no type listed here.
        ValueError: nothing is selected; the architecture is unknown to a named scope; a name or
            layer does not exist; a selected weight is quantised.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is {type(model).__name__}; select_parameters needs a nn.Module.")
    names = _names_by_tensor(model)
    chosen = _choose(model, scope, names)
    if not chosen:
        raise ValueError(f"scope {scope!r} selects nothing. " + _advice(model, scope))
    if layers is not None:
        if scope in ("embedding", "head"):
            raise ValueError(
                f"scope {scope!r} lies outside the decoder layers, so layers={layers!r} leaves "
                "nothing of it. Leave layers out."
            )
        chosen = _inside_layers(chosen, names, layers)
        if not chosen:
            raise ValueError(
                f"scope {scope!r} selects nothing inside layers={layers!r}. "
                "Leave layers out or widen the scope."
            )
    for tensor in chosen:
        _refuse_quantised(names[tensor][0], tensor, scope)
    return [
        Selection(
            name := names[tensor][0],
            tensor,
            _query_rows(model, name, tensor) if scope == "query" else None,
        )
        for tensor in chosen
    ]


def _names_by_tensor(model: nn.Module) -> dict[nn.Parameter, list[str]]:
    """Map each parameter, in order, to all its names, the one of named_parameters() first.

    The packed weights of GPTQ and AWQ are buffers; they are listed as well, so that a scope that
    means them is refused rather than taken to mean the rest of the layer.
    """
    names: dict[Any, list[str]] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        names.setdefault(param, []).append(name)
    for name, buffer in model.named_buffers():
        if name.endswith(".qweight"):
            names.setdefault(buffer, []).append(name)
    return names


def _choose(
    model: nn.Module, scope: Scope, names: dict[nn.Parameter, list[str]]
) -> list[nn.Parameter]:
    """Return the tensors of `names` that the scope means."""
    if isinstance(scope, str) and scope in KNOWN_SCOPES:
        return _choose_known(model, scope, names)
    if isinstance(scope, str | re.Pattern):
        try:
            return _with_name(names, re.compile(scope).search)
        except re.error as error:
            raise ValueError(
                f"scope {scope!r} is neither a known scope ({', '.join(KNOWN_SCOPES)}) nor a "
                f"regular expression on parameter names: {error}."
            ) from error
    if callable(scope):
        return [tensor for tensor, (name, *_) in names.items() if scope(name, tensor)]
    if isinstance(scope, Sequence) and all(isinstance(name, str) for name in scope):
        return _listed(scope, names)
    raise TypeError(
        f"scope is {scope!r}; it needs a known scope ({', '.join(KNOWN_SCOPES)}), a regular "
        "expression, a list of names or a callable (name, param) -> bool."
    )


def _choose_known(
    model: nn.Module, scope: str, names: dict[nn.Parameter, list[str]]
) -> list[nn.Parameter]:
    """Return the tensors of `names` that belong to one of KNOWN_SCOPES."""
    if scope == "all":
        return list(names)
    if scope == "lora":
        return _with_name(names, _LORA.search)
    # One unknown name is enough: whether it is, say, part of the FFN cannot be told, and a scope
    # that silently misses weights would be worse than none.
    unknown = [aliases[0] for aliases in names.values() if not any(map(_is_known, aliases))]
    if unknown:
        raise ValueError(_unknown_architecture(model, scope, unknown))
    pattern = _QUERY_PROJECTION if scope == "query" else _ROLES[scope]
    return _with_name(names, lambda name: pattern.search(_plain(name)))


def _with_name(
    names: dict[nn.Parameter, list[str]], test: Callable[[str], Any]
) -> list[nn.Parameter]:
    return [tensor for tensor, aliases in names.items() if any(map(test, aliases))]


def _plain(name: str) -> str:
    """Strip what PEFT, torch.compile, checkpointing and FSDP insert into a parameter's path.

    Adapters keep their lora_ component, so that no role's pattern matches them.
    """
    return _WRAPPER.sub("", name)


def _is_known(name: str) -> bool:
    plain = _plain(name)
    return bool(_LORA.search(plain)) or any(role.search(plain) for role in _ROLES.values())


def _listed(wanted: Sequence[str], names: dict[nn.Parameter, list[str]]) -> list[nn.Parameter]:
    """Return the tensors that bear one of the wanted names or lie in a module of that name."""
    chosen = set()
    for want in wanted:
        hits = [
            tensor
            for tensor, aliases in names.items()
            if any(name == want or name.startswith(f"{want}.") for name in aliases)
        ]
        if not hits:
            every = [name for aliases in names.values() for name in aliases]
            close = difflib.get_close_matches(want, [*every, *_modules_of(every)], n=3)
            hint = f"Close: {', '.join(close)}." if close else f"Modules:{_listing(every)}"
            raise ValueError(
                f"scope: the model has no parameter {want!r}, nor a module of that name that has "
                f"parameters. {hint}"
            )
        chosen.update(hits)
    return [tensor for tensor in names if tensor in chosen]


def _inside_layers(
    chosen: list[nn.Parameter], names: dict[nn.Parameter, list[str]], layers: Layers
) -> list[nn.Parameter]:
    """Keep what lives in the decoder layers that `layers` names."""
    matches = {tensor: _LAYER.search(_plain(aliases[0])) for tensor, aliases in names.items()}
    stacks = {match[1] for match in matches.values() if match}
    if len(stacks) != 1:
        got = f"the several stacks {', '.join(sorted(stacks))}" if stacks else "no such stack"
        raise ValueError(
            f"layers={layers!r} needs a model with one stack of decoder layers, named layers.N or "
            f"h.N; this one has {got}. Name the layers in scope, by a regular expression such as "
            r"'blocks\.(0|3)\.'."
        )
    index = {tensor: int(match[2]) for tensor, match in matches.items() if match}
    wanted = _layer_indices(layers, max(index.values()) + 1)
    return [tensor for tensor in chosen if index.get(tensor) in wanted]


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The model's decoder layers in their order; none if it has no stack of them, or several."""
    found = {match[1] for name, _ in model.named_parameters() if (match := _LAYER.search(name))}
    stack = model.get_submodule(found.pop()) if len(found) == 1 else None
    return list(stack) if isinstance(stack, nn.ModuleList) else []


def is_compiled(model: nn.Module) -> bool:
    """Whether torch.compile runs the model or a module in it, wrapped or in place."""
    return any(
        hasattr(module, "_orig_mod") or module._compiled_call_impl is not None
        for module in model.modules()
    )


def _layer_indices(layers: Layers, n_layers: int) -> set[int]:
    """Resolve `layers` to indices from 0 to n_layers - 1 by Python's indexing rules."""
    if isinstance(layers, str):
        parts = [_parse_layers(part, layers) for part in layers.split(",")]
    elif isinstance(layers, Iterable):
        parts = list(layers)
    else:
        parts = [layers]
    indices: set[int] = set()
    for part in parts:
        if isinstance(part, slice):
            indices.update(range(n_layers)[part])
            continue
        if isinstance(part, bool) or not hasattr(part, "__index__"):
            raise TypeError(
                f"layers={layers!r} needs to be an int, a slice, ints, or text such as '-4:', "
                "'2:6' or '0,3,5'."
            )
        if not -n_layers <= operator.index(part) < n_layers:
            raise ValueError(
                f"layers={layers!r}: there is no layer {part}; the model has {n_layers}, "
                f"0 to {n_layers - 1}."
            )
        indices.add(range(n_layers)[part])
    if not indices:
        raise ValueError(f"layers={layers!r} selects none of the model's {n_layers} layers.")
    return indices


def _parse_layers(part: str, layers: str) -> int | slice:
    """Parse one int or slice of a `layers` text."""
    bounds = part.split(":")
    try:
        if len(bounds) == 1:
            return int(part)
        parsed = slice(*(int(bound) if bound.strip() else None for bound in bounds))
        range(0)[parsed]  # raises on a step of 0
        return parsed
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"layers={layers!r} is not understood; write an index, a slice or several with commas "
            "between, e.g. '-4:', '2:6' or '0,3,5'."
        ) from error


def _refuse_quantised(name: str, tensor: Tensor, scope: Scope) -> None:
    """Raise if a weight's stored values are codes, which a gradient step cannot change.

    fp8 counts. bitsandbytes can store 4-bit codes in tensors that call themselves bfloat16, and
    torchao's tensors report the dtype that they decode to, so their classes count as well.
    """
    library = type(tensor).__module__.partition(".")[0]
    readable = tensor.is_floating_point() and tensor.dtype.itemsize > 1
    if readable and library not in ("bitsandbytes", "torchao"):
        return
    raise ValueError(
        f"scope {scope!r} selects {name}, a {type(tensor).__name__} of {tensor.dtype}: quantised "
        "weights cannot take gradient steps. Load the model unquantised (float32, bfloat16 or "
        'float16) or choose a scope that leaves it out, e.g. "lora" on a PEFT model or "norm".'
    )


def _query_rows(model: nn.Module, name: str, param: nn.Parameter) -> RowSlice | None:
    """Return where the query lies in a projection, None for one that is the query alone."""
    module = _plain(name).rpartition(".")[0]
    fusion = next(fusion for pattern, fusion in _QUERY.items() if re.search(pattern, module))
    if fusion is None:
        return None
    config = _attention_config(model, name)
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    rows = fusion(heads, kv_heads, head_dim, param.ndim)
    fused = (heads + 2 * kv_heads) * head_dim
    if param.shape[rows.dim] != fused:
        raise ValueError(
            f'scope "query": {name} has shape {tuple(param.shape)}, but {heads} query and '
            f"{kv_heads} key and value heads of {head_dim} need {fused} in dimension {rows.dim}. "
            "Pass a regular expression to select the fused projection whole."
        )
    return rows


def _side_by_side(heads: int, kv_heads: int, head_dim: int, ndim: int) -> RowSlice:
    return RowSlice(0, 0, heads * head_dim, (heads + 2 * kv_heads) * head_dim)


def _side_by_side_conv1d(heads: int, kv_heads: int, head_dim: int, ndim: int) -> RowSlice:
    # Conv1D's weight is (in, out); its bias (out,).
    return RowSlice(ndim - 1, 0, heads * head_dim, (heads + 2 * kv_heads) * head_dim)


def _head_by_head(heads: int, kv_heads: int, head_dim: int, ndim: int) -> RowSlice:
    return RowSlice(0, 0, head_dim, 3 * head_dim)


# Projection that holds the query -> how it is fused with key and value.
_QUERY: dict[str, Callable[[int, int, int, int], RowSlice] | None] = {
    r"self_attn\.q_proj$": None,
    r"self_attn\.qkv_proj$": _side_by_side,  # Phi-3
    r"attn\.c_attn$": _side_by_side_conv1d,  # GPT-2
    r"attention\.query_key_value$": _head_by_head,  # GPT-NeoX
}
_QUERY_PROJECTION = re.compile(
    "|".join(pattern.removesuffix("$") + r"\.\w+$" for pattern in _QUERY)
)


def _attention_config(model: nn.Module, name: str) -> Any:
    """Return the configuration nearest to a parameter, which wrappers around the model hide."""
    path = name
    while path:
        path = path.rpartition(".")[0]
        config = getattr(model.get_submodule(path), "config", None)
        if hasattr(config, "num_attention_heads"):
            return config
    raise ValueError(
        f'scope "query": {name} holds query, key and value, and no module above it has a config '
        "with num_attention_heads to tell them apart. Pass a regular expression to select it whole."
    )


def _advice(model: nn.Module, scope: Scope) -> str:
    """Say what to do about a scope that selects nothing."""
    if scope == "lora":
        return "No parameter is named lora_*; wrap the model with peft.get_peft_model first."
    every = [name for name, _ in model.named_parameters()]
    if not isinstance(scope, str | re.Pattern) or scope in KNOWN_SCOPES:
        return f"None of the {len(every)} parameters of this {type(model).__name__} belongs to it."
    return (
        f"Known scopes are {', '.join(KNOWN_SCOPES)}; any other string is a regular expression, "
        f"searched in parameter names. Modules of this model:{_listing(every)}"
    )


def _unknown_architecture(model: nn.Module, scope: str, unknown: list[str]) -> str:
    every = [name for name, _ in model.named_parameters()]
    return (
        f"scope {scope!r}: {len(unknown)} parameters of this {type(model).__name__}, such as "
        f"{unknown[0]}, have names that do not occur in the families that are known by name "
        f"({FAMILIES}). Pass a regular expression on parameter names instead, e.g. "
        r"scope=r'layers\.\d+\.mlp\.', a list of names, or a callable (name, param) -> bool. "
        f"Modules of this model ('?' where unknown):{_listing(every, unknown)}"
    )


def _modules_of(names: Iterable[str]) -> list[str]:
    """Return every module above the named parameters."""
    parts = [name.split(".")[:-1] for name in names]
    return list(dict.fromkeys(".".join(p[: i + 1]) for p in parts for i in range(len(p))))


def _listing(names: Iterable[str], unknown: Iterable[str] = (), limit: int = 60) -> str:
    """List the modules that own the named parameters, one a line, with numbers shown as *."""

    def shorten(name: str) -> str:
        # A parameter that is not a weight or bias says more than its module.
        owner = re.sub(r"\.(weight|bias|qweight)$", "", name)
        return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", owner)

    marked = {shorten(name) for name in unknown}
    lines = list(dict.fromkeys(shorten(name) for name in names))
    shown = [f"\n  {line}{' ?' if line in marked else ''}" for line in lines[:limit]]
    return "".join(shown) + (f"\n  and {len(lines) - limit} more" if len(lines) > limit else "")
