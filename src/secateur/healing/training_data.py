"""The data of a training: sets of pairs and of texts, what is left out of them, and what the model is scored by.

| data | without a teacher | with one |
|---|---|---|
| pairs | contrastive loss | contrastive loss and distillation, by ``teacher_weight`` |
| texts | each text is its own positive, under dropout (SimCSE) | distillation |
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import chain, count, islice, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.sampler import NoDuplicatesBatchSampler, ProportionalBatchSampler
from torch.utils.data import ConcatDataset

from secateur.data.rows import TEXT
from secateur.data.sources import Pair, Pairs, Source, Texts, read_sources
from secateur.document import plural
from secateur.errors import ConfigError, DataError
from secateur.evaluation.task_folder import read_task_folder, texts_of
from secateur.healing.recipes import TrainingConfig
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
            rows: Any = tuple(row for row in map(self._without, source.rows) if row)
            if rows != source.rows:
                told = f"{len(source.rows) - len(rows)} of {len(source.rows)} rows"
                told += ", and negatives of others" if set(rows) - set(source.rows) else ""
                notes.append(f"{source.source.name}: not trained on, as their texts judge the model: {told}")
            if rows:
                kept.append(replace(source, rows=rows, source=replace(source.source, rows=len(rows))))
        if not kept:
            raise DataError("data", "every row holds a text of an excluded task", "other data, or exclude less")
        return kept, notes

    def _without(self, row: Pair | str) -> Pair | str | None:
        if isinstance(row, str):
            return None if row in self.texts else row
        if row.anchor in self.texts or row.positive in self.texts:
            return None
        return replace(row, negatives=tuple(text for text in row.negatives if text not in self.texts))


def read_excluded(tasks: Sequence[object]) -> Excluded:
    """The texts of task folders. A document counts without its title, too, which stands before it when encoded."""
    texts: set[str] = set()
    fingerprints = []
    for task in tasks:
        if not isinstance(task, (str, Path)) or not Path(task).exists():
            hint = "name a task folder; the texts of mteb's own tasks are not here to compare with"
            raise ConfigError("exclude", str(task), f"{task} is no folder or file", hint)
        folder = read_task_folder(task)
        texts.update(texts_of(folder))
        corpus = folder.tables.get("corpus", ())
        texts |= {row["text"] for row in corpus}
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

    Returns the sets, and notes on what is left out.

    Raises:
        DataError: Nothing fills a batch, or two files have one name.
    """
    size = config.batch_size
    sets: list[TrainingSet] = []
    notes: list[str] = []
    too_few: list[str] = []
    names: list[str] = []
    for source in sorted(sources, key=lambda source: isinstance(source, Texts)):
        for name, kind, rows in _parts(source, config.has_teacher):
            names.append(name)
            fewest, most = min(map(len, rows)), max(map(len, rows))
            texts = [row[:fewest] for row in rows]
            columns = dict(zip(_columns(fewest), map(list, zip(*texts, strict=True)), strict=True))
            data = Dataset.from_dict(columns)
            noun, _, which = kind.partition(" ")
            about = f"{source.source.name}: {plural(len(rows), noun)} {which}".rstrip()
            # The sampler puts no text into a batch twice.
            sampler = NoDuplicatesBatchSampler(data, size, drop_last=False, generator=torch.Generator(), seed=0)
            if (distinct := len(next(iter(sampler)))) < size:
                about += f", no more than {distinct} of them without a text in common" if len(rows) >= size else ""
                too_few.append(about)
                notes.append(f"{about}: too few for a batch of {size}, not trained on")
                continue
            if most > fewest:
                more = sum(len(row) > fewest for row in rows)
                used = f"{plural(more, 'row')} with up to {most - 2} negatives; used: {fewest - 2} per row"
                notes.append(f"{source.source.name}: {used}, as many as every row has")
            prompts = {key: source.prompt if key in ("anchor", "text") else source.passage_prompt for key in columns}
            prompts = {key: prompt for key, prompt in prompts.items() if prompt}
            sets.append(TrainingSet(name, data, prompts, source.name))
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise DataError(twice, "two data files have this name, and a prompt belongs to a name", "rename one")
    no_pairs = all(item.rows.column_names == ["text"] for item in sets)
    if not sets or (no_pairs and any(isinstance(source, Pairs) for source in sources)):
        problem = f"nothing fills a batch of {size} ({', '.join(too_few)})"
        raise DataError("data", problem, "more rows, whose texts differ, or a smaller batch")
    return sets, notes


def _parts(source: Source, has_teacher: bool) -> list[tuple[str, str, list[tuple[str, ...]]]]:
    """The sets of a file: their names, what one row is, and rows of texts, of which each is its own positive without a
    teacher.
    """
    if isinstance(source, Texts):
        return [(source.name, "text", [(t,) if has_teacher else (t, t) for t in dict.fromkeys(source.rows)])]
    bare, hard = ([row.texts for row in source.rows if bool(row.negatives) == has] for has in (False, True))
    if bare and hard:
        return [(source.name, "row without negatives", bare), (f"{source.name}-hard", "row with negatives", hard)]
    return [(source.name, "row", bare or hard)]


def _columns(count: int) -> list[str]:
    return ["text"] if count == 1 else ["anchor", "positive", *(f"negative_{i}" for i in range(1, count - 1))]


def used_rows(sets: Sequence[TrainingSet], config: TrainingConfig) -> list[list[int]]:
    """The rows of each set that will be in a batch of the training, ascending.

    They come from the samplers that :func:`.training_arguments` names, epoch by epoch as the trainer draws them. The
    sets must be those that are trained on, in their order; a column ``label`` makes no difference.
    """
    generator, seed, left = torch.Generator(), config.seed, config.steps
    samplers = [
        NoDuplicatesBatchSampler(item.rows, config.batch_size, drop_last=True, generator=generator, seed=seed)
        for item in sets
    ]
    together: ConcatDataset[Any] = ConcatDataset([item.rows for item in sets])
    sampler = ProportionalBatchSampler(together, samplers, generator, seed)
    used: set[int] = set()
    with quiet():
        for epoch in count():
            sampler.set_epoch(epoch)
            batches = list(islice(sampler, left))
            used.update(chain.from_iterable(batches))
            left -= len(batches)
            if not batches or not left or len(used) == len(together):
                break
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
    own = {source.name: (source.prompt, source.passage_prompt) for source in sources}
    bare = [name for name, prompts in own.items() if not any(prompts)]
    used = own | dict.fromkeys(bare, (default, default))
    prompts = {name: query for name, (query, _) in used.items() if query}
    asked = [used[source.name] for source in sources if isinstance(source, Pairs) or used[source.name][0]]
    queries, documents = ({pair[i] for pair in asked} for i in (0, 1))
    if len(queries) == len(documents) == 1:
        prompts |= {"query": queries.pop(), "document": documents.pop()}
    if len(bare) < len(sources) or any(isinstance(source, Pairs) for source in sources):
        name = model.default_prompt_name if bare and default else None
        model.prompts = {"query": "", "document": ""} | ({name: default} if name else {}) | prompts
        model.default_prompt_name = name
    return prompts


# What a training is scored by -----------------------------------------------------------------------------------------

COMPARED = 2**24
"""Similarities of anchors and passages that are in memory at once."""


@dataclass(frozen=True)
class HeldOut:
    """Pairs and tasks that score a model; ``sample`` rows of each task count, drawn by ``seed``."""

    pairs: Sequence[Pairs]
    tasks: Sequence[Task]
    sample: int | None
    seed: int

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
    sample, seed = options.eval_sample, options.seed
    pairs: list[Pairs] = []
    columns = {role: name for role, name in (options.columns or {}).items() if role != TEXT}
    for source in read_sources(options.eval_data or (), options.instruction, columns):
        if isinstance(source, Texts):
            raise DataError(source.source.name, "holds texts alone, and what is measured is how pairs are found")
        pairs.append(source.sample(sample, seed) if sample else source)
    tasks: list[Task] = []
    if options.eval_tasks:
        from secateur.evaluation.tasks import open_tasks

        tasks = open_tasks(options.eval_tasks, sample, seed)
    for key in ("eval_sample", "eval_every", "patience"):
        if not pairs and not tasks and (value := getattr(options, key)) is not None:
            raise ConfigError(key, value, "there is nothing to measure on the way", "give eval_data or eval_tasks")
    return HeldOut(pairs, tasks, sample, seed)


def held_out_ndcg(model: SentenceTransformer, pairs: Pairs) -> float:
    """nDCG@10 of finding each anchor's positive among all positives and negatives of a file, 0 to 1.

    Equal passages are one document, and an anchor's other positives are left out of its ranking.
    """
    texts = [*pairs.positives, *pairs.negatives]
    encode = partial(model.encode, convert_to_tensor=True, show_progress_bar=False)
    anchors = encode(list(pairs.anchors), prompt=pairs.prompt or None)
    passages = encode(texts, prompt=pairs.passage_prompt or None)
    numbers = text_numbers(pairs.anchors, pairs.positives, pairs.negatives)
    total = 0.0
    for own in torch.split(torch.arange(len(pairs.rows)), max(1, COMPARED // len(texts))):
        rows = slice(int(own[0]), int(own[-1]) + 1)
        masked = false_negative_mask(*numbers, rows=rows, once=True).to(passages.device)
        found = cosines(anchors[rows], passages).masked_fill(masked, -torch.inf)
        total += float(retrieval(found, own.to(found.device)).ndcg_at_10) * len(own)
    return total / len(pairs.rows)
