"""What the fused optimizers share: groups, the global norm, the step, state.

A subclass says what a step does to parameters of one age (:mod:`ttt_fast.optim`).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

from ttt_fast import ops
from ttt_fast.selection import RowSlice, Selection
from ttt_fast.snapshot import Snapshot

Params = Iterable[Tensor | tuple[str, Tensor] | Selection | dict[str, Any]]

_SETTINGS = (
    "max_grad_norm", "clip_params", "rounding", "state_dtype", "seed", "backend", "last_grad_norm",
    "_rows",
)  # fmt: skip


class Member(NamedTuple):
    """A parameter in a step: the key of its state, the weights that change, their gradient."""

    param: Tensor
    weight: Tensor
    grad: Tensor


class FusedOptimizer(Optimizer):
    """What FusedSGD and FusedAdamW share: groups, the global norm, GradScaler, state.

    Attributes:
        max_grad_norm: clip threshold, None for no clipping. Not part of ``state_dict``.
        last_grad_norm: 0-dim tensor, what ``clip_grad_norm_`` returns: the global norm before
            clipping (of unscaled gradients) at the last step that was taken. None without
            ``max_grad_norm``; ``float("inf")`` there gives the norm and never clips.
    """

    _step_supports_amp_scaling = True  # GradScaler then leaves the scale in self.grad_scale
    # Without effect here; in the groups so that torch's optimizer can load our state_dict.
    _torch_keys: dict[str, Any] = {"foreach": None, "fused": None, "differentiable": False}
    _state_names: tuple[str, ...] = ()

    def __init__(
        self,
        params: Params,
        defaults: dict[str, Any],
        *,
        max_grad_norm: float | None,
        clip_params: Iterable[Tensor | Selection],
        rounding: str,
        state_dtype: torch.dtype | None,
        seed: int,
        snapshot: Snapshot | None,
        backend: str,
    ) -> None:
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ValueError(
                f"max_grad_norm={max_grad_norm}: it must be above 0; use None for no clipping."
            )
        if rounding not in ops.ROUNDINGS:
            known = ", ".join(map(repr, ops.ROUNDINGS))
            raise ValueError(f"rounding={rounding!r} is unknown; use one of {known}.")
        if state_dtype not in ((None,) if rounding == "torch" else (None, torch.float32)):
            raise ValueError(
                f"state_dtype={state_dtype} with rounding={rounding!r}; use None (dtype of each "
                f"parameter, as torch) or, where rounding is not 'torch', torch.float32."
            )
        self.max_grad_norm = max_grad_norm
        self.clip_params = list(dict.fromkeys(_unwrap(param) for param in clip_params))
        self.rounding = rounding
        self.state_dtype = state_dtype
        self.seed = seed
        self.snapshot = snapshot
        self.backend = backend
        self.last_grad_norm: Tensor | None = None
        self._rows: dict[Tensor, RowSlice] = {}
        self._check_clip_params()
        self._check_options(defaults)
        super().__init__(cast(Any, params), {**self._torch_keys, **defaults})

    # ------------------------------------------------------------------------ what a subclass says

    def _check_options(self, options: dict[str, Any]) -> None:
        """Raise ValueError, worded as torch's, for values of a group that cannot be."""
        lr = options["lr"]
        if isinstance(lr, Tensor) and lr.numel() != 1:
            raise ValueError("Tensor lr must be 1-element")
        if not lr >= 0.0:
            raise ValueError(f"Invalid learning rate: {lr}")
        if not options["weight_decay"] >= 0.0:
            raise ValueError(f"Invalid weight_decay value: {options['weight_decay']}")
        for key in ("amsgrad", "differentiable"):
            if options.get(key):
                raise ValueError(
                    f"{type(self).__name__} has no {key}=True. Keep torch's optimizer for this "
                    f"parameter group, or set {key}=False in it."
                )

    def _age(self, group: dict[str, Any], param: Tensor) -> int:
        """Return what must agree among parameters that are updated in one call."""
        raise NotImplementedError

    def _update(
        self, group: dict[str, Any], members: Sequence[Member], age: int, **common: Any
    ) -> None:
        """Update parameters of one group, device and age."""
        raise NotImplementedError

    # ------------------------------------------------------------------------ step

    # torch.compile leaves the step alone: it would compile anew for every step's index and lr.
    # torch.compiler.disable would import torch._dynamo with this module; this is its lazy form.
    @torch._disable_dynamo
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Clip and update every parameter that has a gradient.

        Parameters whose gradient is None are skipped whole, as torch does: no decay, no momentum.
        A step that GradScaler found to have overflowed changes nothing. For ``rounding="torch"``
        to be bitwise torch's under a GradScaler, call ``scaler.unscale_(optimizer)`` before.

        Args:
            closure: reevaluates the model and returns the loss; called with gradients enabled.

        Returns:
            What ``closure`` returned, else None.

        Raises:
            TypeError: a sparse gradient, a DTensor or FSDP shard; nothing is changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        members = [self._members(group) for group in self.param_groups]
        found_inf = getattr(self, "found_inf", None)
        # The one value that the host reads, under a GradScaler only (which reads it itself for
        # optimizers that are not fused): which step of a parameter is its first depends on it.
        if found_inf is not None and found_inf.item():
            return loss
        grad_scale = getattr(self, "grad_scale", None)
        own = list(chain.from_iterable(members))
        logged = self._logged(own)
        norm = None
        if self.max_grad_norm is not None:
            norm = self.last_grad_norm = self._global_norm(own, grad_scale)
        for group, in_group in zip(self.param_groups, members, strict=True):
            batches: dict[tuple[torch.device, int], list[Member]] = {}
            for member in in_group:
                key = (member.param.device, self._age(group, member.param))
                batches.setdefault(key, []).append(member)
            for (device, age), batch in batches.items():
                undo = None
                if self.snapshot is not None:
                    undo = self.snapshot.undo_log([logged[m.param] for m in batch])
                self._update(
                    group, batch, age, max_grad_norm=self.max_grad_norm,
                    grad_norm=None if norm is None else norm.to(device),
                    grad_scale=None if grad_scale is None else grad_scale.to(device),
                    rounding=self.rounding, seed=self._next_seed(group), undo=undo,
                    maximize=group["maximize"], lr=float(group["lr"]), backend=self.backend,
                    weight_decay=float(group["weight_decay"]),
                )  # fmt: skip
        if norm is not None and self.max_grad_norm is not None:
            owned = set(chain.from_iterable(group["params"] for group in self.param_groups))
            others = [param for param in self.clip_params if param not in owned]
            torch.nn.utils.clip_grads_with_norm_(others, self.max_grad_norm, norm)
        return loss

    def _members(self, group: dict[str, Any]) -> list[Member]:
        members = []
        for param in group["params"]:
            if param.grad is None:
                continue
            # At each step, as FSDP may have taken the parameters since the optimizer was made.
            if _obstacle(param):
                self._check_group(group)
            weight, grad = param.detach(), param.grad
            if self._rows and param in self._rows:
                rows = self._rows[param]
                weight, grad = rows.view(weight), rows.view(grad)
            members.append(Member(param, weight, grad))
        return members

    def _global_norm(self, own: Sequence[Member], grad_scale: Tensor | None) -> Tensor:
        """Norm of the gradients of ``clip_params``, in their order, and then of all others."""
        self._check_clip_params()
        counted = set(self.clip_params)
        grads = [param.grad for param in self.clip_params if param.grad is not None]
        grads += [member.grad for member in own if member.param not in counted]
        if self.rounding == "torch" and grad_scale is None:
            return torch.nn.utils.get_total_norm(grads)
        norm = ops.grad_norm(grads, backend=self.backend)
        return norm if grad_scale is None else norm / grad_scale.to(norm.device)

    def _check_group(self, group: dict[str, Any]) -> None:
        for i, param in enumerate(group["params"]):
            obstacle = _obstacle(param)
            if obstacle:
                names = group.get("param_names")
                name = repr(names[i]) if names else f"{i} of its group"
                raise TypeError(f"{type(self).__name__}: parameter {name} {obstacle}.")

    def _check_clip_params(self) -> None:
        for i, param in enumerate(self.clip_params):
            obstacle = _obstacle(param)
            if obstacle:
                raise TypeError(f"{type(self).__name__}: clip_params[{i}] {obstacle}.")

    def _next_seed(self, group: dict[str, Any]) -> int:
        """Return a seed not used before; the group keeps count, so that it is in state_dict."""
        if self.rounding != "stochastic":
            return 0
        group["rounding_seed"] += 1
        return group["rounding_seed"]

    def _logged(self, own: Sequence[Member]) -> dict[Tensor, int]:
        """Position of every parameter in the snapshot; empty without one."""
        if self.snapshot is None:
            return {}
        position = {_memory(view): i for i, view in enumerate(self.snapshot.views)}
        for member in own:
            if _memory(member.weight) not in position:
                raise ValueError(
                    f"{type(self).__name__}: a parameter of shape {tuple(member.weight.shape)} is "
                    f"not in the snapshot; make it of all that is optimized, where it is now."
                )
        return {member.param: position[_memory(member.weight)] for member in own}

    def _new_state(self, weight: Tensor) -> Tensor:
        wide = self.state_dtype or weight.dtype
        return torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, wide))

    # ------------------------------------------------------------------------ groups and state

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; ``params`` may be tensors, (name, tensor) pairs or ``Selection``s.

        Raises:
            ValueError: an option that torch refuses as well; a parameter that is listed twice.
            TypeError: a complex parameter, a DTensor or FSDP shard.
        """
        params = param_group["params"]
        if isinstance(params, Tensor | Selection):
            params = [params]
        if not isinstance(params, set):  # a set is for torch to refuse
            params = list(params)
        rows: dict[Tensor, RowSlice] = {
            item.param: item.rows
            for item in params
            if isinstance(item, Selection) and item.rows is not None
        }
        group = {**param_group, "params": type(params)(_unwrap(item) for item in params)}
        self._check_options({**self.defaults, **group})
        super().add_param_group(group)
        try:
            self._check_group(group)
            if len(set(group["params"])) < len(group["params"]):
                raise ValueError(
                    "A parameter is listed twice; list it once, with at most one row slice."
                )
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise
        self._rows.update(rows)
        if self.rounding == "stochastic":
            # Far apart for every (seed, group): two tensors must not share their random bits.
            start = random.Random(f"{self.seed}/{len(self.param_groups) - 1}").getrandbits(62)
            group.setdefault("rounding_seed", start)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of this class or of torch's optimizer of the same name.

        Options that torch's groups do not have (decoupled_weight_decay, ...) stay as they are here.

        Raises:
            ValueError: amsgrad or differentiable are on in a group, or groups of other sizes.
        """
        for group in state_dict["param_groups"]:
            self._check_options({**self.defaults, **group})
        super().load_state_dict(state_dict)
        saved_keys = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        params = chain.from_iterable(group["params"] for group in self.param_groups)
        for key, param in zip(saved_keys, params, strict=True):
            state = self.state.get(param, {})
            if "step" in state:  # torch's fused and capturable optimizers keep it on the device
                state["step"] = torch.as_tensor(state["step"], dtype=torch.float32, device="cpu")
            if self.state_dtype is None:
                continue
            for name in self._state_names:  # torch has cast them to the parameter's dtype
                if state.get(name) is not None:
                    wide = torch.promote_types(param.dtype, self.state_dtype)
                    state[name] = state_dict["state"][key][name].to(param.device, wide)

    def __getstate__(self) -> dict[str, Any]:
        # torch keeps three attributes; what schedulers and hooks put on the instance stays out.
        settings = {name: getattr(self, name) for name in _SETTINGS}
        return {**super().__getstate__(), **settings, "snapshot": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        current = self.__dict__.get("param_groups", [])  # empty when unpickled
        for group, saved in zip(current, state["param_groups"], strict=False):
            for key, value in group.items():
                saved.setdefault(key, value)
        super().__setstate__(state)


def _unwrap(item: Any) -> Any:
    return item.param if isinstance(item, Selection) else item


def _obstacle(param: Tensor) -> str | None:
    """Why a parameter's norm or update would be wrong, and what to do; None if they are right."""
    kind = type(param).__name__ if hasattr(param, "__tensor_flatten__") else None  # DTensor, ...
    kind = kind or ("FSDP shard" if getattr(param, "_fsdp_flattened", False) else None)
    if kind:
        return (
            f"is a {kind}: the norm of the part that a process holds is not the global norm. "
            f"Train an unsharded model, or use torch's optimizer"
        )
    if not param.is_floating_point():
        return (
            f"is {str(param.dtype).removeprefix('torch.')}, not real floating point. Leave it out"
        )
    if param.grad is not None and param.grad.layout != torch.strided:
        return (
            f"has a sparse gradient ({param.grad.layout}) and needs a dense one. Use "
            f"nn.Embedding(sparse=False), or torch.optim.SparseAdam"
        )
    return None


def _memory(tensor: Tensor) -> tuple[Any, ...]:
    """What tells two views apart."""
    return tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride()
