"""An exported folder, served: the light runtime as the server's :class:`.Encoder`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from secateur import runtime
from secateur.errors import ConfigError
from secateur.inference.encoders import Tokens, Vectors, read_slices
from secateur.models.open_model import MAX_LENGTH
from secateur.runtime.encoder import MANIFEST

OPENING: Mapping[str, Any] = {
    "pooling": None,
    "max_length": MAX_LENGTH,
    "dtype": "auto",
    "device": None,
    "trust_remote_code": False,
}
"""How a model is opened where nothing else is said."""


def is_export(folder: str | Path) -> bool:
    """Whether a path is a folder that ``secateur export`` wrote."""
    return (Path(folder) / MANIFEST).is_file()


def check_opening(opening: Mapping[str, Any]) -> None:
    """Refuse what an export has decided already.

    Args:
        opening: What stands in :data:`OPENING`, and maybe more.

    Raises:
        ConfigError: Something of it is not the default.
    """
    for name, default in OPENING.items():
        if opening[name] != default:
            problem = "cannot be chosen for an export, which has decided it"
            raise ConfigError(name, opening[name], problem, f"leave --{name.replace('_', '-')} out")


class ExportEncoder:
    """An export as an :class:`.Encoder`.

    Args:
        folder: What ``secateur export`` wrote.
        threads: Threads of the backend; None: all cores.

    Raises:
        ModelError: The folder is not whole.
        MissingPackage: Its backend is not installed.
    """

    def __init__(self, folder: str | Path, threads: int | None = None) -> None:
        self._runtime = runtime.load(folder, threads=threads)
        settings = self._runtime.settings
        self.dimension = settings.dimension
        self.dtype = settings.precision
        self.max_length = settings.max_length
        self.vocabulary = self._runtime.vocabulary
        self.prompts: Mapping[str, str] = settings.prompts
        self.default_prompt = settings.default_prompt_name
        self.truncation_side = settings.truncation_side

    def tokenize(self, texts: Sequence[str], prompt: str | None, *, truncate: bool, limit: int) -> list[Tokens]:
        """See :meth:`.tokenize`."""
        before = self.prompts[prompt] if prompt else ""
        length = self._runtime.prompt_length(before)

        def read(some: list[str]) -> list[Tokens]:
            found = self._runtime.tokenize(some, before, truncate=truncate)
            return [Tokens(np.asarray(ids, dtype=np.int32), length) for ids in found]

        return read_slices(read, texts, self.max_length, self.truncation_side, truncate=truncate, limit=limit)

    def encode(self, batch: Sequence[Tokens]) -> Vectors:
        """See :meth:`.encode`."""
        vectors = self._runtime.run([text.ids.tolist() for text in batch], batch[0].prompt_length)
        if not np.isfinite(vectors).all():
            raise FloatingPointError("the model gave a vector that is not finite")
        return vectors
