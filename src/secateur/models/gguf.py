"""A GGUF file as a plain transformers folder."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers

from secateur.errors import ModelError


def convert_gguf(file: Path, folder: Path) -> None:
    """Write a GGUF file as a transformers folder: float32 safetensors and the tokenizer.

    transformers refuses to save a model that it read from GGUF, even dequantized; so its weights are moved into a
    fresh model of the same configuration.

    Raises:
        ModelError: The package ``gguf`` is not installed.
    """
    if importlib.util.find_spec("gguf") is None:
        raise ModelError(file, "is a GGUF file", "pip install 'secateur[gguf]'")
    where = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    with _parsed_once():
        read, found = transformers.AutoModel.from_pretrained(**where, dtype=torch.float32, output_loading_info=True)
        tokenizer = transformers.AutoTokenizer.from_pretrained(**where)
    if found["missing_keys"]:
        raise ModelError(file, f"has no weights for {min(found['missing_keys'])}", "fetch or convert it again")
    config = read.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        fresh = type(read)(config)
    # Buffers that are not saved (rotary frequencies) are not in the state, and come with the modules that own them.
    fresh.load_state_dict(read.state_dict(), assign=True)
    fresh.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@contextmanager
def _parsed_once() -> Iterator[None]:
    """Within: a file is parsed once. transformers does it for the configuration, the weights and the tokenizer anew,
    and with a vocabulary of 50,000 words each time takes seconds.
    """
    gguf: Any = importlib.import_module("gguf")
    with _parsing:
        reader = gguf.GGUFReader
        gguf.GGUFReader = functools.cache(reader)
        try:
            yield
        finally:
            gguf.GGUFReader = reader


_parsing = threading.Lock()
"""The reader is the process's: of two threads, the later would keep the other's."""
