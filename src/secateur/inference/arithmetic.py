"""In what number format a model multiplies: float32, or bfloat16 where that keeps its vectors (:mod:`.mixed`)."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer

from secateur.errors import ConfigError
from secateur.inference.mixed import Spared, use_mixed_products
from secateur.measures.metrics import paired_cosines
from secateur.models.blocks import blocks_of
from secateur.models.forward import block_seconds
from secateur.models.save import PROBES

WORTH = 1.1
"""How many times as fast another number format must be to be taken."""

LEAST_COSINE = 0.9999
"""What ``auto`` aims at: to the vectors of float32."""

PROBED_COSINE = (1 + LEAST_COSINE) / 2
"""What the probes must keep, for other texts can be harder than they."""

AUTO = "auto"
MIXED = "mixed"
STORED = "stored"

EDGES = (0, 8, 16, 24, 32, 48)
"""From one of these numbers of tokens on, texts may be multiplied in another way than shorter ones."""

SHARES = (0.0, 0.5)
"""How much of a model's depth may be spared for texts that are not the shortest."""

RANDOM_LENGTHS = [1, 2, 3, 4, 5, 6, 7] * 8 + [8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30] * 10 + [34, 40, 46, 52] * 4
"""Tokens in each text of random ones on which rounding is measured: most are few."""


def weights_dtype(name: str) -> str:
    """In what number format ``open_model`` opens the weights for a name of :func:`use_arithmetic`."""
    return AUTO if name == STORED else "float32" if name.partition(":")[0] == MIXED else name


def use_arithmetic(model: SentenceTransformer, name: str, texts: Sequence[str] = (), prompt: str = "") -> str:
    """Make an opened model multiply as ``name`` says, and return that name: ``auto`` becomes what it stands for.

    Args:
        model: In the number format of :func:`weights_dtype`; changed in place.
        name: ``auto`` (:func:`quicken`); ``mixed``: linear layers multiply in bfloat16; ``mixed:8x30,24x12``: but for
            the first 30 blocks in texts of fewer than 8 tokens, and the first 12 in those of fewer than 24; ``stored``
            or a number format, with which nothing changes.
        texts: As for :func:`quicken`.
        prompt: As for :func:`quicken`.

    Raises:
        ConfigError: What stands behind ``mixed:`` is not of that form.
    """
    if name == AUTO:
        return quicken(model, texts, prompt)
    if name.partition(":")[0] == MIXED:
        use_mixed_products(model, _spared(name))
        return name
    return str(model.dtype).removeprefix("torch.")


def _spared(name: str) -> list[Spared]:
    numbers = [part.split("x") for part in name.partition(":")[2].split(",") if part]
    try:
        return [Spared(int(below), int(blocks)) for below, blocks in numbers]
    except ValueError:
        raise ConfigError("dtype", name, f"{name!r} is not valid", "mixed, or such as mixed:8x30,24x12") from None


def quicken(model: SentenceTransformer, texts: Sequence[str] = (), prompt: str = "") -> str:
    """Give a model the quickest arithmetic that keeps its vectors, by measurement on this processor.

    A float32 model gets mixed products where bfloat16 is quicker, and where long texts keep :data:`PROBED_COSINE` with
    them. Of short ones so many blocks stay in float32 as keep it, too. A model in another format goes to float32 where
    that is quicker. On a GPU nothing changes.

    Args:
        model: Changed in place.
        texts: Some of those that it will encode, to be probed beside :func:`probe_texts`.
        prompt: What goes before them.

    Returns:
        A name for :func:`use_arithmetic`.
    """
    if model.device.type == "cpu":
        seconds = block_seconds(model)
        gain = seconds[torch.float32] / seconds[torch.bfloat16]
        if model.dtype == torch.float32 and gain > WORTH:
            spared = find_spared(model, [*probe_texts(model), *(prompt + text for text in texts)])
            if spared is not None:
                use_mixed_products(model, spared)
                return ":".join([MIXED, ",".join(f"{some.below}x{some.blocks}" for some in spared)]).rstrip(":")
        elif model.dtype != torch.float32 and gain * WORTH < 1:
            model.float()
    return str(model.dtype).removeprefix("torch.")


def find_spared(model: SentenceTransformer, texts: Sequence[str]) -> list[Spared] | None:
    """What must stay in float32 of short texts for all to keep their vectors; None where long ones do not keep them."""
    lengths = np.array([len(ids) for ids in model.tokenizer(list(texts))["input_ids"]])
    depth = len(blocks_of(model[0].auto_model))
    exact = _vectors(model, texts)
    limit = sys.maxsize
    spared: list[Spared] = []
    for blocks in sorted({round(share * depth) for share in SHARES}):
        short = np.flatnonzero(lengths < limit)
        kept = _keep(model, [texts[i] for i in short.tolist()], exact[short], blocks)
        edge = next((edge for edge in EDGES if kept[lengths[short] >= edge].all()), limit)
        if edge < limit and blocks:
            spared.insert(0, Spared(limit, blocks))
        limit = min(edge, limit)
        if limit == sys.maxsize:
            return None
        if not limit:
            return spared
    return [Spared(limit, depth), *spared]


def _keep(
    model: SentenceTransformer, texts: Sequence[str], exact: NDArray[np.float32], spared: int
) -> NDArray[np.bool_]:
    """Which texts keep their vectors where so many blocks stay in float32."""
    undo = use_mixed_products(model, [Spared(sys.maxsize, spared)])
    cosines = paired_cosines(_vectors(model, texts), exact)
    undo()
    return cosines >= PROBED_COSINE


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


def _vectors(model: SentenceTransformer, texts: Sequence[str]) -> NDArray[np.float32]:
    found: NDArray[np.float32] = model.encode(list(texts), prompt="", show_progress_bar=False)
    return found
