"""A LoRA adapter as peft saves it, merged into the weights of its base one weight at a time.

W' = W + s·B·A with s = alpha / r, or alpha / √r for rank-stabilized LoRA (Hu et al. 2021, arXiv:2106.09685;
Kalajdzievski 2023, arXiv:2312.03732). Everything else that peft can put into an adapter is refused by name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from secateur.checkpoints.shards import Source, Tensor, read_header, read_json
from secateur.errors import ModelError, UnsupportedArchitecture

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Numbers of a weight that are in memory at once.
PIECE = 1 << 22

_UNDERSTOOD = frozenset(
    {"peft_type", "r", "lora_alpha", "use_rslora", "bias", "init_lora_weights", "base_model_name_or_path", "revision"}
)
# What steered the training, or says again what the tensors' own names and shapes say.
_WITHOUT_EFFECT = frozenset(
    {
        *("task_type", "auto_mapping", "peft_version", "inference_mode", "lora_dropout", "runtime_config"),
        *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out"),
        *("megatron_core", "qalora_group_size", "eva_config"),
    }
)
# Ways to begin a training that leave the base as it was; PiSSA, OLoRA, CorDA and LoftQ change it.
_HARMLESS_BEGINNINGS = (None, True, False, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class Factors:
    """The two factors of one weight's change: ``a`` is (rank, in), ``b`` is (out, rank)."""

    a: Tensor
    b: Tensor
    scaling: float


@dataclass(frozen=True)
class Adapter:
    """An adapter: its ``factors`` by the path of the module they change, and the ``base`` that it names."""

    source: Source
    base: str | None
    base_revision: str | None
    factors: Mapping[str, Factors]


def read_adapter(source: Source) -> Adapter:
    """Read a peft folder; its tensors stay where they are.

    Raises:
        ModelError: A file is missing or broken, or an A has no B.
        UnsupportedArchitecture: It is no plain LoRA.
    """
    where = source.where(CONFIG)
    config = _read_config(source, where)
    if not source.exists(WEIGHTS):
        raise source.absent(WEIGHTS, "save the adapter as safetensors")
    halves: dict[str, dict[str, Tensor]] = {}
    for name, tensor in read_header(source, WEIGHTS).items():
        match = re.fullmatch(r"(?:base_model\.model\.)?(.+)\.lora_(A|B)(?:\.default)?\.weight", name)
        if not match:
            raise UnsupportedArchitecture(
                source.where(WEIGHTS), f"holds {name}, which no plain LoRA of linear layers has"
            )
        halves.setdefault(match[1], {})[match[2]] = tensor
    scaling = config["lora_alpha"] / (math.sqrt(config["r"]) if config.get("use_rslora") else config["r"])
    factors = {path: _factors(path, pair, config["r"], scaling, source.where(WEIGHTS)) for path, pair in halves.items()}
    if not factors:
        raise ModelError(source.where(WEIGHTS), "holds no LoRA weights")
    return Adapter(source, config.get("base_model_name_or_path"), config.get("revision"), factors)


def _read_config(source: Source, where: str) -> dict[str, Any]:
    file = source.find(CONFIG)
    if file is None:
        raise source.absent(CONFIG, "give the folder that peft's save_pretrained wrote")
    config = read_json(file)
    if not isinstance(config, dict):
        raise ModelError(where, "is not a JSON object")
    hint = "merge it with peft (merge_and_unload) and prune the merged model"
    if config.get("peft_type") != "LORA":
        raise UnsupportedArchitecture(where, f"is a {config.get('peft_type')} adapter, not a LoRA", hint)
    if config.get("bias", "none") != "none":
        raise UnsupportedArchitecture(where, "has trained biases (bias)", hint)
    if config.get("init_lora_weights") not in _HARMLESS_BEGINNINGS:
        problem = f"init_lora_weights {config['init_lora_weights']!r} changes the base itself"
        raise UnsupportedArchitecture(where, problem, hint)
    others = set(config) - _UNDERSTOOD - _WITHOUT_EFFECT
    used = sorted(key for key in others if config[key] not in (None, False, "", [], {}))
    if used:
        raise UnsupportedArchitecture(where, f"uses {', '.join(used)}, beyond plain LoRA", hint)
    for key in ("r", "lora_alpha"):
        value = config.get(key)
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        if not is_number or config["r"] < 1:
            raise ModelError(where, f"{key} is {value!r}, not a number")
    return config


def _factors(path: str, pair: Mapping[str, Tensor], rank: int, scaling: float, where: str) -> Factors:
    if set(pair) != {"A", "B"}:
        raise ModelError(where, f"has only one of the two factors of {path}")
    a, b = pair["A"], pair["B"]
    if len(a.shape) != 2 or len(b.shape) != 2 or not a.shape[0] == b.shape[1] == rank:
        raise ModelError(where, f"the factors of {path} have the shapes {a.shape} and {b.shape}, not of rank {rank}")
    if a.dtype not in FLOATS or b.dtype not in FLOATS:
        raise ModelError(where, f"the factors of {path} are {a.dtype} and {b.dtype}, not floating-point")
    return Factors(a, b, scaling)


def merged(
    source: Source, weight: Tensor, adapter: Adapter, factors: Factors, *, transposed: bool
) -> Iterator[memoryview]:
    """The bytes of a changed weight, some rows at a time, in the weight's own type.

    Computed in float32 (float64 for a float64 weight) and rounded once.

    Args:
        source: Where the weight is.
        weight: (out, in); (in, out) where ``transposed``, as in GPT-2's Conv1D (peft's ``fan_in_fan_out``).
        adapter: Where the factors are.
        factors: The change.
        transposed: How the weight is stored.
    """
    precision = torch.promote_types(FLOATS[weight.dtype], torch.float32)
    a = _load(adapter.source, factors.a, factors.a.start, factors.a.end).reshape(factors.a.shape).to(precision)
    b = _load(adapter.source, factors.b, factors.b.start, factors.b.end).reshape(factors.b.shape).to(precision)
    left, right = (a.T, b.T) if transposed else (b, a)
    rows, columns = weight.shape
    row_bytes = (weight.end - weight.start) // rows
    step = max(1, PIECE // columns)
    for row in range(0, rows, step):
        count = min(step, rows - row)
        start = weight.start + row * row_bytes
        piece = _load(source, weight, start, start + count * row_bytes).reshape(count, columns).to(precision)
        piece += factors.scaling * (left[row : row + count] @ right)
        yield piece.to(FLOATS[weight.dtype]).contiguous().view(torch.uint8).numpy().data.cast("B")


def _load(source: Source, tensor: Tensor, start: int, end: int) -> torch.Tensor:
    return torch.frombuffer(bytearray(source.read(tensor.file, start, end)), dtype=FLOATS[tensor.dtype])


def check_fits(where: str, name: str, weight: Tensor, factors: Factors, *, transposed: bool) -> None:
    """Make sure that a change has its weight's shape and a type that can be added to.

    Raises:
        ModelError: It has not.
    """
    change = (factors.a.shape[1], factors.b.shape[0]) if transposed else (factors.b.shape[0], factors.a.shape[1])
    if weight.shape != change:
        raise ModelError(
            where, f"its change of {name} is {change}, but the weight is {weight.shape}", "is this its base?"
        )
    if weight.dtype not in FLOATS:
        raise UnsupportedArchitecture(
            where, f"changes {name}, which is {weight.dtype}: only floating-point can be merged"
        )
