"""FusedSGD and FusedAdamW against torch's optimizers with clip_grad_norm_ before them."""

import copy
import io
import itertools
import math
import pickle
import subprocess
import sys
import textwrap

import accelerate
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.families import tiny_model
from ttt_fast.optim import FusedAdamW, FusedSGD, check_trainer
from ttt_fast.scope import RowSlice, Selection
from ttt_fast.snapshot import Snapshot

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


# ---------------------------------------------------------------------------- exactness


@grid
@clips
def test_float32_is_within_a_few_ulps_of_torch(case, clip):
    theirs, ours = pair(case, torch.float32, clip)
    assert_ulps(ours, theirs, 8)


@grid
@clips
def test_float64_is_torch(case, clip):
    theirs, ours = pair(case, torch.float64, clip)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@grid
@clips
def test_bfloat16_with_rounding_torch_is_bitwise_torch(case, clip):
    theirs, ours = pair(case, torch.bfloat16, clip, rounding="torch")
    assert_bitwise(ours, theirs)


@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_any_options_and_missing_gradients(data):
    kind, options = data.draw(st.sampled_from(GRID))
    shapes = data.draw(
        st.lists(st.lists(st.integers(1, 9), max_size=3).map(tuple), min_size=1, max_size=5)
    )
    missing = data.draw(st.sets(st.tuples(st.integers(0, 5), st.integers(0, len(shapes) - 1))))
    clip = data.draw(st.none() | st.floats(0.01, 10))
    lr = data.draw(st.floats(0, 0.5))
    results = []
    for make in (TorchLoop, fused):
        params = make_params(torch.float64, shapes)
        optimizer = make(params, kind, clip, lr, **options)
        results.append(run(params, optimizer, 6, lambda step, i: (step, i) not in missing))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def train(model, optimizer, ids, steps):
    """A loop in which gradients depend on the weights; ``optimizer`` clips."""
    for _ in range(steps):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        model.zero_grad()
    return [param.detach() for param in model.parameters()]


@pytest.mark.parametrize("family", ["llama_tied", "gpt2"])
@both
def test_tiny_models(family, kind):
    ids = torch.randint(0, 101, (2, 17), generator=torch.Generator().manual_seed(1))
    # GPT-2's key biases have gradients that are zero but for rounding; a large eps keeps AdamW from
    # scaling them up.
    options = dict(weight_decay=0.01) | (dict(momentum=0.9) if kind == "sgd" else dict(eps=1e-3))
    trained = []
    for make in (TorchLoop, fused):
        model = tiny_model(family, torch.float64)
        trained.append(
            train(model, make(model.parameters(), kind, 0.5, 1e-3, **options), ids, STEPS)
        )
    for a, b in zip(*trained, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.slow
@pytest.mark.real_model
@pytest.mark.parametrize(
    ("options", "ulps"),
    [
        (dict(), 8),
        (dict(momentum=0.9, weight_decay=0.01), 8),
        (dict(momentum=0.9, dampening=0.5, maximize=True), 8),
        (dict(momentum=0.9, nesterov=True, weight_decay=0.01), 8),
        # The usual w *= 1 - lr * decay rounds the factor to one ulp, here as large as the decay.
        (dict(momentum=0.9, weight_decay=0.01, decoupled=True), 20),
    ],
    ids=str,
)
def test_real_model_is_within_a_few_ulps_of_torch(demo_model, options, ulps):
    model, tokenizer = demo_model
    ids = tokenizer("The lighthouse keeper wrote one line a day.", return_tensors="pt").input_ids
    start = copy.deepcopy(model.state_dict())
    trained = []
    for make in (TorchLoop, fused):
        model.load_state_dict(start)
        optimizer = make(model.parameters(), "sgd", 10.0, 1e-5, **options)
        trained.append([p.clone() for p in train(model, optimizer, ids, STEPS)])
    model.load_state_dict(start)
    assert_ulps(trained[1], trained[0], ulps)


# ---------------------------------------------------------------------------- the norm


@pytest.mark.parametrize("rounding", ["nearest", "torch"])
def test_one_norm_over_all_groups_and_clip_params(rounding):
    theirs, ours = make_params(torch.bfloat16), make_params(torch.bfloat16)
    optimizer = FusedSGD(
        [dict(params=ours[:2]), dict(params=ours[2:4], lr=0.1)],
        lr=1e-2,
        max_grad_norm=CLIP,
        clip_params=(param for param in ours),  # its own among them: counted once
        rounding=rounding,
    )
    set_grads(theirs, 0)
    set_grads(ours, 0)
    before = [param.grad.clone() for param in ours]
    norm = nn.utils.clip_grad_norm_(theirs, CLIP)
    optimizer.step()
    assert optimizer.last_grad_norm.shape == ()
    torch.testing.assert_close(optimizer.last_grad_norm, norm, rtol=1e-2, atol=0, check_dtype=False)
    assert_bitwise([param.grad for param in ours[:4]], before[:4])
    if rounding == "torch":
        assert torch.equal(optimizer.last_grad_norm, norm)
        assert_bitwise([param.grad for param in ours[4:]], [param.grad for param in theirs[4:]])
    else:
        exact = math.sqrt(sum(g.double().square().sum().item() for g in before))
        assert optimizer.last_grad_norm.item() == pytest.approx(exact, rel=1e-6)


def test_clip_params_outside_the_optimizer_only():
    params = make_params()
    optimizer = FusedSGD(params[:3], lr=0.1, max_grad_norm=CLIP, clip_params=params[3:])
    params[-1].requires_grad_(False)  # no gradient: neither counted nor clipped
    set_grads(params[:-1], 0)
    wanted = [param.grad.clone() for param in params[:-1]]
    for param, grad in zip(reference := make_params()[:-1], wanted, strict=True):
        param.grad = grad
    nn.utils.clip_grad_norm_(reference, CLIP)
    optimizer.step()
    torch.testing.assert_close([p.grad for p in params[3:-1]], [p.grad for p in reference[3:]])


def test_an_infinite_threshold_gives_the_norm_and_never_clips():
    params, plain = make_params(), make_params()
    optimizer = FusedSGD(params, lr=0.1, max_grad_norm=float("inf"))
    run(params, optimizer, 2)
    run(plain, FusedSGD(plain, lr=0.1), 2)
    assert_bitwise(params, plain)
    set_grads(plain, 1)
    wanted = nn.utils.get_total_norm([param.grad for param in plain])
    torch.testing.assert_close(optimizer.last_grad_norm, wanted)


def test_without_a_threshold_there_is_no_norm():
    params = make_params()
    optimizer = FusedSGD(params, lr=0.1)
    run(params, optimizer, 1)
    assert optimizer.last_grad_norm is None


def test_norm_of_no_gradient_is_zero():
    params = make_params()
    optimizer = FusedSGD(params, lr=0.1, max_grad_norm=1.0)
    optimizer.step()
    assert optimizer.last_grad_norm == 0
    assert_bitwise(params, make_params())


# ---------------------------------------------------------------------------- torch's manners


@both
def test_parameters_without_gradient_are_skipped_and_start_on_their_own(kind):
    def present(step, i):
        return step >= i and (step + i) % 4 != 1

    options = dict(weight_decay=0.1)
    options |= dict(momentum=0.9, dampening=0.5) if kind == "sgd" else {}
    theirs, ours = make_params(), make_params()
    loop = TorchLoop(theirs, kind, CLIP, **options)
    run(theirs, loop, 7, present)
    optimizer = fused(ours, kind, CLIP, **options)
    run(ours, optimizer, 7, present)
    assert_ulps(ours, theirs, 4)
    assert {i for i, p in enumerate(ours) if p in optimizer.state} == {
        i for i, p in enumerate(theirs) if p in loop.optimizer.state
    }


def groups_of(params):
    return [
        dict(params=params[:2], lr=0.1, weight_decay=0.0),
        dict(params=params[2:4]),
        dict(params=params[4:], maximize=True),
    ]


@both
def test_groups_and_a_scheduler_that_cycles_lr_and_momentum(kind):
    options = dict(momentum=0.9, nesterov=True) if kind == "sgd" else dict(betas=(0.8, 0.9))
    results = []
    for ours in (False, True):
        params = make_params(torch.bfloat16)
        classes = (FusedSGD, FusedAdamW) if ours else (torch.optim.SGD, torch.optim.AdamW)
        own = dict(rounding="torch", max_grad_norm=CLIP) if ours else dict(foreach=True)
        optimizer = classes[kind == "adamw"](
            groups_of(params), lr=1e-2, weight_decay=0.1, **options, **own
        )
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.2, total_steps=10)
        for step in range(10):
            set_grads(params, step)
            if not ours:
                nn.utils.clip_grad_norm_(params, CLIP, foreach=True)
            optimizer.step()
            scheduler.step()
        results.append(params)
    assert_bitwise(*results)


@both
def test_tensor_lr(kind):
    plain, tensor = make_params(), make_params()
    run(plain, fused(plain, kind, lr=0.25), 3)
    optimizer = fused(tensor, kind, lr=torch.tensor(0.5))
    optimizer.param_groups[0]["lr"].fill_(0.25)
    run(tensor, optimizer, 3)
    assert_bitwise(tensor, plain)


def test_closure_runs_with_gradients_and_its_loss_is_returned():
    param = nn.Parameter(torch.ones(3))
    optimizer = FusedSGD([param], lr=0.5)

    def closure():
        optimizer.zero_grad()
        loss = param.sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 3
    assert torch.equal(param.detach(), torch.full((3,), 0.5))
    assert optimizer.step() is None


@both
def test_hooks_and_profiler_see_the_step(kind):
    params = make_params()
    optimizer, seen = fused(params, kind), []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    set_grads(params, 0)
    with torch.profiler.profile() as profile:
        optimizer.step()
        optimizer.zero_grad()
    assert seen == ["before", "after"]
    names = {event.name for event in profile.events()}
    name = type(optimizer).__name__
    assert {f"Optimizer.step#{name}.step", f"Optimizer.zero_grad#{name}.zero_grad"} <= names
    assert all(param.grad is None for param in params)


@pytest.mark.parametrize(
    "clone", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"]
)
@both
def test_a_copy_goes_on_by_itself(clone, kind):
    params = make_params()
    options = dict(momentum=0.9) if kind == "sgd" else {}
    optimizer = fused(params, kind, CLIP, clip_params=params, **options)
    torch.optim.lr_scheduler.ConstantLR(optimizer)  # schedulers patch `step` on the instance
    run(params, optimizer, 3)
    other_params, other = clone((params, optimizer))
    for p, o in ((params, optimizer), (other_params, other)):
        run(p, o, 3, first=3)
    assert_bitwise(other_params, params)
    assert other.max_grad_norm == CLIP
    assert all(a is b for a, b in zip(other.clip_params, other_params, strict=True))


@both
def test_in_a_compiled_loop(kind):
    results = []
    for compiled in (False, True):
        params = make_params(shapes=[(4, 3), (3,)])
        optimizer = fused(params, kind, CLIP)

        def train_step(params=params, optimizer=optimizer):
            ((torch.ones(2, 4) @ params[0]) + params[1]).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()

        train_step = torch.compile(train_step, backend="eager") if compiled else train_step
        for _ in range(3):
            train_step()
        results.append(params)
    assert_bitwise(*results)


# ---------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("optimizer_class", "options"),
    [
        (FusedSGD, dict(lr=-1.0)),
        (FusedSGD, dict(momentum=-1.0)),
        (FusedSGD, dict(weight_decay=-1.0)),
        (FusedSGD, dict(nesterov=True)),
        (FusedSGD, dict(nesterov=True, momentum=0.9, dampening=0.1)),
        (FusedSGD, dict(lr=torch.ones(2))),
        (FusedAdamW, dict(lr=-1.0)),
        (FusedAdamW, dict(eps=-1.0)),
        (FusedAdamW, dict(betas=(1.0, 0.9))),
        (FusedAdamW, dict(betas=(0.9, -0.1))),
        (FusedAdamW, dict(weight_decay=-1.0)),
    ],
    ids=str,
)
def test_bad_options_are_refused_in_torchs_words(optimizer_class, options):
    torch_class = {FusedSGD: torch.optim.SGD, FusedAdamW: torch.optim.AdamW}[optimizer_class]
    with pytest.raises(ValueError) as theirs:
        torch_class(make_params(), **options)
    with pytest.raises(ValueError) as ours:
        optimizer_class(make_params(), **options)
    assert str(ours.value) == str(theirs.value)
    optimizer = optimizer_class(make_params())
    with pytest.raises(ValueError) as in_group:
        optimizer.add_param_group(dict(params=make_params(), **options))
    assert str(in_group.value) == str(theirs.value)
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(lr=float("nan")), "Invalid learning rate: nan"),
        (dict(max_grad_norm=0.0), "use None for no clipping"),
        (dict(max_grad_norm=-1.0), "above 0"),
        (dict(max_grad_norm=float("nan")), "above 0"),
        (dict(rounding="up"), "'nearest', 'stochastic', 'torch'"),
        (dict(state_dtype=torch.float16), "torch.float32"),
        (dict(state_dtype=torch.float32, rounding="torch"), "torch.float32"),
    ],
    ids=str,
)
@both
def test_bad_options_of_our_own(kind, options, message):
    optimizer_class = {"sgd": FusedSGD, "adamw": FusedAdamW}[kind]
    with pytest.raises(ValueError, match=message):
        optimizer_class(make_params(), **options)


def test_params_that_cannot_be():
    complex_param = nn.Parameter(torch.ones(3, dtype=torch.complex64))
    with pytest.raises(TypeError, match="parameter 1 of its group is complex64"):
        FusedSGD([nn.Parameter(torch.ones(2)), complex_param])
    with pytest.raises(TypeError, match=r"clip_params\[0\] is complex64"):
        FusedSGD(make_params(), clip_params=[complex_param])
    with pytest.raises(TypeError, match="iterable of Tensors"):
        FusedSGD(torch.ones(2))
    with pytest.raises(TypeError, match="ordered collections"):
        FusedSGD([dict(params=set(make_params()))])
    with pytest.raises(ValueError, match="empty parameter list"):
        FusedSGD([])
    optimizer = FusedSGD(make_params())
    with pytest.raises(TypeError, match="'phase' is complex64"):
        FusedSGD([("phase", complex_param)])
    with pytest.raises(TypeError, match="parameter 0 of its group"):
        optimizer.add_param_group(dict(params=[complex_param]))
    assert len(optimizer.param_groups) == 1


def test_a_sparse_gradient_is_refused_before_anything_changes():
    dense, embedding = nn.Parameter(torch.ones(3)), nn.Embedding(5, 2, sparse=True)
    optimizer = FusedSGD([dense, *embedding.parameters()], lr=1.0, max_grad_norm=1.0)
    dense.grad = torch.ones(3)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(TypeError, match="parameter 1 of its group has a sparse gradient"):
        optimizer.step()
    assert torch.equal(dense.detach(), torch.ones(3))


def test_dtensor_and_fsdp_are_refused(tmp_path):
    """In a process of its own, for the process group."""
    script = f"""
        import torch, torch.distributed as dist
        from torch import nn
        from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import Replicate, distribute_tensor
        from ttt_fast.optim import FusedAdamW, FusedSGD

        dist.init_process_group("gloo", init_method="file://{tmp_path}/store", rank=0, world_size=1)

        def refused(make, word):
            try:
                make()
            except TypeError as error:
                assert word in str(error) and "not the global norm" in str(error), error
            else:
                raise AssertionError(f"{{word}} was accepted")

        mesh = init_device_mesh("cpu", (1,))
        sharded = nn.Parameter(distribute_tensor(torch.ones(4, 4), mesh, [Replicate()]))
        plain = nn.Linear(4, 4)
        refused(lambda: FusedSGD([("w", sharded)], lr=0.1), "'w' is a DTensor")
        refused(lambda: FusedAdamW([sharded]), "0 of its group is a DTensor")
        refused(lambda: FusedSGD(plain.parameters(), clip_params=[sharded]), "is a DTensor")

        late = nn.Linear(4, 4)
        optimizer = FusedSGD(late.parameters(), lr=0.1, max_grad_norm=1.0)
        late(torch.ones(1, 4)).sum().backward()
        optimizer.step()
        optimizer.param_groups[0]["params"] = [sharded]  # what Accelerate does for FSDP2
        sharded.sum().backward()
        refused(optimizer.step, "is a DTensor")

        two = fully_shard(nn.Linear(4, 4), mesh=mesh)
        refused(lambda: FusedSGD(two.parameters(), lr=0.1), "is a DTensor")
        for original in (False, True):
            one = FullyShardedDataParallel(
                nn.Linear(4, 4), device_id=torch.device("cpu"), use_orig_params=original
            )
            refused(lambda: FusedSGD(one.parameters(), lr=0.1), "is a FSDP shard")
        dist.destroy_process_group()
        print("refused")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True
    )
    assert done.stdout.strip() == "refused", done.stderr


# ---------------------------------------------------------------------------- state


def torch_optimizer(params, kind, **options):
    torch_class = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[kind]
    return torch_class(params, lr=0.1, foreach=True, **options)


@pytest.mark.parametrize("started", [False, True], ids=["before_the_first_step", "after_three"])
@pytest.mark.parametrize("to_ours", [False, True], ids=["to_torch", "to_ours"])
@both
def test_state_dict_goes_to_torch_and_back(kind, to_ours, started):
    options = dict(momentum=0.9, dampening=0.3) if kind == "sgd" else dict(betas=(0.8, 0.99))
    options |= dict(weight_decay=0.1)
    theirs, ours = make_params(torch.bfloat16), make_params(torch.bfloat16)
    source = torch_optimizer(theirs, kind, **options)
    run(theirs, source, 3 * started)

    # The other class is made with other options: the state brings them along.
    other = torch_optimizer(ours, kind)
    if to_ours:
        other = fused(ours, kind, rounding="torch")
    else:
        source_params = make_params(torch.bfloat16)
        first = fused(source_params, kind, lr=0.1, rounding="torch", **options)
        run(source_params, first, 3 * started)
        source_state = first.state_dict()
    state = copy.deepcopy(source.state_dict() if to_ours else source_state)
    stored = io.BytesIO()
    torch.save(state, stored)
    stored.seek(0)
    with torch.no_grad():
        for a, b in zip(ours, theirs, strict=True):
            a.copy_(b)
    other.load_state_dict(torch.load(stored, weights_only=True))
    if not to_ours:
        assert other.param_groups[0]["foreach"] is None  # ours says nothing about it
        other.param_groups[0]["foreach"] = True
    run(theirs, source, 4, first=3)
    run(ours, other, 4, first=3)
    assert_bitwise(ours, theirs)
    loaded, kept = other.state_dict(), source.state_dict()
    assert loaded["state"].keys() == kept["state"].keys()
    for key in kept["state"]:
        assert loaded["state"][key].keys() == kept["state"][key].keys()
        for name, value in kept["state"][key].items():
            assert torch.equal(loaded["state"][key][name], value)


@both
def test_options_of_our_own_survive_a_state_dict_of_torch(kind):
    params = make_params()
    optimizer = fused(params, kind, decoupled=True, rounding="stochastic")
    seed = optimizer.param_groups[0]["rounding_seed"]
    optimizer.load_state_dict(torch_optimizer(make_params(), kind).state_dict())
    assert optimizer.param_groups[0]["lr"] == 0.1
    assert optimizer.param_groups[0]["decoupled_weight_decay"] is True
    assert optimizer.param_groups[0]["rounding_seed"] == seed
    run(params, optimizer, 2)


def test_torchs_state_before_the_first_step_may_hold_none():
    params, plain = make_params(), make_params()
    optimizer = FusedSGD(params, lr=0.1, momentum=0.9, dampening=0.5)
    state = optimizer.state_dict()
    state["state"] = {i: dict(momentum_buffer=None) for i in range(len(params))}
    optimizer.load_state_dict(state)
    run(params, optimizer, 3)
    run(plain, FusedSGD(plain, lr=0.1, momentum=0.9, dampening=0.5), 3)
    assert_bitwise(params, plain)


@pytest.mark.parametrize("torch_options", [dict(fused=True), dict(capturable=True)], ids=str)
def test_state_of_torchs_fused_and_capturable_adamw(torch_options):
    theirs, ours = make_params(), make_params()
    source = torch.optim.AdamW(
        theirs, lr=0.1, **(dict(fused=True) if "fused" in torch_options else {})
    )
    run(theirs, source, 2)
    state = copy.deepcopy(source.state_dict())
    state["param_groups"][0] |= torch_options
    state["state"][0]["step"] = 2.0  # a number, as old versions of torch kept it
    with torch.no_grad():
        for a, b in zip(ours, theirs, strict=True):
            a.copy_(b)
    optimizer = FusedAdamW(ours)
    optimizer.load_state_dict(state)
    run(theirs, source, 2, first=2)
    run(ours, optimizer, 2, first=2)
    assert_ulps(ours, theirs, 8)
    for state in optimizer.state.values():
        assert torch.equal(state["step"], torch.tensor(4.0))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (lambda p: torch.optim.AdamW(p, amsgrad=True), "no amsgrad=True"),
        (lambda p: torch.optim.AdamW(p, differentiable=True), "no differentiable=True"),
        (lambda p: torch.optim.Adam(p, weight_decay=0.1), "torch.optim.Adam"),
    ],
)
def test_states_that_we_cannot_continue_are_refused(source, message):
    optimizer = FusedAdamW(make_params())
    before = optimizer.state_dict()
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(source(make_params()).state_dict())
    assert optimizer.state_dict() == before


@both
def test_wide_state_keeps_its_bits(kind):
    params = make_params(torch.bfloat16)
    options = dict(momentum=0.9) if kind == "sgd" else {}
    optimizer = fused(params, kind, state_dtype=torch.float32, **options)
    run(params, optimizer, 2)
    names = {"sgd": ["momentum_buffer"], "adamw": ["exp_avg", "exp_avg_sq"]}[kind]
    other = fused(copy.deepcopy(params), kind, state_dtype=torch.float32, **options)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for ours, theirs in zip(other.state.values(), optimizer.state.values(), strict=True):
        for name in names:
            assert theirs[name].dtype == torch.float32
            assert not torch.equal(theirs[name], theirs[name].bfloat16().float())
            assert torch.equal(ours[name], theirs[name])
    narrow = fused(params, kind, **options)
    run(params, narrow, 1)
    assert {narrow.state[p][name].dtype for p in params for name in names} == {torch.bfloat16}


def stochastic(params, seed=0):
    return FusedSGD(groups_of(params), lr=1e-4, rounding="stochastic", seed=seed)


def test_stochastic_rounding_is_seeded_and_resumes():
    whole, again, other, halves = (make_params(torch.bfloat16) for _ in range(4))
    run(whole, stochastic(whole), 6)
    run(again, stochastic(again), 6)
    run(other, stochastic(other, seed=1), 6)
    assert_bitwise(again, whole)
    assert not torch.equal(other[5], whole[5])
    optimizer = stochastic(halves)
    run(halves, optimizer, 3)
    resumed = stochastic(halves)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    run(halves, resumed, 3, first=3)
    assert_bitwise(halves, whole)


def test_stochastic_rounding_draws_anew_for_each_group_and_step():
    params = [nn.Parameter(torch.ones(4096, dtype=torch.bfloat16)) for _ in range(2)]
    optimizer = FusedSGD([dict(params=[p]) for p in params], lr=1.0, rounding="stochastic")
    results = []
    for _ in range(2):
        for param in params:
            with torch.no_grad():
                param.fill_(1.0)
            param.grad = torch.full_like(param, 2.0**-9)  # half of the distance to the next number
        optimizer.step()
        results += [param.detach().clone() for param in params]
    for a, b in itertools.combinations(results, 2):
        assert 0.4 < (a != b).float().mean() < 0.6


# ---------------------------------------------------------------------------- selections, snapshot


def test_whole_selections_are_parameters():
    model, plain = tiny_model("llama"), tiny_model("llama")
    selections = [Selection(name, param) for name, param in model.named_parameters()]
    optimizers = [FusedSGD(selections, lr=0.1, max_grad_norm=1.0)]
    optimizers.append(FusedSGD(plain.parameters(), lr=0.1, max_grad_norm=1.0))
    ids = torch.arange(9)[None]
    trained = [train(m, o, ids, 2) for m, o in zip((model, plain), optimizers, strict=True)]
    assert_bitwise(*trained)


ROWS = [
    RowSlice(dim=0, start=2, length=4, period=12),  # contiguous
    RowSlice(dim=1, start=3, length=3, period=9),
    RowSlice(dim=0, start=1, length=2, period=6),  # interleaved heads
]


@pytest.mark.parametrize("rows", ROWS, ids=str)
@both
def test_row_selections_update_and_count_only_their_rows(kind, rows):
    options = dict(momentum=0.9) if kind == "sgd" else {}
    fused_weight, other = make_params(shapes=[(12, 9), (5,)])
    part = nn.Parameter(rows.view(fused_weight.detach()).clone())
    other_twin = copy.deepcopy(other)
    before = fused_weight.detach().clone()
    selection = Selection("attn.qkv", fused_weight, rows)
    ours = fused([selection, Selection("bias", other)], kind, CLIP, **options)
    theirs = fused([part, other_twin], kind, CLIP, **options)
    for step in range(3):
        set_grads([fused_weight, other, other_twin], step)
        other_twin.grad = other.grad.clone()
        part.grad = rows.view(fused_weight.grad).clone()
        ours.step()
        theirs.step()
        assert torch.equal(ours.last_grad_norm, theirs.last_grad_norm)
    assert_ulps([selection.view(), other], [part, other_twin], 1)
    rest = torch.ones_like(before, dtype=torch.bool)
    rows.view(rest).fill_(False)
    assert torch.equal(fused_weight.detach()[rest], before[rest])
    names = ours._state_names
    assert all(ours.state[fused_weight][name].shape == part.shape for name in names)


def test_rows_of_a_parameter_whose_whole_gradient_counts():
    weight = nn.Parameter(torch.zeros(4, 1))
    rows = RowSlice(0, 0, 2, 4)
    optimizer = FusedSGD(
        [Selection("w", weight, rows)], lr=1.0, max_grad_norm=1.0, clip_params=[weight]
    )
    weight.grad = torch.ones(4, 1)
    optimizer.step()
    assert optimizer.last_grad_norm == 2.0
    torch.testing.assert_close(weight.detach(), torch.tensor([[-0.5], [-0.5], [0.0], [0.0]]))
    assert torch.equal(weight.grad, torch.ones(4, 1))


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
def test_a_parameter_that_is_listed_twice_is_refused():
    weight = nn.Parameter(torch.ones(4, 1))
    selections = [Selection("w", weight, RowSlice(0, start, 1, 4)) for start in (0, 2)]
    for params in (selections, [weight, weight], [("a", weight), ("b", weight)]):
        with pytest.raises(ValueError, match="listed twice"):
            FusedSGD(params)


@both
def test_an_undo_snapshot_is_fed(kind):
    params = make_params(torch.bfloat16)
    originals = [param.detach().clone() for param in params]
    snapshot = Snapshot(params, where="undo")
    options = dict(momentum=0.9) if kind == "sgd" else {}
    optimizer = fused(params, kind, CLIP, lr=0.1, snapshot=snapshot, **options)
    run(params, optimizer, 5, present=lambda step, i: step >= i)  # several calls of the op a step
    assert not torch.equal(params[3], originals[3])
    snapshot.restore()
    assert_bitwise(params, originals)
    assert copy.deepcopy(optimizer).snapshot is None


def test_a_snapshot_of_something_else_is_refused_before_anything_changes():
    params = make_params(torch.bfloat16)
    optimizer = FusedSGD(params, lr=0.1, snapshot=Snapshot(params[:-1], where="undo"))
    with pytest.raises(ValueError, match="not in the snapshot"):
        run(params, optimizer, 1)
    assert_bitwise(params, make_params(torch.bfloat16))


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
