"""Modules of models that one op computes: as their own code does, and given back."""

import importlib

import pytest
import torch
from torch import nn

from tests.families import tiny_model
from tests.loops import prompt_ids
from tests.untouched import unchanged
from ttt_fast import TTTConfig, TTTTrainer
from ttt_fast.engines import pieces
from ttt_fast.engines.pieces import GATED_MLPS, RMS_NORMS, glu_of, pieces_of, rms_norm_of

ENGINES = pytest.mark.parametrize("engine", ["dense", "factored"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def classes(names, suffix):
    """Those of the classes that the installed transformers has."""
    folders = {"deepseekv2": "deepseek_v2", "deepseekv3": "deepseek_v3"}
    for name in sorted(names):
        family = name.removesuffix(suffix).lower()
        family = folders.get(family, family)
        try:
            module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
        except ModuleNotFoundError:
            continue
        yield getattr(module, name)


NORMS, MLPS = list(classes(RMS_NORMS, "RMSNorm")), list(classes(GATED_MLPS, "MLP"))
by_name = {kind.__name__: kind for kind in NORMS + MLPS}


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


@DTYPES
@pytest.mark.parametrize("kind", NORMS + MLPS, ids=lambda kind: kind.__name__)
def test_computes_as_the_models_own_code(kind, dtype):
    module = (new_norm if kind in NORMS else new_mlp)(kind, dtype)
    (piece,) = pieces_of(module, "auto", lambda x: False)
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
    for function in (pieces._RmsNorm, pieces._Glu):
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
    monkeypatch.setattr(pieces, "_is_of", lambda *_: False)
    calls = count_pieces(monkeypatch)
    with TTTTrainer(model, config).adapt(rows, deltas="independent") as adapted:
        assert torch.allclose(adapted.losses, losses, rtol=2e-5)
    assert not calls


def test_plain_torch_is_the_models_own_code(monkeypatch):
    norm, mlp = new_norm(by_name["LlamaRMSNorm"]), new_mlp(by_name["LlamaMLP"])
    assert rms_norm_of(norm, "torch") is None and glu_of(mlp, "torch") is None
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
@pytest.mark.parametrize("name", ["norm", "layers.0.mlp"])
def test_a_module_with_a_forward_of_its_own_on_the_instance_keeps_it(engine, name):
    model, seen = tiny_model("llama"), []
    module = model.model.get_submodule(name)
    module.forward = lambda x: (seen.append(1), type(module).forward(module, x))[1]
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
