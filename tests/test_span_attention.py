"""Attention of spans to what is only read: against softmax written out, forward and backward."""

import math

import pytest
import torch

from tests.tolerances import assert_no_worse
from ttt_fast import span_attention as module
from ttt_fast.span_attention import span_attention

N, H, H_KV, T, D, D_V = 3, 4, 2, 5, 8, 6
STARTS = (37, 0, 20)


def inputs(dtype=torch.float64, seed=0):
    """q, k, v, do; keys and values of each context."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    own = draw(N, H, T, D), draw(N, H_KV, T, D), draw(N, H_KV, T, D_V), draw(N, H, T, D_V)
    contexts = [(draw(H_KV, start + T + 3, D), draw(H_KV, start + T + 3, D_V)) for start in STARTS]
    return own, contexts


def causal(window=None):
    """(N, 1, T, P + T): what transformers gives for rows of which fewer tokens are before."""
    P = max(STARTS)
    distance = P + torch.arange(T)[:, None] - torch.arange(P + T)
    mask = distance >= 0 if window is None else (distance >= 0) & (distance < window)
    there = torch.arange(P + T) >= P - torch.tensor(STARTS)[:, None]
    return (mask & there[:, None])[:, None]


def past_of(contexts):
    return [(keys, values, start) for (keys, values), start in zip(contexts, STARTS, strict=True)]


def ours(own, contexts, mask, scale=0.3):
    q, k, v = (x.clone().requires_grad_() for x in own[:3])
    out = span_attention(q, k, v, past_of(contexts), mask, scale)
    return out, *torch.autograd.grad(out, (q, k, v), own[3])


def written_out(own, contexts, mask, scale=0.3):
    """Row by row, with everything in one tensor."""
    q, k, v = (x.clone().requires_grad_() for x in own[:3])
    rows = []
    for n, ((keys, values), start) in enumerate(zip(contexts, STARTS, strict=True)):
        K = torch.cat([keys[:, :start], k[n]], 1).repeat_interleave(H // H_KV, 0)
        V = torch.cat([values[:, :start], v[n]], 1).repeat_interleave(H // H_KV, 0)
        scores = scale * q[n] @ K.mT
        allowed = mask[n if len(mask) > 1 else 0][..., -(start + T) :]
        if allowed.dtype == torch.bool:
            scores = scores.masked_fill(~allowed, -math.inf)
        else:
            scores = scores + allowed
        rows.append(scores.softmax(-1) @ V)
    out = torch.stack(rows)
    return out, *torch.autograd.grad(out, (q, k, v), own[3])


def additive(mask, heads=1):
    bias = torch.randn(N, heads, *mask.shape[2:], generator=torch.Generator().manual_seed(5))
    return bias.double().masked_fill(~mask, -math.inf)


@pytest.mark.parametrize("scores", [1, 10**6], ids=["many tiles", "one tile"])
@pytest.mark.parametrize(
    "mask",
    [causal(), causal(window=7), additive(causal()), additive(causal(), heads=H)],
    ids=["causal", "window", "additive", "for each head"],
)
def test_equal_to_softmax_written_out(mask, scores, monkeypatch):
    monkeypatch.setattr(module, "SCORES_CPU", scores)
    own, contexts = inputs()
    expected = written_out(own, contexts, mask)
    for name, a, b in zip(
        ("out", "dq", "dk", "dv"), ours(own, contexts, mask), expected, strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13, msg=name)


def test_without_a_mask_all_before_is_seen():
    own, contexts = inputs()
    mask = causal()
    for a, b in zip(ours(own, contexts, None), ours(own, contexts, mask), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("fault", ["one later", "one earlier", "no scale"])
def test_the_control_that_a_fault_shows(fault):
    own, contexts = inputs()
    expected = written_out(own, contexts, causal())
    mask = {"one later": causal().roll(1, -1), "one earlier": causal().roll(-1, -1)}
    wrong = ours(own, contexts, mask.get(fault, causal()), 1.0 if fault == "no scale" else 0.3)
    for a, b in zip(wrong, expected, strict=True):
        assert not torch.allclose(a, b, rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_as_near_as_torch_in_that_dtype(dtype):
    own, contexts = inputs(dtype)
    wide = [x.double() for x in own], [[x.double() for x in pair] for pair in contexts]
    oracle = written_out(*wide, causal())
    same = written_out(own, contexts, causal())
    for name, a, b, exact in zip(
        ("out", "dq", "dk", "dv"), ours(own, contexts, causal()), same, oracle, strict=True
    ):
        assert_no_worse(a, b, exact, name)


def test_what_is_before_is_not_changed_and_gets_no_gradient():
    own, contexts = inputs()
    for pair in contexts:
        for states in pair:
            states.requires_grad_()
    before = [states.detach().clone() for pair in contexts for states in pair]
    out = span_attention(
        *(x.clone().requires_grad_() for x in own[:3]), past_of(contexts), None, 1.0
    )
    out.sum().backward()
    after = [states for pair in contexts for states in pair]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    assert all(states.grad is None and states._version == 0 for states in after)


def test_a_token_that_sees_nothing_is_finite():
    own, contexts = inputs()
    mask = causal()
    mask[0, 0, 1] = False
    results = ours(own, contexts, mask)
    assert all(result.isfinite().all() for result in results)
    assert (results[0][0, :, 1] == 0).all() and (results[1][0, :, 1] == 0).all()
