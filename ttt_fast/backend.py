"""Which implementation of an op runs: the only place that decides.

"torch"   plain torch operations (``ttt_fast/reference.py``): the specification; everywhere
"cpp"     the C++ extension (``csrc/``), for tensors on the CPU
"triton"  the kernels in ``kernels/``, for tensors on a CUDA device; on the CPU, too, in a process
          that runs Triton's interpreter (``TRITON_INTERPRET=1``), which is for tests
"cuda"    the CUDA part of the extension (``csrc/cuda/``), where it was built with nvcc

Not every op exists in every backend: products of matrices are torch's or Triton's. Asking an op for
a backend that it lacks is an error. ``TTT_FAST_BACKEND=cpp`` is not: it says what "auto" prefers,
so an op without C++ goes on as if the variable were not set. A setting for a whole run, as
``TTTConfig(backend="cpp")``, is meant likewise: :func:`ttt_fast.ops.backend_for` makes of it what
each op is asked for.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

BACKENDS = ("torch", "cpp", "triton", "cuda")

# Preference per device type; the first one that is available serves "auto".
_PREFERENCE: dict[str, tuple[str, ...]] = {
    "cpu": ("cpp", "torch"),
    "cuda": ("triton", "cuda", "torch"),
}
_RUNS_ON: dict[str, tuple[str, ...]] = {"cpp": ("cpu",), "triton": ("cuda",), "cuda": ("cuda",)}


def _load_extension() -> str:
    """Load the C++ extension; return "ok" or the reason why it is not there."""
    libraries = sorted(Path(__file__).parent.glob("_C*.so"))
    if not libraries:
        return (
            "the C++ extension is not built; reinstall with g++ on PATH "
            "(pip install . --no-build-isolation)"
        )
    try:
        torch.ops.load_library(str(libraries[0]))
    except OSError as error:
        return f"{libraries[0].name} does not load: {error}"
    return "ok"


_EXTENSION_STATUS = _load_extension()


def triton_interprets() -> bool:
    """Whether Triton's interpreter is on, so that its kernels run on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on")


def _triton_status() -> str:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install triton)"
    return "ok" if triton_interprets() else _cuda_device_status()


def _cuda_device_status() -> str:
    return "ok" if torch.cuda.is_available() else "there is no CUDA device"


def _cuda_status() -> str:
    if _EXTENSION_STATUS != "ok":
        return _EXTENSION_STATUS
    if not hasattr(torch.ops.ttt_fast_cuda, "sgd_"):
        return (
            "the extension was built without CUDA; reinstall with nvcc on PATH, or use "
            "backend='triton'"
        )
    return _cuda_device_status()


_KNOWN: dict[str, str] = {}


# No answer changes in a process, and every call of an op asks. A dict and not functools.cache, of
# which torch.compile warns.
def _status(backend: str) -> str:
    if backend not in _KNOWN:
        _KNOWN[backend] = _triton_status() if backend == "triton" else _cuda_status()
    return _KNOWN[backend]


def available_backends() -> dict[str, str]:
    """Return, for each backend, "ok" or the reason why it cannot be used here."""
    return {
        "torch": "ok",
        "cpp": _EXTENSION_STATUS,
        "triton": _status("triton"),
        "cuda": _status("cuda"),
    }


def backends_on(device_type: str, interpreted: bool | None = None) -> tuple[str, ...]:
    """Return the backends that work on tensors of a device, available or not.

    Args:
        device_type: "cpu", "cuda", ...
        interpreted: whether Triton runs on the CPU; default :func:`triton_interprets`.
    """
    if interpreted is None:
        interpreted = triton_interprets()
    return tuple(
        name
        for name in BACKENDS
        if device_type in _RUNS_ON.get(name, (device_type,))
        or (name == "triton" and device_type == "cpu" and interpreted)
    )


def resolve_backend(
    device_type: str,
    requested: str = "auto",
    available: Mapping[str, str] | None = None,
    override: str | None = None,
    implemented: Sequence[str] = BACKENDS,
    op: str = "this op",
    interpreted: bool | None = None,
) -> str:
    """Choose the backend for tensors on a device. Pure when all arguments are given.

    An explicit request is honoured or refused, never replaced by something else. ``override`` is a
    preference: an op that lacks that backend goes on as for "auto".

    Args:
        device_type: "cpu", "cuda", ... (``tensor.device.type``).
        requested: "auto" or one of ``BACKENDS``.
        available: backend -> "ok" or reason; default :func:`available_backends`.
        override: what "auto" means; default the environment variable ``TTT_FAST_BACKEND``.
        implemented: the backends that the op exists in.
        op: its name, for messages.
        interpreted: as for :func:`backends_on`.

    Raises:
        ValueError: unknown name, or the requested backend cannot run there or lacks the op.
    """
    available = available_backends() if available is None else available
    if override is None:
        override = os.environ.get("TTT_FAST_BACKEND", "auto")
    source = "backend"
    if requested == "auto" and (override not in BACKENDS or override in implemented):
        requested, source = override, "TTT_FAST_BACKEND"
    if requested == "auto":
        preference = _PREFERENCE.get(device_type, ("torch",))
        return next(n for n in preference if n in implemented and available[n] == "ok")
    if requested not in BACKENDS:
        raise ValueError(
            f"{source}={requested!r} is unknown; use one of 'auto',"
            f" {', '.join(map(repr, BACKENDS))}."
        )
    if requested not in implemented:
        raise ValueError(
            f"{op}: {source}={requested!r} was asked for but the op exists only in "
            f"{', '.join(map(repr, implemented))}; use backend='auto'."
        )
    if available[requested] != "ok":
        raise ValueError(
            f"{source}={requested!r} was asked for but {available[requested]}. "
            "Or use backend='torch'."
        )
    if requested not in backends_on(device_type, interpreted):
        raise ValueError(
            f"{source}={requested!r} runs on {', '.join(_RUNS_ON[requested])}, but the tensors are"
            f" on {device_type}. Use backend='auto' or 'torch'."
        )
    return requested
