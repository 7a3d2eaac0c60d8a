"""What a step costs: bytes by hand, and what must hold whatever the machine and the work."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ttt_fast.calibration import default_machine
from ttt_fast.engines import cost
from ttt_fast.engines.machine import Machine, is_smooth, smooth
from ttt_fast.engines.work import Layer, Workload


def test_memory_by_hand():
    layer = Layer(out=30, in_=20, adapted_out=30)
    work = Workload((layer, replace(layer, shares_input=True)), tokens=7, steps=3, deltas=2)
    assert cost.factored_bytes(work)["factors"] == 2 * 3 * 7 * 4 * (20 + 30 + 30)
    dense = cost.dense_bytes(work)
    weights = 2 * 600 * 4
    assert dense["snapshot"] == weights
    # Seven tokens in 30 x 20: the gradient stays factors. A hundred: it is formed.
    assert dense["gradients"] == 0
    assert cost.dense_bytes(replace(work, tokens=100))["gradients"] == weights
    assert cost.dense_bytes(replace(work, rounding="torch"))["gradients"] == weights
    assert dense["optimizer"] == dense["weights"] == 2 * weights
    plain = replace(work, deltas=1, momentum=False, dtype="bfloat16")
    assert cost.dense_bytes(plain)["optimizer"] == cost.dense_bytes(plain)["weights"] == 0
    assert cost.dense_bytes(plain)["snapshot"] == weights // 2
    adam = cost.dense_bytes(replace(plain, optimizer="adamw"))
    assert adam["optimizer"] == 2 * weights  # two moments in float32


def test_times_by_hand():
    machine = Machine(
        dtype="float32", source="by hand", copy_gb_s=4.0, update_gb_s=8.0, rows=(1,),
        product_ns=(2.0,), weight_gradient_ns=(3.0,), gram_ns=(5.0,), ranks=(1,),
        delta_slowdown=(2.5,), module_us=0.5, element_ns=7.0, logit_ns=11.0, dense_module_us=13.0,
        factored_module_us=17.0,
    )  # fmt: skip
    trained, frozen = Layer(30, 20, adapted_out=30), Layer(10, 20, differentiated=False)
    bias = Layer(6, kind="vector", adapted_out=6)
    work = Workload((trained, frozen, bias), tokens=2, steps=3, vocabulary=100, attention_width=9)

    def forward_ns(rows: int) -> float:
        # What no gradient crosses runs in one step of three.
        products = (600 + 200 / 3 + 600) * 2 * rows
        elements = 7 * rows * (50 + 30 / 3) + 11 * rows * 100 + 14 * rows * 2 * 9
        return products + (1 + 1 / 3) * 500 + elements

    assert 1e6 * cost.frozen_ms(work, machine) == pytest.approx(forward_ns(2))
    assert 1e6 * cost.frozen_ms(work, machine, rows=3) == pytest.approx(forward_ns(6))
    # Spans of 2 of 50 frozen tokens have 25 before them in the mean.
    spans = 1e6 * cost.frozen_ms(replace(work, context=50), machine)
    assert spans == pytest.approx(forward_ns(2) + 10 * 2 * 25 * 9)

    # The gradient written, then read twice; a third of two copies, read and written.
    shared = forward_ns(2) + 600 * (3 * 2 + 2 * 4 / 8) + 606 * 4 * 4 / 3 / 4 + 2 * 13_000
    for options, moved in (
        ({}, 2 * 4 + 2 * 4),
        ({"momentum": False}, 2 * 4),
        ({"accumulate_delta": True}, 2 * 4 + 2 * 4 + 3 * 4),
        ({"optimizer": "adamw"}, 2 * 4 + 4 * 4),
    ):
        dense = cost.dense_ms(replace(work, **options), machine)
        assert 1e6 * dense == pytest.approx(shared + 606 * moved / 8), options

    # Inputs and output gradients copied; Grams; ranks 2 and 4 in two of three steps.
    own = 2 * 2 * 50 * 4 / 4 + 2 * 50 * (5 * 2) + 2 * 50 * (2 + 4) * (2 * 2 * 2.5) / 3
    for D in (1, 4):
        factored = cost.factored_ms(replace(work, deltas=D), machine)
        assert 1e6 * factored == pytest.approx((forward_ns(2 * D) + 2 * 17_000) / D + own)
    pairs = cost.factored_ms(replace(work, deltas=4), machine, at_once=2)
    assert 1e6 * pairs == pytest.approx((forward_ns(4) + 2 * 17_000) / 2 + own)


# ---------------------------------------------------------------------------- what holds whatever


@st.composite
def machines(draw) -> Machine:
    speed = st.floats(1e-3, 1e3)
    rows, ranks = (1, 10, 100), (10, 100)

    def table() -> tuple[float, ...]:
        return smooth(rows, [draw(speed) for _ in rows])

    slow = draw(st.floats(0.1, 10))
    return Machine(
        dtype="float32", source="drawn", copy_gb_s=draw(speed), update_gb_s=draw(speed), rows=rows,
        product_ns=table(), weight_gradient_ns=table(), gram_ns=table(), ranks=ranks,
        delta_slowdown=(slow, slow * draw(st.floats(0.11, 2))), module_us=draw(speed),
        element_ns=draw(speed), logit_ns=draw(speed), dense_module_us=draw(speed),
        factored_module_us=draw(speed),
    )  # fmt: skip


layers = st.builds(
    lambda out, in_, kind, adapted, count: Layer(
        out, in_ if kind == "linear" else 1, kind, out * adapted, count=count
    ),
    out=st.integers(1, 2000), in_=st.integers(1, 2000), kind=st.sampled_from(["linear", "vector"]),
    adapted=st.booleans(), count=st.integers(1, 40),
)  # fmt: skip
workloads = st.builds(
    Workload,
    layers=st.lists(layers, min_size=1, max_size=4).map(tuple),
    tokens=st.integers(1, 300), steps=st.integers(1, 30), deltas=st.integers(1, 30),
    dtype=st.sampled_from(["float32", "bfloat16"]), momentum=st.booleans(),
    vocabulary=st.integers(1, 50000), attention_width=st.integers(0, 5000),
)  # fmt: skip


def advantage(work: Workload, machine: Machine) -> float:
    """How many times faster factored is."""
    return cost.dense_ms(work, machine) / cost.factored_ms(work, machine)


@given(workloads, machines(), st.integers(1, 30))
def test_more_steps_never_make_factored_relatively_cheaper(work, machine, more):
    longer = replace(work, steps=work.steps + more)
    assert advantage(longer, machine) <= advantage(work, machine) * (1 + 1e-9)


@given(workloads, machines(), st.integers(1, 30))
def test_more_deltas_never_make_dense_relatively_cheaper(work, machine, more):
    wider = replace(work, deltas=work.deltas + more)
    assert advantage(wider, machine) >= advantage(work, machine) * (1 - 1e-9)


@given(workloads, machines(), st.integers(1, 30))
def test_bytes_and_times_are_positive_and_grow(work, machine, more):
    grown = replace(work, steps=work.steps + more, tokens=work.tokens + more)
    for size in (cost.dense_bytes, cost.factored_bytes):
        assert 0 <= sum(size(work).values()) <= sum(size(grown).values())
    assert 0 < cost.factored_ms(work, machine) <= cost.factored_ms(grown, machine) * (1 + 1e-9)
    assert cost.dense_ms(work, machine) > 0


@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=6))
def test_smooth_times_are_accepted_and_stay(times):
    rows = [3**i for i in range(len(times))]
    smoothed = smooth(rows, times)
    assert is_smooth(rows, smoothed)
    assert smoothed[-1] == times[-1]


# ---------------------------------------------------------------------------- what cannot be


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"copy_gb_s": 0.0}, "copy_gb_s"),
        ({"module_us": float("nan")}, "module_us"),
        ({"logit_ns": "3"}, "logit_ns"),
        ({"product_ns": (1.0, 2.0)}, "product_ns"),
        ({"product_ns": (1.0, 1.0, 1.0, 1.0, 1.0, 0.5)}, "product_ns"),
        ({"gram_ns": (1.0, 1.0, 1.0, 1.0, 1.0, 5.0)}, "gram_ns"),
        ({"delta_slowdown": (1.0,)}, "delta_slowdown"),
        ({"delta_slowdown": (8.0, 1.0, 1.0)}, "delta_slowdown"),
    ],
)
def test_a_machine_that_cannot_be(changes, match):
    with pytest.raises(ValueError, match=match):
        replace(default_machine("float32"), **changes)


@pytest.mark.parametrize("changes", [{"tokens": 0}, {"steps": -1}, {"deltas": 0}])
def test_a_workload_that_cannot_be(changes):
    with pytest.raises(ValueError, match="Workload"):
        replace(Workload((), tokens=1, steps=1), **changes)
