"""Gradients as products and in buffers that live on: every way in which a model uses a weight."""

import peft
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from transformers.pytorch_utils import Conv1D

from tests import gradient_cases
from tests.families import tiny_model
from tests.gradient_cases import IDS, OPTIONS, formed
from tests.loops import distance, params_of, prompt_ids, row_loss, sgd_loop, twin
from ttt_fast import RowSlice, Selection, TTTConfig, TTTTrainer, select_parameters
from ttt_fast.engines.gradients import GradientBuffers


def assert_adapts_as_autograd(model, scope="all", tolerance=1e-12, **options):
    other = twin(model)
    params = params_of(other, select_parameters(model, scope))
    other.eval()
    losses, _ = sgd_loop(other, [lambda m: row_loss(m, IDS[0])] * 3, params=params, **OPTIONS)
    config = TTTConfig(steps=3, scope=scope, engine="dense", **(OPTIONS | options))
    with TTTTrainer(model, config).adapt(IDS) as adapted:
        assert adapted.losses[0].tolist() == pytest.approx(losses, rel=1e-12)
        assert distance(model, other) <= tolerance


path = gradient_cases.path


def collected(buffers, selections):
    views = [selection.view() for selection in selections]
    return [formed(g, v) for g, v in zip(buffers.collect(), views, strict=True)]


def gradients_of(module, *inputs):
    """Gradients by GradientBuffers, twice (buffers reused), and by autograd."""
    selections = [Selection(name, param) for name, param in module.named_parameters()]
    buffers = GradientBuffers(module, selections)
    for _ in range(2):
        with buffers.recording():
            module(*inputs).square().sum().backward()
            # Whatever went to autograd is part of what collect returns.
            got = collected(buffers, selections)
    module.zero_grad()
    module(*inputs).square().sum().backward()
    expected = [param.grad for param in module.parameters()]
    module.zero_grad()
    return got, expected


def assert_gradients(module, *inputs):
    got, expected = gradients_of(module, *inputs)
    assert len(got) == len(expected) > 0
    for ours, theirs in zip(got, expected, strict=True):
        assert (ours is None) == (theirs is None)
        assert ours is None or torch.allclose(ours, theirs, rtol=1e-12, atol=1e-14)


def taken_over(model, selections=None):
    selections = selections or select_parameters(model)
    return [module for module, _ in GradientBuffers(model, selections)._takeovers]


X = torch.randn(2, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


# ---------------------------------------------------------------------------- modules


@pytest.mark.parametrize("shape", [(4,), (1, 4), (3, 4), (2, 5, 4), (0, 4)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_linear_of_any_input_shape(shape, bias):
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert_gradients(nn.Linear(4, 3, bias=bias).double(), x)


def test_conv1d():
    assert_gradients(Conv1D(3, 4).double(), X)


@pytest.mark.parametrize("padding_idx", [None, 0, -1])
def test_embedding_with_repeated_ids(padding_idx):
    ids = torch.tensor([[0, 2, 2, 6], [6, 0, 3, 2]])
    module = nn.Embedding(7, 3, padding_idx=padding_idx).double()
    assert_gradients(nn.Sequential(module, nn.Linear(3, 2).double()), ids)


@pytest.mark.parametrize("option", [dict(max_norm=1.0), dict(scale_grad_by_freq=True)], ids=str)
def test_embedding_with_options_is_left_to_autograd(option):
    ids = torch.tensor([[0, 2, 2, 6]])
    module = nn.Embedding(7, 3, **option).double()
    assert taken_over(module) == []
    assert_gradients(module, ids)


class Twice(nn.Module):
    """One linear is called twice, its weight is used once more without the module."""

    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(4, 4)
        self.unused = nn.Linear(4, 4)
        self.table = nn.Embedding(9, 4)
        self.head = nn.Linear(4, 9, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids):
        x = self.proj(self.proj(self.table(ids)).tanh())
        return self.head(x + F.linear(x, self.proj.weight.t())) + x @ self.table.weight.t()


def test_a_weight_that_is_used_in_several_ways():
    module = Twice().double()
    ids = torch.tensor([[1, 2, 8, 2]])
    got, expected = gradients_of(module, ids)
    unused = [name for name, _ in module.named_parameters()].index("unused.weight")
    assert got[unused] is None and expected[unused] is None
    assert_gradients(module, ids)


@pytest.mark.parametrize(
    "wrap", [parametrizations.weight_norm, parametrizations.spectral_norm], ids=["weight", "spec"]
)
def test_a_weight_that_is_computed(wrap):
    """`module.weight` is no parameter then, but what it is computed from has to learn."""
    torch.manual_seed(0)
    module = nn.Sequential(wrap(nn.Linear(4, 3)), nn.Linear(3, 2)).double().eval()
    assert_gradients(module, X)


def test_a_frozen_weight_with_a_bias_that_learns():
    module = nn.Linear(4, 3).double()
    module.weight.requires_grad_(False)
    buffers = GradientBuffers(module, [Selection("bias", module.bias)])
    with buffers.recording():
        module(X).sum().backward()
        assert torch.equal(buffers.collect()[0], torch.full((3,), 10.0, dtype=torch.float64))
    assert module.weight.grad is None and module.bias.grad is None


def test_hooks_on_a_parameter_see_its_gradient():
    module = nn.Linear(4, 3).double()
    module.weight.register_hook(lambda gradient: gradient * torch.eye(3, 4).double())
    assert_gradients(module, X)
    got, _ = gradients_of(module, X)
    assert got[0][0, 1] == 0 and got[0][0, 0] != 0


def test_a_forward_on_the_instance_stays_in_charge():
    module = nn.Linear(4, 3).double()
    module.forward = lambda x: 2 * F.linear(x, module.weight, module.bias)
    found = module.forward
    assert_gradients(module, X)
    assert module.forward is found


def test_a_subclass_keeps_its_own_forward():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    assert taken_over(Doubled(4, 3)) == []
    assert_gradients(Doubled(4, 3).double(), X)


def test_rows_of_a_projection():
    for module, dim in ((nn.Linear(4, 12).double(), 0), (Conv1D(12, 4).double(), 1)):
        selections = [
            Selection("weight", module.weight, RowSlice(dim, 2, 3, 6)),
            Selection("bias", module.bias, RowSlice(0, 2, 3, 6)),
        ]
        buffers = GradientBuffers(module, selections)
        with buffers.recording():
            (module(X).square().sum() + module.weight.square().sum()).backward()
            got = collected(buffers, selections)
        module.zero_grad()
        (module(X).square().sum() + module.weight.square().sum()).backward()
        for selection, gradient in zip(selections, got, strict=True):
            expected = selection.view(selection.param.grad)
            assert gradient.shape == expected.shape
            assert torch.allclose(gradient, expected, rtol=1e-12)


def test_second_derivatives_are_refused():
    module = nn.Linear(4, 3).double()
    buffers = GradientBuffers(module, [Selection("weight", module.weight)])
    x = X.clone().requires_grad_()
    with buffers.recording():
        y = module(x).square().sum()
        (dx,) = torch.autograd.grad(y, x, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            dx.square().sum().backward()


def test_modules_are_given_back():
    model = tiny_model("gpt2")
    buffers = GradientBuffers(model, select_parameters(model))
    forwards = [module.forward for module in model.modules()]
    with pytest.raises(KeyError), buffers.recording():
        assert "forward" in vars(model.lm_head)
        raise KeyError
    assert [module.forward for module in model.modules()] == forwards
    assert not any("forward" in vars(module) for module in model.modules())


def test_buffers_are_reused():
    model = tiny_model("llama")
    trainer = TTTTrainer(model, TTTConfig(steps=2, engine="dense"))
    places = []
    for _ in range(2):
        trainer.adapt(IDS).restore()
        engine = trainer._engine("dense")
        buffers = [slot._buffer for slot in engine.gradients._slots]
        buffers += engine._scratch._buffers.values()
        places.append([b.data_ptr() for b in buffers if b is not None])
    assert places[0] == places[1] and places[0]


@pytest.mark.parametrize("family", ["llama_tied", "gpt2", "gpt_neox", "opt"])
def test_every_linear_of_a_family_is_taken_over(family):
    model = tiny_model(family)
    linears = [m for m in model.modules() if isinstance(m, nn.Linear | Conv1D | nn.Embedding)]
    left = [type(m).__name__ for m in linears if m not in set(taken_over(model))]
    assert set(left) <= {"OPTLearnedPositionalEmbedding"}


# ---------------------------------------------------------------------------- models


class Functional(nn.Module):
    """A module that reads its linear's weight instead of calling it."""

    def __init__(self, proj):
        super().__init__()
        self.proj = proj

    def forward(self, x):
        return F.linear(x, self.proj.weight)


def test_a_weight_that_is_read_instead_of_called():
    model = tiny_model("llama", torch.float64)
    model.lm_head = Functional(model.lm_head)
    assert_adapts_as_autograd(model)


def test_a_linear_that_two_layers_share():
    model = tiny_model("llama", torch.float64)
    model.model.layers[0].mlp.down_proj = model.model.layers[2].mlp.down_proj
    assert_adapts_as_autograd(model)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("dropout", [True, False])
def test_gradient_checkpointing(use_reentrant, dropout):
    """Its forwards run again in the backward, where the modules have to be taken over still."""
    model = tiny_model("llama", torch.float64).train()
    expected = TTTTrainer(model, TTTConfig(steps=3, engine="dense")).adapt(IDS)
    expected.restore()
    model.gradient_checkpointing_enable(
        gradient_checkpointing_kwargs=dict(use_reentrant=use_reentrant)
    )
    # Llama has no dropout: the option only puts the model into the mode that checkpoints.
    calls = []
    model.model.layers[1].mlp.register_forward_pre_hook(lambda *call: calls.append(1))
    with TTTTrainer(model, TTTConfig(steps=3, dropout=dropout, engine="dense")).adapt(
        IDS
    ) as adapted:
        assert torch.allclose(adapted.losses, expected.losses, rtol=1e-12)
        assert torch.allclose(adapted.grad_norms, expected.grad_norms, rtol=1e-12)
    assert len(calls) == (6 if dropout else 3)
    assert model.is_gradient_checkpointing


def test_lora():
    model = tiny_model("llama", torch.float64)
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    model = peft.get_peft_model(model, config).double()
    base = model.get_base_model().model.layers[0].mlp.down_proj.base_layer.weight.clone()
    assert_adapts_as_autograd(model, scope="lora")
    assert torch.equal(base, model.get_base_model().model.layers[0].mlp.down_proj.base_layer.weight)
    # Position ids reach the model through PEFT's forward, which does not name them.
    short, long = prompt_ids(5), prompt_ids(9, seed=2)
    ids = torch.cat([F.pad(short, (4, 0)), long])
    mask = torch.cat([F.pad(torch.ones_like(short), (4, 0)), torch.ones_like(long)])
    trainer = TTTTrainer(model.float(), TTTConfig(steps=1, scope="lora", engine="dense"))
    with trainer.adapt(ids, attention_mask=mask, deltas="shared") as adapted:
        loss = adapted.losses[0, 0].item()
        assert adapted.generate(max_new_tokens=2).shape == (2, 11)
    expected = (row_loss(model, short[0]) + row_loss(model, long[0])) / 2
    assert loss == pytest.approx(expected.item(), rel=1e-5)


def test_autocast():
    model = tiny_model("llama")
    other = twin(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses, _ = sgd_loop(other, [lambda m: row_loss(m, IDS[0])] * 2, **OPTIONS)
        with TTTTrainer(model, TTTConfig(steps=2, engine="dense", **OPTIONS)).adapt(IDS) as adapted:
            assert adapted.losses[0].tolist() == pytest.approx(losses, rel=1e-3)
            assert distance(model, other) < 1e-3
