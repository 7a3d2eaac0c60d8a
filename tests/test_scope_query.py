"""The scope "query" and its views: rows of fused projections, with the unfused model as oracle."""

import pytest
import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tests.families import FAMILIES, tiny_model
from ttt_fast.scope import select_parameters
from ttt_fast.selection import RowSlice, Selection

FUSED = ["phi3", "gpt2", "gpt_neox"]

# --- query ---------------------------------------------------------------------------------------


@pytest.fixture
def attention_inputs(monkeypatch):
    """Record the q, k, v that a model's own code hands to SDPA, in the order of the layers."""
    calls = []
    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def record(module, query, key, value, *args, **kwargs):
        calls.append((query.detach().clone(), key.detach().clone(), value.detach().clone()))
        return sdpa(module, query, key, value, *args, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", record)
    return calls


# Gemma 2 has no SDPA; Qwen2-MoE calls torch's directly in transformers 4.56.
@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - {"gemma2", "qwen2_moe"}))
def test_query_changes_q_alone_and_its_complement_leaves_q_alone(family, attention_inputs):
    model = tiny_model(family, num_hidden_layers=1, attn_implementation="sdpa")
    input_ids = torch.arange(3, 9)[None]
    model(input_ids)
    q, k, v = attention_inputs.pop()
    selections = select_parameters(model, "query")
    assert selections[0].name.endswith("weight")
    for selection in selections:
        original = selection.param.detach().clone()
        selection.view().add_(0.5)
        model(input_ids)
        q_new, k_new, v_new = attention_inputs.pop()
        assert (q_new != q).any(dim=(0, 2)).any(dim=-1).all()  # every head of the query
        assert torch.equal(k_new, k)
        assert torch.equal(v_new, v)

        with torch.no_grad():
            selection.param.copy_(original + 0.5)
        selection.view().copy_(selection.view(original))
        model(input_ids)
        q_new, k_new, v_new = attention_inputs.pop()
        assert torch.equal(q_new, q)
        if family in FUSED:  # elsewhere the complement is empty
            assert (k_new != k).any(dim=(0, 2)).any(dim=-1).all()
            assert (v_new != v).any(dim=(0, 2)).any(dim=-1).all()
        with torch.no_grad():
            selection.param.copy_(original)


class Unfused(nn.Module):
    """Three linears in place of a fused projection, with the fused layout at the output only."""

    def __init__(self, family, fused, heads, kv_heads):
        super().__init__()
        weight = fused.weight.detach()
        weight = weight.T if family == "gpt2" else weight
        bias = None if fused.bias is None else fused.bias.detach()
        self.interleaved, self.heads = family == "gpt_neox", heads
        head_dim = len(weight) // (heads + 2 * kv_heads)
        parts = {"q": heads * head_dim, "k": kv_heads * head_dim, "v": kv_heads * head_dim}
        for i, (part, size) in enumerate(parts.items()):
            if self.interleaved:
                rows = torch.arange(len(weight)).view(heads, 3, head_dim)[:, i].flatten()
            else:
                rows = torch.arange(len(weight)).split(list(parts.values()))[i]
            linear = nn.Linear(weight.shape[1], size, bias=bias is not None, dtype=weight.dtype)
            with torch.no_grad():
                linear.weight.copy_(weight[rows])
                if bias is not None:
                    linear.bias.copy_(bias[rows])
            self.add_module(part, linear)

    def forward(self, x):
        outs = [self.q(x), self.k(x), self.v(x)]
        if self.interleaved:
            outs = [out.unflatten(-1, (self.heads, -1)) for out in outs]
            return torch.cat(outs, dim=-1).flatten(-2)
        return torch.cat(outs, dim=-1)


FUSED_MODULE = {"phi3": "qkv_proj", "gpt2": "c_attn", "gpt_neox": "query_key_value"}


@pytest.mark.parametrize("family", FUSED)
def test_sgd_on_the_query_slice_equals_sgd_on_an_unfused_query(family):
    fused, unfused = (tiny_model(family, torch.float64) for _ in range(2))
    config = fused.config
    kv_heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    separate = []
    for name, module in list(unfused.named_modules()):
        parent, _, leaf = name.rpartition(".")
        if leaf == FUSED_MODULE[family]:
            replacement = Unfused(family, module, config.num_attention_heads, kv_heads)
            setattr(unfused.get_submodule(parent), leaf, replacement)
            separate += replacement.q.parameters()
    selections = select_parameters(fused, "query")
    assert sum(s.numel for s in selections) == sum(p.numel() for p in separate)

    input_ids = torch.arange(3, 23)[None]
    losses = []
    for _ in range(3):
        pair = [model(input_ids, labels=input_ids).loss for model in (fused, unfused)]
        losses.append([loss.item() for loss in pair])
        for model, loss in zip((fused, unfused), pair, strict=True):
            model.zero_grad()
            loss.backward()
        for selection, param in zip(selections, separate, strict=True):
            grad = selection.view(selection.param.grad)
            in_first = (
                grad.reshape(len(grad), -1).T if family == "gpt2" and grad.ndim == 3 else grad
            )
            torch.testing.assert_close(
                in_first.reshape(param.shape), param.grad, rtol=1e-10, atol=1e-14
            )
            selection.view().sub_(grad, alpha=0.5)
            with torch.no_grad():
                param.sub_(param.grad, alpha=0.5)
    torch.testing.assert_close(*torch.tensor(losses, dtype=torch.float64).T, rtol=1e-12, atol=0)
    assert len({loss for loss, _ in losses}) == 3


def test_query_slices_have_the_stated_layout():
    layouts = {
        "phi3": [RowSlice(dim=0, start=0, length=32, period=64)],
        "gpt2": [RowSlice(1, 0, 32, 96), RowSlice(0, 0, 32, 96)],
        "gpt_neox": [RowSlice(0, 0, 8, 24), RowSlice(0, 0, 8, 24)],
        "llama": [None],
        "qwen2": [None, None],
    }
    for family, expected in layouts.items():
        assert [s.rows for s in select_parameters(tiny_model(family), "query", 0)] == expected


def test_phi3_query_with_a_head_dim_of_its_own():
    model = tiny_model("phi3", head_dim=16)
    (selection,) = select_parameters(model, "query", layers=0)
    assert selection.rows == RowSlice(dim=0, start=0, length=64, period=128)


def test_fused_projection_of_another_width_is_refused():
    model = tiny_model("phi3")
    model.model.layers[1].self_attn.qkv_proj = nn.Linear(32, 72)
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.qkv_proj.*need 64 in dimension 0"):
        select_parameters(model, "query")


def test_fused_projection_without_a_config_is_refused():
    model = nn.ModuleDict({"attn": nn.ModuleDict({"c_attn": nn.Linear(4, 12)})})
    with pytest.raises(ValueError, match="no module above it has a config"):
        select_parameters(model, "query")


# --- views ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FUSED)
def test_view_shares_storage_with_parameter_and_gradient(family):
    for selection in select_parameters(tiny_model(family), "query"):
        grad = torch.zeros_like(selection.param)
        for base, view in (
            (selection.param, selection.view()),
            (grad, selection.view(grad)),
        ):
            assert view.untyped_storage().data_ptr() == base.untyped_storage().data_ptr()
            assert view.numel() == selection.numel < base.numel()
            assert not view.requires_grad
        selection.view(grad).fill_(1)
        assert grad.sum().item() == selection.numel


def test_view_of_a_whole_parameter_is_the_parameter():
    selection = select_parameters(tiny_model("llama"), "head")[0]
    assert selection.view().data_ptr() == selection.param.data_ptr()
    assert selection.view().shape == selection.param.shape


@pytest.mark.parametrize("shape", [(12,), (12, 1), (12, 7)])
def test_rows_are_those_of_the_formula(shape):
    tensor = torch.arange(torch.Size(shape).numel()).view(shape)
    rows = RowSlice(dim=0, start=1, length=2, period=4)
    expected = tensor[[r for r in range(12) if 1 <= r % 4 < 3]]
    assert torch.equal(rows.view(tensor).flatten(0, 1), expected)


def test_view_works_on_strided_and_offset_tensors():
    base = torch.arange(200).view(10, 20)
    rows = RowSlice(dim=1, start=0, length=2, period=6)
    strided = base.T[2:14, 1:8].T  # (7, 12), offset, column-major
    expected = strided[:, [0, 1, 6, 7]]
    assert torch.equal(rows.view(strided).flatten(1), expected)


def test_view_of_another_shape_is_refused():
    selection = Selection("w", nn.Parameter(torch.zeros(12, 2)), RowSlice(0, 0, 2, 4))
    with pytest.raises(ValueError, match=r"w: view of a tensor of shape \(8, 2\)"):
        selection.view(torch.zeros(8, 2))
    with pytest.raises(ValueError, match="multiple of the period 4"):
        selection.rows.view(torch.zeros(10, 2))
