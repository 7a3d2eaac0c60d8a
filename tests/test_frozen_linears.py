"""Linear layers that do not train: as torch computes them, with nothing of x kept."""

import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

from tests.families import tiny_model
from tests.loops import prompt_ids
from tests.untouched import unchanged
from ttt_fast import TTTConfig, TTTTrainer, select_parameters
from ttt_fast.engines import frozen, pieces, products
from ttt_fast.engines.frozen import LinearPiece
from ttt_fast.engines.pieces import pieces_of, standing_in
from ttt_fast.engines.products import linear

ENGINES = pytest.mark.parametrize("engine", ["dense", "factored"])


def linears(model, backend="auto", own_code=lambda x: False):
    found = pieces_of(model, backend, own_code)
    return [piece for piece in found if isinstance(piece, LinearPiece)]


def frozen_linear(n_in=37, n_out=21, bias=True, dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Linear(n_in, n_out, bias).to(dtype).requires_grad_(False)


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def count_products(monkeypatch):
    """The weights of the frozen products that were computed."""
    weights = []
    for function in (frozen._FrozenLinears, frozen._FrozenMlp):

        def spy(*args, real=function.apply):
            weights.extend(arg for arg in args[1:] if isinstance(arg, Tensor) and arg.dim() == 2)
            return real(*args)

        monkeypatch.setattr(function, "apply", spy)
    return weights


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5, 37), (2, 9, 37), (1, 300, 37), (2, 0, 37)], ids=str)
def test_computes_as_torch_does(bias, shape):
    module = frozen_linear(bias=bias)
    (piece,) = linears(module)
    x, dy = noise(*shape).requires_grad_(), noise(*shape[:-1], 21, seed=1)
    expected = module(x)
    y = piece.forward(x)
    assert torch.allclose(y, expected, rtol=1e-5, atol=1e-5)
    ours, theirs = (torch.autograd.grad(out, x, dy)[0] for out in (y, expected))
    assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    assert not piece.forward(x.detach()).requires_grad


@ENGINES
@pytest.mark.parametrize("layer", ["fc1", "out_proj"])
def test_a_model_may_write_into_what_a_linear_gave(engine, layer):
    """One that trains, and one that does not."""
    losses = []
    for in_place in (False, True):
        model = tiny_model("opt")
        for module in model.modules():
            if in_place and hasattr(module, layer):
                getattr(module, layer).register_forward_hook(lambda m, x, y: y.mul_(2))
            elif hasattr(module, layer):
                getattr(module, layer).register_forward_hook(lambda m, x, y: y * 2)
        config = TTTConfig(lr=1e-2, steps=2, engine=engine, scope="ffn")
        with TTTTrainer(model, config).adapt(prompt_ids(6)) as adapted:
            losses.append(adapted.losses)
    assert torch.equal(*losses)


def test_nothing_of_the_input_is_kept():
    module, kept = frozen_linear(), []
    (piece,) = linears(module)
    x = noise(4, 37).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        piece.forward(x)
    assert [t.data_ptr() for t in kept] == [module.weight.data_ptr()]


@pytest.mark.parametrize("which", ["weight", "bias"])
def test_what_trains_has_its_gradient(which, monkeypatch):
    module, products = frozen_linear(), count_products(monkeypatch)
    (piece,) = linears(module)
    parameter = getattr(module, which).requires_grad_()
    piece.forward(noise(4, 37)).sum().backward()
    assert parameter.grad.abs().sum() > 0 and not products
    parameter.requires_grad_(False)
    piece.forward(noise(4, 37))
    assert products


def test_what_is_not_a_plain_linear_is_left_alone(monkeypatch):
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    halved = frozen_linear()
    parametrize.register_parametrization(halved, "weight", nn.Identity())
    others = Doubled(4, 4), Conv1D(4, 4), halved, frozen_linear(dtype=torch.float64)
    for module in others:
        assert linears(module) == []
    for found in (False, True):
        rows = lambda dtype, found=found: 192 * (found or dtype == torch.float32)  # noqa: E731
        monkeypatch.setattr(pieces, "most_rows", rows)
        assert len(linears(frozen_linear(dtype=torch.bfloat16))) == found
    assert linears(frozen_linear(), backend="torch") == []
    assert len(linears(frozen_linear())) == 1


def test_inputs_of_other_kinds_are_left_to_torch(monkeypatch):
    module, products = frozen_linear(), count_products(monkeypatch)
    (piece,) = linears(module)
    with torch.autocast("cpu", torch.bfloat16):
        assert piece.forward(noise(4, 37)).dtype == torch.bfloat16
    (differentiated,) = linears(module, own_code=lambda x: True)
    differentiated.forward(noise(4, 37))
    with pytest.raises(RuntimeError, match="dtype"):
        piece.forward(noise(4, 37).double())
    assert not products


@ENGINES
@pytest.mark.parametrize(("scope", "some"), [("attention", "mlp"), ("ffn", "self_attn")])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt_neox"])
def test_an_adaptation_is_what_it_is_without_them(engine, scope, some, family, monkeypatch):
    model, rows = tiny_model(family), prompt_ids(9, n_rows=2)
    some = {"self_attn": "attention"}.get(some, some) if family == "gpt_neox" else some
    config = TTTConfig(lr=1e-2, steps=3, engine=engine, momentum=0.9, scope=scope)
    with monkeypatch.context() as patch, unchanged(model):
        products = count_products(patch)
        with TTTTrainer(model, config).adapt(rows, deltas="independent") as adapted:
            losses = adapted.losses
    names = {id(param): name for name, param in model.named_parameters()}
    used = {names[id(weight)] for weight in products}
    assert any(some in name for name in used)
    assert used.isdisjoint(s.name for s in select_parameters(model, scope))
    monkeypatch.setattr(pieces, "has_product", lambda *_: False)
    with TTTTrainer(model, config).adapt(rows, deltas="independent") as adapted:
        assert torch.allclose(adapted.losses, losses, rtol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [slice(0, 4), slice(3, 203)], ids=["few", "many"])
def test_of_some_tokens_of_a_batch_it_is_one_product(dtype, tokens):
    """Torch makes a batch of products of them, each with a copy of the weights."""

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            mine = isinstance(result, torch.Tensor)
            if mine and result.untyped_storage().data_ptr() != weight.untyped_storage().data_ptr():
                written.append(result.numel())
            return result

    x, weight, written = noise(2, 250, 37).to(dtype), noise(211, 37, seed=1).to(dtype), []
    with Watch():
        y = linear(x[:, tokens], weight)
    # Nothing as large as the weights but what there has to be: the rows, and the result.
    rows = 2 * (tokens.stop - tokens.start)
    assert {n for n in written if n >= weight.numel()} <= {rows * 37, rows * 211}
    torch.testing.assert_close(y, x[:, tokens] @ weight.t())


# ---------------------------------------------------------------------------- several as one


def count_functions(monkeypatch):
    """How many layers each function of autograd was made of."""
    found = []
    for function, n in ((frozen._FrozenLinears, None), (frozen._FrozenMlp, 3)):

        def spy(*args, real=function.apply, n=n):
            found.append(n or (len(args) - 1) // 2)
            return real(*args)

        monkeypatch.setattr(function, "apply", spy)
    return found


def attention_and_mlp(family="llama", dtype=torch.float32, **options):
    """A model of one layer, frozen; its biases are not 0."""
    model = tiny_model(family, dtype, num_hidden_layers=1, **options).requires_grad_(False)
    for name, param in model.named_parameters():
        if name.endswith("bias"):
            param.copy_(noise(*param.shape))
    return model


def through(model, **options):
    """Loss, and the gradient of the input embeddings."""
    x = model.get_input_embeddings()(prompt_ids(9, n_rows=2)).detach().requires_grad_()
    loss = model(inputs_embeds=x, use_cache=False, **options).logits.square().mean()
    return loss, *torch.autograd.grad(loss, x)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma2", "gemma3"])
@pytest.mark.parametrize("rows", [0, 1000], ids=["torch's products", "ours"])
def test_layers_of_one_input_are_one_function(family, rows, monkeypatch):
    """Queries, keys and values; and all of an MLP; biases included."""
    monkeypatch.setattr(products, "most_rows", lambda *_: rows)
    model = attention_and_mlp(family)
    expected = through(model)
    functions = count_functions(monkeypatch)
    with standing_in(pieces_of(model, "auto", lambda x: False)):
        found = through(model)
    assert sorted(functions) == [1, 1, 3, 3]  # the head and an output projection alone
    for mine, stock in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, stock, rtol=1e-5, atol=1e-7)


def test_gradients_in_float64_are_autograds(monkeypatch):
    """There is no such product for float64, but the functions hold for any."""
    mlp = attention_and_mlp(dtype=torch.float64).model.layers[0].mlp
    x = noise(2, 5, mlp.gate_proj.in_features).double().requires_grad_()
    arithmetic = pieces.glu_of(mlp, "auto")
    weights = [layer.weight for layer in (mlp.gate_proj, mlp.up_proj, mlp.down_proj)]
    assert torch.autograd.gradcheck(lambda x: frozen._FrozenMlp.apply(x, arithmetic, *weights), x)
    biases = noise(*weights[0].shape[:1]).double(), None
    assert torch.autograd.gradcheck(
        lambda x: frozen._FrozenLinears.apply(x, *weights[:2], *biases), x
    )


def test_an_mlp_with_biases_is_not_one_function(monkeypatch):
    model = attention_and_mlp(mlp_bias=True)
    expected = through(model)
    functions = count_functions(monkeypatch)
    with standing_in(pieces_of(model, "auto", lambda x: False)):
        found = through(model)
    assert sorted(functions) == [1, 1, 1, 1, 1, 3]
    for mine, stock in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, stock, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_token_has_no_gradient(dtype):
    weights = [noise(4, 8).to(dtype), noise(6, 8).to(dtype)]
    x = noise(2, 0, 8).to(dtype).requires_grad_()
    y = frozen._FrozenLinears.apply(x, *weights, None, None)
    assert [each.shape for each in y] == [(2, 0, 4), (2, 0, 6)]
    (gradient,) = torch.autograd.grad(sum(each.sum() for each in y), x)
    assert gradient.shape == x.shape


def test_a_layer_that_trains_is_left_out_of_its_group(monkeypatch):
    model = attention_and_mlp()
    layer = model.model.layers[0]
    layer.self_attn.k_proj.weight.requires_grad_()
    layer.mlp.up_proj.weight.requires_grad_()
    functions = count_functions(monkeypatch)
    with standing_in(pieces_of(model, "auto", lambda x: False)):
        through(model)
    assert sorted(functions) == [1, 1, 1, 1, 2]


@pytest.mark.parametrize("kind", ["forward", "pre", "backward", "global"])
@pytest.mark.parametrize("where", ["k_proj", "up_proj"])
def test_hooks_see_what_they_saw(kind, where, monkeypatch):
    model = attention_and_mlp()
    (module,) = (m for name, m in model.named_modules() if name.endswith(where))
    seen = []

    def note(owner, *args):
        if owner is module:
            seen.append([t.detach().clone() for a in args for t in a if t is not None])

    found = []
    for taken in ([], pieces_of(model, "auto", lambda x: False)):
        seen.clear()
        handle = {
            "forward": lambda: module.register_forward_hook(note),
            "pre": lambda: module.register_forward_pre_hook(note),
            "backward": lambda: module.register_full_backward_hook(note),
            "global": lambda: nn.modules.module.register_module_forward_hook(note),
        }[kind]()
        with standing_in(taken):
            through(model)
        handle.remove()
        found.append(list(seen))
    (stock,), (mine,) = found
    assert len(stock) == len(mine) > 0
    for a, b in zip(stock, mine, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_an_input_that_was_changed_between_is_read_anew():
    layers = [frozen_linear(8, 4), frozen_linear(8, 4)]
    same = frozen.SameInput()
    found = [LinearPiece("", m, lambda x: False, same) for m in layers]
    x = noise(3, 8)
    with standing_in(found):
        layers[0](x)
        x.add_(1)
        torch.testing.assert_close(layers[1](x), nn.Linear.forward(layers[1], x))
        # Called twice, and another in between.
        for module in (layers[0], layers[0], layers[1], layers[1], layers[0]):
            torch.testing.assert_close(module(x), nn.Linear.forward(module, x))
        with torch.inference_mode():
            y = noise(3, 8)
            torch.testing.assert_close(layers[0](y), nn.Linear.forward(layers[0], y))


def test_nothing_stays_when_the_stand_ins_go():
    """A forward that broke off between queries and values."""
    layers = [frozen_linear(8, 4), frozen_linear(8, 4)]
    same = frozen.SameInput()
    found = [LinearPiece("", m, lambda x: False, same) for m in layers]
    x = noise(3, 8)
    held = weakref.ref(x)
    with standing_in(found):
        layers[0](x)
        del x
        assert held() is not None
    assert held() is None
