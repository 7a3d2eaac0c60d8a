"""Gradients as products and in buffers that live on: every way in which a model uses a weight."""

import contextlib
import weakref

import peft
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from transformers.pytorch_utils import Conv1D

from tests.families import tiny_model
from tests.loops import distance, params_of, prompt_ids, row_loss, sgd_loop, twin, weights
from ttt_fast import RowSlice, Selection, TTTConfig, TTTTrainer, ops, select_parameters
from ttt_fast.engines import dense, products
from ttt_fast.engines.dense import DenseEngine
from ttt_fast.engines.gradients import GradientBuffers

OPTIONS = dict(lr=2e-2, momentum=0.9, weight_decay=0.01, max_grad_norm=1.0)
IDS = prompt_ids(8)


def assert_adapts_as_autograd(model, scope="all", tolerance=1e-12, **options):
    other = twin(model)
    params = params_of(other, select_parameters(model, scope))
    other.eval()
    losses, _ = sgd_loop(other, [lambda m: row_loss(m, IDS[0])] * 3, params=params, **OPTIONS)
    config = TTTConfig(steps=3, scope=scope, engine="dense", **(OPTIONS | options))
    with TTTTrainer(model, config).adapt(IDS) as adapted:
        assert adapted.losses[0].tolist() == pytest.approx(losses, rel=1e-12)
        assert distance(model, other) <= tolerance


NEVER, ALWAYS = 0.0, 1e12


PATHS = {"buffers": (NEVER, False), "products": (ALWAYS, False), "factors": (ALWAYS, True)}


@pytest.fixture(params=PATHS.values(), ids=PATHS, autouse=True)
def path(request, monkeypatch):
    """Every test runs with gradients in buffers, as products, and as factors that a kernel takes.

    Plain torch stands in for that kernel.
    """
    flops, taken = request.param
    monkeypatch.setattr(products, "FLOPS_PER_BYTE", flops)
    monkeypatch.setattr(dense, "takes_factors", lambda device_type, backend: taken)
    return flops


def formed(gradient, like):
    """A gradient of the shape of ``like``, whatever form it has."""
    if isinstance(gradient, products.Products):
        out = torch.empty(gradient.n, gradient.m, dtype=like.dtype)
        return gradient.write_rows(0, out).view(like.shape)
    return None if gradient is None else gradient.clone()


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


# ---------------------------------------------------------------------------- products


def norm_and_whole(module, ids):
    """The global norm, and the same of autograd's gradients."""
    selections = [Selection(name, param) for name, param in module.named_parameters()]
    buffers = GradientBuffers(module, selections)
    with buffers.recording():
        module(ids).square().sum().backward()
        gradients = [g for g in buffers.collect() if g is not None]
        kinds = {type(g) for g in gradients}
        norm = products.global_norm(gradients)
    module.zero_grad()
    module(ids).square().sum().backward()
    grads = [p.grad for p in module.parameters() if p.grad is not None]
    module.zero_grad()
    return norm, torch.nn.utils.get_total_norm(grads), kinds


class Tied(nn.Module):
    """An embedding with a pad token, a linear that is called twice, the tied head."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(9, 4, padding_idx=3)
        self.proj = nn.Linear(4, 4)
        self.conv = Conv1D(4, 4)
        self.head = nn.Linear(4, 9, bias=False)
        self.head.weight = self.table.weight
        with torch.no_grad():
            self.table.weight.normal_()

    def forward(self, ids):
        x = self.table(ids) + self.table(ids.flip(1))
        return self.head(self.conv(self.proj(self.proj(x).tanh())))


def test_norm_of_products(path):
    torch.manual_seed(0)
    module = Tied().double()
    norm, expected, kinds = norm_and_whole(module, torch.tensor([[1, 3, 2, 2, 8], [3, 5, 1, 0, 3]]))
    assert (products.Products in kinds) == (path == ALWAYS)
    assert torch.allclose(norm, expected, rtol=1e-13)
    # The cross term and the pad token count: neither is lost in the tolerance.
    ids, pad = torch.tensor([[1, 3, 2]]), torch.tensor([[1, 4, 2]])
    assert abs(norm_and_whole(module, ids)[0] / norm_and_whole(module, pad)[0] - 1) > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_norm_of_products_in_other_dtypes(dtype):
    torch.manual_seed(0)
    module = Tied().to(dtype)
    oracle = twin(module).double()
    ids = torch.tensor([[1, 3, 2, 2, 8, 1, 5]])
    norm, _, _ = norm_and_whole(module, ids)
    expected = norm_and_whole(oracle, ids)[1]
    assert norm.dtype == torch.float32
    assert norm.item() == pytest.approx(expected.item(), rel=4 * torch.finfo(dtype).eps)


def test_norm_of_a_sum_that_cancels_is_not_nan():
    """A lookup takes back what the head gave: rounding leaves a little on either side of zero."""
    for seed in range(20):
        b = torch.randn(1, 4, generator=torch.Generator().manual_seed(seed))
        gradient = products.Products(3, 4)
        gradient.add_pair(torch.tensor([[0.0, 0.7, 0.0]]), b)
        gradient.add_lookup(torch.tensor([1]), -0.7 * b)
        assert 0 <= products.global_norm([gradient]) < 3e-3
    gradient.add_pair(torch.ones(1, 3), b * torch.nan)
    assert products.global_norm([gradient]).isnan()


def test_blocks_are_small_whatever_the_view(monkeypatch):
    """A slice of a fused projection is one group of many rows; it is cut all the same."""
    monkeypatch.setattr(products, "CPU_BLOCK_BYTES", 1024)
    views = [torch.zeros(40, 8), torch.zeros(1, 40, 8), torch.zeros(5, 8, 8), torch.zeros(40, 2, 4)]
    for calls in ([*products.blocks_for_calls(views, [i])] for i in range(4)):
        assert len(calls) == 2 and all(len(blocks) == 1 for blocks in calls[:1])
        assert max(block.of(views[block.index]).nbytes for b in calls for block in b) <= 1024
    (together,) = products.blocks_for_calls([torch.zeros(2, 8)] * 5, range(5))
    assert len(together) == 5


def test_products_are_chosen_while_they_cost_less(monkeypatch):
    monkeypatch.undo()
    assert products.Products(1536, 576).pays(pair_rows=32)
    assert not products.Products(1536, 576).pays(pair_rows=256)
    assert products.Products(4096, 4096).pays(pair_rows=100)
    # Two uses are one of all their tokens; a lookup costs one side only.
    gradient = products.Products(1536, 576)
    gradient.add_pair(torch.ones(32, 1536), torch.ones(32, 576))
    assert not gradient.pays(pair_rows=32)
    assert products.Products(1536, 576).pays(lookup_rows=100)
    assert not products.Products(1536, 576).pays(pair_rows=100)


def test_a_long_prompt_goes_to_the_buffer(monkeypatch):
    """A second use that makes it too long forms what was kept."""
    monkeypatch.setattr(products, "FLOPS_PER_BYTE", 0.4)
    module = nn.Linear(16, 16, bias=False).double()
    x = torch.randn(5, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    buffers = GradientBuffers(module, [Selection("weight", module.weight)])
    for uses, kind in ((1, products.Products), (2, torch.Tensor)):
        with buffers.recording():
            sum(module(x * k).square().sum() for k in range(1, uses + 1)).backward()
            (gradient,) = buffers.collect()
            assert isinstance(gradient, kind)
            got = formed(gradient, module.weight)
        sum(module(x * k).square().sum() for k in range(1, uses + 1)).backward()
        assert torch.allclose(got, module.weight.grad, rtol=1e-12)
        module.zero_grad()


def spy_on(monkeypatch, name, note):
    """Have ``note`` called with the options of every call of an op."""
    real = getattr(ops, name)

    def spy(*args, **options):
        note(options)
        return real(*args, **options)

    monkeypatch.setattr(ops, name, spy)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_kernel_gets_the_factors_of_linears(monkeypatch, request, family):
    """One call for all matrices but the embeddings, which are looked up."""
    calls = []
    real = ops.rank_sgd_
    monkeypatch.setattr(ops, "rank_sgd_", lambda *a, **k: (calls.append(a[0]), real(*a, **k)))
    model = tiny_model(family, torch.float64)
    with TTTTrainer(model, TTTConfig(steps=2, engine="dense")).adapt(IDS):
        if "factors" not in request.node.callspec.id:
            assert calls == []
            return
        found = {param.data_ptr() for param in calls[0]}
        looked_up = [m.weight for m in model.modules() if isinstance(m, nn.Embedding)]
        matrices = {p.data_ptr() for p in model.parameters() if p.dim() == 2}
        assert len(calls) == 2
        assert found == matrices - {weight.data_ptr() for weight in looked_up}


@pytest.mark.parametrize(
    "options",
    [
        dict(optimizer="adamw"),
        dict(accumulate="delta"),
        dict(rounding="torch"),
        dict(snapshot="undo"),
    ],
    ids=str,
)
def test_other_updates_form_their_gradients(monkeypatch, options):
    calls = []
    spy_on(monkeypatch, "rank_sgd_", calls.append)
    model = tiny_model("llama", torch.bfloat16)
    with TTTTrainer(model, TTTConfig(steps=1, engine="dense", **options)).adapt(IDS):
        assert calls == []


SLICES = [
    ("llama_tied", "all"), ("gpt2", "all"), ("opt", "all"), ("gpt_neox", "all"),
    ("gpt2", "query"), ("phi3", "query"), ("gpt_neox", "query"),
]  # fmt: skip
STATES = [
    dict(momentum=0.9, nesterov=True),
    dict(momentum=0.0, decoupled_weight_decay=True),
    dict(momentum=0.5, accumulate="delta"),
    dict(optimizer="adamw", eps=1e-6),
]


@pytest.mark.parametrize("options", STATES, ids=["nesterov", "decoupled", "delta", "adamw"])
@pytest.mark.parametrize(("family", "scope"), SLICES)
def test_blocks_of_any_size_are_the_whole_weight(monkeypatch, path, family, scope, options):
    """Blocks of two rows, and all weights in one call, against gradients in buffers."""
    options = OPTIONS | options | dict(steps=3, scope=scope, engine="dense")
    adapted = []
    for flops, block_bytes in ((NEVER, 0), (path, 600), (path, 1 << 30)):
        monkeypatch.setattr(products, "FLOPS_PER_BYTE", flops)
        monkeypatch.setattr(products, "CPU_BLOCK_BYTES", block_bytes)
        model = tiny_model(family, torch.float64)
        before = weights(model)
        with TTTTrainer(model, TTTConfig(**options)).adapt(IDS) as result:
            adapted.append((twin(model), result.grad_norms, float(result.update_landed)))
        assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    for model, norms, landed in adapted[1:]:
        assert torch.allclose(norms, adapted[0][1], rtol=1e-12)
        assert landed == pytest.approx(adapted[0][2], rel=1e-9)
        assert distance(model, adapted[0][0]) <= 1e-11


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("snapshot", ["device", "undo"])
def test_blocks_of_16_bit_weights(monkeypatch, snapshot, rounding):
    """The undo log's runs of 65536 elements are not divided; restoring is bitwise."""
    monkeypatch.setattr(products, "CPU_BLOCK_BYTES", 4096)
    model = tiny_model("llama_tied", torch.bfloat16, vocab_size=5000, intermediate_size=2100)
    before = weights(model)
    config = TTTConfig(
        steps=3, lr=3e-1, snapshot=snapshot, rounding=rounding, engine="dense", weight_decay=0.1
    )
    trainer = TTTTrainer(model, config)
    runs = []
    for _ in range(2):
        with trainer.adapt(IDS):
            runs.append(weights(model))
            assert any(not torch.equal(v, before[n]) for n, v in runs[-1].items())
        assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    assert all(torch.equal(runs[0][n], runs[1][n]) for n in before)


def test_random_bits_differ_between_the_blocks_of_a_step(monkeypatch):
    """Equal rows with equal gradients are rounded alike only by chance."""
    monkeypatch.setattr(products, "CPU_BLOCK_BYTES", 64 * 2)
    seeds = []
    for name in ("sgd_", "rank_sgd_"):
        spy_on(monkeypatch, name, lambda options: seeds.append(options["seed"]))
    model = tiny_model("llama", torch.bfloat16)
    config = TTTConfig(steps=2, rounding="stochastic", seed=10**6, engine="dense")
    with TTTTrainer(model, config).adapt(IDS):
        assert len(set(seeds)) == len(seeds)
        assert all(0 <= seed < 1 << 63 for seed in seeds)


def test_products_take_no_gradient_memory_and_do_not_outlive_the_step(path):
    model = tiny_model("llama_tied")
    engine = DenseEngine(model, select_parameters(model), TTTConfig(engine="dense"))
    engine.begin(1)
    for error in (None, KeyError):
        with contextlib.suppress(KeyError), engine.gradients.recording():
            model(IDS, labels=IDS).loss.backward()
            found = [g for g in engine.gradients.collect() if isinstance(g, products.Products)]
            assert bool(found) == (path == ALWAYS)
            found = [weakref.ref(g) for g in found]
            if error is not None:
                raise error
            engine.update([0], torch.zeros(1))
        assert all(reference() is None for reference in found)
    held = sum(s._buffer.nbytes for s in engine.gradients._slots if s._buffer is not None)
    matrices = sum(p.nbytes for p in model.parameters() if p.dim() == 2)
    assert held == (matrices if path == NEVER else 0)
    scratch = sum(buffer.nbytes for buffer in engine._scratch._buffers.values())
    assert scratch <= products.CPU_BLOCK_BYTES
    engine.restore()
