"""Models × tasks → scores, computed by mteb and saved one by one, so that a killed evaluation resumes.

The prompts follow from the model. One that was trained with instructions (its saved prompts end with ``;``, as
:func:`.instruction_prompt` writes them) gets the instruction of each task in the same form: on queries only in
retrieval and reranking, on every text elsewhere. One that came with other prompts (E5's ``"query: "``) keeps them.

Each score has a 95 % bootstrap interval (:mod:`.intervals`), resampled alike for all models on the same data, so that
differences have paired intervals too. The folder of results:

    OUT/scores.json                  the table
    OUT/draws/<name>.npy             the bootstrap replicates of a score, named in the table's rows
    OUT/cache/                       the vectors of endpoints, where no other folder is named for them
    OUT/mteb/results/<model>/...     the same results in mteb's own format, for ``mteb.ResultCache(OUT/mteb)``
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import tempfile
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import mteb
import numpy as np
import torch
from datasets import Dataset
from mteb.cache import ResultCache
from mteb.models.abs_encoder import get_prompt_name
from mteb.models.sentence_transformer_wrapper import SentenceTransformerEncoderWrapper
from mteb.types import PromptType
from sentence_transformers import SentenceTransformer
from torch.utils.data import DataLoader

from secateur.data.embedders import identify, open_embedder
from secateur.data.sources import instruction_prompt
from secateur.data.vectors import VectorCache, npy_bytes
from secateur.errors import ConfigError, DataError, ModelError, SecateurError
from secateur.evaluation.replicates import replicates_file, resampled_scores
from secateur.evaluation.tasks import Task, count_samples, open_tasks
from secateur.files import lock, make_folder, output_errors, read_json, write_bytes
from secateur.measures import intervals
from secateur.measures.intervals import Array
from secateur.models import is_endpoint, model_names, model_source, opened_from
from secateur.options import CompareOptions, EvaluateOptions, step
from secateur.progress import Progress, quiet, silent
from secateur.provenance import Fingerprint, command_line, now, provenance, versions_of
from secateur.results import ScoreRow, Scores, load

SAME_SCORE = 1e-4  # mteb rounds some scores to 5 digits
NO_INTERVAL = "no interval: "

Model: TypeAlias = str | Path | SentenceTransformer


@contextmanager
def _random_states_restored() -> Iterator[None]:
    """Restore the random states of Python, NumPy and torch, all of which mteb seeds."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002


@step(EvaluateOptions)
@_random_states_restored()
def evaluate(options: EvaluateOptions, *, progress: Progress = silent) -> Scores:
    """Score models on tasks, with mteb's own evaluators: each task's main metric, on mteb's protocol (:mod:`.tasks`).

    All task folders are checked before any text is encoded; one model at a time is in memory. A score that ``out`` has
    is computed again only if the model, the task, ``sample``, ``seed``, a prompt or a library's version changed; other
    rows stay in the file. A task that fails does not keep others from being scored; the errors come at the end, as one.

    Raises:
        DataError: A task is not right, or cannot be downloaded.
        ModelError: A model cannot be opened, or its vectors are not numbers or all alike.
        ConfigError: Two models or tasks have one name, or ``out`` has scores of another model by the same name.
        OutputError: ``out`` cannot be written.
    """
    labels = model_names(options.models, options.names)
    tasks = open_tasks(options.tasks, options.sample, options.seed)
    table = _ScoreTable(options.out, tasks, options.seed)
    total = len(labels) * len(tasks)
    failures: list[SecateurError] = []

    def score_model(number: int, label: str, given: Model) -> None:
        """All tasks of one model, which leaves the memory when this returns, before the next one is opened."""
        model = given if isinstance(given, SentenceTransformer) else open_embedder(given)
        source = model_source(opened_from(given) if isinstance(given, SentenceTransformer) else given)
        weights, cache = identify(model, vectors_folder(options, given))
        if options.names is None:
            table.check_same_model(label, source, weights)
        for done, task in enumerate(tasks, start=number * len(tasks)):
            progress("evaluate", done, total)
            with quiet(), as_encoder(model, label, task_prompts(task, model), cache) as encoder:
                key = {"weights": weights, "sample": options.sample, "seed": options.seed, **_inputs(encoder, task)}
                if table.holds(label, task, key):
                    continue
                try:
                    table.add(score_task(encoder, label, task, options.batch_size, key), source)
                except (DataError, ModelError) as error:
                    if options.out is None:
                        raise
                    failures.append(error.with_traceback(None))  # which would keep the model in memory

    for number, (label, given) in enumerate(zip(labels, options.models, strict=True)):
        score_model(number, label, given)
    progress("evaluate", total, total)
    if failures:
        failures[0].args = ("; ".join(dict.fromkeys(map(str, failures))),)  # the first one's kind tells of all
        raise failures[0]
    return table.scores([(label, task.name) for label in labels for task in tasks])


def vectors_folder(options: EvaluateOptions | CompareOptions, model: Model) -> Path | None:
    """Where a model's vectors are kept; those of an endpoint always, if there is a place: they cost money."""
    return options.cache or (options.out / "cache" if options.out is not None and is_endpoint(model) else None)


class _ScoreTable:
    """The scores so far, in memory and in ``out/scores.json``: those asked for now, and others that it held already."""

    def __init__(self, out: Path | None, tasks: Sequence[Task], seed: int) -> None:
        self.out, self.seed = out, seed
        if out is not None:
            make_folder(out)
        self.rows, self.data = self._read()
        self.data |= {task.name: task.source for task in tasks}

    def _read(self) -> tuple[dict[tuple[str, str], ScoreRow], dict[str, Fingerprint]]:
        """The rows of the file by model and task, and what they were computed on by task."""
        if self.out is None or not (self.out / Scores.file).exists():
            return {}, {}
        table = load(self.out, Scores)
        return {(row.model, row.task): row for row in table.rows}, {item.name: item for item in table.provenance.data}

    def holds(self, model: str, task: Task, key: Mapping[str, Any]) -> bool:
        """Whether a score is there already, with the task's note."""
        row = self.rows.get((model, task.name))
        if row is None or any(getattr(row, name) != value for name, value in key.items()):
            return False
        if row.note.partition(NO_INTERVAL)[0].removesuffix("; ") != task.note:
            return False
        return self.out is None or not row.draws or replicates_file(self.out, row.draws).is_file()

    def check_same_model(self, model: str, source: str, weights: str) -> None:
        """Refuse a model that would replace the scores of another one, from another place."""
        for row in self.rows.values():
            if row.model == model and row.source and source and row.source != source and row.weights != weights:
                problem = f"{self.out} has scores of another model called {model}, {row.source}"
                raise ConfigError("names", model, problem, "give this one another name: --names NAME")

    def add(self, scored: Scored, source: str) -> None:
        """Keep a score; on disk the row comes last, so that what it names is there.

        Raises:
            ModelError: It is not a number.
        """
        row = replace(scored.row, source=source)
        if not math.isfinite(row.score):
            raise ModelError(row.model, f"{row.metric} on {row.task} is not a number", "are its vectors all alike?")
        self.rows[row.model, row.task] = row
        if self.out is None:
            return
        with lock(self.out, wait=True):
            if scored.replicates is not None:
                write_bytes(replicates_file(self.out, row.draws), npy_bytes(scored.replicates))
            with output_errors(self.out / "mteb"):
                ResultCache(self.out / "mteb").save_to_cache(scored.result, scored.meta)
            rows, data = self._read()  # with those that another run may have added
            self._table({**self.rows, **rows, (row.model, row.task): row}.values(), data | self.data).save(self.out)

    def scores(self, wanted: Sequence[tuple[str, str]]) -> Scores:
        """The scores of some models and tasks."""
        return self._table([self.rows[pair] for pair in wanted], self.data)

    def _table(self, rows: Collection[ScoreRow], data: Mapping[str, Fingerprint]) -> Scores:
        used = {row.task for row in rows}
        return Scores(provenance([item for name, item in data.items() if name in used], self.seed), tuple(rows))


# Prompts --------------------------------------------------------------------------------------------------------------


def is_instructed(model: SentenceTransformer) -> bool:
    """Whether a saved prompt has the form in which this package trains with instructions, today's or an earlier one."""
    return any(prompt and prompt.rstrip().endswith(";") for prompt in model.prompts.values())


def task_prompts(task: Task, model: SentenceTransformer) -> dict[str, str] | None:
    """Prompts by mteb's keys (task type, with ``-query`` where only queries get one); None: those of the model."""
    if not is_instructed(model):
        return None
    key = f"{task.metadata.type}-{PromptType.query.value}" if task.asymmetric else str(task.metadata.type)
    return {key: instruction_prompt(task.instruction)} if task.instruction else {}


def _inputs(encoder: Encoder, task: Task) -> dict[str, Any]:
    """What a score follows from besides the model and the sample, by the names of its row.

    The prompts, of texts of no kind, queries and documents, are mteb's choice, else that of the model's
    ``encode_query`` and ``encode_document``.
    """
    found = []
    own = {PromptType.query: ("query",), PromptType.document: ("document", "passage", "corpus")}
    for kind in (None, PromptType.query, PromptType.document):
        prompts, model = encoder.model_prompts or {}, encoder.model
        name = get_prompt_name(prompts, task.metadata, kind)
        if not name:
            prompts = model.prompts
            name = next((name for name in own.get(kind, ()) if name in prompts), model.default_prompt_name)
        found.append(str(prompts.get(name) or ""))
    prompt = found[1] if task.asymmetric else found[0]
    return {"data": task.source.sha256, "versions": versions_of(), "prompt": prompt, "prompts": tuple(found)}


class Encoder(SentenceTransformerEncoderWrapper):  # type: ignore[misc]
    """mteb's own encoder, with kept vectors, that refuses vectors which are not numbers: mteb would score them."""

    vectors: VectorCache | None = None

    def encode(self, inputs: Any, **kwargs: Any) -> Any:
        if self.vectors is None:
            return self._encode(inputs, kwargs)
        texts = [text for batch in inputs for text in batch["text"]]
        prompts = self.model_prompts or {}
        name = get_prompt_name(prompts, kwargs["task_metadata"], kwargs.get("prompt_type"))
        # Without a prompt of the task, the model chooses one of its own by the kind of text.
        before = [prompts.get(name), kwargs.get("prompt_type"), self.model.prompts, self.model.default_prompt_name]

        def encode(missing: list[str]) -> Any:
            batches = DataLoader(Dataset.from_dict({"text": missing}), batch_size=kwargs.get("batch_size", 32))
            return self._encode(batches, kwargs)

        return self.vectors.encode(texts, json.dumps(before, sort_keys=True), encode)

    def _encode(self, inputs: Any, kwargs: dict[str, Any]) -> Any:
        vectors = super().encode(inputs, **kwargs)
        if not np.isfinite(np.asarray(vectors)).all():
            name = str(self.mteb_model_meta.name).removeprefix("secateur/")
            raise ModelError(name, f"gives vectors with NaN or infinity on {kwargs['task_metadata'].name}")
        return vectors


@contextmanager
def as_encoder(
    model: SentenceTransformer, label: str, prompts: dict[str, str] | None, vectors: VectorCache | None
) -> Iterator[Encoder]:
    """The model as mteb's encoder, under its own name and with these prompts; itself unchanged afterwards."""
    card = model.model_card_data
    before = model.prompts, model.default_prompt_name, card.model_name
    try:
        card.model_name = f"secateur/{label}"  # mteb wants organization/name, and takes it from the card
        if prompts is not None:  # else sentence-transformers falls back on the model's own
            model.prompts, model.default_prompt_name = {}, None
        encoder = Encoder(model, model_prompts=prompts or None)
        encoder.vectors = vectors
        yield encoder
    finally:
        model.prompts, model.default_prompt_name, card.model_name = before


# Scores ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scored:
    """One score as it is kept: our row and its replicates, and mteb's result and description of the model."""

    row: ScoreRow
    replicates: Array | None
    result: Any
    meta: Any


def score_task(encoder: Encoder, label: str, task: Task, batch_size: int, key: Mapping[str, Any]) -> Scored:
    """Let mteb run one task; the score is NaN where mteb's is, as that of vectors which are all alike.

    ``key`` holds the row's ``sample``, ``seed``, ``prompt``, ``prompts``, ``data``, ``weights`` and ``versions``.
    """
    made = task.make()
    started, state = time.monotonic(), made.rng_state.getstate()
    with tempfile.TemporaryDirectory(prefix="secateur-") as folder:
        result = mteb.evaluate(
            encoder,
            made,
            cache=None,
            co2_tracker=False,
            show_progress_bar=False,
            encode_kwargs={"batch_size": batch_size, "show_progress_bar": False},
            prediction_folder=folder,
        ).task_results[0]
        file = Path(folder) / made.prediction_file_name
        predictions = read_json(file) if file.is_file() else {}
    row = ScoreRow(
        model=label,
        task=task.name,
        type=str(task.metadata.type),
        metric=str(task.metadata.main_score),
        score=float(result.get_score()),
        samples=count_samples(made),
        seconds=time.monotonic() - started,
        command=command_line(),
        created=now(),
        **key,
    )
    replicates = None
    if math.isfinite(row.score):
        try:
            row, replicates = _with_interval(row, made, predictions, state)
        except Exception as error:  # an interval that cannot be computed does not lose a score that took hours
            row = replace(row, note=f"{NO_INTERVAL}{' '.join(str(error).split()) or type(error).__name__}")
    row = replace(row, note="; ".join(filter(None, [task.note, row.note])))
    # The revision tells mteb's tools one state of a model from another under the same name.
    meta = encoder.mteb_model_meta.model_copy(update={"revision": row.weights[:12]})
    return Scored(row, replicates, result, meta)


def _with_interval(
    row: ScoreRow, task: Any, predictions: Mapping[str, Any], state: tuple[Any, ...]
) -> tuple[ScoreRow, Array]:
    """A score with its interval and its bootstrap replicates; a ValueError says why it can have none."""
    parts = resampled_scores(task, predictions, row.metric, state)
    again = float(np.mean([intervals.observed(part.statistic, part.units) for part in parts]))
    if not abs(again - row.score) <= SAME_SCORE:  # a task of mteb's with a scoring of its own
        raise ValueError(f"mteb's score is {row.score:.4f}, but its predictions give {again:.4f}")
    found = []
    for number, part in enumerate(parts):
        # The seed follows from the data alone, so that every model is resampled alike.
        seed = int(hashlib.sha256(f"{row.data} {number}".encode()).hexdigest()[:8], 16)
        found.append(intervals.resample(part.statistic, part.units, seed))
        if why := intervals.why_no_interval(found[-1], part.units):
            raise ValueError(why)
    replicates = np.mean(found, axis=0)
    units = sum(part.units for part in parts)
    low, high = intervals.interval(replicates, intervals.limits_of(row.metric), units)
    identity = [row.model, row.task, row.sample, row.seed, *row.prompts, row.data, row.weights, row.versions]
    name = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
    return replace(row, low=low, high=high, unit=parts[0].unit, units=units, samples=units, draws=name), replicates
