"""Zero-shot scores of evaluation tasks at every depth, from one encoding of their texts.

mteb's own evaluator scores a task once for each depth. The model it is given looks up its vectors: a text that was not
asked for before is run through all blocks once (:mod:`.depths`), and its vectors of all depths are kept on
disk, one file for each depth, until the task is done. So a task needs texts × depths × dimension × 4 bytes of the
folder for temporary files (a thousand texts at 30 depths of 576: 69 MB), and of the memory what evaluating one model
needs. The scores at depth k are those that :func:`.evaluate` gives for the model cut to k blocks.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer

from secateur.evaluation.evaluate import as_encoder, is_instructed, score_task, task_prompts
from secateur.evaluation.tasks import Task
from secateur.files import output_errors
from secateur.profiling.depths import DepthEncoder
from secateur.progress import Progress, quiet, silent
from secateur.results import DepthScoreRow, ScoreRow

TOGETHER = 4096
"""Texts that are tokenized and sorted by length together."""

Vectors = NDArray[np.float32]


@dataclass(frozen=True)
class DepthScores:
    """Rows by task, then depth; ``notes`` say which are missing, and what did not go the quick way."""

    rows: tuple[DepthScoreRow, ...]
    notes: tuple[str, ...]


def depth_scores(
    model: SentenceTransformer,
    tasks: Sequence[Task],
    *,
    sample: int | None = None,
    seed: int = 42,
    name: str = "model",
    progress: Progress = silent,
) -> DepthScores:
    """Score every depth of a model on tasks, its prompts chosen as :func:`.evaluate` does.

    Args:
        model: An opened model; it is left as it was.
        tasks: Opened with ``sample`` and ``seed``.
        sample: What the tasks were opened with.
        seed: Likewise.
        name: What the user calls the model.
        progress: Told before each depth of each task, and at the end.

    Raises:
        ModelError: Vectors are not finite, or a text is too large for the memory.
        DataError: The data of a task cannot be had.
        OutputError: The disk of temporary files is full.
    """
    encoder = DepthEncoder(model, name=name)
    found: list[ScoreRow] = []
    for number, task in enumerate(tasks):
        with _DepthVectors(encoder) as vectors:
            for depth in range(1, encoder.depth + 1):
                progress("tasks by depth", number * encoder.depth + depth - 1, len(tasks) * encoder.depth)
                found.append(_score(model, vectors, depth, task, sample, seed, name))
    progress("tasks by depth", len(tasks) * encoder.depth, len(tasks) * encoder.depth)
    by_depth = [(1 + place % encoder.depth, row) for place, row in enumerate(found)]
    rows = tuple(_row(depth, row) for depth, row in by_depth if math.isfinite(row.score))
    missing: dict[str, list[str]] = {}
    for depth, row in by_depth:
        if not math.isfinite(row.score):
            missing.setdefault(f"{row.metric} on {row.task}", []).append(str(depth))
    told = [
        f"{what} is no number at depth {', '.join(depths)}: the vectors there are all alike"
        for what, depths in missing.items()
    ]
    for title in dict.fromkeys(row.task for row in found):
        unsure = [(depth, row.note) for depth, row in by_depth if row.task == title and row.note]
        if unsure:
            told.append(f"{title} at depth {', '.join(str(depth) for depth, _ in unsure)}: {unsure[0][1]}")
    return DepthScores(rows, (*encoder.notes, *told))


def _row(depth: int, row: ScoreRow) -> DepthScoreRow:
    return DepthScoreRow(row.task, row.type, row.metric, depth, row.score, row.low, row.high, row.samples)


def _score(
    model: SentenceTransformer,
    vectors: _DepthVectors,
    depth: int,
    task: Task,
    sample: int | None,
    seed: int,
    name: str,
) -> ScoreRow:
    key: dict[str, Any] = {"sample": sample, "seed": seed, "data": task.source.sha256}
    prompts = task_prompts(task, is_instructed(model))
    with quiet(), as_encoder(model, name, prompts, None) as encoder, _served(model, vectors, depth):
        return score_task(encoder, name, task, 32, key).row


class _DepthVectors:
    """The vectors of texts at every depth: each text is run once, at its first use. A context."""

    def __init__(self, encoder: DepthEncoder) -> None:
        self._encoder = encoder
        self._open = ExitStack()
        self._places: dict[bytes, int] = {}
        self._dimension = 0

    def __enter__(self) -> _DepthVectors:
        self._folder = Path(self._open.enter_context(tempfile.TemporaryDirectory(prefix="secateur-")))
        names = [self._folder / f"{depth}.float32" for depth in range(1, self._encoder.depth + 1)]
        self._files = [self._open.enter_context(name.open("w+b")) for name in names]
        return self

    def __exit__(self, *error: object) -> None:
        with output_errors(self._folder):  # what a full disk refused is tried once more
            self._open.close()

    def at(self, depth: int, texts: Sequence[str], prompt: str) -> Vectors:
        """Vectors of texts, which may repeat: (texts, dimension)."""
        keys = [sha256(f"{prompt}\0{text}".encode()).digest()[:16] for text in texts]
        missing = {key: text for key, text in zip(keys, texts, strict=True) if key not in self._places}
        names = list(missing)
        for start in range(0, len(names), TOGETHER):
            self._add(names[start : start + TOGETHER], missing, prompt)
        # Mapped: of a large corpus only the rows that are asked for are read.
        held = np.memmap(self._files[depth - 1], dtype=np.float32, mode="r").reshape(-1, self._dimension)
        return held[[self._places[key] for key in keys]]

    def _add(self, keys: Sequence[bytes], texts: dict[bytes, str], prompt: str) -> None:
        for batch in self._encoder.run([texts[key] for key in keys], prompt):
            vectors = batch.vectors[:, 0]
            self._dimension = vectors.shape[-1]
            # Written, not mapped: a full disk is an error here and would end the process there.
            with output_errors(self._folder):
                for depth, file in enumerate(self._files):
                    file.write(vectors[:, depth].contiguous().numpy().tobytes())
            for row in batch.rows:
                self._places[keys[row]] = len(self._places)
        with output_errors(self._folder):
            for file in self._files:
                file.flush()


@contextmanager
def _served(model: SentenceTransformer, vectors: _DepthVectors, depth: int) -> Iterator[None]:
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
