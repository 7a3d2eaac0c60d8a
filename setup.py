"""Compiles csrc/ into ttt_fast/_C.so; everything else about the package is in pyproject.toml.

The library registers operators through torch's stable ABI; ``torch.ops.load_library`` loads it
(ttt_fast/backend.py). It is no Python module and links no Python, so that its name carries no
Python version. The CUDA kernels are in it where nvcc is found: TTT_FAST_CUDA=0 leaves them out, =1
insists; TORCH_CUDA_ARCH_LIST="8.0;9.0" names the GPUs, NVCC and CXX the compilers.
"""

import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

CXX = os.environ.get("CXX", "g++")
NVCC = shutil.which(os.environ.get("NVCC", "nvcc")) or shutil.which("/usr/local/cuda/bin/nvcc")
CUDA = os.environ.get("TTT_FAST_CUDA", "1 if nvcc works")
TORCH = Path(torch.__file__).parent
# Products and sums are rounded one by one, as in ttt_fast/reference.py. No result depends on the
# next two; with them GCC vectorises. A binary for the ABI of torch 2.10 is one for later ones, too.
CXX_FLAGS = ["-std=c++17", "-O3", "-Wall", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off"]
CXX_FLAGS += ["-fno-math-errno", "-fno-trapping-math", "-isystem", str(TORCH / "include")]
CXX_FLAGS += ["-DTORCH_TARGET_VERSION=0x020a000000000000"]
NVCC_FLAGS = ["-std=c++17", "-O3", "-fmad=false", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
LINK = ["-shared", f"-L{TORCH / 'lib'}", "-Xlinker", "--no-as-needed", "-ltorch_cpu", "-lc10"]


class BuildExtension(build_ext):
    """Call the compilers directly: all files at once, no flags inherited from Python's build."""

    def get_ext_filename(self, fullname: str) -> str:
        """Name the library without the tag of a Python version."""
        return str(Path(*fullname.split("."))) + ".so"

    def compile(self, pattern: str, *command: str) -> list[str]:
        """Compile the sources in parallel and return the object files."""
        objects = {str(s): str(Path(self.build_temp, s.name + ".o")) for s in Path().glob(pattern)}
        Path(self.build_temp).mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            commands = [[*command, "-c", s, "-o", o] for s, o in objects.items()]
            list(pool.map(subprocess.check_call, commands))
        return list(objects.values())

    def compile_cuda(self) -> tuple[list[str], str]:
        """Object files with machine code for each architecture and PTX for later ones."""
        known = subprocess.check_output([NVCC, "--list-gpu-arch"], text=True).split()
        usual = " ".join(name for name in ("80", "90", "100") if f"compute_{name}" in known)
        names = re.findall(r"\d+", os.environ.get("TORCH_CUDA_ARCH_LIST", usual).replace(".", ""))
        code = [f"-gencode=arch=compute_{name},code=[sm_{name},compute_{name}]" for name in names]
        objects = self.compile("csrc/cuda/*.cu", NVCC, *NVCC_FLAGS, *code)
        objects += self.compile("csrc/ops_cuda.cpp", CXX, *CXX_FLAGS)
        return objects, f"with CUDA kernels for sm_{', sm_'.join(names)}"

    def build_extension(self, ext: Extension) -> None:
        """Compile and link; without CUDA kernels where nvcc fails and nobody insisted on them."""
        for tool, found in ((CXX, shutil.which(CXX)), ("nvcc", NVCC or CUDA != "1")):
            if not found:
                advice = "Debian, Ubuntu: sudo apt-get install g++; or set CXX, NVCC, TTT_FAST_CUDA"
                raise SystemExit(f"ttt_fast: the compiler {tool!r} was not found ({advice}).")
        cuda, built = [], f"without CUDA kernels: TTT_FAST_CUDA={CUDA}, nvcc is {NVCC}"
        try:
            if CUDA != "0" and NVCC is not None:
                cuda, built = self.compile_cuda()
        except subprocess.CalledProcessError:
            if CUDA == "1":
                raise
        objects = self.compile("csrc/*ops.cpp", CXX, *CXX_FLAGS, f'-DTTT_FAST_BUILT="{built}"')
        objects += self.compile("csrc/cpu/*.cpp", CXX, *CXX_FLAGS)
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        # nvcc knows where its run-time library is.
        subprocess.check_call([NVCC if cuda else CXX, *objects, *cuda, *LINK, "-o", str(target)])


setup(ext_modules=[Extension("ttt_fast._C", sources=[])], cmdclass={"build_ext": BuildExtension})
