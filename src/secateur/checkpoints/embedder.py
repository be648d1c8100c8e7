"""What a sentence-transformers folder has around its transformer: which modules, and the files that make them up."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from secateur.checkpoints.shards import Source, check_relative, read_json
from secateur.checkpoints.sources import Folder
from secateur.errors import ModelError, UnsupportedArchitecture

MODULES = "modules.json"
ROOT_FILES = (MODULES, "config_sentence_transformers.json")
TRANSFORMER_FILES = ("sentence_bert_config.json", "sentence_roberta_config.json", "sentence_xlm-roberta_config.json")
# On the Hub, where there is no listing: what sentence-transformers writes for a module.
MODULE_FILES = ("config.json", "model.safetensors")
COPIED = frozenset({".json", ".safetensors", ".txt"})
PICKLE = "pytorch_model.bin"
CONFIGURED = frozenset({"Pooling", "Dense", "LayerNorm"})


@dataclass(frozen=True)
class Embedder:
    """Folders, in that of the model, of its ``transformer`` (empty where it is the same) and of the ``others``."""

    transformer: str
    others: tuple[str, ...]


def read_embedder(source: Source) -> Embedder | None:
    """The modules of a sentence-transformers model; None for a bare transformer.

    Raises:
        ModelError: Its list of modules is broken, or the transformer is in a folder of its own on the Hub.
        UnsupportedArchitecture: It does not begin with a transformer, or brings code along.
    """
    file = source.find(MODULES)
    if file is None:
        return None
    modules = read_json(file)
    if not isinstance(modules, list) or not modules or not all(map(_is_module, modules)):
        raise ModelError(source.where(MODULES), "is not a list of modules, each with a type and a path")
    for module in modules:
        if not module["type"].startswith("sentence_transformers."):
            hint = "--trust-remote-code runs it, and opens the model whole"
            raise UnsupportedArchitecture(source.name, f"its module {module['type']} is code of its own", hint)
        if module["path"]:
            check_relative(module["path"], source.where(MODULES))
    kind = modules[0]["type"].rpartition(".")[2]
    if kind != "Transformer":
        raise UnsupportedArchitecture(source.name, f"it begins with a {kind}, not with a transformer")
    for module in modules[1:]:
        if module["type"].rpartition(".")[2] in CONFIGURED and source.find(f"{module['path']}/config.json") is None:
            raise ModelError(
                source.where(module["path"]), "has no config.json", "the model is incomplete: fetch it again"
            )
    if modules[0]["path"] and not isinstance(source, Folder):
        problem = f"keeps its transformer in {modules[0]['path']}"
        raise ModelError(source.name, problem, "fetch it (hf download) and give the folder")
    return Embedder(modules[0]["path"], tuple(module["path"] for module in modules[1:]))


def _is_module(module: object) -> bool:
    return isinstance(module, dict) and all(isinstance(module.get(key), str) for key in ("type", "path"))


def copy_modules(source: Source, embedder: Embedder, out: Path) -> None:
    """Copy all but the transformer, as it is; never code, never pickles.

    Raises:
        ModelError: A module has its weights as a pickle only.
    """
    files = [*ROOT_FILES, *(_inside(embedder.transformer, name) for name in TRANSFORMER_FILES)]
    for place in embedder.others:
        files += _files(source, place)
    for name in files:
        found = source.find(name)
        if found is not None:
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(found, out / name)


def _files(source: Source, place: str) -> list[str]:
    pickle, weights = _inside(place, PICKLE), _inside(place, "model.safetensors")
    if place and source.exists(pickle) and not source.exists(weights):
        hint = "open it with sentence-transformers and save it again"
        raise ModelError(source.where(pickle), "are weights that only PyTorch can read", hint)
    if not isinstance(source, Folder):
        return [_inside(place, name) for name in MODULE_FILES] if place else []
    folder = source.root / place
    present = sorted(folder.iterdir()) if place and folder.is_dir() else []
    return [_inside(place, file.name) for file in present if file.suffix in COPIED]


def _inside(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name
