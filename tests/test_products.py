"""Gradients as products of factors: their norm, their blocks, what a kernel takes of them."""

import contextlib
import weakref

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from tests import gradient_cases
from tests.families import tiny_model
from tests.gradient_cases import ALWAYS, IDS, NEVER, OPTIONS, formed
from tests.loops import distance, twin, weights
from ttt_fast import Selection, TTTConfig, TTTTrainer, ops, select_parameters
from ttt_fast.engines import products
from ttt_fast.engines.dense import DenseEngine
from ttt_fast.engines.gradients import GradientBuffers

path = gradient_cases.path


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
