"""FusedSGD and FusedAdamW against torch's optimizers with clip_grad_norm_ before them."""

import copy
import math
import pickle
import subprocess
import sys
import textwrap

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.families import tiny_model
from tests.optim_cases import (
    CLIP,
    GRID,
    STEPS,
    TorchLoop,
    assert_bitwise,
    assert_ulps,
    both,
    clips,
    fused,
    grid,
    groups_of,
    make_params,
    pair,
    run,
    set_grads,
    train,
)
from ttt_fast.optim import FusedAdamW, FusedSGD

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
