"""A step by part: parts add up, each is what it says, and floors are what is counted by hand."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.nn.utils import clip_grad_norm_
from torch.utils.flop_counter import FlopCounterMode

from bench import bench_parts, compare, part_table, parts, report
from bench.cases import Case
from tests.families import tiny_model
from ttt_fast import TTTConfig, TTTTrainer
from ttt_fast.engines import policy
from ttt_fast.engines.cost import Layer, Workload

# Fewer tokens than any width of the model.
CASE = Case(7, 3, 2, "ffn")
T, K, D = CASE.T, CASE.K, CASE.D


@pytest.fixture(scope="module")
def prompts():
    return torch.randint(3, 90, (D, T), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def found(prompts):
    """Both sides of a case on a tiny model: losses, and the profile of each."""
    model = tiny_model("llama", attn_implementation="sdpa")
    case = SimpleNamespace(**vars(CASE), config=CASE.config, prompts=lambda: prompts)
    losses = {name: {} for name in ("naive", "ttt_fast", "unnamed")}
    trainer = TTTTrainer(model, CASE.config("factored"))
    bench_parts.loop(model, case, losses["unnamed"])(None)
    with parts.loop_named(model):
        run = bench_parts.loop(model, case, losses["naive"])
        roots = {"naive": parts.profile(lambda: run(None))}
    run = bench_parts.factored(trainer, case, losses["ttt_fast"])
    run(None)
    roots["ttt_fast"] = parts.profile(lambda: run(None))
    return SimpleNamespace(model=model, losses=losses, roots=roots)


def counted(root, name, tokens=0):
    """Events of that name in each part."""
    found = [part for event, part in parts.labelled(root, tokens) if event.name == name]
    return {part: found.count(part) for part in found}


# ---------------------------------------------------------------------------- the sums


@pytest.mark.parametrize("side", ["naive", "ttt_fast"])
def test_parts_add_up_to_the_whole(found, side):
    root, tokens = found.roots[side], T if side == "naive" else 0
    ms = parts.milliseconds(root, tokens)
    assert tuple(ms) == parts.PARTS
    assert sum(ms.values()) == pytest.approx(1e-3 * root.cpu_time_total, rel=1e-6)
    assert all(ms[part] > 0 for part in set(parts.PARTS) - {parts.SNAPSHOT, parts.DELTAS})
    # Nothing is copied by the factored engine.
    assert (ms[parts.SNAPSHOT] > 0) is (side == "naive")
    rest = parts.largest(root, tokens=tokens)
    assert sum(rest.values()) == pytest.approx(ms[parts.REST])
    assert len(rest) == 6 and parts.PYTHON in rest


def test_what_is_outside_of_the_range_is_not_lost_in_silence():
    def run():
        with torch.profiler.record_function(parts.ADAPT):
            torch.ones(3).sum()
        torch.ones(3).exp()

    with pytest.raises(AssertionError, match="outside of adapt: .*aten::exp"):
        parts.profile(run)


def test_products_of_the_loop_are_in_their_parts(found):
    """3 layers of 7 linears, of which 3 train; the gradient ends in the lowest MLP."""
    products = counted(found.roots["naive"], "aten::mm", T)
    crossed = 1 + 7 + 7
    assert products == {parts.LINEARS: K * (21 + crossed), parts.DELTAS: K * 9, parts.HEAD: K * 2}
    # Without the number of tokens a gradient of a weight is a product as any other.
    assert counted(found.roots["naive"], "aten::mm")[parts.LINEARS] == K * (21 + crossed + 9)


def test_products_of_ours_are_in_their_parts(found):
    """Frozen layers of one input are one product, forward (3 attentions) and backward (2)."""
    root = found.roots["ttt_fast"]
    assert counted(root, "ttt_fast_cpp::delta_linear") == {parts.ADAPTED: K * (9 + 7)}
    assert counted(root, "ttt_fast_cpp::linears") == {parts.LINEARS: K * 6, parts.HEAD: K}
    assert counted(root, "ttt_fast_cpp::linears_backward") == {parts.LINEARS: K * 4, parts.HEAD: K}
    assert counted(root, "ttt_fast::gram_norms") == {parts.UPDATE: K}


@pytest.mark.parametrize("side", ["naive", "ttt_fast"])
def test_other_operations_are_in_their_parts(found, side):
    root = found.roots[side]
    nodes = {"aten::embedding": (parts.REST, K)}
    if side == "naive":
        stock = "ScaledDotProductFlashAttentionForCpuBackward0"
        nodes |= {
            f"autograd::engine::evaluate_function: {stock}": (parts.ATTENTION, 2 * K),
            "aten::rsqrt": (parts.PIECES, 7 * K),
            "aten::silu": (parts.PIECES, 3 * K),
            "autograd::engine::evaluate_function: SiluBackward0": (parts.PIECES, 3 * K),
            "autograd::engine::evaluate_function: LogSoftmaxBackward0": (parts.HEAD, K),
            "Optimizer.step#SGD.step": (parts.UPDATE, K),
        }
    else:
        nodes |= {
            "ttt_fast_cpp::attention_backward": (parts.ATTENTION, 2 * K),
            "ttt_fast_cpp::rms_norm": (parts.PIECES, 7 * K),
            "ttt_fast_cpp::glu_backward": (parts.PIECES, 3 * K),
            "ttt_fast_cpp::rotary": (parts.PIECES, 6 * K + 4 * K),
            "ttt_fast_cpp::nll_": (parts.HEAD, K),
        }
    for name, (part, count) in nodes.items():
        assert counted(root, name) == {part: count}, name


def test_names_change_nothing(found):
    """Losses bit for bit, and no range is left in the model."""
    torch.testing.assert_close(found.losses["naive"], found.losses["unnamed"], rtol=0, atol=0)
    ours, theirs = found.losses["ttt_fast"][0], found.losses["naive"][0]
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=0)
    assert not any("forward" in vars(module) for module in found.model.modules())
    assert torch.nn.utils.clip_grad_norm_ is clip_grad_norm_


def event(name, own_us, *children):
    made = SimpleNamespace(
        name=name, self_cpu_time_total=own_us, cpu_children=children, cpu_parent=None,
        sequence_nr=-1, input_shapes=[],
    )  # fmt: skip
    for child in children:
        child.cpu_parent = made
    return made


def test_deltas_are_what_comes_on_top_of_the_first_step():
    steps = [event(parts.STEP, 1, event("_Linear", own)) for own in (10, 30, 50)]
    ms = parts.milliseconds(event(parts.ADAPT, 7, *steps))
    found = {part: round(1e3 * value) for part, value in ms.items() if value}
    assert found == {parts.LINEARS: 30, parts.DELTAS: 60, parts.REST: 10}


# ---------------------------------------------------------------------------- the floor


def test_operations_by_hand():
    trained, below = Layer(30, 20, adapted_out=30), Layer(10, 20, differentiated=False)
    head = Layer(100, 20, head=True)
    work = Workload((trained, below, head), tokens=4, steps=3)
    # What no gradient crosses is needed once in three steps. Ranks 0, 4 and 8.
    by_hand = {
        parts.LINEARS: 2 * 4 * (600 + 200 / 3 + 600),
        parts.DELTAS: sum(2 * 2 * 4 * rank * (30 + 20) for rank in (0, 4, 8)) / 3,
        parts.UPDATE: 2 * (4 + 3 + 2 + 1) * (30 + 20),
        parts.HEAD: 2 * 3 * (2000 + 2000),
    }
    assert parts.operations(work) == pytest.approx(by_hand)
    # A head that trains has the rows of the 3 tokens that have a label: ranks 0, 3 and 6.
    whole = parts.operations(replace(work, layers=(trained, below, replace(head, adapted_out=100))))
    more = {name: whole[name] - by_hand[name] for name in by_hand}
    by_hand = {parts.HEAD: 4 * 3 * 3 * 120, parts.UPDATE: 2 * (3 + 2 + 1) * 120}
    assert {name: count for name, count in more.items() if count} == pytest.approx(by_hand)
    assert parts.at_rate({"a": 5e9}, gflop_per_s=200.0) == {"a": 25.0}


def test_operations_are_those_that_torch_counts(prompts):
    model = tiny_model("llama").requires_grad_(False)
    embeddings = model.get_input_embeddings()(prompts).requires_grad_()
    with FlopCounterMode(display=False) as counter:
        bench_parts.eager(lambda x: model(inputs_embeds=x), embeddings, prompts)()
    counts = counter.get_flop_counts()["Global"]
    trainer = TTTTrainer(model, TTTConfig(steps=1))
    layers = policy.workload(model, trainer.selections, trainer.config, D, T).layers
    work = parts.frozen_workload(layers, T)
    assert counts[torch.ops.aten.mm] == D * parts.frozen_operations(work, T)
    head = sum(layer.out * layer.in_ for layer in layers if layer.head)
    floor = sum(parts.operations(work).values())
    assert floor == parts.frozen_operations(work, T) - 2 * 2 * head  # the last has no label


def test_sides_that_differ_are_an_error():
    losses, grads = [torch.tensor(3.0)] * 2, [torch.ones(4), torch.ones(4)]
    bench_parts.require_same(losses, grads, "float32")
    with pytest.raises(AssertionError, match="of their norm apart"):
        bench_parts.require_same(losses, [grads[0], 1.1 * grads[1]], "float32")
    with pytest.raises(AssertionError):
        bench_parts.require_same([losses[0], 1.1 * losses[1]], grads, "float32")


def test_frozen_sides_agree_and_have_no_logits(prompts):
    model = tiny_model("llama").requires_grad_(False)
    embeddings = model.get_input_embeddings()(prompts)
    leaves = [embeddings.detach().clone().requires_grad_() for _ in range(2)]

    devices = []

    def forward(x):
        outputs = model(inputs_embeds=x, use_cache=False)
        devices.append(outputs.logits.device.type)
        return outputs

    expected = bench_parts.eager(forward, leaves[0], prompts)()
    ours = bench_parts.with_pieces(model, forward, leaves[1], prompts)()
    bench_parts.require_same([expected, ours], [leaf.grad for leaf in leaves], "float32")
    assert devices == ["cpu", "meta"]
    assert not any("forward" in vars(module) for module in model.modules())


# ---------------------------------------------------------------------------- what is reported


def times(median, spread=0.0):
    return {"median": median, "min": median - spread, "max": median + spread}


FROZEN = {
    "parts": "frozen", "what": "20 tokens", "gemm_gflop_per_s": 100.0,
    "sides": {"eager torch": times(8.0, 1.0), "ttt_fast": times(4.0)},
    "floor_ms": {parts.LINEARS: 1.5, parts.HEAD: 0.5},
}  # fmt: skip
BY_PART = dict.fromkeys(parts.PARTS, 2.0)
STEP = {
    "parts": "step", "what": "a step", "gemm_gflop_per_s": 200.0,
    "sides": {"naive": times(40.0), "ttt_fast": times(15.0)},
    "by_part": {
        "naive": {"ms": BY_PART | {parts.REST: 30.0}, "rest": {parts.PYTHON: 29.0, "others": 1.0}},
        "ttt_fast": {"ms": BY_PART, "rest": {"aten::add": 1.5, "others": 0.5}},
    },
    "floor_ms": {parts.LINEARS: 7.0, parts.DELTAS: 3.0},
}  # fmt: skip
LAYERS = {
    "parts": "layers", "what": "one prompt", "gemm_gflop_per_s": 200.0,
    "sides": {":": times(100.0), "-4:": times(40.0)}, "floor_ms": {":": 80.0, "-4:": 24.0},
}  # fmt: skip
NOT_RUN = {"parts": "not run", "what": "much", "not_run": "9.0e+99 operations"}
FOUND = [FROZEN, STEP, LAYERS, NOT_RUN]


def test_the_tables():
    text = part_table.table(FOUND)
    assert "| 20 tokens | 8 ms [7, 9] | 4 ms | 2.00x | 2 ms | 2.00 |" in text
    assert "ttt_fast takes 1.50 times the floor, the loop 4.00." in text
    assert f"| {parts.LINEARS} | 2 | 2 | 7 |" in text and f"| {parts.REST} | 30 | 2 |  |" in text
    assert "| sum, under the profiler | 44 | 16 | 10 |" in text
    assert "| without the profiler | 40 ms | 15 ms | 10 ms |" in text
    assert f"Rest of the loop: {parts.PYTHON} 29, others 1." in text
    assert "| one prompt | 100 ms | 40 ms | 0.40 | 0.30 |" in text
    assert "Not run, being over the cap: much (9.0e+99 operations)." in text
    assert "100 to 200 Gflop/s" in text
    assert part_table.table([]) == ""


def raw_of(*infos):
    return {
        "machine_info": {"cpu": {"brand_raw": "a CPU"}, "python_version": "3"},
        "datetime": "2026-11-22T10:00",
        "benchmarks": [{"group": "", "stats": {}, "extra_info": info} for info in infos],
    }


@pytest.mark.parametrize("amount", ["quick", "full"])
def test_a_run_of_this_file_alone_leaves_the_other_tables(tmp_path, monkeypatch, amount):
    monkeypatch.setattr(report, "AMOUNT", amount)
    document = tmp_path / "benchmarks.md"
    blocks = "".join(
        f"<!-- {n}:start -->\nold {n}\n<!-- {n}:end -->\n" for n in ("measured", "parts")
    )
    document.write_text(blocks)
    file = report.write([raw_of(*FOUND)], tmp_path / "results", tmp_path / "none", document)
    assert file.stem.endswith("-parts") and json.loads(file.read_text())["parts"] == FOUND
    text = document.read_text()
    assert "old measured" in text and ("old parts" in text) is (amount == "quick")
    assert ("| one prompt |" in text) is (amount == "full")


def test_parts_are_compared():
    old = {"machine": "", "commit": "", "datetime": "", "benchmarks": [], "parts": FOUND}
    worse = FROZEN | {"sides": {"eager torch": times(8.0, 1.0), "ttt_fast": times(8.0)}}
    noisy = STEP | {"sides": {"naive": times(40.0), "ttt_fast": times(18.0)}}
    text, slower = compare.compare(old, old | {"parts": [worse, noisy, LAYERS]})
    # A single round of 18 after one of 15 may be noise.
    assert slower == ["20 tokens (frozen)"] and "1 of 3 became slower" in text


def test_a_quick_run_has_a_step_and_names_the_others():
    run = [
        case.scope for case in bench_parts.STEPS if not bench_parts.over_cap(case, bench_parts.CAP)
    ]
    assert run == ["attention"]
    layers = [replace(case, layers=bench_parts.ALL_LAYERS) for case in bench_parts.LAYERS]
    assert [bool(bench_parts.over_cap(case, bench_parts.CAP)) for case in layers] == [False, True]
    full = bench_parts.CAPS["full"]
    assert not any(bench_parts.over_cap(case, full) for case in (*bench_parts.STEPS, *layers))
