"""Models × tasks → scores, computed by mteb and saved one by one, so that a killed evaluation resumes.

The prompts follow from the model. One that was trained with instructions (its saved prompts end with ``;``, as
:func:`.instruction_prompt` writes them) gets the instruction of each task in the same form: on queries only in
retrieval and reranking, on every text elsewhere, as mteb's own instruction wrappers do. One that came with other
prompts (E5's ``"query: "``) keeps them. One without prompts gets the bare text.

Each score has a 95 % bootstrap interval (:mod:`.intervals`). Its draws are the same for all models on the same
data, so that differences between models have paired intervals too (:mod:`.compare`). The folder of results:

    OUT/scores.json                  the table
    OUT/draws/<name>.npy             the score of each draw, named in the table's rows
    OUT/mteb/results/<model>/...     the same results in mteb's own format, for ``mteb.ResultCache(OUT/mteb)``
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import tempfile
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import mteb
import numpy as np
from datasets import Dataset
from mteb.cache import ResultCache
from mteb.models.abs_encoder import get_prompt_name
from mteb.models.sentence_transformer_wrapper import SentenceTransformerEncoderWrapper
from mteb.types import PromptType
from sentence_transformers import SentenceTransformer
from torch.utils.data import DataLoader

from secateur.data.pairs import instruction_prompt
from secateur.data.vectors import VectorCache, fingerprint_model
from secateur.errors import ConfigError, DataError, ModelError, SecateurError
from secateur.evaluation.differences import draws_file
from secateur.evaluation.predictions import predicted
from secateur.evaluation.tasks import Task, count_samples, expand, open_task
from secateur.files import lock, output_error, output_errors, read_json, write_bytes
from secateur.measures.intervals import FEWEST, Array, doubt, interval, limits_of, mean_of, resample, whole
from secateur.models import model_label
from secateur.models.open_model import open_model
from secateur.options import EvaluateOptions, check
from secateur.progress import Progress, quiet, silent
from secateur.provenance import (
    ENCODING,
    Fingerprint,
    command_line,
    fingerprint_files,
    is_result_of,
    now,
    provenance,
    versions_of,
)
from secateur.results import ScoreRow, Scores, load

MTEB_FOLDER = "mteb"
SAME_SCORE = 1e-4  # mteb rounds some scores to 5 digits

_OWN_PROMPTS = {PromptType.query: ("query",), PromptType.document: ("document", "passage", "corpus")}
"""Prompts of which sentence-transformers takes the first that a model has, for a kind of texts."""

Model: TypeAlias = str | Path | SentenceTransformer


def evaluate(
    models: Sequence[Model],
    tasks: Sequence[str | Path | Task],
    *,
    sample: int | None = None,
    seed: int = 42,
    batch_size: int = 32,
    instructions: bool = True,
    instructed: Sequence[bool] | None = None,
    names: Sequence[str] | None = None,
    cache: str | Path | None = None,
    out: str | Path | None = None,
    progress: Progress = silent,
) -> Scores:
    """Score models on tasks.

    The score is each task's main metric, by mteb's code on mteb's protocol (see :mod:`.tasks` for what that
    samples and repeats by itself).

    Args:
        models: Names, folders or open models. One at a time is in memory.
        tasks: Task folders, or names of mteb's tasks and benchmarks, whose data mteb downloads; or what was opened
            with the same ``sample`` and ``seed``. All folders are checked before any text is encoded.
        sample: Evaluate on at most so many rows of each task, the same for all models (see
            :func:`.sample_task`). Sampled retrieval is easier than the whole task.
        seed: Decides which rows; mteb's own draws keep mteb's own seed.
        batch_size: Texts encoded at once.
        instructions: False: no instruction and no prompt before any text, for no model.
        instructed: Whether each model was trained with instructions. Default: read from its prompts.
        names: What to call the models in the table. Default: the last part of their paths; two folders of one name are
            told apart by their paths.
        cache: Folder that keeps vectors (:mod:`.vectors`): a text is not encoded twice by the same model.
        out: Folder of ``scores.json``, written after each task; a task that fails does not keep the others from being
            scored, its error comes at the end. Scores that it holds already are not computed again if
            the model's weights and settings, the task's data, ``sample``, ``seed``, the prompts and the versions of
            the libraries are the same; those of other models and tasks stay in the file as they are, those too that
            another run adds meanwhile.
        progress: Called before each task and at the end, with the number of scores that are there.

    Returns:
        One row for each model and task, by model.

    Raises:
        DataError: A task is not right, or cannot be downloaded.
        ModelError: A model cannot be opened, or its vectors are not numbers or all alike.
        ConfigError: No models, no tasks, equal names, or a number that is too small; or ``out`` has scores of another
            model by the same name, which nobody gave it.
        OutputError: ``out`` cannot be written.
    """
    check(EvaluateOptions, sample=sample, seed=seed, batch_size=batch_size)
    labels = _labels(models, names)
    if instructed is not None and len(instructed) != len(models):
        raise ConfigError("instructed", instructed, f"{len(instructed)} values for {len(models)} models")
    opened = open_tasks(tasks, sample, seed)
    ledger = _Ledger.open(out, [(label, task.name) for label in labels for task in opened], opened, seed)
    total = len(labels) * len(opened)
    failures: list[SecateurError] = []

    def score_model(number: int, label: str, given: Model) -> None:
        """All tasks of one model, which is let go when this returns, before the next one is opened."""
        model = given if isinstance(given, SentenceTransformer) else open_model(given)
        told = is_instructed(model) if instructed is None else instructed[number]
        weights, source, files = fingerprint_model(model), _source(given), _files(given)
        if names is None:
            ledger.check_same(label, source, weights)
        vectors = VectorCache(cache, weights, versions_of(ENCODING)) if cache is not None else None
        for j, task in enumerate(opened):
            progress("evaluate", number * len(opened) + j, total)
            prompts = task_prompts(task, told) if instructions else {}
            with quiet(), as_encoder(model, label, prompts, vectors) as encoder:
                key = {"sample": sample, "seed": seed, "data": task.source.sha256, "weights": weights}
                key |= {"versions": versions_of(), **_prompts(encoder, task)}
                if ledger.holds(label, task.name, key, files):
                    continue
                try:
                    scored = _finite(score_task(encoder, label, task, batch_size, key))
                    ledger.add(replace(scored, row=replace(scored.row, source=source, files=files)))
                except (DataError, ModelError) as error:
                    if out is None:
                        raise
                    failures.append(error)

    for i, (label, given) in enumerate(zip(labels, models, strict=True)):
        score_model(i, label, given)
        for failure in failures:  # its traceback holds the model
            traceback.clear_frames(failure.__traceback__)
    progress("evaluate", total, total)
    if failures:
        raise failures[0]
    return ledger.table()


def _labels(models: Sequence[Model], names: Sequence[str] | None) -> list[str]:
    """One name for each model."""
    if not models:
        raise ConfigError("models", models, "there are none", "name one at least")
    if names is not None and len(names) != len(models):
        raise ConfigError("names", names, f"{len(names)} names for {len(models)} models")
    labels = list(names) if names is not None else [_label(model, i) for i, model in enumerate(models)]
    if names is None and len(set(labels)) < len(labels):  # folders of one name, such as a/final and b/final
        told = zip(labels, models, strict=True)
        labels = [label if isinstance(model, SentenceTransformer) else str(model) for label, model in told]
    twice = [label for label in labels if labels.count(label) > 1]
    if twice:
        raise ConfigError("names", labels, f"two models are called {twice[0]}", "give each its own name: --names A B")
    return labels


def _label(model: Model, index: int) -> str:
    if isinstance(model, SentenceTransformer):
        return model_label(model.model_card_data.base_model or f"model-{index + 1}")
    return model_label(model)


def _source(model: Model) -> str:
    """Where a model is from: a folder's whole path, or a Hub id; empty for one that is open already."""
    if isinstance(model, SentenceTransformer):
        return ""
    path = Path(model).expanduser()
    return str(path.resolve()) if path.exists() else str(model)


def _files(model: Model) -> str:
    return "" if isinstance(model, SentenceTransformer) else fingerprint_files(model)


def open_tasks(tasks: Sequence[str | Path | Task], sample: int | None, seed: int) -> list[Task]:
    """Open all tasks that are not open yet; their names must differ.

    Raises:
        DataError, ConfigError: As :func:`.open_task`; or no tasks, or two of one name.
    """
    if not tasks:
        raise ConfigError("tasks", tasks, "there are none", "name one at least")
    opened = []
    for task in tasks:
        if isinstance(task, Task):
            opened.append(task)
        else:
            opened += [open_task(own, sample=sample, seed=seed) for own in expand([task])]
    names = [task.name for task in opened]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise ConfigError("tasks", tasks, f"two tasks are called {twice[0]}", 'change "name" in one task.json')
    return opened


@dataclass
class _Ledger:
    """The scores so far, in memory and on disk: those asked for now, and others that the file held already."""

    out: Path | None
    wanted: list[tuple[str, str]]
    rows: dict[tuple[str, str], ScoreRow]
    data: dict[str, Fingerprint]
    seed: int

    @classmethod
    def open(cls, out: str | Path | None, wanted: list[tuple[str, str]], tasks: Sequence[Task], seed: int) -> _Ledger:
        """Make sure, before hours of work, that ``out`` can be written, and read what it holds."""
        folder = Path(out) if out is not None else None
        rows: dict[tuple[str, str], ScoreRow] = {}
        data: dict[str, Fingerprint] = {}
        if folder is not None:
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise output_error(folder, error) from error
            rows, data = _read(folder)
        return cls(folder, wanted, rows, data | {task.name: task.source for task in tasks}, seed)

    def holds(self, model: str, task: str, key: dict[str, Any], files: str) -> bool:
        """Whether a score is there already; it is then one of these files too, which hold the same weights."""
        row = self.rows.get((model, task))
        if row is None or not is_result_of(row, key):
            return False
        if self.out is not None and row.draws and not draws_file(self.out, row.draws).is_file():
            return False
        if self.out is not None and files != row.files:
            with lock(self.out, wait=True):
                self._save(replace(row, files=files))
        return True

    def check_same(self, model: str, source: str, weights: str) -> None:
        """Refuse a model that would replace the scores of another one, from another place."""
        for row in self.rows.values():
            if row.model == model and row.source and source and row.source != source and row.weights != weights:
                problem = f"{self.out} has scores of another model called {model}, {row.source}"
                raise ConfigError("names", model, problem, "give this one another name: --names NAME")

    def add(self, scored: Scored) -> None:
        """Keep a score; on disk the row comes last, so that what it names is there."""
        row = scored.row
        if self.out is None:
            self.rows[row.model, row.task] = row
            return
        with lock(self.out, wait=True):
            if scored.draws is not None:
                stream = io.BytesIO()
                np.save(stream, scored.draws)
                write_bytes(draws_file(self.out, row.draws), stream.getvalue())
            with output_errors(self.out / MTEB_FOLDER):
                ResultCache(self.out / MTEB_FOLDER).save_to_cache(scored.result, scored.meta)
            self._save(row)

    def _save(self, row: ScoreRow) -> None:
        """Write the file with this row, and those that another run may have added to it."""
        assert self.out is not None
        self.rows[row.model, row.task] = row
        rows, data = _read(self.out)
        self._table([*(self.rows | rows | {(row.model, row.task): row}).values()], data | self.data).save(self.out)

    def table(self) -> Scores:
        """The scores that were asked for."""
        return self._table([self.rows[pair] for pair in self.wanted], self.data)

    def _table(self, rows: Sequence[ScoreRow], data: Mapping[str, Fingerprint]) -> Scores:
        used = {row.task for row in rows}
        sources = [item for name, item in data.items() if name in used]
        return Scores(provenance=provenance(sources, self.seed), scores=tuple(rows))


def _read(out: Path) -> tuple[dict[tuple[str, str], ScoreRow], dict[str, Fingerprint]]:
    """The rows of a folder's table, by model and task, and what they were computed on, by task."""
    if not (out / Scores.file).exists():
        return {}, {}
    table = load(out, Scores)
    return {(row.model, row.task): row for row in table.rows}, {item.name: item for item in table.provenance.data}


def is_instructed(model: SentenceTransformer) -> bool:
    """Whether a saved prompt has the form in which this package trains with instructions, today's or an earlier one."""
    return any(prompt and prompt.rstrip().endswith(";") for prompt in model.prompts.values())


class Encoder(SentenceTransformerEncoderWrapper):  # type: ignore[misc]
    """mteb's own encoder, with kept vectors, that refuses vectors which are not numbers.

    mteb ranks NaN somewhere, and gives a score.
    """

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


def task_prompts(task: Task, instructed: bool) -> dict[str, str] | None:
    """Prompts by mteb's keys (task type, with ``-query`` where only queries get one); None: those of the model."""
    if not instructed:
        return None
    key = f"{task.metadata.type}-{PromptType.query.value}" if task.asymmetric else str(task.metadata.type)
    return {key: instruction_prompt(task.instruction)} if task.instruction else {}


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


def _prompts(encoder: Encoder, task: Task) -> dict[str, Any]:
    """The row's ``prompts``, and ``prompt``: what will stand before the queries, or before all texts."""
    plain, query, document = (_prompt(encoder, task, kind) for kind in (None, PromptType.query, PromptType.document))
    return {"prompt": query if task.asymmetric else plain, "prompts": (plain, query, document)}


def _prompt(encoder: Encoder, task: Task, kind: PromptType | None) -> str:
    """What will stand before the texts of a kind: mteb's choice, else that of the model's ``encode`` for this kind."""
    prompts, model = encoder.model_prompts or {}, encoder.model
    name = get_prompt_name(prompts, task.metadata, kind)
    if name:
        return str(prompts[name] or "")
    own = next((name for name in _OWN_PROMPTS.get(kind, ()) if name in model.prompts), model.default_prompt_name)
    return str(model.prompts.get(own) or "")


@dataclass(frozen=True)
class Scored:
    """One score as it is kept: our row and its draws, and mteb's result and description of the model."""

    row: ScoreRow
    draws: Array | None
    result: Any
    meta: Any


def score_task(encoder: Encoder, label: str, task: Task, batch_size: int, key: dict[str, Any]) -> Scored:
    """Let mteb run one task.

    Args:
        encoder: From :func:`as_encoder`.
        label: What the model is called in the row.
        task: Is made anew.
        batch_size: Texts encoded at once.
        key: The row's ``sample``, ``seed``, ``prompt``, ``prompts``, ``data``, ``weights`` and ``versions``.

    Returns:
        The score, which is NaN where mteb's is, such as a correlation with vectors that are all alike.
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
    row, draws = _with_interval(row, made, predictions, state)
    row = replace(row, note="; ".join(filter(None, [task.note, row.note])))
    # The revision tells mteb's tools one state of a model from another under the same name.
    meta = encoder.mteb_model_meta.model_copy(update={"revision": row.weights[:12]})
    return Scored(row, draws, result, meta)


def _finite(scored: Scored) -> Scored:
    row = scored.row
    if not math.isfinite(row.score):
        raise ModelError(row.model, f"{row.metric} on {row.task} is not a number", "are its vectors all alike?")
    return scored


def _with_interval(
    row: ScoreRow, task: Any, predictions: dict[str, Any], state: tuple[Any, ...]
) -> tuple[ScoreRow, Array | None]:
    """A score with its interval and draws; or with a note that says why it has none."""
    try:
        return _resampled(row, task, predictions, state)
    except _NoInterval as error:
        reason = str(error)
    except Exception as error:  # an interval that cannot be computed does not lose a score that took hours
        reason = f"{type(error).__name__}: {error}"
    return replace(row, note=f"no interval: {' '.join(reason.split())}"), None


class _NoInterval(Exception):
    """Why a score has no interval."""


def _resampled(
    row: ScoreRow, task: Any, predictions: dict[str, Any], state: tuple[Any, ...]
) -> tuple[ScoreRow, Array | None]:
    """A score with its interval and draws.

    Raises:
        _NoInterval: It has none, and why.
    """
    if not math.isfinite(row.score):
        return row, None
    parts = predicted(task, predictions, row.metric, state)
    if not parts:
        raise _NoInterval(f"the rows of {row.type} by {row.metric} cannot be drawn again")
    if (fewest := min(part.units for part in parts)) < FEWEST:
        raise _NoInterval(f"{fewest} {parts[0].unit} are fewer than {FEWEST}")
    again = float(np.mean([whole(part.statistic, part.units) for part in parts]))
    if not abs(again - row.score) <= SAME_SCORE:  # a task of mteb's with a scoring of its own
        raise _NoInterval(f"mteb's score is {row.score:.4f}, but its predictions give {again:.4f}")
    # By the data alone: every model is scored on the same draws.
    seeds = [int(hashlib.sha256(f"{row.data} {i}".encode()).hexdigest()[:8], 16) for i in range(len(parts))]
    limits = limits_of(row.metric)
    drawn = [resample(part.statistic, part.units, seed, limits=limits) for part, seed in zip(parts, seeds, strict=True)]
    for part, own in zip(parts, drawn, strict=True):
        if why := doubt(own, part.units):
            raise _NoInterval(why)
    draws = mean_of(drawn)
    low, high = interval(draws, limits)
    identity = [row.model, row.task, row.sample, row.seed, *row.prompts, row.data, row.weights, row.versions]
    name = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
    units = sum(part.units for part in parts)
    return replace(row, low=low, high=high, unit=parts[0].unit, units=units, draws=name), draws
