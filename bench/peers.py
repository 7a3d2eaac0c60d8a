"""What else a user could run: other libraries' way to K steps on a prompt, each behind one call.

    adapted = PEERS["optimi"].adapt(model, input_ids, params, Options(steps=10, max_grad_norm=None))

The packages are the optional extra ``peers``. A peer that computes another update than
``clip_grad_norm_`` and ``SGD`` says so (``same_update``), and one that lacks an option refuses it:
nothing is left out in silence. :mod:`bench.peer_table` has the table of what each can do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from ttt_fast import TTTConfig, TTTTrainer
from ttt_fast.naive import naive_adapt, prompt_loss


@dataclass(frozen=True)
class Options:
    """What to do with a prompt; names and meanings are torch's.

    ``momentum=0`` and ``max_grad_norm=None`` are without.
    """

    steps: int = 10
    lr: float = 1e-4
    momentum: float = 0.9
    max_grad_norm: float | None = 10.0


@dataclass
class Adapted:
    """A model after its steps.

    Attributes:
        losses: (K,) before each update.
        model: what generates now; None if the peer gives nothing to generate with.
        restore: gives the original weights back.
    """

    losses: Tensor
    model: Any
    restore: Callable[[], None]


Adapt = Callable[[nn.Module, Tensor, Sequence[nn.Parameter], Options], Adapted]


@dataclass(frozen=True)
class Peer:
    """One way to adapt.

    Attributes:
        name: in tables.
        run: what to call; :meth:`adapt` checks the options first.
        package: of the registry, "" where torch is enough.
        module: its name in Python.
        lacks: options that it does not have.
        same_update: with the options that it has, its losses are those of torch's SGD.
        remark: what has to be said beside its numbers.
    """

    name: str
    run: Adapt
    package: str = ""
    module: str = "torch"
    lacks: tuple[str, ...] = ()
    same_update: bool = True
    remark: str = ""

    @property
    def installed(self) -> bool:
        """Whether its package is."""
        return find_spec(self.module) is not None

    def possible(self, options: Options) -> Options:
        """``options`` without what it lacks."""
        none = {"momentum": 0.0, "max_grad_norm": None}
        return replace(options, **{name: none[name] for name in self.lacks})

    def adapt(
        self, model: nn.Module, input_ids: Tensor, params: Sequence[nn.Parameter], options: Options
    ) -> Adapted:
        """Take the steps on one prompt, (1, T) int64; the model changes until ``restore()``.

        Raises:
            ValueError: an option that the peer lacks.
        """
        if self.possible(options) != options:
            raise ValueError(
                f"{self.name} has no {' and no '.join(self.lacks)}; got {options}. Pass"
                " peer.possible(options), and compare with a loop of the same options."
            )
        return self.run(model, input_ids, params, options)


# ---------------------------------------------------------------------------- torch


def torch_sgd(**optimizer_kwargs: bool) -> Adapt:
    """``bench/naive.py`` with ``torch.optim.SGD`` in one of its ways."""

    def run(
        model: nn.Module, input_ids: Tensor, params: Sequence[nn.Parameter], options: Options
    ) -> Adapted:
        result = naive_adapt(
            model, input_ids, params=params, optimizer_kwargs=optimizer_kwargs, **vars(options)
        )
        return Adapted(result.losses, model, result.restore)

    return run


def by_copy(
    model: nn.Module, params: Sequence[nn.Parameter], steps: Callable[[], list[Tensor]]
) -> Adapted:
    """Run ``steps`` on a model of which ``params`` train, with a clone of them to go back to."""
    flags = [(param, param.requires_grad) for param in model.parameters()]
    training = model.training
    originals = [param.detach().clone() for param in params]
    model.requires_grad_(False).eval()
    for param in params:
        param.requires_grad_(True)
    try:
        losses = steps()
    finally:
        model.train(training)
        for param, flag in flags:
            param.requires_grad_(flag)

    @torch.no_grad()
    def restore() -> None:
        for param, original in zip(params, originals, strict=True):
            param.copy_(original)

    return Adapted(torch.stack(losses), model, restore)


# ---------------------------------------------------------------------------- gradient release


def optimi_release(
    model: nn.Module, input_ids: Tensor, params: Sequence[nn.Parameter], options: Options
) -> Adapted:
    """Optimi's SGD, which steps inside the backward; no norm of all gradients exists by then."""
    import optimi

    def steps() -> list[Tensor]:
        # Kahan summation is on by default in 16 bits: another update, and more memory.
        optimizer = optimi.SGD(
            params, options.lr, momentum=options.momentum, kahan_sum=False, triton=False,
            gradient_release=True,
        )  # fmt: skip
        optimi.prepare_for_gradient_release(model, optimizer)
        losses = []
        try:
            for _ in range(options.steps):
                loss = prompt_loss(model, input_ids)
                loss.backward()
                losses.append(loss.detach())
        finally:
            optimi.remove_gradient_release(model)
        return losses

    return by_copy(model, params, steps)


def lomo_two_passes(
    model: nn.Module, input_ids: Tensor, params: Sequence[nn.Parameter], options: Options
) -> Adapted:
    """LOMO: one backward for the norm, a second one for the update inside it."""
    from lomo_optim import Lomo

    def steps() -> list[Tensor]:
        before = [set(param._backward_hooks or ()) for param in params]
        optimizer = Lomo(model, options.lr, clip_grad_norm=options.max_grad_norm)
        losses = []
        try:
            for _ in range(options.steps):
                loss = prompt_loss(model, input_ids)
                if options.max_grad_norm is not None:
                    optimizer.grad_norm(loss)
                optimizer.fused_backward(loss, options.lr)
                losses.append(loss.detach())
        finally:
            # It keeps no handles: its hooks would update the weights in everybody's backward.
            for param, kept in zip(params, before, strict=True):
                for key in set(param._backward_hooks) - kept:
                    del param._backward_hooks[key]
        return losses

    return by_copy(model, params, steps)


# ---------------------------------------------------------------------------- other updates


def lora_adamw(rank: int) -> Adapt:
    """Peft's LoRA on the linear layers of the blocks, with clip and AdamW."""

    def run(
        model: nn.Module, input_ids: Tensor, params: Sequence[nn.Parameter], options: Options
    ) -> Adapted:
        from peft import LoraConfig, get_peft_model

        flags = [(param, param.requires_grad) for param in model.parameters()]
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            adapter = get_peft_model(model, config).eval()
        trained = [param for param in adapter.parameters() if param.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=options.lr)
        losses = []
        for _ in range(options.steps):
            loss = prompt_loss(adapter, input_ids)
            loss.backward()
            if options.max_grad_norm is not None:
                nn.utils.clip_grad_norm_(trained, options.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())

        def restore() -> None:
            adapter.unload()
            for param, flag in flags:
                param.requires_grad_(flag)

        return Adapted(torch.stack(losses), adapter, restore)

    return run


def torch_ttt_engine(
    model: nn.Module, input_ids: Tensor, params: Sequence[nn.Parameter], options: Options
) -> Adapted:
    """torch-ttt's engine: a deep copy of the model for each call, Adam, the logits of one forward.

    It has no engine for causal language models; this one gives theirs the prompt's loss.
    """
    from torch_ttt.engine.base_engine import BaseEngine

    class CausalEngine(BaseEngine):
        def __init__(self) -> None:
            super().__init__()
            self.model = model
            self.optimization_parameters = {"num_steps": options.steps, "lr": options.lr}

        def ttt_forward(self, inputs: Tensor, losses: list[Tensor]) -> tuple[None, Tensor]:
            loss = prompt_loss(self.model, inputs)
            losses.append(loss.detach())
            return None, loss

    flags = [(param, param.requires_grad) for param in model.parameters()]
    model.requires_grad_(False)
    for param in params:
        param.requires_grad_(True)
    losses: list[Tensor] = []
    try:
        CausalEngine().eval()(input_ids, losses=losses)
    finally:
        for param, flag in flags:
            param.requires_grad_(flag)
    return Adapted(torch.stack(losses), None, lambda: None)


def mezo(
    model: nn.Module, input_ids: Tensor, params: Sequence[nn.Parameter], options: Options
) -> Adapted:
    """Zeroth order as MeZO does it: two forwards a step, one random direction from a seed.

    Malladi et al. (2023), "Fine-Tuning Language Models with Just Forward Passes"; theirs is code
    for a trainer and no package, so this is our writing of algorithm 1. The loss that it reports is
    the mean of its two.
    """
    width = 1e-3

    @torch.no_grad()
    def walk(seed: int, factor: float) -> None:
        generator = torch.Generator(params[0].device).manual_seed(seed)
        for param in params:
            direction = torch.empty_like(param).normal_(generator=generator)
            param.add_(direction, alpha=factor)

    def steps() -> list[Tensor]:
        losses = []
        for seed in range(options.steps):
            with torch.no_grad():
                walk(seed, width)
                above = prompt_loss(model, input_ids)
                walk(seed, -2 * width)
                below = prompt_loss(model, input_ids)
                walk(seed, width)
            slope = float(above - below) / (2 * width)
            walk(seed, -options.lr * slope)
            losses.append((above + below) / 2)
        return losses

    return by_copy(model, params, steps)


# ---------------------------------------------------------------------------- ghost norms


def opacus_ghost(
    model: nn.Module, input_ids: Tensor, params: Sequence[nn.Parameter], options: Options
) -> Adapted:
    """Opacus' ghost clipping without noise: a backward for the norms, one for the clipped gradient.

    A prompt is one sample, so its clip is the global one. Weights that are used twice are refused.
    """
    from opacus.grad_sample import GradSampleModuleFastGradientClipping
    from opacus.utils.fast_gradient_clipping_utils import DPTensorFastGradientClipping

    if options.max_grad_norm is None:
        raise ValueError("Opacus ghost clipping: max_grad_norm=None; it needs a number to clip at.")

    def steps() -> list[Tensor]:
        model.train()  # its hooks record in this mode only
        wrapped = GradSampleModuleFastGradientClipping(
            model, max_grad_norm=options.max_grad_norm, strict=False
        )
        optimizer = torch.optim.SGD(params, lr=options.lr, momentum=options.momentum)
        losses = []
        try:
            for _ in range(options.steps):
                loss = prompt_loss(wrapped, input_ids)
                DPTensorFastGradientClipping(wrapped, optimizer, loss[None]).backward()
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss.detach())
        finally:
            wrapped.to_standard_module()
        return losses

    return by_copy(model, params, steps)


# ---------------------------------------------------------------------------- ours, and the list


def ours(engine: str = "auto", scope: Any = "all") -> Adapt:
    """``TTTTrainer.adapt`` on what the scope names; ``params`` have to be the same."""

    def run(
        model: nn.Module, input_ids: Tensor, params: Sequence[nn.Parameter], options: Options
    ) -> Adapted:
        trainer = TTTTrainer(model, TTTConfig(engine=engine, scope=scope, **vars(options)))
        if {id(s.param) for s in trainer.selections} != {id(param) for param in params}:
            raise ValueError(f"ours: scope={scope!r} is not what params holds; pass the scope's.")
        adapted = trainer.adapt(input_ids)
        return Adapted(adapted.losses[0], adapted, adapted.restore)

    return run


PEERS: dict[str, Peer] = {
    peer.name: peer
    for peer in (
        Peer("naive loop", torch_sgd()),
        Peer("torch SGD, foreach", torch_sgd(foreach=True)),
        Peer(
            "torch SGD, fused",
            torch_sgd(fused=True),
            remark="does nothing to bfloat16 weights on a CPU (torch 2.12, 2.13)",
        ),
        Peer(
            "optimi, gradient release",
            optimi_release,
            package="torch-optimi",
            module="optimi",
            lacks=("max_grad_norm",),
        ),
        Peer(
            "LOMO, two passes",
            lomo_two_passes,
            package="lomo-optim",
            module="lomo_optim",
            lacks=("momentum",),
        ),
        Peer(
            "Opacus, ghost clipping",
            opacus_ghost,
            package="opacus",
            module="opacus",
            remark="untied weights only, so not on all of a tied model",
        ),
        Peer(
            "LoRA r = 8, AdamW",
            lora_adamw(8),
            package="peft",
            module="peft",
            lacks=("momentum",),
            same_update=False,
            remark="not the same update: low rank, AdamW",
        ),
        Peer(
            "LoRA r = 64, AdamW",
            lora_adamw(64),
            package="peft",
            module="peft",
            lacks=("momentum",),
            same_update=False,
            remark="not the same update: low rank, AdamW",
        ),
        Peer(
            "torch-ttt",
            torch_ttt_engine,
            package="torch-ttt",
            module="torch_ttt",
            lacks=("momentum", "max_grad_norm"),
            same_update=False,
            remark="not the same update: Adam, no clip",
        ),
        Peer(
            "MeZO",
            mezo,
            lacks=("momentum", "max_grad_norm"),
            same_update=False,
            remark="not the same update: zeroth order",
        ),
    )
}
