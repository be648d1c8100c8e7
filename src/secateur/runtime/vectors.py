"""Vectors in fewer bits, as sentence-transformers' ``quantize_embeddings`` writes them, without its imports."""

from __future__ import annotations

from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

VectorFormat = Literal["float32", "int8", "uint8", "binary", "ubinary"]
FORMATS: tuple[str, ...] = get_args(VectorFormat)
STEPS = 255


def quantize(vectors: npt.NDArray[np.float32], form: VectorFormat, ranges: npt.NDArray[np.float32]) -> npt.NDArray[Any]:
    """Round vectors (texts, dimension) to bytes, or to bits packed by eight.

    Args:
        vectors: Vectors of length 1.
        form: ``int8`` and ``uint8``: 256 steps between each dimension's least and greatest value; ``binary`` and
            ``ubinary``: one bit a dimension, whether it is above 0, as signed and unsigned bytes.
        ranges: (2, dimension), least and greatest value of each dimension, on texts of their own.
    """
    if form == "float32":
        return vectors
    if form in ("binary", "ubinary"):
        bits: npt.NDArray[np.uint8] = np.packbits(vectors > 0, axis=-1)
        return (bits.astype(np.int16) - 128).astype(np.int8) if form == "binary" else bits
    least, greatest = ranges
    step = (greatest - least) / np.float32(STEPS)
    steps: npt.NDArray[np.float32] = np.clip(np.floor((vectors - least) / np.where(step == 0, 1, step)), 0, STEPS)
    return (steps - 128).astype(np.int8) if form == "int8" else steps.astype(np.uint8)


def as_numbers(vectors: npt.NDArray[Any], form: VectorFormat, dimension: int) -> npt.NDArray[np.float32]:
    """Vectors as they are compared: bytes as numbers around 0, bits as -1 and 1."""
    if form in ("binary", "ubinary"):
        packed = (vectors.astype(np.int16) + 128).astype(np.uint8) if form == "binary" else vectors
        return np.unpackbits(packed, axis=-1, count=dimension).astype(np.float32) * 2 - 1
    numbers = vectors.astype(np.float32)
    return numbers - 128 if form == "uint8" else numbers
