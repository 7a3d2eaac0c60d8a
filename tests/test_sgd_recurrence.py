"""SGD on coefficients against torch.optim.SGD and clip_grad_norm_ in float64, 50 steps.

Each delta has two parameters, a weight and a bias, in groups of their own; the norm is over both.
Torch's side and ours each take their gradients at their own weights, so errors would compound.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from ttt_fast.sgd import Coefficients, clip_coefficient

STEPS = 50
TOLERANCE = 1e-10
PARTS = slice(0, 5), slice(5, 8)  # weight, bias
SIZE = 8

RULES = {
    "plain": dict(momentum=0.0),
    "plain-dampening": dict(momentum=0.0, dampening=0.4),
    "momentum": dict(momentum=0.9),
    "momentum-dampening": dict(momentum=0.9, dampening=0.4),
    "nesterov": dict(momentum=0.9, nesterov=True),
}
DECAYS = {
    "no-decay": dict(),
    "coupled": dict(weight_decay=0.3),
    "decoupled": dict(weight_decay=0.3, decoupled_weight_decay=True),
}


def random(*shape, seed):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


BASE, TARGET = random(SIZE, seed=1), random(SIZE, seed=2)
_FACTOR = random(SIZE, SIZE, seed=3)
HESSIAN = _FACTOR @ _FACTOR.T / SIZE + 0.1 * torch.eye(SIZE, dtype=torch.float64)


def gradients(weights):
    """Gradients at weights (..., SIZE) of a function with curvature and ripples."""
    return (weights - TARGET) @ HESSIAN + 0.2 * torch.sin(3 * weights)


class TorchLoop:
    """One delta with torch's own optimizer and clipping; a skipped parameter's gradient is None."""

    def __init__(self, max_grad_norm, bias_decay, *, decoupled_weight_decay=False, **options):
        self.params = [BASE[part].clone().requires_grad_() for part in PARTS]
        self.decays = [options.pop("weight_decay", 0.0), bias_decay]
        self.decoupled, self.max_grad_norm = decoupled_weight_decay, max_grad_norm
        coupled = [0.0 if self.decoupled else decay for decay in self.decays]
        groups = [
            dict(params=[p], weight_decay=wd) for p, wd in zip(self.params, coupled, strict=True)
        ]
        self.optimizer = torch.optim.SGD(groups, lr=0.0, **options)

    @torch.no_grad()
    def step(self, lr, active):
        """Step with ``active``: whether the weight, and whether the bias, has a gradient."""
        grad = gradients(torch.cat(self.params))
        for param, part, has_grad in zip(self.params, PARTS, active, strict=True):
            param.grad = grad[part].clone() if has_grad else None
        if self.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.params, self.max_grad_norm)
        for param, decay in zip(self.params, self.decays, strict=True):
            if self.decoupled and param.grad is not None:
                param.mul_(1.0 - lr * decay)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()

    @property
    def weights(self):
        return torch.cat(self.params).detach()

    @property
    def momentum_buffer(self):
        """Momentum of all parameters, 0 for one that took no step; None without momentum."""
        if not self.optimizer.param_groups[0]["momentum"]:
            return None
        buffers = [self.optimizer.state.get(p, {}).get("momentum_buffer") for p in self.params]
        pairs = zip(buffers, self.params, strict=True)
        return torch.cat([torch.zeros_like(p) if b is None else b for b, p in pairs]).detach()


class FactoredLoop:
    """D deltas as coefficients and raw gradients; a weight exists only where it is looked at."""

    def __init__(self, n_deltas, max_grad_norm, bias_decay, **options):
        self.max_grad_norm = max_grad_norm
        self.groups = [
            Coefficients(n_deltas, **options),
            Coefficients(n_deltas, **(options | dict(weight_decay=bias_decay))),
        ]
        self.grads = torch.zeros(n_deltas, 0, SIZE, dtype=torch.float64)

    def step(self, lr, active):
        """Step with ``active`` (D, 2): which weights, and which biases, have a gradient."""
        grad = gradients(self.weights)
        for column, part in enumerate(PARTS):
            grad[:, part] *= active[:, column, None]
        clip = clip_coefficient(grad.norm(dim=1), self.max_grad_norm)
        self.grads = torch.cat([self.grads, grad[:, None]], dim=1)
        for column, coefficients in enumerate(self.groups):
            used = active[:, column]
            coefficients.advance(torch.where(used, clip, torch.nan), lr, used)

    @property
    def weights(self):
        return self.weights_from([(c.rho, c.beta) for c in self.groups])

    def weights_from(self, rows):
        """W = ρ·W₀ − Σ β_s·G_s from (ρ, β) of the weight and of the bias."""
        parts = [
            rho[:, None] * BASE[part] - torch.einsum("ds,dsn->dn", beta, self.grads[..., part])
            for part, (rho, beta) in zip(PARTS, rows, strict=True)
        ]
        return torch.cat(parts, dim=1)

    @property
    def momentum_buffers(self):
        """M = σ·W₀ + Σ α_s·G_s."""
        parts = [
            c.sigma[:, None] * BASE[part]
            + torch.einsum("ds,dsn->dn", c.alpha, self.grads[..., part])
            for part, c in zip(PARTS, self.groups, strict=True)
        ]
        return torch.cat(parts, dim=1)


def assert_near(actual, expected):
    """Relative to the size of the expected vector; a NaN fails."""
    distance = (actual - expected).abs().max()
    assert distance <= TOLERANCE * expected.abs().max(), distance


def assert_as_torch(ours, theirs, lrs, active):
    """Step both sides together, lrs (K,), active (K, D, 2), and compare after every step."""
    after = [ours.weights]
    for lr, flags in zip(lrs, active, strict=True):
        ours.step(lr, flags)
        after.append(ours.weights)
        for delta, loop in enumerate(theirs):
            loop.step(lr, flags[delta].tolist())
            assert_near(ours.weights[delta], loop.weights)
            if loop.momentum_buffer is not None:
                assert_near(ours.momentum_buffers[delta], loop.momentum_buffer)
    for step, expected in enumerate(after):
        rewound = ours.weights_from([c.at(step) for c in ours.groups])
        torch.testing.assert_close(rewound, expected, rtol=0, atol=1e-13)


def loops(n_deltas, max_grad_norm=None, bias_decay=0.0, **options):
    theirs = [TorchLoop(max_grad_norm, bias_decay, **options) for _ in range(n_deltas)]
    return FactoredLoop(n_deltas, max_grad_norm, bias_decay, **options), theirs


def masks(n_deltas, seed, share=0.75, steps=STEPS):
    """Random active masks, (K, D, 2)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(steps, n_deltas, 2, generator=generator) < share


def schedule(peak, steps=STEPS):
    """Another learning rate at every step: warm up, then fall to 0."""
    return [peak * min((t + 1) / 5, 1.0) * (1 - t / (steps - 1)) for t in range(steps)]


# ---------------------------------------------------------------------------- against torch


@pytest.mark.parametrize("max_grad_norm", [None, 0.5], ids=["unclipped", "clipped"])
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("rule", RULES)
def test_every_option_equals_torch(rule, decay, max_grad_norm):
    ours, theirs = loops(2, max_grad_norm, **RULES[rule], **DECAYS[decay])
    assert_as_torch(ours, theirs, schedule(0.1), masks(2, seed=4))


OPTIONS = st.fixed_dictionaries(
    dict(
        weight_decay=st.sampled_from([0.0, 1e-3, 0.5]),
        bias_decay=st.sampled_from([0.0, 0.1]),
        decoupled_weight_decay=st.booleans(),
        max_grad_norm=st.sampled_from([None, 0.1, 1.0, 10.0]),
    )
)
MOMENTA = st.one_of(
    st.fixed_dictionaries(dict(momentum=st.floats(0, 0.95), dampening=st.floats(0, 1))),
    st.fixed_dictionaries(dict(momentum=st.floats(0.01, 0.95), nesterov=st.just(True))),
)


@settings(max_examples=30, deadline=None)
@given(
    options=OPTIONS,
    momenta=MOMENTA,
    lrs=st.lists(st.floats(0, 0.2), min_size=STEPS, max_size=STEPS),
    n_deltas=st.integers(1, 3),
    share=st.sampled_from([0.1, 0.5, 1.0]),
    seed=st.integers(0, 1000),
)
def test_any_options_equal_torch(options, momenta, lrs, n_deltas, share, seed):
    ours, theirs = loops(n_deltas, **options, **momenta)
    assert_as_torch(ours, theirs, lrs, masks(n_deltas, seed, share))


@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0, 50.0])
def test_clip_coefficient_equals_torch(max_grad_norm):
    norms = torch.tensor([0.0, 1e-9, 0.3, 1.0, 7.0, 1e6], dtype=torch.float64)
    applied = []
    for norm in norms:
        # The second element holds no norm: it shows the factor when the first is 0.
        param = torch.zeros(2, dtype=torch.float64, requires_grad=True)
        param.grad = torch.stack([norm, torch.tensor(1e-30, dtype=torch.float64)])
        torch.nn.utils.clip_grad_norm_([param], max_grad_norm)
        applied.append(param.grad[1] * 1e30)
    torch.testing.assert_close(clip_coefficient(norms, max_grad_norm), torch.stack(applied))


def test_clip_coefficient_of_a_grid_of_limits():
    norms = torch.tensor([7.0, 7.0, torch.inf, torch.nan])
    limits = torch.tensor([1.0, torch.inf, torch.inf, torch.inf])
    expected = torch.tensor([1.0 / (7.0 + 1e-6), 1.0, 1.0, 1.0])
    assert torch.equal(clip_coefficient(norms, limits), expected)
    assert torch.equal(clip_coefficient(norms, None), torch.ones(4))
    assert torch.equal(clip_coefficient(norms, torch.inf), torch.ones(4))
    assert clip_coefficient(norms, 1.0).dtype == torch.float32
    assert clip_coefficient(norms, 1.0)[3].isnan()


# ---------------------------------------------------------------------------- can it fail?


def dampen_the_first_step(ours):
    for coefficients in ours.groups:
        coefficients.started = torch.ones_like(coefficients.started)


def step_where_skipped(ours):
    step = ours.step
    ours.step = lambda lr, active: step(lr, torch.ones_like(active))


def clip_harder(ours):
    ours.max_grad_norm *= 1 + 1e-8


@pytest.mark.parametrize("mistake", [dampen_the_first_step, step_where_skipped, clip_harder])
def test_a_mistake_is_noticed(mistake):
    options = dict(max_grad_norm=0.5, momentum=0.9, dampening=0.4, weight_decay=0.3)
    ours, theirs = loops(2, **options)
    mistake(ours)
    with pytest.raises(AssertionError):
        assert_as_torch(ours, theirs, schedule(0.1), masks(2, seed=4))


# ---------------------------------------------------------------------------- a grid of deltas

GRID = dict(
    momentum=[0.0, 0.9, 0.0, 0.5],
    dampening=[0.7, 0.3, 0.0, 0.0],
    weight_decay=[0.1, 0.0, 0.0, 0.2],
)
GRID_LR = [0.1, 0.2, 0.3, 0.05]


def advance(coefficients, deltas=slice(None), steps=12, seed=5):
    """Steps with random clips and masks, the same for a delta wherever it is computed."""
    clips = random(steps, 4, seed=seed).abs()
    active = masks(4, seed, steps=steps)[..., 0]
    for clip, flags in zip(clips, active, strict=True):
        lr = torch.tensor(GRID_LR, dtype=torch.float64)[deltas]
        coefficients.advance(clip[deltas], lr, flags[deltas])
    return coefficients


def state(coefficients):
    """Everything that a user can read, as rows of deltas."""
    steps = range(coefficients.beta.shape[1] + 1)
    history = [tensor for step in steps for tensor in coefficients.at(step)]
    c = coefficients
    return [c.rho, c.sigma, c.beta, c.alpha, c.started, *history]


def equal(left, right):
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("decoupled", [False, True])
def test_options_as_tensors_equal_separate_runs(nesterov, decoupled):
    rules = dict(nesterov=nesterov, decoupled_weight_decay=decoupled)
    names = [name for name in GRID if not (nesterov and name == "dampening")]
    together = advance(
        Coefficients(
            4, **{name: torch.tensor(GRID[name], dtype=torch.float64) for name in names}, **rules
        )
    )
    for delta in range(4):
        alone = advance(
            Coefficients(1, **{name: GRID[name][delta] for name in names}, **rules),
            slice(delta, delta + 1),
        )
        assert equal([row[delta : delta + 1] for row in state(together)], state(alone))
    assert together.rho.tolist()[1:3] == [1.0, 1.0], "a decay of 0 must leave W₀ alone"
    assert 0.0 < together.rho[0] < 1.0


def test_no_momentum_in_a_grid_is_plain_sgd():
    """β of a plain step is lr·clip, whatever nesterov and dampening say."""
    clip = torch.tensor([0.5, 0.5], dtype=torch.float64)
    for options in (dict(nesterov=True), dict(dampening=torch.tensor([0.5, 0.5]))):
        coefficients = Coefficients(2, momentum=torch.tensor([0.0, 0.9]), **options)
        for _ in range(3):
            coefficients.advance(clip, 0.1, torch.tensor([True, True]))
        plain, with_momentum = coefficients.beta
        assert torch.equal(plain, torch.full((3,), 0.05, dtype=torch.float64))
        assert not torch.allclose(with_momentum, plain)


# ---------------------------------------------------------------------------- state


def test_a_new_delta_is_the_base_weight():
    coefficients = Coefficients(3, momentum=0.9)
    rho, beta = coefficients.at(0)
    assert rho.dtype == beta.dtype == torch.float64
    assert torch.equal(rho, torch.ones(3, dtype=torch.float64))
    assert beta.shape == coefficients.alpha.shape == (3, 0)
    assert not coefficients.started.any()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_skipped_delta_stays_as_it_was(bad):
    """Nothing that belongs to a step without a gradient reaches the delta, nor its neighbour."""
    options = dict(momentum=0.9, dampening=0.5, weight_decay=0.1)
    coefficients = advance(Coefficients(4, **options))
    before = coefficients.clone()
    coefficients.advance(
        torch.tensor([bad, 1.0, bad, bad]),
        torch.tensor([bad, 0.1, 0.1, 0.1]),
        torch.tensor([False, True, False, False]),
    )
    skipped = [0, 2, 3]
    assert torch.equal(coefficients.rho[skipped], before.rho[skipped])
    assert torch.equal(coefficients.sigma[skipped], before.sigma[skipped])
    assert torch.equal(coefficients.beta[skipped, :-1], before.beta[skipped])
    assert torch.equal(coefficients.alpha[skipped, :-1], before.alpha[skipped])
    assert not coefficients.beta[skipped, -1].any()
    assert not coefficients.alpha[skipped, -1].any()
    assert all(tensor.isfinite().all() for tensor in state(coefficients))
    assert coefficients.rho[1] != before.rho[1]


def test_a_delta_starts_at_its_first_gradient():
    coefficients = Coefficients(2, momentum=0.9, dampening=0.5)
    ones, late = torch.ones(2), torch.tensor([True, False])
    coefficients.advance(ones, 0.1, late)
    assert coefficients.started.tolist() == [True, False]
    coefficients.advance(ones, 0.1, ~late)
    assert coefficients.started.tolist() == [True, True]
    assert coefficients.alpha.tolist() == [[1.0, 0.0], [0.0, 1.0]]


def test_at_gives_what_was_current():
    coefficients = Coefficients(4, momentum=0.9, weight_decay=0.1)
    current = [(coefficients.rho, coefficients.beta)]
    active = torch.tensor([True, True, True, False])
    for step in range(6):
        coefficients.advance(random(4, seed=step).abs(), 0.1 / (step + 1), active)
        current.append((coefficients.rho, coefficients.beta))
    for step, (rho, beta) in enumerate(current):
        rho_at, beta_at = coefficients.at(step)
        assert torch.equal(rho_at, rho)
        assert beta_at.shape == (4, 6)
        assert torch.equal(beta_at[:, :step], beta)
        assert not beta_at[:, step:].any()


@pytest.mark.parametrize("step", [-1, 3])
def test_at_refuses_a_step_that_does_not_exist(step):
    coefficients = advance(Coefficients(4, momentum=0.9), steps=2)
    with pytest.raises(ValueError, match=f"step {step} was asked for; there are steps 0 to 2"):
        coefficients.at(step)


def test_clones_go_their_own_ways():
    options = dict(momentum=0.9, dampening=0.2, weight_decay=0.1)
    original = advance(Coefficients(4, **options))
    clone = original.clone()
    assert equal(state(clone), state(original))
    kept = [tensor.clone() for tensor in state(original)]
    advance(clone, steps=5, seed=6)
    assert equal(state(original), kept)
    assert clone.beta.shape == (4, 17)
    advance(original, steps=5, seed=6)
    assert equal(state(clone), state(original))
    advance(original, steps=1, seed=7)
    advance(clone, steps=1, seed=8)
    assert not torch.equal(clone.beta, original.beta)


def test_options_are_checked():
    with pytest.raises(ValueError, match="Nesterov momentum needs dampening=0"):
        Coefficients(2, momentum=0.9, dampening=0.1, nesterov=True)
    with pytest.raises(ValueError, match=r"momentum has shape \(3,\), there are 2 deltas"):
        Coefficients(2, momentum=torch.zeros(3))
    coefficients = Coefficients(2, momentum=0.9)
    active = torch.tensor([True, True])
    with pytest.raises(ValueError, match=r"clip has shape \(1,\)"):
        coefficients.advance(torch.ones(1), 0.1, active)
    with pytest.raises(ValueError, match=r"lr has shape \(\)"):
        coefficients.advance(torch.ones(2), torch.tensor(0.1), active)
    with pytest.raises(ValueError, match=r"active has shape \(1,\)"):
        coefficients.advance(torch.ones(2), 0.1, active[:1])
    assert coefficients.beta.shape == (2, 0)


# ---------------------------------------------------------------------------- no synchronisation


class NoHostRead(TorchDispatchMode):
    """Refuse what makes the host wait for the device."""

    SYNCHRONISING = {
        torch.ops.aten._local_scalar_dense.default,
        torch.ops.aten.equal.default,
        torch.ops.aten.nonzero.default,
    }

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in self.SYNCHRONISING:
            raise RuntimeError(f"{func} reads a tensor on the host")
        return func(*args, **(kwargs or {}))


NORM, FLAGS = torch.tensor([3.0, 0.1, 1.0, 2.0]), torch.tensor([True, False, True, True])


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("lr", [0.1, torch.tensor(GRID_LR)], ids=["number", "tensor"])
@pytest.mark.parametrize("rules", [dict(nesterov=True), dict(decoupled_weight_decay=True)], ids=str)
def test_a_step_never_waits_for_the_device(rules, lr, device):
    grid = {k: torch.tensor(v, device=device) for k, v in GRID.items() if k != "dampening"}
    coefficients = Coefficients(4, **grid, **rules, device=device)
    norm, active = NORM.to(device), FLAGS.to(device)
    lr = lr.to(device) if isinstance(lr, torch.Tensor) else lr
    with NoHostRead():
        for limit in (None, 1.0, torch.tensor([1.0, torch.inf, 1.0, 1.0]).to(device)):
            coefficients.advance(clip_coefficient(norm, limit), lr, active)
        rho, beta = coefficients.clone().at(2)
    assert (rho.device.type, beta.shape) == (device, (4, 3))


@pytest.mark.parametrize("read", [torch.Tensor.item, bool, float, int], ids=str)
def test_a_host_read_is_noticed(read):
    with NoHostRead(), pytest.raises(RuntimeError, match="reads a tensor on the host"):
        read(NORM.max())
