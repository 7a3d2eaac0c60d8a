"""What a Triton kernel becomes on a GPU, read from its machine code; no GPU is needed.

Triton compiles ahead of time for any architecture, and its wheel carries NVIDIA's disassembler. So
registers, spills, shared memory and the width of every memory access are known before anyone runs
the kernel, and a bound on its occupancy follows. None of this is a time: caches, bank conflicts and
clocks are not in the machine code.

``python -m ttt_fast.kernels.machine_code`` writes the table in ``kernels/README.md``.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

ARCHITECTURES = (80, 90, 100)
WARP = 32

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_README = Path(__file__).with_name("README.md")
BEGIN = "<!-- kernel-report: written by `make kernel-report` -->"
END = "<!-- end of kernel-report -->"

_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P[0-9T]+\s+)?([A-Z][A-Z0-9_.]*)", re.M)
_WIDTH = re.compile(r"\.[US]?(8|16|64|128|256)(?=\.|$)")
_LOCAL = ("LDL", "STL")
_TENSOR_CORES = ("HMMA", "HGMMA", "UTCHMMA", "DMMA")


class Limits(NamedTuple):
    """What one multiprocessor has, from the CUDA programming guide's table of capabilities."""

    shared_bytes: int  # all blocks together
    shared_bytes_per_block: int
    registers: int = 65536
    threads: int = 2048
    blocks: int = 32


LIMITS = {
    80: Limits(164 << 10, 163 << 10),
    90: Limits(228 << 10, 227 << 10),
    100: Limits(228 << 10, 227 << 10),
}


class Case(NamedTuple):
    """One way in which a launcher calls its kernel; floating-point fusion is off in all of them.

    Attributes:
        name: as it stands in the table, "bfloat16, momentum".
        kernel: the ``triton.jit`` function.
        signature: type of each run-time argument, {"weight": "*bf16", "numel": "i32"}.
        constexprs: values of the compile-time arguments; None for a pointer that is not given.
        num_warps: as at the launch.
        num_stages: as at the launch.
        divisible: arguments that are multiples of 16 in every call: Triton looks at the values,
            and its code differs. Name only what the launcher makes sure of.
        bytes_per_element: global memory read and written for each element by the accesses of 128
            bits and more, each instruction counted once: the whole kernel where it is a straight
            line, one round of the loop where it loops. None where that is no measure (a dot).
        block: elements of a program, or of one round of its loop; with ``bytes_per_element``.
        dot: must use tensor cores.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    num_warps: int
    num_stages: int = 1
    divisible: tuple[str, ...] = ()
    bytes_per_element: float | None = None
    block: int | None = None
    dot: bool = False


class Report(NamedTuple):
    """One case on one architecture.

    Attributes:
        case: what was compiled.
        arch: 90 for sm_90.
        registers: of a thread.
        spills: instructions that read or write local memory.
        stack: bytes of local memory for a thread.
        shared: bytes of shared memory for a block.
        instructions: opcode with its suffixes -> how often it stands in the code.
        sass: the machine code as text.
        ptx: what it was assembled from, where Triton compiled it.
    """

    case: Case
    arch: int
    registers: int
    spills: int
    stack: int
    shared: int
    instructions: Counter[str]
    sass: str
    ptx: str

    def widths(self, kind: str) -> Counter[int]:
        """Bits of an access -> how many there are, of "LDG", "STG", "LDGSTS", ..."""
        result: Counter[int] = Counter()
        for opcode, count in self.instructions.items():
            if opcode.split(".")[0] == kind:
                width = _WIDTH.search(opcode)
                result[int(width[1]) if width else 32] += count
        return result

    def count(self, *kinds: str) -> int:
        """Instructions of these kinds, whatever their suffixes."""
        return sum(n for opcode, n in self.instructions.items() if opcode.split(".")[0] in kinds)

    @property
    def tensor_core_instructions(self) -> int:
        """Matrix products: of a warp (sm_80), of four warps (sm_90), of a block (sm_100)."""
        return self.count(*_TENSOR_CORES)

    @property
    def streamed_bytes(self) -> int:
        """Bytes that a program moves by global accesses of 128 bits and more, each counted once."""
        bits = sum(
            width * count
            for kind in ("LDG", "LDGSTS", "STG")
            for width, count in self.widths(kind).items()
            if width >= 128
        )
        return bits // 8 * WARP * self.case.num_warps

    @property
    def occupancy(self) -> float:
        """Computed bound: share of a multiprocessor's threads that can be resident. 0: none."""
        limits = LIMITS[self.arch]
        threads = WARP * self.case.num_warps
        if self.shared > limits.shared_bytes_per_block:
            return 0.0
        # Registers are given to warps in units of 256; a block's shared memory has 1 KiB on top.
        warp_registers = -(-self.registers * WARP // 256) * 256
        blocks = min(
            limits.blocks,
            limits.threads // threads,
            limits.registers // warp_registers // self.case.num_warps,
            limits.shared_bytes // (self.shared + 1024),
        )
        return blocks * threads / limits.threads


def build(case: Case, arch: int, **options: Any) -> Report:
    """Compile a case for an architecture and read its machine code.

    Args:
        case: kernel, argument types and launch options.
        arch: 80, 90 or 100.
        options: more of Triton's compile options, as ``maxnreg=32``.

    Raises:
        RuntimeError: Triton's interpreter is on: what it runs has no machine code.
        ValueError: the case does not name every argument of the kernel, or one that it lacks.
    """
    if not isinstance(case.kernel, JITFunction):
        raise RuntimeError(
            f"machine_code: {case.kernel} was made while Triton's interpreter was on; build in a "
            "process without TRITON_INTERPRET."
        )
    names = case.kernel.arg_names
    given = {*case.signature, *case.constexprs}
    if given != set(names) or not given >= set(case.divisible):
        raise ValueError(
            f"{case.name}: signature, constexprs and divisible name {sorted(given)} and "
            f"{sorted(case.divisible)}; the kernel's arguments are {sorted(names)}."
        )
    source = ASTSource(
        fn=case.kernel,
        signature={name: case.signature.get(name, "constexpr") for name in names},
        constexprs=dict(case.constexprs),
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in case.divisible},
    )
    launch = {"num_warps": case.num_warps, "num_stages": case.num_stages, "enable_fp_fusion": False}
    compiled = triton.compile(
        source, target=GPUTarget("cuda", arch, WARP), options=launch | options
    )
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(compiled.asm["cubin"])
        report = report_of(case, arch, *listings(cubin))
    # Shared memory whose size the launch names is not in the cubin.
    shared = max(report.shared, compiled.metadata.shared)
    return report._replace(shared=shared, ptx=compiled.asm["ptx"])


def listings(cubin: Path) -> tuple[str, str]:
    """The machine code of all kernels in a cubin as text, and what each of them uses."""
    return _run("nvdisasm", "-c", str(cubin)), _run("cuobjdump", "-res-usage", str(cubin))


def report_of(case: Case, arch: int, sass: str, usage: str) -> Report:
    """Read what :func:`listings` says of one kernel."""
    instructions = Counter(match[1] for match in _INSTRUCTION.finditer(sass))
    return Report(
        case, arch,
        registers=_used("REG", usage),
        spills=sum(n for op, n in instructions.items() if op.split(".")[0] in _LOCAL),
        stack=_used("STACK", usage) + _used("LOCAL", usage),
        shared=_used("SHARED", usage), instructions=instructions, sass=sass, ptx="",
    )  # fmt: skip


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run(
        [str(_TOOLS / tool), *arguments], check=True, capture_output=True, text=True
    ).stdout


def _used(resource: str, usage: str) -> int:
    return int(re.search(rf"\b{resource}:(\d+)", usage)[1])


# ---------------------------------------------------------------------------- all kernels


def kernel_modules() -> list[ModuleType]:
    """The modules in this folder that say which cases of their kernels are to be built."""
    stems = sorted(path.stem for path in Path(__file__).parent.glob("*.py"))
    stems.remove(Path(__file__).stem)
    modules = [importlib.import_module(f"ttt_fast.kernels.{stem}") for stem in stems]
    return [module for module in modules if hasattr(module, "CASES")]


def builders() -> ProcessPoolExecutor:
    """Processes for :func:`build_in`, one for each processor.

    Not threads: Triton parses Python as it compiles, and the parser's result is made by one thread
    at a time or not at all (CPython 3.11: "AST constructor recursion depth mismatch").
    """
    return ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn"))


def build_in(pool: ProcessPoolExecutor, case: Case, arch: int) -> Callable[[], Report]:
    """Let a process build a case of :func:`kernel_modules`; what is returned waits for it."""
    (place,) = [
        (module.__name__, i)
        for module in kernel_modules()
        for i, each in enumerate(module.CASES)
        if each is case
    ]
    future = pool.submit(_build_at, *place, arch)
    return lambda: future.result()._replace(case=case)


def _build_at(module: str, index: int, arch: int) -> Report:
    """A kernel goes to another process by its place only, and does not come back."""
    case = importlib.import_module(module).CASES[index]
    return build(case, arch)._replace(case=None)


def _widest(report: Report) -> str:
    """Bits of the widest global load and store, and how matrices are loaded and multiplied."""
    reads = report.widths("LDG") + report.widths("LDGSTS")
    words = [f"{max(reads, default=0)}/{max(report.widths('STG'), default=0)}"]
    words += [word for word in ("UTMALDG", *_TENSOR_CORES) if report.count(word)]
    return " ".join(words)


def table() -> str:
    """Every case on every architecture, as a table in Markdown."""
    lines = [
        "| kernel | case | bytes per element | architecture | registers | shared memory | occupancy"
        " at most | widest load/store, bits |",
        "|---|---|---|---|---|---|---|---|",
    ]
    cases = [case for module in kernel_modules() for case in module.CASES]
    with builders() as pool:
        builds = [[build_in(pool, case, arch) for arch in ARCHITECTURES] for case in cases]
        for case, waiting in zip(cases, builds, strict=True):
            reports = [result() for result in waiting]
            moved = "" if case.bytes_per_element is None else f"{case.bytes_per_element:g}"
            # Three architectures in a line: the table stays short enough to be read.
            columns = [
                f"`{case.kernel.__name__}`", case.name, moved,
                "sm_" + "/".join(str(r.arch) for r in reports),
                "/".join(str(r.registers) for r in reports),
                "/".join(f"{r.shared / 1024:.3g}" for r in reports) + " KiB",
                "/".join(f"{r.occupancy:.0%}" for r in reports),
                "; ".join(dict.fromkeys(_widest(r) for r in reports)),
            ]  # fmt: skip
            lines.append("| " + " | ".join(columns) + " |")
    return "\n".join(lines)


def write_report(path: Path = _README) -> None:
    """Put the table between its two markers in a Markdown file.

    Raises:
        ValueError: the file lacks the markers.
    """
    text = path.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{path} needs the lines {BEGIN!r} and {END!r} around its table.")
    versions = f"Triton {triton.__version__}"
    new = f"{before}{begin}\n\n{versions}.\n\n{table()}\n\n{end}{after}"
    path.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    write_report()
