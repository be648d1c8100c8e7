"""What the parts of a model cost: all that is no block, and each block; any cut costs the sum of what it keeps.

Parameters, bytes and operations are counted, on the model as it is. Times are measured, not scaled: the clock is read
between the blocks of an ordinary ``encode``, so that the time until block k ends is the time that the model cut to its
first k blocks takes.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from sentence_transformers import SentenceTransformer
from torch import Tensor, nn

from secateur.measures.flops import flops_by_block
from secateur.models.blocks import blocks_of
from secateur.models.cutting import late_modules, packed_tensors
from secateur.models.forward import wait
from secateur.results import PartRow

TEXT = "The gardener cut the hedge back to half its height before the rain came, on day {n}."
FLOPS_TOKENS = 128
BATCH, BATCHES = 8, 2
SINGLES = 5


@dataclass(frozen=True)
class Size:
    """Parameters of a part, a weight that is used twice counted once, and the bytes of its weights."""

    parameters: int
    bytes: int


def part_sizes(model: SentenceTransformer) -> tuple[Size, ...]:
    """Count what is outside the blocks, then each block.

    A weight that several blocks share is counted with the first of them; a tensor outside the blocks that packs one
    slice for each of them is counted with the blocks.

    Args:
        model: Its weights as they are stored, so that ``bytes`` are those of a written cut.
    """
    transformer = model[0].auto_model
    blocks = blocks_of(transformer)
    packed = [transformer.get_parameter(name) for name in packed_tensors(transformer)]
    slices = Size(sum(tensor.numel() for tensor in packed) // len(blocks), sum(map(_bytes, packed)) // len(blocks))
    seen = {id(tensor) for tensor in packed}
    late = [(index, transformer.get_submodule(name)) for name, index in late_modules(transformer).items()]
    sizes = []
    for index, block in enumerate(blocks):
        later = {id(t) for first, module in late if first > index for t in module.parameters()}
        own = _count(block, seen, later)
        sizes.append(Size(own.parameters + slices.parameters, own.bytes + slices.bytes))
    return (_count(model, seen), *sizes)


def _count(module: nn.Module, seen: set[int], later: Collection[int] = ()) -> Size:
    """Of the weights not seen before, but for those of later. Stored are parameters and buffers that are not made anew.

    The weights counted are seen then.
    """
    own = {id(t): t for t in module.state_dict(keep_vars=True).values() if isinstance(t, Tensor)}
    own |= {id(t): t for t in module.parameters()}
    new = {key: tensor for key, tensor in own.items() if key not in seen and key not in later}
    seen.update(new)
    parameters = sum(tensor.numel() for tensor in new.values() if isinstance(tensor, nn.Parameter))
    return Size(parameters, sum(map(_bytes, new.values())))


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def measure_parts(model: SentenceTransformer, sizes: Sequence[Size]) -> tuple[PartRow, ...]:
    """Count the operations of the parts of a model and time them, some seconds for a model of 10⁸ parameters on a core.

    Args:
        model: In the number format and on the device in which it is used.
        sizes: What :func:`part_sizes` counted.

    Returns:
        All that is no block (the tokenizer's time included), then each block.
    """
    operations, _ = flops_by_block(model, FLOPS_TOKENS, blocks_of(model[0].auto_model))
    latency = _median_seconds(model, texts=1, rounds=SINGLES)
    seconds = _median_seconds(model, texts=BATCH, rounds=BATCHES)
    columns = zip(sizes, operations, latency, seconds, strict=True)
    return tuple(
        PartRow(part, size.parameters, size.bytes, flops, alone, together)
        for part, (size, flops, alone, together) in enumerate(columns)
    )


def cost_of(parts: Sequence[PartRow], blocks: Sequence[int]) -> PartRow:
    """What a model costs that keeps these blocks: the sum of its parts.

    Args:
        parts: Of the whole model.
        blocks: Indices of the blocks that stay, from 0.

    Returns:
        A row whose ``part`` is the number of blocks.
    """
    kept = [parts[0], *(parts[index + 1] for index in blocks)]
    return PartRow(
        part=len(blocks),
        parameters=sum(row.parameters for row in kept),
        bytes=sum(row.bytes for row in kept),
        flops_per_token=sum(row.flops_per_token for row in kept),
        latency=sum(row.latency for row in kept),
        seconds=sum(row.seconds for row in kept),
    )


def _median_seconds(model: SentenceTransformer, texts: int, rounds: int) -> list[float]:
    """Median over rounds of the time of each part; the first round prepares kernels and is not counted."""
    found = [_seconds(model, [TEXT.format(n=n) for n in range(texts)]) for _ in range(rounds + 1)][1:]
    return [statistics.median(part) for part in zip(*found, strict=True)]


def _seconds(model: SentenceTransformer, texts: list[str]) -> list[float]:
    """Wall time of one ``encode`` in one batch, by part."""
    wait(model.device)
    started = time.perf_counter()
    with _clocks(model) as spent:
        model.encode(texts, batch_size=len(texts), show_progress_bar=False)
        wait(model.device)
        whole = time.perf_counter() - started
    return [whole - sum(spent), *spent]


@contextmanager
def _clocks(model: SentenceTransformer) -> Iterator[list[float]]:
    """Within: seconds between the end of one block and the end of the next are added to the latter's."""
    blocks = blocks_of(model[0].auto_model)
    spent = [0.0] * len(blocks)
    last = 0.0

    def start(*_: Any) -> None:
        nonlocal last
        wait(model.device)
        last = time.perf_counter()

    def end(index: int, *_: Any) -> None:
        before = last
        start()
        spent[index] += last - before

    with ExitStack() as hooks:
        hooks.callback(blocks[0].register_forward_pre_hook(start).remove)
        for index, block in enumerate(blocks):
            hooks.callback(block.register_forward_hook(partial(end, index)).remove)
        yield spent
