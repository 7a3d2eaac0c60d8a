"""What nvcc makes of the CUDA kernels, read from their machine code; no GPU is needed."""

import re
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import pytest

if sys.platform != "linux":  # where pyproject.toml asks for Triton
    pytest.importorskip("triton")

from ttt_fast.kernels.machine_code import (
    ARCHITECTURES,
    LIMITS,
    Case,
    Report,
    listings,
    report_of,
)

pytestmark = pytest.mark.nvcc

CUDA = Path(__file__).parents[1] / "csrc" / "cuda"
SOURCES = sorted(path.name for path in CUDA.glob("*.cu"))
WARPS = 8
# Accesses of 128 bits that stand in a kernel: (loads, stores) for one pack of 16 bytes of the
# parameters. sgd_ with momentum reads g, w, m and writes w, m: 10 bytes an element in bfloat16.
UPDATES = {"sgd.cu": (3, 2), "adamw.cu": (4, 3)}
# One architecture in `make test`; every kernel is compiled for it in a minute of one core.
architectures = pytest.mark.parametrize(
    "arch", [a if a == 90 else pytest.param(a, marks=pytest.mark.slow) for a in ARCHITECTURES]
)
STORAGE = ("float", "Bf16", "F16", "double")


@cache
def kernels(source: str, arch: int, folder: Path = CUDA) -> dict[str, Report]:
    """The kernels of a source by their names, compiled as setup.py does."""
    with tempfile.TemporaryDirectory() as output:
        cubin = Path(output, "kernels.cubin")
        command = ["nvcc", "-std=c++17", "-O3", "-fmad=false", f"-arch=sm_{arch}"]
        subprocess.run([*command, "-cubin", str(folder / source), "-o", cubin], check=True)
        code, usage = listings(cubin)
    found = {}
    for name, sass in re.findall(r"^\.text\.(\S+):\n(.*?)(?=^\.text\.|\Z)", code, re.M | re.S):
        used = re.search(rf"Function {re.escape(name)}:\s*(.*)", usage)[1]
        case = Case(name, None, {}, {}, num_warps=WARPS)
        found[_readable(name)] = report_of(case, arch, sass, used)
    return found


def _readable(name: str) -> str:
    """Name and template arguments of a kernel, without namespaces."""
    plain = subprocess.run(["c++filt", name], check=True, capture_output=True, text=True).stdout
    plain = re.sub(r"\(anonymous namespace\)::|ttt_fast::cuda::|^void ", "", plain)
    return plain[: plain.index("(")]


@architectures
@pytest.mark.parametrize("source", SOURCES)
def test_nothing_is_spilled_and_a_block_fits(source, arch):
    reports = kernels(source, arch)
    assert reports
    for name, report in reports.items():
        assert (report.spills, report.stack) == (0, 0), name
        # Three blocks, 768 threads, fit in but for tiles of a Gram matrix in float64.
        limit = 255 if name == "gram_norm_kernel<double>" else 80
        assert report.registers <= limit, name
        assert report.shared <= LIMITS[arch].shared_bytes_per_block, name


@architectures
@pytest.mark.parametrize("source", UPDATES)
def test_an_update_moves_each_byte_once(source, arch):
    reports = kernels(source, arch)
    for storage in STORAGE:
        (lean,) = [r for n, r in reports.items() if re.search(rf"\b{storage}, false>", n)]
        (general,) = [r for n, r in reports.items() if re.search(rf"\b{storage}, true>", n)]
        assert (_wide(lean, "LDG"), _wide(lean, "STG")) == UPDATES[source]
        assert _wide(general, "LDG") > _wide(lean, "LDG")
        # Through a pointer that might be to shared memory, an access would be LD or ST.
        assert lean.count("LD", "ST") == 0


@architectures
def test_copies_and_reductions_read_16_bytes_at_once(arch):
    for source, kernel in (
        ("copy.cu", "copy_kernel"), ("grad_norm.cu", "sum_of_squares_kernel"),
        ("gram_norm.cu", "gram_norm_kernel"),
    ):  # fmt: skip
        reports = {n: r for n, r in kernels(source, arch).items() if n.startswith(kernel + "<")}
        assert len(reports) >= 4
        for name, report in reports.items():
            assert _wide(report, "LDG") >= 2, name
            if source == "copy.cu":
                assert _wide(report, "STG") >= 4, name
                assert report.count("LD", "ST") == 0, name


def _wide(report: Report, kind: str) -> int:
    """Accesses of 128 bits; sm_100 has some of 256, which count as two."""
    return sum(bits * n for bits, n in report.widths(kind).items() if bits >= 128) // 128


def test_too_few_registers_are_seen(tmp_path):
    shutil.copytree(CUDA.parent, tmp_path / "csrc")
    source = tmp_path / "csrc" / "cuda" / "gram_norm.cu"
    text = source.read_text()
    assert "__launch_bounds__(kThreads)" in text
    source.write_text(text.replace("__launch_bounds__(kThreads)", "__launch_bounds__(kThreads, 8)"))
    reports = kernels("gram_norm.cu", 90, source.parent)
    assert any(report.spills > 0 for report in reports.values())
