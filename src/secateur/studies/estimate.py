"""How long a study will take: operations counted, divided by this machine's measured rate, then corrected as it goes.

An estimate, and called one wherever it is shown. A forward pass costs 2 operations for each weight that a token runs
through; a training step costs three forward passes. What is not arithmetic (opening models, checking them in fresh
processes) is a constant for each kind of step. Once steps have finished, those that are left are multiplied by what
the finished ones of their kind took, divided by what was foretold.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig

from secateur.data.pairs import Pairs
from secateur.data.texts import Texts
from secateur.evaluation.task_folder import read_task_folder, sample_task, texts_of
from secateur.models import resolve
from secateur.models.blocks import blocks_of, depth_of, skeleton
from secateur.models.open_model import as_model_error, open_model
from secateur.options import ProfileOptions, StudyOptions, default_of
from secateur.progress import quiet
from secateur.pruning.download import fetch_small, transformer_folder
from secateur.studies.plan import Base, Plan, Step, numbers_of

CHARACTERS_PER_TOKEN = 4
BACKWARD = 2
"""A backward pass costs as much as so many forward passes."""

FIXED_SECONDS = {"prune": 12.0, "profile": 5.0, "heal": 15.0, "evaluate": 6.0, "cost": 5.0}
BYTES_PER_SECOND = 200e6
COST_TOKENS = 10_000
"""Tokens that the timing of one model encodes, about."""

SMALL_FOLDER = 2 << 30
"""A folder of fewer bytes is opened to see that it is whole; of a larger one, the configuration has to do."""


@dataclass(frozen=True)
class Amounts:
    """How much there is to do, and how fast this machine is.

    Attributes:
        flops_per_second: Of a matrix product.
        rows: Of the data.
        texts_per_row: 2, or more with negatives; 1 for texts alone.
        tokens_per_text: Guessed from the characters.
        task_tokens: Tokens of all tasks together; None where one is not here yet.
    """

    flops_per_second: float
    rows: int
    texts_per_row: float
    tokens_per_text: float
    task_tokens: float | None


def measure_base(name: str, model: str) -> Base:
    """How many blocks a model has, and how large they are.

    Raises:
        ModelError, UnsupportedArchitecture: It cannot be opened or cut.
    """
    source = resolve(model)
    if isinstance(source, Path) and source.suffix == ".gguf":
        with as_model_error(model), quiet():
            transformer = skeleton(AutoConfig.from_pretrained(source.parent, gguf_file=source.name))
    elif isinstance(source, Path) and _size(source) < SMALL_FOLDER:
        transformer = open_model(model, device="cpu")[0].auto_model
    else:
        with as_model_error(model), quiet():
            folder = source if isinstance(source, Path) else fetch_small(source)
            transformer = skeleton(AutoConfig.from_pretrained(transformer_folder(folder)))
    blocks = sum(parameter.numel() for parameter in blocks_of(transformer).parameters())
    looked_up = [part for part in transformer.modules() if isinstance(part, nn.Embedding)]
    tables = sum(parameter.numel() for part in looked_up for parameter in part.parameters())
    whole = sum(parameter.numel() for parameter in transformer.parameters())
    depth = depth_of(transformer)
    return Base(name, model, depth, blocks // depth, max(0, whole - blocks - tables), 4 * whole)


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*.safetensors"))


def measure_amounts(study: StudyOptions, sources: Sequence[Pairs | Texts]) -> Amounts:
    """Count the texts of a study, and time a matrix product."""
    texts: list[str] = []
    for source in sources:
        for row in source.rows:
            texts += [row] if isinstance(row, str) else [row.anchor, row.positive, *row.negatives]
    rows = sum(len(source.rows) for source in sources)
    return Amounts(
        flops_per_second=_flops_per_second(),
        rows=rows,
        texts_per_row=len(texts) / max(1, rows),
        tokens_per_text=_tokens(texts) / max(1, len(texts)),
        task_tokens=_task_tokens(study),
    )


def _tokens(texts: Sequence[str]) -> float:
    return sum(map(len, texts)) / CHARACTERS_PER_TOKEN + len(texts)


def _task_tokens(study: StudyOptions) -> float | None:
    if not all(Path(task).exists() for task in study.tasks):
        return None
    tokens = 0.0
    for task in study.tasks:
        folder = read_task_folder(task)
        tokens += _tokens(texts_of(sample_task(folder, study.sample, study.seed) if study.sample else folder))
    return tokens


def _flops_per_second(size: int = 768, seconds: float = 0.2) -> float:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    matrix = torch.randn(size, size, device=device)
    float((matrix @ matrix).sum())  # warm
    started, products = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        float((matrix @ matrix).sum())  # asking for a number waits for the device
        products += 1
    return 2 * size**3 * products / (time.perf_counter() - started)


def estimate(plan: Plan, bases: Sequence[Base], amounts: Amounts) -> dict[str, float | None]:
    """Step → seconds that it will take, about; None where nobody knows."""
    by_name = {base.name: base for base in bases}
    return {step.name: _seconds(step, plan, by_name, amounts) for step in plan.steps}


def _seconds(step: Step, plan: Plan, bases: Mapping[str, Base], amounts: Amounts) -> float | None:
    fixed = FIXED_SECONDS[step.kind]
    if step.kind == "cost":
        made = [(bases[v.base], len(v.blocks) if v.blocks is not None else v.depth) for v in plan.variants]
        flops = sum(COST_TOKENS * _forward(base, blocks) for base, blocks in made)
        return fixed * len(made) + flops / amounts.flops_per_second
    base = bases[step.base]
    if step.kind == "prune":
        return fixed + 4 * base.bytes / BYTES_PER_SECOND
    tokens = _work(step, amounts)
    return None if tokens is None else fixed + tokens * _forward(base, step.blocks) / amounts.flops_per_second


def _forward(base: Base, blocks: int) -> float:
    """Operations for one token."""
    return 2.0 * (blocks * base.block_parameters + base.other_parameters)


def _work(step: Step, amounts: Amounts) -> float | None:
    """Tokens of a step, each counted as often as the forward passes that its work is worth."""
    given = step.options
    if step.kind == "profile":
        examples = given.get("max_examples", default_of(ProfileOptions, "max_examples"))
        pairs = float(min(examples, amounts.rows) * amounts.texts_per_row * amounts.tokens_per_text)
        if not given.get("tasks"):
            return pairs
        return None if amounts.task_tokens is None else pairs + amounts.task_tokens
    if step.kind == "evaluate":
        return amounts.task_tokens
    numbers = numbers_of(given)
    tokens = min(amounts.tokens_per_text, numbers.max_length)
    rows = numbers.steps * numbers.batch_size
    return float(rows * amounts.texts_per_row * tokens * (1 + BACKWARD))


def corrected(
    estimates: Mapping[str, float | None], kinds: Mapping[str, str], seconds: Mapping[str, float]
) -> dict[str, float | None]:
    """Estimates after what the finished steps took.

    Args:
        estimates: Step → seconds foretold.
        kinds: Step → its kind.
        seconds: Finished step → seconds taken.

    Returns:
        Step → its seconds where it is finished, else its estimate times the factor of its kind (of all kinds, where
        none of its kind has finished).
    """
    told = {name: value for name in seconds if (value := estimates.get(name))}

    def factor(names: Sequence[str]) -> float | None:
        foretold = sum(told[name] for name in names)
        return sum(seconds[name] for name in names) / foretold if foretold else None

    overall = factor(list(told)) or 1.0
    by_kind = {kind: factor([name for name in told if kinds.get(name) == kind]) for kind in set(kinds.values())}
    return {
        name: seconds[name] if name in seconds else value and value * (by_kind.get(kinds[name]) or overall)
        for name, value in estimates.items()
    }
