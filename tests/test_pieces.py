"""Modules of models that one op computes: as their own code does, and given back."""

import functools
import importlib
import sys

import pytest
import torch
from torch import nn
from torch.autograd.gradcheck import GradcheckError, gradcheck

from tests.families import FAMILIES, tiny_model
from tests.loops import prompt_ids
from tests.untouched import unchanged
from tests.update_cases import assert_same_bits
from ttt_fast import TTTConfig, TTTTrainer
from ttt_fast.engines import pieces
from ttt_fast.engines.pieces import (
    ATTENTIONS,
    GATED_MLPS,
    RMS_NORMS,
    AttentionPiece,
    glu_of,
    pieces_of,
    rms_norm_of,
    rotary_of,
    standing_in,
)

ENGINES = pytest.mark.parametrize("engine", ["dense", "factored"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def classes(names, suffix):
    """Those of the classes that the installed transformers has."""
    folders = {
        "deepseekv2": "deepseek_v2", "deepseekv3": "deepseek_v3", "gptneox": "gpt_neox",
        "qwen2moe": "qwen2_moe", "qwen3moe": "qwen3_moe",
    }  # fmt: skip
    for name in sorted(names):
        family = name.removesuffix(suffix).lower()
        family = folders.get(family, family)
        try:
            module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
        except ModuleNotFoundError:
            continue
        yield getattr(module, name)


NORMS, MLPS = list(classes(RMS_NORMS, "RMSNorm")), list(classes(GATED_MLPS, "MLP"))
TURNING = list(classes(ATTENTIONS, "Attention"))
by_name = {kind.__name__: kind for kind in NORMS + MLPS + TURNING}


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def new_norm(kind, dtype=torch.float32):
    module = kind(33, eps=3e-4)
    with torch.no_grad():
        module.weight.add_(0.2 * noise(33, seed=1))
    return module.to(dtype)


def new_mlp(kind, dtype=torch.float32):
    from types import SimpleNamespace

    activation = "gelu_pytorch_tanh" if "Gemma" in kind.__name__ else "silu"
    config = SimpleNamespace(
        hidden_size=33, intermediate_size=50, hidden_act=activation, mlp_bias=False,
        hidden_activation=activation, pretraining_tp=1,
    )  # fmt: skip
    torch.manual_seed(0)
    return kind(config).to(dtype)


def assert_near(ours, theirs, differing=0.02):
    """In float32 to a few eps; in bfloat16 to one, and in most elements equal."""
    half = theirs.dtype == torch.bfloat16
    ours, theirs = ours.detach().to(theirs.dtype).float(), theirs.detach().float()
    eps = 2**-7 if half else 2**-20
    assert torch.allclose(ours, theirs, rtol=eps, atol=eps * theirs.abs().max().item())
    assert not half or (ours != theirs).float().mean() <= differing


def outputs_and_gradients(forward, module, x, dy):
    x = x.clone().requires_grad_()
    y = forward(x)
    return y, torch.autograd.grad(y, (x, *module.parameters()), dy)


def test_the_usual_families_are_there():
    assert {"LlamaRMSNorm", "Qwen2RMSNorm", "GemmaRMSNorm", "Olmo2RMSNorm"} <= set(by_name)
    assert {"LlamaMLP", "Qwen2MLP", "GemmaMLP", "MistralMLP"} <= set(by_name)
    assert {"LlamaAttention", "Phi3Attention", "GPTNeoXAttention", "OlmoAttention"} <= set(by_name)


@DTYPES
@pytest.mark.parametrize("kind", NORMS + MLPS, ids=lambda kind: kind.__name__)
def test_computes_as_the_models_own_code(kind, dtype):
    module = (new_norm if kind in NORMS else new_mlp)(kind, dtype)
    piece, *_ = pieces_of(module, "auto", lambda x: False)  # and an MLP's linears
    sizes = 10.0 ** torch.randint(-2, 3, (2, 20, 1), generator=torch.Generator().manual_seed(3))
    x = (noise(2, 20, 33, seed=2) * (sizes if kind in NORMS else 1)).to(dtype)
    dy = noise(2, 20, 33, seed=4).to(dtype)
    y, gradients = outputs_and_gradients(piece.forward, module, x, dy)
    expected, theirs = outputs_and_gradients(module, module, x, dy)
    assert_near(y, expected, 0.02 if kind in NORMS else 0.1)
    for ours, other in zip(gradients, theirs, strict=True):
        # The model's own code rounds gradients on their way, which we do not.
        assert_near(ours, other, differing=1.0)


@pytest.mark.parametrize("name", ["LlamaRMSNorm", "Olmo2RMSNorm"])
def test_rounding_at_the_wrong_place_is_noticed(name):
    module = new_norm(by_name[name], torch.bfloat16)
    norm = rms_norm_of(module, "auto")
    x = (3 * noise(1, 40, 33)).bfloat16()
    wrong = norm._replace(round_first=not norm.round_first)
    assert_near(norm(x, module.weight.float()[None])[0], module(x[0]))
    with pytest.raises(AssertionError):
        assert_near(wrong(x, module.weight.float()[None])[0], module(x[0]))


class OwnRMSNorm(nn.Module):
    """A norm of somebody's own, which doubles."""

    def __init__(self):
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.ones(4)), 1e-6

    def forward(self, x):
        return 2 * self.weight * x


def test_what_is_not_known_is_left_alone():
    llama, mlp = by_name["LlamaRMSNorm"], by_name["LlamaMLP"]

    class LlamaRMSNorm(llama):
        def forward(self, x):
            return 2 * super().forward(x)

    class LlamaMLP(mlp):
        def forward(self, x):
            return 2 * super().forward(x)

    assert rms_norm_of(llama(4), "auto") is not None
    assert rms_norm_of(llama(4).double(), "auto") is None  # computes in float32 all the same
    for module in (OwnRMSNorm(), LlamaRMSNorm(4), nn.LayerNorm(4), nn.RMSNorm(4), nn.Linear(4, 4)):
        assert rms_norm_of(module, "auto") is None
    assert glu_of(new_mlp(mlp), "auto") is not None
    other = new_mlp(mlp)
    other.act_fn = nn.Tanh()
    for module in (new_mlp(LlamaMLP), other, nn.Linear(4, 4)):
        assert glu_of(module, "auto") is None


def count_pieces(monkeypatch):
    """Calls of the ops by pieces, counted."""
    calls = []
    for function in (pieces._RmsNorm, pieces._Glu, pieces._Rotary):
        real = function.apply

        def spy(*args, real=real, function=function):
            calls.append(function)
            return real(*args)

        monkeypatch.setattr(function, "apply", spy)
    return calls


@ENGINES
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "phi3"])
@pytest.mark.parametrize("scope", ["all", "ffn"])
def test_an_adaptation_is_what_it_is_without_them(engine, family, scope, monkeypatch):
    model, rows = tiny_model(family), prompt_ids(9, n_rows=2)
    config = TTTConfig(lr=1e-2, steps=3, engine=engine, momentum=0.9, scope=scope)
    with monkeypatch.context() as patch, unchanged(model):
        calls = count_pieces(patch)
        with TTTTrainer(model, config).adapt(rows, deltas="independent") as adapted:
            losses = adapted.losses
    assert pieces._RmsNorm in calls and (pieces._Glu in calls) == (family != "phi3")
    assert pieces._Rotary in calls
    monkeypatch.setattr(pieces, "_is_of", lambda *_: False)
    calls = count_pieces(monkeypatch)
    with TTTTrainer(model, config).adapt(rows, deltas="independent") as adapted:
        assert torch.allclose(adapted.losses, losses, rtol=2e-5)
    assert not calls


def test_plain_torch_is_the_models_own_code(monkeypatch):
    norm, mlp = new_norm(by_name["LlamaRMSNorm"]), new_mlp(by_name["LlamaMLP"])
    assert rms_norm_of(norm, "torch") is None and glu_of(mlp, "torch") is None
    assert rotary_of(attention_of(tiny_model("llama")), "torch") is None
    monkeypatch.setenv("TTT_FAST_BACKEND", "torch")
    assert list(pieces_of(nn.ModuleList([norm, mlp]), "auto", lambda x: False)) == []


def test_stock_torchs_bits_need_the_models_own_code(monkeypatch):
    calls = count_pieces(monkeypatch)
    for rounding in ("torch", "nearest"):
        assert not calls
        config = TTTConfig(lr=1e-2, steps=1, engine="dense", rounding=rounding)
        TTTTrainer(tiny_model("llama", torch.bfloat16), config).adapt(prompt_ids(6)).restore()
    assert calls


@ENGINES
@pytest.mark.parametrize("name", ["norm", "layers.0.mlp", "layers.0.self_attn"])
def test_a_module_with_a_forward_of_its_own_on_the_instance_keeps_it(engine, name):
    model, seen = tiny_model("llama"), []
    module = model.model.get_submodule(name)
    module.forward = lambda *x, **y: (seen.append(1), type(module).forward(module, *x, **y))[1]
    config = TTTConfig(lr=1e-2, steps=2, engine=engine, scope="attention")
    with TTTTrainer(model, config).adapt(prompt_ids(6)):
        pass
    assert len(seen) == 2 and "forward" in vars(module)


def test_an_input_of_another_dtype_is_left_to_the_modules_own_code():
    norm = new_norm(by_name["LlamaRMSNorm"])
    (piece,) = pieces_of(norm, "auto", lambda x: False)
    x = noise(2, 33).bfloat16()
    assert torch.equal(piece.forward(x), norm(x)) and piece.forward(x).dtype == norm(x).dtype


@pytest.mark.parametrize("scope", ["all", "ffn"])
def test_gradients_of_gradients_through_an_adapted_model(scope):
    """They need operations of torch, which the modules' own code has."""
    model = tiny_model("llama")
    config = TTTConfig(lr=1e-2, steps=2, engine="factored", scope=scope)
    with TTTTrainer(model, config).adapt(prompt_ids(6)):
        embeddings = model.get_input_embeddings()(prompt_ids(5)).detach().requires_grad_()
        loss = model(inputs_embeds=embeddings).logits.square().mean()
        (gradient,) = torch.autograd.grad(loss, embeddings, create_graph=True)
        (second,) = torch.autograd.grad(gradient.square().sum(), embeddings)
    assert second.abs().sum() > 0


# ---------------------------------------------------------------------------- rotary positions

# GPT-2 and OPT have learned positions.
ROTARY_FAMILIES = [family for family in FAMILIES if family not in ("gpt2", "opt")]


def attention_of(model):
    return model.model.layers[0].self_attn


def model_with(kind, dtype):
    """A tiny model of the family that an attention is of."""
    from transformers import AutoConfig, AutoModelForCausalLM

    family = kind.__module__.split(".")[-2]
    config = AutoConfig.for_model(
        {"gemma3": "gemma3_text"}.get(family, family), vocab_size=101, hidden_size=32,
        intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, num_experts=4, num_experts_per_tok=2,
        num_local_experts=4, moe_intermediate_size=24, shared_expert_intermediate_size=40,
        **({"head_dim": 8} if family not in ("phi3", "gpt_neox") else {}),
    )  # fmt: skip
    config._experts_implementation = "eager"
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def turning(model):
    return [piece for piece in pieces_of(model, "auto", lambda x: False)
            if isinstance(piece, AttentionPiece)]  # fmt: skip


@DTYPES
@pytest.mark.parametrize("kind", TURNING, ids=lambda kind: kind.__name__)
def test_turns_as_the_models_own_code(kind, dtype, monkeypatch):
    model, rows = model_with(kind, dtype), prompt_ids(9, n_rows=2)
    ours = turning(model)
    assert len(ours) == 2
    calls, results = count_pieces(monkeypatch), []
    for stand_ins in (ours, []):
        with standing_in(stand_ins):
            logits = model(rows).logits
        loss = logits.float().square().mean()
        results.append((logits, *torch.autograd.grad(loss, model.parameters(), allow_unused=True)))
        assert len(calls) == 2  # a layer each, once
    (y, *gradients), (expected, *theirs) = results
    if kind.__name__ in pieces._TURN_PART:  # another layout in memory, other sums of products
        assert_near(y, expected, 0.5)
    else:
        assert_same_bits([y], [expected], "logits")
    for mine, other in zip(gradients, theirs, strict=True):
        assert (mine is None) == (other is None)
        if mine is not None:
            near = 0.05 if dtype == torch.bfloat16 else 1e-4
            assert (mine - other).norm() <= near * other.norm()


def turned_case(family, dtype=torch.float64):
    """A tiny model's way to turn, queries, keys and angles whose halves differ."""
    model = tiny_model(family, dtype)
    (name, module), *_ = [m for m in model.named_modules() if rotary_of(m[1], "auto")]
    q, k = noise(2, 4, 5, 8).to(dtype), noise(2, 2, 5, 8, seed=1).to(dtype)
    cos, sin = noise(2, 1, 5, 4 if family == "phi3" else 8, seed=2).to(dtype)
    return rotary_of(module, "auto"), (q, k, cos, sin)


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_gradients_of_turned_queries_and_keys(family):
    rotary, (q, k, cos, sin) = turned_case(family)
    inputs = q.requires_grad_(), k.requires_grad_()
    assert gradcheck(lambda q, k: rotary(q, k, cos, sin), inputs)
    wrong = rotary._replace(op=lambda *args, transposed: rotary.op(*args, transposed=False))
    with pytest.raises(GradcheckError):
        gradcheck(lambda q, k: wrong(q, k, cos, sin), inputs)


def test_what_needs_no_gradient_is_not_turned_back():
    rotary, (q, k, cos, sin) = turned_case("llama")
    back = []

    def op(*args, transposed):
        back.extend([1] * transposed)
        return rotary.op(*args, transposed=transposed)

    q, k = rotary._replace(op=op)(q.requires_grad_(), k, cos, sin)
    assert q.requires_grad and not k.requires_grad
    q.sum().backward()
    assert len(back) == 1


def test_calls_that_are_not_the_usual_one_are_left_to_the_models_own_code(monkeypatch):
    rotary, (q, k, cos, sin) = turned_case("llama", torch.float32)
    calls = count_pieces(monkeypatch)
    flat = [t.transpose(1, 2) for t in (q, k)]
    for arguments, options in (
        ((*flat, cos, sin), {"unsqueeze_dim": 2}),
        ((*flat, cos, sin, 2), {}),
        ((q.bfloat16(), k.bfloat16(), cos, sin), {}),
        ((q, k, cos[:, :1], sin[:, :1]), {}),
        ((q, k, cos.requires_grad_(), sin), {}),
    ):
        ours, theirs = rotary(*arguments, **options), rotary.own(*arguments, **options)
        assert_same_bits(list(ours), list(theirs), "own code")
    assert ours[0].grad_fn is not None
    with pytest.raises(RuntimeError, match="size of tensor"):
        rotary(q, k, cos[..., :4].detach(), sin[..., :4])
    assert not calls


def test_positions_that_somebody_changed_are_left_alone(monkeypatch):
    attention = attention_of(tiny_model("llama"))
    kind, file = type(attention), vars(sys.modules[type(attention).__module__])
    assert rotary_of(attention, "auto") is not None

    def wrapped(function):
        return functools.wraps(function)(lambda *args, **kwargs: function(*args, **kwargs))

    for name in ("apply_rotary_pos_emb", "rotate_half"):
        with monkeypatch.context() as patch:
            patch.setitem(file, name, wrapped(file[name]))
            assert rotary_of(attention, "auto") is None
    with monkeypatch.context() as patch:
        patch.setattr(kind, "forward", wrapped(kind.forward))
        assert rotary_of(attention, "auto") is None
    own = type("LlamaAttention", (kind,), {"__module__": kind.__module__})
    assert rotary_of(own(attention.config, 0), "auto") is None
    assert rotary_of(attention, "auto") is not None


def test_no_other_model_turns_with_it(monkeypatch):
    model, other, rows = tiny_model("llama"), tiny_model("llama", seed=1), prompt_ids(6)
    attention, expected = attention_of(model), other(rows).logits
    file, forward = vars(sys.modules[type(attention).__module__]), type(attention).forward
    before, calls = dict(file), count_pieces(monkeypatch)
    with standing_in(turning(model)):
        assert torch.equal(other(rows).logits, expected) and not calls
        model(rows)
        assert len(calls) == 3 and file == before and type(attention).forward is forward
        assert forward.__globals__ is file and "forward" not in vars(attention_of(other))
    model(rows)
    assert len(calls) == 3 and "forward" not in vars(attention)


@ENGINES
@pytest.mark.parametrize("family", ROTARY_FAMILIES)
def test_every_family_adapts_as_it_does_without(engine, family, monkeypatch):
    model, rows, steps = tiny_model(family), prompt_ids(9), 20 if family == "llama" else 4
    config = TTTConfig(lr=1e-2, steps=steps, engine=engine, momentum=0.9, scope="attention")
    with monkeypatch.context() as patch, unchanged(model):
        calls = count_pieces(patch)
        with TTTTrainer(model, config).adapt(rows) as adapted:
            losses = adapted.losses
    assert pieces._Rotary in calls
    monkeypatch.setattr(pieces, "rotary_of", lambda *_: None)
    with TTTTrainer(model, config).adapt(rows) as adapted:
        assert torch.allclose(adapted.losses, losses, rtol=2e-4)
