"""Several processes that train one model, as ``torchrun`` or ``accelerate launch`` starts them.

With ``accelerate launch`` and FSDP2, each holds a part of the weights, of their gradients and of the optimizer's state;
otherwise (DDP) each holds all of them.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Collection
from datetime import timedelta

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import parse_flag_from_env
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import get_rank
from sentence_transformers.util.distributed import get_world_size
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

from secateur.errors import ConfigError
from secateur.healing.recipes import TrainingConfig
from secateur.models.blocks import blocks_of
from secateur.models.compat import shard_on_cpus

PATIENCE = timedelta(days=7)
"""How long a process waits for the others, one of which may be writing a large model. One that dies does not keep them:
its launcher ends them all."""


def init_processes(config: TrainingConfig, *, scored: bool = False) -> None:
    """Meet the other processes, where there are several; ``scored``: the model is scored while it trains.

    Raises:
        ConfigError: The batch does not divide evenly among them; or the training cannot be sharded as it is.
    """
    if is_sharded():
        for key, wanted in (("FSDP_VERSION", "2"), ("FSDP_STATE_DICT_TYPE", "SHARDED_STATE_DICT")):
            if (found := os.environ.get(key, wanted)) != wanted:
                name = key.lower()
                raise ConfigError(name, found, f"is {found} in accelerate's configuration", f"{name}: {wanted}")
        hint = "start the processes without FSDP"
        if config.train == "lora":
            raise ConfigError("train", "lora", "with FSDP, whole weights are trained", f"--train blocks, or {hint}")
        if config.mini_batch_tokens is not None:
            problem = "each process would have another number of mini-batches, and FSDP wants the same"
            raise ConfigError("mini_batch_tokens", config.mini_batch_tokens, problem, "--gradient-checkpointing")
        if scored:
            raise ConfigError("eval_tasks", True, "with FSDP, nothing is measured while training", f"none, or {hint}")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE)
    count = get_world_size()
    if config.batch_size % count:
        problem = f"a batch of {config.batch_size} does not divide among {count} processes"
        raise ConfigError("batch_size", config.batch_size, problem, f"a multiple of {count}")


def device_of(model: SentenceTransformer) -> torch.device | None:
    """Where a model is trained in one process; None where there are several, each with a device of its own."""
    return model.device if int(os.environ.get("WORLD_SIZE", "1")) == 1 else None


def barrier() -> None:
    """Wait until every process is here."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()


def is_sharded() -> bool:
    """Whether ``accelerate launch`` was told to use FSDP, for several processes."""
    return parse_flag_from_env("ACCELERATE_USE_FSDP") and int(os.environ.get("WORLD_SIZE", "1")) > 1


def sharded_copy(model: SentenceTransformer) -> SentenceTransformer:
    """A model of the same weights, whose modules FSDP may change. The given one keeps none, until :func:`gather`."""
    if not torch.cuda.is_available():
        shard_on_cpus()
    own = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
    own.base_model_prefix = "0"  # where accelerate looks for a final norm: else it takes the module Normalize for one
    model.load_state_dict({name: tensor.to("meta") for name, tensor in model.state_dict().items()}, assign=True)
    return own


def shard_by_blocks(
    model: SentenceTransformer, accelerator: Accelerator, config: TrainingConfig, of_loss: Collection[str]
) -> None:
    """Have FSDP gather one layer's weights at a time, in the training's precision, and add gradients in float32.

    It has no place for weights of the loss, named in ``of_loss``, and refuses them.
    """
    if of_loss:
        problem = "with FSDP, a teacher's vectors must be as wide as the model's"
        raise ConfigError("distill", "vectors", problem, "--distill similarities, or another teacher")
    plugin = accelerator.state.fsdp_plugin
    plugin.auto_wrap_policy = transformer_auto_wrap_policy
    plugin.transformer_cls_names_to_wrap = sorted({type(block).__name__ for block in blocks_of(model[0].auto_model)})
    if config.uses_bfloat16():
        plugin.mixed_precision_policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


def gather(own: SentenceTransformer, model: SentenceTransformer) -> None:
    """Give a model the weights of its :func:`sharded_copy`, in the memory of the first process; others keep none."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(own, options=options)
    if get_rank() == 0:
        model.load_state_dict(weights, assign=True)
        model[0].auto_model.tie_weights()
