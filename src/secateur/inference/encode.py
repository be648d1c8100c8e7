"""Files of texts → one file of vectors: constant memory, each distinct text once, and a killed run goes on.

First all texts are read and checked: each distinct one is kept in ``OUT.partial`` (``texts.sqlite``), and for each row
the number of its text (``places.npy``). Then the distinct ones go through the model, by :data:`SHARD`, each shard a
file that appears when it is complete. At the end every row looks up its vector, and the result gets its name.
"""

from __future__ import annotations

import hashlib
import shutil
import sqlite3
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from secateur.data.rows import read_column
from secateur.data.sources import instruction_prompt
from secateur.data.vectors import fingerprint_model, npy_bytes
from secateur.errors import ConfigError, DataError, OutputError
from secateur.files import DONE, lock, output_errors, write_bytes
from secateur.inference.backends import choose
from secateur.inference.encoders import AUTO, TORCH, ModelEncoder, Opening
from secateur.inference.vector_files import check_suffix, description_file, read_description, write_vectors
from secateur.inference.workers import Pieces, Read, Run, in_processes, on_ray
from secateur.options import EncodeOptions, step
from secateur.progress import Progress, silent
from secateur.provenance import Made, fingerprint_files, read_record
from secateur.runtime.core import Encoder, OnBatch, Vectors
from secateur.runtime.encoder import quantize

SHARD = 2048
"""Distinct texts that are encoded together, and what a killed run loses at most of each worker's work."""
SAMPLE, SAMPLE_CHARACTERS = 64, 2000
"""Texts that measurements are made on, and how much of each."""
MEASURED_FROM = 200_000
"""From so many characters on, ``auto`` measures: fewer are sooner encoded than measured."""
DATABASE, PLACES, RESULT = "texts.sqlite", "places.npy", "result"
TABLES = """
PRAGMA journal_mode=OFF;
PRAGMA synchronous=OFF;
CREATE TABLE texts (number INTEGER PRIMARY KEY, key BLOB UNIQUE, text BLOB);
"""
OPENED, TEXTS, TOKENS = "model opened", "texts", "tokens"
"""What is counted, as ``progress`` is told."""


@dataclass(frozen=True)
class Encoded:
    """What was written: ``rows`` vectors of ``dimension`` numbers in ``file``, from ``distinct`` texts.

    Attributes:
        dtype: In what the model multiplied, and ``backend`` what ran it.
        told: Why, where that was to be decided: what it gains, and what else was tried.
        encoded: Texts that went through the model in this run; fewer than ``distinct`` where it was resumed.
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
    backend: str = TORCH
    told: str = ""


@step(EncodeOptions)
def encode(options: EncodeOptions, *, progress: Progress = silent) -> Encoded:
    """Encode files of texts into one file of vectors; a run that was killed goes on where it stopped.

    Of tokens, ``progress`` is told a total of 0, for nobody knows it.

    Raises:
        DataError: A file or a text cannot be read; or there are none.
        ConfigError: An option does not go with the model; or ``int8`` finds no ranges, as all vectors are the same.
        OutputError: ``out`` exists, or cannot be written; or its partial folder holds another run's work, or one that
            is at work.
        ModelError: The model cannot be opened, or a worker died too often.
    """
    with _partial_folder(options.out) as folder:
        with output_errors(folder):
            texts = (text for file in options.files for text in read_column(file, options.column))
            inputs = number_texts(texts, folder)
            progress("read", inputs.rows, inputs.rows)
        if not inputs.rows:
            raise DataError(options.files[0], "holds no text")
        if options.precision == "int8" and options.ranges is None and inputs.distinct == 1:
            raise _no_ranges()
        progress(OPENED, 0, 1)
        sample = [text[:SAMPLE_CHARACTERS] for text in _texts(folder, np.linspace(0, inputs.distinct - 1, SAMPLE))]
        count = inputs.distinct if inputs.characters >= MEASURED_FROM else 0
        opening = _opening(options, folder)
        chosen = choose(opening, options.min_cosine, sample, count, lambda encoder: [_prompt(encoder, options)])
        progress(OPENED, 1, 1)
        encoder, opening, told = chosen.encoder, chosen.opening, chosen.told
        del chosen
        if options.dimensions is not None and options.dimensions > encoder.dimension:
            problem = f"{options.dimensions} are more than the model's vectors have"
            raise ConfigError("dimensions", options.dimensions, problem, f"at most {encoder.dimension}")
        prompt = _prompt(encoder, options)
        about: dict[str, Any] = {  # what the file says of itself
            "model": str(options.model),
            "inputs": asdict(inputs),
            "fingerprint": fingerprint_model(encoder.model)
            if isinstance(encoder, ModelEncoder)
            else fingerprint_files(encoder.name),
            "prompt": prompt,
            "dimension": options.dimensions or encoder.dimension,
            "normalize": options.normalize,
            "precision": options.precision,
            "backend": opening.backend,
            "dtype": opening.dtype,
        }
        ranges = _given_ranges(options, about)
        _check_resume(folder, about, opening.backend != TORCH and not opening.exported)
        if options.ray is None and options.processes == 1:
            pool: AbstractContextManager[Run] = nullcontext(_run_here(encoder, prompt))
        else:
            del encoder  # its memory is the workers' now
            address, count = options.ray, options.processes
            pool = in_processes(opening, prompt, count) if address is None else on_ray(opening, prompt, address, count)
        with output_errors(folder):
            encoded, tokens, seconds = _encode_shards(pool, about, folder, progress)
            _write_result(folder, about, ranges, options.out)
    found = inputs.rows, inputs.distinct, about["dimension"], opening.dtype
    return Encoded(options.out, *found, encoded, tokens, seconds, opening.backend, told)


def _run_here(encoder: Encoder, prompt: str) -> Run:
    def run(numbers: Sequence[int], read: Read, on_batch: OnBatch) -> Pieces:
        for number in numbers:
            yield number, encoder.encode_texts(read(number), prompt, on_batch)

    return run


@dataclass(frozen=True)
class Inputs:
    """What was read: ``rows`` texts, ``distinct`` different ones of so many characters, and a hash over all."""

    rows: int
    distinct: int
    characters: int
    sha256: str


def number_texts(texts: Iterable[str], folder: Path) -> Inputs:
    """Read all texts into the files of a folder; the distinct ones are numbered by first occurrence."""
    (folder / DATABASE).unlink(missing_ok=True)
    everything = hashlib.sha256()
    rows = distinct = characters = 0
    with (
        closing(sqlite3.connect(folder / DATABASE, isolation_level=None)) as database,
        (folder / PLACES).open("wb") as places,
    ):
        database.executescript(TABLES + "BEGIN;")
        for rows, text in enumerate(texts, start=1):  # noqa: B007
            content = text.encode()
            key = hashlib.blake2b(content, digest_size=16).digest()
            everything.update(key)
            number = distinct
            if database.execute("INSERT OR IGNORE INTO texts VALUES (?, ?, ?)", (number, key, content)).rowcount:
                distinct, characters = distinct + 1, characters + len(text)
            else:
                (number,) = database.execute("SELECT number FROM texts WHERE key = ?", (key,)).fetchone()
            places.write(number.to_bytes(8, "little"))
        database.execute("COMMIT")
    return Inputs(rows, distinct, characters, everything.hexdigest())


def _texts(folder: Path, numbers: Iterable[float]) -> list[str]:
    """Some of the distinct texts, in the order of their numbers."""
    with closing(sqlite3.connect(folder / DATABASE)) as database:
        wanted = ",".join(str(int(number)) for number in numbers)
        found = database.execute(f"SELECT text FROM texts WHERE number IN ({wanted}) ORDER BY number")  # noqa: S608
        return [content.decode() for (content,) in found]


@contextmanager
def _partial_folder(out: Path) -> Iterator[Path]:
    """Where a run works, alone; one that fails before it has recorded what it does leaves nothing behind."""
    check_suffix(out)
    folder = out.with_name(out.name + ".partial")
    for taken in (out, description_file(out)):
        # A description without its file is of a run that was killed between the two, if that has left its folder.
        if taken is not None and taken.exists() and (taken == out or not folder.exists()):
            raise OutputError(taken, "exists already", "name another file, or remove this one")
    with output_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with lock(folder):
        if (folder / "job.json").exists():
            raise OutputError(folder, "holds an unfinished run of an earlier version", "remove the folder")
        try:
            yield folder
        except BaseException:
            if not (folder / DONE).exists():
                shutil.rmtree(folder, ignore_errors=True)
            raise


def _opening(options: EncodeOptions, folder: Path) -> Opening:
    """How the model is opened; a run that is resumed keeps what ``auto`` has found, as it may find otherwise now."""
    opening = Opening.of(options)
    if opening.exported or not (folder / DONE).exists():
        return opening
    found = read_record(folder / DONE)["options"]
    backend, dtype = found.get("backend") or TORCH, found.get("dtype", AUTO)
    same = options.backend in (AUTO, backend) and options.dtype in (AUTO, dtype)
    return replace(opening, backend=backend, dtype=dtype) if same else opening


def _prompt(encoder: Encoder, options: EncodeOptions) -> str:
    if options.instruction is None:
        return encoder.prompt_of(options.prompt_name)
    if options.prompt_name is not None:
        problem, hint = "does not go with --prompt-name", "give one of the two"
        raise ConfigError("instruction", options.instruction, problem, hint)
    return instruction_prompt(options.instruction)


def _check_resume(folder: Path, about: dict[str, Any], converted: bool) -> None:
    """Record what the folder's shards are made from; refuse a folder that holds those of another run."""
    kept = {name: about[name] for name in ("dtype", "prompt", "dimension", "normalize")}
    kept["backend"] = about["backend"] if converted else None  # of an export, that is in its fingerprint
    made = Made("encode", kept, {"inputs": about["inputs"]["sha256"], "weights": about["fingerprint"]})
    changed = made.changes_since(folder)
    if changed:
        problem = f"holds an unfinished run with other {', '.join(changed)}"
        raise OutputError(folder, problem, "give that run's inputs and options to finish it, or remove the folder")
    if changed is None:
        made.record(folder)


def _given_ranges(options: EncodeOptions, about: dict[str, Any]) -> Vectors | None:
    """The ranges (2, dimension) of an earlier file of int8 vectors; refuses those of other vectors."""
    if options.ranges is None:
        return None
    file, dimension = str(options.ranges), about["dimension"]
    if options.precision != "int8":
        raise ConfigError("ranges", file, f"means nothing in {options.precision}", "it goes with --precision int8")
    earlier = read_description(options.ranges)
    try:
        ranges = np.asarray(earlier["ranges"], dtype=np.float32)
    except (KeyError, TypeError, ValueError):
        raise DataError(file, "tells no ranges", "give a file written with --precision int8") from None
    hint = f"give a file of this model's int8 vectors of {dimension} numbers"
    if ranges.shape != (2, dimension) or not (ranges[0] <= ranges[1]).all():
        shape = " by ".join(map(str, ranges.shape))
        raise ConfigError("ranges", file, f"{file} has {shape} ranges, not 2 by {dimension}", hint)
    if any(earlier.get(name, about[name]) != about[name] for name in ("fingerprint", "normalize")):
        raise ConfigError("ranges", file, f"{file} is of other weights, another dtype, or another --normalize", hint)
    return ranges


def _no_ranges() -> ConfigError:
    hint = "--ranges FILE takes those of an earlier file, such as that of the documents; or --precision float32"
    return ConfigError("precision", "int8", "all vectors are the same, and have no ranges to be rounded by", hint)


def _shard(folder: Path, number: int) -> Path:
    return folder / f"{number:08d}.npy"


def _encode_shards(
    pool: AbstractContextManager[Run], about: dict[str, Any], folder: Path, progress: Progress
) -> tuple[int, int, float]:
    """Encode the shards that are not there yet; texts, tokens and seconds of this run."""
    distinct = about["inputs"]["distinct"]
    todo = [number for number in range(-(-distinct // SHARD)) if not _shard(folder, number).exists()]
    before = distinct - sum(min(SHARD, distinct - number * SHARD) for number in todo)
    texts = tokens = 0
    progress(TEXTS, before, distinct)
    if not todo:
        return 0, 0, 0.0

    def read(number: int) -> list[str]:
        return _texts(folder, range(number * SHARD, (number + 1) * SHARD))

    def on_batch(more_texts: int, more_tokens: int) -> None:
        nonlocal texts, tokens
        texts, tokens = texts + more_texts, tokens + more_tokens
        progress(TOKENS, tokens, 0)
        progress(TEXTS, before + texts, distinct)

    with pool as run, closing(run(todo, read, on_batch)) as pieces:
        started = time.monotonic()
        progress(TOKENS, 0, 0)
        for number, vectors in pieces:
            vectors = vectors[:, : about["dimension"]]
            if about["normalize"]:  # a vector of zeros stays one
                vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
            write_bytes(_shard(folder, number), npy_bytes(np.ascontiguousarray(vectors, dtype=np.float32)))
        return texts, tokens, time.monotonic() - started


def _write_result(folder: Path, about: dict[str, Any], ranges: Vectors | None, out: Path) -> None:
    """Write the result from the shards, give it its name, and remove the folder."""
    precision, dimension = about["precision"], about["dimension"]
    if precision == "int8":
        ranges = _measured_ranges(folder, about) if ranges is None else ranges
        about["ranges"] = ranges.tolist()
    else:
        ranges = np.zeros((2, 0), dtype=np.float32)
    width = -(-dimension // 8) if precision == "binary" else dimension
    dtype = np.float32 if precision == "float32" else np.int8
    quantized = (quantize(vectors, precision, ranges) for vectors in _rows(folder, dimension))
    write_vectors(folder / RESULT, quantized, (about["inputs"]["rows"], width), dtype, about, out)
    (folder / RESULT).replace(out)
    shutil.rmtree(folder, ignore_errors=True)


def _rows(folder: Path, dimension: int) -> Iterator[Vectors]:
    """The vectors of all rows, in their order, a piece at a time: a mapped file would stay in memory."""
    with (folder / PLACES).open("rb") as stream:
        while len(numbers := np.fromfile(stream, dtype="<i8", count=SHARD)):
            vectors: Vectors = np.empty((len(numbers), dimension), dtype=np.float32)
            for number in np.unique(numbers // SHARD):
                here: NDArray[np.bool_] = numbers // SHARD == number
                vectors[here] = np.load(_shard(folder, int(number)), mmap_mode="r")[numbers[here] % SHARD]
            yield vectors


def _measured_ranges(folder: Path, about: dict[str, Any]) -> Vectors:
    """Least and greatest value of each dimension over all vectors: (2, dimension)."""
    shards = range(-(-about["inputs"]["distinct"] // SHARD))
    vectors = (np.load(_shard(folder, number), mmap_mode="r") for number in shards)
    extremes = np.array([(shard.min(axis=0), shard.max(axis=0)) for shard in vectors])
    least, greatest = extremes[:, 0].min(axis=0), extremes[:, 1].max(axis=0)
    if (least == greatest).all():
        raise _no_ranges()
    return np.stack([least, greatest])
