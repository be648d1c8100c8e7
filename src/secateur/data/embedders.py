"""Whatever gives vectors, opened as a ``SentenceTransformer``, to be compared with what secateur makes.

A model, a static embedding, a folder that ``secateur export`` wrote, or an endpoint. Those that are no model of PyTorch
are one module (:class:`BlackBox`), so that prompts, batches and tasks are the same for all.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import InputModule

from secateur import runtime
from secateur.data.endpoints import REQUEST_TEXTS, Endpoint
from secateur.data.vectors import PROBES, VectorCache, fingerprint_model, same_as_kept
from secateur.models import is_endpoint
from secateur.models.open_model import open_model
from secateur.models.static import is_static, open_static
from secateur.progress import quiet
from secateur.provenance import ENCODING, fingerprint_files, is_export, versions_of
from secateur.runtime.encoder import as_numbers

Encode = Callable[[list[str], str], NDArray[np.float32]]


class BlackBox(InputModule):  # type: ignore[misc]
    """The only module of a model that runs elsewhere.

    Attributes:
        source: What runs it.
        runs: Texts and the prompt before them → vectors (texts, dimension).
        fingerprint: Of what decides on the vectors, as far as that can be known.
        max_seq_length: Tokens after which a text is cut; None where that is the server's business.
    """

    tokenizer = None

    def __init__(self, source: runtime.Encoder | Endpoint, runs: Encode, fingerprint: str) -> None:
        super().__init__()
        self.source, self.runs, self.fingerprint = source, runs, fingerprint
        self.max_seq_length = getattr(source, "max_length", None)

    def preprocess(self, inputs: list[str], prompt: str | None = None, **_: Any) -> dict[str, Any]:
        return {"texts": inputs, "prompt": prompt or ""}

    def forward(self, features: dict[str, Any], **_: Any) -> dict[str, Any]:
        return {"sentence_embedding": torch.from_numpy(self.runs(features["texts"], features["prompt"]))}

    def get_embedding_dimension(self) -> int | None:
        return self.source.dimension or None

    def save(self, output_path: str, *_: Any, **__: Any) -> None:
        raise NotImplementedError("it is no model of PyTorch")


class _Remote(SentenceTransformer):  # type: ignore[misc]
    """A model behind an endpoint: a batch is a request, as large as one may be."""

    def encode(self, inputs: Any, *args: Any, **options: Any) -> Any:
        return super().encode(inputs, *args, **options | {"batch_size": REQUEST_TEXTS})


def open_embedder(
    name: str | Path, *, device: str | None = None, trust_remote_code: bool = False
) -> SentenceTransformer:
    """Open whatever gives vectors.

    Args:
        name: What :func:`.open_model` takes; a static embedding, by its folder or Hub id (:mod:`.static`); a folder
            that ``secateur export`` wrote; or an endpoint (:mod:`.endpoints`).
        device: Torch device, for what runs on one.
        trust_remote_code: Run the model code that a repository brings along.

    Raises:
        ModelError: It cannot be opened.
        MissingPackage: The runtime of an export, or the client of endpoints, is not installed.
    """
    if is_endpoint(name):
        server = Endpoint(str(name))
        box = BlackBox(server, server.embed, server.fingerprint)
        return _Remote(modules=[box], device="cpu", prompts=server.prompts, similarity_fn_name="cosine")
    if is_export(name):
        return as_model(runtime.load(name))
    if is_static(name):
        return open_static(name, device=device)
    return open_model(name, device=device, trust_remote_code=trust_remote_code)


def as_model(encoder: runtime.Encoder) -> SentenceTransformer:
    """An opened export as a model, whose vectors are rounded as the export says."""
    about = encoder.settings

    def run(texts: list[str], prompt: str) -> NDArray[np.float32]:
        return as_numbers(encoder.encode(texts, prompt=prompt), about.vectors, about.dimension)

    return SentenceTransformer(
        modules=[BlackBox(encoder, run, fingerprint_files(encoder.name))],
        device="cpu",
        prompts=dict(encoder.prompts),
        default_prompt_name=encoder.default_prompt,
        similarity_fn_name="cosine",
    )


def identify(model: SentenceTransformer, folder: Path | None) -> tuple[str, VectorCache | None]:
    """A model's fingerprint, and its vectors in a folder, where one is given.

    That of an endpoint is its address, its name, and its vectors of a few texts: those in the folder where it has some,
    if the endpoint still gives about the same ones. The library versions of this machine do not change its vectors.

    Raises:
        ModelError: The endpoint gives no vectors, or others than those that are kept.
    """
    weights = fingerprint_model(model)
    if not isinstance(model, _Remote):
        return weights, None if folder is None else VectorCache(folder, weights, versions_of(ENCODING))
    with quiet():
        vectors = np.asarray(model.encode(list(PROBES), prompt="", show_progress_bar=False), dtype=np.float32)
    cache = None if folder is None else VectorCache(folder, weights)
    if cache is not None:
        vectors = same_as_kept(model[0].source.url, cache, "probes", vectors)
    return hashlib.sha256(weights.encode() + vectors.tobytes()).hexdigest(), cache
