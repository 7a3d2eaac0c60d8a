"""What ``ttt-fast doctor`` says: versions, backends, speeds, and what a run would need.

For a model it names the engine that would adapt it, why, and the memory, from the model's
configuration alone. ``--calibrate`` measures the speeds that the choice rests on.
"""

from __future__ import annotations

import ctypes
import dataclasses
import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ttt_fast import TTTConfig, __version__, calibration, select_parameters
from ttt_fast.backend import available_backends
from ttt_fast.demo import demo_model_folder
from ttt_fast.engines import policy
from ttt_fast.engines.budget import needed


def report(
    config: TTTConfig,
    *,
    model: str | None = None,
    dtype: str = "auto",
    tokens: int = 256,
    deltas: int = 1,
    calibrate: bool = False,
) -> dict[str, Any]:
    """Everything that ``ttt-fast doctor`` says, as one JSON-able dict.

    Args:
        config: settings of the run.
        model: folder, hub name or "demo"; None for the machine alone.
        dtype: "auto" (the configuration's own) or a torch dtype's name.
        tokens: prompt length.
        deltas: prompts that adapt at once.
        calibrate: measure the machine's speeds first (half a minute for each dtype, with a bar on
            stderr) and keep them for later runs.

    Returns:
        "system" (:func:`system`), "machine" (dtype -> the speeds in use), and with a model "memory"
        (:func:`memory`) and "engine" (the policy's choice).

    Raises:
        ValueError: unknown architecture or scope, or an engine that cannot do it.
        OSError: there is no such model, or the cache folder cannot be written.
    """
    result: dict[str, Any] = {"system": system()}
    dtypes = ["float32", "bfloat16"] if dtype == "auto" else [dtype]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for name in dtypes if calibrate else ():
        calibration.calibrate(name, device)
    if model is not None:
        plan = _plan(model, config, dtype, tokens, deltas, device)
        result["memory"], result["engine"] = plan
        dtypes = [plan[0]["dtype"]]
    result["machine"] = {
        name: dataclasses.asdict(calibration.machine(name, device)) for name in dtypes
    }
    return result


def system() -> dict[str, Any]:
    """Versions, processors, what was built and, for each backend, "ok" or why it is not there."""
    versions = {"ttt_fast": __version__, "python": platform.python_version()}
    for package in ("torch", "triton", "transformers", "numpy"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "versions": versions,
        "platform": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cuda_devices": devices,
        "extension": extension(),
        "backends": available_backends(),
    }


def extension() -> str:
    """What setup.py put into the C++ extension, and why; "not built" where there is none."""
    libraries = sorted(Path(__file__).parent.glob("_C*.so"))
    if not libraries or available_backends()["cpp"] != "ok":
        return "not built"
    built = ctypes.CDLL(str(libraries[0])).ttt_fast_built
    built.restype = ctypes.c_char_p
    return built().decode()


def memory(
    name: str, config: TTTConfig, dtype: str, tokens: int, deltas: int = 1
) -> dict[str, Any]:
    """Memory that an adaptation needs, from the model's configuration alone: no weight is loaded.

    Args:
        name: folder, hub name or "demo".
        config: settings.
        dtype: "auto" (the configuration's own) or a torch dtype's name.
        tokens: prompt length.
        deltas: prompts that adapt at once.

    Returns:
        numbers of parameters, the engine that would run, and bytes by use above the model: those
        that a ``memory_budget`` is held against.

    Raises:
        ValueError: unknown architecture or scope, or an engine that cannot do it.
        OSError: there is no such model.
    """
    return _plan(name, config, dtype, tokens, deltas, "cpu")[0]


def _plan(
    name: str, config: TTTConfig, dtype: str, tokens: int, deltas: int, device: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Memory and engine of a run."""
    model = _weightless_model(name, dtype)
    selections = select_parameters(model, config.scope, config.layers)
    limit = config.memory_budget or policy.free_bytes(device)
    work = policy.workload(model, selections, config, deltas, tokens, limit)
    if device == "cpu" and config.kv == "exact":
        work = dataclasses.replace(work, n_labels=max(1, tokens - 1))
    speeds = calibration.machine(model.dtype, device)
    choice = policy.choose(work, speeds, config.engine)
    work = dataclasses.replace(work, checkpointing=choice.checkpointing)
    needs = needed(work, choice.engine, choice.deltas_at_once)
    report = {
        "model": name,
        "dtype": str(model.dtype).removeprefix("torch."),
        "scope": str(config.scope),
        "steps": config.steps,
        "tokens": tokens,
        "deltas": deltas,
        "engine": choice.engine,
        "snapshot_where": config.snapshot,
        "parameters": sum(param.numel() for param in model.parameters()),
        "selected_parameters": sum(selection.numel for selection in selections),
        "selected_tensors": len(selections),
        "model_bytes": sum(param.nbytes for param in model.parameters()),
        "bytes": needs,
        "total_bytes": sum(needs.values()),
    }
    return report, dataclasses.asdict(choice)


def page(report: dict[str, Any]) -> str:
    """The report for people."""
    facts = report["system"]
    lines = [f"{name:<14} {version}" for name, version in facts["versions"].items()]
    lines += [
        f"{'platform':<14} {facts['platform']}, {facts['cores']} cores, {facts['threads']} threads,"
        f" {facts['cpu_capability']}",
        f"{'cuda devices':<14} {', '.join(facts['cuda_devices']) or 'none'}",
        f"{'extension':<14} {facts['extension']}",
    ]
    lines += [
        f"backend {name:<6} {'available' if state == 'ok' else f'not available: {state}'}"
        for name, state in facts["backends"].items()
    ]
    lines += [f"speeds {name:<7} {speeds['source']}" for name, speeds in report["machine"].items()]
    if "memory" in report:
        lines += ["", *_memory_lines(report["memory"]), *_engine_lines(report["engine"])]
    return "\n".join(lines)


def _memory_lines(need: dict[str, Any]) -> list[str]:
    words = {
        "snapshot": {
            "device": "a copy of the selected weights",
            "host": "a copy of the selected weights, in host memory",
            "undo": "at most; 6 bytes for each weight that a step changes",
        }[need["snapshot_where"]],
        "gradients": "of the layers for which factors would cost more, reused from step to step",
        "optimizer": "momentum, or AdamW's two moments",
        "delta": "fp32, with accumulate=delta",
        "weights": "of the deltas that wait for their turn",
        "factors": f"of {need['steps']} steps; in place of gradients, momentum and snapshot",
        "keys_values": "frozen ones of the prompts",
        "activations": f"saved for the backward pass of {need['tokens']} tokens",
        "logits": "that are there at the same time, besides",
    }
    lines = [
        f"{need['model']} in {need['dtype']}: {need['parameters'] / 1e6:.1f} M parameters, "
        f"{_mib(need['model_bytes'])}",
        f"scope {need['scope']}: {need['selected_parameters'] / 1e6:.1f} M parameters in "
        f"{need['selected_tensors']} tensors",
        f"needed above the model by the {need['engine']} engine for {need['steps']} steps on "
        f"{need['deltas']} prompt{'s' * (need['deltas'] != 1)}:",
    ]
    for use, number in need["bytes"].items():
        if number != 0:
            lines.append(f"  {use:<12} {_mib(number):>14}   {words[use]}")
    lines.append(f"  {'total':<12} {_mib(need['total_bytes']):>14}")
    return lines


def _engine_lines(choice: dict[str, Any]) -> list[str]:
    ms = choice["predicted_ms"]
    return [
        f"engine {choice['reason']}",
        "  predicted for one step of one prompt: "
        + ", ".join(f"{name} {milliseconds:.1f} ms" for name, milliseconds in ms.items()),
    ]


def _mib(number: int) -> str:
    return f"{number / 2**20:,.1f} MiB"


def _weightless_model(name: str, dtype: str) -> nn.Module:
    """The model without storage."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(demo_model_folder() if name == "demo" else name)
    wanted = getattr(config, "dtype", None) if dtype == "auto" else dtype
    if not isinstance(wanted, torch.dtype):
        wanted = getattr(torch, wanted or "float32")
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=wanted).eval()
