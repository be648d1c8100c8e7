"""A depth, or a set of blocks → a plain model folder that holds these blocks and nothing of the others.

A checkpoint of safetensors is never opened whole: the tensors that stay are copied (:mod:`.checkpoint`), and
what sentence-transformers keeps beside them is copied or added. Other models, GGUF files and those that bring their own
code, are opened and cut in memory.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from sentence_transformers import SentenceTransformer

from secateur.checkpoints.checkpoint import Pruned, prune_checkpoint
from secateur.checkpoints.embedder import Embedder, copy_modules, read_embedder
from secateur.checkpoints.sources import open_source
from secateur.checkpoints.verify import Expected, expected_of, expected_of_checkpoint, probe_tokens
from secateur.errors import ConfigError, ModelError, OutputError
from secateur.files import new_folder
from secateur.models.blocks import check_keep, cut, depth_of
from secateur.models.open_model import (
    as_model_error,
    check_embedder,
    check_written,
    model_label,
    open_model,
    resolve,
    save_model,
    write_files,
)
from secateur.models.pooling import pooling_name
from secateur.models.readers import write_for_all_readers
from secateur.options import PruneOptions, SavedPooling, check
from secateur.progress import Progress, quiet, silent
from secateur.provenance import provenance
from secateur.pruning.selection import Selection
from secateur.results import Origin, Profile, load

STEP = "prune, %"


def prune(
    model: str | Path,
    to: str | int | float | None = None,
    *,
    keep: str | Sequence[int] | None = None,
    drop: str | Sequence[int] | None = None,
    profile: Profile | str | Path | None = None,
    pooling: SavedPooling | None = None,
    max_length: int = 512,
    dtype: str = "auto",
    adapter: str | Path | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    out: str | Path,
    progress: Progress = silent,
) -> Path:
    """Cut a model to some of its blocks and write it as a plain model folder.

    Exactly one of ``to``, ``keep`` and ``drop`` says which blocks.

    Args:
        model: Anything :func:`.open_model` opens, or a LoRA adapter that names its base.
        to: A number of blocks to keep, or a share to remove: the first blocks stay; ``large``, ``small``, or another
            selector, such as ``knee`` or ``uniform:7`` (:func:`.blocks_to_keep`).
        keep: Blocks that stay, counted from 0: ``"0-5,8,11"``, or their indices.
        drop: Blocks that go, in the same way.
        profile: What selectors choose from.
        pooling: For a bare language model; with a profile, the one that it was measured with.
        max_length: Tokens per text, for a bare language model.
        dtype: Of the written weights.
        adapter: A LoRA adapter as peft saves it, to merge into the weights: a folder or a Hub id.
        revision: Branch, tag or commit of ``model`` on the Hub.
        trust_remote_code: As for ``open_model``; the model is then opened whole.
        out: The folder to write; it must not hold anything yet, nor lie in that of the model.
        progress: Told how much is done, in per cent.

    Returns:
        ``out``. The folder has been reopened in a fresh process, and gives the vectors that the source gives with
        these blocks alone.

    Raises:
        ModelError, IllegalDepth, ConfigError, OutputError: Bad input, or options that do not go together.
        VerificationFailed: The written folder gives other vectors.
    """
    check(PruneOptions, pooling=pooling, max_length=max_length, dtype=dtype)
    selection = Selection(to, keep, drop, profile)
    selection.check_pooling(pooling)
    source = resolve(model)
    if isinstance(source, Path):
        if revision is not None:
            raise ConfigError("revision", revision, f"{source} is here and not on the Hub: it has none", "leave it out")
        if source.resolve() in Path(out).resolve().parents:
            raise OutputError(out, "lies in the model's own folder", "name a folder beside it")
    in_memory = trust_remote_code or (isinstance(source, Path) and source.suffix == ".gguf")
    if in_memory and adapter is not None:
        raise ConfigError("adapter", adapter, f"cannot be merged into {model}", "it must be safetensors, without code")
    opening = Opening(pooling, max_length, dtype)
    with new_folder(out) as folder, _beside(folder) as scratch:
        progress(STEP, 0, 100)
        if in_memory:
            opened = open_model(
                model, revision=revision, trust_remote_code=trust_remote_code, device="cpu", **asdict(opening)
            )
            progress(STEP, 50, 100)
            _cut_in_memory(opened, model, selection, folder)
        else:
            job = Job(source, adapter, revision, opening, folder, scratch)
            _cut_checkpoint(job, selection, progress)
        progress(STEP, 100, 100)
    return Path(out)


@dataclass(frozen=True)
class Opening:
    """How to open a bare language model, and in which number format; see :func:`.open_model`."""

    pooling: SavedPooling | None
    max_length: int
    dtype: str


@dataclass(frozen=True)
class Job:
    """A checkpoint to cut.

    Attributes:
        source: A folder, or a model on the Hub, at ``revision``.
        adapter: To be merged.
        revision: Of the source.
        opening: How to open the result.
        folder: Where the result goes.
        scratch: A folder for what is only needed on the way.
    """

    source: str | Path
    adapter: str | Path | None
    revision: str | None
    opening: Opening
    folder: Path
    scratch: Path

    @property
    def cut(self) -> Path:
        """Where the copied tensors go: weights in another number format are written from there by transformers, which
        knows the ones that stay as they are.
        """
        return self.folder if self.opening.dtype == "auto" else self.scratch / "as-stored"

    @property
    def read(self) -> Path:
        """Where a download leaves what it read of the source."""
        return self.scratch / "read"


@contextmanager
def _beside(folder: Path) -> Iterator[Path]:
    """A folder on the same disk, for a time."""
    scratch = folder.with_name(folder.name + ".scratch")
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        scratch.mkdir()
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _cut_in_memory(opened: SentenceTransformer, model: str | Path, selection: Selection, folder: Path) -> None:
    transformer = opened[0].auto_model
    depth = depth_of(transformer)
    keep = selection.blocks(depth)
    check_keep(transformer.config, keep)
    with quiet():
        expected = Expected(expected_of(opened, transformer, keep), "the whole source", tokens=probe_tokens(opened))
    cut(transformer, keep)
    save_model(opened, folder, origin_of(model, depth, keep), expected=expected)


def _cut_checkpoint(job: Job, selection: Selection, progress: Progress) -> None:
    source = open_source(job.source, revision=job.revision)
    embedder = read_embedder(source)
    if embedder is not None:
        check_embedder(job.source, job.opening.pooling, job.opening.max_length)
    # What is read first on the Hub settles the commit.
    job = replace(job, revision=getattr(source, "revision", None))
    result = _copy_transformer(job, embedder, selection, progress)
    if embedder is not None:
        copy_modules(source, embedder, job.cut)
    origin = origin_of(job.source, result.depth, result.keep, source.find(Origin.file), result.left_out)
    opened = open_model(job.source, path=job.cut, device="cpu", **asdict(job.opening))
    progress(STEP, 80, 100)
    if job.cut != job.folder or embedder is None:
        write_files(opened, job.folder, weights=job.cut != job.folder)
    else:
        write_for_all_readers(job.folder, opened)
    with as_model_error(job.source), quiet():
        expected = replace(_expected(job, opened, result), tokens=probe_tokens(opened))
    origin = replace(origin, pooling=pooling_name(opened))
    del opened  # the fresh process has a copy of its own
    progress(STEP, 90, 100)
    check_written(job.folder, origin, expected)


def _copy_transformer(job: Job, embedder: Embedder | None, selection: Selection, progress: Progress) -> Pruned:
    place = embedder.transformer if embedder else ""
    (job.cut / place).mkdir(parents=True, exist_ok=True)
    job.read.mkdir()
    return prune_checkpoint(
        Path(job.source) / place if place else job.source,
        selection.blocks,
        job.cut / place,
        adapter=job.adapter,
        revision=job.revision,
        mirror=job.read,
        progress=lambda done, total: progress(STEP, 70 * done // max(1, total), 100),
    )


def _expected(job: Job, opened: SentenceTransformer, result: Pruned) -> Expected:
    downloaded = any(job.read.iterdir())
    checkpoint = job.read if downloaded else Path(result.base).expanduser()
    return expected_of_checkpoint(opened, checkpoint, result.keep, adapter=result.adapter, partial=downloaded)


def origin_of(
    model: str | Path,
    depth: int,
    keep: Sequence[int],
    earlier: Path | None = None,
    left_out: Sequence[str] = (),
) -> Origin:
    """Where a cut model comes from: what its own ``secateur.json`` (``earlier``) says, continued by this cut.

    Raises:
        ModelError: That file is of a model of another depth.
    """
    now = provenance()
    file = earlier or Path(model) / Origin.file
    if not file.is_file():
        return Origin(now, model_label(model), depth, tuple(keep), "", 0.0, (now.command,), left_out=tuple(left_out))
    before = load(file, Origin)
    if len(before.kept) != depth:
        problem = f"its {Origin.file} lists {len(before.kept)} blocks, but it has {depth}"
        raise ModelError(model, problem, "remove that file if the model was changed by other means")
    return replace(
        before,
        provenance=now,
        kept=tuple(before.kept[index] for index in keep),
        history=(*before.history, now.command),
        left_out=(*before.left_out, *left_out),
    )
