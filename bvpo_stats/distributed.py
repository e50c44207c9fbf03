"""Several processes on one study, as ``torchrun`` or ``accelerate launch`` start them; nothing at all in a single one.

What travels (sums of a share of the coordinates, small matrices, a report) goes over gloo and CPU memory, so GPUs are
left to the model.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

from numpy.typing import NDArray

from bvpo_stats.errors import UserError

T = TypeVar("T")

_PATIENCE = timedelta(days=2)  # the slowest process may have much longer traces than the fastest


@dataclass(frozen=True)
class World:
    """This process among its peers.

    Attributes:
        rank: 0 .. size - 1.
        size: Number of processes.
        local_rank: Number of this process on its machine: its GPU.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def leads(self) -> bool:
        """Whether this process writes the results."""
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """Every process's value, in the order of ranks, at rank 0; an empty list elsewhere."""
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        found: list[Any] | None = [None] * self.size if self.leads else None
        dist.gather_object(value, found, dst=0)
        return found or []

    def sum_to(self, values: NDArray[Any], rank: int) -> NDArray[Any]:
        """The sum over processes, at one of them; elsewhere what is returned means nothing."""
        if self.size == 1:
            return values
        import torch
        import torch.distributed as dist

        total = torch.tensor(values)
        dist.reduce(total, dst=rank)
        return total.numpy()

    def broadcast(self, value: T) -> T:
        """Rank 0's value, everywhere."""
        if self.size == 1:
            return value
        import torch.distributed as dist

        box: list[Any] = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]  # type: ignore[no-any-return]

    def most(self, number: int) -> int:
        """The largest of everyone's numbers, everywhere."""
        if self.size == 1:
            return number
        return int(self.broadcast(max(self.gather(number), default=number)))


@contextlib.contextmanager
def among_peers(world: World) -> Iterator[None]:
    """Within it, the end of another process is said in one line.

    Raises:
        UserError: Another process has ended, or cannot be reached.
    """
    try:
        yield
    except RuntimeError as error:
        from torch.distributed import DistError

        if world.size > 1 and (isinstance(error, DistError) or any(word in str(error) for word in _LOST)):
            raise UserError(
                "Another process of this run has ended or cannot be reached, so this one stops too; see what that one "
                "said. The same command goes on from the last checkpoint."
            ) from error
        raise


_LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Connection refused", "NCCL")


def own_part(tensor: Any) -> Any:
    """The part of a sharded tensor that this process holds; the tensor itself where it is whole."""
    local = getattr(tensor, "to_local", None)
    return tensor if local is None else local()


def whole_size(weight: Any) -> int:
    """Numbers in a weight, all processes' parts of it together: ZeRO-3 leaves an empty tensor between its uses."""
    return int(getattr(weight, "ds_numel", weight.numel()))


@contextlib.contextmanager
def joined_world() -> Iterator[World]:
    """Joins the processes that the launcher started, by its environment variables; leaves them at the end."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield World()
        return
    import torch.distributed as dist

    ours = not dist.is_initialized()
    if ours:
        dist.init_process_group("gloo", timeout=_PATIENCE)
    try:
        yield World(dist.get_rank(), dist.get_world_size(), int(os.environ.get("LOCAL_RANK", "0")))
    finally:
        if ours:
            dist.destroy_process_group()
