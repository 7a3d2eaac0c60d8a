"""The fused optimizers under GradScaler, Hugging Face Trainer and Accelerate."""

import accelerate
import pytest
import torch
import transformers
from torch import nn

from tests.families import tiny_model
from tests.optim_cases import (
    CLIP,
    assert_bitwise,
    assert_ulps,
    both,
    fused,
    make_params,
    set_grads,
    torch_optimizer,
)
from ttt_fast.optim import FusedAdamW, FusedSGD, check_trainer

# ---------------------------------------------------------------------------- GradScaler


def amp_loop(params, optimizer, scaler, clip=None, unscale=True, overflow_at=(0, 3), steps=7):
    """Loss Σ⟨p, g⟩, whose gradients are g; infinite at some steps."""
    for step in range(steps):
        set_grads(params, step)
        targets = [param.grad.clone() for param in params]
        if step in overflow_at:
            targets[3][2, 5] = float("inf")
        optimizer.zero_grad()
        loss = sum((param * target).sum() for param, target in zip(params, targets, strict=True))
        scaler.scale(loss).backward()
        if unscale:
            scaler.unscale_(optimizer)
        if clip is not None:
            nn.utils.clip_grad_norm_(params, clip)
        scaler.step(optimizer)
        scaler.update()
    return params


def make_scaler():
    return torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)


@pytest.mark.parametrize("unscale", [False, True], ids=["scaled", "unscaled_by_the_user"])
@both
def test_grad_scaler(kind, unscale):
    options = dict(momentum=0.9, dampening=0.5) if kind == "sgd" else {}
    theirs, ours = make_params(), make_params()
    scalers = [make_scaler(), make_scaler()]
    torch_side = torch_optimizer(theirs, kind, **options)
    amp_loop(theirs, torch_side, scalers[0], clip=CLIP)
    optimizer = fused(ours, kind, CLIP, lr=0.1, **options)
    amp_loop(ours, optimizer, scalers[1], unscale=unscale)
    assert_ulps(ours, theirs, 8)
    assert scalers[0].get_scale() == scalers[1].get_scale()
    set_grads(theirs, 6)
    wanted = nn.utils.get_total_norm([param.grad for param in theirs])
    torch.testing.assert_close(optimizer.last_grad_norm, wanted)
    steps = [state["step"].item() for state in optimizer.state.values() if "step" in state]
    assert set(steps) == ({5.0} if kind == "adamw" else set())


def test_an_overflow_changes_nothing():
    params = make_params()
    outside = nn.Parameter(torch.ones(2))
    outside.grad = torch.ones(2)
    optimizer = FusedSGD(params, lr=0.1, momentum=0.9, max_grad_norm=CLIP, clip_params=[outside])
    scaler = make_scaler()
    amp_loop(params, optimizer, scaler, unscale=False, overflow_at=(0,), steps=1)
    assert_bitwise(params, make_params())
    assert not optimizer.state
    assert torch.equal(outside.grad, torch.ones(2))
    assert scaler.get_scale() == 2.0**9
    assert not hasattr(optimizer, "grad_scale") and not hasattr(optimizer, "found_inf")


def test_clip_params_and_grad_scaler():
    """Another optimizer of the same scaler updates what is only clipped here."""
    results = []
    for ours in (False, True):
        params, scaler = make_params(), make_scaler()
        other = torch.optim.SGD(params[3:], lr=0.1)
        if ours:
            first = FusedSGD(params[:3], lr=0.1, max_grad_norm=CLIP, clip_params=params[3:])
        else:
            first = torch.optim.SGD(params[:3], lr=0.1)
        set_grads(params, 0)
        targets = [param.grad.clone() for param in params]
        first.zero_grad()
        other.zero_grad()
        scaler.scale(sum((p * t).sum() for p, t in zip(params, targets, strict=True))).backward()
        if not ours:
            scaler.unscale_(first)
            scaler.unscale_(other)
            nn.utils.clip_grad_norm_(params, CLIP)
        scaler.step(first)
        scaler.step(other)
        results.append(params)
    assert_ulps(results[1], results[0], 8)


def test_bfloat16_with_rounding_torch_and_unscale_is_bitwise_torch():
    theirs, ours = make_params(torch.bfloat16), make_params(torch.bfloat16)
    amp_loop(theirs, torch_optimizer(theirs, "sgd", momentum=0.9), make_scaler(), clip=CLIP)
    optimizer = FusedSGD(ours, lr=0.1, momentum=0.9, max_grad_norm=CLIP, rounding="torch")
    amp_loop(ours, optimizer, make_scaler())
    assert_bitwise(ours, theirs)


# ---------------------------------------------------------------------------- Hugging Face


def trainer_for(model, optimizer, max_grad_norm, output_dir):
    ids = torch.randint(0, 101, (6, 8), generator=torch.Generator().manual_seed(3))
    arguments = transformers.TrainingArguments(
        output_dir=str(output_dir),
        max_steps=3,
        per_device_train_batch_size=2,
        max_grad_norm=max_grad_norm,
        lr_scheduler_type="linear",
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )
    data = [dict(input_ids=row, labels=row) for row in ids]
    return transformers.Trainer(
        model=model, args=arguments, train_dataset=data, optimizers=(optimizer, None)
    )


def test_trainer(tmp_path):
    results = []
    for ours in (False, True):
        model = tiny_model("llama")
        if ours:
            optimizer = FusedSGD(model.parameters(), lr=0.1, momentum=0.9, max_grad_norm=0.5)
        else:
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        trainer = trainer_for(model, optimizer, 0.0 if ours else 0.5, tmp_path)
        if ours:
            check_trainer(trainer)
        trainer.train()
        results.append([param.detach() for param in model.parameters()])
        if ours:
            assert optimizer.last_grad_norm > 0.5  # so that clipping was at work
            check_trainer(trainer)  # also through Accelerate's wrapper
            assert optimizer.param_groups[0]["lr"] == 0.0  # Trainer's scheduler was at work
    assert_ulps(results[1], results[0], 16)
    start = list(tiny_model("llama").parameters())
    assert all(not torch.equal(a, b) for a, b in zip(results[1], start, strict=True))


def test_trainer_that_clips_as_well_is_refused(tmp_path):
    model = tiny_model("llama")
    optimizer = FusedSGD(model.parameters(), lr=0.1, max_grad_norm=0.5)
    with pytest.raises(ValueError, match=r"clipped twice: .*max_grad_norm=1.0.*max_grad_norm=0.5"):
        check_trainer(trainer_for(model, optimizer, 1.0, tmp_path))
    optimizer.max_grad_norm = None
    check_trainer(trainer_for(model, optimizer, 1.0, tmp_path))
    with pytest.raises(TypeError, match="SGD, not a fused optimizer"):
        check_trainer(trainer_for(model, torch.optim.SGD(model.parameters()), 0.0, tmp_path))


def test_accelerate():
    ids = torch.randint(0, 101, (2, 8), generator=torch.Generator().manual_seed(3))
    results = []
    for ours in (False, True):
        accelerator = accelerate.Accelerator(cpu=True)
        model = tiny_model("llama")
        if ours:
            optimizer = FusedAdamW(model.parameters(), lr=1e-3, max_grad_norm=0.5)
        else:
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        model, optimizer = accelerator.prepare(model, optimizer)
        for _ in range(3):
            accelerator.backward(model(input_ids=ids, labels=ids).loss)
            if not ours:
                accelerator.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
        results.append([param.detach() for param in model.parameters()])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
