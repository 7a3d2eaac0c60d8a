"""One study on several processes: who does what, and what they have to agree on.

Started by ``torchrun --nproc-per-node N -m ttt_fast study ...``; alone, there is nothing to do. If
a process dies, torchrun ends the others; the same command goes on with what is missing, also with
another number of processes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as distributed

# A process waits for the last one to finish its share.
_PATIENCE = timedelta(days=30)


@dataclass(frozen=True)
class Shard:
    """The share of a process.

    Attributes:
        rank: its number.
        world: how many there are.
    """

    rank: int = 0
    world: int = 1

    @property
    def first(self) -> bool:
        """Whether this one speaks for all."""
        return self.rank == 0

    def agree(self, decide: Callable[[], Any]) -> Any:
        """What the first process decides, in all of them; its exception is raised in all.

        What it returns has to be picklable.
        """
        if self.world == 1:
            return decide()
        outcome: list[Any] = [None, None]
        if self.first:
            try:
                outcome[0] = decide()
            except Exception as error:
                outcome[1] = error
        distributed.broadcast_object_list(outcome, src=0)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    def wait(self) -> None:
        """Until all processes are here: what they have written can be read."""
        if self.world > 1:
            distributed.barrier()


def own_device(device: str | None = None) -> str:
    """The device that was asked for, by default a GPU if there is one.

    Of several GPUs each process that torchrun started on a machine has another one.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device != "cuda" or "LOCAL_RANK" not in os.environ:
        return device
    return f"cuda:{int(os.environ['LOCAL_RANK']) % max(1, torch.cuda.device_count())}"


def first_process() -> bool:
    """Whether this process, as torchrun numbered it, speaks for all."""
    return int(os.environ.get("RANK", "0")) == 0


@contextmanager
def joined() -> Iterator[Shard]:
    """The share of this process, as torchrun numbered it."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Shard()
        return
    distributed.init_process_group("gloo", timeout=_PATIENCE)
    try:
        yield Shard(distributed.get_rank(), distributed.get_world_size())
    finally:
        distributed.destroy_process_group()
