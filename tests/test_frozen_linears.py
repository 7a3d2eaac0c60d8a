"""Linear layers that do not train: as torch computes them, with nothing of x kept."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

from tests.families import tiny_model
from tests.loops import prompt_ids
from tests.untouched import unchanged
from ttt_fast import TTTConfig, TTTTrainer, select_parameters
from ttt_fast.engines import pieces
from ttt_fast.engines.pieces import LinearPiece, pieces_of
from ttt_fast.engines.products import linear

ENGINES = pytest.mark.parametrize("engine", ["dense", "factored"])


def linears(model, backend="auto", own_code=lambda x: False):
    found = pieces_of(model, backend, own_code)
    return [piece for piece in found if isinstance(piece, LinearPiece)]


def frozen(n_in=37, n_out=21, bias=True, dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Linear(n_in, n_out, bias).to(dtype).requires_grad_(False)


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def count_products(monkeypatch):
    """The weights of the frozen products that were computed."""
    weights, real = [], pieces._FrozenLinear.apply
    spy = lambda x, weight, *more: (weights.append(weight), real(x, weight, *more))[1]  # noqa: E731
    monkeypatch.setattr(pieces._FrozenLinear, "apply", spy)
    return weights


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5, 37), (2, 9, 37), (1, 300, 37), (2, 0, 37)], ids=str)
def test_computes_as_torch_does(bias, shape):
    module = frozen(bias=bias)
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
    module, kept = frozen(), []
    (piece,) = linears(module)
    x = noise(4, 37).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        piece.forward(x)
    assert [t.data_ptr() for t in kept] == [module.weight.data_ptr()]


@pytest.mark.parametrize("which", ["weight", "bias"])
def test_what_trains_has_its_gradient(which, monkeypatch):
    module, products = frozen(), count_products(monkeypatch)
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

    halved = frozen()
    parametrize.register_parametrization(halved, "weight", nn.Identity())
    others = Doubled(4, 4), Conv1D(4, 4), halved, frozen(dtype=torch.float64)
    for module in others:
        assert linears(module) == []
    for found in (False, True):
        rows = lambda dtype, found=found: 192 * (found or dtype == torch.float32)  # noqa: E731
        monkeypatch.setattr(pieces, "most_rows", rows)
        assert len(linears(frozen(dtype=torch.bfloat16))) == found
    assert linears(frozen(), backend="torch") == []
    assert len(linears(frozen())) == 1


def test_inputs_of_other_kinds_are_left_to_torch(monkeypatch):
    module, products = frozen(), count_products(monkeypatch)
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
    monkeypatch.setattr(pieces, "linear_of", lambda *_: None)
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
