"""What a model is measured by while it trains: pairs and tasks that it is not trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer

from secateur.data.sources import Data, Pairs, Texts, read_sources
from secateur.errors import ConfigError, DataError
from secateur.evaluation.evaluate import evaluate
from secateur.evaluation.tasks import Task, open_tasks
from secateur.healing.recipe import check_count
from secateur.healing.trainer import Validation
from secateur.measures.metrics import cosines, false_negative_mask, retrieval, text_numbers

COMPARED = 2**24
"""Similarities of anchors and passages that are in memory at once."""


@dataclass(frozen=True)
class HeldOut:
    """Pairs and tasks that were opened, and how often they are asked.

    ``sample`` rows of each task count, drawn by ``seed``; ``every`` and ``patience`` are those of :class:`.Validation`.
    """

    pairs: Sequence[Pairs]
    tasks: Sequence[Task]
    sample: int | None
    every: int | None
    patience: int | None
    seed: int

    @property
    def settings(self) -> dict[str, Any]:
        """For ``training.json``."""
        return {
            "eval_data": [
                asdict(pairs.source) | {"prompt": pairs.prompt, "passage_prompt": pairs.passage_prompt}
                for pairs in self.pairs
            ],
            "eval_tasks": [
                {"name": task.name, "sha256": task.source.sha256, "instruction": task.instruction}
                for task in self.tasks
            ],
            "eval_sample": self.sample,
            "eval_every": self.every,
            "patience": self.patience,
        }

    @property
    def validation(self) -> Validation | None:
        """For the trainer; None where there is nothing to measure by."""
        return Validation(self.score, self.every, self.patience) if self.pairs or self.tasks else None

    def score(self, model: SentenceTransformer) -> float:
        """The mean over held-out files and tasks."""
        found = [held_out_ndcg(model, pairs) for pairs in self.pairs]
        if self.tasks:
            table = evaluate([model], self.tasks, sample=self.sample, seed=self.seed, names=["model"])
            found += [row.score for row in table.rows]
        return sum(found) / len(found)


def read_held_out(
    data: Data | None,
    tasks: Sequence[str | Path] | None,
    *,
    instruction: str | None,
    columns: Mapping[str, str] | None,
    sample: int | None,
    every: int | None,
    patience: int | None,
    seed: int,
) -> HeldOut:
    """Open what a training is measured by; arguments as those of :func:`.heal` that start with ``eval``.

    Raises:
        ConfigError: A number is no count, or nothing is measured by it; or a task cannot be opened.
        DataError: The data cannot be read, or hold texts alone.
    """
    pairs = _read_pairs(data, instruction, columns)
    for key, value in (("eval_sample", sample), ("eval_every", every), ("patience", patience)):
        check_count(key, value)
        if value is not None and not pairs and not tasks:
            raise ConfigError(key, value, "there is nothing to measure on the way", "give eval_data or eval_tasks")
    if sample is not None:
        pairs = [some.sample(sample, seed) for some in pairs]
    opened = open_tasks(tasks, sample, seed) if tasks else []
    return HeldOut(pairs, opened, sample, every, patience, seed)


def _read_pairs(data: Data | None, instruction: str | None, columns: Mapping[str, str] | None) -> list[Pairs]:
    found = []
    for source in read_sources(data or (), instruction, columns):
        if isinstance(source, Texts):
            raise DataError(source.source.name, "holds texts alone, and what is measured is how pairs are found")
        found.append(source)
    return found


def held_out_ndcg(model: SentenceTransformer, pairs: Pairs) -> float:
    """nDCG@10 of finding each anchor's positive among all positives and negatives of a file, 0 to 1.

    Equal passages are one document, and an anchor's other positives are left out of its ranking.
    """
    anchors, anchor_places = _encode(model, [row.anchor for row in pairs.rows], pairs.prompt)
    texts = [row.positive for row in pairs.rows] + [text for row in pairs.rows for text in row.negatives]
    passages, passage_places = _encode(model, texts, pairs.passage_prompt)
    numbers = text_numbers([row.anchor for row in pairs.rows], texts)
    count, total = len(pairs.rows), 0.0
    step = max(1, COMPARED // len(texts))
    for rows in (slice(start, min(start + step, count)) for start in range(0, count, step)):
        masked = false_negative_mask(numbers[0], numbers[1][:count], numbers[1][count:], rows=rows, once=True)
        found = cosines(anchors[anchor_places[rows]], passages)[:, passage_places]
        own = torch.arange(count)[rows].to(found.device)
        scores = retrieval(found.masked_fill(masked.to(found.device), -torch.inf), own).ndcg_at_10
        total += float(scores) * len(own)
    return total / count


def _encode(model: SentenceTransformer, texts: Sequence[str], prompt: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The vectors of the distinct texts, and which of them each text has."""
    distinct = {text: place for place, text in enumerate(dict.fromkeys(texts))}
    vectors = model.encode(list(distinct), prompt=prompt or None, convert_to_tensor=True, show_progress_bar=False)
    return vectors, torch.tensor([distinct[text] for text in texts], device=vectors.device)
