"""Static embeddings: one vector for each token, and their mean for a text; no transformer, nothing to cut.

A folder of sentence-transformers that begins with a ``StaticEmbedding``, or one of model2vec. What model2vec does with
its own is done here without it: ``mapping`` and ``weights`` are folded into the table, unknown tokens do not count,
texts end after ``max_length`` tokens, and ``normalize`` gives vectors of length 1.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Normalize
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from tokenizers import Tokenizer
from torch import nn

from secateur.errors import ModelError
from secateur.models import resolve
from secateur.models.checks import check_finite
from secateur.models.open_model import as_model_error, check_device, check_folder, small_file
from secateur.progress import quiet

MAX_LENGTH = 512
"""Tokens that model2vec reads of a text, where its configuration does not say."""


def is_static(name: str | Path) -> bool:
    """Whether a folder or Hub id holds a static embedding."""
    source = resolve(name)
    if isinstance(source, Path) and not source.is_dir():
        return False
    with as_model_error(name), quiet():
        modules = small_file(source, "modules.json")
        first = modules[0] if isinstance(modules, list) and modules else {}
        kind = str(first.get("type", "")).rpartition(".")[2] if isinstance(first, dict) else ""
        return kind == "StaticEmbedding" or _is_model2vec(small_file(source, "config.json"))


def _is_model2vec(config: Any) -> bool:
    return isinstance(config, dict) and config.get("model_type") == "model2vec"


def open_static(name: str | Path, *, device: str | None = None) -> SentenceTransformer:
    """Open a static embedding.

    Raises:
        ConfigError: There is no such device.
        ModelError: Files are missing or damaged, or do not fit each other.
    """
    check_device(device)
    with as_model_error(name), quiet():
        source = resolve(name)
        if not isinstance(source, Path):
            source = Path(snapshot_download(source, allow_patterns=["*.json", "*.safetensors"]))
        check_folder(source, trust_remote_code=False)
        config = small_file(source, "config.json")
        given: dict[str, Any] = {"device": device, "similarity_fn_name": "cosine"}
        if _is_model2vec(config):
            model = SentenceTransformer(modules=_modules(source, config), **given)
        else:
            model = SentenceTransformer(str(source), **given)
        tokens, rows = model.tokenizer.get_vocab_size(), model[0].num_embeddings
        if tokens > rows:
            raise ModelError(name, f"its tokenizer knows {tokens} tokens, but its table has {rows} rows")
        check_finite(name, model)
        return model.eval()


def _modules(folder: Path, config: Mapping[str, Any]) -> list[nn.Module]:
    tensors = load_file(folder / "model.safetensors")
    table = tensors["embeddings"].float()
    if "mapping" in tensors:
        table = table[tensors["mapping"].long()]
    if "weights" in tensors:
        table = table * tensors["weights"].float()[:, None]
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    length = config.get("max_length", MAX_LENGTH)
    tokenizer.no_truncation() if length is None else tokenizer.enable_truncation(length)
    module = StaticEmbedding(tokenizer, table)
    model = json.loads(tokenizer.to_str())["model"]
    unknown = model.get("unk_id") if model.get("unk_token") is None else tokenizer.token_to_id(model["unk_token"])
    if unknown is not None:
        module.embedding.padding_idx = unknown  # left out of the mean
    return [module, *([Normalize()] if config.get("normalize") else [])]
