"""Many texts → vectors, as quickly as the processor can: what bulk encoding and :func:`accelerate` run on.

The vectors are those of ``SentenceTransformer.encode``; the way to them is shorter. The texts of a window are sorted by
length and run in batches of about as many tokens, so that little is padding. A prompt's keys and values are computed
once where a model attends only backwards. Texts are tokenized beside the model. In what number format its layers
multiply is the model's own affair (:mod:`.arithmetic`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import truncate_embeddings
from torch import Tensor, nn

from secateur.errors import ModelError
from secateur.inference.arithmetic import PROBED_COSINE
from secateur.inference.encoders import LEAST_COSINE, ModelEncoder, Tokens, Vectors, batch_budget, read_cut
from secateur.inference.mixed import is_mixed
from secateur.measures.metrics import paired_cosines
from secateur.models.forward import (
    REFUSALS,
    SHORTEST_PREFIX,
    SharedPrefix,
    halves,
    is_out_of_memory,
    plan_evenly,
    run_after,
    run_prefix,
)
from secateur.models.open_model import is_causal
from secateur.models.pooling import pool
from secateur.runtime.slices import CHARACTERS_PER_TOKEN, slices

SHARED_FROM = 8
"""Texts under one prompt from which on it pays to compute it once, and apart."""

WINDOW = 512
"""Texts tokenized, and cut into batches, together; they come sorted by their characters."""

Told = Callable[[int, int], None]
"""Called as ``told(texts, tokens)`` with what has been encoded since it was called last; tokens of prompts count."""


def tell_nobody(texts: int, tokens: int) -> None:
    """Tell nobody."""


@dataclass(frozen=True, eq=False)
class _Prefix:
    """What texts under one prompt start with: token ids, keys and values, and the last states (1, tokens, width)."""

    ids: NDArray[np.int32]
    cache: SharedPrefix
    states: Tensor

    def starts(self, text: Tokens) -> bool:
        length = len(self.ids)
        return len(text) > length and bool((text.ids[:length] == self.ids).all())


class Engine:
    """Runs texts through a model, many at a time. One thread may tokenize while another one runs.

    Args:
        model: An opened model; changed to evaluation mode.
        batch_tokens: Tokens in a batch, padding included; default: :func:`.batch_budget`.
        name: What errors call the model.

    Raises:
        ModelError: The model is no transformer, or gives other vectors in batches than its own ``encode``.
    """

    def __init__(self, model: SentenceTransformer, *, batch_tokens: int | None = None, name: str = "model") -> None:
        self._model = model
        self._name = name
        self._encoder = ModelEncoder(model, name)
        self._budget = batch_tokens or batch_budget(model.device)
        self._shares = is_causal(model[0])
        self._prefix: _Prefix | None = None
        self._agreed: set[bytes] = set()
        self.dimension = self._encoder.dimension

    def encode(self, texts: Sequence[str], prompt: str = "", told: Told = tell_nobody) -> Vectors:
        """Vectors (texts, dimension) in float32, in the order of the texts; each distinct text is run once.

        Args:
            texts: May be empty, and may repeat.
            prompt: Goes before each.
            told: Called after each batch.
        """
        self._prefix = None  # the model may have been trained since
        distinct = sorted(dict.fromkeys(texts), key=len, reverse=True)
        windows = [distinct[start : start + WINDOW] for start in range(0, len(distinct), WINDOW)]
        vectors = np.zeros((len(distinct), self.dimension), dtype=np.float32)
        with ThreadPoolExecutor(1, thread_name_prefix="tokenize") as thread:
            coming: list[Future[list[Tokens]]] = [thread.submit(self.tokenize, texts, prompt) for texts in windows[:1]]
            for number, _ in enumerate(windows):
                tokens = coming.pop().result()
                coming += [thread.submit(self.tokenize, texts, prompt) for texts in windows[number + 1 : number + 2]]
                vectors[number * WINDOW : (number + 1) * WINDOW] = self.run(tokens, told)
        places = {text: place for place, text in enumerate(distinct)}
        return vectors[[places[text] for text in texts]]

    def tokenize(self, texts: Sequence[str], prompt: str = "") -> list[Tokens]:
        """Texts as the model reads them, cut where they are too long for it."""
        longest, side = self._encoder.max_length, self._encoder.truncation_side
        most = longest * CHARACTERS_PER_TOKEN
        read = partial(self._encoder.read, prompt=prompt, truncate=True)
        return [tokens for some in slices(texts, most) for tokens in read_cut(read, some, longest, side, most)]

    @torch.inference_mode()
    def run(self, tokens: Sequence[Tokens], told: Told = tell_nobody) -> Vectors:
        """Vectors (texts, dimension) of texts under one prompt.

        Args:
            tokens: Of each text.
            told: Called after each batch.

        Raises:
            ModelError: A vector is not finite, or a single text is too large for the memory.
        """
        vectors = np.zeros((len(tokens), self.dimension), dtype=np.float32)
        prefix = self._share(tokens)
        shared = [i for i, text in enumerate(tokens) if prefix and prefix.starts(text)]
        alone = sorted(set(range(len(tokens))) - set(shared))
        for rows, before in ((shared, prefix), (alone, None)):
            lengths = torch.tensor([len(tokens[i]) - (len(before.ids) if before else 0) for i in rows])
            for places in plan_evenly(lengths, self._budget) if rows else []:
                batch = [rows[place] for place in places]
                vectors[batch] = self._run([tokens[i] for i in batch], before)
                told(len(batch), sum(len(tokens[i]) for i in batch))
        return vectors

    def _run(self, batch: list[Tokens], prefix: _Prefix | None) -> Vectors:
        try:
            return self._encode_after(batch, prefix) if prefix else self._encoder.encode(batch, _longest(batch))
        except FloatingPointError as error:
            problem = "gives vectors that are not finite"
            raise ModelError(self._name, problem, "its weights hold NaN, or overflow in this dtype") from error
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            if len(batch) == 1:
                problem = f"a text of {len(batch[0])} tokens does not fit into memory"
                raise ModelError(self._name, problem, "lower --max-length") from error
        self._budget = max(1, self._budget // 2)
        parts = [self._run([batch[i] for i in rows], prefix) for rows in halves(range(len(batch)))]
        return np.concatenate(parts)

    def _encode_after(self, batch: Sequence[Tokens], prefix: _Prefix) -> Vectors:
        """As :meth:`ModelEncoder.encode`, for texts that start with what has been run already."""
        length = len(prefix.ids)
        features = self._encoder.features(batch, _longest(batch))
        found = run_after(self._model[0].auto_model, prefix.cache, length, features).last_hidden_state
        states = torch.cat([prefix.states.expand(len(batch), -1, -1), found], dim=1)
        return self._encoder.vectors(pool(self._model, states, features))

    def _share(self, tokens: Sequence[Tokens]) -> _Prefix | None:
        """The part of the prompt that most texts start with, if running it once gives the vectors of the plain way."""
        length = tokens[0].prompt_length if tokens else 0
        if not self._shares or length < SHORTEST_PREFIX or len(tokens) < SHARED_FROM:
            return None
        start = _common_start([text.ids[:length] for text in tokens])
        if self._prefix is None or not np.array_equal(self._prefix.ids, start):
            self._prefix = self._run_prefix(start) if len(start) >= SHORTEST_PREFIX else None
        if self._prefix is None or start.tobytes() in self._agreed:
            return self._prefix
        probes = [text for text in tokens if self._prefix.starts(text)][:: max(1, len(tokens) // 8)]
        if not probes:
            return None
        self._shares = self._agree(probes, self._prefix)
        self._agreed.add(start.tobytes())
        return self._prefix if self._shares else None

    def _run_prefix(self, start: NDArray[np.int32]) -> _Prefix | None:
        transformer = self._model[0].auto_model
        ids = torch.from_numpy(start.astype(np.int64))
        try:
            cache = run_prefix(transformer, ids)
            states = transformer(input_ids=ids[None].to(transformer.device)).last_hidden_state
        except REFUSALS as error:
            if is_out_of_memory(error):
                raise
            self._shares = False
            return None
        return _Prefix(start, cache, states)

    def _agree(self, probes: list[Tokens], prefix: _Prefix) -> bool:
        """Whether texts get the same vectors after the prefix as whole, up to rounding."""
        expected = self._encoder.encode(probes, _longest(probes))
        try:
            found = self._encode_after(probes, prefix)
        except REFUSALS as error:
            if is_out_of_memory(error):
                raise
            return False
        least = LEAST_COSINE
        if self._model.dtype == torch.float32:
            least = PROBED_COSINE if is_mixed(self._model) else 1 - 1e-6
        return bool(paired_cosines(found, expected).min() >= least)


def _longest(batch: Sequence[Tokens]) -> int:
    """The length that a batch is padded to; a text without tokens needs a place, too."""
    return max(1, *(len(text) for text in batch))


def _common_start(starts: Sequence[NDArray[np.int32]]) -> NDArray[np.int32]:
    """The longest start that nine of ten share."""
    longest = max(starts, key=len)
    same = [int((ids == longest[: len(ids)]).cumprod().sum()) for ids in starts]
    return longest[: int(np.quantile(same, 0.1, method="lower"))]


class FastEncoder(SentenceTransformer):  # type: ignore[misc]
    """A ``SentenceTransformer`` whose ``encode`` runs on an :class:`Engine`; :func:`accelerate` makes it."""

    def _inference(self, inputs: list[Any], **options: Any) -> Any:
        """The place of ``encode`` where texts become vectors; prompts and number formats are settled around it."""
        handled = {"prompt", "batch_size", "show_progress_bar", "output_value", "save_to_cpu", "device"}
        handled |= {"normalize_embeddings", "truncate_dim"}
        elsewhere = options.get("device") is not None and torch.device(options["device"]) != self.device
        plain = options["output_value"] == "sentence_embedding" and all(isinstance(text, str) for text in inputs)
        longer = (options["truncate_dim"] or 0) > self._engine.dimension
        if elsewhere or longer or not plain or not inputs or options.keys() - handled:
            return super()._inference(inputs, **options)
        vectors = torch.from_numpy(self._engine.encode(inputs, options["prompt"] or ""))
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
        ModelError: The model is no transformer, or gives other vectors in batches than its own ``encode``.
    """
    fast = copy.copy(model)
    fast.__class__ = FastEncoder
    fast._engine = Engine(model, batch_tokens=batch_tokens)
    return fast
