"""Compiles csrc/ into ttt_fast/_C.so; everything else about the package is in pyproject.toml.

The library registers operators through torch's stable ABI; ``torch.ops.load_library`` loads it
(ttt_fast/backend.py). It is no Python module and links no Python, so that its name carries no
Python version.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

SOURCES = ["csrc/ops.cpp", *sorted(str(path) for path in Path("csrc/cpu").glob("*.cpp"))]
HEADERS = sorted(str(path) for path in Path("csrc").rglob("*.h"))
TORCH = Path(torch.__file__).parent
COMPILE = [
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    "-Wall",
    # Products and sums are rounded one by one, as in ttt_fast/reference.py.
    "-ffp-contract=off",
    # No result depends on these two; with them GCC vectorises square roots and selections.
    "-fno-math-errno",
    "-fno-trapping-math",
    # The stable ABI of torch 2.10: a binary for that version and all later ones.
    "-DTORCH_TARGET_VERSION=0x020a000000000000",
    "-isystem",
    str(TORCH / "include"),
]
LINK = ["-shared", f"-L{TORCH / 'lib'}", "-Wl,--no-as-needed", "-ltorch_cpu", "-lc10"]


class BuildExtension(build_ext):
    """Call the C++ compiler directly: all files at once, no flags inherited from Python's build."""

    def get_ext_filename(self, fullname: str) -> str:
        """Name the library without the tag of a Python version."""
        return str(Path(*fullname.split("."))) + ".so"

    def build_extension(self, ext: Extension) -> None:
        """Compile the sources in parallel and link them."""
        compiler = os.environ.get("CXX", "g++")
        if shutil.which(compiler) is None:
            raise SystemExit(
                f"ttt_fast: the C++ compiler {compiler!r} was not found; it is needed to build the "
                f"CPU kernels. Install it (Debian, Ubuntu: sudo apt-get install g++) or name "
                f"another one in the environment variable CXX."
            )
        objects = Path(self.build_temp)
        objects.mkdir(parents=True, exist_ok=True)
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)

        def compile_one(source: str) -> str:
            result = str(objects / Path(source).with_suffix(".o").name)
            subprocess.check_call([compiler, *COMPILE, "-c", source, "-o", result])
            return result

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            compiled = list(pool.map(compile_one, ext.sources))
        subprocess.check_call([compiler, *compiled, *LINK, "-o", str(target)])


setup(
    ext_modules=[Extension("ttt_fast._C", sources=SOURCES, depends=HEADERS)],
    cmdclass={"build_ext": BuildExtension},
)
