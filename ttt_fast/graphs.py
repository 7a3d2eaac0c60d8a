"""CUDA graphs: all steps of an adaptation, recorded once and replayed for other prompts.

Where a step takes the host longer to launch than the device to compute, launches are what is to be
saved. For a batch of a fixed shape the host does the same every time: the second prompt of a shape
records the K steps of all its deltas, unrolled, in one graph, and from the third on prompts are
copied into the rows of that graph, which the device runs by itself.

A graph bakes in every number of the host (step sizes, seeds, ranks, first rows) and every address.
Numbers that are the same for each prompt are part of the key by which a graph is found; addresses
are compared before each replay, and one that moved means a new graph. What the engine notes on the
host during the steps is kept from the recording and adopted by each replay. Before a graph is used,
losses and norms of its first replay are held against the same steps run one by one.
"""

from __future__ import annotations

import gc
import sys
import warnings
from collections import OrderedDict
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from ttt_fast import ops
from ttt_fast.batch import Batch
from ttt_fast.config import TTTConfig
from ttt_fast.interrupt import uninterrupted
from ttt_fast.placement import places
from ttt_fast.scope import is_compiled
from ttt_fast.session import LoopState, Session

Parts = Sequence[tuple[tuple[int, ...], Batch]]

# Graphs that a trainer keeps for each of its engines; each has memory of its own for what the steps
# compute, about as much as one step needs at its peak. Recording takes as long as two prompts, so
# that a shape has to come twice among as many: prompts of all lengths in any order record nothing.
KEPT = 4


class Graph(Protocol):
    """What :data:`RECORDERS` makes: a recording of what a device was told to do.

    Attributes:
        nbytes: memory that it holds.
    """

    nbytes: int

    def recording(self) -> Any:
        """Record what is launched in the body, which does not run; a context manager."""

    def replay(self) -> None:
        """Run it, on the addresses and with the numbers of the recording."""


class CudaGraph:
    """A CUDA graph with memory of its own.

    Args:
        device: where it runs.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._graph = torch.cuda.CUDAGraph()
        self._tables: list[Any] = []
        self.nbytes = 0

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record what the body launches, on a stream of its own."""
        from ttt_fast.kernels.pointer_table import captured_for

        torch.cuda.synchronize(self._device)
        # What Python collects in the body would be freed in the middle of the recording.
        gc.collect()
        torch.cuda.empty_cache()
        free_bytes = torch.cuda.mem_get_info(self._device)[0]
        stream = torch.cuda.Stream(self._device)
        with torch.cuda.device(self._device), torch.cuda.stream(stream), captured_for(self._tables):
            # Relaxed: tables of addresses are uploaded from memory that is pinned in the body. To
            # wait for the stream is an error in every mode.
            self._graph.capture_begin(capture_error_mode="relaxed")
            try:
                yield
            except BaseException:
                # What broke the recording says why; that it cannot be ended either says nothing.
                with suppress(RuntimeError):
                    self._graph.capture_end()
                raise
            self._graph.capture_end()
        self.nbytes = max(0, free_bytes - torch.cuda.mem_get_info(self._device)[0])

    def replay(self) -> None:
        """Run what was recorded, on the current stream."""
        self._graph.replay()


# Device type -> what records there. The tests put an emulation here for the CPU.
RECORDERS: dict[str, type[Graph]] = {"cuda": CudaGraph}


@dataclass
class _Loop:
    """A recorded loop.

    Attributes:
        graph: the recording.
        parts: the rows that it reads; prompts are copied into them.
        state: what the loop leaves, in the graph's memory.
        places: of all tensors that it knows and that are not its own.
        verified: whether a replay has been held against steps that were run one by one.
    """

    graph: Graph
    parts: Parts
    state: LoopState
    places: list[Any]
    verified: bool = False

    def replay(self, parts: Parts) -> None:
        """Run the loop on other rows of the same shapes."""
        for (_, mine), (_, given) in zip(self.parts, parts, strict=True):
            for name, tensor in _tensors(mine).items():
                tensor.copy_(getattr(given, name))
        self.graph.replay()


class LoopGraphs:
    """The recorded loops of one engine, the least recently used one forgotten first.

    Attributes:
        status: what was done for the last prompt, in words.
    """

    def __init__(self) -> None:
        self.status = ""
        self._loops: OrderedDict[Hashable, _Loop] = OrderedDict()
        self._recent: OrderedDict[Hashable, None] = OrderedDict()
        self._broken: str | None = None

    @property
    def nbytes(self) -> int:
        """Bytes that the graphs hold."""
        return sum(loop.graph.nbytes for loop in self._loops.values())

    @torch.inference_mode(False)
    def take_steps(self, session: Session, parts: Parts) -> bool:
        """Take all steps of a session that has just begun, if that is for a graph to do.

        Args:
            session: nothing in it is looked at between the steps (:func:`obstacle`).
            parts: its :meth:`Session.parts`.

        Returns:
            False where they have yet to be taken, one by one; :attr:`status` says why.

        Raises:
            ValueError: with ``cuda_graph=True``, these steps cannot be recorded.
            RuntimeError: likewise, recording failed, or a replay gave other numbers.
            DivergedError: a loss or norm is not finite.
        """
        reason = self._broken or _obstacle_here(session, parts)
        if reason is not None:
            demand(session.config, reason)
            self.status = one_by_one(reason)
            return False
        key = _key(session, parts)
        recent, loop = self._note(key), self._find(key, session)
        if loop is None and not recent:
            self.status = one_by_one("the first prompt of its shape lately; the next is recorded")
            return False
        loop = loop or self._record(key, session, parts)
        if loop is None:
            return False
        if not loop.verified:
            return self._verify(loop, session, parts)
        with session.phases("replay"):
            loop.replay(parts)
        session.adopt(loop.state)
        self.status = f"replayed; {len(self._loops)} graphs hold {self.nbytes / 2**20:.1f} MiB"
        return True

    # ------------------------------------------------------------------ details

    def _find(self, key: Hashable, session: Session) -> _Loop | None:
        """The loop of a key, unless something that it knows lies elsewhere by now."""
        loop = self._loops.pop(key, None)
        if loop is None or loop.places != _places(session):
            return None
        self._loops[key] = loop
        return loop

    def _note(self, key: Hashable) -> bool:
        """Whether it is among the last ones; from now on it is."""
        recent = key in self._recent
        self._recent[key] = None
        self._recent.move_to_end(key)
        if len(self._recent) > KEPT:
            self._recent.popitem(last=False)
        return recent

    def _record(self, key: Hashable, session: Session, parts: Parts) -> _Loop | None:
        """Record the loop; the session is then as it was. None where that failed."""
        while len(self._loops) >= KEPT:
            self._loops.popitem(last=False)
        device = session.phases.device
        own = [(deltas, _copy(rows)) for deltas, rows in parts]
        before = _places(session)
        graph = RECORDERS[device.type](device)
        try:
            # Ctrl-C waits for the end: between two lines of what surrounds a recording it would
            # leave transformers, or the device, as they are meanwhile.
            with (
                uninterrupted(),
                session.phases("record"),
                _positions_known(device),
                graph.recording(),
            ):
                state = session.record(own)
        except Exception as error:
            session.restart()
            self._give_up(session, f"recording failed ({type(error).__name__}: {error})", error)
            return None
        session.restart()
        if _places(session) != before:
            self._give_up(session, "a buffer moved while it was recorded")
            return None
        self._loops[key] = loop = _Loop(graph, own, state, before)
        return loop

    def _verify(self, loop: _Loop, session: Session, parts: Parts) -> bool:
        """Replay, and take the steps one by one, which is what counts; compare.

        False where there could be no replay, and no step was taken.
        """
        try:
            with session.phases("replay"):
                loop.replay(parts)
            replayed = loop.state.measured.cpu().double()
        except Exception as error:
            session.restart()
            self._give_up(session, f"a replay failed ({type(error).__name__}: {error})", error)
            return False
        session.restart()
        for part in parts:
            for _ in range(session.config.steps):
                session.step_parts([part])
        expected = session.history.table().double()
        # They differ in the order of sums at most, which steps amplify.
        tolerance = torch.finfo(session.engine.selections[0].param.dtype).eps ** 0.5
        close = torch.isclose(replayed, expected, rtol=tolerance, atol=tolerance, equal_nan=True)
        loop.verified = bool(close.all())
        if loop.verified:
            self.status = one_by_one("the graph was recorded, and checked against this")
            return True
        first = tuple((~close).nonzero()[0].tolist())
        self._give_up(
            session,
            f"a replay gave a {('loss', 'gradient norm')[first[1]]} of {replayed[first]:g} at step"
            f" {first[0] + 1}, one by one it is {expected[first]:g}",
        )
        return True

    def _give_up(self, session: Session, reason: str, error: Exception | None = None) -> None:
        """Record no more: what went wrong once would again, and cost time and memory each time."""
        self._broken = reason
        self._loops.clear()
        if session.config.cuda_graph is True:
            raise RuntimeError(
                f"adapt: cuda_graph=True: {reason}; the original weights have been restored. Use"
                " cuda_graph='auto' or False."
            ) from error
        self.status = one_by_one(reason)
        warnings.warn(
            f"adapt: no CUDA graphs from here on: {reason}. Steps run one by one;"
            " TTTConfig(cuda_graph=False) does not try.",
            stacklevel=2,
        )


def one_by_one(reason: str) -> str:
    """How a report says that nothing was replayed."""
    return f"steps ran one by one: {reason}"


def demand(config: TTTConfig, reason: str) -> None:
    """Raise if a graph was asked for that there cannot be."""
    if config.cuda_graph is True:
        raise ValueError(
            f"adapt: cuda_graph=True, but {reason}. Use cuda_graph='auto', which then takes the"
            " steps one by one."
        )


def obstacle(model: nn.Module, config: TTTConfig, own_objective: bool, watched: bool) -> str | None:
    """Why the steps of a trainer cannot be recorded, None if they can.

    Args:
        model: while nobody holds it.
        config: settings.
        own_objective: whether the objective is one that the caller wrote.
        watched: whether someone looks at the losses after each step.
    """
    device = next(model.parameters()).device
    if device.type not in RECORDERS:
        return f"the model is on {device}, not on a CUDA device"
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    reasons = {
        f"the model is on {len(devices)} devices": len(devices) > 1,
        "somebody else is recording a CUDA graph": (
            torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
        ),
        "on_step and stop look at the losses after each step": watched,
        f"check_every={config.check_every} looks at the losses before the last step": (
            config.check_every is not None and config.check_every < config.steps
        ),
        "steps=0": config.steps == 0,
        "kv='frozen' takes another span at every step": config.kv == "frozen",
        "dropout=True draws other numbers each time": config.dropout,
        "a replay would not run the Python of your objective": own_objective,
        "rounding='torch' runs torch's own update, which looks at found_inf": (
            config.rounding == "torch"
        ),
        "a model under torch.compile decides itself what is recorded": is_compiled(model),
        "a replay would not run the hooks, or forwards of their own, that modules have": (
            _has_any_global_hook() or any(map(_is_watched, model.modules()))
        ),
        "memory_budget plans without the memory of graphs": (
            config.cuda_graph == "auto" and config.memory_budget is not None
        ),
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def _obstacle_here(session: Session, parts: Parts) -> str | None:
    """Why this session cannot take these steps in a graph."""
    engine = session.engine
    device_type = session.phases.device.type
    asked = ops.backend_for("sgd_", engine.config.backend, device_type)
    if engine.name == "dense" and ops.choose("sgd_", device_type, asked) == "torch":
        return "the update runs in plain torch, which looks at found_inf"
    for _, rows in parts:
        if rows.past_key_values is not None:
            return "a cache in front of the rows grows in Python"
        if rows.position_ids is None or rows.padded:
            continue
        counted = torch.arange(rows.input_ids.shape[1], device=rows.device)
        if not bool((rows.position_ids == counted).all()):
            return "position ids other than 0, 1, 2, ... decide which mask is built"
    return None


def _is_watched(module: nn.Module) -> bool:
    """Whether Python of the user's runs when the module does, or its parameters get gradients."""
    hooks = [
        module._forward_hooks, module._forward_pre_hooks, module._backward_hooks,
        module._backward_pre_hooks,
    ]  # fmt: skip
    for param in module.parameters(recurse=False):
        hooks += [param._backward_hooks, getattr(param, "_post_accumulate_grad_hooks", None)]
    return "forward" in vars(module) or any(hooks)


def _key(session: Session, parts: Parts) -> Hashable:
    """Everything that a recording bakes in, but for addresses."""
    shapes = tuple(
        (
            deltas,
            rows.padded,
            tuple((name, tuple(t.shape), t.dtype) for name, t in _tensors(rows).items()),
        )
        for deltas, rows in parts
    )
    kind = session.phases.device.type
    attention = getattr(getattr(session.model, "config", None), "_attn_implementation", None)
    surroundings = (
        attention,
        torch.get_float32_matmul_precision(),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind),
        torch.backends.cuda.flash_sdp_enabled(),
        torch.backends.cuda.mem_efficient_sdp_enabled(),
        torch.backends.cuda.math_sdp_enabled(),
        torch.backends.cuda.cudnn_sdp_enabled(),
    )
    return shapes, session.n_deltas, session.checkpointed, session.engine.baked(), surroundings


def _places(session: Session) -> list[Any]:
    """Where everything lies that a recorded loop reads or writes and that is not its own."""
    model = session.model
    return places([*model.parameters(), *model.buffers(), *session.engine.memory()])


def _tensors(rows: Batch) -> dict[str, Tensor]:
    values = {field.name: getattr(rows, field.name) for field in fields(rows)}
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}


def _copy(rows: Batch) -> Batch:
    """Rows in memory of their own."""
    copy = replace(rows, **{name: tensor.clone() for name, tensor in _tensors(rows).items()})
    vars(copy)["padded"] = rows.padded  # looked at already
    return copy


@contextmanager
def _positions_known(device: torch.device) -> Iterator[None]:
    """Answer for transformers whether position ids are of several packed texts: they are not.

    While a graph is recorded it cannot look, and would build masks for packed texts, which
    :func:`_obstacle_here` has ruled out: another attention kernel, other bits.
    """
    # Not imported: that takes seconds, and models that use it have done it.
    masking_utils = sys.modules.get("transformers.masking_utils")
    name = "find_packed_sequence_indices"
    own = getattr(masking_utils, name, None)
    # Releases that never look build the same mask either way.
    if own is None or own(torch.arange(2, device=device)[None]) is not None:
        yield
        return
    try:
        setattr(masking_utils, name, lambda position_ids: None)
        yield
    finally:
        setattr(masking_utils, name, own)
