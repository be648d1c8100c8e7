"""Training sets from files of pairs and of unlabelled texts, their prompts, and the rows that a training will read.

| data | without a teacher | with one |
|---|---|---|
| pairs | contrastive loss | contrastive loss and distillation, by ``teacher_weight`` |
| texts | each text is its own positive, under dropout (SimCSE) | distillation |
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.sampler import NoDuplicatesBatchSampler, ProportionalBatchSampler
from torch.utils.data import ConcatDataset

from secateur.data.sources import Pair, Pairs, Source, Texts
from secateur.errors import ConfigError, DataError
from secateur.healing.recipes import TrainingConfig, training_arguments
from secateur.progress import quiet


@dataclass(frozen=True, eq=False)
class TrainingSet:
    """Rows of one data file that have the same number of negatives, and the prompt of each column.

    ``source`` is the name of the data they are from.
    """

    name: str
    rows: Dataset
    prompts: Mapping[str, str]
    source: str = ""


def training_sets(sources: Sequence[Source], config: TrainingConfig) -> tuple[list[TrainingSet], list[str]]:
    """Data as the trainer wants them: columns ``anchor``, ``positive``, ``negative_1``, …; or ``text`` for a teacher.

    A file whose rows have a negative here and there becomes two sets; rows with more negatives than the others are
    cut to the fewest. A set that does not fill a batch is left out.

    Returns:
        The sets, and notes on what is left out and on texts that are positive and negative of one query.

    Raises:
        DataError: Nothing fills a batch, or two files have one name.
    """
    sets: list[TrainingSet] = []
    notes: list[str] = []
    too_few: list[str] = []
    names: Counter[str] = Counter()
    size = config.batch_size
    for source in sorted(sources, key=lambda source: isinstance(source, Texts)):
        if config.has_teacher and isinstance(source, Texts):
            names[source.name] += 1
            sets.append(_text_set(source, size))
            continue
        pairs = _as_pairs(source)
        notes += _contradictions(pairs)
        for name, kind, rows in _split(pairs):
            names[name] += 1
            fewest = min(len(row.negatives) for row in rows)
            texts = [(row.anchor, row.positive, *row.negatives[:fewest]) for row in rows]
            fits = distinct_rows(texts, size)
            about = f"{pairs.source.name}: {len(rows)} rows{kind}"
            more = [len(row.negatives) for row in rows if len(row.negatives) > fewest]
            if fits < size:
                about += f", no more than {fits} of them without a text in common" if len(rows) >= size else ""
                too_few.append(about)
                notes.append(f"{about}: too few for a batch of {size}, not trained on")
                continue
            if more:
                used = f"{len(more)} rows have up to {max(more)} negatives, of which {fewest} are used"
                notes.append(f"{pairs.source.name}: {used}, as many as every row has")
            columns = ["anchor", "positive", *(f"negative_{i + 1}" for i in range(fewest))]
            data = Dataset.from_dict(dict(zip(columns, map(list, zip(*texts, strict=True)), strict=True)))
            prompts = {column: pairs.prompt if column == "anchor" else pairs.passage_prompt for column in columns}
            sets.append(TrainingSet(name, data, {column: p for column, p in prompts.items() if p}, pairs.name))
    for name, count in names.items():
        if count > 1:
            raise DataError(name, "two data files have this name, and a prompt belongs to a name", "rename one")
    if not sets or (too_few and all(item.rows.column_names == ["text"] for item in sets)):
        problem = f"nothing fills a batch of {size} ({', '.join(too_few)})"
        raise DataError("data", problem, "more rows, whose texts differ, or a smaller batch")
    return sets, notes


def _text_set(texts: Texts, batch_size: int) -> TrainingSet:
    rows = list(dict.fromkeys(texts.rows))
    if len(rows) < batch_size:
        problem = f"{len(rows)} texts do not fill a batch of {batch_size}"
        raise DataError(texts.name, problem, "more texts, or a smaller batch")
    return TrainingSet(
        texts.name, Dataset.from_dict({"text": rows}), {"text": texts.prompt} if texts.prompt else {}, texts.name
    )


def _as_pairs(source: Source) -> Pairs:
    """Texts as pairs of themselves."""
    if isinstance(source, Pairs):
        return source
    rows = tuple(Pair(text, text) for text in dict.fromkeys(source.rows))
    return Pairs(source.name, rows, source.prompt, source.prompt, source.source)


def _split(pairs: Pairs) -> list[tuple[str, str, Sequence[Pair]]]:
    """Rows without and with negatives, each with a name and what kind they are."""
    bare = [row for row in pairs.rows if not row.negatives]
    hard = [row for row in pairs.rows if row.negatives]
    if not bare or not hard:
        return [(pairs.name, "", pairs.rows)]
    return [(pairs.name, " without negatives", bare), (f"{pairs.name}-hard", " with negatives", hard)]


def _contradictions(pairs: Pairs) -> list[str]:
    """Says which rows have a negative that is a positive of the same query; the loss masks it within a batch only."""
    positives: dict[str, set[str]] = {}
    for row in pairs.rows:
        positives.setdefault(row.anchor, set()).add(row.positive)
    both = [i for i, row in enumerate(pairs.rows, 1) if not positives[row.anchor].isdisjoint(row.negatives)]
    rows = f"row {both[0]}" + (" and others" if len(both) > 1 else "") if both else ""
    problem = f"{len(both)} rows have a negative that is a positive of the same query: {rows}"
    return [f"{pairs.source.name}: {problem}"] if both else []


def distinct_rows(rows: Sequence[Sequence[str]], most: int) -> int:
    """How many rows, up to ``most``, share no text: the sampler puts no others into one batch.

    The sampler takes them as they come, in a random order. Here they are counted in the order of the file and, where
    that does not give enough, with the rarest texts first.
    """

    def count(rows: Iterable[Sequence[str]]) -> int:
        texts: set[str] = set()
        found = 0
        for row in rows:
            if found < most and texts.isdisjoint(row):
                texts.update(row)
                found += 1
        return found

    found = count(rows)
    if found == min(most, len(rows)):
        return found
    frequency = Counter(text for row in rows for text in set(row))
    return max(found, count(sorted(rows, key=lambda row: max(frequency[text] for text in row))))


def used_rows(sets: Sequence[TrainingSet], config: TrainingConfig) -> list[list[int]]:
    """The rows of each set that will be in a batch of the training, ascending.

    They come from the samplers that :func:`.training_arguments` names, with its seed, epoch by epoch as the trainer
    draws them. The sets must be those that are trained on, in their order; a column ``label`` makes no difference.
    """
    arguments = training_arguments(config, Path("checkpoints"))
    generator = torch.Generator()
    samplers = [
        NoDuplicatesBatchSampler(
            item.rows, arguments.train_batch_size, drop_last=True, generator=generator, seed=arguments.seed
        )
        for item in sets
    ]
    together: ConcatDataset[Any] = ConcatDataset([item.rows for item in sets])
    sampler = ProportionalBatchSampler(together, samplers, generator, arguments.seed)
    used: set[int] = set()
    left, epoch, drawn = arguments.max_steps, 0, True
    with quiet():
        while drawn and left and len(used) < len(together):
            sampler.set_epoch(epoch)
            drawn = False
            for batch in islice(sampler, left):
                used.update(batch)
                left, drawn = left - 1, True
            epoch += 1
    starts = [0, *together.cumulative_sizes]
    return [sorted(row - start for row in used if start <= row < end) for start, end in pairwise(starts)]


def default_prompt(model: SentenceTransformer) -> str:
    """What a model puts before texts that come without a prompt."""
    return str(model.prompts.get(model.default_prompt_name or "") or "")


def with_default_prompt(sets: Sequence[TrainingSet], prompt: str) -> list[TrainingSet]:
    """Sets with ``prompt`` before all columns where the data bring no prompt."""
    if not prompt:
        return list(sets)
    return [replace(s, prompts=s.prompts or dict.fromkeys(s.rows.column_names, prompt)) for s in sets]


def check_room(model: SentenceTransformer, sets: Sequence[TrainingSet], max_length: int) -> None:
    """Refuse a length that leaves no token for a text after its prompt and the special tokens.

    A tokenizer that is asked for fewer tokens than its special ones cuts nothing at all.

    Raises:
        ConfigError: It leaves none.
    """
    prompts = {"", *(prompt for item in sets for prompt in item.prompts.values())}
    least, prompt = max((len(model.tokenizer(f"{prompt}a")["input_ids"]), prompt) for prompt in prompts)
    length = min(max_length, model.max_seq_length or max_length)
    if length < least:
        before = f'the prompt "{prompt:.60}"' if prompt else "the special tokens"
        raise ConfigError("max_length", length, f"is {length}: {before} would fill all of it", f"{least} or more")


def set_prompts(model: SentenceTransformer, sources: Sequence[Source], default: str) -> dict[str, str]:
    """Give a model the prompts that it is trained with, in place of those it has, so that training and use agree.

    The default prompt stays where it is trained with. Texts without an instruction leave all prompts as they are.

    Args:
        model: The model.
        sources: The data that it is trained on.
        default: What goes before data without an instruction.

    Returns:
        The prompts from the data: by data set and, where all data agree, as ``query`` and ``document``.
    """
    prompts: dict[str, str] = {}
    queries, documents, without = set(), set(), []
    for source in sources:
        query = source.prompt
        document = source.passage_prompt if isinstance(source, Pairs) else source.prompt
        if not query and not document:
            without.append(source)
            query = document = default
        if query:
            prompts[source.name] = query
        if isinstance(source, Pairs) or query:
            queries.add(query)
            documents.add(document)
    if len(queries) == len(documents) == 1:
        prompts |= {"query": queries.pop(), "document": documents.pop()}
    if len(without) < len(sources) or any(isinstance(source, Pairs) for source in sources):
        name = model.default_prompt_name if without and default else None
        model.prompts = {"query": "", "document": ""} | ({name: default} if name else {}) | prompts
        model.default_prompt_name = name
    return prompts
