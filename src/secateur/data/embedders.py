"""Whatever gives vectors, opened as a ``SentenceTransformer``: a model, a static embedding, an export or an endpoint.

Those that are no model of PyTorch are one module (:class:`BlackBox`), so that prompts, batches and tasks are the same
for all.
"""

from __future__ import annotations

import hashlib
import os
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, urlsplit
from urllib.request import getproxies, proxy_bypass

import numpy as np
import torch
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import InputModule

from secateur import runtime
from secateur.data.vectors import PROBES, VectorCache, fingerprint_model, same_as_kept
from secateur.errors import ModelError
from secateur.models import is_endpoint
from secateur.models.open_model import open_model
from secateur.models.static import is_static, open_static
from secateur.provenance import ENCODING, fingerprint_files, is_export, versions_of
from secateur.runtime.encoder import as_numbers

if TYPE_CHECKING:
    from openai import OpenAI

Encode = Callable[[list[str], str], NDArray[np.float32]]

KEY, COMMON_KEY = "SECATEUR_ENDPOINT_KEY", "OPENAI_API_KEY"
FORM = "https://host/v1#model-name"
CONNECTING, TIMEOUT = 10.0, 60.0
"""Seconds in which the first connection must stand, and those without a sign of life later."""
RETRIES = 8
HINTS = {
    0: "with --cache, what it gave is kept, and the same command continues",
    401: f"set {KEY}",
    403: f"set {KEY}",
    404: f"an endpoint is named {FORM}",
    413: "a smaller --batch-size makes smaller requests",
}


class BlackBox(InputModule):  # type: ignore[misc]
    """The only module of a model that runs elsewhere: ``runs`` makes vectors of texts and the prompt before them.

    ``fingerprint`` is of what decides on the vectors, as far as that can be known; ``max_seq_length`` is None where
    cutting texts is the server's business.
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


def open_embedder(
    name: str | Path, *, device: str | None = None, trust_remote_code: bool = False
) -> SentenceTransformer:
    """Open whatever gives vectors.

    Args:
        name: What :func:`.open_model` takes; a static embedding, by its folder or Hub id (:func:`.open_static`); a
            folder that ``secateur export`` wrote; or an endpoint (:class:`Endpoint`).
        device: Torch device, for what runs on one.
        trust_remote_code: Run the model code that a repository brings along.

    Raises:
        ModelError, MissingPackage: It cannot be opened, or the runtime of an export is not installed.
    """
    if is_endpoint(name):
        server = Endpoint(str(name))
        box = BlackBox(server, server.embed, server.fingerprint)
        return SentenceTransformer(modules=[box], device="cpu", prompts=server.prompts, similarity_fn_name="cosine")
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
    if the endpoint still gives about the same ones (else a ModelError). The library versions here do not change them.
    """
    weights, server = fingerprint_model(model), getattr(model[0], "source", None)
    if not isinstance(server, Endpoint):
        return weights, None if folder is None else VectorCache(folder, weights, versions_of(ENCODING))
    vectors, cache = server.embed(PROBES), None
    if folder is not None:
        cache = VectorCache(folder, weights)
        vectors = same_as_kept(server.url, cache, "probes", vectors)
    return hashlib.sha256(weights.encode() + vectors.tobytes()).hexdigest(), cache


class Endpoint:
    """One model of a server that speaks the OpenAI embeddings API; a batch of texts is a request.

    ``name`` is ``https://host/v1#model-name``; without a name it is the server's only model. What goes before queries
    and documents may follow: ``https://host/v1#e5-base?query=query: &document=passage: ``. ``fingerprint`` is of
    address and name, since the weights cannot be known; ``dimension`` is 0 before the first vector.

    Raises:
        ModelError: The address is none, or holds a password; a model must be named, or the server cannot be asked.
    """

    def __init__(self, name: str) -> None:
        url, _, named = name.partition("#")
        model, _, prompts = named.partition("?")
        self.url, self.dimension = url.rstrip("/"), 0
        self.prompts = dict(parse_qsl(prompts, keep_blank_values=True))
        if unknown := self.prompts.keys() - {"query", "document"}:
            raise ModelError(self.url, f"is given a prompt for {min(unknown)}", f"{FORM}?query=...&document=...")
        self.client = connect(self.url)
        parts = urlsplit(self.url)
        try:
            if not getproxies() or proxy_bypass(parts.netloc):  # the client would try for about a minute
                port = parts.port or (443 if parts.scheme == "https" else 80)
                socket.create_connection((parts.hostname, port), CONNECTING).close()
        except (OSError, ValueError) as error:
            raise ModelError(self.url, f"cannot be reached ({error})") from None
        self.model = model or self._only_model()
        self.fingerprint = hashlib.sha256(f"{self.url}\0{self.model}".encode()).hexdigest()

    def _only_model(self) -> str:
        try:
            names = [str(model.id) for model in self.client.models.list().data]
        except Exception as error:
            raise self._error(error) from None
        if len(names) != 1:
            some = ", ".join(names[:10]) or "none that it tells"
            raise ModelError(self.url, f"has {len(names)} models ({some})", f"name one: {self.url}#NAME")
        return names[0]

    def embed(self, texts: Sequence[str], prompt: str = "") -> NDArray[np.float32]:
        """Vectors of texts with a prompt before each: (texts, dimension).

        Raises:
            ModelError: The server refuses, does not answer in all attempts, or its answer is not what was asked for.
        """
        texts = [prompt + text for text in texts]
        try:
            answer: Any = self.client.embeddings.create(model=self.model, input=texts, encoding_format="float")
        except Exception as error:
            raise self._error(error) from None
        try:
            rows = {int(row.index): row.embedding for row in answer.data}
            vectors = np.array([rows[i] for i in range(len(texts))], dtype=np.float32)
            if len(answer.data) != len(texts) or vectors.ndim != 2:
                raise ValueError(f"{len(answer.data)} vectors")
        except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
            problem = f"does not answer with one vector for each of {len(texts)} texts ({error!r})"
            raise ModelError(self.url, problem, f"an endpoint is named {FORM}") from None
        if vectors.shape[1] != (self.dimension or vectors.shape[1]):
            raise ModelError(self.url, f"gives vectors of {vectors.shape[1]} numbers, and earlier of {self.dimension}")
        if not (finite := np.isfinite(vectors).all(axis=1)).all():
            text = " ".join(texts[int(finite.argmin())].split())
            raise ModelError(self.url, f'gives a vector with NaN or infinity for "{text:.60}"')
        self.dimension = vectors.shape[1]
        return vectors

    def _error(self, error: Exception) -> ModelError:
        """What the openai client raised, as one line about the server."""
        status, body = getattr(error, "status_code", 0), getattr(error, "body", None)
        message = body.get("message") if isinstance(body, dict) else None
        said = " ".join(str(message or error or type(error).__name__).split())[:300]
        cause = f" {error.__cause__}" if error.__cause__ else ""  # such as a connection that was refused
        told = f"answers {status} ({said})" if status else f"gives no valid answer ({said}{cause:.200})"
        return ModelError(self.url, told, HINTS.get(status, ""))


def connect(url: str) -> OpenAI:
    """A client for a server, with the key from the environment.

    The key is ``SECATEUR_ENDPOINT_KEY``, else ``OPENAI_API_KEY``; the latter leaves this machine encrypted only.
    Redirects are refused, since they would carry the key elsewhere. Where there is no answer in time, and after 408,
    409, 429 and 5xx, a request is sent again, as late as ``Retry-After`` says (two minutes at most). Errors as those of
    :class:`Endpoint`.
    """
    import openai  # as late as it is needed

    parts = urlsplit(url)
    if not parts.hostname or "@" in parts.netloc:
        problem = "is an address with a password" if "@" in parts.netloc else "is no address"
        raise ModelError(parts.hostname or url, problem, f"{FORM}; the key stands in {KEY}")
    private = parts.scheme == "https" or parts.hostname in ("localhost", "127.0.0.1", "::1")
    key = os.environ.get(KEY) or (os.environ.get(COMMON_KEY) if private else None)
    return openai.OpenAI(
        base_url=url,
        api_key=key or "none",  # without one, the client would take OPENAI_API_KEY by itself
        max_retries=RETRIES,
        http_client=openai.DefaultHttpxClient(follow_redirects=False, timeout=TIMEOUT),
    )
