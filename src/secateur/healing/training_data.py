"""The data of a training: sets of pairs and of texts, what is left out of them, and what the model is scored by.

| data | without a teacher | with one |
|---|---|---|
| pairs | contrastive loss | contrastive loss and distillation, by ``teacher_weight`` |
| texts | each text is its own positive, under dropout (SimCSE) | distillation |
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.sampler import NoDuplicatesBatchSampler, ProportionalBatchSampler
from torch.utils.data import ConcatDataset

from secateur.data.sources import Pair, Pairs, Source, Texts, read_sources
from secateur.errors import ConfigError, DataError
from secateur.evaluation.task_folder import read_task_folder, texts_of
from secateur.healing.recipes import TrainingConfig, training_arguments
from secateur.measures.metrics import cosines, false_negative_mask, retrieval, text_numbers
from secateur.options import HealOptions
from secateur.progress import quiet
from secateur.provenance import Fingerprint

if TYPE_CHECKING:  # with mteb, which takes a while to import; so they are imported where there are tasks
    from secateur.evaluation.tasks import Task


@dataclass(frozen=True)
class Excluded:
    """Texts of task folders that will judge the model, and so are not trained on; and the folders' fingerprints."""

    texts: frozenset[str] = frozenset()
    tasks: tuple[Fingerprint, ...] = ()

    def leave_out(self, sources: Sequence[Source]) -> tuple[list[Source], list[str]]:
        """Data without rows that hold one of the texts as anchor, positive or text (of negatives, these alone go), and
        a note for each that had more; DataError if no row is left at all.
        """
        if not self.texts:
            return list(sources), []
        kept: list[Source] = []
        notes: list[str] = []
        for source in sources:
            rows: Any
            negatives = 0
            if isinstance(source, Pairs):
                clean = [row for row in source.rows if self.texts.isdisjoint((row.anchor, row.positive))]
                rows = [replace(r, negatives=tuple(t for t in r.negatives if t not in self.texts)) for r in clean]
                negatives = sum(len(r.negatives) for r in clean) - sum(len(r.negatives) for r in rows)
            else:
                rows = [text for text in source.rows if text not in self.texts]
            parts = [(len(source.rows) - len(rows), f"of {len(source.rows)} rows"), (negatives, "other negatives")]
            if told := ", ".join(f"{count} {what}" for count, what in parts if count):
                notes.append(f"{source.source.name}: not trained on, as texts of excluded tasks: {told}")
            if rows:
                left: Any = tuple(rows)
                kept.append(replace(source, rows=left, source=replace(source.source, rows=len(rows))))
        if not kept:
            raise DataError("data", "every row holds a text of an excluded task", "other data, or exclude less")
        return kept, notes


def read_excluded(tasks: Sequence[object]) -> Excluded:
    """The texts of task folders. A document counts with its title before it, too, as it is encoded."""
    texts: set[str] = set()
    fingerprints = []
    for task in tasks:
        if not isinstance(task, (str, Path)) or not Path(task).exists():
            hint = "name a task folder; the texts of mteb's own tasks are not here to compare with"
            raise ConfigError("exclude", str(task), f"{task} is no folder or file", hint)
        folder = read_task_folder(task)
        texts.update(texts_of(folder))
        corpus = folder.tables.get("corpus", ())
        texts |= {f"{row['title']} {row['text']}".strip() for row in corpus if row["title"]}
        fingerprints.append(folder.source)
    return Excluded(frozenset(texts), tuple(fingerprints))


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

    Returns the sets, and notes on what is left out and on texts that are positive and negative of one query.

    Raises:
        DataError: Nothing fills a batch, or two files have one name.
    """
    sets: list[TrainingSet] = []
    notes: list[str] = []
    too_few: list[str] = []
    names: Counter[str] = Counter()
    size = config.batch_size
    for source in sorted(sources, key=lambda source: isinstance(source, Texts)):
        if isinstance(source, Texts) and config.has_teacher:
            names[source.name] += 1
            sets.append(_texts_set(source, size))
            continue
        pairs = _pairs(source)
        notes += _contradictions(source.source.name, pairs)
        bare = [row for row in pairs if not row.negatives]
        hard = [row for row in pairs if row.negatives]
        parts = [(source.name, " without negatives", bare), (f"{source.name}-hard", " with negatives", hard)]
        for name, kind, rows in parts if bare and hard else [(source.name, "", pairs)]:
            names[name] += 1
            counts = [len(row.negatives) for row in rows]
            fewest, most = min(counts), max(counts)
            texts = [row.texts[: 2 + fewest] for row in rows]
            fits = distinct_rows(texts, size)
            about = f"{source.source.name}: {len(rows)} rows{kind}"
            if fits < size:
                about += f", no more than {fits} of them without a text in common" if len(rows) >= size else ""
                too_few.append(about)
                notes.append(f"{about}: too few for a batch of {size}, not trained on")
                continue
            if most > fewest:
                used = (
                    f"{len(rows) - counts.count(fewest)} rows have up to {most} negatives, of which {fewest} are used"
                )
                notes.append(f"{source.source.name}: {used}, as many as every row has")
            columns = ["anchor", "positive", *(f"negative_{i + 1}" for i in range(fewest))]
            data = Dataset.from_dict(dict(zip(columns, map(list, zip(*texts, strict=True)), strict=True)))
            prompts = {column: source.prompt if column == "anchor" else source.passage_prompt for column in columns}
            sets.append(TrainingSet(name, data, {column: p for column, p in prompts.items() if p}, source.name))
    if twice := next((name for name, count in names.items() if count > 1), None):
        raise DataError(twice, "two data files have this name, and a prompt belongs to a name", "rename one")
    if not sets or (too_few and all(item.rows.column_names == ["text"] for item in sets)):
        problem = f"nothing fills a batch of {size} ({', '.join(too_few)})"
        raise DataError("data", problem, "more rows, whose texts differ, or a smaller batch")
    return sets, notes


def _texts_set(source: Texts, size: int) -> TrainingSet:
    """Texts for a teacher."""
    distinct = list(dict.fromkeys(source.rows))
    if len(distinct) < size:
        problem = f"{len(distinct)} texts do not fill a batch of {size}"
        raise DataError(source.name, problem, "more texts, or a smaller batch")
    prompts = {"text": source.prompt} if source.prompt else {}
    return TrainingSet(source.name, Dataset.from_dict({"text": distinct}), prompts, source.name)


def _pairs(source: Source) -> list[Pair]:
    """The pairs of a source; without a teacher, a text is its own positive."""
    if isinstance(source, Texts):
        return [Pair(text, text) for text in dict.fromkeys(source.rows)]
    return list(source.rows)


def _contradictions(name: str, rows: Sequence[Pair]) -> list[str]:
    """Says which rows have a negative that is a positive of the same query; the loss masks it within a batch only."""
    positives: dict[str, set[str]] = {}
    for row in rows:
        positives.setdefault(row.anchor, set()).add(row.positive)
    both = [i for i, row in enumerate(rows, 1) if not positives[row.anchor].isdisjoint(row.negatives)]
    if not both:
        return []
    problem = f"{len(both)} rows have a negative that is a positive of the same query: row {both[0]}"
    return [f"{name}: {problem}" + (" and others" if len(both) > 1 else "")]


def distinct_rows(rows: Sequence[Sequence[str]], most: int) -> int:
    """How many rows, up to ``most``, share no text, those with the rarest texts first.

    The sampler puts no others into one batch; it takes them as they come, in a random order.
    """
    frequency = Counter(text for row in rows for text in set(row))
    texts: set[str] = set()
    found = 0
    for row in sorted(rows, key=lambda row: max(frequency[text] for text in row)):
        if found < most and texts.isdisjoint(row):
            texts.update(row)
            found += 1
    return found


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


def check_room(model: SentenceTransformer, sets: Sequence[TrainingSet], max_length: int) -> None:
    """Refuse (:class:`.ConfigError`) a length that leaves no token for a text after its prompt and the special tokens.

    A tokenizer that is asked for fewer tokens than its special ones cuts nothing at all.
    """
    prompts = {"", *(prompt for item in sets for prompt in item.prompts.values())}
    least, prompt = max((len(model.tokenizer(f"{prompt}a")["input_ids"]), prompt) for prompt in prompts)
    length = min(max_length, model.max_seq_length or max_length)
    if length < least:
        before = f'the prompt "{prompt:.60}"' if prompt else "the special tokens"
        raise ConfigError("max_length", length, f"is {length}: {before} would fill all of it", f"{least} or more")


def set_prompts(model: SentenceTransformer, sources: Sequence[Source], default: str) -> dict[str, str]:
    """Give a model the prompts that it is trained with, in place of those it has, so that training and use agree.

    The default prompt, ``default``, stays where it is trained with. Texts without an instruction leave all prompts as
    they are. Returned are those from the data: by data set and, where all data agree, as ``query`` and ``document``.
    """
    prompts: dict[str, str] = {}
    queries, documents, without = set(), set(), []
    for source in sources:
        query, document = source.prompt, source.passage_prompt
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


# What a training is scored by -----------------------------------------------------------------------------------------

COMPARED = 2**24
"""Similarities of anchors and passages that are in memory at once."""


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
            from secateur.evaluation.evaluate import evaluate

            table = evaluate([model], self.tasks, sample=self.sample, seed=self.seed, names=["model"])
            found += [row.score for row in table.rows]
        return sum(found) / len(found)

    def settings(self) -> dict[str, list[dict[str, Any]]]:
        """For ``training.json``."""
        pairs = [asdict(p.source) | {"prompt": p.prompt, "passage_prompt": p.passage_prompt} for p in self.pairs]
        tasks = [{"name": t.name, "sha256": t.source.sha256, "instruction": t.instruction} for t in self.tasks]
        return {"eval_data": pairs, "eval_tasks": tasks}


def read_held_out(options: HealOptions) -> HeldOut:
    """Open what a training is scored by, which may be nothing."""
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
    tasks: list[Task] = []
    if options.eval_tasks:
        from secateur.evaluation.tasks import open_tasks

        tasks = open_tasks(options.eval_tasks, options.eval_sample, options.seed)
    return HeldOut(pairs, tasks, options.eval_sample, options.seed)


def held_out_ndcg(model: SentenceTransformer, pairs: Pairs) -> float:
    """nDCG@10 of finding each anchor's positive among all positives and negatives of a file, 0 to 1.

    Equal passages are one document, and an anchor's other positives are left out of its ranking.
    """
    texts = [*pairs.positives, *pairs.negatives]
    encode = partial(model.encode, convert_to_tensor=True, show_progress_bar=False)
    anchors = encode(list(pairs.anchors), prompt=pairs.prompt or None)
    passages = encode(texts, prompt=pairs.passage_prompt or None)
    numbers = text_numbers(pairs.anchors, texts)
    count, total = len(pairs.rows), 0.0
    step = max(1, COMPARED // len(texts))
    for rows in (slice(start, min(start + step, count)) for start in range(0, count, step)):
        masked = false_negative_mask(numbers[0], numbers[1][:count], numbers[1][count:], rows=rows, once=True)
        found = cosines(anchors[rows], passages).masked_fill(masked.to(passages.device), -torch.inf)
        own = torch.arange(count, device=found.device)[rows]
        total += float(retrieval(found, own).ndcg_at_10) * len(own)
    return total / count
