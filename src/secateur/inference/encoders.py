"""A model in PyTorch as an encoder: for bulk encoding, for the server, and for :func:`accelerate`.

The vectors are those of ``SentenceTransformer.encode``; batches are made by tokens (:mod:`secateur.runtime.core`), and
the keys and values of a prompt are computed once where a model attends only backwards.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.util import get_device_name, truncate_embeddings
from torch import Tensor, nn

from secateur.errors import ModelError
from secateur.measures.metrics import paired_cosines
from secateur.models import model_source
from secateur.models.forward import REFUSALS, SHORTEST_PREFIX, Prefix, pool, run_after, run_prefix
from secateur.models.open_model import MAX_LENGTH, check_device, is_causal, open_model
from secateur.models.save import NO_LIMIT, PROBES, longest_text
from secateur.options import EncodeOptions, SavedPooling, ServeOptions
from secateur.progress import quiet
from secateur.provenance import fingerprint_files, is_export
from secateur.runtime.core import CPU_BATCH, GPU_BATCH, PADDING, Encoder, OnBatch, RunBatch, Tokens, Vectors, ignore

AUTO, TORCH = "auto", "torch"
STORED = "stored"
"""The dtype of the weights as they are."""
LEAST_COSINE = 0.999
"""What batches must keep of the model's own vectors."""
SHARED_FROM = 8
"""Texts under one prompt from which on it pays to compute it once, and apart."""


@dataclass(frozen=True)
class Opening:
    """How a model is opened: what is said once, and given to every worker.

    ``auto`` is for :func:`.choose` to decide; until then it means PyTorch, in float32 on a CPU, as stored on a GPU.
    """

    model: str  # whatever open_model takes, or a folder that export wrote
    dtype: str = AUTO
    pooling: SavedPooling | None = None
    max_length: int = MAX_LENGTH
    device: str | None = None
    trust_remote_code: bool = False
    batch_tokens: int | None = None  # default: by the device
    threads: int | None = None  # default: all of the processor
    backend: str = AUTO
    calibration: tuple[str, ...] = ()  # texts by which int8 rounds, also in a worker elsewhere, which converts anew
    fingerprint: str = ""  # that of the model's files where workers open it, which may be started much later

    @classmethod
    def of(cls, options: EncodeOptions | ServeOptions) -> Opening:
        """As options say; refuses a device that this machine does not have."""
        said = {field.name: getattr(options, field.name) for field in fields(cls) if hasattr(options, field.name)}
        source = model_source(options.model)
        alone = not options.workers if isinstance(options, ServeOptions) else options.processes == 1 and not options.ray
        opening = cls(**said | {"model": source, "fingerprint": "" if alone else fingerprint_files(source)})
        if not opening.exported:
            check_device(opening.device)
        return opening

    @property
    def exported(self) -> bool:
        """Whether the model is a folder that ``secateur export`` wrote."""
        return is_export(self.model)

    @property
    def on_cpu(self) -> bool:
        """Whether it runs on the processor."""
        return self.exported or torch.device(self.device or get_device_name()).type == "cpu"


def open_torch(opening: Opening) -> ModelEncoder:
    """Open a model in PyTorch."""
    if opening.threads:
        torch.set_num_threads(opening.threads)
    dtype = {AUTO: "float32" if opening.on_cpu else AUTO, STORED: AUTO}
    model = open_model(
        opening.model,
        dtype=dtype.get(opening.dtype, opening.dtype),
        pooling=opening.pooling,
        max_length=opening.max_length,
        device=opening.device,
        trust_remote_code=opening.trust_remote_code,
    )
    return ModelEncoder(model, opening.model, batch_tokens=opening.batch_tokens)


class ModelEncoder(Encoder):
    """A ``SentenceTransformer`` as an :class:`Encoder`, compared with the model's own ``encode`` when it is made.

    Args:
        model: Its first module must be a transformer; changed to evaluation mode.
        name: What errors call it.
        batch_tokens: Tokens in a batch, padding included; default: 1,024 on a CPU, 8,192 on a GPU.

    Raises:
        ModelError: The model is no transformer, or gives other vectors in batches than its own ``encode``.
    """

    padding = PADDING

    def __init__(self, model: SentenceTransformer, name: str = "model", *, batch_tokens: int | None = None) -> None:
        if not isinstance(model[0], Transformer) or model.tokenizer is None:
            raise ModelError(name, "is not a transformer with a tokenizer", "other kinds cannot be encoded with")
        self.model, self.name = model.eval(), name
        self.dimension = int(model.get_embedding_dimension() or 0)
        self.max_length = longest_text(model) or NO_LIMIT
        self.vocabulary = int(model[0].auto_model.get_input_embeddings().num_embeddings)
        self.prompts, self.default_prompt = dict(model.prompts), model.default_prompt_name
        self.truncation_side = model.tokenizer.truncation_side
        self.dtype = str(model.dtype).removeprefix("torch.")
        self.batch_tokens = batch_tokens or (CPU_BATCH if model.device.type == "cpu" else GPU_BATCH)
        self._modality = model.preprocess(["a"])["modality"]
        self._shares_prompts = is_causal(model[0])
        self._prefix: Prefix | None = None
        self._compared: set[bytes] = set()
        with quiet():
            expected = model.encode(list(PROBES), prompt_name=self.default_prompt, show_progress_bar=False)
        found = self.encode_batch(self.tokenize(PROBES, self.prompt_of(None)))
        cosine = float(paired_cosines(found, expected).min())
        if not cosine >= LEAST_COSINE:  # a module may want more than tokens and a mask
            raise ModelError(name, f"gives other vectors in batches than alone (cosine {cosine:.4f})")
        self.length_step = 1  # the probes had more padding

    def encode_texts(
        self, texts: Sequence[str], prompt: str = "", on_batch: OnBatch = ignore, **options: Any
    ) -> Vectors:
        """See :meth:`Encoder.encode_texts`."""
        # The model may have been trained since, or been told to read more.
        self._prefix, self.max_length = None, longest_text(self.model) or NO_LIMIT
        return super().encode_texts(texts, prompt, on_batch, **options)

    def read(self, texts: Sequence[str], prompt: str, truncate: bool) -> list[Tokens]:
        """See :meth:`Encoder.read`."""
        options = {
            "text": {"padding": False, "truncation": truncate, "verbose": False},
            "common": {"return_tensors": None},
        }
        read = self.model.preprocess(list(texts), prompt=prompt or None, processing_kwargs=options)
        length = int(read.get("prompt_length") or 0)
        return [Tokens(np.asarray(ids, dtype=np.int32), length) for ids in read["input_ids"]]

    def run(self, batch: Sequence[Tokens]) -> Vectors:
        """See :meth:`Encoder.run`."""
        with torch.inference_mode():
            return self._as_array(self.model(self._features(batch))["sentence_embedding"])

    def prepare(self, tokens: Sequence[Tokens]) -> tuple[RunBatch, int]:
        """See :meth:`Encoder.prepare`: what the prompt makes all texts start with is run once, if that gives the same.

        What a model cannot do (or has no memory for) is done in the plain way.
        """
        start = _shared_start(tokens)
        if not self._shares_prompts or len(start) < SHORTEST_PREFIX:
            return self.run, 0
        try:
            run = partial(self._run_after, self._run_prefix(start))
            if start.tobytes() not in self._compared:
                probes = tokens[:: max(1, len(tokens) // 8)]
                cosine = paired_cosines(run(probes), self.run(probes)).min()
                exact = self.model.dtype == torch.float32
                self._shares_prompts = bool(cosine >= (1 - 1e-6 if exact else LEAST_COSINE))
                self._compared.add(start.tobytes())
        except REFUSALS:
            self._shares_prompts = False
        return (run, len(start)) if self._shares_prompts else (self.run, 0)

    def _run_prefix(self, start: NDArray[np.int32]) -> Prefix:
        ids = torch.from_numpy(start.astype(np.int64))
        if self._prefix is None or not torch.equal(self._prefix.ids, ids):
            with torch.inference_mode():
                self._prefix = run_prefix(self.model[0].auto_model, ids)
        return self._prefix

    def _run_after(self, prefix: Prefix, batch: Sequence[Tokens]) -> Vectors:
        """As :meth:`run`, for texts that start with what has been run already."""
        with torch.inference_mode():
            features = self._features(batch)
            found = run_after(self.model[0].auto_model, prefix, features).last_hidden_state
            states = torch.cat([prefix.states.expand(len(batch), -1, -1), found], dim=1)
            return self._as_array(pool(self.model, states, features))

    def _features(self, batch: Sequence[Tokens]) -> dict[str, Any]:
        """What the model's modules take: tensors (batch, length)."""
        ids, mask = self.pad(batch, self.model.tokenizer.pad_token_id or 0)
        device = self.model.device
        features: dict[str, Any] = {
            "input_ids": torch.from_numpy(ids).to(device),
            "attention_mask": torch.from_numpy(mask).to(device),
            "modality": self._modality,
        }
        if batch[0].prompt_length:
            features["prompt_length"] = batch[0].prompt_length
        return features

    def _as_array(self, vectors: Tensor) -> Vectors:
        return vectors[:, : self.dimension].float().cpu().numpy()


def _shared_start(tokens: Sequence[Tokens]) -> NDArray[np.int32]:
    """The ids of a prompt that all texts start with; none where the texts are too few to gain by it."""
    length = min(tokens[0].prompt_length, min(map(len, tokens)) - 1) if len(tokens) >= SHARED_FROM else 0
    starts = np.stack([text.ids[:length] for text in tokens])
    return starts[0, : int((starts == starts[0]).all(axis=0).cumprod().sum())]


class FastEncoder(SentenceTransformer):  # type: ignore[misc]
    """A ``SentenceTransformer`` whose ``encode`` runs on a :class:`ModelEncoder`; :func:`accelerate` makes it."""

    def _inference(self, inputs: list[Any], **options: Any) -> Any:
        """The place of ``encode`` where texts become vectors; prompts and precisions are handled around it."""
        handled = {"prompt", "batch_size", "show_progress_bar", "output_value", "save_to_cpu", "device"}
        handled |= {"normalize_embeddings", "truncate_dim"}
        elsewhere = options.get("device") is not None and torch.device(options["device"]) != self.device
        plain = options["output_value"] == "sentence_embedding" and all(isinstance(text, str) for text in inputs)
        longer = (options["truncate_dim"] or 0) > self.encoder.dimension
        if elsewhere or longer or not plain or not inputs or options.keys() - handled:
            return super()._inference(inputs, **options)
        vectors = torch.from_numpy(self.encoder.encode_texts(inputs, options["prompt"] or ""))
        if options["truncate_dim"] is not None:
            vectors = truncate_embeddings(vectors, options["truncate_dim"])
        if options["normalize_embeddings"]:
            vectors = nn.functional.normalize(vectors, p=2, dim=1)
        return vectors if options["save_to_cpu"] else vectors.to(self.device)


def accelerate(model: SentenceTransformer, *, batch_tokens: int | None = None) -> SentenceTransformer:
    """A model whose ``encode`` is faster: the same signature, the same vectors, the same weights in memory.

    ``batch_size`` means nothing to it: batches are made by tokens. What it cannot do faster (token embeddings, other
    devices, inputs that are no texts), the model's own ``encode`` does. mteb and LangChain take it as the model.

    Args:
        model: Shared, not copied: train or change the one, and the other changes with it.
        batch_tokens: Tokens in a batch, padding included; default: 1,024 on a CPU, 8,192 on a GPU.

    Raises:
        ModelError: The model is not open or no transformer, or gives other vectors in batches than its own ``encode``.
    """
    if not isinstance(model, SentenceTransformer):
        raise ModelError(str(model), "is not an open SentenceTransformer", "open it with secateur.open_model(NAME)")
    encoder = ModelEncoder(model, batch_tokens=batch_tokens)
    fast = copy.copy(model)
    fast.__class__ = FastEncoder
    fast.encoder = encoder
    return fast
