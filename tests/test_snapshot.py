"""Snapshot: bit for bit back, in the same memory."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from tests.snapshot_cases import (
    DTYPES,
    FLOATS,
    WHERE,
    bits,
    random_bits,
    same_bits,
    scramble,
    step,
    weights,
)
from tests.update_cases import backend_params
from ttt_fast import ops
from ttt_fast.selection import RowSlice, Selection
from ttt_fast.snapshot import Snapshot


@pytest.fixture(scope="module", params=backend_params())
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


# ---------------------------------------------------------------------------- bitwise


@pytest.mark.parametrize("where", ["device", "host"])
def test_any_bits_of_any_dtype_come_back(where: str, backend: str) -> None:
    params = [random_bits((n,), dtype, n) for dtype in DTYPES for n in (1, 7, 4097)]
    expected = [bits(p) for p in params]
    snapshot = Snapshot(params, where, backend=backend)
    assert snapshot.verify()
    scramble(params)
    assert not snapshot.verify()
    assert not any(torch.equal(bits(p), e) for p, e in zip(params, expected, strict=True))
    snapshot.restore()
    assert same_bits(params, expected)
    assert snapshot.verify()


@pytest.mark.parametrize("where", ["device", "host"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_special_values_come_back(where: str, dtype: torch.dtype, backend: str) -> None:
    tiny = torch.finfo(dtype).smallest_normal
    values = torch.tensor(
        [-0.0, 0.0, tiny / 2, -tiny / 4, float("inf"), float("nan")], dtype=torch.float64
    )
    param = values.to(dtype)
    payload = bits(param)
    payload[-1] += 1  # another NaN than the default one
    param = payload.view(dtype)
    assert param[2] != 0 and param.isnan().sum() == 1
    expected = bits(param)
    snapshot = Snapshot([param], where, backend=backend)
    param.zero_()
    snapshot.restore()
    assert same_bits([param], [expected])


@st.composite
def memory_views(draw: st.DrawFn) -> Tensor:
    """A tensor that is a view with an offset, steps, swapped dimensions, or row slices."""
    shape = draw(st.lists(st.integers(0, 9), min_size=1, max_size=3))
    dtype = draw(st.sampled_from(DTYPES))
    view = random_bits(shape, dtype, draw(st.integers(0, 1000)))
    if draw(st.booleans()):
        view = view.transpose(0, -1)
    dim = draw(st.integers(0, view.ndim - 1))
    start = draw(st.integers(0, view.shape[dim]))
    view = view.narrow(dim, start, draw(st.integers(0, view.shape[dim] - start)))
    every = [slice(None)] * dim + [slice(None, None, draw(st.integers(1, 3)))]
    return view[tuple(every)]


@settings(deadline=None, max_examples=40)
@given(views=st.lists(memory_views(), max_size=6), where=st.sampled_from(["device", "host"]))
def test_views_come_back_and_nothing_beside_them_is_written(
    backend: str, views: list[Tensor], where: str
) -> None:
    storages = [torch.empty(0, dtype=torch.uint8).set_(v.untyped_storage()) for v in views]
    scrambled = [~bits(storage) for storage in storages]
    expected = [bits(v) for v in views]
    snapshot = Snapshot(views, where, backend=backend)
    scramble(storages)
    snapshot.restore()
    assert same_bits(views, expected)
    scramble(views)
    assert same_bits(storages, scrambled)


@settings(deadline=None, max_examples=25)
@given(
    shapes=st.lists(st.lists(st.integers(0, 12), min_size=1, max_size=3), min_size=1, max_size=5),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    where=st.sampled_from(WHERE),
    lrs=st.lists(st.sampled_from([0.0, 1e-6, 1e-3, 0.1, 1e30]), max_size=4),
)
def test_weights_come_back_after_sgd_steps(
    backend: str, shapes: list[list[int]], dtype: torch.dtype, where: str, lrs: list[float]
) -> None:
    params = [torch.randn(shape).to(dtype) for shape in shapes]
    expected = [bits(p) for p in params]
    with Snapshot(params, where, backend=backend) as snapshot:
        for seed, lr in enumerate(lrs):
            step(snapshot, lr, seed, backend)
    assert same_bits(params, expected)


@pytest.mark.parametrize("where", WHERE)
def test_200_prompts_in_a_row(where: str, backend: str) -> None:
    params = [nn.Parameter(weight) for weight in [*weights()[:3], torch.randn(5)]]
    expected = [bits(p) for p in params]
    snapshot = Snapshot(params, where, backend=backend)
    for prompt in range(200):
        snapshot.take()
        step(snapshot, 0.1, prompt, backend)
        assert not same_bits(params, expected)
        snapshot.restore()
        assert same_bits(params, expected)
        assert snapshot.verify()


def test_take_keeps_the_new_weights(backend: str) -> None:
    for where in WHERE:
        params = weights()
        snapshot = Snapshot(params, where, backend=backend)
        step(snapshot, 0.1, 0, backend)
        snapshot.take()
        expected = [bits(p) for p in params]
        step(snapshot, 0.1, 1, backend)
        snapshot.restore()
        assert same_bits(params, expected)


@pytest.mark.parametrize("where", WHERE)
def test_restore_is_idempotent_and_later_steps_are_restored_too(where: str, backend: str) -> None:
    params = weights()
    expected = [bits(p) for p in params]
    snapshot = Snapshot(params, where, backend=backend)
    for seed in range(3):
        step(snapshot, 0.01, seed, backend)
        snapshot.restore()
        snapshot.restore()
        assert same_bits(params, expected)


def test_restore_after_an_interrupted_one(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    params = [*weights(), torch.randn(9)]
    expected = [bits(p) for p in params]
    snapshot = Snapshot(params, "undo", backend=backend)
    step(snapshot, 0.1, 0, backend)

    def interrupted(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ops, "undo_restore_", interrupted)
        with pytest.raises(KeyboardInterrupt):
            snapshot.restore()
    assert not same_bits(params, expected)
    snapshot.restore()
    assert same_bits(params, expected)


def test_restore_after_an_interrupted_take_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    param = torch.randn(3)
    snapshot = Snapshot([param])

    def interrupted(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ops, "copy_", interrupted)
        with pytest.raises(KeyboardInterrupt):
            snapshot.take()
    before = bits(param)
    with pytest.raises(RuntimeError, match=r"last take\(\) did not finish"):
        snapshot.restore()
    assert same_bits([param], [before])
    snapshot.take()
    snapshot.restore()


# ---------------------------------------------------------------------------- memory


@pytest.mark.parametrize("where", ["device", "host"])
def test_nothing_is_allocated_after_the_first_take(where: str, backend: str) -> None:
    params = [torch.randn(1000), torch.randn(64, 33).to(torch.bfloat16), torch.randn(40, 40).t()]

    def allocations(action: Callable[[], object]) -> int:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            action()
        return sum(event.name == "[memory]" for event in profiler.events())

    snapshot = Snapshot(params, where, backend=backend)
    addresses = [copy.data_ptr() for copy in snapshot.originals]
    assert allocations(lambda: params[0].clone()) > 0  # the measure does see one
    assert allocations(snapshot.take) == 0
    assert allocations(snapshot.restore) == 0
    assert [copy.data_ptr() for copy in snapshot.originals] == addresses


@pytest.mark.parametrize("where", WHERE)
def test_the_memory_of_a_snapshot_never_moves(where: str, backend: str) -> None:
    snapshot = Snapshot([*weights(), torch.randn(5)], where, backend=backend)

    def addresses() -> list[int]:
        logs = snapshot.undo.tensors if snapshot.undo else []
        copies = [copy for copy in snapshot.originals if copy is not None]
        return [tensor.data_ptr() for tensor in [*copies, *logs]]

    before = addresses()
    for seed in range(3):
        step(snapshot, 0.1, seed, backend)
        snapshot.restore()
        snapshot.take()
    assert addresses() == before


def test_copies_are_in_one_buffer_per_dtype_each_on_a_cache_line() -> None:
    params = [torch.zeros(n).to(dtype) for n in (3, 17, 0, 5) for dtype in FLOATS]
    snapshot = Snapshot(params)
    copies = snapshot.originals
    assert all(copy.data_ptr() % 64 == 0 for copy in copies if copy.numel() > 0)
    storages = {(c.dtype, c.untyped_storage().data_ptr()) for c in copies}
    assert len(storages) == len(FLOATS)
    # Lines for 3, 17 and 5 elements; a line holds 16 float32, 32 of 16 bits, 8 float64.
    assert snapshot.nbytes == 64 * ((1 + 2 + 1) + 2 * (1 + 1 + 1) + (1 + 3 + 1))


def test_each_device_has_its_own_buffers_and_log(monkeypatch: pytest.MonkeyPatch) -> None:
    """The grouping only: tensors without values stand in for a second device."""
    monkeypatch.setattr("ttt_fast.snapshot._obstacle", lambda tensor: None)
    monkeypatch.setattr(Snapshot, "take", lambda self: None)
    params = [
        torch.zeros(3, dtype=torch.bfloat16, device="cpu"),
        torch.zeros(3, dtype=torch.bfloat16, device="meta"),
        torch.zeros(4, dtype=torch.float32, device="cpu"),
    ]
    undo = Snapshot(params, "undo")
    with pytest.raises(ValueError, match="logged on cpu, meta; update one device at a time"):
        _ = undo.undo
    assert undo.undo_log([2, 0]).offsets == [-1, 0]
    assert undo.undo_log([0]).tensors[0].device.type == "cpu"
    assert undo.undo_log([1]).tensors[0].device.type == "meta"
    for where, devices in (("device", ["cpu", "meta", "cpu"]), ("host", ["cpu"] * 3)):
        copies = Snapshot(params, where).originals
        assert [copy.device.type for copy in copies] == devices


# ---------------------------------------------------------------------------- what it accepts


class Tied(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4, dtype=dtype)
        self.head = nn.Linear(4, 7, bias=True, dtype=dtype)
        self.head.weight = self.embed.weight
        self.register_buffer("count", torch.zeros(3, dtype=torch.int8))


@pytest.mark.parametrize("where", WHERE)
def test_module_with_tied_weights(where: str, backend: str) -> None:
    model = Tied(torch.bfloat16)
    expected = [bits(p) for p in model.parameters()]
    snapshot = Snapshot(model, where, backend=backend)
    assert snapshot.names == ["embed.weight", "head.bias"]
    step(snapshot, 0.5, 0, backend)
    snapshot.restore()
    assert same_bits(list(model.parameters()), expected)
    assert model.head.weight is model.embed.weight


@pytest.mark.parametrize("where", WHERE)
def test_a_weight_listed_twice_is_kept_once(where: str, backend: str) -> None:
    param = torch.randn(4097).to(torch.bfloat16)
    expected = [bits(param)]
    once = Snapshot([param], where, backend=backend)
    twice = Snapshot([param, param, param.view(4097)], where, backend=backend)
    assert twice.nbytes == once.nbytes
    # Updates through each of the three go to one log; small ones, so that no run is kept whole.
    for seed in range(3):
        step(twice, 1e-4, seed, backend)
    assert not torch.equal(bits(param), expected[0])
    twice.restore()
    assert same_bits([param], expected)


@pytest.mark.parametrize("where", WHERE)
def test_overlapping_views_come_back_and_are_not_logged(where: str, backend: str) -> None:
    inside, partly, apart = (torch.randn(10, 6).to(torch.bfloat16) for _ in range(3))
    expected = [bits(inside), bits(partly), bits(apart)]
    views = [inside.t(), inside[1:2], inside[4:6], partly[:5], partly[3:], apart[:3], apart[3:]]
    snapshot = Snapshot(views, where, backend=backend)
    for seed in range(3):
        step(snapshot, 0.1, seed, backend)
    snapshot.restore()
    assert same_bits([inside, partly, apart], expected)
    if where == "undo":
        logged = [offset >= 0 for offset in snapshot.undo.offsets]
        assert logged == [False] * 5 + [True] * 2


@pytest.mark.parametrize("where", WHERE)
def test_selections_with_rows(where: str, backend: str) -> None:
    model = nn.Linear(5, 12).to(torch.bfloat16)
    rows = RowSlice(dim=0, start=2, length=2, period=6)  # rows 2, 3, 8, 9
    selections = [Selection(n, p, rows) for n, p in model.named_parameters()]
    expected = [bits(p) for p in model.parameters()]
    snapshot = Snapshot(selections, where, module=model, backend=backend)
    assert snapshot.names == ["weight", "bias"]
    assert [tuple(view.shape) for view in snapshot.views] == [(2, 2, 5), (2, 2)]
    step(snapshot, 0.5, 0, backend)
    changed = (bits(model.weight) != expected[0]).any(1)
    assert changed.nonzero().flatten().tolist() == [2, 3, 8, 9]
    snapshot.restore()
    assert same_bits(list(model.parameters()), expected)


def test_names_of_tensors_pairs_and_mappings() -> None:
    a, b = torch.randn(2), torch.randn(3)
    assert Snapshot([a, b]).names == ["param 0", "param 1"]
    assert Snapshot({"a": a, "b": b}).names == ["a", "b"]
    model = nn.Linear(2, 3)
    assert Snapshot(model.named_parameters()).names == ["weight", "bias"]
    assert Snapshot(iter([a])).names == ["param 0"]


def test_nothing_to_keep() -> None:
    for where in WHERE:
        with Snapshot([], where) as snapshot:
            assert snapshot.nbytes == 0
            assert snapshot.verify()
            assert snapshot.undo is None
        assert "0 tensors kept whole" in snapshot.describe()


def test_context_manager_restores_when_the_body_raises(backend: str) -> None:
    for where in WHERE:
        params = weights()
        expected = [bits(p) for p in params]
        for error in (ValueError, KeyboardInterrupt):
            with pytest.raises(error):
                with Snapshot(params, where, backend=backend) as snapshot:
                    step(snapshot, 0.1, 0, backend)
                    raise error
            assert same_bits(params, expected)


@pytest.mark.parametrize("where", WHERE)
def test_autograd_sees_the_restore_and_parameters_stay_themselves(where: str, backend: str) -> None:
    param = nn.Parameter(torch.randn(4).to(torch.bfloat16))
    optimizer = torch.optim.SGD([param], lr=0.1)
    snapshot = Snapshot([param], where, backend=backend)
    saved = (param * param).sum()
    version = param._version
    snapshot.restore()
    assert param._version > version
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        saved.backward()
    assert param.requires_grad and param.is_leaf
    assert optimizer.param_groups[0]["params"][0] is param


def test_inference_mode_on_either_side(backend: str) -> None:
    for where in WHERE:
        params = weights()
        expected = [bits(p) for p in params]
        with torch.inference_mode():
            snapshot = Snapshot(params, where, backend=backend)
        step(snapshot, 0.1, 0, backend)
        snapshot.restore()
        assert same_bits(params, expected)
        snapshot.take()
        step(snapshot, 0.1, 0, backend)
        with torch.inference_mode():
            snapshot.restore()
        assert same_bits(params, expected)
