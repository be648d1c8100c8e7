"""Texts → token states, as cheaply as a machine can: what a profile and bulk encoding have in common.

Texts are tokenized together, sorted by length and run in batches of about as many tokens each. What all of them start
with (an instruction) is computed once where a model attends only backwards, since its keys and values cannot depend
on what follows.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from secateur.errors import DataError
from secateur.models.blocks import blocks_of

BUDGET = 2048
"""Tokens in a batch, padding included."""
PADDING = 1.05
"""How many times its real tokens a batch may have with its padding, where it has enough of them already."""
FEWEST = 192
"""Tokens that are enough for a processor to multiply at its full rate."""
LENGTH_STEP = 16
"""What :func:`padded_length` gives multiples of: each new shape costs a CPU a new kernel."""
SHORTEST_PREFIX = 4
"""Tokens in common below which sharing them saves nothing."""
REFUSALS = (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError)
"""What models raise that cannot go on from a cache of keys and values."""


@dataclass(frozen=True)
class Tokens:
    """Some texts as ``model.preprocess`` gives them, one row each.

    Attributes:
        features: Tensors (texts, longest) and what else the model's modules want to know, such as ``prompt_length``.
        lengths: (texts,), real tokens of each text, those of its prompt included.
        left: Whether padding stands on the left.
    """

    features: dict[str, Any]
    lengths: Tensor
    left: bool

    def batch(self, rows: Sequence[int], *, left: bool | None = None) -> dict[str, Any]:
        """The features of some rows, padded to the longest of them.

        Args:
            rows: Indices of texts.
            left: On which side; default: where the model's tokenizer pads.
        """
        left = self.left if left is None else left
        index = torch.as_tensor(rows)
        lengths = self.lengths[index]
        longest = self.features["attention_mask"].shape[1]
        width = int(lengths.max())
        # Where padding moves to the other side, each row turns by as many places as it has padding.
        turn = (lengths - longest if left else longest - lengths) if left != self.left else torch.zeros_like(lengths)
        places = (torch.arange(longest)[None, :] + turn[:, None]) % longest
        places = places[:, longest - width :] if left else places[:, :width]
        shape = self.features["attention_mask"].shape
        return {
            key: value[index].gather(1, places) if isinstance(value, Tensor) and value.shape == shape else value
            for key, value in self.features.items()
        }


def tokenize(model: SentenceTransformer, texts: Sequence[str], prompt: str = "") -> Tokens:
    """Tokenize texts as the model's own ``encode`` does, each once.

    Raises:
        DataError: A text has no tokens.
    """
    features = model.preprocess(list(texts), prompt=prompt or None)
    mask = features["attention_mask"]
    lengths = mask.sum(dim=1)
    if not bool(lengths.all()):
        empty = texts[int(lengths.argmin())]
        raise DataError("texts", f"{empty!r:.60} has no tokens", "leave empty texts out")
    return Tokens(dict(features), lengths, left=bool((mask[:, 0] == 0).any()))


def padded_length(length: int, longest: int | None = None, step: int = LENGTH_STEP) -> int:
    """A length that batches are padded to where shapes come at random and should be few: a multiple of 16.

    Args:
        length: Tokens of the longest text of the batch.
        longest: Not more than this, unless the text itself has more.
        step: Another multiple.
    """
    full = -(-max(1, length) // step) * step
    return full if longest is None else min(full, max(longest, length))


def plan_evenly(lengths: Tensor, budget: int = BUDGET) -> list[list[int]]:
    """Cut texts into batches of about as many tokens, the longest texts first, that are little padded.

    A batch ends early rather than be much padded, and keeps its own length: a new shape is compiled once (a CPU takes
    some milliseconds for it) and met again; padding is paid for in every batch.

    Args:
        lengths: (texts,), tokens of each.
        budget: Tokens in a batch, padding included; a text longer than that makes a batch alone.

    Returns:
        Indices of texts, by batch.
    """
    order = lengths.argsort(descending=True, stable=True).tolist()
    batches: list[list[int]] = []
    longest = real = 0
    for row in order:
        length = max(1, int(lengths[row]))
        padded = (len(batches[-1]) + 1) * longest if batches else 0
        wasteful = real >= FEWEST and padded > PADDING * (real + length)
        if not batches or padded > budget or wasteful:
            batches.append([])
            longest, real = length, 0
        batches[-1].append(row)
        real += length
    return batches


class SharedPrefix(DynamicCache):  # type: ignore[misc]
    """Keys and values of the tokens that all texts start with, computed once and never added to."""

    def __init__(self) -> None:
        super().__init__()
        self.complete = False

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Keys and values (texts, heads, tokens, width) with those of the prefix before them."""
        if not self.complete:
            found: tuple[Tensor, Tensor] = super().update(key_states, value_states, layer_idx, *args, **kwargs)
            return found
        held = self.layers[layer_idx]
        texts = len(key_states)
        keys = torch.cat([held.keys.expand(texts, -1, -1, -1), key_states], dim=-2)
        return keys, torch.cat([held.values.expand(texts, -1, -1, -1), value_states], dim=-2)


def common_start(tokens: Tokens) -> Tensor:
    """The token ids that all texts start with, at least one of each text left out: (tokens,), maybe none."""
    features = tokens.batch(range(len(tokens.lengths)), left=False)
    ids = features["input_ids"]
    same = (ids == ids[:1]).all(dim=0)
    most = int(tokens.lengths.min()) - 1
    length = int(same.long().cumprod(dim=0)[:most].sum())
    start: Tensor = ids[0, :length]
    return start


def run_prefix(transformer: PreTrainedModel, start: Tensor) -> SharedPrefix:
    """Run the tokens that all texts start with."""
    cache = SharedPrefix()
    ids = start[None].to(transformer.device)
    transformer(input_ids=ids, attention_mask=torch.ones_like(ids), past_key_values=cache, use_cache=True)
    cache.complete = True
    return cache


def run_after(transformer: PreTrainedModel, prefix: SharedPrefix, length: int, features: dict[str, Any]) -> Any:
    """Run what follows the first ``length`` tokens of each text, which are padded on the right."""
    return transformer(
        input_ids=features["input_ids"][:, length:],
        attention_mask=features["attention_mask"],
        past_key_values=prefix,
        use_cache=True,
    )


def wait(device: torch.device) -> None:
    """Until the device has done what it was given. A CPU has."""
    if device.type in ("cuda", "mps", "xpu"):
        getattr(torch, device.type).synchronize()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a batch was too large for the machine."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return "allocate memory" in str(error) or "out of memory" in str(error)  # of ONNX Runtime, no RuntimeError


@torch.no_grad()
def block_seconds(model: SentenceTransformer, *, repeats: int = 3) -> dict[torch.dtype, float]:
    """How long the model's first block takes in float32 and in bfloat16 on this processor: measured, a moment.

    Args:
        model: On the CPU; its weights stay as they are.
        repeats: Of each, taken in turn; the quickest counts.
    """
    block = blocks_of(model[0].auto_model)[0]
    args, kwargs = _inputs_of(model, block)
    dtypes = (torch.float32, torch.bfloat16)
    candidates = {d: (copy.deepcopy(block).to(d), _cast(args, d), _cast(kwargs, d)) for d in dtypes}
    seconds = dict.fromkeys(dtypes, float("inf"))
    for repeat in range(repeats + 1):
        for dtype, (copied, its_args, its_kwargs) in candidates.items():
            start = time.perf_counter()
            copied(*its_args, **its_kwargs)
            if repeat:  # the first call prepares kernels
                seconds[dtype] = min(seconds[dtype], time.perf_counter() - start)
    return seconds


class _Caught(Exception):
    pass


def _inputs_of(model: SentenceTransformer, block: nn.Module) -> tuple[Any, Any]:
    """What a block is given in a batch of ordinary size."""
    caught: list[tuple[Any, Any]] = []

    def catch(_: nn.Module, args: Any, kwargs: Any) -> None:
        caught.append((args, kwargs))
        raise _Caught

    features = model.preprocess(["The gardener cut the hedge back to half its height before the rain came."] * 32)
    hook = block.register_forward_pre_hook(catch, with_kwargs=True)
    try:
        model[0](features)
    except _Caught:
        pass
    finally:
        hook.remove()
    return caught[0]


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, (tuple, list)):
        return type(value)(_cast(item, dtype) for item in value)
    if isinstance(value, dict):
        return {key: _cast(item, dtype) for key, item in value.items()}
    return value


def halves(rows: Sequence[int]) -> Iterator[list[int]]:
    """A batch as two."""
    middle = len(rows) // 2
    yield list(rows[:middle])
    yield list(rows[middle:])
