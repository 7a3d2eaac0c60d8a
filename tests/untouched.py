"""How tests see that an adaptation left nothing behind."""

import contextlib
import random
import signal

import numpy as np
import torch

from tests.families import tiny_model
from tests.loops import prompt_ids
from ttt_fast import TTTConfig, TTTTrainer

IDS = prompt_ids(8)
STEPS = 4


class Boom(Exception):
    """Raised by the tests, and by nothing else."""


def trainer_of(model, objective=None, **options):
    options = dict(engine="dense", steps=STEPS, lr=2e-2, weight_decay=0.01) | options
    options = dict(max_grad_norm=1.0) | options
    return TTTTrainer(model, TTTConfig(**options), objective=objective)


def bits(tensor):
    return tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes()


def look(model):
    """Everything about a model and the process that an adaptation could leave changed."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    modules = dict(model.named_modules())
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return {
        "bits": {name: bits(t) for name, t in tensors.items()},
        "where": {name: (t.data_ptr(), id(t)) for name, t in tensors.items()},
        "flags": {name: t.requires_grad for name, t in tensors.items()},
        "grads": {n: (id(p.grad), None if p.grad is None else bits(p.grad))
                  for n, p in model.named_parameters()},
        "training": {name: module.training for name, module in modules.items()},
        "attributes": {name: sorted(vars(module)) for name, module in modules.items()},
        "hooks": {name: [list(getattr(m, h)) for h in hooks] for name, m in modules.items()},
        "random": (bits(torch.get_rng_state()), random.getstate(),
                   np.random.get_state()[1].tobytes()),
        "modes": (torch.get_default_dtype(), torch.is_grad_enabled(),
                  torch.is_inference_mode_enabled(), signal.getsignal(signal.SIGINT)),
    }  # fmt: skip


@contextlib.contextmanager
def unchanged(model, but=()):
    """Look before and after; ``but`` names what may differ."""
    before = look(model)
    yield
    after = look(model)
    for name in before.keys() - set(but):
        assert before[name] == after[name], f"{name} changed"


def lived_in(family="gpt2", dtype=torch.float32):
    """A model that somebody has been using: flags, gradients, modes, dropout and hooks mixed."""
    model = tiny_model(family, dtype).train()
    model.get_submodule(list(dict(model.named_children()))[0]).eval()
    params = list(model.parameters())
    for param in params[::3]:
        param.requires_grad_(False)
    for param in params[::4]:
        param.grad = torch.randn_like(param)
    next(model.children()).register_forward_hook(lambda *call: None)
    return model


def assert_adapts(model, engine="dense"):
    """A model and its trainer are in order: an adaptation learns, and gives everything back."""
    with unchanged(model), trainer_of(model, engine=engine).adapt(IDS) as adapted:
        assert adapted.loss().item() < adapted.losses[0, 0].item()


@contextlib.contextmanager
def failing_forward(model, raised, call):
    """The ``call``-th forward of the model's last linear raises."""
    calls = []

    def hook(module, inputs, output):
        calls.append(module)
        if len(calls) == call:
            raise raised

    handle = model.get_output_embeddings().register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def failing_backward(model, raised, call):
    """The ``call``-th backward through the model's last linear raises."""
    calls = []

    def fail(gradient):
        calls.append(gradient)
        if len(calls) == call:
            raise raised

    def hook(module, inputs, output):
        if output.requires_grad:
            output.register_hook(fail)

    handle = model.get_output_embeddings().register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
