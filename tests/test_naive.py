"""The naive loop against clip_grad_norm_ and SGD written out in fp64."""

import copy

import pytest
import torch
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from ttt_fast.naive import naive_adapt, prompt_loss

IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])


def tiny_model(dtype: torch.dtype = torch.float64) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=19, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype).eval()


def test_prompt_loss_is_the_models_own():
    model = tiny_model(torch.float32)
    torch.testing.assert_close(prompt_loss(model, IDS), model(IDS, labels=IDS).loss)


def test_prompt_loss_skips_padding_and_sums():
    model = tiny_model()
    padded = F.pad(IDS, (0, 3))
    mask = F.pad(torch.ones_like(IDS), (0, 3))
    torch.testing.assert_close(
        prompt_loss(model, padded, attention_mask=mask), prompt_loss(model, IDS)
    )
    torch.testing.assert_close(
        prompt_loss(model, IDS, reduction="sum"), prompt_loss(model, IDS) * (IDS.shape[1] - 1)
    )


@pytest.mark.parametrize(
    ("dtype", "loss_dtype"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
    ids=["bf16", "fp32", "fp64"],
)
def test_loss_is_at_least_float32(dtype, loss_dtype):
    assert prompt_loss(tiny_model(dtype), IDS).dtype == loss_dtype


def sgd_by_hand(model, *, steps, lr, momentum, weight_decay, dampening, nesterov, max_grad_norm):
    """torch.optim.SGD and clip_grad_norm_ written out; returns the losses and norms."""
    params, buffers, history = list(model.parameters()), None, []
    for _ in range(steps):
        loss = prompt_loss(model, IDS)
        grads = torch.autograd.grad(loss, params)
        norm = torch.sqrt(sum((g * g).sum() for g in grads))
        history.append((loss.detach(), norm))
        clip = (max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
        grads = [g * clip + weight_decay * p.detach() for g, p in zip(grads, params, strict=True)]
        if buffers is None:
            buffers = [g.clone() for g in grads]
        else:
            buffers = [
                momentum * b + (1 - dampening) * g for b, g in zip(buffers, grads, strict=True)
            ]
        with torch.no_grad():
            for p, b, g in zip(params, buffers, grads, strict=True):
                p -= lr * (g + momentum * b if nesterov else b)
    losses, norms = zip(*history, strict=True)
    return torch.stack(losses), torch.stack(norms)


@pytest.mark.parametrize(
    "options",
    [
        {"momentum": 0.9, "weight_decay": 0.0, "dampening": 0.0, "nesterov": False},
        {"momentum": 0.8, "weight_decay": 0.1, "dampening": 0.3, "nesterov": False},
        {"momentum": 0.9, "weight_decay": 0.01, "dampening": 0.0, "nesterov": True},
    ],
    ids=["momentum", "decay-dampening", "nesterov"],
)
@pytest.mark.parametrize("max_grad_norm", [0.5, 1e6], ids=["clipped", "unclipped"])
def test_sgd_equals_the_update_written_out(options, max_grad_norm):
    model, expected = tiny_model(), tiny_model()
    result = naive_adapt(model, IDS, steps=6, lr=0.1, max_grad_norm=max_grad_norm, **options)
    losses, norms = sgd_by_hand(expected, steps=6, lr=0.1, max_grad_norm=max_grad_norm, **options)
    torch.testing.assert_close(result.losses, losses, rtol=1e-12, atol=0)
    torch.testing.assert_close(result.grad_norms, norms, rtol=1e-12, atol=0)
    for got, want in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-15)


def test_adamw_first_step_is_the_sign():
    model = tiny_model()
    before = copy.deepcopy(model.state_dict())
    result = naive_adapt(
        model, IDS, steps=1, lr=1e-3, optimizer="adamw", max_grad_norm=None,
        optimizer_kwargs={"eps": 1e-30},
    )  # fmt: skip
    change = model.lm_head.weight.detach() - before["lm_head.weight"]
    touched = change != 0
    torch.testing.assert_close(change[touched].abs(), torch.full_like(change[touched], 1e-3))
    assert touched.any()
    assert result.losses.shape == (1,)


def test_restore_is_bitwise_and_flags_are_given_back():
    model = tiny_model(torch.float32).train()
    frozen = model.model.norm.weight.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    chosen = [p for name, p in model.named_parameters() if "mlp" in name]
    seen = []
    result = naive_adapt(
        model, IDS, steps=3, lr=0.1, params=chosen,
        on_step=lambda step, loss, norm: seen.append((step, loss, norm)),
    )  # fmt: skip
    changed = {name for name, t in model.state_dict().items() if not torch.equal(t, before[name])}
    assert changed == {name for name in before if "mlp" in name}
    result.restore()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert model.training
    assert not frozen.requires_grad
    assert all(p.requires_grad for p in model.parameters() if p is not frozen)
    assert all(p.grad is None for p in model.parameters())
    assert [step for step, _, _ in seen] == [1, 2, 3]
    assert [loss for _, loss, _ in seen] == result.losses.tolist()
    assert set(result.phases.ms) == {"snapshot", "forward", "backward", "update", "restore"}


def test_flags_are_given_back_after_an_error():
    model = tiny_model().train()

    def fail(step: int, loss: float, norm: float) -> None:
        raise RuntimeError("stop here")

    with pytest.raises(RuntimeError, match="stop here"):
        naive_adapt(model, IDS, steps=3, lr=0.1, params=[model.model.norm.weight], on_step=fail)
    assert model.training
    assert all(p.requires_grad for p in model.parameters())


def test_unknown_optimizer():
    with pytest.raises(ValueError, match="use 'sgd' or 'adamw'"):
        naive_adapt(tiny_model(), IDS, steps=1, lr=0.1, optimizer="lion")
