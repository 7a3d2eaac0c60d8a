"""Torch's attention in 16 bits on a CPU, with the backward of float32."""

from functools import partial

import pytest
import torch
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from tests.families import FAMILIES, tiny_model
from tests.loops import prompt_ids
from tests.untouched import unchanged
from ttt_fast import TTTConfig, TTTTrainer
from ttt_fast.engines import attention
from ttt_fast.engines.attention import Interfaces
from ttt_fast.engines.pieces import AttentionPiece, pieces_of, standing_in

NARROW = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
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


def ours(own_code=lambda x: False):
    return Interfaces({"sdpa": sdpa_attention_forward}, own_code)["sdpa"]


@NARROW
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
        # Nothing but the last rounding: 8 bits of bfloat16, 11 of float16.
        assert distances[0] <= min(torch.finfo(dtype).eps / 2, 1.02 * distances[1])


def test_the_comparison_notices_another_attention():
    """Without the mask in the backward, gradients are far off."""
    x, mask = states(torch.bfloat16), mask_of("bool", torch.bfloat16)
    y, _ = ours()(Module(), *x, mask)
    right = torch.autograd.grad(y.float().square().sum(), x)

    def unmasked(module, query, key, value, mask, **options):
        mask = None if query.dtype == torch.float32 else mask
        return sdpa_attention_forward(module, query, key, value, mask, **options)

    y = attention._Attention.apply(*x, mask, partial(unmasked, Module()))
    wrong = torch.autograd.grad(y.float().square().sum(), x)
    assert all((a - b).norm() > 0.05 * a.norm() for a, b in zip(right, wrong, strict=True))


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
    wide, narrow = states(torch.float32), states(torch.bfloat16)
    learned = torch.zeros(1, 1, T, T, dtype=torch.bfloat16, requires_grad=True)
    run = ours()
    run(Module(), *wide, None)
    run(Module(), *narrow, None, dropout=0.1)
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

    found = Interfaces(Known(sdpa=own, other=sdpa_attention_forward), lambda x: False)
    assert found["sdpa"] is own and found.get_interface("eager", own) is own
    assert found["other"] is not sdpa_attention_forward  # torch's, by another name
    assert list(found.keys()) == ["sdpa", "other"]


@ENGINES
@pytest.mark.parametrize("family", FAMILIES)
def test_families_adapt_as_they_do_without(engine, family, monkeypatch):
    model = tiny_model(family, torch.bfloat16, **({} if family in OTHERS else SDPA))
    rows = prompt_ids(9, n_rows=2)
    mask = torch.ones_like(rows)
    mask[1, -3:] = 0
    config = TTTConfig(lr=1e-2, steps=3, engine=engine, scope="attention")
    results = []
    for found in (True, False):
        with monkeypatch.context() as patch, unchanged(model):
            calls = count_calls(patch)
            if not found:
                patch.setattr(attention, "NARROW", ())
            with TTTTrainer(model, config).adapt(
                rows, attention_mask=mask, deltas="independent"
            ) as adapted:
                results.append(adapted.losses)
            assert bool(calls) == (found and family not in OTHERS)
    assert torch.allclose(*results, rtol=2e-2)


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
