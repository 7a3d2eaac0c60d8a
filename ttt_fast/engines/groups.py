"""Parameter groups: which of the configuration's overrides acts on which selection."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ttt_fast.config import TTTConfig
from ttt_fast.scope import select_parameters
from ttt_fast.selection import Selection


def group_of_each(
    model: nn.Module, selections: Sequence[Selection], config: TTTConfig
) -> list[int]:
    """Number of the first entry of param_groups that matches each selection, -1 for none.

    Raises:
        ValueError: a group has no parameter left to act on.
    """
    members = [
        {id(s.param) for s in select_parameters(model, group["params"])}
        for group in config.param_groups
    ]
    chosen = []
    for selection in selections:
        matches = (i for i, ids in enumerate(members) if id(selection.param) in ids)
        chosen.append(next(matches, -1))
    for i in range(len(members)):
        if i not in chosen:
            raise ValueError(
                f"TTTConfig: param_groups[{i}] with params={config.param_groups[i]['params']!r} has"
                f" no parameter of scope {config.scope!r} left to act on. Widen the scope or drop"
                " it."
            )
    return chosen


def numbers(config: TTTConfig) -> tuple[object, ...]:
    """What the steps take from settings as numbers, a schedule written out."""
    rates = tuple(config.lr_at(step) for step in range(config.steps))
    return (
        rates, config.momentum, config.dampening, config.nesterov, config.weight_decay,
        config.decoupled_weight_decay, config.max_grad_norm, config.betas, config.eps,
    )  # fmt: skip


def group_config(config: TTTConfig, group: int) -> TTTConfig:
    """The settings of a group, -1 for the parameters that no group names."""
    return config if group < 0 else config.for_group(config.param_groups[group])
