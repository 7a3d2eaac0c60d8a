"""The negative log-likelihood in one pass: the same losses and gradients as torch's."""

import pytest
import torch

from tests.families import tiny_model
from tests.loops import prompt_ids, row_loss
from tests.tolerances import assert_no_worse
from ttt_fast import Batch, TTTConfig, TTTTrainer, negative_log_likelihood, ops

VOCABULARY = 101
IDS = prompt_ids(7)
DENSE = dict(engine="dense", steps=3, lr=2e-2)


class Outputs:
    def __init__(self, logits):
        self.logits = logits


def logits_of(dtype, scale=3.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, 6, VOCABULARY, generator=generator, dtype=torch.float64) * scale
    return logits.to(dtype).requires_grad_()


def batch_of(kind):
    """Rows with their labels: all, some masked out, and weighted tokens."""
    ids = prompt_ids(6, n_rows=3, seed=7)
    labels = ids.clone()
    labels[:, 0] = -100
    if kind != "all":
        labels[0, 2:4], labels[1, :5], labels[2, 5] = -100, -100, -100
    weights_of_tokens = torch.rand(3, 6, generator=torch.Generator().manual_seed(2)) - 0.2
    return Batch(ids, labels, token_weights=weights_of_tokens if kind == "weights" else None)


def losses_and_gradient(dtype, kind, reduction, fused):
    logits = logits_of(dtype)
    losses = negative_log_likelihood(Outputs(logits), batch_of(kind), reduction, fused=fused)
    upstream = torch.tensor([0.5, -2.0, 1.25]).to(losses.dtype)
    (dlogits,) = torch.autograd.grad(losses, logits, upstream)
    return losses.detach(), dlogits


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("kind", ["all", "masked", "weights"])
def test_the_fused_loss_is_the_plain_one(kind, reduction):
    expected, gradient = losses_and_gradient(torch.float64, kind, reduction, False)
    losses, dlogits = losses_and_gradient(torch.float64, kind, reduction, True)
    torch.testing.assert_close(losses, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(dlogits, gradient, rtol=1e-12, atol=1e-12)
    if kind != "all":
        # Logits of what is left out get no gradient at all.
        assert not dlogits[0, 1:3].any() and dlogits[0, 0].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["all", "masked", "weights"])
def test_the_fused_loss_is_no_worse_in_a_narrower_type(kind, dtype):
    # The oracle sees the logits as they are in that type.
    rounded = logits_of(dtype).detach().double().requires_grad_()
    expected = negative_log_likelihood(Outputs(rounded), batch_of(kind))
    upstream = torch.tensor([0.5, -2.0, 1.25]).double()
    (gradient,) = torch.autograd.grad(expected, rounded, upstream)
    losses, dlogits = losses_and_gradient(dtype, kind, "mean", True)
    plain, plain_dlogits = losses_and_gradient(dtype, kind, "mean", False)
    assert losses.dtype == torch.float32 and dlogits.dtype == dtype
    assert_no_worse(losses, plain, expected.detach(), "losses")
    assert_no_worse(dlogits, plain_dlogits, gradient, "dlogits")


def test_the_fused_loss_leaves_the_logits_alone():
    logits = logits_of(torch.float32)
    found = logits.detach().clone()
    losses = negative_log_likelihood(Outputs(logits), batch_of("all"), fused=True)
    losses.sum().backward()
    assert torch.equal(logits.detach(), found)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        losses.sum().backward()


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_a_gradient_the_fused_loss_is_the_plain_one_to_the_bit(context):
    with context():
        outputs, batch = Outputs(logits_of(torch.float32).detach()), batch_of("weights")
        plain = negative_log_likelihood(outputs, batch)
        assert torch.equal(negative_log_likelihood(outputs, batch, fused=True), plain)


def test_the_fused_loss_is_ours_but_for_stock_torchs_bits(monkeypatch):
    calls = []
    nll_ = ops.nll_

    def spy(*args, **options):
        calls.append(args)
        return nll_(*args, **options)

    monkeypatch.setattr(ops, "nll_", spy)
    for rounding, steps in (("nearest", 3), ("torch", 0)):
        calls.clear()
        TTTTrainer(tiny_model("llama"), TTTConfig(rounding=rounding, **DENSE)).adapt(IDS).restore()
        assert len(calls) == steps
    calls.clear()
    trainer = TTTTrainer(tiny_model("llama"), TTTConfig(reduction="sum", **DENSE))
    with trainer.adapt(IDS) as adapted:
        assert len(calls) == 3
        assert adapted.losses[0, 0].item() == pytest.approx(
            6 * row_loss(tiny_model("llama"), IDS[0]).item(), rel=1e-5
        )
