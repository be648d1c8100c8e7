"""What a model is scored by while it trains: pairs and tasks that it is not trained on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.evaluation import BaseEvaluator

from secateur.data.sources import Pairs, Texts, read_sources
from secateur.errors import ConfigError, DataError
from secateur.evaluation.evaluate import evaluate
from secateur.evaluation.tasks import Task, open_tasks
from secateur.healing.recipes import as_written
from secateur.measures.metrics import cosines, false_negative_mask, retrieval, text_numbers
from secateur.options import HealOptions

COMPARED = 2**24
"""Similarities of anchors and passages that are in memory at once."""

Score = Callable[[SentenceTransformer], float]
"""Higher for a better model."""


@dataclass(frozen=True)
class HeldOut:
    """Pairs and tasks that were read; ``sample`` rows of each task count, drawn by ``seed``."""

    pairs: Sequence[Pairs] = ()
    tasks: Sequence[Task] = ()
    sample: int | None = None
    seed: int = 42

    def score(self, model: SentenceTransformer) -> float:
        """The mean over files and tasks."""
        found = [held_out_ndcg(model, pairs) for pairs in self.pairs]
        if self.tasks:
            table = evaluate([model], self.tasks, sample=self.sample, seed=self.seed, names=["model"])
            found += [row.score for row in table.rows]
        return sum(found) / len(found)

    def settings(self) -> dict[str, list[dict[str, Any]]]:
        """For ``training.json``."""
        pairs = [asdict(p.source) | {"prompt": p.prompt, "passage_prompt": p.passage_prompt} for p in self.pairs]
        tasks = [{"name": t.name, "sha256": t.source.sha256, "instruction": t.instruction} for t in self.tasks]
        return {"eval_data": pairs, "eval_tasks": tasks}


def read_held_out(options: HealOptions) -> HeldOut | None:
    """Open what a training is scored by; None where nothing was given.

    Raises:
        ConfigError: An option is of no effect without held-out data; or a task cannot be opened.
        DataError: The data cannot be read, or hold texts without labels.
    """
    sources = read_sources(options.eval_data or (), options.instruction, options.columns)
    for key in ("eval_sample", "eval_every", "patience"):
        value = getattr(options, key)
        if value is not None and not sources and not options.eval_tasks:
            raise ConfigError(key, value, "there is nothing to measure on the way", "give eval_data or eval_tasks")
    pairs: list[Pairs] = []
    for source in sources:
        if isinstance(source, Texts):
            raise DataError(source.source.name, "holds texts alone, and what is measured is how pairs are found")
        pairs.append(source.sample(options.eval_sample, options.seed) if options.eval_sample else source)
    tasks = open_tasks(options.eval_tasks, options.eval_sample, options.seed) if options.eval_tasks else []
    return HeldOut(pairs, tasks, options.eval_sample, options.seed) if pairs or tasks else None


class Evaluator(BaseEvaluator):  # type: ignore[misc]
    """A score as the trainer asks for it: of the model as it would be written, at its own length.

    Args:
        score: Of a model.
        length: The model's own, which may be longer than that of the training.
        dtypes: Those of the model's weights before the training (:func:`.prepare`).
    """

    def __init__(self, score: Score, length: int | None, dtypes: Mapping[str, torch.dtype]) -> None:
        super().__init__()
        self.score = score
        self.length = length
        self.dtypes = dtypes

    def __call__(self, model: SentenceTransformer, *_: Any, **__: Any) -> dict[str, float]:
        """The score, under the name that the trainer looks for."""
        trained_length, model.max_seq_length = model.max_seq_length, self.length
        # What the score draws must not change what the training draws.
        with torch.random.fork_rng(), as_written(model, self.dtypes):
            score = float(self.score(model))
        model.max_seq_length = trained_length
        return {"score": score}


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
