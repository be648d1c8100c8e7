"""The contrastive loss over a large batch, in memory that does not depend on the batch.

Gradient caching (Gao et al. 2021, arXiv:2101.06983), by sentence-transformers: vectors first, without a graph; the
loss and its gradient at the vectors; then each mini-batch once more, with its graph. What is ours is how a batch is
split: its texts are sorted by length and cut into mini-batches of so many tokens, padding counted, whose shapes are
few (on a CPU every new shape costs time and memory for a kernel of its own).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.losses.gradcache import RandContext
from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss
from torch import Tensor

from secateur.healing import processes
from secateur.healing.batch_mask import batch_mask, row_keys
from secateur.measures.metrics import cosines
from secateur.models.forward import padded_length

LOSS_ROWS = 1024
"""Anchors whose similarities to all candidates are in memory at once."""


class Column(dict[str, Any]):
    """One column of a batch, its texts from the longest to the shortest, and how it splits into mini-batches.

    ``places[i]`` is where text i went; ``ranges`` are the first and last (exclusive) rows of each mini-batch.
    """

    def __init__(self, features: dict[str, Any], tokens: int) -> None:
        mask = features["attention_mask"]
        lengths = mask.sum(dim=1)
        order = lengths.argsort(descending=True, stable=True)
        rows = len(order)
        ordered = {
            key: value[order] if isinstance(value, Tensor) and value.ndim and len(value) == rows else value
            for key, value in features.items()
        }
        super().__init__(ordered)
        # Padding on the left stays: what a model takes for a text's position may count from there.
        padded_left = bool((mask[:, 0] == 0).any())
        full = mask.shape[1]
        self.widths = [full if padded_left else padded_length(int(lengths[i]), full) for i in order]
        self.places = order.argsort().tolist()
        self.ranges = list(_split(self.widths, tokens))

    def piece(self, begin: int, end: int) -> dict[str, Any]:
        """Rows ``begin`` to ``end``, as wide as the first, which is the longest."""
        rows, full = self["attention_mask"].shape
        width = self.widths[begin]
        found = dict(self)
        for key, value in self.items():
            if isinstance(value, Tensor) and value.ndim and len(value) == rows:
                wide = value.ndim > 1 and value.shape[1] == full
                found[key] = value[begin:end, :width] if wide else value[begin:end]
        return found


def _split(widths: list[int], tokens: int) -> Iterator[tuple[int, int]]:
    """Ranges of at most ``tokens`` tokens, or of one text; the number of texts is a power of two."""
    begin = 0
    while begin < len(widths):
        fit = max(1, tokens // widths[begin])
        end = min(len(widths), begin + 2 ** int(math.log2(fit)))
        yield begin, end
        begin = end


class MiniBatchedLoss(CachedMultipleNegativesRankingLoss):  # type: ignore[misc]
    """:func:`.contrastive_loss`, loss and gradients, in mini-batches of at most ``tokens`` tokens.

    Args:
        model: The model.
        tokens: Of a mini-batch, padding counted; a longer text is a mini-batch of its own.
        scale: Inverse temperature.
    """

    def __init__(self, model: SentenceTransformer, tokens: int, scale: float) -> None:
        gather = processes.count() > 1
        super().__init__(model, scale, self._similarity, mini_batch_size=LOSS_ROWS, gather_across_devices=gather)
        self.tokens = tokens

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None) -> Tensor:
        """The loss; its backward pass embeds once more."""
        given = list(sentence_features)
        self._never = batch_mask([row_keys(features) for features in given])
        columns = [Column(features, self.tokens) for features in given]
        self._places = [column.places for column in columns]
        loss: Tensor = self.forward_cached(columns, labels)
        return loss

    def calculate_loss(
        self, reps: list[list[Tensor]], labels: Tensor | None = None, *, with_backward: bool = False
    ) -> Tensor:
        """Put the vectors back into the order of the batch, row by row: an index cannot go backward twice."""
        rows = [[row for piece in column for row in piece.unbind()] for column in reps]
        vectors = [
            torch.stack([column[place] for place in places]) for column, places in zip(rows, self._places, strict=True)
        ]
        self._compared = 0
        loss: Tensor = super().calculate_loss([[column] for column in vectors], labels, with_backward=with_backward)
        return loss

    def _similarity(self, anchors: Tensor, candidates: Tensor) -> Tensor:
        """Cosines of the next anchors (the stock loss takes them in their order) without false negatives."""
        begin, self._compared = self._compared, self._compared + len(anchors)
        return cosines(anchors, candidates).masked_fill(self._never[begin : self._compared], -torch.inf)

    def embed_minibatch_iter(
        self,
        sentence_feature: Column,
        with_grad: bool,
        copy_random_state: bool,
        random_states: list[RandContext] | None = None,
        ranges: Any = None,
    ) -> Iterator[tuple[Tensor, RandContext | None]]:
        """Vectors of each mini-batch, in the column's own ranges."""
        for i, (begin, end) in enumerate(sentence_feature.ranges):
            piece = sentence_feature.piece(begin, end)
            replay = random_states[i] if random_states else nullcontext()
            with replay, nullcontext() if with_grad else torch.no_grad():
                state = RandContext(*piece.values()) if copy_random_state else None
                vectors = self.model(piece)["sentence_embedding"]
            yield vectors, state
