"""Scores of evaluation tasks at several depths, from one encoding of their texts.

mteb's own evaluator scores a task once for each depth. The model it is given looks up its vectors: a text that was not
asked for before is run through all layers once (:mod:`.depths`), and its vectors of these depths are kept in a
temporary file until the task is done: texts × depths × dimension × 4 bytes (a thousand texts at 30 depths of 576:
69 MB). All depths are resampled alike, so that differences between them have paired intervals.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer

from secateur.choosing.selectors import layers_of
from secateur.evaluation.evaluate import as_encoder, score_task, task_prompts
from secateur.evaluation.tasks import Task
from secateur.files import output_errors
from secateur.measures.intervals import Array
from secateur.models.cutting import bypassed
from secateur.profiling.depths import DepthEncoder
from secateur.progress import Progress, quiet, silent
from secateur.results import DepthScoreRow

TOGETHER = 4096
"""Texts that are tokenized and sorted by length together."""

Vectors = NDArray[np.float32]


@dataclass(frozen=True)
class DepthScore:
    """One task at one depth: ``row`` is None where the score is no number (all vectors alike).

    ``replicates`` are the bootstrap's, (replicates,), None where rows cannot be drawn again; ``note`` is what a reader
    of the score must know.
    """

    task: str
    metric: str
    depth: int
    row: DepthScoreRow | None
    replicates: Array | None
    note: str = ""


def score_depths(
    encoder: DepthEncoder,
    todo: Sequence[tuple[Task, Sequence[int]]],
    *,
    sample: int | None = None,
    seed: int = 42,
    layers: str = "first",
    progress: Progress = silent,
) -> Iterator[DepthScore]:
    """Score depths of a model on tasks, as :func:`.evaluate` scores the model cut to them, its prompts chosen likewise.

    ``todo`` are tasks, opened with ``sample`` and ``seed``, each with the depths to score; ``layers`` is the selector
    that says which layers a depth has (each but ``first`` takes an encoding for each depth).

    Raises:
        ModelError: Vectors are not finite, or a text is too large for the memory.
        DataError: The data of a task cannot be had.
        OutputError: The disk of temporary files is full.
    """
    model, done, total = encoder.model, 0, sum(len(depths) for _, depths in todo)
    for task, depths in todo:
        key: dict[str, Any] = {"sample": sample, "seed": seed, "data": task.source.sha256}
        prompts = task_prompts(task, model)
        with output_errors(tempfile.gettempdir()), tempfile.TemporaryFile() as file:
            vectors = _Kept(encoder, file, depths)
            for depth in depths:
                progress("tasks by depth", done, total)
                kept = layers_of(layers, depth, encoder.depth)
                at_depth = _lookup(model, vectors, depth) if layers == "first" else bypassed(model[0].auto_model, kept)
                with quiet(), as_encoder(model, encoder.name, prompts, None) as served, at_depth:
                    scored = score_task(served, encoder.name, task, 32, key)
                row, own = scored.row, None
                if math.isfinite(row.score):
                    numbers = (depth, row.score, row.low, row.high, row.samples)
                    own = DepthScoreRow(row.task, row.type, row.metric, *numbers)
                yield DepthScore(row.task, row.metric, depth, own, scored.replicates, row.note)
                done += 1
    progress("tasks by depth", total, total)


def notes_on(scores: Sequence[DepthScore]) -> list[str]:
    """What is missing among scores, and their notes, each once for all depths that have it."""
    depths: dict[tuple[str, str], list[str]] = {}
    for score in scores:
        if score.row is None:
            said = f"{score.metric} on {score.task} is no number at depth", "the vectors there are all alike"
            depths.setdefault(said, []).append(str(score.depth))
        if score.note:
            depths.setdefault((f"{score.task} at depth", score.note), []).append(str(score.depth))
    return [f"{what} {', '.join(own)}: {why}" for (what, why), own in depths.items()]


class _Kept:
    """The vectors of texts at some depths, in a file: each text is run once, at its first use."""

    def __init__(self, encoder: DepthEncoder, file: IO[bytes], depths: Sequence[int]) -> None:
        self._encoder, self._file, self._depths = encoder, file, list(depths)
        self._places: dict[tuple[str, str], int] = {}
        self._dimension = 0

    def at(self, depth: int, texts: Sequence[str], prompt: str) -> Vectors:
        """Vectors of texts, which may repeat: (texts, dimension)."""
        new = [text for text in dict.fromkeys(texts) if (prompt, text) not in self._places]
        for start in range(0, len(new), TOGETHER):
            own = new[start : start + TOGETHER]
            for batch in self._encoder.run(own, prompt):
                self._dimension = batch.vectors.shape[-1]
                # Written, not mapped: a full disk is an error here and would end the process there.
                chosen = batch.vectors[:, [depth - 1 for depth in self._depths]]
                self._file.write(chosen.contiguous().numpy().tobytes())
                self._places |= {(prompt, own[row]): len(self._places) + i for i, row in enumerate(batch.rows)}
        self._file.flush()
        # Mapped: of a large corpus only the rows that are asked for are read.
        shape = (len(self._places), len(self._depths), self._dimension)
        held = np.memmap(self._file, np.float32, "r", shape=shape)
        return np.asarray(held[[self._places[prompt, text] for text in texts], self._depths.index(depth)])


@contextmanager
def _lookup(model: SentenceTransformer, vectors: _Kept, depth: int) -> Iterator[None]:
    """Within: ``model.encode`` looks up the vectors of a depth, and so do ``encode_query`` and ``encode_document``."""

    def encode(inputs: Sequence[str], prompt_name: str | None = None, prompt: str | None = None, **_: Any) -> Vectors:
        if prompt is None:
            prompt = model.prompts.get(prompt_name or model.default_prompt_name)
        return vectors.at(depth, inputs, prompt or "")[:, : model.truncate_dim]

    model.encode = encode
    try:
        yield
    finally:
        del model.encode
