import re

import peft
import pytest
import torch
import transformers
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from tests.families import FAMILIES, tiny_model
from ttt_fast.scope import KNOWN_SCOPES, select_parameters
from ttt_fast.selection import RowSlice

OPT_350M = dict(word_embed_proj_dim=16, do_layer_norm_before=False)


def names(model, scope="all", layers=None):
    return [selection.name for selection in select_parameters(model, scope, layers)]


def ids(model, scope):
    return [id(selection.param) for selection in select_parameters(model, scope)]


def lora_llama(**lora):
    targets = dict(target_modules=["q_proj", "down_proj"]) | lora
    return peft.get_peft_model(tiny_model("llama"), peft.LoraConfig(r=2, **targets))


# --- named scopes on every family ---------------------------------------------------------------


def role_by_class(model, name):
    """Tell a parameter's role from the classes around it: an oracle that reads no leaf names."""
    path, owners = name.rpartition(".")[0], []
    while path:
        owners.append(type(model.get_submodule(path)).__name__)
        path = path.rpartition(".")[0]
    if "Norm" in owners[0]:
        return "norm"
    if any(owner.endswith("Attention") for owner in owners):
        return "attention"
    if re.search(r"\.(layers|h)\.\d+\.", name):
        return "ffn"
    return "embedding/head"


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_has_exactly_one_role(family, tied):
    model = tiny_model(family, tie_word_embeddings=tied)
    expected = {"norm": [], "attention": [], "ffn": [], "embedding/head": []}
    for name, _ in model.named_parameters():
        expected[role_by_class(model, name)].append(name)
    assert all(expected.values())
    for role in ("norm", "attention", "ffn"):
        assert names(model, role) == expected[role]
    outside = {*names(model, "embedding"), *names(model, "head")}
    assert outside == set(expected["embedding/head"])


@pytest.mark.parametrize("family", FAMILIES)
def test_all_is_named_parameters(family):
    model = tiny_model(family)
    selections = select_parameters(model)
    assert [(s.name, id(s.param)) for s in selections] == [
        (name, id(param)) for name, param in model.named_parameters()
    ]
    assert all(s.rows is None and s.numel == s.param.numel() for s in selections)


@pytest.mark.parametrize("family", FAMILIES)
def test_embedding_and_head_share_the_tied_weight_and_nothing_else(family):
    tied = tiny_model(family, tie_word_embeddings=True)
    weight = tied.get_input_embeddings().weight
    assert set(ids(tied, "embedding")) & set(ids(tied, "head")) == {id(weight)}
    untied = tiny_model(family, tie_word_embeddings=False)
    assert id(untied.get_input_embeddings().weight) in ids(untied, "embedding")
    assert ids(untied, "head") == [id(untied.get_output_embeddings().weight)]
    assert not set(ids(untied, "embedding")) & set(ids(untied, "head"))


def test_learned_positions_are_embedding():
    assert names(tiny_model("gpt2"), "embedding") == [
        "transformer.wte.weight",
        "transformer.wpe.weight",
    ]
    assert names(tiny_model("opt"), "embedding") == [
        "model.decoder.embed_tokens.weight",
        "model.decoder.embed_positions.weight",
    ]


def test_opt_projections_around_narrow_embeddings():
    model = tiny_model("opt", **OPT_350M)
    assert "model.decoder.project_in.weight" in names(model, "embedding")
    assert set(names(model, "head")) == {
        "model.decoder.embed_tokens.weight",
        "model.decoder.project_out.weight",
    }
    roles = ("ffn", "attention", "norm", "embedding", "head")
    assert {n for role in roles for n in names(model, role)} == set(names(model))


def test_query_and_key_norms_are_norm():
    model = tiny_model("qwen3")
    assert "model.layers.0.self_attn.q_norm.weight" in names(model, "norm")
    assert not any("norm" in name for name in names(model, "attention") + names(model, "query"))


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_router_and_experts_are_ffn(family):
    model = tiny_model(family)
    ffn = names(model, "ffn", layers=1)
    assert sum("experts" in name for name in ffn) >= 2
    assert sum(name.endswith("gate.weight") for name in ffn) == (2 if family == "qwen2_moe" else 1)


def test_published_sizes_of_qwen2_5_3b():
    config = transformers.Qwen2Config(
        hidden_size=2048,
        intermediate_size=11008,
        num_hidden_layers=36,
        num_attention_heads=16,
        num_key_value_heads=2,
        vocab_size=151936,
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    model.tie_weights()
    numel = {
        scope: sum(s.numel for s in select_parameters(model, scope))
        for scope in KNOWN_SCOPES
        if scope != "lora"
    }
    assert numel["attention"] == pytest.approx(340e6, rel=0.01)
    assert numel["ffn"] == pytest.approx(2.4e9, rel=0.02)
    assert numel["all"] == 3_085_938_688
    assert numel["embedding"] == numel["head"] == 151936 * 2048
    assert numel["query"] == 36 * (2048 * 2048 + 2048)
    assert sum(numel[r] for r in ("attention", "ffn", "norm", "embedding")) == numel["all"]


# --- patterns, callables, names ------------------------------------------------------------------


def test_regular_expression():
    model = tiny_model("llama")
    expected = [f"model.layers.{i}.mlp.down_proj.weight" for i in range(3)]
    assert names(model, r"layers\.\d+\.mlp\.down_proj") == expected
    assert names(model, re.compile("DOWN_PROJ", re.IGNORECASE)) == expected


def test_regular_expression_finds_a_tied_weight_by_each_of_its_names():
    model = tiny_model("llama_tied")
    assert names(model, "lm_head") == names(model, "embed") == ["model.embed_tokens.weight"]


def test_callable_gets_name_and_parameter():
    model = tiny_model("llama")
    assert names(model, lambda name, param: param.ndim == 1) == names(model, "norm")


def test_list_of_parameters_and_modules_in_model_order():
    model = tiny_model("llama")
    got = names(model, ["lm_head", "model.layers.1.mlp", "model.norm.weight", "model.layers.1"])
    layer = [n for n, _ in model.named_parameters() if n.startswith("model.layers.1.")]
    assert got == [*layer, "model.norm.weight", "lm_head.weight"]
    assert names(tiny_model("llama_tied"), ["lm_head"]) == ["model.embed_tokens.weight"]


def test_module_name_is_not_a_prefix_of_text():
    model = tiny_model("llama", num_hidden_layers=11)
    assert all(".layers.1." in name for name in names(model, ["model.layers.1"]))


# --- layers --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        (0, [0]),
        (-1, [5]),
        ("3", [3]),
        ("-4:", [2, 3, 4, 5]),
        ("2:6", [2, 3, 4, 5]),
        ("4:100", [4, 5]),
        ("::2", [0, 2, 4]),
        (":", [0, 1, 2, 3, 4, 5]),
        ("0,3,5", [0, 3, 5]),
        ("0, 4:", [0, 4, 5]),
        (slice(-2, None), [4, 5]),
        (range(1, 3), [1, 2]),
        ([5, 0, -6], [0, 5]),
    ],
)
def test_layers(layers, expected):
    for family, stack in (("llama", "model.layers"), ("gpt2", "transformer.h")):
        model = tiny_model(family, num_hidden_layers=6)
        for scope in ("all", "ffn", "norm", "query", ".", lambda name, param: True):
            got = names(model, scope, layers)
            assert sorted({int(n.split(".")[2]) for n in got}) == expected
            assert all(n.startswith(f"{stack}.") for n in got)


def test_layers_take_every_parameter_of_the_layer():
    model = tiny_model("mixtral")
    expected = [n for n, _ in model.named_parameters() if n.startswith("model.layers.2.")]
    assert names(model, "all", 2) == expected


@pytest.mark.parametrize(
    ("layers", "error", "message"),
    [
        (3, ValueError, "no layer 3; the model has 3, 0 to 2"),
        ("0,-4", ValueError, "no layer -4"),
        ("3:", ValueError, "selects none of the model's 3 layers"),
        ([], ValueError, "selects none of the model's 3 layers"),
        ("", ValueError, "not understood"),
        ("first", ValueError, "not understood"),
        ("1:2:3:4", ValueError, "not understood"),
        ("::0", ValueError, "not understood"),
        (1.5, TypeError, "needs to be an int, a slice"),
        (True, TypeError, "needs to be an int, a slice"),
        (["1"], TypeError, "needs to be an int, a slice"),
    ],
)
def test_bad_layers(layers, error, message):
    with pytest.raises(error, match=message):
        select_parameters(tiny_model("llama"), "ffn", layers)


@pytest.mark.parametrize("scope", ["embedding", "head"])
def test_layers_with_what_lies_outside_them(scope):
    with pytest.raises(ValueError, match="lies outside the decoder layers"):
        select_parameters(tiny_model("llama"), scope, layers=0)
    with pytest.raises(ValueError, match="selects nothing inside layers=0"):
        select_parameters(tiny_model("llama"), ["lm_head"], layers=0)


def test_layers_of_an_unknown_or_ambiguous_stack():
    with pytest.raises(ValueError, match="no such stack"):
        select_parameters(nn.Sequential(nn.Linear(2, 2)), "all", layers=0)
    two = nn.ModuleDict({"a": tiny_model("llama"), "b": tiny_model("llama")})
    with pytest.raises(ValueError, match=r"several stacks a\.model\.layers, b\.model\.layers"):
        select_parameters(two, "ffn", layers=0)


# --- wrapped models ------------------------------------------------------------------------------


class Wrapper(nn.Module):
    """Puts "module." in front of every name, as DistributedDataParallel does."""

    def __init__(self, module):
        super().__init__()
        self.module = module


def checkpointed(model):
    for layer in model.model.layers:
        layer.mlp = checkpoint_wrapper(layer.mlp)
        layer.self_attn.qkv_proj = checkpoint_wrapper(layer.self_attn.qkv_proj)
    return model


@pytest.mark.parametrize("scope", ["ffn", "attention", "query", "norm", "embedding", "head"])
@pytest.mark.parametrize("wrap", [Wrapper, torch.compile, checkpointed])
def test_wrappers_change_nothing(wrap, scope):
    plain = select_parameters(tiny_model("phi3"), scope, None)
    model = wrap(tiny_model("phi3"))
    wrapped = select_parameters(model, scope)
    assert [(s.rows, s.param.shape) for s in wrapped] == [(s.rows, s.param.shape) for s in plain]
    assert {s.name for s in wrapped} <= {name for name, _ in model.named_parameters()}


def test_lora_gives_the_adapters_alone():
    model = lora_llama()
    trainable = [name for name, param in model.named_parameters() if param.requires_grad]
    assert len(trainable) == 3 * 2 * 2
    assert names(model, "lora") == trainable
    assert all(".layers.2." in name for name in names(model, "lora", -1))
    assert len(names(model, "lora", -1)) == 4


@pytest.mark.parametrize("scope", ["ffn", "attention", "query", "norm", "embedding", "head"])
def test_other_scopes_of_a_peft_model_give_the_base_weights(scope):
    base = select_parameters(tiny_model("llama"), scope)
    model = lora_llama()
    got = select_parameters(model, scope)
    assert [s.param.shape for s in got] == [s.param.shape for s in base]
    assert not any("lora_" in s.name for s in got)
    assert [s.name.removeprefix("base_model.model.").replace(".base_layer", "") for s in got] == [
        s.name for s in base
    ]


def test_all_of_a_peft_model_includes_the_adapters():
    model = lora_llama()
    assert names(model) == [name for name, _ in model.named_parameters()]


def test_peft_on_fused_embedding_and_fully_trained_modules():
    gpt2 = peft.get_peft_model(
        tiny_model("gpt2"),
        peft.LoraConfig(r=2, target_modules=["c_attn", "wte"], fan_in_fan_out=True),
    )
    assert [s.rows for s in select_parameters(gpt2, "query", 0)] == [
        RowSlice(1, 0, 32, 96),
        RowSlice(0, 0, 32, 96),
    ]
    assert len(names(gpt2, "lora")) == 2 * (3 + 1)
    saved = lora_llama(modules_to_save=["lm_head"])
    assert len(names(saved, "head")) == 2  # the original and the copy that is trained
    assert not any("lm_head" in name for name in names(saved, "lora"))


def test_scopes_that_a_model_does_not_have():
    headless = tiny_model("llama").model
    with pytest.raises(ValueError, match="None of the .* parameters of this LlamaModel belongs"):
        select_parameters(headless, "head")
    assert len(names(headless, "ffn", 0)) == 3


def test_lora_without_adapters():
    with pytest.raises(ValueError, match="No parameter is named lora_.*get_peft_model"):
        select_parameters(tiny_model("llama"), "lora")


# --- bad input -----------------------------------------------------------------------------------


def test_a_scope_that_matches_nothing_lists_scopes_and_modules():
    with pytest.raises(ValueError, match="scope 'fnn' selects nothing") as error:
        select_parameters(tiny_model("llama"), "fnn")
    text = str(error.value)
    assert all(scope in text for scope in KNOWN_SCOPES)
    assert "\n  model.layers.*.mlp.gate_proj\n" in text
    assert text.count("gate_proj") == 1  # numbers collapsed


@pytest.mark.parametrize(
    ("scope", "error", "message"),
    [
        ("ffn(", ValueError, "nor a regular expression on parameter names"),
        ([], ValueError, "selects nothing"),
        (lambda name, param: False, ValueError, "selects nothing"),
        (
            ["model.layers.0.mpl"],
            ValueError,
            "0.mpl'.*Close: model.layers.0.mlp",
        ),
        (["lm_head", "model.rotary_emb"], ValueError, "'model.rotary_emb', nor a module"),
        ([""], ValueError, "no parameter ''"),
        (None, TypeError, "scope is None; it needs a known scope"),
        (3, TypeError, "scope is 3"),
        ([3], TypeError, r"scope is \[3\]"),
    ],
)
def test_bad_scope(scope, error, message):
    with pytest.raises(error, match=message):
        select_parameters(tiny_model("llama"), scope)


def test_a_model_that_is_no_module():
    with pytest.raises(TypeError, match="model is str; select_parameters needs a nn.Module"):
        select_parameters("gpt2")


@pytest.mark.parametrize("scope", ["ffn", "attention", "query", "norm", "embedding", "head"])
def test_unknown_architecture(scope):
    config = transformers.BloomConfig(vocab_size=101, hidden_size=32, n_layer=2, n_head=4)
    model = transformers.BloomForCausalLM(config)
    with pytest.raises(ValueError, match=f"scope '{scope}': .* of this BloomForCausalLM") as error:
        select_parameters(model, scope)
    text = str(error.value)
    assert "Pass a regular expression on parameter names" in text
    assert "\n  transformer.h.*.self_attention.query_key_value ?" in text
    assert "\n  transformer.h.*.mlp.dense_h_to_4h\n" in text  # known, so not marked
    assert "\n  transformer.h.*.mlp.dense_4h_to_h" in text
    assert len(names(model, r"h\.\d+\.mlp\.")) == 2 * 4
    assert len(names(model, r"\.mlp\.", layers=-1)) == 4
    assert names(model) == [name for name, _ in model.named_parameters()]


def test_an_unknown_parameter_in_a_known_family_is_not_overlooked():
    model = tiny_model("llama")
    model.model.layers[1].mlp.extra = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"2 parameters.*model\.layers\.1\.mlp\.extra\.weight"):
        select_parameters(model, "ffn")


# --- quantised weights ---------------------------------------------------------------------------


def quantise_down_proj(model, dtype=torch.int8, cls=nn.Parameter):
    weight = torch.zeros(4, 4).to(dtype)
    model.model.layers[1].mlp.down_proj.weight = cls(weight, requires_grad=False)
    return model


class Params4bit(nn.Parameter):
    """Stands in for bitsandbytes' class, which may store its codes in bfloat16 tensors."""

    __module__ = "bitsandbytes.nn.modules"


class PackedLinear(nn.Module):
    """Stands in for the linears of GPTQ and AWQ: packed weight and scales are buffers."""

    def __init__(self):
        super().__init__()
        self.register_buffer("qweight", torch.zeros(4, 4, dtype=torch.int32))
        self.register_buffer("scales", torch.zeros(4))


@pytest.mark.parametrize("scope", ["all", "ffn", "down", ["model.layers.1"], lambda n, p: True])
@pytest.mark.parametrize(
    "quantised",
    [
        dict(dtype=torch.int8),
        dict(dtype=torch.uint8),
        dict(dtype=torch.float8_e4m3fn),
        dict(dtype=torch.bfloat16, cls=Params4bit),
    ],
)
def test_quantised_weights_are_refused_by_name(scope, quantised):
    model = quantise_down_proj(tiny_model("llama"), **quantised)
    with pytest.raises(ValueError, match="layers.1.mlp.down_proj.weight.*: quantised"):
        select_parameters(model, scope)
    assert len(names(model, "attention")) == 3 * 4  # what leaves it out works
    assert len(names(model, "ffn", layers="0,2")) == 2 * 3


def test_packed_weights_that_are_buffers_are_refused_by_name():
    model = tiny_model("llama")
    model.model.layers[1].mlp.down_proj = PackedLinear()
    for scope in ("all", "ffn", "mlp", ["model.layers.1.mlp"]):
        with pytest.raises(ValueError, match=r"down_proj\.qweight.*Load the model unquantised"):
            select_parameters(model, scope)
    assert len(names(model, "attention")) == 3 * 4


def test_lora_on_a_quantised_model():
    model = lora_llama(target_modules=["q_proj"])
    quantise_down_proj(model.base_model.model, torch.uint8)
    assert len(names(model, "lora")) == 3 * 2
    with pytest.raises(ValueError, match='"lora" on a PEFT model'):
        select_parameters(model, "all")
