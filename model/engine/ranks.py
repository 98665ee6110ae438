"""Ranks: the processes that train one model together, one per device, and what they exchange.

All exchanges are bounded by one timeout. Tensors on GPUs go through NCCL, the hosts' numbers through gloo, so that no
agreement of the hosts waits for a GPU. The order in which NCCL adds depends on its version, algorithm and topology
(nccl#1461, #1497). Here it only moves numbers: each rank adds up one part of all ranks' numbers itself, in the order
of the ranks, so that sums repeat bit for bit and are equal on all ranks.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

_CPU = torch.device("cpu")
_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")  # set by torchrun

# The same function under its name since torch 2.13, and before.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

_FEW = 4_096  # numbers: for these one exchange is faster than two

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Ranks:
    """This process among those that train together. Every method but the properties is called by all ranks, in the
    same order; in a world of one they exchange nothing.

    Attributes:
        rank: number of this process; rank 0 writes journal and checkpoints.
        world: number of processes.
        local_rank: number of this process on its host.
        local_world: number of processes on this host.
        device: of this process.
        host_group: all ranks, over gloo.
        local_group: ranks of this host, for tensors on the device; None stands for all ranks.
        local_host_group: ranks of this host, over gloo.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1
    device: torch.device = _CPU
    host_group: dist.ProcessGroup | None = None
    local_group: dist.ProcessGroup | None = None
    local_host_group: dist.ProcessGroup | None = None

    @property
    def leads(self) -> bool:
        """Whether this process writes what is written once."""
        return self.rank == 0

    def sum_in_order(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over the ranks, added in the order of the ranks.

        Args:
            tensors: contiguous, on the device, with equal shapes on all ranks.
        """
        if self.world == 1:
            return
        for tensor in tensors:
            flat = tensor.view(-1)
            if flat.numel() <= _FEW or flat.numel() % self.world:  # every rank gets all numbers and adds them up
                received = flat.new_empty(self.world, flat.numel())
                _all_gather(received.view(-1), flat)
                _sum_rows(received, flat)
            else:
                self.sum_own_part(flat)
                self.gather_parts(flat)

    def sum_own_part(self, flat: Tensor) -> Tensor:
        """Replace this rank's part of a tensor by its sum over the ranks, added in their order, and return it.

        Together with ``gather_parts`` the traffic is that of a ring.

        Args:
            flat: (n,), contiguous, on the device; ``world`` divides n. Part r of n / world elements is rank r's.
        """
        own = self._own_part(flat)
        if self.world > 1:
            received = torch.empty_like(flat).view(self.world, -1)
            dist.all_to_all_single(received.view(-1), flat)
            _sum_rows(received, own)
        return own

    def gather_parts(self, flat: Tensor) -> None:
        """Overwrite each part of a tensor, cut as by ``sum_own_part``, by that of the rank it belongs to."""
        if self.world > 1:
            whole = flat.view(torch.uint8)  # gloo does not know every dtype
            _all_gather(whole, self._own_part(whole))

    def broadcast(self, tensors: Sequence[Tensor]) -> None:
        """Overwrite tensors on the device by those of rank 0."""
        if self.world > 1:
            for tensor in tensors:
                dist.broadcast(tensor, src=0)

    def gather_on_host(self, tensor: Tensor) -> Tensor:
        """Tensors of one shape from all ranks of this host, stacked in the order of the ranks.

        Args:
            tensor: contiguous, on the device.
        """
        if self.local_world == 1:
            return tensor[None]
        gathered = tensor.new_empty(self.local_world, *tensor.shape)
        # As bytes: gloo does not know every dtype.
        source, target = tensor.view(-1).view(torch.uint8), gathered.view(-1).view(torch.uint8)
        _all_gather(target, source, group=self.local_group)
        return gathered

    def agree(self, flag: bool, local: bool = False) -> bool:
        """Whether the flag is true on any rank, or on any rank of this host."""
        return self.agree_later(flag, local)()

    def agree_later(self, flag: bool, local: bool = False) -> Callable[[], bool]:
        """As ``agree``, without waiting: the function that is returned waits for the answer."""
        if self._alone(local):
            return lambda: flag
        answer = torch.tensor([flag], dtype=torch.uint8)
        work = dist.all_reduce(answer, dist.ReduceOp.MAX, group=self._hosts(local), async_op=True)

        def wait() -> bool:
            work.wait()
            return bool(answer.item())

        return wait

    def lowest(self, number: int, local: bool = False) -> int:
        """The lowest of the numbers that all ranks, or those of this host, have."""
        if self._alone(local):
            return number
        lowest = torch.tensor([number])
        dist.all_reduce(lowest, dist.ReduceOp.MIN, group=self._hosts(local))
        return int(lowest.item())

    def highest(self, number: int) -> int:
        """The highest of the numbers that all ranks have."""
        return -self.lowest(-number)

    def merge(self, values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """The sum of arrays in which each element is 0 on all ranks but one: exact in any order."""
        if self.world == 1:
            return values
        merged = torch.from_numpy(values.copy())
        dist.all_reduce(merged, group=self.host_group)
        return merged.numpy()

    def gather(self, value: T) -> list[T]:
        """Small values that can be pickled, from all ranks, in their order."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value, group=self.host_group)
        return values

    def gather_made(self, make: Callable[[], T], expected: type[Exception]) -> list[T]:
        """What each rank makes, in the order of the ranks.

        Raises:
            Exception: of the class ``expected``, on all ranks, if making it raised one on any rank.
        """
        if self.world == 1:
            return [make()]
        made: list[T] = []
        reason = ""
        try:
            made.append(make())
        except expected as error:
            reason = str(error) or type(error).__name__
        answers = self.gather((made, reason))
        if reasons := [reason for _, reason in answers if reason]:
            raise expected(reasons[0])
        return [made[0] for made, _ in answers]

    def from_first(self, make: Callable[[], T], local: bool = False) -> T:
        """What rank 0, or the first rank of this host, makes: a small value that can be pickled."""
        if self._alone(local):
            return make()
        makes = self.local_rank == 0 if local else self.leads
        value: list[Any] = [make() if makes else None]
        source = self.rank - self.local_rank if local else 0
        dist.broadcast_object_list(value, source, group=self._hosts(local))
        return value[0]  # type: ignore[no-any-return]

    def barrier(self, local: bool = False) -> None:
        """Wait until all ranks, or those of this host, are here; queued work of the devices is not waited for."""
        self.agree(False, local)

    def _own_part(self, flat: Tensor) -> Tensor:
        return flat.view(self.world, -1)[self.rank]

    def _alone(self, local: bool) -> bool:
        return (self.local_world if local else self.world) == 1

    def _hosts(self, local: bool) -> dist.ProcessGroup | None:
        return self.local_host_group if local else self.host_group


ALONE = Ranks()


def _sum_rows(received: Tensor, total: Tensor) -> None:
    """total (n,) = the sum of the rows of (world, n), two at least, in their order."""
    torch.add(received[0], received[1], out=total)
    for row in received[2:]:
        total += row


@contextmanager
def join_ranks(device: torch.device, timeout_seconds: float) -> Iterator[Ranks]:
    """Join the processes that torchrun has started with this one.

    If the body raises, the process group is left as it is: taking it down could wait for ranks that are gone. The
    process is expected to end then.

    Args:
        device: cpu, or cuda; without an index it is the GPU with the number of the local rank.
        timeout_seconds: limit of every exchange: after it a rank whose peers are gone, or hang, ends with an error.

    Raises:
        ValueError: the environment is not that of torchrun.
    """
    rank, world, local_rank, local_world = _numbers_of_environment()
    on_gpu = device.type == "cuda"
    if on_gpu:
        device = torch.device("cuda", local_rank if device.index is None else device.index)
        torch.cuda.set_device(device)
    alone = replace(ALONE, device=device)
    if world == 1:
        yield alone
        return
    timeout = timedelta(seconds=timeout_seconds)
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=timeout, device_id=device if on_gpu else None)
    host_group = dist.new_group(backend="gloo", timeout=timeout)
    ranks = Ranks(rank, world, local_rank, local_world, device, host_group, None, host_group)
    if local_world < world:
        local_group, local_host_group = _groups_of_host(ranks, timeout)
        ranks = replace(ranks, local_group=local_group, local_host_group=local_host_group)
    yield ranks
    ranks.barrier()
    dist.destroy_process_group()


def _numbers_of_environment() -> list[int]:
    try:
        return [int(os.environ[name]) for name in _VARIABLES]
    except (KeyError, ValueError) as error:
        names = ", ".join(_VARIABLES)
        raise ValueError(f"{names} are not all set to numbers: start the ranks by torchrun") from error


def _groups_of_host(ranks: Ranks, timeout: timedelta) -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
    """Groups of the ranks of this host: for tensors on the device, and over gloo. All hosts make all groups."""
    firsts = ranks.gather(ranks.rank - ranks.local_rank)  # torchrun numbers the ranks of a host consecutively
    mine: list[dist.ProcessGroup] = []
    for first in sorted(set(firsts)):
        members = [rank for rank, its_first in enumerate(firsts) if its_first == first]
        groups = [dist.new_group(members, timeout=timeout), dist.new_group(members, timeout=timeout, backend="gloo")]
        if ranks.rank in members:
            mine = groups
    return mine[0], mine[1]
