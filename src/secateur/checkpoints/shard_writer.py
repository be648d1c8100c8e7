"""The tensors that stay, written: bytes copied from the source into new safetensors files, none of them unpacked."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from secateur.checkpoints.cut_plan import Cut, Output
from secateur.checkpoints.lora import Adapter, merged
from secateur.checkpoints.shards import BUFFER, DTYPES, INDEX, SINGLE, Moved, Source, read_header, write_all
from secateur.checkpoints.sources import Folder
from secateur.errors import ModelError


def share_out(outputs: Sequence[Output], max_shard_bytes: int) -> dict[str, list[Output]]:
    """Which tensors go to which file, in the order of the source, so that neighbours are read at once."""
    groups: list[list[Output]] = [[]]
    size = 0
    for item in sorted(outputs, key=lambda item: (item.tensor.file, item.tensor.start)):
        if groups[-1] and size + item.size > max_shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(item)
        size += item.size
    for group in groups:
        # Larger numbers first, so that each tensor begins at a multiple of its own.
        group.sort(key=lambda item: -DTYPES[item.tensor.dtype])
    if len(groups) == 1:
        return {SINGLE: groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups, start=1)}


def write_shards(
    out: Path,
    shards: Mapping[str, Sequence[Output]],
    source: Source,
    adapter: Adapter | None,
    cut: Cut,
    progress: Callable[[int, int], None] | None,
) -> None:
    total = sum(item.size for items in shards.values() for item in items)
    done = 0

    def moved(count: int) -> None:
        nonlocal done
        done += count
        if progress:
            progress(done, total)

    for file, items in shards.items():
        _write_shard(out / file, items, source, adapter, cut, moved)
        _check_written(out, file, items)
    if len(shards) > 1:
        weight_map = {item.name: file for file, items in shards.items() for item in items}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (out / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_shard(
    path: Path, items: Sequence[Output], source: Source, adapter: Adapter | None, cut: Cut, moved: Moved
) -> None:
    sink = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        write_all(sink, _header(items))
        for start, end, file, item in _runs(items):
            if item is None:
                source.copy(file, start, end, sink, moved)
            elif item.factors is not None and adapter is not None:
                for piece in merged(source, item.tensor, adapter, item.factors, transposed=item.transposed):
                    write_all(sink, piece)
                    moved(len(piece))
            else:
                _copy_slices(source, item, cut, sink, moved)
        os.fsync(sink)
    finally:
        os.close(sink)


def _header(items: Sequence[Output]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for item in items:
        offsets = [position, position + item.size]
        header[item.name] = {"dtype": item.tensor.dtype, "shape": list(item.shape), "data_offsets": offsets}
        position = offsets[1]
    content = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    content += b" " * (-len(content) % 8)
    return len(content).to_bytes(8, "little") + content


def _runs(items: Sequence[Output]) -> Iterator[tuple[int, int, str, Output | None]]:
    """Ranges to copy as they are, neighbours joined; with the tensor where it is not to be copied as it is."""
    run: tuple[int, int, str] | None = None
    for item in items:
        tensor = item.tensor
        plain = item.axis is None and item.factors is None
        if run and plain and run[1:] == (tensor.start, tensor.file):
            run = (run[0], tensor.end, tensor.file)
            continue
        if run:
            yield (*run, None)
        run = (tensor.start, tensor.end, tensor.file) if plain else None
        if not plain:
            yield tensor.start, tensor.end, tensor.file, item
    if run:
        yield (*run, None)


def _copy_slices(source: Source, item: Output, cut: Cut, sink: int, moved: Moved) -> None:
    """Copy the slices of the kept blocks out of a tensor that packs one for each along an axis."""
    tensor = item.tensor
    rows = math.prod(tensor.shape[: item.axis])
    row_bytes = (tensor.end - tensor.start) // rows
    width = row_bytes // cut.depth
    if rows == 1:
        for index in cut.keep:
            start = tensor.start + index * width
            source.copy(tensor.file, start, start + width, sink, moved)
        return
    step = max(1, BUFFER // row_bytes)
    for row in range(0, rows, step):
        start, end = (tensor.start + i * row_bytes for i in (row, min(row + step, rows)))
        content = np.frombuffer(source.read(tensor.file, start, end), np.uint8).reshape(-1, cut.depth, width)
        piece = content[:, list(cut.keep)].tobytes()
        write_all(sink, piece)
        moved(len(piece))


def _check_written(out: Path, file: str, items: Sequence[Output]) -> None:
    """Read the new file's header back by the rules for any file."""
    written = read_header(Folder(str(out), out), file)
    if {name: (tensor.dtype, tensor.shape) for name, tensor in written.items()} != {
        item.name: (item.tensor.dtype, item.shape) for item in items
    }:
        raise ModelError(out / file, "was not written as planned")
