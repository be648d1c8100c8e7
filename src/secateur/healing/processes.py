"""One training in several processes, as ``torchrun`` and ``accelerate launch`` start them."""

from __future__ import annotations

import os

import torch
from accelerate import PartialState  # type: ignore[import-untyped]
from torch import distributed


def join() -> None:
    """Meet the other processes, where a launcher started several."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        PartialState(cpu=not torch.cuda.is_available())


def is_first() -> bool:
    """Whether this process is the one that writes."""
    return not distributed.is_initialized() or distributed.get_rank() == 0


def count() -> int:
    """How many processes there are."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def announce(more: bool) -> None:
    """Of the first process: tell those that :func:`follow` that it is still at work, or done."""
    if distributed.is_initialized():
        distributed.broadcast_object_list([more], src=0)


def follow() -> None:
    """Of the others: wait until the first process is done, however long that takes.

    A barrier has a time limit (10 minutes with NCCL); here it begins anew with each call of :func:`announce`.
    """
    more = [True]
    while more[0]:
        distributed.broadcast_object_list(more, src=0)


def wait() -> None:
    """Wait until every process is here."""
    if distributed.is_initialized():
        distributed.barrier()
