"""Computed times of GPUs: from bytes and operations, labelled, and never below either."""

from dataclasses import replace

import pytest

from bench import cases, gpu_floors
from bench.cases import Case
from bench.gpu_floors import GPUS, Gpu, floors_ms, memory_bytes
from bench.shapes import MODELS, parameter_count

ROUND = Gpu("round numbers", tflops=100.0, gb_s=1000.0, memory_gb=80)


@pytest.fixture(scope="module")
def work():
    return cases.workload(Case(4, 3, 1, dtype="bfloat16", model="Qwen2.5-0.5B"))


def test_few_tokens_are_bound_by_bytes_and_many_by_operations():
    machine = ROUND.machine()
    # 2 bytes at 1000 GB/s are 2 ps; 2 operations at 100 Tflop/s are 20 fs: equal at 100 rows.
    assert machine.product(1) == machine.product(100) == pytest.approx(2e-3)
    assert machine.product(500) == pytest.approx(1e-2)
    assert machine.product(5000) == pytest.approx(1e-1)
    assert machine.delta_product(1, 50) == machine.product(1)


def test_a_step_reads_its_weights_twice(work):
    matrices = [s for s in MODELS["Qwen2.5-0.5B"].parameter_shapes() if len(s) == 2]
    weights = sum(out * width for out, width in matrices)  # the embedding as the head
    ms = floors_ms(ROUND, work)["products alone"]
    assert ms >= 1e3 * 2 * 2 * weights / 1e12
    assert ms == pytest.approx(1e3 * 2 * 2 * weights / 1e12, rel=0.02)


def test_an_update_moves_its_passes(work):
    floors, numel = floors_ms(ROUND, work), parameter_count("Qwen2.5-0.5B")
    passes = 1e3 * 2 * numel / 1e12
    # 11 passes of foreach, 8 of fused, 6 of ours.
    assert floors["torch foreach"] - floors["dense"] == pytest.approx(5 * passes, rel=1e-3)
    assert floors["torch fused"] - floors["dense"] == pytest.approx(2 * passes, rel=1e-3)
    # The gradient written, the update, and a snapshot there and back over three steps.
    expected = floors["products alone"] + (1 + 6 + 4 / 3) * passes
    assert floors["dense"] == pytest.approx(expected, rel=0.02)


def test_prompts_that_go_together_share_the_weights(work):
    many = floors_ms(ROUND, replace(work, deltas=16))
    alone = floors_ms(ROUND, work)
    assert many["factored"] < alone["factored"] / 4
    assert many["dense"] == alone["dense"]


def test_what_does_not_fit_is_said(work):
    needed = memory_bytes(work)
    weights = 2 * parameter_count("Qwen2.5-0.5B")
    assert needed["products alone"] == weights
    # Weights, gradients, momentum, snapshot.
    assert needed["torch fused"] == pytest.approx(4 * weights, rel=0.02)
    small = replace(ROUND, memory_gb=2)
    cells = dict(zip(gpu_floors.COLUMNS, gpu_floors._cells(small, work), strict=True))
    assert cells["torch fused"] == "no memory" and cells["factored"] != "no memory"


def test_a_faster_card_is_never_slower(work):
    for faster, slower in [("H200", "H100"), ("H100", "A100")]:
        by_name = {gpu.name: gpu for gpu in GPUS}
        high, low = (floors_ms(by_name[name], work) for name in (faster, slower))
        assert all(high[name] <= low[name] for name in high)


def test_every_table_is_labelled():
    parts = gpu_floors.table().split("\n\n")
    assert len([part for part in parts if "computed, not measured" in part]) == 3
    for gpu in GPUS:
        assert gpu_floors.LABEL in gpu.machine().source
