"""What a training lowers: that pairs find each other, that a teacher is imitated, or both; at one depth or several.

Each part is a loss on vectors, stock where sentence-transformers has it. :class:`Objective` runs the model once and
averages the parts over the vectors that the model would give when it is cut: at each of ``depths``, and to each of
``dims``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.losses.gradcache import CachedLossMixin, RandContext, _create_minibatch
from sentence_transformers.base.losses.merged_forward import embed_columns
from sentence_transformers.sentence_transformer.losses import EmbedDistillLoss, MultipleNegativesRankingLoss
from torch import Tensor, nn
from torch.nn import functional

from secateur.errors import ConfigError, IllegalDepth, UnsupportedArchitecture
from secateur.healing import processes
from secateur.healing.batch_mask import batch_mask, row_keys
from secateur.healing.teacher import TeacherVectors
from secateur.measures.metrics import cosines
from secateur.models.blocks import blocks_of, embeddings_of, final_norm, states_of, tail_is_norm
from secateur.models.cutting import legal_depths
from secateur.models.pooling import pool
from secateur.models.save import PROBES

TEACHER_WEIGHT = 0.5
"""Of the teacher beside the contrastive loss, where the data have pairs."""

VECTORS, SIMILARITIES, BOTH = IMITATED = ("vectors", "similarities", "both")

DROPOUT = 0.1
"""SimCSE's."""


def contrastive_loss(columns: Sequence[Tensor], never: Tensor | None, scale: float) -> Tensor:
    """InfoNCE with in-batch and hard negatives: sentence-transformers' own, without false negatives.

    Over several processes, each anchor's candidates are those of all.

    Args:
        columns: Anchors, positives and any number of negatives, each (batch, dimension).
        never: (batch, candidates), true where a candidate is no negative of an anchor (:func:`.batch_mask`).
        scale: Inverse temperature.
    """

    def similarity(anchors: Tensor, candidates: Tensor) -> Tensor:
        found = cosines(anchors, candidates)
        return found if never is None else found.masked_fill(never, -torch.inf)

    stock = MultipleNegativesRankingLoss(None, scale, similarity, gather_across_devices=processes.count() > 1)
    loss: Tensor = stock.compute_loss_from_embeddings(list(columns), None)
    return loss


def similarity_loss(vectors: Tensor, targets: Tensor, same: Tensor, scale: float) -> Tensor:
    """How far the similarities of a batch are from the teacher's: the spaces may differ in width and in place.

    Each text's cosines with all others, as a distribution: softmax of cosine × ``scale``, itself and its doubles left
    out. The loss is the mean KL divergence of the student's distributions from the teacher's (SEED, arXiv 2101.04731,
    with the batch in place of its queue), over ``scale``: its slope is then that of a cosine, and it may stand beside
    one. Undivided, it kept a student from the teacher's vectors (docs/healing.md).

    Args:
        vectors: The student's, (texts, dimension).
        targets: The teacher's of the same texts, (texts, any dimension).
        same: (texts, texts), true where two are the same text, as each is to itself.
        scale: Inverse temperature.
    """
    own, taught = (_log_shares(found, same, scale) for found in (vectors, targets))
    return functional.kl_div(own, taught, log_target=True, reduction="batchmean") / scale


def _log_shares(vectors: Tensor, same: Tensor, scale: float) -> Tensor:
    # A large number in the place of infinity: a text that is alone with its doubles would give NaN.
    return (cosines(vectors, vectors) * scale).masked_fill(same, -1e4).log_softmax(dim=1)


class Objective(CachedLossMixin, nn.Module):  # type: ignore[misc]
    """A training's loss, on sentence-transformers' interface.

    For each listed depth and size, ``teacher_weight × teacher's + (1 - teacher_weight) × contrastive``, averaged. The
    teacher's part is, by ``distill``, of ``vectors`` ``1 - cosine`` of each with the teacher's (EmbedDistill, arXiv
    2301.12005, by sentence-transformers' ``EmbedDistillLoss``), through a linear map that is trained and thrown away
    where the widths differ; of ``similarities`` :func:`similarity_loss`; or the sum of ``both``. Vectors that are cut
    to a size have no counterpart among the teacher's: there, it is the similarities always.

    With mini-batches, gradients are cached (GradCache, arXiv 2101.06983): the batch may be larger than the memory.

    Args:
        model: The model that is trained.
        scale: Inverse temperature of both parts.
        teacher: Its vectors; then ``labels`` are row numbers in them, (batch, columns).
        teacher_weight: Of the teacher's part; 1 is all of it, and needs no pairs.
        distill: What is imitated: ``vectors``, ``similarities`` or ``both``.
        depths: Train the states after so many blocks too, each as the model cut there would have it.
        dims: Train the vectors' first so many numbers too (Matryoshka, arXiv 2205.13147).
        mini_batch_tokens: Tokens embedded at once; None: the whole batch.

    Raises:
        ConfigError: A weight, depth or size is out of range.
        IllegalDepth, UnsupportedArchitecture: The model cannot be cut there.
    """

    def __init__(
        self,
        model: SentenceTransformer,
        *,
        scale: float,
        teacher: TeacherVectors | None = None,
        teacher_weight: float = TEACHER_WEIGHT,
        distill: str = VECTORS,
        depths: Sequence[int] = (),
        dims: Sequence[int] = (),
        mini_batch_tokens: int | None = None,
    ) -> None:
        super().__init__()
        if not 0 <= teacher_weight <= 1:
            raise ConfigError("teacher_weight", teacher_weight, f"is {teacher_weight}", "it is a share, from 0 to 1")
        if distill not in IMITATED:
            raise ConfigError("distill", distill, f"is {distill!r}", f"one of {', '.join(IMITATED)}")
        self.model: nn.Module = model  # the trainer wraps it, where there are several processes
        self.scale = scale
        self.teacher = teacher
        self.teacher_weight = teacher_weight if teacher else 0.0
        self.mini_batch_size = 0
        self.mini_batch_num_tokens = mini_batch_tokens
        self._depths = DepthVectors(model, depths) if depths else None
        self._width = int(model.get_embedding_dimension())
        self._sizes = _sizes(dims, self._width)
        self._near = _near(model, teacher) if teacher and distill != SIMILARITIES else None
        self._similarities = distill != VECTORS

    def forward(self, sentence_features: Any, labels: Tensor | None = None) -> Tensor:
        """The loss of one batch, with one dictionary of tokens for each column."""
        features = list(sentence_features)
        self._keys = [row_keys(column) for column in features]
        if self.mini_batch_num_tokens is not None:
            cached: Tensor = CachedLossMixin.forward_cached(self, features, labels)
            return cached
        return self._of(embed_columns(self._embed, features), labels)

    def _embed(self, features: dict[str, Any]) -> dict[str, Tensor]:
        """Vectors (texts, depths, dimension)."""
        if self._depths:
            return {"sentence_embedding": self._depths(self.model, features)}
        return {"sentence_embedding": self.model(features)["sentence_embedding"][:, None]}

    def embed_minibatch(
        self,
        sentence_feature: dict[str, Tensor],
        begin: int,
        end: int,
        with_grad: bool,
        copy_random_state: bool,
        random_state: RandContext | None = None,
    ) -> tuple[Tensor, RandContext | None]:
        """As the stock one, with the vectors of every depth."""
        part = _create_minibatch(sentence_feature, begin, end)
        with random_state or nullcontext(), nullcontext() if with_grad else torch.no_grad():
            state = RandContext(*part.values()) if copy_random_state else None
            return self._embed(part)["sentence_embedding"], state

    def calculate_loss(
        self, reps: list[list[Tensor]], labels: Tensor | None = None, *, with_backward: bool = False
    ) -> Tensor:
        """The loss of cached vectors: by column, in mini-batches."""
        loss = self._of([torch.cat(parts) for parts in reps], labels)
        if with_backward:
            loss.backward()  # type: ignore[no-untyped-call]
            loss = loss.detach()
        return loss

    def _of(self, columns: Sequence[Tensor], labels: Tensor | None) -> Tensor:
        """The loss of vectors, by column (texts, depths, dimension)."""
        targets = self._targets(labels) if self.teacher else None
        losses = [
            self._at([column[:, depth, :size] for column in columns], targets)
            for depth in range(columns[0].shape[1])
            for size in self._sizes
        ]
        return torch.stack(losses).mean()

    def _at(self, columns: Sequence[Tensor], targets: list[Tensor] | None) -> Tensor:
        """The loss at one depth and size; texts alone have no contrastive part."""
        loss = columns[0].new_zeros(())
        weight = self.teacher_weight if len(columns) > 1 else 1.0
        if weight < 1:
            never = batch_mask(self._keys)
            loss = loss + (1 - weight) * contrastive_loss(columns, never, self.scale)
        if targets is not None:
            loss = loss + weight * self._taught(columns, targets)
        return loss

    def _taught(self, columns: Sequence[Tensor], targets: list[Tensor]) -> Tensor:
        """The teacher's part at one depth and size."""
        whole = columns[0].shape[1] == self._width
        loss = columns[0].new_zeros(())
        if self._near is not None and whole:
            loss = loss + self._near.compute_loss_from_embeddings(list(columns), targets)
        if self._similarities or not whole:
            keys = torch.cat(self._keys)
            same = keys == keys[:, None]
            loss = loss + similarity_loss(torch.cat(list(columns)), torch.cat(targets), same, self.scale)
        return loss

    def _targets(self, labels: Tensor | None) -> list[Tensor]:
        assert self.teacher is not None and labels is not None, "a teacher's rows are the labels of its data"
        rows = labels.cpu().numpy()
        vectors = torch.from_numpy(self.teacher.read(rows.reshape(-1))).to(labels.device)
        return list(vectors.reshape(*rows.shape, -1).unbind(dim=1))


def _sizes(dims: Sequence[int], width: int) -> tuple[int, ...]:
    """The full size, and the others."""
    for size in dims:
        if not 1 <= size <= width:
            raise ConfigError("dims", size, f"is {size}", f"the vectors have {width} numbers")
    return (width, *sorted(set(dims) - {width}, reverse=True))


def check_views(model: SentenceTransformer, depths: Sequence[int], dims: Sequence[int]) -> None:
    """Find out before a training whether a model has these depths and sizes.

    Raises:
        ConfigError, IllegalDepth, UnsupportedArchitecture: As for :class:`Objective`.
    """
    _sizes(dims, int(model.get_embedding_dimension()))
    if depths:
        DepthVectors(model, depths)


def _near(model: SentenceTransformer, teacher: TeacherVectors) -> EmbedDistillLoss:
    """``1 - cosine`` with the teacher's vectors; with a linear map where the widths differ."""
    width = teacher.dimension if teacher.dimension != model.get_embedding_dimension() else None
    near = EmbedDistillLoss(model, "cosine", projection_dim=width)
    if width and processes.count() > 1:
        for parameter in near.projection.parameters():  # the wrapper around the model knows nothing of them
            parameter.register_hook(_mean_over_processes)
    return near


def _mean_over_processes(gradient: Tensor) -> Tensor:
    torch.distributed.all_reduce(gradient := gradient.clone())
    return gradient / processes.count()


class DepthVectors:
    """A model's vectors at several depths, from one pass: those of the model cut to so many blocks.

    The state after a block goes through the model's own final norm and everything that follows its transformer.
    sentence-transformers' ``AdaptiveLayerLoss`` trains states without that norm, which no cut model has.

    Args:
        model: In any mode; the full depth is always among the depths, as the last.
        depths: How many first blocks.

    Raises:
        ConfigError: A depth is out of range.
        IllegalDepth: The model cannot be cut there.
        UnsupportedArchitecture: More than a norm follows its blocks.
    """

    def __init__(self, model: SentenceTransformer, depths: Sequence[int]) -> None:
        transformer = model[0].auto_model
        self._model = model
        self._blocks = blocks_of(transformer)
        self._norm = final_norm(transformer)
        self._dtype = transformer.dtype
        full = len(self._blocks)
        legal = legal_depths(transformer.config)
        for depth in depths:
            if not 1 <= depth <= full:
                raise ConfigError("depths", depth, f"is {depth}", f"the model has {full} blocks")
            if depth not in legal:
                raise IllegalDepth(depth, full, "the model cannot be cut there", legal)
        if not _ends_with_norm(model):
            raise UnsupportedArchitecture(transformer.name_or_path, "more than a norm follows its blocks")
        self.depths = (*sorted(set(depths) - {full}), full)

    def __call__(self, model: nn.Module, features: dict[str, Any]) -> Tensor:
        """Vectors (texts, depths, dimension).

        Args:
            model: What runs: the model itself, or what several processes wrap it in.
            features: Tokens.
        """
        states: dict[int, Tensor] = {}
        with ExitStack() as hooks:
            for depth in self.depths[:-1]:
                # Only read here, pooled after the pass: a block that is run again for its gradients does no more.
                read = partial(_read, states, depth)
                hooks.callback(self._blocks[depth - 1].register_forward_hook(read).remove)
            last = model(dict(features))["sentence_embedding"]
        others = [pool(self._model, self._norm(states[depth].to(self._dtype)), features) for depth in self.depths[:-1]]
        return torch.stack([*(vectors.to(last.dtype) for vectors in others), last], dim=1)


def _read(states: dict[int, Tensor], depth: int, block: nn.Module, given: Any, output: Any) -> None:
    states[depth] = states_of(output)


def _ends_with_norm(model: SentenceTransformer) -> bool:
    training = model.training
    try:
        features = model.eval().preprocess(list(PROBES))
        inputs = {name: features[name].to(model.device) for name in ("input_ids", "attention_mask")}
        return tail_is_norm(model[0].auto_model, inputs)
    finally:
        model.train(training)


@contextmanager
def dropout(model: SentenceTransformer, share: float) -> Iterator[None]:
    """Within: in training, the model's dropout is this.

    It is that of its own dropout modules. A model that has none (as a Llama) gets it on its token embeddings. The
    dropout of adapters that are added within stays theirs.
    """
    modules = [module for module in model.modules() if isinstance(module, nn.Dropout)]
    before = [module.p for module in modules]
    hook = None if modules else embeddings_of(model[0].auto_model).register_forward_hook(partial(_drop, share))
    try:
        for module in modules:
            module.p = share
        yield
    finally:
        for module, own in zip(modules, before, strict=True):
            module.p = own
        if hook:
            hook.remove()


def _drop(share: float, table: nn.Module, given: Any, output: Tensor) -> Tensor:
    return functional.dropout(output, share, training=table.training)
