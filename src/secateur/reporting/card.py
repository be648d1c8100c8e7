"""The model card of a folder: ``README.md`` with the Hub's metadata, scores among them in its ``model-index``."""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData, metadata_load, try_to_load_from_cache
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from secateur import document as doc
from secateur.data.hub import is_hub_name, parse_name
from secateur.document import Code, Table
from secateur.files import read_json
from secateur.provenance import Fingerprint
from secateur.reporting.findings import Summary
from secateur.reporting.run import JUDGES, POLISHED, Variant
from secateur.reporting.tables import SPEED, cost_table, kept_blocks, kept_tokens, settings_text, training_in_words
from secateur.reporting.verdict import Recommendation, difference_in_words, seed_note, vocabulary_facts
from secateur.results import Origin

CARD = "README.md"
CARD_MARK = "<!-- Written by `secateur report`, which replaces it. Remove this line to keep a card of your own. -->"
TAGS = ("sentence-transformers", "feature-extraction", "sentence-similarity", "mteb", "secateur", "pruned")
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")

_ABSOLUTE = re.compile(r"[/~\\]|[A-Za-z]:[/\\]|\.\.?[/\\]")


def may_write(card: Path) -> bool:
    """Whether there is no card, or one that a report wrote and nobody has made theirs."""
    return not card.exists() or CARD_MARK in card.read_text(encoding="utf-8", errors="replace")


def model_card(summary: Summary, found: Recommendation, variant: Variant, folder: Path, origin: Origin) -> str:
    """The card of a run's model; that of the recommended one says so."""
    comparison = next((item for item in summary.compared.values() if variant in item.group.variants), None)
    full = None
    if comparison:
        others = comparison.reference.variants
        full = next((other for other in others if other.seed == variant.seed), others[0])
    training, typed = variant.training, partial(public_command, run=summary.run.folder)
    content = {
        "metadata": _metadata(variant, origin),
        "mark": CARD_MARK,
        "variant": variant,
        "origin": origin,
        "kept": kept_blocks(origin),
        "tokens": kept_tokens(origin.vocabulary),
        "is_shipped": found.ship is not None and variant in found.ship.group.variants,
        "found": found,
        "prompts": _prompts(folder),
        "costs": _costs(variant, full),
        "machine": summary.run.costs.provenance.hardware if summary.run.costs else {},
        "scores": variant.scores,
        "judge": next((judge for scout in summary.run.scouts if (judge := JUDGES.get(scout.table.judge))), ""),
        # One seed may have been scored on more tasks than the others, and than the full model.
        "full_average": full.average if full and full.scores.keys() == variant.scores.keys() else None,
        "full": full,
        "comparison": comparison,
        "same_settings": training and full and full.training and training.settings == full.training.settings,
        "seeds": seed_note(summary, of_one=True) if training else "",
        "commands": [Code(command, "sh") for command in map(typed, origin.history or (origin.provenance.command,))],
        "scout_command": typed(variant.scout.table.provenance.command) if variant.scout else "",
        "left_out": "" if variant.is_full else "; the layers left out are not replaced",
        "facts": vocabulary_facts(origin.vocabulary, public) if origin.vocabulary else [],
        "data": list(_data_of(variant)),
        "settings": Code(settings_text(training, public), "yaml") if training else None,
    }
    return _ENVIRONMENT.get_template("card.md.j2").render(content)


def _shown(value: object) -> str:
    """What the template writes for a value, which never begins a line: a block as Markdown, all else as no markup."""
    if isinstance(value, (Code, Table)):
        return value.to_markdown()
    return value if isinstance(value, Markup) else doc.to_markdown(str(value), is_line=False)


def templates(**how: Any) -> Environment:
    loader = PackageLoader("secateur.reporting")
    lines: dict[str, Any] = {"trim_blocks": True, "lstrip_blocks": True, "keep_trailing_newline": True}
    return Environment(loader=loader, undefined=StrictUndefined, **lines, **how)  # noqa: S701  said by the callers


_ENVIRONMENT = templates(finalize=_shown)


def in_words(values: Mapping[str, Any]) -> str:
    """``machine x86_64, cores 2``."""
    return ", ".join(f"{key} {value}" for key, value in values.items())


def _prompts(folder: Path) -> dict[str, str]:
    """The prompts that are part of a model, name → text."""
    file = folder / "config_sentence_transformers.json"
    content = read_json(file) if file.exists() else {}
    found = content.get("prompts") if isinstance(content, dict) else None
    return {str(name): str(text) for name, text in found.items() if text} if isinstance(found, dict) else {}


def _costs(variant: Variant, full: Variant | None) -> Table | None:
    if not variant.cost:
        return None
    shown = {"This model": variant.cost} | ({full.name: full.cost} if full and full.cost else {})
    return cost_table([replace(cost, model=name) for name, cost in shown.items()]).transposed()


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
    if not is_path or is_hub_name(text) or is_on_hub(text):
        return text
    return re.split(r"[/\\]", text.rstrip("/\\"))[-1] or text


def public_command(command: str, run: Path) -> str:
    """A command without the folders of this machine, as it is typed in the run folder."""
    places = (f"{run}{os.sep}", f"{run.absolute()}{os.sep}")

    def shown(part: str) -> str:
        inside = next((part.removeprefix(place) for place in places if part.startswith(place)), "")
        return inside or public(part)

    try:
        words = shlex.split(command)
    except ValueError:  # no command of a shell
        words = command.split()
    return shlex.join("=".join(map(shown, word.split("="))) for word in words)


_ENVIRONMENT.filters |= {
    "public": public,
    "in_words": in_words,
    "json": lambda text: doc.printable(json.dumps(text, ensure_ascii=False)),
    "score": doc.score,
}
_ENVIRONMENT.globals |= {
    "difference": difference_in_words,
    "training": training_in_words,
    "interval": doc.span,
    "SPEED": SPEED.rstrip("."),
    "POLISHED": POLISHED,
    "plural": doc.plural,
}


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
    licence = base_metadata(base).get("license")
    return licence if isinstance(licence, str) else ""


def _metadata(variant: Variant, origin: Origin) -> str:
    """The card's front matter, in YAML: base model, library, task, licence, languages, data sets, and scores × 100.

    Licence and languages are those of the base model, read from its own card where that is on this machine; without it
    there are none, rather than a guess. A vocabulary that was cut need not hold all its languages.
    """
    base, own = origin.base_model, base_metadata(origin.base_model)
    link = str(own.get("license_link", ""))
    if link and "://" not in link:  # a file beside the base model
        link = f"https://huggingface.co/{base}/blob/main/{link}" if is_on_hub(base) else ""
    names = [parse_name(file.name).name if is_hub_name(file.name) else file.name for file in _data_of(variant)]
    results = [
        EvalResult(
            task_type=row.type,
            dataset_type=re.sub(r"[^a-z0-9]+", "-", row.task.lower()).strip("-") or "task",
            dataset_name=row.task,
            dataset_args={"sample": row.sample, "seed": row.seed} if row.sample is not None else None,
            metric_type=row.metric,
            metric_value=round(100 * row.score, 3),
        )
        for row in variant.scores.values()
        if row.score is not None
    ]
    return ModelCardData(
        base_model=base if is_on_hub(base) else None,
        base_model_relation="finetune" if is_on_hub(base) else None,
        license=base_licence(base) or None,
        license_name=own.get("license_name"),
        license_link=link or None,
        language=None if origin.vocabulary else own.get("language"),
        pipeline_tag="sentence-similarity",
        library_name="sentence-transformers",
        tags=[tag for tag in TAGS if tag != "mteb" or variant.scores],
        datasets=list(dict.fromkeys(name for name in names if HUB_NAME.fullmatch(name))) or None,
        model_name=variant.name if results else None,
        eval_results=results or None,
    ).to_yaml()
