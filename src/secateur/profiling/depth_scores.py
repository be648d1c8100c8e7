"""Zero-shot scores of evaluation tasks at every depth, from one encoding of their texts.

mteb's own evaluator scores a task once for each depth. The model it is given looks up its vectors: a text that was not
asked for before is run through all layers once (:mod:`.depths`), and its vectors of all depths are kept in a temporary
file until the task is done: texts × depths × dimension × 4 bytes (a thousand texts at 30 depths of 576: 69 MB). The
scores at depth k are those that :func:`.evaluate` gives for the model cut to its first k layers.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer

from secateur.evaluation.evaluate import as_encoder, is_instructed, score_task, task_prompts
from secateur.evaluation.tasks import Task
from secateur.files import output_errors
from secateur.profiling.depths import DepthEncoder
from secateur.progress import Progress, quiet, silent
from secateur.results import DepthScoreRow

TOGETHER = 4096
"""Texts that are tokenized and sorted by length together."""

Vectors = NDArray[np.float32]


def depth_scores(
    model: SentenceTransformer,
    tasks: Sequence[Task],
    *,
    sample: int | None = None,
    seed: int = 42,
    name: str = "model",
    progress: Progress = silent,
) -> tuple[tuple[DepthScoreRow, ...], tuple[str, ...]]:
    """Score every depth of a model on tasks, its prompts chosen as :func:`.evaluate` does.

    Args:
        model: An opened model; it is left as it was.
        tasks: Opened with ``sample`` and ``seed``.
        sample: What the tasks were opened with, as ``seed``.
        seed: See ``sample``.
        name: What the user calls the model.
        progress: Called before each depth of each task, and at the end.

    Returns:
        Rows by task, then depth; and notes, which say what is missing and what else a reader must know.

    Raises:
        ModelError: Vectors are not finite, or a text is too large for the memory.
        DataError: The data of a task cannot be had.
        OutputError: The disk of temporary files is full.
    """
    encoder = DepthEncoder(model, name=name)
    total = len(tasks) * encoder.depth
    rows: list[DepthScoreRow] = []
    notes: list[str] = []
    for number, task in enumerate(tasks):
        key: dict[str, Any] = {"sample": sample, "seed": seed, "data": task.source.sha256}
        prompts = task_prompts(task, is_instructed(model))
        missing, noted = list[str](), dict[str, list[str]]()
        with output_errors(tempfile.gettempdir()), tempfile.TemporaryFile() as file:
            vectors = _Kept(encoder, file)
            for depth in range(1, encoder.depth + 1):
                progress("tasks by depth", number * encoder.depth + depth - 1, total)
                with quiet(), as_encoder(model, name, prompts, None) as served, _lookup(model, vectors, depth):
                    row = score_task(served, name, task, 32, key).row
                numbers = (depth, row.score, row.low, row.high, row.samples)
                if math.isfinite(row.score):
                    rows.append(DepthScoreRow(row.task, row.type, row.metric, *numbers))
                else:
                    missing.append(str(depth))
                if row.note:
                    noted.setdefault(row.note, []).append(str(depth))
        if missing:
            metric = f"{task.metadata.main_score} on {task.name}"
            notes.append(f"{metric} is no number at depth {', '.join(missing)}: the vectors there are all alike")
        notes += [f"{task.name} at depth {', '.join(depths)}: {note}" for note, depths in noted.items()]
    progress("tasks by depth", total, total)
    return tuple(rows), (*encoder.notes, *notes)


class _Kept:
    """The vectors of texts at every depth, in a file: each text is run once, at its first use."""

    def __init__(self, encoder: DepthEncoder, file: IO[bytes]) -> None:
        self._encoder, self._file = encoder, file
        self._places: dict[bytes, int] = {}
        self._dimension = 0

    def at(self, depth: int, texts: Sequence[str], prompt: str) -> Vectors:
        """Vectors of texts, which may repeat: (texts, dimension)."""
        keys = [sha256(f"{prompt}\0{text}".encode()).digest()[:16] for text in texts]
        missing = {key: text for key, text in zip(keys, texts, strict=True) if key not in self._places}
        new = list(missing)
        for start in range(0, len(new), TOGETHER):
            own = new[start : start + TOGETHER]
            for batch in self._encoder.run([missing[key] for key in own], prompt):
                self._dimension = batch.vectors.shape[-1]
                # Written, not mapped: a full disk is an error here and would end the process there.
                self._file.write(batch.vectors[:, 0].contiguous().numpy().tobytes())
                for row in batch.rows:
                    self._places[own[row]] = len(self._places)
        self._file.flush()
        # Mapped: of a large corpus only the rows that are asked for are read.
        shape = (len(self._places), self._encoder.depth, self._dimension)
        held = np.memmap(self._file, np.float32, "r", shape=shape)
        return np.asarray(held[[self._places[key] for key in keys], depth - 1])


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
