"""Vectors to one file of any size: Parquet, Arrow IPC or NumPy, by its suffix, a piece at a time.

Parquet and Arrow get the columns ``row`` (from 0, over all inputs) and ``embedding`` (a list of fixed length), and the
description under the key ``secateur`` of the schema's metadata. NumPy gets an array (rows, dimension), which
``numpy.load(file, mmap_mode="r")`` maps into memory, and the description in a JSON file beside it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.ipc
import pyarrow.parquet as parquet
from numpy.typing import DTypeLike, NDArray

from secateur.errors import ConfigError, DataError
from secateur.files import check_is_file, read_json, write_text

SUFFIXES = (".parquet", ".arrow", ".feather", ".npy")


def check_suffix(file: Path) -> None:
    """Refuse a name whose suffix says no known format."""
    if file.suffix.lower() not in SUFFIXES:
        raise ConfigError("out", str(file), f"{file.name} is of no known format", f"one of {', '.join(SUFFIXES)}")


def write_vectors(
    file: Path,
    pieces: Iterable[NDArray[Any]],
    shape: tuple[int, int],
    dtype: DTypeLike,
    about: Mapping[str, Any],
    out: Path,
) -> None:
    """Write pieces (rows, width), together of ``shape``, into a file that will be called ``out``, in its format.

    ``about`` is what it says of itself; NumPy's file cannot hold that, so it is written beside ``out``.
    """
    kind = np.dtype(dtype)
    if (beside := description_file(out)) is not None:
        with file.open("wb") as stream:
            header = {"descr": np.lib.format.dtype_to_descr(kind), "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(stream, header)
            for piece in pieces:
                stream.write(np.ascontiguousarray(piece, dtype=kind).data)
        write_text(beside, json.dumps(about, indent=1))
        return
    embedding = pyarrow.list_(pyarrow.from_numpy_dtype(kind), shape[1])
    fields = [pyarrow.field("row", pyarrow.int64(), False), pyarrow.field("embedding", embedding, False)]
    schema = pyarrow.schema(fields, metadata={"secateur": json.dumps(about)})
    if out.suffix.lower() == ".parquet":
        # Numbers of a vector hardly repeat: a dictionary or compression would cost time and save nothing.
        writer: Any = parquet.ParquetWriter(file, schema, compression="none", use_dictionary=False)
    else:
        writer = pyarrow.ipc.new_file(str(file), schema)
    row = 0
    with writer:
        for piece in pieces:
            rows = pyarrow.array(np.arange(row, row + len(piece), dtype=np.int64))
            values = pyarrow.array(np.ascontiguousarray(piece).reshape(-1))
            embeddings = pyarrow.FixedSizeListArray.from_arrays(values, type=embedding)
            writer.write_batch(pyarrow.RecordBatch.from_arrays([rows, embeddings], schema=schema))
            row += len(piece)


def description_file(file: Path) -> Path | None:
    """Where a file's description stands, if not in the file itself."""
    return file.with_name(f"{file.name}.json") if file.suffix.lower() == ".npy" else None


def read_description(file: Path) -> dict[str, Any]:
    """What a file of vectors says of itself, or what a JSON file holds; DataError where that is nothing."""
    file = description_file(file) or file
    check_is_file(file)
    about: Any = None
    try:
        if file.suffix.lower() == ".parquet":
            about = json.loads(parquet.read_schema(file).metadata[b"secateur"])
        elif file.suffix.lower() in (".arrow", ".feather"):
            with pyarrow.memory_map(str(file)) as source:
                about = json.loads(pyarrow.ipc.open_file(source).schema.metadata[b"secateur"])
        else:
            about = read_json(file)
    except (pyarrow.ArrowException, OSError, KeyError, TypeError, ValueError):
        pass
    if not isinstance(about, dict):
        raise DataError(file, "does not say how its vectors were made", "give a file that encode wrote")
    return about
