"""Vectors kept on disk, so that the same text is not encoded twice by the same model.

``FOLDER/<model, and versions where asked>/`` holds pairs of files: ``<name>.npy``, (texts, dimension), mapped into
memory while rows are read from it, and ``<name>.keys.npy``, (texts, 16) bytes, the hash of each text and its prompt.
Files appear under their names when they are complete, keys last, and are never changed. A writer that was killed leaves
nothing that a reader sees, and several may write at once.
"""

from __future__ import annotations

import hashlib
import io
import json
import uuid
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer
from torch import uint8

from secateur.errors import DataError, ModelError
from secateur.files import write_bytes
from secateur.measures.metrics import paired_cosines

_KEYS = ".keys.npy"
_KEY_BYTES = 16
_OF_THE_LAST_CALL = ("padding", "truncation")
CHUNK = 1024
"""Texts encoded between two files: what a kill, or a server that fails, costs."""
PROBES = ("The gardener cut the hedge back to half its height.", "42, 7; 1999?", "Interest")
SAME = 0.999
"""Least cosine between what a model makes of a probe now and what is kept."""


def folder_of(folder: str | Path, model: str, versions: str = "") -> Path:
    """Where in a folder of vectors those of one model are: by its fingerprint, and the versions where they matter."""
    return Path(folder) / (_key(model, versions).hex() if versions else model[:32])


class VectorCache:
    """The vectors of one model, by its fingerprint, in a folder of the vectors of all models.

    ``versions`` are of the libraries that encode, where a score is to be of these alone (:func:`.versions_of`).

    Raises:
        DataError: A file is there and cannot be read.
    """

    def __init__(self, folder: str | Path, model: str, versions: str = "") -> None:
        self.folder = folder_of(folder, model, versions)
        self._rows: dict[bytes, int] = {}
        self._files: list[Path] = []
        self._starts = [0]
        for keys in sorted(self.folder.glob(f"*{_KEYS}")):
            self._add(keys)

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def dimension(self) -> int:
        """How many numbers a vector has; 0 while there is none."""
        return int(_map(self._files[0]).shape[1]) if self._files else 0

    def encode(
        self, texts: Sequence[str], context: str, encode: Callable[[list[str]], NDArray[Any]]
    ) -> NDArray[np.float32]:
        """Vectors of texts, (texts, dimension): those not kept yet are encoded, :data:`CHUNK` at a time, and kept.

        ``context`` is whatever else a vector depends on, such as the prompt.
        """
        missing = self.missing(texts, context)
        for start in range(0, len(missing), CHUNK):
            some = missing[start : start + CHUNK]
            keys = np.frombuffer(b"".join(_key(text, context) for text in some), dtype=np.uint8)
            file = self.folder / f"{uuid.uuid4().hex}{_KEYS}"
            write_bytes(_vectors_of(file), npy_bytes(np.asarray(encode(some), dtype=np.float32)))
            write_bytes(file, npy_bytes(keys.reshape(-1, _KEY_BYTES)))
            self._add(file)
        return self.read(self.rows(texts, context))

    def missing(self, texts: Iterable[str], context: str) -> list[str]:
        """The distinct texts that are not kept yet, in order."""
        return [text for text in dict.fromkeys(texts) if _key(text, context) not in self._rows]

    def rows(self, texts: Sequence[str], context: str) -> NDArray[np.int64]:
        """Numbers by which :meth:`read` finds the vectors of kept texts, in this process: (texts,)."""
        return np.array([self._rows[_key(text, context)] for text in texts], dtype=np.int64)

    def read(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Vectors by their numbers, (rows, dimension)."""
        vectors = np.empty((len(rows), self.dimension), dtype=np.float32)
        files = np.searchsorted(self._starts, rows, side="right") - 1
        for number in np.unique(files):
            own = files == number
            vectors[own] = _map(self._files[number])[rows[own] - self._starts[number]]
        return vectors

    def _add(self, file: Path) -> None:
        """Add the vectors that belong to a file of keys; what a killed writer left is skipped."""
        try:
            keys, vectors = np.load(file), np.load(_vectors_of(file), mmap_mode="r")
        except (FileNotFoundError, ValueError, EOFError):
            return
        except OSError as error:
            raise DataError(_vectors_of(file), f"kept vectors cannot be read ({error.strerror or error})") from error
        if keys.shape == (len(vectors), _KEY_BYTES) and keys.dtype == np.uint8 and vectors.ndim == 2:
            self._rows |= {key.tobytes(): self._starts[-1] + row for row, key in enumerate(keys)}
            self._files.append(_vectors_of(file))
            self._starts.append(self._starts[-1] + len(keys))


@lru_cache(64)  # a mapped file takes a file descriptor, of which a process often has 1,024
def _map(file: Path) -> NDArray[Any]:
    try:
        vectors: NDArray[Any] = np.load(file, mmap_mode="r")
    except (OSError, ValueError, EOFError) as error:
        raise DataError(file, f"kept vectors cannot be read ({error})") from error
    return vectors


def _vectors_of(keys: Path) -> Path:
    return keys.with_name(keys.name.replace(_KEYS, ".npy"))


def npy_bytes(array: NDArray[Any]) -> bytes:
    """An array as numpy's files hold it."""
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def _key(text: str, context: str) -> bytes:
    return hashlib.sha256(f"{context}\0{text}".encode()).digest()[:_KEY_BYTES]


def same_as_kept(name: str, cache: VectorCache, context: str, now: NDArray[np.float32]) -> NDArray[np.float32]:
    """Keep a model's vectors of :data:`PROBES`, or see that it still gives those that are kept, which are returned.

    ``name`` is what the user calls the model, ``now`` (probes, dimension) what it gives; where that is something else,
    as a server may have got another model, it is a ModelError.
    """
    if cache.dimension not in (0, now.shape[1]):
        raise ModelError(name, f"gives vectors of {now.shape[1]} numbers, and earlier of {cache.dimension}")
    kept = cache.encode(PROBES, context, lambda texts: now[[PROBES.index(text) for text in texts]])
    cosine = paired_cosines(kept, now).min()
    if cosine < SAME:
        problem = f"is not the model that the vectors in {cache.folder} are of (cosine {cosine:.3f} on one text)"
        raise ModelError(name, problem, "name another folder with --cache")
    return kept


def fingerprint_model(model: SentenceTransformer) -> str:
    """SHA-256 over what a model's vectors, and scores, follow from: modules, tokenizer, configuration and weights.

    That of an export or an endpoint (:class:`.BlackBox`) is known to it.
    """
    if known := getattr(model[0], "fingerprint", ""):
        return str(known)
    digest = hashlib.sha256(f"{model!r} {model.max_seq_length} {model.truncate_dim}".encode())
    if model.similarity_fn_name != "cosine":  # the default, which earlier versions did not note
        digest.update(str(model.similarity_fn_name).encode())
    if (tokenizer := getattr(model.tokenizer, "backend_tokenizer", None)) is None:
        to_str = getattr(model.tokenizer, "to_str", model.tokenizer.__repr__)  # of a static embedding's, whole
        digest.update(to_str().encode())
    else:  # without padding and truncation, which are settings of the last call
        kept = {key: value for key, value in json.loads(tokenizer.to_str()).items() if key not in _OF_THE_LAST_CALL}
        digest.update(json.dumps(kept).encode())
    configs = {id(config): config for module in model.modules() if (config := getattr(module, "config", None))}
    for config in configs.values():
        settings = {key: value for key, value in config.to_dict().items() if key != "_name_or_path"}
        digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(uint8).numpy().data)
    return digest.hexdigest()
