"""What ``ttt-fast doctor`` says: versions, backends, and the memory that a run would need."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from ttt_fast import Selection, TTTConfig, __version__, select_parameters
from ttt_fast.backend import available_backends
from ttt_fast.demo import demo_model_folder
from ttt_fast.naive import prompt_loss
from ttt_fast.reference import compute_dtype


def system() -> dict[str, Any]:
    """Versions, processors and, for each backend, "ok" or why it is not available."""
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
        "backends": available_backends(),
    }


def memory(name: str, config: TTTConfig, dtype: str, tokens: int) -> dict[str, Any]:
    """Memory that an adaptation needs, from the model's configuration alone: no weight is loaded.

    Args:
        name: folder, hub name or "demo".
        config: settings; scope, layers, optimizer, momentum, accumulate and snapshot matter. The
            number of steps does not: from step to step nothing is kept but the optimizer's state.
        dtype: "auto" (the configuration's own) or a torch dtype's name.
        tokens: prompt length.

    Returns:
        numbers of parameters, and bytes by use; "activations" is None where the forward looks at
        values.

    Raises:
        ValueError: unknown architecture or scope.
        OSError: there is no such model.
    """
    with FakeTensorMode():
        model = _weightless_model(name, dtype)
        selections = select_parameters(model, config.scope, config.layers)
        views = [selection.view() for selection in selections]
        activation_bytes = _saved_bytes(model, selections, tokens)
    selected_bytes = sum(view.nbytes for view in views)
    wide_bytes = sum(view.numel() * compute_dtype(view.dtype).itemsize for view in views)
    if config.optimizer == "adamw":
        state_bytes = 2 * (selected_bytes if config.rounding == "torch" else wide_bytes)
    else:
        state_bytes = selected_bytes if config.momentum > 0 else 0
    needs = {
        "snapshot": selected_bytes,
        "gradients": selected_bytes,
        "optimizer": state_bytes,
        "delta": wide_bytes if config.accumulate == "delta" else 0,
        "activations": activation_bytes,
    }
    return {
        "model": name,
        "dtype": str(model.dtype).removeprefix("torch."),
        "scope": str(config.scope),
        "steps": config.steps,
        "tokens": tokens,
        "snapshot_where": config.snapshot,
        "parameters": sum(param.numel() for param in model.parameters()),
        "selected_parameters": sum(selection.numel for selection in selections),
        "selected_tensors": len(selections),
        "model_bytes": sum(param.nbytes for param in model.parameters()),
        "bytes": needs,
        "total_bytes": sum(value or 0 for value in needs.values()),
    }


def page(report: dict[str, Any]) -> str:
    """The report for people."""
    facts = report["system"]
    lines = [f"{name:<14} {version}" for name, version in facts["versions"].items()]
    lines += [
        f"{'platform':<14} {facts['platform']}, {facts['cores']} cores, {facts['threads']} threads,"
        f" {facts['cpu_capability']}",
        f"{'cuda devices':<14} {', '.join(facts['cuda_devices']) or 'none'}",
    ]
    lines += [
        f"backend {name:<6} {'available' if state == 'ok' else f'not available: {state}'}"
        for name, state in facts["backends"].items()
    ]
    if "memory" in report:
        lines += ["", *_memory_lines(report["memory"])]
    return "\n".join(lines)


def _memory_lines(need: dict[str, Any]) -> list[str]:
    words = {
        "snapshot": {
            "device": "a copy of the selected weights",
            "host": "a copy of the selected weights, in host memory",
            "undo": "at most; 6 bytes for each weight that a step changes",
        }[need["snapshot_where"]],
        "gradients": "one for each selected weight, reused from step to step",
        "optimizer": "momentum, or AdamW's two moments",
        "delta": "fp32, with accumulate=delta",
        "activations": f"saved for the backward pass of {need['tokens']} tokens, one prompt",
    }
    lines = [
        f"{need['model']} in {need['dtype']}: {need['parameters'] / 1e6:.1f} M parameters, "
        f"{_mib(need['model_bytes'])}",
        f"scope {need['scope']}: {need['selected_parameters'] / 1e6:.1f} M parameters in "
        f"{need['selected_tensors']} tensors",
        f"needed above the model for {need['steps']} steps (any number needs the same):",
    ]
    for use, number in need["bytes"].items():
        if number != 0:
            size = "unknown" if number is None else _mib(number)
            lines.append(f"  {use:<12} {size:>14}   {words[use]}")
    lines.append(f"  {'total':<12} {_mib(need['total_bytes']):>14}")
    return lines


def _mib(number: int) -> str:
    return f"{number / 2**20:,.1f} MiB"


def _weightless_model(name: str, dtype: str) -> nn.Module:
    """The model without storage; call it under a FakeTensorMode."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(demo_model_folder() if name == "demo" else name)
    wanted = getattr(config, "dtype", None) if dtype == "auto" else dtype
    if not isinstance(wanted, torch.dtype):
        wanted = getattr(torch, wanted or "float32")
    return AutoModelForCausalLM.from_config(config, dtype=wanted).eval()


def _saved_bytes(model: nn.Module, selections: Sequence[Selection], tokens: int) -> int | None:
    """Bytes that autograd saves in one forward, without computing anything.

    Weights are not counted, and tensors that share a storage count once. On SmolLM2-135M at 256
    tokens this is 8 % above what a real forward saves.
    """
    weights = {param.untyped_storage()._cdata for param in model.parameters()}
    model.requires_grad_(False)
    for selection in selections:
        selection.param.requires_grad_(True)
    saved: dict[
        int, Tensor
    ] = {}  # holding the tensor keeps its storage's address from being reused

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()._cdata
        if storage not in weights:
            saved[storage] = tensor
        return tensor

    try:
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            prompt_loss(model, torch.zeros(1, tokens, dtype=torch.int64))
    except DataDependentOutputException:
        return None
    return sum(tensor.untyped_storage().nbytes() for tensor in saved.values())
