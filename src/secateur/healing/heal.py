"""A cut model → a healed one: trained on pairs or on unlabelled texts, and written as a plain model folder.

What is trained is the folder's own pooling and length rules, and its default prompt where the data bring no
instruction (:func:`.set_prompts`); the written folder has the prompts of the training, so that training and use agree.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import get_rank

from secateur.data.sources import Source, read_sources
from secateur.data.vectors import fingerprint_model
from secateur.errors import ConfigError, OutputError
from secateur.files import DONE, empty_folder, lock, output_errors, partial_folder, rename_into_place
from secateur.healing.losses import Loss, check_dims, set_dropout
from secateur.healing.processes import barrier, init_processes, is_sharded
from secateur.healing.recipes import ADAPTERS, TrainingConfig, decide, training_config
from secateur.healing.teacher import Teacher, open_teacher, teach
from secateur.healing.trainer import check_tracker, train
from secateur.healing.training_data import (
    TrainingSet,
    check_room,
    read_excluded,
    read_held_out,
    set_prompts,
    training_sets,
)
from secateur.models import model_label, resolve
from secateur.models.blocks import depth_of
from secateur.models.open_model import fetch, make_bidirectional, open_model
from secateur.models.save import save_model
from secateur.options import HealOptions
from secateur.options.base import step
from secateur.profiling.depths import check_depths
from secateur.progress import Progress, silent
from secateur.provenance import Made, provenance, read_record
from secateur.pruning.adapters import merge_adapters
from secateur.pruning.prune import origin_of
from secateur.results import Origin, Training


@step(HealOptions)
@torch.inference_mode(False)  # whatever a notebook has switched off for all its cells
@torch.enable_grad()
def heal(options: HealOptions, *, progress: Progress = silent) -> Path:
    """Train a model on pairs, on unlabelled texts, or by a teacher, and write it as a plain model folder.

    A training that was killed is resumed from its last checkpoint when the same command runs again, on the same model
    and data. Started by ``torchrun`` or ``accelerate launch``, all processes train one model, and the first writes it.

    Returns:
        ``out``: reopened in a fresh process and compared, with ``training.json`` beside the model.

    Raises:
        ModelError, DataError, ConfigError: Bad input; ``out`` was begun with other settings; or nothing is learned.
        OutputError: ``out`` is not empty or cannot be written; or another run is writing it.
        TrainingDiverged: The loss is not finite, or exploded.
        VerificationFailed: The written folder gives other vectors.
    """
    partial_folder(options.out)
    excluded = read_excluded(options.exclude)
    sources, left_out = excluded.leave_out(read_sources(options.data, options.instruction, options.columns))
    config = training_config(options, sources)
    check_tracker(options.report_to)
    init_processes(config, scored=bool(options.eval_data or options.eval_tasks))
    sets, notes = training_sets(sources, config)
    held_out = read_held_out(options)
    model, teacher = _open_models(options, config)
    config = decide(model, replace(config, train="blocks") if is_sharded() and config.train == "auto" else config)
    notes += _without_effect(options, config)
    default = str(model.prompts.get(model.default_prompt_name or "") or "") if options.instruction is None else ""
    # Not for the teacher, which has a default prompt of its own.
    own_sets = [replace(s, prompts=s.prompts or {c: default for c in s.rows.column_names if default}) for s in sets]
    check_room(model, own_sets, config.max_length)
    origin = _origin(options, model)
    sources = [source for source in sources if source.name in {item.source for item in sets}]
    prompts = set_prompts(model, sources, default)
    judges = held_out.settings() | {"exclude": [{"name": t.name, "sha256": t.sha256} for t in excluded.tasks]}
    made = _made_from(options, config, model, sources, own_sets, judges, teacher)
    settings = _settings(options, made, own_sets, teacher) | judges
    settings |= {"objective": config.objective, "notes": [*left_out, *notes]}
    with output_errors(options.out), locked_folder(options.out) as folder:
        if get_rank() == 0 and not check_resume(folder, made):
            made.record(folder)
        barrier()
        check_shared(folder, made)
        cache = options.cache or folder / "teacher"
        taught, vectors = teach(sets, config, teacher, cache, progress) if teacher else (sets, None)
        own_sets = [replace(own, rows=item.rows) for own, item in zip(own_sets, taught, strict=True)]
        teacher = None  # its weights are not needed any more
        score = held_out.score if held_out.pairs or held_out.tasks else None
        loss, place = partial(Loss, teacher=vectors), folder / "checkpoints"
        set_dropout(model, config)
        result = train(model, own_sets, config, place, loss, score, report_to=options.report_to, progress=progress)
        if get_rank() == 0:
            data = provenance([source.source for source in sources], options.seed)
            name = model_label(options.model)
            table = Training(provenance=data, model=name, settings=settings, prompts=prompts, **vars(result))
            _write(model, origin, table, place, folder / "model")
            rename_into_place(folder / "model", options.out)
            shutil.rmtree(folder)
        barrier()
    return options.out


def _without_effect(options: HealOptions, config: TrainingConfig) -> list[str]:
    """A note on options of adapters, where ``auto`` has decided on none."""
    idle = [key for key in ADAPTERS if getattr(options, key) is not None] if config.train != "lora" else []
    said = f"without effect, for the weights are trained themselves (train {config.train})"
    return [f"{', '.join(idle)}: {said}"] if idle else []


def _settings(options: HealOptions, made: Made, sets: Sequence[TrainingSet], teacher: Teacher | None) -> dict[str, Any]:
    """What the training's table says of its options."""
    idle = [*(() if teacher else ("teacher_weight", "distill")), *(() if made.options["depths"] else ("layers",))]
    idle += () if made.options["train"] == "lora" else ADAPTERS
    settings = {k: v for k, v in made.options.items() if k not in idle}
    settings |= {"data": {item.name: len(item.rows) for item in sets}, "instruction": options.instruction}
    if teacher:
        settings |= {"teacher": str(options.teacher), "teacher_fingerprint": teacher.fingerprint}
    return settings


def _open_models(options: HealOptions, config: TrainingConfig) -> tuple[SentenceTransformer, Teacher | None]:
    """The model that is trained, and the teacher, who reads as much of a text."""
    device = "cpu" if is_sharded() else options.device  # FSDP moves a layer at a time to its device
    model = open_model(options.model, device=device, trust_remote_code=options.trust_remote_code)
    merge_adapters(options.model, model[0].auto_model)
    if config.depths:
        check_depths(model, config.depths, layers=config.layers)
    elif options.layers is not None:
        raise ConfigError("layers", options.layers, "no smaller depth is trained", "give --depths, or leave it out")
    check_dims(model, config.dims)
    length = min(config.max_length, model.max_seq_length or config.max_length)
    teacher = open_teacher(options, length) if options.teacher is not None else None
    if options.bidirectional:
        make_bidirectional(model, options.model)
    return model, teacher


def _made_from(
    options: HealOptions,
    config: TrainingConfig,
    model: SentenceTransformer,
    sources: Sequence[Source],
    sets: Sequence[TrainingSet],
    judges: Mapping[str, Sequence[Mapping[str, Any]]],
    teacher: Teacher | None,
) -> Made:
    """All that decides on the numbers of a training; what has a name is known by its content."""
    own = {"bidirectional": options.bidirectional, "eval_sample": options.eval_sample, "columns": options.columns or {}}
    inputs: dict[str, Any] = {
        "model": fingerprint_model(model),
        "data": [source.source.sha256 for source in sources],
        "rows": [len(item.rows) for item in sets],
        "prompts": [dict(item.prompts) for item in sets],
        "teacher": teacher.fingerprint if teacher else "",
    }
    for key in ("eval_data", "eval_tasks"):
        inputs[key] = [{k: v for k, v in item.items() if k not in ("name", "licence")} for item in judges[key]]
    if judges["exclude"]:
        inputs["exclude"] = [item["sha256"] for item in judges["exclude"]]
    return Made("heal", asdict(config) | own, inputs)


@contextmanager
def locked_folder(out: Path) -> Iterator[Path]:
    """Within: no other run trains for ``out``. Yields the folder to work in, which the first process locks for all."""
    folder = partial_folder(out)
    barrier()  # or a late process would find what the first one wrote
    with ExitStack() as stack:
        if get_rank() == 0:
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(lock(folder))
            partial_folder(out)  # another run may have finished meanwhile
        yield folder


def check_shared(folder: Path, made: Made) -> None:
    """Refuse (:class:`.OutputError`) processes that train something else than what the first has recorded in a folder,
    or do not see it: each would go on from a step of its own.
    """
    changes = made.changes_since(folder)
    if changes:
        problem = f"the first process has other {', '.join(changes)}"
        raise OutputError(folder, problem, "all machines need the same model, data and versions")
    if changes is None:
        hint = "name a folder that all machines share with --out; if they do, start again: the disk was late"
        raise OutputError(folder, "does not hold what the first process has written", hint)


def check_resume(
    folder: Path,
    made: Made,
    what: str = "an unfinished training",
    held: Sequence[str] = ("checkpoints/checkpoint-*",),
) -> bool:
    """Whether a folder holds a result of the same, to go on with; false where it has none of the files ``held``.

    Raises:
        ConfigError: It is made from something else.
    """
    changes = made.changes_since(folder)
    if changes == []:
        return True
    if not any(next(folder.glob(pattern), None) for pattern in held):
        return False
    before = read_record(folder / DONE)["options"] if changes else {}
    told = [f"{key} was {before.get(key)}, is {made.options[key]}" for key in changes or () if key in made.options]
    told += [f"other {key}" for key in changes or () if key not in made.options]
    problem = f"{folder} holds {what} with other settings ({'; '.join(told) or 'begun by an earlier version'})"
    raise ConfigError("out", str(folder), problem, "remove it, or name another --out")


def _origin(options: HealOptions, model: SentenceTransformer) -> Origin:
    """Where the model comes from, by the file in its folder, be it here or on the Hub."""
    source, kept = resolve(options.model), range(depth_of(model[0].auto_model))
    folder = fetch(source, weights=False) if isinstance(source, str) else source
    return origin_of(options.model, len(kept), kept, folder / Origin.file, model.left_out)


def _write(model: SentenceTransformer, origin: Origin, table: Training, place: Path, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    empty_folder(folder)
    save_model(model, folder, origin)
    table.save(folder)
    if (place / "runs").is_dir():  # TensorBoard's; in a model's folder the Hub shows them, too
        shutil.copytree(place / "runs", folder / "runs")
