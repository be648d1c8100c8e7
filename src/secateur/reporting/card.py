"""The model card of a folder: ``README.md`` with the Hub's metadata, scores among them in its ``model-index``.

Metadata hold what the tables know. The licence is that of the base model, read from its own card where that is on this
machine; without it there is none, rather than a guess.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import try_to_load_from_cache

from secateur.data.hub import is_hub_name, parse_name
from secateur.files import read_json
from secateur.reporting.run import Variant
from secateur.results import Origin, ScoreRow, Training

CARD = "README.md"
CARD_MARK = "<!-- Written by `secateur report`, which replaces it. Remove this line to keep a card of your own. -->"
# Cards that sentence-transformers writes when a model is saved; a person's card is left alone.
GENERATED_MARKS = (CARD_MARK, "This is a [sentence-transformers](https://www.SBERT.net) model")
TAGS = ("sentence-transformers", "feature-extraction", "sentence-similarity", "mteb", "secateur", "pruned")

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_ABSOLUTE = re.compile(r"[/~\\]|[A-Za-z]:[/\\]|\.\.?[/\\]")
_FRONT = re.compile(r"\A---\s*\n(.*?)\n---\s*(?:\n|\Z)", re.DOTALL)


def is_ours(card: Path) -> bool:
    """Whether a card may be written there: none is, or one that a program wrote."""
    if not card.exists():
        return True
    old = card.read_text(encoding="utf-8", errors="replace")
    return any(mark in old for mark in GENERATED_MARKS)


def metadata(variant: Variant, origin: Origin) -> str:
    """The card's front matter, in YAML: base model, library, task, licence, data sets, and scores."""
    base = origin.base_model
    content: dict[str, Any] = {}
    if _is_hub_name(base):
        content |= {"base_model": base, "base_model_relation": "finetune"}
    licence = base_licence(base)
    content |= {"license": licence} if licence else {}
    tags = [tag for tag in TAGS if tag != "mteb" or variant.scores]
    content |= {"pipeline_tag": "sentence-similarity", "library_name": "sentence-transformers", "tags": tags}
    data = _hub_data(variant.training)
    content |= {"datasets": data} if data else {}
    results = [_result(row, variant.results[task]) for task, row in variant.scores.items() if row.score is not None]
    content |= {"model-index": [{"name": variant.name, "results": results}]} if results else {}
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True).strip()


def base_licence(base: str) -> str:
    """The licence in the base model's own card, from its folder or from the Hub's cache; empty where not known."""
    if _is_hub_name(base):
        found = try_to_load_from_cache(base, CARD)
        file = found if isinstance(found, str) else ""
    else:
        file = os.path.join(base, CARD)  # noqa: PTH118
    if not os.path.isfile(file):  # noqa: PTH113  a name that cannot be a path is no file, where Path raises
        return ""
    front = _FRONT.match(Path(file).read_text(encoding="utf-8", errors="replace"))
    try:
        content = yaml.safe_load(front[1]) if front else None
    except yaml.YAMLError:
        return ""
    licence = content.get("license") if isinstance(content, dict) else None
    return licence if isinstance(licence, str) else ""


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
    if not is_path or is_hub_name(text) or _HUB_NAME.fullmatch(text):
        return text
    return re.split(r"[/\\]", text.rstrip("/\\"))[-1] or text


def public_command(command: str) -> str:
    """A command without the folders of this machine."""
    try:
        words = shlex.split(command)
    except ValueError:  # no command of a shell
        words = command.split()
    return shlex.join("=".join(public(part) for part in word.split("=")) for word in words)


def prompts(folder: Path) -> dict[str, str]:
    """Name → prompt, of the prompts that the model folder holds."""
    file = folder / "config_sentence_transformers.json"
    content = read_json(file) if file.exists() else {}
    found = content.get("prompts") if isinstance(content, dict) else None
    return {str(name): str(text) for name, text in found.items() if text} if isinstance(found, dict) else {}


def _is_hub_name(name: str) -> bool:
    return bool(_HUB_NAME.fullmatch(name)) and not name.endswith(".gguf") and not os.path.exists(name)  # noqa: PTH110


def _hub_data(training: Training | None) -> list[str]:
    """Training data that have the form of names on the Hub."""
    files = training.provenance.data if training else ()
    names = [parse_name(file.name).name if is_hub_name(file.name) else file.name for file in files]
    return list(dict.fromkeys(name for name in names if _HUB_NAME.fullmatch(name)))


def _result(row: ScoreRow, place: Path) -> dict[str, Any]:
    """A score as the Hub's model-index has it, in points of 100 as MTEB's cards do."""
    saved = _saved_result(row, place)
    local = not saved or saved.get("dataset_revision") == row.data
    dataset: dict[str, Any] = {"type": _dataset_type(row, local), "name": row.task if local else f"MTEB {row.task}"}
    if saved:
        split, *_ = saved.get("scores") or ["test"]
        dataset |= {"config": "default", "split": split, "revision": str(saved.get("dataset_revision"))}
    if row.sample is not None:
        dataset["args"] = {"sample": row.sample, "seed": row.seed}
    metric = {"type": row.metric, "value": round(100 * row.score, 3), "name": row.metric}
    return {"task": {"type": row.type, "name": row.type}, "dataset": dataset, "metrics": [metric]}


def _saved_result(row: ScoreRow, place: Path) -> Mapping[str, Any]:
    """The file of a score in mteb's own format, where the evaluation left it."""
    folder = place / "mteb" / "results"
    for file in sorted(folder.glob("*/*/*.json")):
        if file.stem == row.task and file.parent.name == row.weights[:12]:
            content = read_json(file)
            return content if isinstance(content, dict) else {}
    return {}


def _dataset_type(row: ScoreRow, local: bool) -> str:
    """The data set's name on the Hub, for mteb's tasks; of local files, the task's name in the form of one."""
    if not local:
        import mteb  # slow to import, and needed only here

        try:
            path = str(mteb.get_task(row.task).metadata.dataset["path"])
        except (KeyError, ValueError):
            path = ""
        if _HUB_NAME.fullmatch(path):  # a mean of tasks has no data set of its own
            return path
    return re.sub(r"[^a-z0-9]+", "-", row.task.lower()).strip("-") or "task"
