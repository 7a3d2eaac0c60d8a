"""Which modules' parameters can be factored, and what stands in for those modules."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from ttt_fast.engines.desk import Desk
from ttt_fast.engines.factors import MatrixFactors, VectorFactors
from ttt_fast.engines.norms import NormSite
from ttt_fast.engines.takeover import EmbeddingSite, LinearSite
from ttt_fast.scope import is_compiled
from ttt_fast.selection import Selection

Site = LinearSite | EmbeddingSite | NormSite


def owning_modules(
    model: nn.Module, by_param: Mapping[int, Any]
) -> Iterator[tuple[str, nn.Module, dict[str, Any]]]:
    """Every module that owns some of the parameters, tied ones at each of their places.

    Args:
        model: the model.
        by_param: parameter's id -> what to give for it.

    Yields:
        The module's name, the module, and attribute -> what ``by_param`` has for it.
    """
    for name, module in model.named_modules():
        own = {
            attribute: by_param[id(param)]
            for attribute, param in module.named_parameters(recurse=False)
            if id(param) in by_param
        }
        if own:
            yield name, module, own


def _is_linear(module: nn.Module) -> bool:
    return type(module).forward in (nn.Linear.forward, Conv1D.forward)


def _is_embedding(module: nn.Module) -> bool:
    return isinstance(module, nn.Embedding)


def _is_norm(module: nn.Module) -> bool:
    """A module with nothing but vectors as wide as its one input: LayerNorm, and every RMSNorm."""
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        return type(module).forward in (nn.LayerNorm.forward, nn.RMSNorm.forward)
    params = dict(module.named_parameters(recurse=False))
    return (
        not any(True for _ in module.children())
        and "weight" in params
        and set(params) <= {"weight", "bias"}
        and all(p.dim() == 1 for p in params.values())
        and "norm" in type(module).__name__.lower()
        and len(inspect.signature(type(module).forward).parameters) == 2
    )


def unsupported(model: nn.Module, selections: Sequence[Selection]) -> list[str]:
    """Why parameters cannot be factored, a phrase each; empty if all can."""
    reasons = []
    if is_compiled(model):
        reasons.append("a model under torch.compile: its graph does not see the modules change")
    for name, module, own in owning_modules(model, {id(s.param): s for s in selections}):
        for selection in own.values():
            reason = _reason(module, selection)
            if reason is None and "forward" in vars(module):
                reason = "its forward was replaced on the instance"
            if reason is not None:
                reasons.append(
                    f"{selection.name} of {name or 'the model'} ({type(module).__name__}): {reason}"
                )
    return reasons


def _reason(module: nn.Module, selection: Selection) -> str | None:
    if selection.param.dim() > 2:
        return f"a {selection.param.dim()}-D tensor of experts has no factors for each token"
    if _is_linear(module) or _is_norm(module):
        return None
    if _is_embedding(module):
        if module.max_norm is not None or module.scale_grad_by_freq or module.sparse:
            return "max_norm, scale_grad_by_freq and sparse are not supported"
        return None
    return "it is neither a plain linear, an embedding nor a norm"


def take_over(
    model: nn.Module, selections: Sequence[Selection], desk: Desk, backend: str
) -> tuple[list[MatrixFactors | VectorFactors], list[Site]]:
    """Factors of each selection, and what stands in for the modules that own them."""
    by_id = {id(selection.param): selection for selection in selections}
    owners: dict[int, list[nn.Module]] = {param: [] for param in by_id}
    for _, module, own in owning_modules(model, by_id):
        for selection in own.values():
            owners[id(selection.param)].append(module)
    by_param: dict[int, MatrixFactors | VectorFactors] = {}
    for param, selection in by_id.items():
        if selection.param.dim() == 1:
            by_param[param] = VectorFactors(selection)
        else:
            by_param[param] = MatrixFactors(
                selection,
                transposed=any(isinstance(m, Conv1D) for m in owners[param]),
                embeds=any(_is_embedding(m) for m in owners[param]),
            )
    sites: list[Site] = []
    for name, module, own in owning_modules(model, by_param):
        if _is_linear(module):
            sites.append(LinearSite(name, module, own.get("weight"), own.get("bias"), desk))
        elif _is_embedding(module):
            sites.append(EmbeddingSite(name, module, own["weight"], desk))
        else:
            sites.append(NormSite(name, module, own, desk, backend))
    return list(by_param.values()), sites
