"""Opens a model or an export for encoding, and selects in what it multiplies.

Products in bfloat16 are quicker where a processor has them, and round. ``auto`` takes them where that keeps the model's
vectors: it measures texts of this run, and random ones, both ways.
"""

from __future__ import annotations

import sys
import time
import timeit
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from sentence_transformers import SentenceTransformer

from secateur import runtime
from secateur.data.vectors import fingerprint_model
from secateur.errors import ConfigError
from secateur.inference.encoders import PROBED_COSINE, MixedProducts, ModelEncoder
from secateur.measures.metrics import paired_cosines
from secateur.models.blocks import blocks_of
from secateur.models.open_model import MAX_LENGTH, open_model
from secateur.models.save import PROBES
from secateur.options import SavedPooling
from secateur.provenance import fingerprint_files, is_export
from secateur.runtime.core import CPU_BATCH, LENGTH_STEP, Encoder, Tokens, Vectors

AUTO, MIXED, STORED = "auto", "mixed", "stored"
"""Names of a dtype beside PyTorch's own; the last is that of the weights."""

WORTH = 1.3
"""How many times as fast a product in bfloat16 must be for ``auto`` to think of it."""

EDGES = (0, 8, 16, 24, 32, 48)
"""From one of these numbers of tokens on, texts may be multiplied in another way than shorter ones."""

SHARES = (0.0, 0.5)
"""How much of a model's depth may stay in float32 for texts that are not the shortest."""

RANDOM_LENGTHS = [1, 2, 3, 4, 5, 6, 7] * 8 + [8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30] * 10 + [34, 40, 46, 52] * 4
"""Tokens in each text of random ones on which rounding is measured: most are few."""


@dataclass(frozen=True)
class Opening:
    """How a model is opened for encoding.

    Attributes:
        model: A model folder, a Hub id, whatever else ``open_model`` takes; or a folder that ``export`` wrote.
        dtype: As for :func:`use_dtype`.
        batch_tokens: Tokens in a batch, padding included; default: by the device.
        length_step: Batches are padded to a multiple of this.
        threads: Its share of the processor; default: all of it.
    """

    model: str
    dtype: str = AUTO
    pooling: SavedPooling | None = None
    max_length: int = MAX_LENGTH
    device: str | None = None
    trust_remote_code: bool = False
    batch_tokens: int | None = None
    length_step: int = LENGTH_STEP
    threads: int | None = None


def open_encoder(opening: Opening) -> Encoder:
    """Open a model or an export; :func:`use_dtype` comes next.

    Raises:
        ConfigError: There is no such device or dtype; or an export has decided what was chosen.
        ModelError: It cannot be opened.
        MissingPackage: The runtime of an export is not installed.
    """
    if is_export(opening.model):
        encoder = runtime.load(opening.model, threads=opening.threads)
        encoder.batch_tokens = opening.batch_tokens or CPU_BATCH
        decided = {"dtype": (AUTO, STORED, encoder.dtype)} | {
            name: (getattr(Opening, name),) for name in ("pooling", "max_length", "device", "trust_remote_code")
        }
        for name, allowed in decided.items():
            if getattr(opening, name) not in allowed:
                problem, hint = "cannot be chosen for an export, which has decided it", name.replace("_", "-")
                raise ConfigError(name, getattr(opening, name), problem, f"leave --{hint} out")
        return encoder
    if opening.threads:
        torch.set_num_threads(opening.threads)
    model = open_model(
        opening.model,
        dtype=weights_dtype(opening.dtype),
        pooling=opening.pooling,
        max_length=opening.max_length,
        device=opening.device,
        trust_remote_code=opening.trust_remote_code,
    )
    return ModelEncoder(model, opening.model, batch_tokens=opening.batch_tokens, length_step=opening.length_step)


def fingerprint_encoder(encoder: Encoder) -> str:
    """A hash of all that an encoder's vectors depend on."""
    return fingerprint_model(encoder.model) if isinstance(encoder, ModelEncoder) else fingerprint_files(encoder.name)


def weights_dtype(name: str) -> str:
    """In what dtype ``open_model`` opens the weights."""
    return AUTO if name == STORED else "float32" if name.partition(":")[0] == MIXED else name


def use_dtype(encoder: Encoder, name: str, texts: Sequence[str] = (), prompt: str = "") -> str:
    """Make an opened encoder multiply as a name says, and return that name; ``auto`` becomes what it stands for.

    Args:
        encoder: Opened with this dtype; an export stays as it is.
        name: ``auto``: the quickest on this processor that keeps the vectors (:func:`select_dtype`); ``mixed``: linear
            layers multiply in bfloat16; ``mixed:8x30,24x12``: but for the first 30 blocks in texts of fewer than 8
            tokens, and the first 12 in those of fewer than 24; ``stored`` or a dtype of PyTorch: nothing changes.
        texts: As for :func:`select_dtype`.
        prompt: As for :func:`select_dtype`.

    Raises:
        ConfigError: What stands behind ``mixed:`` is not of that form.
    """
    if not isinstance(encoder, ModelEncoder):
        return encoder.dtype
    if name == AUTO:
        return select_dtype(encoder, texts, prompt)
    kind, _, schedule = name.partition(":")
    if kind == MIXED:
        pairs = [part.split("x") for part in schedule.split(",") if part]
        try:
            spared = [(int(below), int(blocks)) for below, blocks in pairs]
        except ValueError:
            raise ConfigError("dtype", name, f"{name!r} is not valid", "mixed, or such as mixed:8x30,24x12") from None
        encoder.products = MixedProducts(encoder.model)
        encoder.products.use(spared)
        encoder.dtype = name
    return encoder.dtype


def select_dtype(encoder: ModelEncoder, texts: Sequence[str] = (), prompt: str = "") -> str:
    """Take the quickest dtype that keeps the vectors of a model, by measurement on this processor.

    A float32 model gets products in bfloat16 where they are quicker, and where long texts keep :data:`.PROBED_COSINE`
    with them; of short ones so many blocks stay in float32 as keep it, too. A model in another dtype goes to float32
    where that is quicker. On a GPU nothing changes.

    Args:
        encoder: Changed in place.
        texts: Some of those that it will encode, to be measured beside :func:`probe_texts`.
        prompt: What goes before them.

    Returns:
        A name for :func:`use_dtype`.
    """
    model = encoder.model
    if model.device.type == "cpu":
        gain = product_gain()
        if model.dtype != torch.float32 and gain * WORTH < 1:
            model.float()
            encoder.dtype = "float32"
        elif model.dtype == torch.float32 and gain > WORTH:
            probes = [*probe_texts(model), *(prompt + text for text in texts)]
            tokens = [text for text in encoder.tokenize(probes) if len(text)]
            exact = encoder.encode_tokens(tokens)
            encoder.products = MixedProducts(model)
            spared = _find_spared(encoder, encoder.products, tokens, exact)
            if spared is None:
                encoder.products.undo()
                encoder.products = None
            else:
                encoder.products.use(spared)
                schedule = ",".join(f"{below}x{blocks}" for below, blocks in spared)
                encoder.dtype = f"{MIXED}:{schedule}" if spared else MIXED
    return encoder.dtype


def _find_spared(
    encoder: ModelEncoder, products: MixedProducts, tokens: Sequence[Tokens], exact: Vectors
) -> list[tuple[int, int]] | None:
    """What must stay in float32 of short texts for all to keep their vectors; None where long ones do not keep them."""
    lengths = np.array([len(text) for text in tokens])
    depth = len(blocks_of(encoder.model[0].auto_model))
    limit = sys.maxsize
    spared: list[tuple[int, int]] = []
    for blocks in sorted({round(share * depth) for share in SHARES}):
        short = np.flatnonzero(lengths < limit)
        products.spared = [(sys.maxsize, blocks)]
        found = encoder.encode_tokens([tokens[place] for place in short.tolist()])
        kept = paired_cosines(found, exact[short]) >= PROBED_COSINE
        edge = next((edge for edge in EDGES if kept[lengths[short] >= edge].all()), limit)
        if edge < limit and blocks:
            spared.insert(0, (limit, blocks))
        limit = min(edge, limit)
        if limit == sys.maxsize:
            return None
        if not limit:
            return spared
    return [(limit, depth), *spared]


def product_gain() -> float:
    """How many times as fast this processor multiplies in bfloat16 as in float32: measured, a moment."""
    states, weights = torch.randn(256, 1024), torch.randn(1024, 1024)

    def seconds(dtype: torch.dtype) -> float:
        multiply = partial(torch.nn.functional.linear, states.to(dtype), weights.to(dtype))
        return min(timeit.repeat(multiply, timer=time.process_time, number=1, repeat=6))  # whatever else runs

    return seconds(torch.float32) / seconds(torch.bfloat16)


def probe_texts(model: SentenceTransformer) -> list[str]:
    """Texts on which rounding shows: random tokens, which no weights were trained for, and sentences under each prompt.

    A few tokens average out little of what is rounded, so most texts are short. In every other one, tokens come as
    often as by Zipf's law (tokenizers number the frequent ones first), but for single letters and bytes: a model's
    states gather on words like "of".
    """
    rng = np.random.default_rng(0)
    special = {*model.tokenizer.all_special_ids, *model.tokenizer.get_added_vocab().values()}
    pieces = {i: piece for piece, i in sorted(model.tokenizer.get_vocab().items()) if i not in special}
    tokens = np.array(sorted(pieces))
    words = np.array([i for i in sorted(pieces) if len(pieces[i].strip("Ġ▁#")) > 1] or tokens)

    def draw(length: int, zipf: bool) -> str:
        ids = words[(len(words) ** rng.random(length) - 1).astype(int)] if zipf else rng.choice(tokens, length)
        drawn: str = model.tokenizer.decode(ids.tolist())
        return drawn

    made = [draw(length, zipf=place % 2 == 1) for place, length in enumerate(sorted(RANDOM_LENGTHS))]
    prompts = sorted({"", *model.prompts.values()})
    return [*made, *(prompt + text for prompt in prompts for text in (*PROBES, " ".join(PROBES)))]
