"""Files of texts → one file of vectors: constant memory, each distinct text once, and a killed run goes on.

The inputs are read twice. The first time each text is checked, counted and given the number of its first occurrence
(``places.npy``), and each shard of distinct texts a hash (``digests``); so a mistake in the last line is found before
the model has done anything, and an input that changes later is found out. The second time the distinct texts go through
the model, by :data:`SHARD`, each shard a file in ``OUT.partial`` that appears when it is complete. At the end every row
looks up its vector, and the result is renamed to its name.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import random
import shutil
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from secateur.data.rows import read_column
from secateur.data.sources import instruction_prompt
from secateur.errors import ConfigError, DataError, OutputError
from secateur.files import lock, output_errors, read_json, write_bytes, write_text
from secateur.inference.arithmetic import STORED
from secateur.inference.encoders import Vectors
from secateur.inference.pools import Facts, Opening, Run, Worker, in_processes, in_this_process, on_ray, open_worker
from secateur.inference.vector_files import (
    check_suffix,
    description_file,
    read_description,
    write_description,
    write_vectors,
)
from secateur.options import SavedPooling
from secateur.progress import Progress, silent
from secateur.runtime.vectors import quantize

SHARD = 2048
"""Distinct texts that are encoded together, and what a killed run loses at most of each worker's work."""

MEASURED_FROM = 200_000
"""From so many characters on, ``auto`` measures: fewer are sooner encoded than measured."""

SAMPLE, SAMPLE_CHARACTERS = 64, 200
"""Texts that measurements are made on, and how much of each: rounding shows where texts are short."""

JOB, PLACES, DIGESTS, RESULT = "job.json", "places.npy", "digests", "result"

DIGEST = 16
"""Bytes of a hash."""

ARITHMETIC, TEXTS, TOKENS = "arithmetic measured", "texts", "tokens"

Precision = Literal["float32", "int8", "binary"]


@dataclass(frozen=True)
class Encoded:
    """What was written: ``rows`` vectors of ``dimension`` numbers in ``file``, from ``distinct`` texts.

    Attributes:
        dtype: Of the model's arithmetic.
        encoded: Texts that went through the model in this run; fewer than ``distinct`` where it went on.
        tokens: Of these texts, prompts and special tokens included.
        seconds: That they took.
    """

    file: Path
    rows: int
    distinct: int
    dimension: int
    dtype: str
    encoded: int
    tokens: int
    seconds: float


def encode(
    model: str | Path,
    files: str | Path | Sequence[str | Path],
    *,
    out: str | Path,
    column: str | None = None,
    prompt_name: str | None = None,
    instruction: str | None = None,
    normalize: bool = False,
    dimensions: int | None = None,
    precision: Precision = "float32",
    ranges: str | Path | None = None,
    batch_tokens: int | None = None,
    processes: int = 1,
    ray: str | None = None,
    dtype: str = "auto",
    pooling: SavedPooling | None = None,
    max_length: int = 512,
    device: str | None = None,
    trust_remote_code: bool = False,
    progress: Progress = silent,
) -> Encoded:
    """Encode files of texts into one file of vectors; a run that was killed goes on where it stopped.

    Args:
        model: As for ``open_model``, or a folder that ``export`` wrote.
        files: JSON Lines, CSV, Parquet or plain text, one or several, read one after the other (:mod:`.rows`).
        out: The file to write: ``.parquet``, ``.arrow``, ``.feather`` or ``.npy`` (:mod:`.vector_files`).
        column: The column that holds the texts; default: ``text``, or the first known name that is there.
        prompt_name: The model's prompt that goes before each text; default: the model's own default.
        instruction: Goes before each text, in place of a named prompt.
        normalize: Make vectors of length 1, also where the model does not.
        dimensions: Keep so many numbers of each vector (Matryoshka); they are normalised after that if at all.
        precision: ``float32``; ``int8``: 256 steps between each dimension's least and greatest value in these vectors,
            which the file's description tells; ``binary``: one bit a dimension, packed by eight. As
            ``sentence_transformers.quantize_embeddings`` does it.
        ranges: For ``int8``, a file of such vectors, or a JSON file with ``ranges``: its steps are taken, so that
            queries can be compared with documents. What lies outside gets the nearest step.
        batch_tokens: Tokens in a batch, padding included; default: 1,024 on a CPU, 8,192 on a GPU.
        processes: Processes of this machine, or actors of the cluster.
        ray: Address of a Ray cluster, or ``local``.
        dtype: ``auto``: the quickest that keeps a cosine of 0.9999 to float32, measured where there is much to encode
            (:func:`.quicken`); ``float32``; ``mixed``: linear layers multiply in bfloat16; ``bfloat16`` or ``float16``.
        pooling: As for ``open_model``.
        max_length: As for ``open_model``.
        device: Torch device; default: the GPU where there is one.
        trust_remote_code: As for ``open_model``.
        progress: Called as work goes on; of tokens, whose total nobody knows, with a total of 0.

    Raises:
        DataError: A file or a text cannot be read; or there are none.
        ConfigError: An option does not go with the model; or these vectors are all the same and give ``int8`` no steps.
        OutputError: ``out`` exists, or cannot be written; or its partial folder holds another run's work, or one that
            is at work.
        ModelError: The model cannot be opened, or a worker died too often.
    """
    out = Path(out)
    files = [files] if isinstance(files, (str, Path)) else files
    _check(files, dimensions, precision, processes)
    steps = _Ranges(Path(ranges)) if ranges is not None else None
    if steps is not None and precision != "int8":
        raise ConfigError("ranges", str(ranges), f"means nothing in {precision}", "it goes with --precision int8")
    texts = partial(_read_all, files, column)
    opening = Opening(
        str(model),
        dtype=dtype,
        batch_tokens=batch_tokens,
        pooling=pooling,
        max_length=max_length,
        device=device,
        trust_remote_code=trust_remote_code,
    )
    with _partial_folder(out) as folder:
        with output_errors(folder):
            inputs, sample = _number_texts(texts, folder, progress)
        if not inputs.rows:
            raise DataError(files[0], "holds no text")
        if precision == "int8" and steps is None and inputs.distinct == 1:
            raise _no_steps()
        opening = replace(opening, dtype=_resolved_dtype(folder, inputs) if dtype == "auto" else dtype)
        worker: Worker | None = open_worker(opening)
        assert worker is not None
        facts = worker.facts()
        prompt = _prompt(facts, prompt_name, instruction)
        numbers = _numbers(facts, dimensions)
        if steps is not None:
            steps.check(numbers, facts.fingerprint)
        dtype = _settle(worker, opening.dtype, prompt, sample, progress)
        opening = replace(opening, dtype=dtype, prompt=prompt)
        job = _Job(inputs, facts.fingerprint, dtype, prompt, numbers, normalize)
        _take_over(folder, job)
        if ray is None and processes == 1:
            pool = in_this_process(worker, prompt)
        else:
            worker = None  # its memory is the workers' now
            pool = in_processes(opening, processes) if ray is None else on_ray(opening, ray, processes)
        with output_errors(folder):
            work = _encode_shards(pool, texts, job, folder, progress)
            about = {"model": str(model), **asdict(job), "precision": precision}
            _finish(folder, job, precision, steps.values if steps else None, about, out)
    return Encoded(out, inputs.rows, inputs.distinct, numbers, dtype, work.texts, work.tokens, work.seconds)


def _check(files: Sequence[str | Path], dimensions: int | None, precision: str, processes: int) -> None:
    """Refuse what the command line cannot say, before anything is done."""
    if not files:
        raise ConfigError("files", [], "there are none to encode", "name at least one")
    if precision not in get_args(Precision):
        raise ConfigError("precision", precision, "is unknown", f"one of {', '.join(get_args(Precision))}")
    for name, number in (("dimensions", dimensions), ("processes", processes)):
        if number is not None and number < 1:
            raise ConfigError(name, number, "is less than 1")


@dataclass(frozen=True)
class _Inputs:
    """What was read: ``rows`` texts, ``distinct`` different ones of so many characters together, and a hash over all
    texts in order.
    """

    rows: int
    distinct: int
    characters: int
    sha256: str


@dataclass(frozen=True)
class _Job:
    """All that the vectors in a partial folder depend on; other inputs or settings are other work."""

    inputs: _Inputs
    fingerprint: str
    dtype: str
    prompt: str
    dimension: int
    normalize: bool


@contextmanager
def _partial_folder(out: Path) -> Iterator[Path]:
    """Where a run works, alone; one that fails before it has begun with its job leaves nothing behind."""
    check_suffix(out)
    folder = out.with_name(out.name + ".partial")
    for taken in (out, description_file(out)):
        # A description without its file is of a run that was killed between the two, if that has left its folder.
        if taken is not None and taken.exists() and (taken == out or not folder.exists()):
            raise OutputError(taken, "exists already", "name another file, or remove this one")
    with output_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with lock(folder):
        try:
            yield folder
        except BaseException:
            if not (folder / JOB).exists():
                shutil.rmtree(folder, ignore_errors=True)
            raise


def _take_over(folder: Path, job: _Job) -> None:
    """Make the folder this job's; refuse one that holds the work of another."""
    file = folder / JOB
    if not file.exists():
        write_text(file, json.dumps(asdict(job), indent=1))
        return
    earlier, now = read_json(file), asdict(job)
    differing = [key for key in now if not isinstance(earlier, dict) or earlier.get(key) != now[key]]
    if differing:
        problem = f"holds an unfinished run with other {', '.join(differing).replace('fingerprint', 'weights')}"
        raise OutputError(folder, problem, "give that run's inputs and options to finish it, or remove the folder")


def _resolved_dtype(folder: Path, inputs: _Inputs) -> str:
    """What ``auto`` is: what the run that is gone on with has found, for a second measurement may come out differently;
    a measurement; or, where that would take longer than it saves, as stored.
    """
    file = folder / JOB
    job = read_json(file) if file.exists() else {}
    short = inputs.characters < MEASURED_FROM
    return str(job.get("dtype", "auto")) if isinstance(job, dict) and job else STORED if short else "auto"


def _prompt(facts: Facts, name: str | None, instruction: str | None) -> str:
    if instruction is not None and name is not None:
        raise ConfigError("instruction", instruction, "does not go with --prompt-name", "give one of the two")
    if instruction is not None:
        return instruction_prompt(instruction)
    name = name if name is not None else facts.default_prompt
    if name is not None and name not in facts.prompts:
        known = ", ".join(facts.prompts) or "none"
        raise ConfigError("prompt_name", name, f"the model has no prompt {name!r}", f"its prompts: {known}")
    return facts.prompts[name] if name is not None else ""


def _numbers(facts: Facts, dimensions: int | None) -> int:
    if dimensions is not None and dimensions > facts.dimension:
        problem = f"{dimensions} are more than the model's vectors have"
        raise ConfigError("dimensions", dimensions, problem, f"at most {facts.dimension}")
    return dimensions or facts.dimension


def _read_all(files: Sequence[str | Path], column: str | None) -> Iterator[str]:
    for file in files:
        yield from read_column(file, column)


Texts = Callable[[], Iterator[str]]


def _settle(worker: Worker, dtype: str, prompt: str, sample: Sequence[str], progress: Progress) -> str:
    """In what the worker multiplies, which may have to be measured."""
    measures = dtype == "auto"
    if measures:
        progress(ARITHMETIC, 0, 1)
    found = worker.settle(prompt, sample)
    if measures:
        progress(ARITHMETIC, 1, 1)
    return found


def _number_texts(texts: Texts, folder: Path, progress: Progress) -> tuple[_Inputs, list[str]]:
    """Read all texts once; write for each row the number of its text, counted by first occurrence, and for each shard
    a hash of its texts.

    Which texts have been seen is kept on disk, so that any number of them takes the same memory.

    Returns:
        What was read, and the first :data:`SAMPLE_CHARACTERS` of :data:`SAMPLE` distinct texts, drawn at random.
    """
    seen = folder / "seen.sqlite"
    digest = hashlib.sha256()
    rows = distinct = characters = 0
    sample, shard = _Sample(), hashlib.blake2b(digest_size=DIGEST)
    seen.unlink(missing_ok=True)
    with (
        closing(sqlite3.connect(seen, isolation_level=None)) as index,
        (folder / PLACES).open("wb") as places,
        (folder / DIGESTS).open("wb") as digests,
    ):
        index.execute("PRAGMA journal_mode=OFF")
        index.execute("PRAGMA synchronous=OFF")
        index.execute("CREATE TABLE seen (key BLOB PRIMARY KEY, number INTEGER) WITHOUT ROWID")
        index.execute("BEGIN")
        for rows, text in enumerate(texts(), start=1):  # noqa: B007
            key = _hash(text)
            digest.update(key)
            if index.execute("INSERT OR IGNORE INTO seen VALUES (?, ?)", (key, distinct)).rowcount:
                number, distinct, characters = distinct, distinct + 1, characters + len(text)
                sample.add(text)
                shard.update(key)
                if distinct % SHARD == 0:
                    digests.write(shard.digest())
                    shard = hashlib.blake2b(digest_size=DIGEST)
            else:
                (number,) = index.execute("SELECT number FROM seen WHERE key = ?", (key,)).fetchone()
            places.write(number.to_bytes(8, "little"))
        if distinct % SHARD:
            digests.write(shard.digest())
    seen.unlink()
    progress("read", rows, rows)
    return _Inputs(rows, distinct, characters, digest.hexdigest()), sample.texts


class _Sample:
    """The starts of some texts, each as likely to be kept as any other (reservoir sampling: Vitter 1985)."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self._seen = 0
        self._rng = random.Random(0)  # noqa: S311

    def add(self, text: str) -> None:
        self._seen += 1
        place = len(self.texts) if len(self.texts) < SAMPLE else self._rng.randrange(self._seen)
        if place < SAMPLE:
            self.texts[place : place + 1] = [text[:SAMPLE_CHARACTERS]]


def _hash(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=DIGEST).digest()


def _places(folder: Path) -> Iterator[NDArray[np.int64]]:
    """For each row the number of its text, :data:`SHARD` rows at a time: a mapped file would stay in memory."""
    with (folder / PLACES).open("rb") as stream:
        while len(numbers := np.fromfile(stream, dtype="<i8", count=SHARD)):
            yield numbers


def _shard(folder: Path, number: int) -> Path:
    return folder / f"{number:08d}.npy"


def _open_shard(folder: Path, number: int) -> Vectors:
    found: Vectors = np.load(_shard(folder, number), mmap_mode="r")
    return found


@dataclass
class _Work:
    """What this run has encoded so far; tells it to ``progress``, ``before`` being what an earlier run has done."""

    before: int
    distinct: int
    progress: Progress
    texts: int = 0
    tokens: int = 0
    started: float = field(default_factory=time.monotonic)
    seconds: float = 0.0

    def add(self, texts: int, tokens: int) -> None:
        self.texts, self.tokens = self.texts + texts, self.tokens + tokens
        self.progress(TOKENS, self.tokens, 0)
        self.progress(TEXTS, self.before + self.texts, self.distinct)


def _encode_shards(
    pool: AbstractContextManager[Run], texts: Texts, job: _Job, folder: Path, progress: Progress
) -> _Work:
    """Encode what is not there yet."""
    distinct = job.inputs.distinct
    shards = -(-distinct // SHARD)
    todo = [number for number in range(shards) if not _shard(folder, number).exists()]
    left = sum(min(SHARD, distinct - number * SHARD) for number in todo)
    progress(TEXTS, distinct - left, distinct)
    if not todo:
        return _Work(distinct, distinct, progress)
    with pool as run:
        work = _Work(distinct - left, distinct, progress)
        progress(TOKENS, 0, 0)
        pieces = _pieces(texts, folder, set(todo))
        for number, vectors in zip(todo, run(pieces, work.add), strict=True):
            write_bytes(_shard(folder, number), _as_npy(_finished(vectors, job)))
        work.seconds = time.monotonic() - work.started
    return work


def _pieces(texts: Texts, folder: Path, todo: set[int]) -> Iterator[list[str]]:
    """The distinct texts of each shard in ``todo``, in order; what has changed meanwhile becomes no vectors."""
    distinct = _distinct(texts, folder)
    digests = (folder / DIGESTS).read_bytes()
    for shard in range(len(digests) // DIGEST):
        piece = list(itertools.islice(distinct, SHARD))
        if shard not in todo:
            continue
        found = hashlib.blake2b(b"".join(map(_hash, piece)), digest_size=DIGEST).digest()
        if found != digests[shard * DIGEST : (shard + 1) * DIGEST]:
            raise DataError("the input", "changed while it was read", "run again when nothing writes to it")
        yield piece


def _distinct(texts: Texts, folder: Path) -> Iterator[str]:
    """Each text at its first occurrence, as :func:`_number_texts` found them."""
    found = 0
    for text, number in zip(texts(), itertools.chain.from_iterable(_places(folder)), strict=False):
        if number == found:
            found += 1
            yield text


def _finished(vectors: Vectors, job: _Job) -> Vectors:
    """Shortened, and of length 1 where that is asked for; a vector of zeros stays one."""
    vectors = vectors[:, : job.dimension]
    if job.normalize:
        vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    return np.ascontiguousarray(vectors, dtype=np.float32)


def _as_npy(array: NDArray[Any]) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def _finish(
    folder: Path, job: _Job, precision: Precision, ranges: Vectors | None, about: dict[str, Any], out: Path
) -> None:
    """Write the result from the shards, give it its name, and remove the folder."""
    if precision == "int8":
        ranges = _ranges(folder, job) if ranges is None else ranges
        about["ranges"] = ranges.tolist()
    else:
        ranges = np.zeros((2, 0), dtype=np.float32)
    width = -(-job.dimension // 8) if precision == "binary" else job.dimension
    dtype = np.float32 if precision == "float32" else np.int8
    pieces = (quantize(vectors, precision, ranges) for vectors in _rows(folder, job))
    write_vectors(folder / RESULT, pieces, (job.inputs.rows, width), dtype, about, out.suffix)
    write_description(out, about)
    (folder / RESULT).replace(out)
    shutil.rmtree(folder, ignore_errors=True)


def _rows(folder: Path, job: _Job) -> Iterator[Vectors]:
    """The vectors of all rows, in their order, a piece at a time."""
    for numbers in _places(folder):
        vectors = np.empty((len(numbers), job.dimension), dtype=np.float32)
        for number in np.unique(numbers // SHARD):
            here = numbers // SHARD == number
            vectors[here] = _open_shard(folder, int(number))[numbers[here] % SHARD]
        yield vectors


def _ranges(folder: Path, job: _Job) -> Vectors:
    """Least and greatest value of each dimension over all vectors: (2, dimension)."""
    least, most = np.full(job.dimension, np.inf, np.float32), np.full(job.dimension, -np.inf, np.float32)
    for number in range(-(-job.inputs.distinct // SHARD)):
        vectors = _open_shard(folder, number)
        least, most = np.minimum(least, vectors.min(axis=0)), np.maximum(most, vectors.max(axis=0))
    if (least == most).all():
        raise _no_steps()
    return np.stack([least, most])


def _no_steps() -> ConfigError:
    hint = "--ranges FILE takes those of an earlier file, such as that of the documents; or --precision float32"
    return ConfigError("precision", "int8", "all vectors are the same, and have no ranges to be rounded by", hint)


class _Ranges:
    """What an earlier file of int8 vectors was rounded by: ``values`` (2, dimension).

    Raises:
        DataError: It tells no ranges.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._about = read_description(file)
        try:
            self.values = np.asarray(self._about["ranges"], dtype=np.float32)
        except (KeyError, TypeError, ValueError):
            raise DataError(file, "tells no ranges", "give a file written with --precision int8") from None

    def check(self, numbers: int, fingerprint: str) -> None:
        """Refuse those of other vectors."""
        hint = f"give a file of this model's int8 vectors of {numbers} numbers"
        if self.values.shape != (2, numbers) or not (self.values[0] <= self.values[1]).all():
            shape = " by ".join(map(str, self.values.shape))
            raise ConfigError("ranges", str(self._file), f"{self._file} has {shape} ranges, not 2 by {numbers}", hint)
        if self._about.get("fingerprint", fingerprint) != fingerprint:
            raise ConfigError("ranges", str(self._file), f"{self._file} is of other weights, or another dtype", hint)
