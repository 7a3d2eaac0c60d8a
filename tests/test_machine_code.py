"""The machine code that each Triton kernel becomes: what can be known of it without a GPU."""

import sys
from types import SimpleNamespace

import pytest

if sys.platform != "linux":  # where pyproject.toml asks for Triton
    pytest.importorskip("triton")

import triton
import triton.language as tl

from ttt_fast.kernels import grad_norm, machine_code
from ttt_fast.kernels.machine_code import (
    ARCHITECTURES,
    LIMITS,
    Case,
    Report,
    build,
    build_in,
    builders,
)

CASES = [
    pytest.param(case, id=f"{module.__name__.rpartition('.')[2]}-{case.name}")
    for module in machine_code.kernel_modules()
    for case in module.CASES
]


def faults(report: Report) -> set[str]:
    """What is wrong with a kernel's machine code."""
    case, limits = report.case, LIMITS[report.arch]
    reads = report.widths("LDG") + report.widths("LDGSTS")
    claimed = None if case.bytes_per_element is None else case.bytes_per_element * case.block
    found = {
        "spills": report.spills > 0,
        "local memory": report.stack > 0,
        "shared memory": report.shared > limits.shared_bytes_per_block,
        "no block is resident": report.occupancy == 0,
        "narrow matrix loads": case.dot and not report.count("UTMALDG") and max(reads) < 128,
        "no tensor cores": case.dot and report.tensor_core_instructions == 0,
        # A float32 product on tensor cores is TF32: 10 bits.
        "tensor cores": not case.dot and report.tensor_core_instructions > 0,
        "bytes per element": claimed is not None and report.streamed_bytes != claimed,
    }
    return {fault for fault, there in found.items() if there}


@pytest.fixture(scope="module")
def builds(request):
    """What the selected tests of kernels build, by case and architecture, on all processors."""
    items = [item for item in request.session.items if item.path == request.path]
    calls = [item.callspec for item in items if item.originalname == "test_kernel"]
    pool = builders()
    yield {c.id: build_in(pool, c.params["case"], c.params["arch"]) for c in calls}
    pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("case", CASES)
def test_kernel(case, arch, builds, request):
    report = builds[request.node.callspec.id]()
    assert faults(report) == set(), (report.registers, report.spills, report.instructions)


# ---------------------------------------------------------------------------- the gate itself


@triton.jit
def increment(x, i, inside, MASKED: tl.constexpr):
    """Add 1 to x[i]."""
    if MASKED:
        tl.store(x + i, tl.load(x + i, mask=inside) + 1, mask=inside)
    else:
        tl.store(x + i, tl.load(x + i) + 1)


@triton.jit
def full_blocks_kernel(x, n, BLOCK: tl.constexpr):
    """A full block has a path without masks."""
    start = tl.program_id(0) * BLOCK
    i = start + tl.arange(0, BLOCK)
    if start + BLOCK <= n:
        increment(x, i, i < n, False)
    else:
        increment(x, i, i < n, True)


@triton.jit
def masked_kernel(x, n, BLOCK: tl.constexpr):
    """Every block is masked."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    increment(x, i, i < n, True)


@triton.jit
def sort_kernel(x, y, BLOCK: tl.constexpr):
    """Keep many values alive at once."""
    i = tl.arange(0, BLOCK)
    values = tl.load(x + i)
    tl.store(y + i, tl.sort(values) * tl.cumsum(values, 0) + tl.flip(values, 0))


@triton.jit
def dot_kernel(a, b, c, SIZE: tl.constexpr, PRECISION: tl.constexpr):
    """Multiply two matrices."""
    i = tl.arange(0, SIZE)
    at = i[:, None] * SIZE + i[None, :]
    tl.store(c + at, tl.dot(tl.load(a + at), tl.load(b + at), input_precision=PRECISION))


def streaming(kernel, dtype, size, **options) -> Case:
    signature = {"x": f"*{dtype}", "n": "i32"}
    return Case(
        dtype, kernel, signature, {"BLOCK": 1024}, num_warps=4, divisible=("x",),
        bytes_per_element=2 * size, block=1024, **options,
    )  # fmt: skip


def matrices(dtype, precision, size=64, **options) -> Case:
    signature = {"a": f"*{dtype}", "b": f"*{dtype}", "c": "*fp32"}
    constexprs = {"SIZE": size, "PRECISION": precision}
    return Case(dtype, dot_kernel, signature, constexprs, 4, divisible=("a", "b", "c"), **options)


SORT = Case("sort", sort_kernel, {"x": "*fp32", "y": "*fp32"}, {"BLOCK": 256}, num_warps=1)


@pytest.mark.parametrize(("dtype", "size"), [("bf16", 2), ("fp32", 4), ("fp64", 8)])
def test_a_kernel_without_an_unmasked_path_has_no_wide_accesses(dtype, size):
    good = build(streaming(full_blocks_kernel, dtype, size), 90)
    bad = build(streaming(masked_kernel, dtype, size), 90)
    assert faults(good) == set()
    assert faults(bad) == {"bytes per element"}
    # Per thread: 1024 elements between 128 threads, all of them in 128 bits.
    assert good.widths("LDG")[128] == good.widths("STG")[128] == size // 2
    assert bad.widths("LDG") == bad.widths("STG") == {8 * size: 8}


def test_alignment_that_the_launcher_does_not_promise_is_not_assumed():
    case = streaming(full_blocks_kernel, "bf16", 2)._replace(divisible=())
    assert faults(build(case, 90)) == {"bytes per element"}


def test_spills_are_seen():
    assert "spills" not in faults(build(SORT, 90))
    assert faults(build(SORT, 90, maxnreg=24)) == {"spills", "local memory"}


@pytest.mark.parametrize(("arch", "opcode"), [(80, "HMMA"), (90, "HGMMA"), (100, "UTCHMMA")])
def test_tensor_cores_are_seen(arch, opcode):
    report = build(matrices("bf16", "ieee", dot=True), arch)
    assert faults(report) == set()
    assert report.count(opcode) == report.tensor_core_instructions > 0
    assert faults(report._replace(case=report.case._replace(dot=False))) == {"tensor cores"}


def test_a_float32_product_that_is_tf32_is_seen():
    # Triton's own choice, unless it is told otherwise.
    assert faults(build(matrices("fp32", "tf32", size=16), 90)) == {"tensor cores"}
    report = build(matrices("fp32", "ieee", size=16), 90)
    assert faults(report) == set()
    assert "no tensor cores" in faults(report._replace(case=report.case._replace(dot=True)))


def test_shared_memory_beyond_the_limit_is_seen():
    report = build(matrices("bf16", "ieee", dot=True), 90)
    assert 0 < report.shared <= LIMITS[90].shared_bytes_per_block
    full = report._replace(shared=LIMITS[90].shared_bytes_per_block + 1)
    assert faults(full) == {"shared memory", "no block is resident"}


def test_occupancy_is_bounded_by_what_runs_out_first():
    report = build(streaming(full_blocks_kernel, "bf16", 2), 90)
    assert report.occupancy == 1.0
    assert report._replace(registers=128).occupancy == 0.25
    assert report._replace(registers=255).occupancy == 0.125
    assert report._replace(shared=100 << 10).occupancy == 2 * 128 / 2048
    one_warp = report._replace(case=report.case._replace(num_warps=1))
    assert one_warp.occupancy == 32 * 32 / 2048


def test_a_case_must_name_what_its_kernel_takes():
    case = streaming(masked_kernel, "bf16", 2)
    with pytest.raises(ValueError, match=r"the kernel's arguments are \['BLOCK', 'n', 'x'\]"):
        build(case._replace(signature={"x": "*bf16"}), 90)
    with pytest.raises(ValueError, match="the kernel's arguments are"):
        build(case._replace(divisible=("y",)), 90)


def test_the_report_has_a_row_for_every_case():
    """And none for what is no more; its numbers are those of the versions that it names."""
    text = machine_code._README.read_text(encoding="utf-8")
    rows = [line.split(" | ")[:3] for line in text.splitlines() if line.startswith("| `")]
    cases = [param.values[0] for param in CASES]
    assert [(row[0][2:], row[1]) for row in rows] == [
        (f"`{case.kernel.__name__}`", case.name) for case in cases
    ]
    assert [float(row[2] or "nan") for row in rows] == pytest.approx(
        [case.bytes_per_element or float("nan") for case in cases], nan_ok=True
    )


def test_report_goes_between_its_markers(tmp_path, monkeypatch):
    module = SimpleNamespace(__name__=grad_norm.__name__, CASES=grad_norm.CASES[:1])
    monkeypatch.setattr(machine_code, "kernel_modules", lambda: [module])
    path = tmp_path / "README.md"
    path.write_text("no markers")
    with pytest.raises(ValueError, match="needs the lines"):
        machine_code.write_report(path)
    path.write_text(f"before\n{machine_code.BEGIN}\nold\n{machine_code.END}\nafter\n")
    for _ in range(2):
        machine_code.write_report(path)
    text = path.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n")
    assert "old" not in text
    (case,) = module.CASES
    line = f"| `{case.kernel.__name__}` | {case.name} | {case.bytes_per_element:g} | sm_80/90/100 |"
    assert text.count(line) == 1
    assert "128/" in text
