"""The model card of a folder: ``README.md`` with the Hub's metadata, scores among them in its ``model-index``."""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData, metadata_load, try_to_load_from_cache

from secateur import document as doc
from secateur.data.hub import is_hub_name, parse_name
from secateur.document import Block, Bullets, Code, Section, Text
from secateur.files import read_json
from secateur.provenance import Fingerprint
from secateur.reporting.findings import GroupComparison, Summary
from secateur.reporting.run import POLISHED, Variant
from secateur.reporting.tables import (
    SPEED,
    cost_table,
    kept_blocks,
    kept_tokens,
    settings_text,
)
from secateur.reporting.verdict import Recommendation, difference_in_words, seed_note, vocabulary_facts
from secateur.results import Origin, ScoreRow

CARD = "README.md"
CARD_MARK = "<!-- Written by `secateur report`, which replaces it. Remove this line to keep a card of your own. -->"
# Cards that sentence-transformers writes when a model is saved; a person's card is left alone.
GENERATED_MARKS = (CARD_MARK, "This is a [sentence-transformers](https://www.SBERT.net) model")
TAGS = ("sentence-transformers", "feature-extraction", "sentence-similarity", "mteb", "secateur", "pruned")
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")

_ABSOLUTE = re.compile(r"[/~\\]|[A-Za-z]:[/\\]|\.\.?[/\\]")


def may_write(card: Path) -> bool:
    """Whether there is no card, or one that a program wrote."""
    if not card.exists():
        return True
    old = card.read_text(encoding="utf-8", errors="replace")
    return any(mark in old for mark in GENERATED_MARKS)


def model_card(summary: Summary, found: Recommendation, variant: Variant, folder: Path, origin: Origin) -> str:
    """The card of a run's model; that of the recommended one says so."""
    trained = "trained after the cut" if variant.own_training else "as they came, without training"
    if variant.scout:
        trained = "trained together with other depths" + (", then alone" if variant.recipe == POLISHED else "")
    tokens = f" with {kept_tokens(origin.vocabulary)} tokens" if origin.vocabulary else ""
    about = (
        f"A text encoder: {kept_blocks(origin)} of the {origin.depth} layers of {public(origin.base_model)}{tokens}, "
        f"{trained}. It is a plain sentence-transformers folder: using it does not need secateur."
    )
    head = [f"---\n{_metadata(variant, origin)}\n---", CARD_MARK, f"# {doc.to_markdown(variant.name)}"]
    head.append(doc.to_markdown(about))
    if found.ship and variant in found.ship.group.variants:
        head += [f"**{doc.to_markdown(found.headline)}**", doc.to_markdown(found.reasons[0])]
    comparison = next((item for item in summary.compared.values() if variant in item.group.variants), None)
    full = None
    if comparison:
        others = comparison.reference.variants
        full = next((other for other in others if other.seed == variant.seed), others[0])
    sections = [
        Section("use", "Use", list(_use(folder))),
        Section("costs", "Size and speed", list(_costs(summary, variant, full))),
        Section("scores", "Scores", list(_scores(summary, variant, full, comparison))),
        Section("made", "How it was made", list(_how(variant, origin))),
        Section("limits", "Limits", [Bullets(list(_limits(variant, origin)))]),
    ]
    return "\n\n".join([*head, *(section.to_markdown() for section in sections if section.blocks)]) + "\n"


# Sections -------------------------------------------------------------------------------------------------------------


def _use(folder: Path) -> Iterable[Block]:
    file = folder / "config_sentence_transformers.json"
    content = read_json(file) if file.exists() else {}
    found = content.get("prompts") if isinstance(content, dict) else None
    prompts = {str(name): str(text) for name, text in found.items() if text} if isinstance(found, dict) else {}
    query, document, name = "encode", "encode", ""
    if "query" in prompts or "document" in prompts:
        query, document = "encode_query", "encode_document"
    elif prompts:
        name = f", prompt_name={json.dumps(next(iter(prompts)), ensure_ascii=False)}"
    lines = (
        "from sentence_transformers import SentenceTransformer\n",
        'model = SentenceTransformer("path/to/this/folder")',
        f'queries = model.{query}(["how do I prune a pear tree?"]{name})',
        f'documents = model.{document}(["Cut back the side shoots in winter.", "The train leaves at noon."]{name})',
        "print(model.similarity(queries, documents))",
    )
    yield Code("\n".join(lines), "python")
    if prompts:
        rows = [(name, json.dumps(text, ensure_ascii=False)) for name, text in prompts.items()]
        yield doc.Table("Prompts are part of the model:", ("Name", "Prompt"), rows, 2)


def _costs(summary: Summary, variant: Variant, full: Variant | None) -> Iterable[Block]:
    if not variant.cost:
        return
    shown = {"This model": variant.cost} | ({full.name: full.cost} if full and full.cost else {})
    yield cost_table([replace(cost, model=name) for name, cost in shown.items()]).transposed()
    machine = summary.run.costs.provenance.hardware if summary.run.costs else {}
    yield Text(f"{SPEED[:-1]}, on {', '.join(f'{key} {value}' for key, value in machine.items())}.")


def _scores(
    summary: Summary, variant: Variant, full: Variant | None, comparison: GroupComparison | None
) -> Iterable[Block]:
    if not variant.scores:
        return
    columns = ["Task", "Metric", "Samples", "This model", "95 % interval"]
    rows = [
        [task, row.metric, str(row.samples), doc.score(row.score), doc.span(row.low, row.high) or doc.NONE]
        for task, row in variant.scores.items()
    ]
    rows.append(["Average", "", "", doc.score(variant.average), ""])
    if full:
        # One seed may have been scored on more tasks than the others, and than the full model.
        theirs = [full.scores[task].score if task in full.scores else None for task in variant.scores]
        average = full.average if full.scores.keys() == variant.scores.keys() else None
        columns.append(full.name)
        rows = [[*row, doc.score(score)] for row, score in zip(rows, [*theirs, average], strict=True)]
    yield doc.Table("Each task's own metric, × 100.", columns, rows, 2)
    if full and comparison:
        same = variant.training and full.training and variant.training.settings == full.training.settings
        how = ", trained with the same settings" if same else ""
        yield Text(f"{full.name} is the full model to compare with: all {full.depth} layers{how}.")
        if comparison.difference.low is not None:
            seeds = len(comparison.group.variants)
            over = f", over {doc.plural(seeds, 'training')} with other seeds like this one" if seeds > 1 else ""
            yield Text(f"The average differs by {difference_in_words(comparison)}, paired by text{over}.")
    if variant.training and (note := seed_note(summary)):
        yield Text(note)


def _how(variant: Variant, origin: Origin) -> Iterable[Block]:
    for command in origin.history or (origin.provenance.command,):
        yield Code(public_command(command), "sh")
    facts = [
        f"Layers kept: {kept_blocks(origin)}, of {origin.depth}.",
        f"Pooling: {origin.pooling}.",
        "Largest difference between this folder's vectors and those of the model it was written from: "
        f"{origin.check:.1e}.",
    ]
    facts += vocabulary_facts(origin.vocabulary, public) if origin.vocabulary else []
    training = variant.training
    if variant.scout:
        facts.append(f"Scout: {public_command(variant.scout.table.provenance.command)}")
    if variant.scout and variant.recipe == POLISHED and training:
        facts.append(f"Training continued from {public(training.model)}, which has a scout's weights.")
    if training:
        seed = doc.NONE if training.provenance.seed is None else training.provenance.seed
        facts.append(
            f"Training: {training.steps} steps in {doc.duration(training.seconds)}, "
            f"{doc.count(training.trained_parameters)} parameters trained, seed {seed}."
        )
        facts += [
            f"Training data: {file.name}, {file.rows:,} rows, licence {file.licence or 'not stated'}, "
            f"SHA-256 {file.sha256}."
            for file in _data_of(variant)
        ]
    yield Bullets(facts)
    if training:
        yield Code(settings_text(training, public), "yaml")
    yield Text(f"Made with {', '.join(f'{key} {value}' for key, value in origin.provenance.versions.items())}.")


def _limits(variant: Variant, origin: Origin) -> Iterable[str]:
    """What the model is not for, and what is not known of it."""
    cut = origin.vocabulary
    yield (
        f"The licence and terms of {public(origin.base_model)} apply to this model; those of its training data may "
        "apply, too."
    )
    if cut:
        yield (
            f"Its vocabulary is for texts like those of {', '.join(map(public, cut.files))}. Others, above all in "
            "other languages and scripts, are split into more tokens: they take longer and reach the maximum length "
            "sooner, and quality on them was not measured."
        )
        if cut.row.unknown:
            yield (
                "Its tokenizer does not cover every character: more of such texts is unknown to it than to the base "
                "model."
            )
    yield (
        f"Its biases{'' if cut else ' and its languages'} are those of the base model; the layers left out are not "
        "replaced."
    )
    known = "Its quality is known on the tasks above only" if variant.scores else "It has not been evaluated"
    yield f"{known}: measure it on your own data before you rely on it."
    if not (variant.own_training or (variant.training and variant.is_full)):
        yield "It has not been trained after the cut."


def _data_of(variant: Variant) -> Iterable[Fingerprint]:
    """Files that the weights were trained on: its own training's, and the scout's."""
    trainings = [variant.training, variant.scout.training if variant.scout else None]
    return dict.fromkeys(file for training in trainings if training for file in training.provenance.data)


# What may be published ------------------------------------------------------------------------------------------------


def public(value: Any) -> Any:
    """A value as a card may publish it: of a path on this machine the last name alone, wherever it stands in it."""
    if isinstance(value, Mapping):
        return {key: public(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [public(item) for item in value]
    if not isinstance(value, (str, Path)):
        return value
    text = str(value)
    is_path = bool(_ABSOLUTE.match(text)) or ("/" in text and not re.search(r"\s|://", text))
    if not is_path or is_hub_name(text) or HUB_NAME.fullmatch(text):
        return text
    return re.split(r"[/\\]", text.rstrip("/\\"))[-1] or text


def public_command(command: str) -> str:
    """A command without the folders of this machine."""
    try:
        words = shlex.split(command)
    except ValueError:  # no command of a shell
        words = command.split()
    return shlex.join("=".join(public(part) for part in word.split("=")) for word in words)


# Metadata of a card ---------------------------------------------------------------------------------------------------


def is_on_hub(model: str) -> bool:
    """Whether a model's name is one of the Hub's, and nothing on this machine."""
    return bool(HUB_NAME.fullmatch(model)) and not model.endswith(".gguf") and not os.path.exists(model)  # noqa: PTH110


def base_metadata(base: str) -> dict[str, Any]:
    """What the base model's own card says, in its folder or in the Hub's cache; empty where there is none."""
    found = try_to_load_from_cache(base, CARD) if is_on_hub(base) else os.path.join(base, CARD)  # noqa: PTH118
    if not isinstance(found, str) or not os.path.isfile(found):  # noqa: PTH113  where Path raises, this is false
        return {}
    try:
        return metadata_load(found) or {}
    except (ValueError, yaml.YAMLError):  # no metadata, or broken ones
        return {}


def base_licence(base: str) -> str:
    """The licence in the base model's own card; empty where not known."""
    licence = base_metadata(base).get("license")
    return licence if isinstance(licence, str) else ""


def _metadata(variant: Variant, origin: Origin) -> str:
    """The card's front matter, in YAML: base model, library, task, licence, languages, data sets, and scores.

    Licence and languages are those of the base model, read from its own card where that is on this machine; without it
    there are none, rather than a guess. A vocabulary that was cut need not hold all its languages.
    """
    base = origin.base_model
    own = base_metadata(base)
    link = str(own.get("license_link", ""))
    if link and "://" not in link:  # a file beside the base model
        link = f"https://huggingface.co/{base}/blob/main/{link}" if is_on_hub(base) else ""
    names = [file.name for file in _data_of(variant)]
    names = [parse_name(name).name if is_hub_name(name) else name for name in names]
    data = dict.fromkeys(name for name in names if HUB_NAME.fullmatch(name))
    results = [_result(row, variant.results[task]) for task, row in variant.scores.items() if row.score is not None]
    content = ModelCardData(
        base_model=base if is_on_hub(base) else None,
        base_model_relation="finetune" if is_on_hub(base) else None,
        license=base_licence(base) or None,
        license_name=own.get("license_name"),
        license_link=link or None,
        language=None if origin.vocabulary else own.get("language"),
        pipeline_tag="sentence-similarity",
        library_name="sentence-transformers",
        tags=[tag for tag in TAGS if tag != "mteb" or variant.scores],
        datasets=list(data) or None,
        model_name=variant.name if results else None,
        eval_results=results or None,
    )
    return content.to_yaml()


def _result(row: ScoreRow, place: Path) -> EvalResult:
    """A score in points of 100 as in MTEB's cards, with split and revision from mteb's own file where that was kept."""
    files = sorted((place / "mteb" / "results").glob("*/*/*.json"))
    own = (file for file in files if file.stem == row.task and file.parent.name == row.weights[:12])
    saved: Any = next(map(read_json, own), None)
    saved = saved if isinstance(saved, dict) else {}
    is_local = not saved or saved.get("dataset_revision") == row.data
    return EvalResult(
        task_type=row.type,
        task_name=row.type,
        dataset_type=_dataset_type(row, is_local),
        dataset_name=row.task if is_local else f"MTEB {row.task}",
        dataset_config="default" if saved else None,
        dataset_split=next(iter(saved.get("scores") or ["test"])) if saved else None,
        dataset_revision=str(saved.get("dataset_revision")) if saved else None,
        dataset_args={"sample": row.sample, "seed": row.seed} if row.sample is not None else None,
        metric_type=row.metric,
        metric_name=row.metric,
        metric_value=round(100 * row.score, 3),
    )


def _dataset_type(row: ScoreRow, is_local: bool) -> str:
    """The data set's name on the Hub, for mteb's tasks; of local files, the task's name in the form of one."""
    if not is_local:
        import mteb  # slow to import, and needed only here

        try:
            path = str(mteb.get_task(row.task).metadata.dataset["path"])
        except (KeyError, ValueError):
            path = ""
        if HUB_NAME.fullmatch(path):  # a mean of tasks has no data set of its own
            return path
    return re.sub(r"[^a-z0-9]+", "-", row.task.lower()).strip("-") or "task"
