"""What a training is given besides its numbers: pairs or texts alone, a teacher or none, and the loss that follows.

| data | without a teacher | with one |
|---|---|---|
| pairs | contrastive | contrastive and distillation, by ``teacher_weight`` |
| texts alone | each text is its own positive, under dropout (SimCSE, arXiv 2104.08821) | distillation |
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer

from secateur.data.sources import Pair, Pairs, Texts
from secateur.errors import ConfigError, DataError
from secateur.healing.objectives import DROPOUT, IMITATED, TEACHER_WEIGHT, VECTORS, Objective, dropout
from secateur.healing.recipe import DISTILL, L3PRUNE, Recipe
from secateur.healing.teacher import UNUSED, Teacher, TeacherVectors, keep_vectors
from secateur.healing.train import TrainingSet, left_out, make_loss, training_sets, used_rows
from secateur.progress import Progress

LABEL = "label"
"""The column of a teacher's row numbers, one for each text of a row."""


@dataclass(frozen=True)
class Aim:
    """What a training aims at.

    Attributes:
        teacher_weight: Of the teacher beside the contrastive loss.
        distill: What of the teacher is imitated (:class:`.Objective`).
        depths: Depths that are trained besides the full one.
        dims: Sizes of vectors that are trained besides the full one.
        taught: Whether there is a teacher.
        alone: Whether there are texts alone, without one.
    """

    teacher_weight: float = TEACHER_WEIGHT
    distill: str = VECTORS
    depths: tuple[int, ...] = ()
    dims: tuple[int, ...] = ()
    taught: bool = False
    alone: bool = False

    @property
    def kind(self) -> str:
        """In words, for the record and for those who read it."""
        if self.taught:
            return "distillation" if self.teacher_weight == 1 else "contrast and distillation"
        return "contrast, each text alone its own positive under dropout (SimCSE)" if self.alone else "contrast"

    @property
    def recipe(self) -> str:
        """Whose numbers suit."""
        return DISTILL if self.taught and self.teacher_weight == 1 else L3PRUNE


def find_aim(
    sources: Sequence[Pairs | Texts],
    *,
    taught: bool,
    teacher_weight: float | None = None,
    distill: str | None = None,
    depths: Sequence[int] = (),
    dims: Sequence[int] = (),
) -> Aim:
    """What follows from the data and from whether there is a teacher; texts alone leave it the whole weight.

    Raises:
        ConfigError: A value is out of range, or of no teacher.
    """
    for key, value in (("teacher_weight", teacher_weight), ("distill", distill)):
        if value is not None and not taught:
            raise ConfigError(key, value, "there is no teacher", "name one with --teacher")
    if distill is not None and distill not in IMITATED:
        raise ConfigError("distill", distill, f"is {distill!r}", f"one of {', '.join(IMITATED)}")
    if teacher_weight is not None and not 0 <= teacher_weight <= 1:
        raise ConfigError("teacher_weight", teacher_weight, f"is {teacher_weight}", "it is a share, from 0 to 1")
    pairs = any(isinstance(source, Pairs) for source in sources)
    default = TEACHER_WEIGHT if pairs else 1.0
    weight = default if teacher_weight is None or not pairs else teacher_weight
    alone = not taught and any(isinstance(source, Texts) for source in sources)
    return Aim(weight, distill or VECTORS, tuple(depths), tuple(dims), taught, alone)


def sets_of(sources: Sequence[Pairs | Texts], batch_size: int, aim: Aim) -> list[TrainingSet]:
    """The sets that batches come from: anchors, positives and negatives, or the one column ``text``.

    Raises:
        DataError: Nothing fills a batch, or two files have one name.
    """
    pairs, texts = _split(sources, aim)
    names = [source.name for source in sources]
    for source in texts:
        if names.count(source.name) > 1:
            raise DataError(source.name, "two data files have this name, and a prompt belongs to a name", "rename one")
        distinct = len(set(source.rows))
        if distinct < batch_size:
            problem = f"{distinct} texts do not fill a batch of {batch_size}"
            raise DataError(source.name, problem, "more texts, or a smaller batch")
    return [*(training_sets(pairs, batch_size) if pairs else []), *map(_text_set, texts)]


def not_trained_on(sources: Sequence[Pairs | Texts], batch_size: int, aim: Aim) -> list[str]:
    """What :func:`sets_of` leaves out of the data, in words."""
    return left_out(_split(sources, aim)[0], batch_size)


def _split(sources: Sequence[Pairs | Texts], aim: Aim) -> tuple[list[Pairs], list[Texts]]:
    """What is trained on as pairs, and the texts that a teacher teaches."""
    if not aim.taught:
        return [_as_pairs(source) for source in sources], []
    pairs = [source for source in sources if isinstance(source, Pairs)]
    return pairs, [source for source in sources if isinstance(source, Texts)]


def _as_pairs(source: Pairs | Texts) -> Pairs:
    if isinstance(source, Pairs):
        return source
    rows = tuple(Pair(text, text) for text in dict.fromkeys(source.rows))
    return Pairs(source.name, rows, source.prompt, source.prompt, source.source)


def _text_set(texts: Texts) -> TrainingSet:
    rows = Dataset.from_dict({"text": list(dict.fromkeys(texts.rows))})
    return TrainingSet(texts.name, rows, {"text": texts.prompt} if texts.prompt else {}, texts.name)


def teach(
    sets: Sequence[TrainingSet], recipe: Recipe, teacher: Teacher, folder: Path, progress: Progress
) -> tuple[list[TrainingSet], TeacherVectors]:
    """Let a teacher encode the texts that will be in a batch, with the prompts of their columns.

    Of several processes that share a disk, one asks the teacher, and the others wait at the folder.

    Args:
        sets: The texts.
        recipe: The numbers of the training, which decide on the batches.
        teacher: The teacher.
        folder: Where its vectors are kept.
        progress: Told after each chunk.

    Returns:
        The sets with the column :data:`LABEL`, the numbers of the vectors of each row's texts, and the vectors. Rows
        that will be in no batch have :data:`UNUSED` there.
    """
    used = used_rows(sets, recipe)
    texts: dict[str, dict[str, None]] = {}
    for item, rows in zip(sets, used, strict=True):
        chosen = item.rows.select(rows)
        for column in chosen.column_names:
            texts.setdefault(item.prompts.get(column, ""), {}).update(dict.fromkeys(chosen[column]))
    wanted = {prompt: list(own) for prompt, own in texts.items()}
    vectors = keep_vectors(teacher, wanted, folder, progress)
    return [_numbered(item, rows, vectors) for item, rows in zip(sets, used, strict=True)], vectors


def _numbered(item: TrainingSet, used: Sequence[int], vectors: TeacherVectors) -> TrainingSet:
    columns = item.rows.column_names
    chosen = item.rows.select(used)
    numbers = np.full((len(item.rows), len(columns)), UNUSED, dtype=np.int64)
    for i, column in enumerate(columns):
        numbers[used, i] = vectors.rows(list(chosen[column]), item.prompts.get(column, ""))
    return replace(item, rows=item.rows.add_column(LABEL, numbers.tolist()))


def make_objective(
    model: SentenceTransformer, recipe: Recipe, *, aim: Aim, teacher: TeacherVectors | None
) -> torch.nn.Module:
    """The loss of an aim, as :func:`.train` wants it."""
    if teacher is None and not aim.depths and not aim.dims:
        return make_loss(model, recipe)
    return Objective(
        model,
        scale=recipe.scale,
        teacher=teacher,
        teacher_weight=aim.teacher_weight,
        distill=aim.distill,
        depths=aim.depths,
        dims=aim.dims,
        mini_batch_tokens=recipe.mini_batch_tokens,
    )


def dropout_of(model: SentenceTransformer, aim: Aim) -> AbstractContextManager[None]:
    """The dropout that an aim wants while it is trained for.

    A text is told from itself by dropout alone; a teacher is imitated without any; else the model's own stays.
    """
    if aim.alone:
        return dropout(model, DROPOUT)
    return dropout(model, 0.0) if aim.taught else nullcontext()
