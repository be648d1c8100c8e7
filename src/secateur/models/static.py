"""Static embeddings: one vector for each token, and their mean for a text; nothing to cut."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Normalize
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from tokenizers import Tokenizer
from torch import nn

from secateur.errors import ModelError
from secateur.models import resolve
from secateur.models.checks import as_model_error, cache_where_unreachable, check_finite, check_folder
from secateur.models.open_model import check_device, fetch, small_file
from secateur.progress import quiet


def is_static(name: str | Path) -> bool:
    """Whether a folder or Hub id holds a static embedding."""
    source = resolve(name)
    if isinstance(source, Path) and not source.is_dir():
        return False
    with as_model_error(name), quiet(), cache_where_unreachable(source):
        first = (small_file(source, "modules.json") or [{}])[0]
        return str(first.get("type")).endswith(".StaticEmbedding") or _is_model2vec(small_file(source, "config.json"))


def _is_model2vec(config: Any) -> bool:
    return isinstance(config, dict) and config.get("model_type") == "model2vec"


def open_static(name: str | Path, *, device: str | None = None) -> SentenceTransformer:
    """Open a static embedding."""
    check_device(device)
    with as_model_error(name), quiet():
        source = resolve(name)
        source = source if isinstance(source, Path) else fetch(source)
        check_folder(source)
        config = small_file(source, "config.json")
        given = {"modules": _modules(source, config)} if _is_model2vec(config) else {"model_name_or_path": str(source)}
        model = SentenceTransformer(**given, device=device, similarity_fn_name="cosine")
        tokens, rows = model.tokenizer.get_vocab_size(), model[0].num_embeddings
        if tokens > rows:
            raise ModelError(name, f"its tokenizer knows {tokens} tokens, but its table has {rows} rows")
        check_finite(name, model)
        return model.eval()


def _modules(folder: Path, config: Mapping[str, Any]) -> list[nn.Module]:
    """What model2vec does with its own folders: unknown tokens do not count, texts end after 512 tokens."""
    tensors = load_file(folder / "model.safetensors")
    table = tensors["embeddings"].float()
    if "mapping" in tensors:
        table = table[tensors["mapping"].long()]
    if "weights" in tensors:
        table = table * tensors["weights"].float()[:, None]
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    length = config.get("max_length", 512)  # model2vec's own default
    tokenizer.no_truncation() if length is None else tokenizer.enable_truncation(length)
    module = StaticEmbedding(tokenizer, table)
    model = json.loads(tokenizer.to_str())["model"]
    unknown = model.get("unk_id") if model.get("unk_token") is None else tokenizer.token_to_id(model["unk_token"])
    if unknown is not None:
        module.embedding.padding_idx = unknown  # left out of the mean
    return [module, *([Normalize()] if config.get("normalize") else [])]
