"""What a model folder says to readers that do not go through sentence-transformers.

``tokenizers`` alone, fastembed, transformers.js, text-embeddings-inference and llama.cpp each look at another file for
the same thing: where a text is cut, on which side, how it is padded, what is lower-cased, how states are pooled. So
each file says what the opened model does.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sentence_transformers import SentenceTransformer

from secateur.files import read_json, write_text

NO_LIMIT = 1 << 24
"""A tokenizer that knows no limit says some 10^30."""

SUPERSEDED = ("max_length", "stride", "truncation_strategy", "pad_to_multiple_of")
"""Keys of tokenizer_config.json that transformers copies from the truncation and padding of the tokenizer.json that it
has opened, and that no longer hold.
"""

_LEGACY_TYPES = {
    "Transformer": "sentence_transformers.models.Transformer",
    "Pooling": "sentence_transformers.models.Pooling",
    "Normalize": "sentence_transformers.models.Normalize",
    "Dense": "sentence_transformers.models.Dense",
}


def longest_text(model: SentenceTransformer) -> int | None:
    """Tokens after which a model cuts a text, special ones included; None: it never does."""
    limit = model.max_seq_length
    return int(limit) if limit and limit < NO_LIMIT else None


def write_for_all_readers(folder: Path, model: SentenceTransformer) -> None:
    """Make all files of a model's folder say what the model does.

    Args:
        folder: As sentence-transformers writes it.
        model: What it holds, opened.
    """
    file = folder / "modules.json"
    modules = read_json(file)
    for module in modules:
        module["type"] = _LEGACY_TYPES.get(module["type"].rpartition(".")[2], module["type"])
        config = folder / module["path"] / "config.json"
        if module["type"].endswith(".Pooling"):
            settings = read_json(config)
            if "pooling_mode" in settings:
                _write(config, settings | _pooling_booleans(settings["pooling_mode"]))
    _write(file, modules)
    first = modules[0]["type"].rpartition(".")[2]
    if first == "Transformer" and getattr(model.tokenizer, "backend_tokenizer", None) is not None:
        _write_tokenizer(folder / modules[0]["path"], model)


def _write(file: Path, content: Any) -> None:
    write_text(file, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def _update(file: Path, changes: dict[str, Any], dropped: tuple[str, ...] = ()) -> None:
    before = read_json(file) if file.is_file() else {}
    _write(file, {key: value for key, value in before.items() if key not in dropped} | changes)


def _write_tokenizer(folder: Path, model: SentenceTransformer) -> None:
    tokenizer = model.tokenizer
    limit = longest_text(model)
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    rules["truncation"] = limit and {
        "direction": tokenizer.truncation_side.title(),
        "max_length": limit,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    padded = tokenizer.pad_token is not None
    rules["padding"] = {
        "strategy": "BatchLongest",
        "direction": tokenizer.padding_side.title(),
        "pad_to_multiple_of": None,
        "pad_id": tokenizer.pad_token_id,
        "pad_type_id": tokenizer.pad_token_type_id,
        "pad_token": tokenizer.pad_token,
    } if padded else None  # fmt: skip
    _write(folder / "tokenizer.json", rules)
    sides = {"truncation_side": tokenizer.truncation_side, "padding_side": tokenizer.padding_side}
    length = {"model_max_length": limit} if limit else {}
    _update(folder / "tokenizer_config.json", tokenizer.special_tokens_map | sides | length, SUPERSEDED)
    # Older folders name it after their architecture, such as sentence_roberta_config.json.
    settings = next(folder.glob("sentence_*_config.json"), folder / "sentence_bert_config.json")
    _update(settings, {"max_seq_length": limit} if limit else {})
    added = {token.content: token for token in tokenizer.added_tokens_decoder.values()}
    named = {name: added[token] for name, token in tokenizer.special_tokens_map.items() if token in added}
    _write(folder / "special_tokens_map.json", {name: _as_json(token) for name, token in named.items()})


def _as_json(token: Any) -> dict[str, Any]:
    return {key: getattr(token, key) for key in ("content", "lstrip", "normalized", "rstrip", "single_word")}


def _pooling_booleans(mode: str | list[str]) -> dict[str, bool | int]:
    """Both spellings of a pooling: text-embeddings-inference reads only the booleans, sentence-transformers 6 writes
    only the name; both accept both.
    """
    modes = [mode] if isinstance(mode, str) else mode
    keys = {
        "cls": "pooling_mode_cls_token",
        "mean": "pooling_mode_mean_tokens",
        "max": "pooling_mode_max_tokens",
        "mean_sqrt_len_tokens": "pooling_mode_mean_sqrt_len_tokens",
        "weightedmean": "pooling_mode_weightedmean_tokens",
        "lasttoken": "pooling_mode_lasttoken",
    }
    return {key: name in modes for name, key in keys.items()}
