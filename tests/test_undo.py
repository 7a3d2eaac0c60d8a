"""The undo log of a snapshot: what it holds and costs, and what it notices."""

import pytest
import torch

from tests.snapshot_cases import bits, same_bits, scramble, step
from tests.update_cases import backend_params
from ttt_fast import ops
from ttt_fast.reference import UNDO_CHUNK
from ttt_fast.snapshot import Snapshot


@pytest.fixture(scope="module", params=backend_params())
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


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
