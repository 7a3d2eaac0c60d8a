"""State of the fused optimizers: round trips with torch's, selections, the undo log."""

import copy
import io
import itertools

import pytest
import torch
from torch import nn

from tests.families import tiny_model
from tests.optim_cases import (
    CLIP,
    assert_bitwise,
    assert_ulps,
    both,
    fused,
    groups_of,
    make_params,
    run,
    set_grads,
    torch_optimizer,
    train,
)
from ttt_fast.optim import FusedAdamW, FusedSGD
from ttt_fast.selection import RowSlice, Selection
from ttt_fast.snapshot import Snapshot

# ---------------------------------------------------------------------------- state


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
