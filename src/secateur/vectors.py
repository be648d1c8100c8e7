"""Vectors kept on disk, so that the same text is not encoded twice by the same model.

``FOLDER/<model fingerprint>/`` holds pairs of files: ``<name>.npy``, (texts, dimension), mapped into memory and read
row by row, and ``<name>.keys.npy``, (texts, 16) bytes, the hash of each text and of what stood before it. Files appear
under their names when they are complete, keys last, and are never changed. A writer that was killed leaves nothing that
a reader sees, and several may write at once.
"""

from __future__ import annotations

import hashlib
import io
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from secateur.artifacts import write_bytes

_KEYS = ".keys.npy"
_HASH_BYTES = 16


class VectorCache:
    """The vectors of one model.

    Args:
        folder: Of the vectors of all models; made when the first is written.
        model: Fingerprint of the model; other weights or another tokenizer have another.
    """

    def __init__(self, folder: str | Path, model: str) -> None:
        self.folder = Path(folder) / model[:32]
        self._where: dict[bytes, tuple[int, int]] = {}
        self._files: list[NDArray[Any]] = []
        for file in sorted(self.folder.glob(f"*{_KEYS}")):
            self._open(file)

    def __len__(self) -> int:
        return len(self._where)

    def encode(
        self, texts: Sequence[str], context: str, encode: Callable[[list[str]], NDArray[Any]]
    ) -> NDArray[np.float32]:
        """Vectors of texts, (texts, dimension): those not kept yet are encoded, once each, and kept.

        Args:
            texts: May repeat.
            context: Whatever else a vector depends on, such as the prompt.
            encode: Called with the texts that are missing, if any.
        """
        keys = [hashlib.sha256(f"{context}\0{text}".encode()).digest()[:_HASH_BYTES] for text in texts]
        missing = {key: text for key, text in zip(keys, texts, strict=True) if key not in self._where}
        if missing:
            self._add(list(missing), np.asarray(encode(list(missing.values())), dtype=np.float32))
        return self._read(keys)

    def _read(self, keys: Sequence[bytes]) -> NDArray[np.float32]:
        places = np.array([self._where[key] for key in keys]).reshape(-1, 2)
        dimension = self._files[0].shape[1] if self._files else 0
        vectors = np.empty((len(keys), dimension), dtype=np.float32)
        for number in np.unique(places[:, 0]):
            rows = places[:, 0] == number
            vectors[rows] = self._files[number][places[rows, 1]]
        return vectors

    def _add(self, keys: Sequence[bytes], vectors: NDArray[np.float32]) -> None:
        name = uuid.uuid4().hex
        file = self.folder / f"{name}{_KEYS}"
        write_bytes(self.folder / f"{name}.npy", _as_npy(vectors))
        write_bytes(file, _as_npy(np.frombuffer(b"".join(keys), dtype=np.uint8).reshape(-1, _HASH_BYTES)))
        self._open(file)

    def _open(self, file: Path) -> None:
        """Add the vectors that belong to a file of keys. What is damaged is as if it were not there."""
        try:
            keys = np.load(file)
            vectors = np.load(file.with_name(file.name.replace(_KEYS, ".npy")), mmap_mode="r")
        except (OSError, ValueError, EOFError):
            return
        if keys.shape != (len(vectors), _HASH_BYTES) or keys.dtype != np.uint8 or vectors.ndim != 2:
            return
        self._where |= {key.tobytes(): (len(self._files), row) for row, key in enumerate(keys)}
        self._files.append(vectors)


def _as_npy(array: NDArray[Any]) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()
