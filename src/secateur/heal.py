"""A cut model → a healed one: trained on pairs, adapters merged, written as a plain model folder.

What is trained is the folder's own pooling, prompt and length rules, so that training and use cannot differ.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from secateur.artifacts import (
    Training,
    give_name,
    partial_folder,
    provenance,
    read_json,
    write_text,
    writing,
)
from secateur.blocks import depth_of
from secateur.data import Pairs, read_pairs
from secateur.errors import OutputError
from secateur.models import model_label, open_model, save_model, use_stock_modules
from secateur.progress import Progress, silent
from secateur.prune import origin_of
from secateur.train import Recipe, train, training_sets

DEFAULTS = Recipe()


def heal(
    model: str | Path,
    data: str | Path | Pairs | Sequence[str | Path | Pairs],
    *,
    steps: int = DEFAULTS.steps,
    batch_size: int = DEFAULTS.batch_size,
    learning_rate: float = DEFAULTS.learning_rate,
    scale: float = DEFAULTS.scale,
    max_length: int = DEFAULTS.max_length,
    lora_rank: int = DEFAULTS.lora_rank,
    lora_alpha: int = DEFAULTS.lora_alpha,
    lora_dropout: float = DEFAULTS.lora_dropout,
    gradient_checkpointing: bool = DEFAULTS.gradient_checkpointing,
    precision: str = DEFAULTS.precision,
    seed: int = DEFAULTS.seed,
    instruction: str | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
    out: str | Path,
    progress: Progress = silent,
) -> Path:
    """Train a model on (anchor, positive, negative) data and write it as a plain model folder.

    The defaults are the paper's recipe (:class:`secateur.train.Recipe`). A training that was killed goes on from its
    last checkpoint when the same command runs again.

    Args:
        model: A model folder, usually a pruned one; or anything :func:`secateur.models.open_model` opens.
        data: Data files (see :mod:`secateur.data`); their instructions become the model's prompts.
        steps: Optimizer steps; the learning rate rises over the first 30 % and falls linearly to 0.
        batch_size: Pairs per step.
        learning_rate: Peak of the schedule.
        scale: Inverse temperature of the loss.
        max_length: Tokens per text while training.
        lora_rank: Rank of the adapters, on every linear layer of the blocks.
        lora_alpha: Their scale times the rank.
        lora_dropout: Dropout before them.
        gradient_checkpointing: Compute activations twice to save memory; the numbers stay the same.
        precision: ``float32``, ``bfloat16`` (autocast), or ``auto``: bfloat16 where the processor computes in it.
        seed: Of adapters, dropout and the order of the data.
        instruction: Goes before each anchor, in place of those that come with the data.
        device: Torch device.
        trust_remote_code: As for ``open_model``.
        out: The folder to write; it must not hold anything yet.
        progress: Told after each step.

    Returns:
        ``out``: reopened in a fresh process and compared, with ``training.json`` beside the model.

    Raises:
        ModelError, DataError, ConfigError, OutputError: Bad input.
        TrainingDiverged: The loss is not finite.
        VerificationFailed: The written folder gives other vectors.
    """
    recipe = Recipe(
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        scale=scale,
        max_length=max_length,
        lora_rank=lora_rank,
        lora_alpha=lora_alpha,
        lora_dropout=lora_dropout,
        gradient_checkpointing=gradient_checkpointing,
        precision=precision,
        seed=seed,
    )
    files = [data] if isinstance(data, (str, Path, Pairs)) else list(data)
    sources = [item if isinstance(item, Pairs) else read_pairs(item, instruction=instruction) for item in files]
    sets = training_sets(sources, batch_size)
    settings = asdict(recipe) | {"data": {item.name: len(item.rows) for item in sets}}
    partial = _claim(Path(out), model, settings, sources)
    opened = open_model(model, device=device, trust_remote_code=trust_remote_code)
    use_stock_modules(opened)
    opened.prompts.update(model_prompts(sources))
    with writing(out):
        outcome = train(opened, sets, recipe, partial / "checkpoints", progress)
        finished = _empty(partial / "model")
        depth = depth_of(opened[0].auto_model)
        save_model(opened, finished, origin_of(model, depth, range(depth)))
        table = Training(
            provenance=provenance([pairs.source for pairs in sources], seed),
            model=model_label(model),
            steps=steps,
            seconds=outcome.seconds,
            trained_parameters=outcome.trained_parameters,
            settings=settings,
            prompts=model_prompts(sources),
            losses=outcome.losses,
        )
        table.save(finished)
        give_name(finished, Path(out))
        shutil.rmtree(partial)
    return Path(out)


def model_prompts(sources: Sequence[Pairs]) -> dict[str, str]:
    """The prompts that stay with a model: by data set, and as ``query`` and ``document`` where all data agree."""
    prompts = {pairs.name: pairs.prompt for pairs in sources if pairs.prompt}
    queries, passages = ({pairs.prompt for pairs in sources}, {pairs.passage_prompt for pairs in sources})
    if len(queries) == len(passages) == 1:
        prompts |= {"query": queries.pop(), "document": passages.pop()}
    return prompts


def _claim(out: Path, model: str | Path, settings: dict[str, Any], sources: Sequence[Pairs]) -> Path:
    """The folder that a training works in; one that an equal training left unfinished is taken up again."""
    partial = partial_folder(out)
    wanted = json.loads(json.dumps({"model": str(model), **settings, "sha256": [p.source.sha256 for p in sources]}))
    note = partial / "training.json"
    if note.is_file() and read_json(note) != wanted:
        raise OutputError(
            partial, "holds an unfinished training with other settings", "remove it, or name another --out"
        )
    if not note.is_file():
        shutil.rmtree(partial, ignore_errors=True)
        write_text(note, json.dumps(wanted, indent=1))
    return partial


def _empty(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder
