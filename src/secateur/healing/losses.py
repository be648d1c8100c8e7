"""The training loss: contrastive, distillation, or both, at one depth of the model or several.

Each part is a function of vectors. :class:`Loss` runs the model once and averages the parts over the vectors that the
model would give when it is cut: at each of ``depths``, and to the first numbers, for each of ``dims``.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.losses.gradcache import CachedLossMixin, RandContext
from sentence_transformers.base.losses.merged_forward import embed_columns
from sentence_transformers.sentence_transformer.losses import EmbedDistillLoss
from sentence_transformers.util import all_gather, get_rank
from sentence_transformers.util.distributed import get_world_size
from torch import Tensor, nn
from torch.nn import functional

from secateur.data.vectors import VectorCache
from secateur.errors import ConfigError
from secateur.healing.recipes import TrainingConfig
from secateur.measures.metrics import cosines, false_negative_mask
from secateur.profiling.depths import check_depths, depth_vectors
from secateur.runtime.core import padded_length

SIMCSE_DROPOUT = 0.1
LENGTH_STEP = 16
"""Batches of a training are padded to a multiple of this: on a CPU every new shape costs time and memory for a kernel
of its own, and no kernel is ever given back."""


def of_all(tensor: Tensor) -> Tensor:
    """What all processes have of it, one after the other; gradients go back to each."""
    if get_world_size() == 1:
        return tensor
    gathered: Tensor = all_gather(tensor, with_grad=tensor.requires_grad)
    return gathered


def contrastive_loss(columns: Sequence[Tensor], mask: Tensor | None, scale: float) -> Tensor:
    """InfoNCE with in-batch and hard negatives of all processes, as ``MultipleNegativesRankingLoss`` computes it.

    ``columns`` are anchors, positives and any number of negatives, each (batch, dimension); ``mask`` (batch,
    candidates) is true where a candidate is no negative of an anchor (:func:`batch_mask`).
    """
    anchors, *documents = columns
    similarities = cosines(anchors, torch.cat([of_all(column) for column in documents]))
    if mask is not None:
        similarities = similarities.masked_fill(mask, -torch.inf)
    own = get_rank() * len(anchors) + torch.arange(len(anchors), device=anchors.device)
    return functional.cross_entropy(similarities * scale, own)


def row_keys(features: dict[str, Any]) -> Tensor:
    """A number for each row of tokens, (rows,), the same for the same tokens whatever their padding."""
    rows = zip(features["input_ids"].cpu(), features["attention_mask"].bool().cpu(), strict=True)
    digests = [hashlib.blake2b(ids[real].numpy().tobytes(), digest_size=8).digest() for ids, real in rows]
    keys = [int.from_bytes(digest, "big", signed=True) for digest in digests]
    return torch.tensor(keys, device=features["input_ids"].device)


def batch_mask(keys: Sequence[Tensor]) -> Tensor:
    """:func:`.false_negative_mask` of this process's anchors, (batch, candidates of all processes), by the
    :func:`row_keys` of each column.
    """
    anchors, positives, *negatives = map(of_all, keys)
    start = get_rank() * len(keys[0])
    rows = slice(start, start + len(keys[0]))
    return false_negative_mask(anchors, positives, torch.cat(negatives) if negatives else None, rows=rows)


def similarity_loss(vectors: Tensor, targets: Tensor, same: Tensor, scale: float) -> Tensor:
    """How far the similarities within a batch are from the teacher's: the spaces may differ, even in width.

    Each text's cosines with all others, of all processes, become a distribution: softmax of cosine × ``scale``, without
    the text itself and its duplicates. The loss is the mean KL divergence of the student's distributions from the
    teacher's (SEED, arXiv 2101.04731, with the batch in place of its queue), divided by ``scale``: its gradient is then
    as large as that of a cosine. Undivided, it kept a student from the teacher's vectors
    (docs/explanation/defaults.md).

    ``vectors`` are the student's, ``targets`` the teacher's of the same texts, of any dimension; ``same`` is true where
    two are the same text, as each is to itself: (texts, texts of all processes).
    """
    # A large number in place of infinity: a text that has no others than duplicates would give NaN.
    student, teacher = (
        (cosines(own, of_all(own)) * scale).masked_fill(same, -1e4).log_softmax(dim=1) for own in (vectors, targets)
    )
    return functional.kl_div(student, teacher, log_target=True, reduction="batchmean") / scale


class Loss(CachedLossMixin, nn.Module):  # type: ignore[misc]
    """A training's loss, on sentence-transformers' interface.

    For each depth and dimension, ``teacher_weight × distillation + (1 - teacher_weight) × contrastive``, averaged. The
    distillation is, by ``distill``, of ``vectors`` ``1 - cosine`` of each with the teacher's (EmbedDistill, arXiv
    2301.12005), through a linear map that is trained and thrown away where the widths differ; of ``similarities``
    :func:`similarity_loss`; or the sum of ``both``. For the smaller dimensions (Matryoshka, arXiv 2205.13147), of which
    the teacher has no vectors, it is always the similarities.

    With ``mini_batch_tokens``, gradients are cached (GradCache, arXiv 2101.06983): vectors first, without a graph; the
    loss and its gradient at the vectors; then each mini-batch once more, with its graph.

    With a teacher's vectors, ``labels`` are row numbers in them, (batch, columns).
    """

    mini_batch_size = 1024  # the mixin asks for it; mini-batches are those of embed_minibatch_iter

    def __init__(self, model: SentenceTransformer, config: TrainingConfig, teacher: VectorCache | None = None) -> None:
        super().__init__()
        self.model: nn.Module = model  # the trainer wraps it, where there are several processes
        self.config = config
        self.teacher = teacher
        self._student = [model]  # in a list, so that it is no module of the loss
        self._depths = check_depths(model, config.depths, layers=config.layers) if config.depths else ()
        self._width = int(model.get_embedding_dimension())
        self._sizes = check_dims(model, config.dims)
        self._near: EmbedDistillLoss | None = None
        if teacher and config.distill != "similarities":
            width = teacher.dimension if teacher.dimension != self._width else None
            self._near = EmbedDistillLoss(model, "cosine", projection_dim=width)
            if width and get_world_size() > 1:
                for parameter in self._near.projection.parameters():  # the wrapper around the model does not sync them
                    parameter.register_hook(_mean_over_processes)

    def forward(self, sentence_features: Any, labels: Tensor | None = None) -> Tensor:
        """The loss of one batch, with one dictionary of tokens for each column."""
        features = list(sentence_features)
        self._keys = [row_keys(column) for column in features]
        if self.config.mini_batch_tokens is None:
            return self._loss_of(embed_columns(self._embed, features), labels)
        split = [mini_batches(column, self.config.mini_batch_tokens) for column in features]
        self._places = [places for _, places in split]
        columns = [{**column, "pieces": pieces} for column, (pieces, _) in zip(features, split, strict=True)]
        return CachedLossMixin.forward_cached(self, columns, labels)

    def _embed(self, features: dict[str, Any]) -> dict[str, Tensor]:
        """Vectors (texts, depths, dimension)."""
        if not self._depths:
            return {"sentence_embedding": self.model(features)["sentence_embedding"][:, None]}
        student, layers = self._student[0], self.config.layers
        return {"sentence_embedding": depth_vectors(student, features, self._depths, layers=layers, run=self.model)}

    def embed_minibatch_iter(
        self,
        sentence_feature: dict[str, Any],
        with_grad: bool,
        copy_random_state: bool,
        random_states: list[RandContext] | None = None,
        ranges: Any = None,
    ) -> Iterator[tuple[Tensor, RandContext | None]]:
        """Vectors of each of a column's own mini-batches."""
        for i, piece in enumerate(sentence_feature["pieces"]):
            replay = random_states[i] if random_states else nullcontext()
            with replay, nullcontext() if with_grad else torch.no_grad():
                state = RandContext(*piece.values()) if copy_random_state else None
                vectors = self._embed(dict(piece))["sentence_embedding"]
            yield vectors, state

    def calculate_loss(
        self, reps: list[list[Tensor]], labels: Tensor | None = None, *, with_backward: bool = False
    ) -> Tensor:
        """The loss of cached vectors: by column, in mini-batches, put back into the order of the batch."""
        loss = self._loss_of([torch.cat(parts)[own] for parts, own in zip(reps, self._places, strict=True)], labels)
        if with_backward:
            loss.backward()  # type: ignore[no-untyped-call]
            loss = loss.detach()
        return loss

    def _loss_of(self, columns: Sequence[Tensor], labels: Tensor | None) -> Tensor:
        """The loss of vectors, by column (texts, depths, dimension)."""
        targets: list[Tensor] = []
        if self.teacher is not None and labels is not None:
            rows = labels.cpu().numpy()
            assert (rows >= 0).all(), "a batch holds a text that used_rows() did not foresee"
            vectors = torch.from_numpy(self.teacher.read(rows.reshape(-1))).to(labels.device)
            targets = list(vectors.reshape(*rows.shape, -1).unbind(dim=1))
        weight = (self.config.teacher_weight if self.teacher else 0.0) if len(columns) > 1 else 1.0
        mask = batch_mask(self._keys) if weight < 1 else None
        keys = torch.cat(self._keys)
        same = keys[:, None] == of_all(keys)
        losses = []
        for depth, size in itertools.product(range(columns[0].shape[1]), self._sizes):
            own = [column[:, depth, :size] for column in columns]
            loss = own[0].new_zeros(())
            if weight < 1:
                loss = loss + (1 - weight) * contrastive_loss(own, mask, self.config.scale)
            if targets and self._near is not None and size == self._width:
                loss = loss + weight * self._near.compute_loss_from_embeddings(own, targets)
            if targets and (self.config.distill != "vectors" or size < self._width):
                loss = loss + weight * similarity_loss(torch.cat(own), torch.cat(targets), same, self.config.scale)
            losses.append(loss)
        return torch.stack(losses).mean()


def _mean_over_processes(gradient: Tensor) -> Tensor:
    total: Tensor = gradient.clone()
    torch.distributed.all_reduce(total)
    return total / float(get_world_size())


def check_dims(model: SentenceTransformer, dims: Sequence[int]) -> tuple[int, ...]:
    """The full size of a model's vectors, and the others, largest first; ConfigError if one is out of range."""
    width = int(model.get_embedding_dimension())
    for size in dims:
        if not 1 <= size <= width:
            raise ConfigError("dims", size, f"is {size}", f"the vectors have {width} numbers")
    return (width, *sorted(set(dims) - {width}, reverse=True))


def mini_batches(features: dict[str, Any], tokens: int) -> tuple[list[dict[str, Any]], Tensor]:
    """One column of a batch in mini-batches, from the longest text to the shortest, and where each text went.

    A mini-batch has at most so many tokens, padding counted, or one text; the number of its texts is a power of two, so
    that shapes are few.
    """
    mask = features["attention_mask"]
    rows, full = mask.shape
    lengths = mask.sum(dim=1)
    order = lengths.argsort(descending=True, stable=True)
    # Padding on the left stays: what a model takes for a text's position may count from there.
    padded_left = bool((mask[:, 0] == 0).any())
    pieces: list[dict[str, Any]] = []
    begin = 0
    while begin < rows:
        width = full if padded_left else padded_length(int(lengths[order[begin]]), LENGTH_STEP, full)
        own = order[begin : begin + 2 ** int(math.log2(max(1, tokens // width)))]
        piece = dict(features)
        for key, value in features.items():
            if isinstance(value, Tensor) and value.ndim and len(value) == rows:
                piece[key] = value[own, :width] if value.shape[1:2] == (full,) else value[own]
        pieces.append(piece)
        begin += len(own)
    return pieces, order.argsort()


def set_dropout(model: SentenceTransformer, config: TrainingConfig) -> None:
    """Give a model, in place, the dropout that its loss needs in training.

    That is 0.1 where a text is told from itself by dropout alone (SimCSE), none for a teacher, else the model's own. A
    model that has none of its own (as a Llama) gets one on its token embeddings. Adapters that are added later keep
    theirs.
    """
    if not config.unsupervised and not config.has_teacher:
        return
    share = SIMCSE_DROPOUT if config.unsupervised else 0.0
    own = [
        (module, name)
        for module in model.modules()
        for name, value in vars(module).items()  # OPT, and attention, drop by a number of their own and no module
        if (name == "p" and isinstance(module, nn.Dropout)) or ("dropout" in name and value and type(value) is float)
    ]
    for module, name in own:
        setattr(module, name, share)
    if not own:
        model[0].auto_model.get_input_embeddings().register_forward_hook(
            lambda table, _, output: functional.dropout(output, share, training=table.training)
        )
