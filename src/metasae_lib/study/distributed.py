"""The processes of PyTorch's distributed launcher (``torchrun``), one a GPU; without it, one.

Every function must be called by all processes, in the same order.
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from torch import Tensor


def start() -> None:
    """Join the other processes if a launcher started this one."""
    if dist.is_torchelastic_launched() and not dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")


def local_rank() -> int:
    """This process among those of its machine; a rank that was left behind counts for nothing."""
    return int(os.environ["LOCAL_RANK"]) if dist.is_initialized() else 0


def rank() -> int:
    """This process among the others, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    """Wait until all processes are here."""
    if dist.is_initialized():
        dist.barrier()


def least(value: int) -> int:
    """The smallest of the processes' values."""
    if not dist.is_initialized():
        return value
    values: list[int] = [0] * world_size()
    dist.all_gather_object(values, value)
    return min(values)


def joined(part: Tensor, sizes: list[int]) -> Tensor:
    """The processes' parts, one after the other. part: (sizes[rank], d). Returns (sum, d)."""
    if not dist.is_initialized():
        return part
    parts = [part.new_empty(size, *part.shape[1:]) for size in sizes]
    parts[rank()] = part.contiguous()
    for source, tensor in enumerate(parts):
        dist.broadcast(tensor, source)
    return torch.cat(parts)
