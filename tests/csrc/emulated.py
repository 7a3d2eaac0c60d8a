"""The CUDA kernels on the CPU: csrc/cuda/ as it is, compiled by g++ against cuda_emu.h.

The kernels and their binding, csrc/ops_cuda.cpp, become one library that registers its ops under a
name of its own, for CPU tensors. With ``ttt_fast.cuda_ops.NAMESPACE`` set to that name everything
above the kernels is what runs on a GPU, too.

``TTT_FAST_SANITIZE=1`` builds with AddressSanitizer and UBSan, which have to be preloaded:
:func:`sanitized` runs a command like that.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

from ttt_fast import cuda_ops

ROOT = Path(__file__).parents[2]
KERNELS = sorted(f"cuda/{path.name}" for path in (ROOT / "csrc" / "cuda").glob("*.cu"))
# What was compiled is kept here, under the hash of what it came from.
CACHE = ROOT / "build" / "emulated"
TORCH = Path(torch.__file__).parent

ORDERS = (0, 1, 2, 3)  # of threads and blocks: ascending, descending, two random ones

COMPILE = [
    "g++", "-std=c++17", "-fPIC", "-w", "-ffp-contract=off", "-fno-math-errno",
    # Several of these libraries are loaded into one process and share no variable.
    "-fvisibility=hidden", "-fno-gnu-unique",
]  # fmt: skip
EMULATE = [*COMPILE, "-O1", "-Itests", "-x", "c++"]
BIND = [*COMPILE, "-DTORCH_TARGET_VERSION=0x020a000000000000", "-isystem", str(TORCH / "include")]
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


class Edit(NamedTuple):
    """A fault put into a source.

    Attributes:
        path: in csrc/.
        old: what stands there, once.
        new: what takes its place.
    """

    path: str
    old: str
    new: str


class Emulated:
    """One build, loaded into this process.

    Args:
        edit: a fault to inject; None for the kernels as they are.
    """

    def __init__(self, edit: Edit | None = None) -> None:
        self.namespace = "ttt_fast_emulated" + (f"_{_hash(edit)}" if edit else "")
        path = _build(self.namespace, edit, os.environ.get("TTT_FAST_SANITIZE") == "1")
        torch.ops.load_library(str(path))
        self._library = ctypes.CDLL(str(path))

    def order(self, seed: int) -> None:
        """Run threads and blocks in ascending (0), descending (1) or random order from now on."""
        self._library.cuda_emu_order(seed)


@cache
def load(edit: Edit | None = None) -> Emulated:
    """Build and load; the same build only once."""
    return Emulated(edit)


@contextmanager
def running(edit: Edit | None = None, order: int = 0) -> Iterator[None]:
    """Let :mod:`ttt_fast.cuda_ops` call the emulated kernels, in an order of threads and blocks."""
    emulated = load(edit)
    emulated.order(order)
    found, cuda_ops.NAMESPACE = cuda_ops.NAMESPACE, emulated.namespace
    try:
        yield
    finally:
        cuda_ops.NAMESPACE = found


def sanitized(arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Run Python with the sanitizers' libraries, which have to be loaded before anything else."""
    names = ("libasan.so", "libubsan.so", "libstdc++.so.6")
    libraries = [
        subprocess.run(
            ["g++", f"-print-file-name={name}"], check=True, capture_output=True, text=True
        ).stdout.strip()
        for name in names
    ]
    settings = {
        "TTT_FAST_SANITIZE": "1",
        "LD_PRELOAD": ":".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0",  # of Python itself
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=os.environ | settings, capture_output=True,
        text=True, check=False,
    )  # fmt: skip


# ---------------------------------------------------------------------------- build


def _build(namespace: str, edit: Edit | None, sanitize: bool) -> Path:
    """Compile what has not been compiled yet, link it, and return the library's path."""
    sources = _sources(edit)
    extra = SANITIZE if sanitize else []
    declared = "extern const char* const cuda_emu_namespace;\n"
    sources["name.cpp"] = f'{declared}const char* const cuda_emu_namespace = "{namespace}";\n'
    jobs = [([*BIND, "-c"], "tests/ops_emulated.cpp"), ([*COMPILE, "-c"], "name.cpp")]
    jobs += [([*EMULATE, *extra, "-c"], kernel) for kernel in KERNELS]
    folder = CACHE / _hash(sorted(sources.items()))
    for path, text in sources.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = pool.map(
            lambda job: _compiled([*job[0], job[1]], folder, _includes(job[1], sources), ".o"), jobs
        )
        link = [*COMPILE, *extra, "-shared", *map(str, objects), f"-L{TORCH / 'lib'}"]
    return _compiled([*link, "-ltorch_cpu", "-lc10"], folder, {}, ".so")


def _sources(edit: Edit | None) -> dict[str, str]:
    """Path -> text of everything that takes part."""
    csrc, here = ROOT / "csrc", Path(__file__).parent
    paths = [p for p in csrc.rglob("*") if p.suffix in (".h", ".cu", ".cuh")]
    sources = {p.relative_to(csrc).as_posix(): p.read_text() for p in paths}
    sources["ops_cuda.cpp"] = (csrc / "ops_cuda.cpp").read_text()
    sources |= {
        f"tests/{p.name}": p.read_text()
        for p in here.iterdir()
        if p.suffix != ".py" and p.is_file()
    }
    if edit is not None:
        found = sources[edit.path].count(edit.old)
        if found != 1:
            raise ValueError(f"{edit.path} has {found} times {edit.old!r}; an edit needs one.")
        sources[edit.path] = sources[edit.path].replace(edit.old, edit.new)
    return sources


def _includes(path: str, sources: dict[str, str]) -> dict[str, str]:
    """A source and what it includes from here."""
    found, open_paths = {}, [path]
    while open_paths:
        path = open_paths.pop()
        if path in sources and path not in found:
            found[path] = sources[path]
            folder = os.path.dirname(path)
            for name in re.findall(r'#include "(.*)"', sources[path]):
                open_paths.append(os.path.normpath(os.path.join(folder, name)))
            open_paths += [
                f"tests/{name}" for name in re.findall(r"#include <(.*)>", sources[path])
            ]
    return found


def _compiled(command: list[str], folder: Path, sources: dict[str, str], suffix: str) -> Path:
    """Run a compiler in ``folder``, unless the same has been compiled before."""
    output = CACHE / (_hash(command, sorted(sources.items()), torch.__version__) + suffix)
    if not output.exists():
        unfinished = output.with_suffix(f".{os.getpid()}{suffix}")
        subprocess.run([*command, "-o", str(unfinished)], cwd=folder, check=True)
        unfinished.rename(output)
    return output


def _hash(*what: object) -> str:
    return hashlib.sha256(repr(what).encode()).hexdigest()[:16]
