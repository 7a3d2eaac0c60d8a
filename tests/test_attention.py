"""Torch's attention on a CPU, with a backward of our own."""

import pytest
import torch
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from tests.families import FAMILIES, tiny_model
from tests.loops import prompt_ids
from tests.untouched import unchanged
from tests.update_cases import DTYPES
from ttt_fast import TTTConfig, TTTTrainer, ops
from ttt_fast.engines import attention
from ttt_fast.engines.attention import Interfaces
from ttt_fast.engines.pieces import AttentionPiece, pieces_of, standing_in

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
ENGINES = pytest.mark.parametrize("engine", ["dense", "factored"])
# Without rotary positions, or without torch's attention.
OTHERS = ("gpt2", "opt", "gemma2")
N, T, HEADS, D = 2, 19, 4, 8


class Module(nn.Module):
    """What transformers' interface reads of an attention."""

    num_key_value_groups = 2
    is_causal = True


def count_calls(monkeypatch):
    calls, real = [], attention._Attention.apply
    spy = lambda *args: (calls.append(1), real(*args))[1]  # noqa: E731
    monkeypatch.setattr(attention._Attention, "apply", spy)
    return calls


def states(dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    heads = HEADS, HEADS // 2, HEADS // 2
    made = (torch.randn(N, h, T, D, generator=generator).to(dtype) for h in heads)
    return [x.requires_grad_() for x in made]


def mask_of(kind, dtype):
    causal = torch.ones(T, T, dtype=torch.bool).tril()
    causal[:, 2] = False
    causal[2, 2] = True
    if kind is None:
        return None
    if kind == "bool":
        return causal.expand(N, 1, T, T)
    return torch.zeros(N, 1, T, T, dtype=dtype).masked_fill(~causal, torch.finfo(dtype).min)


BACKWARD = ops.implementation("attention_backward", "cpu")


def ours(own_code=lambda x: False, backward=BACKWARD):
    return Interfaces({"sdpa": sdpa_attention_forward}, own_code, backward)["sdpa"]


@dtypes
@pytest.mark.parametrize("mask", [None, "bool", "added"])
@pytest.mark.parametrize("scaling", [None, 0.3])
def test_forward_is_torchs_and_gradients_are_no_worse(dtype, mask, scaling, monkeypatch):
    calls = count_calls(monkeypatch)
    found = []
    for function, of in (
        (ours(), dtype),
        (sdpa_attention_forward, dtype),
        (sdpa_attention_forward, torch.float64),
    ):
        x = [t.detach().to(of).requires_grad_() for t in states(dtype)]
        y, weights = function(Module(), *x, mask_of(mask, of), dropout=0.0, scaling=scaling)
        dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(dtype).to(of)
        assert weights is None
        found.append((y, torch.autograd.grad(y, x, dy)))
    assert len(calls) == 1
    (y, gradients), (expected, theirs), (_, exact) = found
    assert torch.equal(y, expected)
    for mine, stock, true in zip(gradients, theirs, exact, strict=True):
        assert mine.dtype == dtype
        distances = [(g.double() - true).norm() / true.norm() for g in (mine, stock)]
        # In 16 bits nothing but the last rounding: 8 of bfloat16, 11 of float16.
        last = torch.finfo(dtype).eps / 2 if dtype.itemsize == 2 else 10 * torch.finfo(dtype).eps
        assert distances[0] <= (min(last, 1.02 * distances[1]) if dtype.itemsize == 2 else last)


def test_the_comparison_notices_another_attention():
    """Without the mask in the backward, gradients are far off."""
    x, mask = states(torch.bfloat16), mask_of("bool", torch.bfloat16)
    y, _ = ours()(Module(), *x, mask)
    right = torch.autograd.grad(y.float().square().sum(), x)

    def unmasked(dy, q, k, v, mask, **options):
        return BACKWARD(dy, q, k, v, None, **options)

    y, _ = ours(backward=unmasked)(Module(), *x, mask)
    wrong = torch.autograd.grad(y.float().square().sum(), x)
    assert all((a - b).norm() > 0.05 * a.norm() for a, b in zip(right, wrong, strict=True))


@pytest.mark.parametrize(
    ("options", "of_one"),
    [({}, False), ({"is_causal": False}, False), ({"scaling": 0.2}, False), ({}, True)],
)
def test_scale_and_causality_are_those_of_the_stock_function(options, of_one):
    """Of one query, which sees all keys, too."""
    x = states(torch.float64)
    if of_one:
        x[0] = x[0].detach()[:, :, -1:].requires_grad_()
    found = []
    for function in (ours(), sdpa_attention_forward):
        y, _ = function(Module(), *x, None, **options)
        found.append(torch.autograd.grad(y.square().sum(), x))
    for mine, stock in zip(*found, strict=True):
        torch.testing.assert_close(mine, stock, rtol=1e-11, atol=1e-11)


def test_where_there_are_more_keys_than_queries_the_first_are_seen():
    q, k, v = states(torch.float64)
    q = q.detach()[:, :, :7].requires_grad_()
    found = []
    for function in (ours(), sdpa_attention_forward):
        y, _ = function(Module(), q, k, v, None)
        found.append(torch.autograd.grad(y.square().sum(), (q, k, v)))
    for mine, stock in zip(*found, strict=True):
        torch.testing.assert_close(mine, stock, rtol=1e-11, atol=1e-11)


def test_queries_keys_and_values_are_all_that_is_kept(monkeypatch):
    x, kept = states(torch.bfloat16), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        ours()(Module(), *x, None)
    assert [t.data_ptr() for t in kept] == [t.data_ptr() for t in x]


def test_only_what_is_asked_for_gets_a_gradient():
    q, k, v = states(torch.bfloat16)
    y, _ = ours()(Module(), q.detach(), k, v.detach(), None)
    y.sum().backward()
    assert k.grad is not None and q.grad is None and v.grad is None


def test_what_it_is_not_for_is_left_to_torch(monkeypatch):
    calls = count_calls(monkeypatch)
    narrow = states(torch.bfloat16)
    learned = torch.zeros(1, 1, T, T, dtype=torch.bfloat16, requires_grad=True)
    run = ours()
    run(Module(), *narrow, None, dropout=0.1)
    run(Module(), *narrow, None, position_bias=torch.zeros(1, HEADS, T, T, dtype=torch.bfloat16))
    run(Module(), *narrow, torch.zeros(T, T, dtype=torch.bfloat16))
    run(Module(), *narrow, learned)
    run(Module(), *(x.detach() for x in narrow), None)
    ours(lambda x: True)(Module(), *narrow, None)
    with torch.autocast("cpu", torch.bfloat16):
        run(Module(), *narrow, None)
    with torch.no_grad():
        run(Module(), *narrow, None)
    assert not calls
    run(Module(), *narrow, None)
    assert calls


def test_somebodys_own_function_is_left_alone(monkeypatch):
    def own(*args, **kwargs):
        return sdpa_attention_forward(*args, **kwargs)

    class Known(dict):
        def get_interface(self, name, default):
            return self.get(name, default)

    known = Known(sdpa=own, other=sdpa_attention_forward)
    found = Interfaces(known, lambda x: False, BACKWARD)
    assert found["sdpa"] is own and found.get_interface("eager", own) is own
    assert found["other"] is not sdpa_attention_forward  # torch's, by another name
    assert list(found.keys()) == ["sdpa", "other"]


@ENGINES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_families_adapt_as_they_do_without(engine, dtype, family, monkeypatch):
    model = tiny_model(family, dtype, **({} if family in OTHERS else SDPA))
    rows = prompt_ids(9, n_rows=2)
    mask = torch.ones_like(rows)
    mask[1, -3:] = 0
    config = TTTConfig(lr=1e-2, steps=3, engine=engine, scope="attention")
    results = []
    for found in (True, False):
        with monkeypatch.context() as patch, unchanged(model):
            calls = count_calls(patch)
            if not found:
                patch.setattr(attention, "_takes", lambda *args: False)
            with TTTTrainer(model, config).adapt(
                rows, attention_mask=mask, deltas="independent"
            ) as adapted:
                results.append(adapted.losses)
            assert bool(calls) == (found and family not in OTHERS)
    assert torch.allclose(*results, rtol=2e-2 if dtype == torch.bfloat16 else 1e-5)


SDPA = dict(attn_implementation="sdpa")


def test_stock_torchs_rounding_and_plain_torch_have_none_of_it(monkeypatch):
    calls = count_calls(monkeypatch)
    model = tiny_model("llama", torch.bfloat16, **SDPA)
    for options in (dict(engine="dense", rounding="torch"), dict(backend="torch")):
        with TTTTrainer(model, TTTConfig(steps=1, lr=1e-2, **options)).adapt(prompt_ids(9)):
            pass
    assert not calls


def test_no_other_model_attends_with_it(monkeypatch):
    calls = count_calls(monkeypatch)
    model, other = (tiny_model("llama", torch.bfloat16, seed=n, **SDPA) for n in (0, 1))
    found = [p for p in pieces_of(model, "auto", lambda x: False) if isinstance(p, AttentionPiece)]
    with standing_in(found):
        other(prompt_ids(9)).logits.sum().backward()
        assert not calls
        model(prompt_ids(9)).logits.sum().backward()
        assert len(calls) == len(found)
    model(prompt_ids(9))
    assert len(calls) == len(found)


def test_a_gradient_of_a_gradient_through_it_is_refused():
    x = states(torch.bfloat16)
    y, _ = ours()(Module(), *x, None)
    (gradient,) = torch.autograd.grad(y.float().square().sum(), x[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.float().sum().backward()
