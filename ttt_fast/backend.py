"""Which implementation of an op runs: the only place that decides.

"torch"  plain torch operations (``ttt_fast/reference.py``): the specification, available everywhere
"cpp"    the C++ extension (``csrc/``), for tensors on the CPU, for the ops that have it there

Some ops are matrix products, which torch does best; they have no C++. Asking such an op for "cpp"
is an error. ``TTT_FAST_BACKEND=cpp`` is not: it says what "auto" prefers, so an op without C++ goes
on as if the variable were not set. A setting for a whole run, as ``TTTConfig(backend="cpp")``, is
meant likewise: :func:`ttt_fast.ops.backend_for` makes of it what each op is asked for.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

BACKENDS = ("torch", "cpp")

# Preference per device type; the first one that is available serves "auto".
_PREFERENCE: dict[str, tuple[str, ...]] = {"cpu": ("cpp", "torch")}
_RUNS_ON: dict[str, tuple[str, ...]] = {"cpp": ("cpu",)}


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


def available_backends() -> dict[str, str]:
    """Return, for each backend, "ok" or the reason why it cannot be used here."""
    return {"torch": "ok", "cpp": _EXTENSION_STATUS}


def resolve_backend(
    device_type: str,
    requested: str = "auto",
    available: Mapping[str, str] | None = None,
    override: str | None = None,
    implemented: Sequence[str] = BACKENDS,
    op: str = "this op",
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
    devices = _RUNS_ON.get(requested)
    if devices is not None and device_type not in devices:
        raise ValueError(
            f"{source}={requested!r} runs on {', '.join(devices)}, but the tensors are on "
            f"{device_type}. Use backend='auto' or 'torch'."
        )
    return requested
