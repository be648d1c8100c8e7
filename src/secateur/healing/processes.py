"""One training in several processes, as ``torchrun`` and ``accelerate launch`` start them."""

from __future__ import annotations

import os

import torch
from accelerate import PartialState
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


def wait() -> None:
    """Wait until every process is here."""
    if distributed.is_initialized():
        distributed.barrier()
