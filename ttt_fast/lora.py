"""A delta as a LoRA adapter that peft loads. peft itself is not needed to write one."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ttt_fast.engines import deltas
from ttt_fast.engines.factorable import owning_modules
from ttt_fast.engines.factors import MatrixFactors, VectorFactors

_PREFIX = "base_model.model."


@dataclass(frozen=True)
class LoraAdapter:
    """A delta of low rank, in peft's names.

    Attributes:
        config: what ``adapter_config.json`` holds.
        tensors: what ``adapter_model.safetensors`` holds.
        errors: parameter -> ‖ΔW − what the adapter adds‖ / ‖ΔW‖: truncation, rounding, and decay
            that was dropped; 0 where ΔW is 0.
        error: the same over all parameters together.
    """

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    errors: dict[str, float]
    error: float

    @property
    def rank(self) -> int:
        """The rank r of every matrix."""
        return self.config["r"]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the folder that ``peft.PeftModel.from_pretrained(model, path)`` reads."""
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.config, indent=2, sort_keys=True)
        (folder / "adapter_config.json").write_text(text + "\n")
        tensors = {name: tensor.cpu().contiguous() for name, tensor in self.tensors.items()}
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def lora_adapter(
    model: nn.Module,
    factors: Sequence[MatrixFactors | VectorFactors],
    delta: int,
    rank: int,
    decay: str,
) -> LoraAdapter:
    """See :meth:`ttt_fast.factored_adaptation.FactoredAdaptation.to_lora`."""
    _check(model, factors, delta, rank, decay)
    by_param = {id(each.selection.param): each for each in factors}
    matrices = [each for each in factors if isinstance(each, MatrixFactors)]
    pairs = {id(m.selection.param): deltas.low_rank(m, delta, rank) for m in matrices}
    r = max([1, *(a.shape[0] for _, a in pairs.values())])
    tensors: dict[str, Tensor] = {}
    targets, to_save, biases = [], [], {}
    for name, module, own in owning_modules(model, by_param):
        if isinstance(module, nn.Embedding):
            b, a = _padded(*pairs[id(module.weight)], r)
            tensors[f"{_PREFIX}{name}.lora_embedding_A"] = b.t()
            tensors[f"{_PREFIX}{name}.lora_embedding_B"] = a.t()
            targets.append(name)
        elif isinstance(module, nn.Linear | Conv1D):
            n_out, n_in = _sizes(module)
            nothing = module.weight.new_zeros(n_out, 0), module.weight.new_zeros(0, n_in)
            b, a = _padded(*pairs.get(id(module.weight), nothing), r)
            tensors[f"{_PREFIX}{name}.lora_A.weight"] = a
            tensors[f"{_PREFIX}{name}.lora_B.weight"] = b
            targets.append(name)
            if "bias" in own:
                biases[name] = own["bias"]
        else:
            for attribute, param in module.named_parameters(recurse=False):
                value = param.detach().clone()
                if attribute in own:
                    deltas.adapt_(value, own[attribute], delta)
                tensors[f"{_PREFIX}{name}.{attribute}"] = value
            to_save.append(name)
    if biases:
        _add_biases(model, tensors, targets, biases, delta)
    config = _config(model, r, targets, to_save, bool(biases))
    exact = {id(bias) for bias in biases.values()}
    errors = {each.selection.name: _error(each, delta, pairs, exact) for each in factors}
    lost, whole = (sum(values) for values in zip(*errors.values(), strict=True))
    relative = {name: _ratio(*error) for name, error in errors.items()}
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    return LoraAdapter(config, tensors, relative, _ratio(lost, whole))


def _check(
    model: nn.Module,
    factors: Sequence[MatrixFactors | VectorFactors],
    delta: int,
    rank: int,
    decay: str,
) -> None:
    """Refuse what an adapter cannot say, before anything is computed."""
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise ValueError(f"to_lora: rank={rank!r}; it must be an integer >= 1.")
    if decay not in ("refuse", "drop"):
        raise ValueError(f"to_lora: decay={decay!r} is unknown; use 'refuse' or 'drop'.")
    if hasattr(model, "peft_config"):
        raise ValueError(
            "to_lora: the model is a peft model already, and peft puts no adapter on an adapter."
            " Use merge(copy=True), save(), or peft's own save_pretrained after merge()."
        )
    by_param = {id(each.selection.param): each for each in factors}
    for name, module, _ in owning_modules(model, by_param):
        own_forward = type(module).forward is not nn.Embedding.forward
        if isinstance(module, nn.Embedding) and own_forward:
            raise ValueError(
                f"to_lora: {name} is a {type(module).__name__}, which scales or shifts around its"
                " lookup; not every version of peft does so for an adapter. Leave it out of the"
                " scope, or use merge(copy=True) or save()."
            )
    if decay == "drop":
        return
    for each in factors:
        rho = float(each.track.coefficients.rho[delta])
        if isinstance(each, MatrixFactors) and rho != 1.0:
            raise ValueError(
                f"to_lora: weight decay has scaled {each.selection.name} by {rho:.6g}, a change of"
                " full rank that no adapter can hold. Pass decay='drop' to leave it out (errors"
                " says what that costs), adapt with weight_decay=0, or use merge(copy=True)."
            )


def _sizes(module: nn.Module) -> tuple[int, int]:
    rows, columns = module.weight.shape
    return (columns, rows) if isinstance(module, Conv1D) else (rows, columns)


def _padded(b: Tensor, a: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Zeros up to the rank that all matrices of an adapter share."""
    missing = rank - a.shape[0]
    pad = nn.functional.pad
    return pad(b, (0, missing)), pad(a, (0, 0, 0, missing))


def _add_biases(
    model: nn.Module,
    tensors: dict[str, Tensor],
    targets: list[str],
    biases: dict[str, VectorFactors],
    delta: int,
) -> None:
    """Changes of biases go with lora_B, which then has one in every linear that is a target."""
    for name in targets:
        module = model.get_submodule(name)
        if isinstance(module, nn.Embedding):
            raise ValueError(
                f"to_lora: the biases of linears and the embedding {name} have both adapted, and"
                " peft's lora_bias=True does not take embeddings. Leave one of them out of the"
                " scope, or use merge(copy=True) or save()."
            )
        n_out, _ = _sizes(module)
        like = tensors[f"{_PREFIX}{name}.lora_B.weight"]
        change = like.new_zeros(n_out)
        if name in biases:
            change = deltas.vector_change(biases[name], delta)
        tensors[f"{_PREFIX}{name}.lora_B.bias"] = change


def _config(
    model: nn.Module, rank: int, targets: list[str], to_save: list[str], lora_bias: bool
) -> dict[str, Any]:
    conv = any(isinstance(model.get_submodule(name), Conv1D) for name in targets)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": getattr(getattr(model, "config", None), "_name_or_path", ""),
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,  # peft multiplies by alpha / r
        "lora_dropout": 0.0,
        "bias": "none",
        "lora_bias": lora_bias,
        "fan_in_fan_out": conv,
        "target_modules": targets,
        "modules_to_save": to_save or None,
    }


def _error(
    factors: MatrixFactors | VectorFactors,
    delta: int,
    pairs: dict[int, tuple[Tensor, Tensor]],
    exact: set[int],
) -> tuple[float, float]:
    """Squares of what is lost of a change, and of the change."""
    if isinstance(factors, MatrixFactors):
        return deltas.squared_error(factors, delta, *pairs[id(factors.selection.param)])
    rounding, square = deltas.squared_rounding(factors, delta)
    return (0.0 if id(factors) in exact else rounding), square


def _ratio(lost: float, whole: float) -> float:
    return (lost / whole) ** 0.5 if whole > 0 else 0.0
