"""The format of a safetensors checkpoint: headers, the index, and where each tensor's bytes lie.

A safetensors file is the length n of its header (8 bytes, little-endian), n bytes of JSON, and the tensors' bytes end
to end (https://huggingface.co/docs/safetensors). So a tensor can be had without its neighbours: here a tensor is a
range of a file, nothing is ever unpacked, and everything a file says is checked before it is believed.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from secateur.errors import ModelError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# The limit of the safetensors library itself.
MAX_HEADER_BYTES = 100_000_000
# Bits of one number of each type.
DTYPES = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16, "U32": 32, "I32": 32, "F32": 32,
    "U64": 64, "I64": 64, "F64": 64, "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip

BUFFER = 4 << 20

Moved = Callable[[int], None]


@dataclass(frozen=True)
class Tensor:
    """One tensor where it lies: bytes ``start`` to ``end`` of ``file``, row-major."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


class Source(Protocol):
    """A checkpoint's files, wherever they are. ``bytes_read`` counts what was read of its shards."""

    name: str
    bytes_read: int

    def find(self, file: str) -> Path | None:
        """A small file, as a local file; None where there is none."""

    def exists(self, file: str) -> bool:
        """Whether there is such a file; it is not fetched."""

    def size(self, file: str) -> int:
        """Length of a shard in bytes."""

    def read(self, file: str, start: int, end: int) -> bytes:
        """A range of a shard."""

    def copy(self, file: str, start: int, end: int, sink: int, moved: Moved) -> None:
        """Append a range of a shard to the file descriptor ``sink``, telling ``moved`` of each piece's bytes."""

    def check(self, shard: str) -> None:
        """Raise where it is known, without asking anybody, that a shard is not there."""

    def where(self, file: str) -> str:
        """How to name a file in a message."""

    def absent(self, file: str, hint: str = "") -> ModelError:
        """The error for a file that must be there."""


def read_json(file: Path) -> Any:
    """Parse a small JSON file of a model.

    Raises:
        ModelError: It cannot be read, is too large, or is not JSON.
    """
    try:
        if file.stat().st_size > MAX_HEADER_BYTES:
            raise ModelError(file, f"has more than {MAX_HEADER_BYTES} bytes")
        return parse_json(file.read_bytes(), str(file))
    except OSError as error:
        raise ModelError(file, f"cannot be read ({error.strerror or error})") from None


def parse_json(content: bytes, where: str) -> Any:
    """Parse JSON that may be hostile; a key that stands twice is an error."""
    try:
        return json.loads(content.decode("utf-8"), object_pairs_hook=_no_duplicates)
    except _DuplicateKey as error:
        raise ModelError(where, f"broken JSON (the key {str(error)!r} stands twice)") from None
    except (ValueError, RecursionError) as error:
        message = error.msg if isinstance(error, json.JSONDecodeError) else type(error).__name__
        raise ModelError(where, f"broken JSON ({message})") from None


class _DuplicateKey(Exception):
    """A JSON object with the same key twice."""


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        seen: set[str] = set()
        raise _DuplicateKey(next(key for key, _ in pairs if key in seen or seen.add(key)))  # type: ignore[func-returns-value]
    return content


def read_header(source: Source, file: str) -> dict[str, Tensor]:
    """The tensors of one safetensors file, by name.

    Raises:
        ModelError: The file is missing, cut short, or its header does not describe exactly the bytes that follow it.
    """
    where = source.where(file)
    size = source.size(file)
    if size < 8:
        raise ModelError(where, f"is cut short: {size} bytes, less than the header of a safetensors file")
    length = int.from_bytes(source.read(file, 0, 8), "little")
    if length > MAX_HEADER_BYTES:
        raise ModelError(where, f"is no safetensors file: a header of {length} bytes (at most {MAX_HEADER_BYTES})")
    if 8 + length > size:
        raise ModelError(where, f"is cut short: {size} bytes, but its header alone has {length}")
    content = parse_json(source.read(file, 8, 8 + length), where)
    if not isinstance(content, dict):
        raise ModelError(where, "is no safetensors file: its header is not a JSON object")
    metadata = content.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ModelError(where, "the __metadata__ of its header is not a map from text to text")
    tensors = {name: _tensor(file, name, entry, 8 + length, where) for name, entry in content.items()}
    _check_layout(tensors, 8 + length, size, where)
    return tensors


def _tensor(file: str, name: str, entry: Any, base: int, where: str) -> Tensor:
    """Check one entry of a header."""
    shown = repr(name[:200])
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        raise ModelError(where, f"the name {shown} is not valid Unicode") from None
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ModelError(where, f"tensor {shown} must have dtype, shape and data_offsets, and nothing else")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ModelError(
            where, f"tensor {shown} has the unknown type {str(dtype)[:50]!r}", f"one of {', '.join(DTYPES)}"
        )
    if not _are_counts(shape) or len(shape) > 64:
        raise ModelError(where, f"tensor {shown} has a shape that is not a list of sizes")
    if not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ModelError(where, f"tensor {shown} has data_offsets that are not [begin, end]")
    begin, end = offsets
    # math.prod of hostile sizes may have many digits; it is compared, never printed.
    if math.prod(shape) * DTYPES[dtype] != (end - begin) * 8:
        raise ModelError(
            where, f"tensor {shown} is {dtype} of shape {shape}, which its {end - begin} bytes do not hold"
        )
    return Tensor(file, dtype, tuple(shape), base + begin, base + end)


def _are_counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 63 for item in value)


def _check_layout(tensors: Mapping[str, Tensor], base: int, size: int, where: str) -> None:
    """The tensors must fill the file end to end: no hole, no overlap, nothing after the last."""
    position = base
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if tensor.end > size:
            raise ModelError(where, f"is cut short: {size} bytes, but tensor {name[:200]!r} ends at byte {tensor.end}")
        if tensor.start != position:
            problem = "overlaps the one before it" if tensor.start < position else "leaves a hole before it"
            raise ModelError(where, f"tensor {name[:200]!r} {problem} (begins at {tensor.start}, not at {position})")
        position = tensor.end
    if position != size:
        raise ModelError(where, f"has {size} bytes, but its header describes {position}")


def shard_names(source: Source) -> dict[str, str]:
    """Which shard holds which tensor, from the index, or from the header of the only file.

    Raises:
        ModelError: There are no safetensors weights, or the index is broken or leads out of the checkpoint.
    """
    # transformers looks for the single file first, and so must who wants the same weights.
    if source.exists(SINGLE):
        return dict.fromkeys(read_header(source, SINGLE), SINGLE)
    file = source.find(INDEX)
    if file is None:
        raise _no_weights(source)
    where = source.where(INDEX)
    content = read_json(file)
    names = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(names, dict) or not all(isinstance(shard, str) for shard in names.values()):
        raise ModelError(where, "has no weight_map from tensors to files")
    for shard in sorted(set(names.values())):
        check_relative(shard, where)
        if not shard.endswith(".safetensors"):
            raise ModelError(where, f"names {shard!r}, which is no safetensors file")
        source.check(shard)
    return names


def _no_weights(source: Source) -> ModelError:
    for file in ("pytorch_model.bin", "pytorch_model.bin.index.json"):
        if source.exists(file):
            line = (
                'python -c "from transformers import AutoModel; '
                f"AutoModel.from_pretrained('{source.name}').save_pretrained('converted')\""
            )
            return ModelError(source.name, f"has only PyTorch weights ({file})", f"convert them to safetensors: {line}")
    return ModelError(source.name, f"has no weights ({SINGLE} or {INDEX})")


def check_relative(file: str, where: str) -> None:
    """Refuse a file name that leads out of a model's folder."""
    path = PurePosixPath(file)
    if not path.parts or path.is_absolute() or ".." in path.parts or re.search(r"[\\\x00-\x1f:]", file):
        raise ModelError(where, f"names {file!r}, which leads out of the model's folder")


def write_all(sink: int, content: bytes | memoryview) -> None:
    """Write all the bytes: ``os.write`` may take fewer."""
    view = memoryview(content)
    while view:
        view = view[os.write(sink, view) :]
