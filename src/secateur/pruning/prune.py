"""Cuts a model to some of its layers and writes it as a plain folder that holds nothing of the others.

To open the whole model maps its weights into memory; only those of the layers up to the last kept one are ever read.
From the Hub, the bytes of the layers that stay are fetched, and no others (:mod:`.download`).
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from sentence_transformers import SentenceTransformer
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import CONFIG_NAME

from secateur.choosing.choose import blocks_to_keep, needs_profile, read_table
from secateur.errors import ConfigError, ModelError, OutputError, UnsupportedArchitecture, VerificationFailed
from secateur.evaluation.task_folder import read_task_folder, texts_of
from secateur.files import new_folder, read_json
from secateur.models import model_label, resolve
from secateur.models.blocks import blocks_of, find_stack
from secateur.models.checks import as_model_error, check_finite
from secateur.models.cutting import bypassed, check_keep, cut
from secateur.models.open_model import as_source, complete, fetch, load_model
from secateur.models.save import TOLERANCE, probe, save_model
from secateur.options import PruneOptions, step
from secateur.progress import Progress, quiet, silent
from secateur.provenance import provenance
from secateur.pruning.adapters import adapter_folder, base_of, is_adapter, merge_adapter, merge_adapters
from secateur.pruning.download import fetch_kept, transformer_folder
from secateur.results import Origin, Profile, VocabularyCut, load
from secateur.vocabulary.choice import count_vocabulary
from secateur.vocabulary.trim import cut_tokenizer, cut_vocabulary, renumbered

STEP = "prune, %"
READ = "read"
"""In the scratch folder: what was fetched from the Hub."""


@step(PruneOptions)
def prune(options: PruneOptions, *, progress: Progress = silent) -> Path:
    """Cut a model to some of its layers, and to some of its tokens, and write it as a plain model folder.

    Exactly one of ``to``, ``keep`` and ``drop`` says which layers; with ``vocab`` none need be given.

    Returns:
        ``out``. The folder has been reopened in a fresh process, and gives the vectors that the source gives with
        these layers alone.

    Raises:
        ModelError, IllegalDepth, ConfigError, OutputError: Bad input, or options that do not go together.
        VerificationFailed: The written folder gives other vectors.
    """
    _check_choice(options)
    source = resolve(options.model)
    if isinstance(source, Path):
        if options.revision is not None:
            problem = f"{source} is here and not on the Hub: it has none"
            raise ConfigError("revision", options.revision, problem, "leave it out")
        if source.resolve() in options.out.resolve().parents:
            raise OutputError(options.out, "lies in the model's own folder", "name a folder beside it")
    if options.vocab and options.trust_remote_code:
        problem = "cannot be told where a model's own code decides what an id stands for"
        raise ConfigError("vocab", options.vocab, problem, "leave out --trust-remote-code, or --vocab")
    if options.adapter is not None and (options.trust_remote_code or str(source).endswith(".gguf")):
        problem = f"cannot be merged into {options.model}"
        raise ConfigError("adapter", options.adapter, problem, "it must be safetensors, without code")
    with new_folder(options.out) as folder, ExitStack() as stack:
        scratch = folder.with_name(f"{folder.name}.scratch")
        shutil.rmtree(scratch, ignore_errors=True)  # of a run that was killed
        stack.callback(shutil.rmtree, scratch, ignore_errors=True)
        scratch.mkdir()
        progress(STEP, 0, 100)
        _prune(options, source, folder, scratch, progress)
        progress(STEP, 100, 100)
    return options.out


def _prune(options: PruneOptions, source: str | Path, folder: Path, scratch: Path, progress: Progress) -> None:
    """The way from a source to the verified folder."""
    name = options.model
    given = None if options.adapter is None else adapter_folder(options.adapter)
    source, own = _fetch(options, source, scratch, progress)
    progress(STEP, 25, 100)
    with as_model_error(name, source), quiet(), as_source(source) as found:
        opened = Path(found)
        file = transformer_folder(opened) / CONFIG_NAME
        content = read_json(file) if file.is_file() else {}
        if any(part.get("quantization_config") for part in (content, *content.values()) if isinstance(part, dict)):
            hint = "prune the weights it was quantized from, and quantize the result"
            raise UnsupportedArchitecture(name, "its weights are quantized", hint)
        where: Any = {"device": "cpu", "trust_remote_code": options.trust_remote_code}
        model = load_model(name, opened, options.pooling, options.max_length, **where)
        transformer: PreTrainedModel = model[0].auto_model
        depth, path = len(blocks_of(transformer)), find_stack(transformer).path
        keep = blocks_of_choice(options, depth)
        check_keep(transformer.config, keep)
        origin = origin_of(name, depth, keep, opened / Origin.file, model.left_out)
        progress(STEP, 30, 100)
        merge_adapters(name, transformer)
        gone = [f"{path}.{index}." for index in range(depth) if index not in keep]
        for adapter in (own, given):
            if adapter is not None:
                merge_adapter(transformer, adapter, gone, model.left_out)
        tokens = _cut_tokens(options, model, progress) if options.vocab else None
        with bypassed(transformer, keep), renumbered(model, *tokens[:2]) if tokens else nullcontext():
            complete(name, model, options.pooling or _measured_pooling(options), options.max_length)
            expected = probe(model)
        cut(transformer, keep)
        if tokens:
            kept, tokenizer, record = tokens
            cut_vocabulary(str(name), transformer, kept, options.vocab_multiple)
            model[0].processor = tokenizer
            before = record.tokens if origin.vocabulary is None else origin.vocabulary.tokens
            origin = replace(origin, vocabulary=replace(record, tokens=before))
        check_finite(name, model)
        for path, parameter in transformer.named_parameters() if (scratch / READ).is_dir() else ():
            # Maybe not fetched, though it should have been; but RoBERTa's one type of tokens is zeros.
            if parameter.ndim > 1 and len(parameter) > 1 and not bool(parameter.any()):
                raise ModelError(name, f"{path} has only zeros", "fetch the model (hf download) and give its folder")
    progress(STEP, 60, 100)
    if options.dtype != "auto":
        expected = _convert(model, expected, options.dtype, scratch / "as-stored")
    save_model(model, folder, origin, expected=expected)


def _cut_tokens(
    options: PruneOptions, model: SentenceTransformer, progress: Progress
) -> tuple[tuple[int, ...], PreTrainedTokenizerBase, VocabularyCut]:
    """The ids that stay, ascending, the tokenizer of these, and the record of the cut; the model stays as it is."""
    tasks = {task.name: task for task in map(read_task_folder, options.vocab_tasks)}
    if len(tasks) < len(options.vocab_tasks):
        hint = 'change "name" in one task.json, or rename a folder'
        raise ConfigError("vocab_tasks", options.vocab_tasks, "two tasks have the same name", hint)
    told: Any = {"prompts": model.prompts.values(), "progress": progress}
    counted = count_vocabulary(str(options.model), model.tokenizer, model[0].auto_model, options, **told)
    size = counted.size_of(options)
    kept = counted.kept(size)
    covered = {name: counted.coverage_of(texts_of(task), size) for name, task in tasks.items()}
    return kept, cut_tokenizer(model.tokenizer, kept), replace(counted.cut(size), task_coverage=covered)


def _fetch(options: PruneOptions, source: str | Path, scratch: Path, progress: Progress) -> tuple[Path, Path | None]:
    """The file or folder that is to be opened, and the adapter where the source is one that names its base.

    Of a model on the Hub, the folder has the weights that stay, and zeros for the others.
    """
    adapter, revision, whole = None, options.revision, options.trust_remote_code
    folder = fetch(source, revision, weights=whole) if isinstance(source, str) else source
    if is_adapter(folder):
        source, revision = base_of(folder)
        adapter = adapter_folder(folder)
        folder = fetch(source, revision, weights=whole) if isinstance(source, str) else source
    if isinstance(source, Path) or whole:
        return folder, adapter

    def told(what: str, done: int, total: int) -> None:
        progress(STEP, 25 * done // max(1, total), 100)

    (scratch / READ).mkdir()
    return fetch_kept(source, folder, partial(blocks_of_choice, options), scratch / READ, told), adapter


def _convert(model: SentenceTransformer, expected: np.ndarray, dtype: str, folder: Path) -> np.ndarray:
    """Check a cut model in memory, give its weights another number format, and tell what its folder should give.

    transformers converts, which knows the weights that stay as they are.
    """
    transformer = model[0].auto_model
    with quiet():
        found = float(np.abs(probe(model) - expected).max())
        if not found <= TOLERANCE:
            raise VerificationFailed("the cut model", found, TOLERANCE)
        transformer.save_pretrained(folder)
        model[0].model = type(transformer).from_pretrained(folder, dtype=dtype).eval()
        for module in list(model)[1:]:  # as sentence-transformers will, where it opens the folder
            module.to(next(model[0].parameters()).dtype)
        return probe(model)


def origin_of(
    model: str | Path, depth: int, keep: Sequence[int], earlier: Path, left_out: Sequence[str] = ()
) -> Origin:
    """Where a cut model comes from: what its own ``secateur.json`` (``earlier``) says, continued by this cut."""
    now = provenance()
    if not earlier.is_file():
        return Origin(now, model_label(model), depth, tuple(keep), "", 0.0, (now.command,), left_out=tuple(left_out))
    before = load(earlier, Origin)
    if len(before.kept) != depth:
        problem = f"its {Origin.file} lists {len(before.kept)} layers, but it has {depth}"
        raise ModelError(model, problem, "remove that file if the model was changed by other means")
    kept, history = tuple(before.kept[index] for index in keep), (*before.history, now.command)
    return replace(before, provenance=now, kept=kept, history=history, left_out=(*before.left_out, *left_out))


# ---- which layers stay


def _check_choice(options: PruneOptions) -> None:
    """Refuse choices that do not go together."""
    given = [name for name in ("to", "keep", "drop") if getattr(options, name) is not None]
    if not given and options.vocab:
        return
    if len(given) != 1:
        problem = f"cannot go with {' and '.join(given[1:])}" if given else "is missing, as are keep and drop"
        raise ConfigError(given[0] if given else "to", None, problem, "give exactly one of to, keep and drop")
    said = getattr(options, given[0])
    if isinstance(said, bool) or (options.to is None and not isinstance(said, (str, Sequence))):
        hint = "a number, a share or a selector" if options.to is not None else "layers from 0, such as 0-5,8,11"
        raise ConfigError(given[0], said, f"{said!r} is not valid", hint)
    if options.profile is None:
        return
    if options.to is None or not needs_profile(options.to):
        problem = f"is not asked: {given[0]} {said} tells the layers"
        raise ConfigError("profile", options.profile, problem, "leave it out")
    measured = _measured_pooling(options)
    if options.pooling is not None and measured not in (None, options.pooling):
        problem = f"is {options.pooling}, but the profile was measured with {measured}"
        hint = f"profile with --pooling {options.pooling}, or cut with {measured}"
        raise ConfigError("pooling", options.pooling, problem, hint)


def _measured_pooling(options: PruneOptions) -> Any:
    """The pooling of the profile that tells the layers, if any; a folder has the stock form of the paper's."""
    table = read_table(options.profile) if options.profile is not None else None
    if not isinstance(table, Profile):
        return None
    return "weighted_mean" if table.pooling == "l3prune" else table.pooling


def blocks_of_choice(options: PruneOptions, depth: int) -> tuple[int, ...]:
    """Indices of the layers that stay, of ``depth`` layers."""
    if options.to is not None:
        return blocks_to_keep(options.to, depth, options.profile)
    if options.keep is not None:
        return _parse("keep", options.keep, depth)
    if options.drop is None:
        return tuple(range(depth))
    gone = _parse("drop", options.drop, depth)
    if len(gone) == depth:
        raise ConfigError("drop", options.drop, f"would leave none of the {depth} layers")
    return tuple(i for i in range(depth) if i not in gone)


def _parse(option: str, given: str | Sequence[int], depth: int) -> tuple[int, ...]:
    """``"0-5,8,11"`` → indices."""
    blocks: list[int] = []
    for piece in given.split(",") if isinstance(given, str) else map(str, given):
        match = re.fullmatch(r"\s*([0-9]+)\s*(?:-\s*([0-9]+)\s*)?", piece)
        shown = repr(piece.strip())
        if match is None:
            raise ConfigError(option, given, f"{shown} is no layer and no range of layers", "such as 0-5,8,11")
        first, last = int(match[1]), int(match[2] or match[1])
        if not max(blocks, default=-1) < first <= last < depth:
            hint = f"its layers are 0 to {depth - 1}; name each once, in order"
            raise ConfigError(option, given, f"{shown} is out of range or order", hint)
        blocks += range(first, last + 1)
    if not blocks:
        raise ConfigError(option, given, "names no layer", "such as 0-5,8,11")
    return tuple(blocks)
