"""Parameters, option grids and comparisons for the tests of the fused optimizers."""

import itertools

import pytest
import torch
from torch import nn

from ttt_fast.optim import FusedAdamW, FusedSGD

SHAPES = [(), (1,), (7,), (5, 33), (3, 1, 4), (4097,)]
STEPS = 20
CLIP = 1.0  # the norm of the gradients below is about 66, or 0.66 where they are small

SGD_GRID = [
    dict(
        momentum=m, dampening=d, nesterov=n, weight_decay=wd, maximize=maximize, decoupled=decoupled
    )
    for (m, d, n), wd, maximize, decoupled in itertools.product(
        [(0.0, 0.0, False), (0.9, 0.0, False), (0.9, 0.5, False), (0.9, 0.0, True)],
        [0.0, 0.1],
        [False, True],
        [False, True],
    )
    if wd or not decoupled
]
ADAMW_GRID = [
    dict(betas=betas, eps=eps, weight_decay=wd, maximize=maximize)
    for betas, eps, wd, maximize in itertools.product(
        [(0.9, 0.999), (0.0, 0.5)], [1e-8, 1e-2], [0.0, 0.1], [False, True]
    )
]
GRID = [("sgd", options) for options in SGD_GRID] + [("adamw", options) for options in ADAMW_GRID]


def name_of(case):
    kind, options = case
    return f"{kind}-" + "-".join(f"{key}={value}" for key, value in options.items() if value)


grid = pytest.mark.parametrize("case", GRID, ids=name_of)
clips = pytest.mark.parametrize("clip", [None, CLIP])
both = pytest.mark.parametrize("kind", ["sgd", "adamw"])


class TorchLoop:
    """What a fused optimizer replaces: clip_grad_norm_, then torch's optimizer."""

    def __init__(self, params, kind, clip=None, lr=1e-2, decoupled=False, **options):
        self.params, self.clip, self.decay = list(params), clip, 1.0
        if decoupled:
            self.decay = 1.0 - lr * options.pop("weight_decay")
        torch_class = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[kind]
        self.optimizer = torch_class(self.params, lr=lr, foreach=True, **options)

    @torch.no_grad()
    def step(self):
        if self.clip is not None:
            self.norm = nn.utils.clip_grad_norm_(self.params, self.clip, foreach=True)
        for param in self.params:
            if param.grad is not None and self.decay != 1.0:
                param.mul_(self.decay)
        self.optimizer.step()


def fused(params, kind, clip=None, lr=1e-2, decoupled=False, **options):
    if kind == "sgd":
        options["decoupled_weight_decay"] = decoupled
    return {"sgd": FusedSGD, "adamw": FusedAdamW}[kind](
        params, lr=lr, max_grad_norm=clip, **options
    )


def make_params(dtype=torch.float32, shapes=SHAPES, seed=0):
    generator = torch.Generator().manual_seed(seed)
    params = [nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in shapes]
    if shapes is SHAPES:  # one that is not contiguous
        params.append(nn.Parameter(torch.randn(6, 9, generator=generator).to(dtype).t()))
    return params


def set_grads(params, step, present=None, scale=1.0):
    """Gradients that depend on (step, index) alone; None where ``present`` says so."""
    for i, param in enumerate(params):
        param.grad = None
        if present is None or present(step, i):
            generator = torch.Generator().manual_seed(1000 * step + i)
            noise = scale * torch.randn(param.shape, generator=generator)
            param.grad = torch.empty_like(param).copy_(noise)


def run(params, optimizer, steps=STEPS, present=None, first=0, scale=1.0):
    for step in range(first, first + steps):
        # Every third step is below the clip threshold.
        set_grads(params, step, present, scale * (0.01 if step % 3 == 2 else 1.0))
        optimizer.step()
    return params


def pair(case, dtype, clip, **fused_options):
    """Parameters after STEPS steps of torch and of ours."""
    kind, options = case
    theirs, ours = make_params(dtype), make_params(dtype)
    run(theirs, TorchLoop(theirs, kind, clip, **options))
    run(ours, fused(ours, kind, clip, **options, **fused_options))
    return theirs, ours


def assert_ulps(ours, theirs, ulps):
    """Distance in units of the last place of each tensor's largest element."""
    for a, b in zip(ours, theirs, strict=True):
        unit = torch.finfo(a.dtype).eps * b.detach().abs().max()
        assert (a - b).detach().abs().max() <= ulps * unit, (a.shape, (a - b).abs().max() / unit)


def assert_bitwise(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b), (a.shape, (a - b).abs().max())


def groups_of(params):
    return [
        dict(params=params[:2], lr=0.1, weight_decay=0.0),
        dict(params=params[2:4]),
        dict(params=params[4:], maximize=True),
    ]


def train(model, optimizer, ids, steps):
    """A loop in which gradients depend on the weights; ``optimizer`` clips."""
    for _ in range(steps):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        model.zero_grad()
    return [param.detach() for param in model.parameters()]


def torch_optimizer(params, kind, **options):
    torch_class = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[kind]
    return torch_class(params, lr=0.1, foreach=True, **options)
