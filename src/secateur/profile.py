"""One pass over the data: what every depth of a model is worth to text encoding.

Hooks on the blocks take each block's output through the model's final norm and its own pooling at once, so that the
vector at depth k is the vector of the model cut to k, and no hidden states are kept.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn
from transformers import PreTrainedModel

from secateur.artifacts import DepthRow, Profile, provenance, results_folder
from secateur.blocks import blocks_of, final_norm, find_stack, states_of
from secateur.data import Batch, Pairs, batches, read_pairs
from secateur.errors import ConfigError, DataError, ModelError
from secateur.metrics import block_influence, contrastive_loss, effective_rank
from secateur.models import model_label, open_model
from secateur.pooling import PoolingName, pool, pooling_name
from secateur.progress import Progress, silent

RANK_SAMPLE = 1024
"""Vectors per depth that the effective rank is computed from, so that memory does not grow with the data."""


def profile(
    model: str | Path | SentenceTransformer,
    data: str | Path | Pairs | Sequence[str | Path | Pairs],
    *,
    scale: float = 20.0,
    instruction: str | None = None,
    pooling: PoolingName | None = None,
    batch_size: int = 64,
    max_examples: int = 1280,
    max_length: int = 512,
    dtype: str = "auto",
    device: str | None = None,
    seed: int = 42,
    trust_remote_code: bool = False,
    out: str | Path | None = None,
    progress: Progress = silent,
) -> Profile:
    """Measure every depth of a model in one pass over (anchor, positive, negative) data.

    Args:
        model: Anything :func:`secateur.models.open_model` opens, or an opened model.
        data: Data files (see :mod:`secateur.data`); each batch comes from one of them.
        scale: Inverse temperature of the contrastive loss.
        instruction: Goes before each anchor, in place of those that come with the data.
        pooling: For a bare language model.
        batch_size: Pairs per batch; the loss depends on it.
        max_examples: Rows used, shared evenly by the files and drawn by ``seed``, in the order of the file.
        max_length: Tokens per text, for a bare language model.
        dtype: As for ``open_model``.
        device: Torch device.
        seed: Of the drawing.
        trust_remote_code: As for ``open_model``.
        out: A folder for ``profile.json`` and ``curve.png``.
        progress: Told after each batch.

    Returns:
        The profile, one row per depth.

    Raises:
        ModelError, DataError, ConfigError, OutputError: Bad input; or a model whose vectors are not finite.
    """
    if batch_size < 2:
        raise ConfigError("batch_size", batch_size, f"is {batch_size}; in-batch negatives need at least 2")
    if out is not None:
        out = results_folder(out, Profile.file, "curve.png", "choice.json")
    sources = _read(data, instruction, max_examples, seed)
    todo = [batch for pairs in sources for batch in batches(pairs, batch_size)]
    name = model_label(model) if isinstance(model, (str, Path)) else "model"
    if not isinstance(model, SentenceTransformer):
        model = open_model(
            model,
            pooling=pooling,
            max_length=max_length,
            dtype=dtype,
            device=device,
            trust_remote_code=trust_remote_code,
        )
    measured = _measure(model, todo, scale, progress, name)
    result = Profile(
        provenance=provenance([pairs.source for pairs in sources], seed),
        model=name,
        depth=len(measured),
        pooling=pooling_name(model),
        scale=scale,
        dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
        batch_size=len(todo[0].anchors),
        batches=len(todo),
        max_length=model.max_seq_length,
        prompt=todo[0].prompt,
        depths=measured,
    )
    if out is not None:
        from secateur.figures import loss_curve, save_png

        result.save(out)
        save_png(loss_curve(result), out / "curve.png")
    return result


def _read(
    data: str | Path | Pairs | Sequence[str | Path | Pairs], instruction: str | None, max_examples: int, seed: int
) -> list[Pairs]:
    files = [data] if isinstance(data, (str, Path, Pairs)) else list(data)
    if not files:
        raise ConfigError("data", files, "no data file given")
    read = [item if isinstance(item, Pairs) else read_pairs(item, instruction=instruction) for item in files]
    share = max(2, max_examples // len(read))
    for pairs in read:
        if len({(row.anchor, row.positive) for row in pairs.rows}) < 2:
            raise DataError(
                pairs.source.name, "holds fewer than two different pairs", "a loss needs something to tell apart"
            )
    return [pairs.sample(share, seed) for pairs in read]


@dataclass
class _Sums:
    """Running sums of one depth."""

    losses: list[float]
    influence: float
    vectors: list[Tensor]


@torch.inference_mode()
def _measure(
    model: SentenceTransformer, todo: Sequence[Batch], scale: float, progress: Progress, name: str
) -> tuple[DepthRow, ...]:
    depth = len(blocks_of(model[0].auto_model))
    sums = [_Sums([], 0.0, []) for _ in range(depth)]
    tokens = kept = 0
    progress("profile", 0, len(todo))
    for done, batch in enumerate(todo, start=1):
        anchors = depth_vectors(model, batch.anchors, batch.prompt)
        others = depth_vectors(model, batch.positives + batch.negatives, batch.passage_prompt)
        for here, a, o in zip(sums, anchors.vectors, others.vectors, strict=True):
            positives, negatives = o[: len(a)], o[len(a) :]
            here.losses.append(float(contrastive_loss(a, positives, negatives if len(negatives) else None, scale)))
            if kept < RANK_SAMPLE:
                here.vectors.append(torch.cat([a, positives]))
        for here, of_anchors, of_others in zip(sums, anchors.influence, others.influence, strict=True):
            here.influence += of_anchors + of_others
        tokens += anchors.tokens + others.tokens
        kept += 2 * len(batch.anchors)
        _check_finite(name, sums)
        progress("profile", done, len(todo))
    return tuple(_row(depth, here, tokens) for depth, here in enumerate(sums, start=1))


def _row(depth: int, sums: _Sums, tokens: int) -> DepthRow:
    losses = torch.tensor(sums.losses, dtype=torch.float64)
    return DepthRow(
        depth=depth,
        loss=float(losses.mean()),
        loss_se=float(losses.std() / math.sqrt(len(losses))) if len(losses) > 1 else None,
        block_influence=sums.influence / tokens,
        effective_rank=effective_rank(torch.cat(sums.vectors)[:RANK_SAMPLE]),
    )


def _check_finite(name: str, sums: Sequence[_Sums]) -> None:
    for depth, here in enumerate(sums, start=1):
        if not math.isfinite(here.losses[-1]):
            raise ModelError(
                name,
                f"gives vectors that are not finite at depth {depth}",
                "its weights hold NaN, or overflow in this dtype",
            )


@dataclass(frozen=True)
class DepthVectors:
    """Some texts at every depth.

    Attributes:
        vectors: Pooled vectors, one (texts, dimension) tensor per depth from 1 on.
        influence: Per block, the sum over tokens of 1 − cosine(input, output).
        tokens: How many tokens that sum runs over.
    """

    vectors: tuple[Tensor, ...]
    influence: tuple[float, ...]
    tokens: int


@torch.inference_mode()
def depth_vectors(model: SentenceTransformer, texts: Sequence[str], prompt: str = "") -> DepthVectors:
    """Encode texts once, as one batch, and pool the state after every block.

    Args:
        model: An opened model in evaluation mode.
        texts: At least one text.
        prompt: Goes before each text.

    Returns:
        The vectors at each depth; those at depth k are what ``model`` cut to its first k blocks gives.
    """
    features = model.preprocess(list(texts), prompt=prompt or None)
    features = {key: v.to(model.device) if isinstance(v, Tensor) else v for key, v in features.items()}
    vectors, influence = _one_pass(model, features) or _pass_per_depth(model, features)
    return DepthVectors(vectors, influence, int(features["attention_mask"].sum()))


_Depths = tuple[tuple[Tensor, ...], tuple[float, ...]]


def _one_pass(model: SentenceTransformer, features: dict[str, Any]) -> _Depths | None:
    """Vectors and influence of each block, or None for an architecture with more than a norm after its blocks."""
    transformer = model[0].auto_model
    norm = final_norm(transformer)
    blocks = blocks_of(transformer)
    vectors: dict[int, Tensor] = {}
    influence: dict[int, float] = {}

    def visit(index: int, _: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        before, after = _input_of(args, kwargs), states_of(output)
        if after.shape[:2] == features["attention_mask"].shape:
            vectors[index] = pool(model, norm(after), features)
            influence[index] = float(block_influence(before, after, features["attention_mask"]))

    with _hooks(blocks, visit):
        own = model(dict(features))["sentence_embedding"]
    order = range(len(blocks))
    # The model's own vector costs nothing here, and tells whether the last depth is what the model computes.
    if len(vectors) < len(blocks) or own.shape != vectors[order[-1]].shape or not _same(own, vectors[order[-1]]):
        return None
    return tuple(vectors[i] for i in order), tuple(influence[i] for i in order)


def _same(one: Tensor, other: Tensor) -> bool:
    """Equal up to rounding, where a value that is not finite equals itself: that is reported elsewhere."""
    return torch.allclose(one.float(), other.float(), rtol=1e-3, atol=1e-3, equal_nan=True)


def _pass_per_depth(model: SentenceTransformer, features: dict[str, Any]) -> _Depths:
    """For the few architectures where more than a norm follows the blocks: one forward pass per depth."""
    transformer = model[0].auto_model
    vectors = []
    influence: dict[int, float] = {}

    def visit(index: int, _: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        before, after = _input_of(args, kwargs), states_of(output)
        mask = features["attention_mask"]
        # Blocks of these architectures may keep several streams or another layout: every state counts the same.
        if before.shape[:-1] != mask.shape:
            mask = torch.ones(before.shape[:-1], device=before.device) * (mask.sum() / before.shape[:-1].numel())
        influence[index] = float(block_influence(before, after, mask))

    with _hooks(blocks_of(transformer), visit):
        for depth in range(1, len(blocks_of(transformer)) + 1):
            with _first_blocks(transformer, depth):
                vectors.append(model(dict(features))["sentence_embedding"])
    return tuple(vectors), tuple(influence[i] for i in sorted(influence))


@contextmanager
def _first_blocks(transformer: PreTrainedModel, depth: int) -> Iterator[None]:
    """The model without its later blocks, for the time of a forward pass."""
    owner_path, _, name = find_stack(transformer).path.rpartition(".")
    owner = transformer.get_submodule(owner_path)
    every = getattr(owner, name)
    setattr(owner, name, every[:depth])
    try:
        yield
    finally:
        setattr(owner, name, every)


@contextmanager
def _hooks(blocks: nn.ModuleList, visit: Any) -> Iterator[None]:
    with ExitStack() as stack:
        for index, block in enumerate(blocks):
            handle = block.register_forward_hook(partial(visit, index), with_kwargs=True)
            stack.callback(handle.remove)
        yield


def _input_of(args: Any, kwargs: Any) -> Tensor:
    states: Tensor = args[0] if args else kwargs["hidden_states"]
    return states
