"""Snapshot: bit for bit back, in the same memory, or an error that names the parameter."""

import dataclasses
import re
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from ttt_fast import ops
from ttt_fast.backend import available_backends, backends_on
from ttt_fast.reference import UNDO_CHUNK
from ttt_fast.scope import RowSlice, Selection
from ttt_fast.snapshot import Snapshot

WHERE = ("device", "host", "undo")
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
DTYPES = (*FLOATS, torch.int8, torch.uint8, torch.int16, torch.int64, torch.float8_e4m3fn)
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(name, marks=pytest.mark.skipif(status != "ok", reason=f"{name}: {status}"))
        for name, status in available_backends().items()
        if name in backends_on("cpu")
    ],
)
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


def bits(tensor: Tensor) -> Tensor:
    """The elements as integers, in memory of their own: == on them compares bits."""
    return tensor.detach().clone().view(INTEGERS[tensor.element_size()])


def same_bits(tensors: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    return all(torch.equal(bits(t), e) for t, e in zip(tensors, expected, strict=True))


def random_bits(shape: Sequence[int], dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Any bit pattern: NaN payloads, infinities, -0.0 and denormals included."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.empty((), dtype=dtype).element_size()
    raw = torch.randint(0, 256, (*shape, size), dtype=torch.uint8, generator=generator)
    return raw.view(dtype).view(tuple(shape))


def scramble(tensors: Sequence[Tensor]) -> None:
    """Change every bit, by something that does not log."""
    for tensor in tensors:
        integers = tensor.detach().view(INTEGERS[tensor.element_size()])
        integers.copy_(~integers)


def step(snapshot: Snapshot, lr: float, seed: int, backend: str) -> None:
    """One SGD step on all weights, logged where the snapshot logs."""
    generator = torch.Generator().manual_seed(seed)
    grads = [torch.randn(view.shape, generator=generator).to(view.dtype) for view in snapshot.views]
    ops.sgd_(snapshot.views, grads, lr=lr, undo=snapshot.undo, backend=backend)


def weights(dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    """Odd sizes, more than one run of an undo log, one strided and one empty tensor."""
    generator = torch.Generator().manual_seed(1)
    strided = torch.randn(6, 70, generator=generator).to(dtype).t()
    shapes = [(1,), (7, 13), (4097,), (2, UNDO_CHUNK + 5), (0, 3)]
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes] + [strided]


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


def test_undo_of_small_steps_is_far_below_a_copy_and_says_so(backend: str) -> None:
    params = [torch.randn(4 * UNDO_CHUNK).to(torch.bfloat16)]
    full = Snapshot(params, "device", backend=backend).nbytes
    snapshot = Snapshot(params, "undo", backend=backend)
    expected = [bits(p) for p in params]
    for seed in range(10):
        step(snapshot, 1e-5, seed, backend)
    n_changed = int((bits(params[0]) != expected[0]).sum())
    assert n_changed > 0
    assert 6 * n_changed <= snapshot.nbytes < full / 10
    assert "1 tensors logged" in snapshot.describe()
    assert "0 of 4 runs kept whole" in snapshot.describe()
    assert f"a full copy takes {full} bytes" in snapshot.describe()
    snapshot.restore()
    assert same_bits(params, expected)
    snapshot.take()
    assert snapshot.nbytes < 100


def test_undo_of_large_steps_falls_over_to_whole_runs_and_says_so(backend: str) -> None:
    params = [torch.randn(4 * UNDO_CHUNK).to(torch.float16), torch.randn(10).to(torch.float16)]
    snapshot = Snapshot(params, "undo", backend=backend)
    expected = [bits(p) for p in params]
    for seed in range(5):
        step(snapshot, 0.5, seed, backend)
    assert "5 of 5 runs kept whole" in snapshot.describe()
    full = sum(p.nbytes for p in params)
    assert full <= snapshot.nbytes < 1.01 * full
    snapshot.restore()
    assert same_bits(params, expected)


def test_undo_at_middling_steps_costs_at_most_two_copies(backend: str) -> None:
    params = [torch.randn(UNDO_CHUNK + 77).to(torch.bfloat16)]
    snapshot = Snapshot(params, "undo", backend=backend)
    expected = [bits(p) for p in params]
    for seed in range(60):
        step(snapshot, 1e-3, seed, backend)
    assert snapshot.nbytes <= 2 * params[0].nbytes + 100
    snapshot.restore()
    assert same_bits(params, expected)


def test_undo_without_16_bit_weights_is_a_copy_and_says_so(
    backend: str, recwarn: pytest.WarningsRecorder
) -> None:
    params = [torch.randn(3), torch.arange(5, dtype=torch.int16)]  # int16: 16 bits but no float
    expected = [bits(p) for p in params]
    snapshot = Snapshot(params, "undo", backend=backend)
    assert snapshot.undo is None
    assert snapshot.describe() == "undo: no 16-bit weights to log; 2 tensors kept whole, 128 bytes"
    assert snapshot.nbytes == 128
    scramble(params)
    snapshot.restore()
    assert same_bits(params, expected)
    assert not recwarn.list


def test_undo_of_mixed_dtypes_logs_some_and_copies_others(backend: str) -> None:
    params = [torch.randn(5), torch.randn(6).to(torch.bfloat16), torch.randn(7).double()]
    snapshot = Snapshot(params, "undo", backend=backend)
    assert [copy is None for copy in snapshot.originals] == [False, True, False]
    assert snapshot.undo.offsets == [-1, 0, -1]
    assert "1 tensors logged" in snapshot.describe()
    assert "2 tensors kept whole" in snapshot.describe()


def test_undo_log_of_some_entries(backend: str) -> None:
    params = [torch.randn(n).to(torch.bfloat16) for n in (5, 6, 7)] + [torch.randn(8)]
    expected = [bits(p) for p in params]
    snapshot = Snapshot(params, "undo", backend=backend)
    for group in ([2, 0], [3, 1]):
        views = [snapshot.views[i] for i in group]
        grads = [torch.ones_like(view) for view in views]
        log = snapshot.undo_log(group)
        assert log.tensors is snapshot.undo.tensors
        ops.sgd_(views, grads, lr=0.1, undo=log, backend=backend)
    assert snapshot.undo_log([3]) is None
    assert not any(torch.equal(bits(p), e) for p, e in zip(params, expected, strict=True))
    snapshot.restore()
    assert same_bits(params, expected)


@pytest.mark.parametrize("lr", [0.0, 1e-3])
def test_undo_detects_what_did_not_log(lr: float, backend: str) -> None:
    params = {name: torch.randn(4097).to(torch.bfloat16) for name in "ab"}
    expected = [bits(p) for p in params.values()]
    snapshot = Snapshot(params, "undo", backend=backend)
    step(snapshot, lr, 0, backend)
    unlogged = int((bits(params["b"]) == expected[1]).nonzero()[0])
    params["b"][unlogged] += 1
    assert not snapshot.verify()
    message = r"1 weights did not come back \(b, .*does not log to this snapshot; give undo="
    with pytest.raises(RuntimeError, match=message):
        snapshot.restore()
    assert same_bits([params["a"]], expected[:1])
    assert (bits(params["b"]) != expected[1]).sum() == 1


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


# ---------------------------------------------------------------------------- what it refuses


def _cast(model: nn.Module) -> None:
    model[1].half()


def _moved(model: nn.Module) -> None:
    model[1].weight.data = model[1].weight.data.clone()


def _transposed(model: nn.Module) -> None:
    model[1].weight.data = model[1].weight.data.t()


def _resized(model: nn.Module) -> None:
    model[1].weight.data = model[1].weight.data[:2, :2]  # at the same address


def _freed(model: nn.Module) -> None:
    model[1].weight.untyped_storage().resize_(0)


def _to_meta(model: nn.Module) -> None:
    model[1].to("meta")


def _replaced(model: nn.Module) -> None:
    model[1].weight = nn.Parameter(model[1].weight.detach())


def _deleted(model: nn.Module) -> None:
    del model[1].weight


def _retied(model: nn.Module) -> None:
    model[2].weight = nn.Parameter(model[2].weight.detach().clone())


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize(
    ("change", "name", "now"),
    [
        (_cast, "1.weight", "is float16 (3, 3)"),
        (_moved, "1.weight", "is float32 (3, 3)"),
        (_transposed, "1.weight", "strides (1, 3)"),
        (_resized, "1.weight", "is float32 (2, 2)"),
        (_freed, "1.weight", "address 0x0"),
        (_to_meta, "1.weight", "is another tensor"),
        (_replaced, "1.weight", "is another tensor"),
        (_deleted, "1.weight", "is gone"),
        (_retied, "2.weight", "is another tensor"),
    ],
)
def test_changed_parameters_are_named_and_nothing_is_written(
    where: str, change: Callable[[nn.Module], None], name: str, now: str
) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3, bias=False), nn.Linear(3, 3))
    model[2].weight = model[0].weight
    snapshot = Snapshot(model, where)
    assert snapshot.verify()
    first, last = model[0].weight, model[2].bias
    scramble([first, last])
    expected = [bits(first), bits(last)]
    kept = [bits(copy) for copy in snapshot.originals]
    change(model)
    for action in (snapshot.restore, snapshot.take, snapshot.verify):
        message = f"Snapshot.{action.__name__}: {name} was float32 (3, 3) "
        with pytest.raises(RuntimeError, match=re.escape(message)) as error:
            action()
        assert now in str(error.value)
        assert "Nothing was written; bring it back or make a new Snapshot" in str(error.value)
    assert same_bits([first, last], expected)
    assert same_bits(snapshot.originals, kept)


def test_a_parameter_that_is_brought_back_can_be_restored() -> None:
    model = nn.Linear(3, 3)
    expected = [bits(p) for p in model.parameters()]
    snapshot = Snapshot(model)
    weight = model.weight
    scramble([weight])
    model.weight = nn.Parameter(torch.zeros(3, 3))
    with pytest.raises(RuntimeError, match="weight was float32"):
        snapshot.restore()
    model.weight = weight
    snapshot.restore()
    assert same_bits(list(model.parameters()), expected)


def test_replacement_is_noticed_for_a_list_when_the_module_is_given() -> None:
    model = nn.Linear(3, 3)
    snapshot = Snapshot([model.weight], module=model)
    model.weight = nn.Parameter(torch.zeros(3, 3))
    with pytest.raises(RuntimeError, match="weight was float32"):
        snapshot.restore()


def _inference_tensor() -> Tensor:
    with torch.inference_mode():
        return torch.zeros(2)


@dataclasses.dataclass
class NotATensor:
    param: int = 3


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: torch.empty(2, device="meta"), "b is on the meta device and has no values"),
        (lambda: torch.eye(2).to_sparse(), r"b is not dense \(torch.sparse_coo\)"),
        (lambda: torch.zeros(2, dtype=torch.complex64), "b is torch.complex64; pass torch.view_as"),
        (_inference_tensor, "b is an inference tensor; load the model outside"),
        (lambda: torch.zeros(1).expand(2), "b is expanded, one element stands for many"),
        (lambda: nn.LazyLinear(2).weight, "b is not initialised yet; run the model once"),
        (
            lambda: torch.quantize_per_tensor(torch.ones(2), 1.0, 0, torch.qint8),
            r"b is quantised \(torch.qint8\)",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_tensors_that_cannot_be_kept_are_named(make: Callable[[], Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=f"Snapshot: {message}"):
        Snapshot({"a": torch.zeros(2), "b": make()})


def test_a_tensor_without_memory_is_named() -> None:
    param = torch.ones(3)
    param.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match=r"param 1 has no memory of its own \(Tensor\)"):
        Snapshot([torch.ones(2), param])


def test_arguments_that_are_not_understood() -> None:
    with pytest.raises(ValueError, match="where='disk' is unknown; use one of 'device', 'host'"):
        Snapshot([torch.zeros(2)], "disk")
    with pytest.raises(TypeError, match="params is a single tensor"):
        Snapshot(torch.zeros(2))
    with pytest.raises(TypeError, match="param 1 is a int; pass tensors"):
        Snapshot([torch.zeros(2), 3])
    with pytest.raises(TypeError, match="param 0 is a int; pass tensors"):
        Snapshot([NotATensor()])
    with pytest.raises(ValueError, match="backend='vulkan' is unknown"):
        Snapshot([torch.zeros(2)], backend="vulkan")
