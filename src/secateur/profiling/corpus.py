"""The batches that a profile reads: data checked, with their prompts, each distinct text once."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from sentence_transformers import SentenceTransformer

from secateur.data.sources import Pair, Pairs, Source, Texts, batches, l3prune_prompt
from secateur.errors import ConfigError, DataError
from secateur.models.forward import pooling_name


def check_sources(sources: Sequence[Source], max_examples: int) -> None:
    """Refuse data from which nothing can be learned.

    Raises:
        ConfigError, DataError: No file, one twice, fewer than two different rows, or no negative for any anchor.
    """
    if not sources:
        raise ConfigError("data", sources, "no data file given")
    contents = [source.source.sha256 for source in sources]
    for source in sources:
        name, pairs = source.source.name, isinstance(source, Pairs)
        if contents.count(source.source.sha256) > 1:
            raise DataError(name, "is there twice: its batches would count twice", "name it once")
        if len({(row.anchor, row.positive) if isinstance(row, Pair) else row for row in source.rows}) < 2:
            drawn_all = len(source.rows) < max(2, max_examples // len(sources))
            hint = "a loss needs something to tell apart" if drawn_all else "raise --max-examples"
            raise DataError(name, f"fewer than two different {'pairs' if pairs else 'texts'} were drawn from it", hint)
        if isinstance(source, Pairs):
            relevant: dict[str, set[str]] = {}
            for row in source.rows:
                relevant.setdefault(row.anchor, {row.anchor}).add(row.positive)
            passages = {*source.positives, *source.negatives}
            if all(passages <= own for own in relevant.values()):
                problem = "every passage is a positive of every anchor"
                raise DataError(name, problem, "a loss needs something to tell apart")


def with_prompts(source: Source, model: SentenceTransformer, default: bool) -> Source:
    """Data with the prompts that are used: the model's default prompt, if ``default``, where the data have none.

    With the paper's pooling, prompts get the paper's form.
    """
    prompt, passage_prompt = source.prompt, source.passage_prompt
    if default and not prompt and not passage_prompt:
        prompt = passage_prompt = model.prompts.get(model.default_prompt_name or "") or ""
    if pooling_name(model) == "l3prune":
        prompt, passage_prompt = l3prune_prompt(prompt), l3prune_prompt(passage_prompt)
    return replace(source, prompt=prompt, passage_prompt=passage_prompt)


@dataclass(frozen=True)
class Batch:
    """Indices of distinct texts; a batch of texts alone has anchors only."""

    anchors: tuple[int, ...]
    positives: tuple[int, ...] = ()
    negatives: tuple[int, ...] = ()

    @property
    def texts(self) -> set[int]:
        return {*self.anchors, *self.positives, *self.negatives}


@dataclass(frozen=True)
class Corpus:
    """The distinct texts, each as (prompt, text), and the batches in the order in which they are visited."""

    texts: tuple[tuple[str, str], ...]
    batches: tuple[Batch, ...]


def make_corpus(sources: Sequence[Source], size: int, seed: int) -> Corpus:
    places: dict[tuple[str, str], int] = {}

    def indices(prompt: str, texts: Iterable[str]) -> tuple[int, ...]:
        return tuple(places.setdefault((prompt, text), len(places)) for text in texts)

    found = []
    for source in sources:
        if isinstance(source, Texts):
            starts = range(0, len(source.rows), size)
            found += [Batch(indices(source.prompt, source.rows[start : start + size])) for start in starts]
            continue
        for batch in batches(source, size):
            others = (indices(batch.passage_prompt, texts) for texts in (batch.positives, batch.negatives))
            found.append(Batch(indices(batch.prompt, batch.anchors), *others))
    # In a drawn order the first batches stand for all of them, whatever the order of the files.
    random.Random(seed).shuffle(found)  # noqa: S311 - not for secrets
    return Corpus(tuple(places), tuple(found))
