"""A model with fewer tokens: its tokenizer, its tables, and the ids in its configuration.

``skeletoken`` edits tokenizers, too. It refuses MiniLM's published file (a truncation without direction), takes twenty
seconds for Gemma 3's, and does not know what is on the way to a token; what is left of it is :func:`keep_tokens`.
"""

from __future__ import annotations

import copy
import functools
import json
import math
import re
import tempfile
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from tokenizers import Tokenizer
from torch import nn
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from secateur.errors import UnsupportedArchitecture
from secateur.files import read_json, write_text
from secateur.models.blocks import build, last_line, text_config
from secateur.models.cutting import changed_shapes, changed_values, packed_tensors

SIZES = ("vocab_size", "vocab_size_per_layer_input")
"""Fields that count tokens: of the table, and of Gemma 3n's tables for each layer."""
TOKEN_IDS = re.compile(r"_token_(ids?|index)$")
WRITERS = ("post_processor", "padding")
"""Parts of a ``tokenizer.json`` that put tokens into texts, by their ids."""
TOGETHER = 32
"""Texts that a tokenizer is given at once."""
WITHOUT_IDS = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
"""The files of a tokenizer that do not list its tokens, and the one that is written anew."""


# ---- the tokenizer


def plain_tokenizer(rules: Mapping[str, Any]) -> Tokenizer:
    """A tokenizer from the content of its ``tokenizer.json``, that neither cuts nor pads."""
    tokenizer = Tokenizer.from_str(json.dumps(rules))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def token_ids(tokenizer: Tokenizer, texts: list[str]) -> list[array[int]]:
    """Ids of the tokens of each text, special ones left out; what a tokenizer returns is many times larger."""
    parts = (texts[start : start + TOGETHER] for start in range(0, len(texts), TOGETHER))
    found = (tokenizer.encode_batch_fast(part, add_special_tokens=False) for part in parts)
    return [array("i", encoding.ids) for part in found for encoding in part]


def keep_tokens(rules: Mapping[str, Any], kept: Sequence[int]) -> dict[str, Any]:
    """A ``tokenizer.json`` with some of its tokens; ``kept`` are their ids, and the new id of each is its place."""
    place = {old: new for new, old in enumerate(kept)}
    model = dict(rules["model"])
    if isinstance(model["vocab"], list):
        model["vocab"] = [item for i, item in enumerate(model["vocab"]) if i in place]
        model["unk_id"] = place.get(model["unk_id"])
    else:
        model["vocab"] = {token: place[i] for token, i in model["vocab"].items() if i in place}
    if "merges" in model:
        prefix, there = model.get("continuing_subword_prefix") or "", model["vocab"]
        model["merges"] = [
            [left, right]
            for left, right in model["merges"]
            if left in there and right in there and left + right.removeprefix(prefix) in there
        ]
    added = [token | {"id": place[token["id"]]} for token in rules["added_tokens"] if token["id"] in place]
    renumbered = {key: _each_id(rules.get(key), place.__getitem__) for key in WRITERS}
    return {**rules, "model": model, "added_tokens": added, **renumbered}


def written_ids(rules: Mapping[str, Any]) -> list[int]:
    """Ids that a tokenizer puts into texts."""
    found: list[int] = []
    for key in WRITERS:
        _each_id(rules.get(key), found.append)
    return found


def _each_id(part: Any, change: Callable[[int], Any]) -> Any:
    """A post-processor or a padding with other ids."""
    if isinstance(part, list):
        return [_each_id(item, change) for item in part]
    if not isinstance(part, dict):
        return part
    changed = {key: _each_id(value, change) for key, value in part.items()}
    for key, value in part.items():
        if key == "ids" and isinstance(value, list):
            changed[key] = [change(i) for i in value]
        elif key in ("sep", "cls") and isinstance(value, list):
            changed[key] = [value[0], change(value[1])]
        elif key == "pad_id" and isinstance(value, int):
            changed[key] = change(value)
    return changed


def cut_tokenizer(tokenizer: PreTrainedTokenizerBase, kept: Sequence[int]) -> PreTrainedTokenizerBase:
    """The tokenizer with some of its tokens, as transformers opens it from its files."""
    rules = keep_tokens(json.loads(tokenizer.backend_tokenizer.to_str()), kept)
    with tempfile.TemporaryDirectory(prefix="secateur-") as scratch:
        folder = Path(scratch)
        tokenizer.save_pretrained(folder)
        for file in folder.iterdir():
            if file.is_file() and file.name not in WITHOUT_IDS:
                file.unlink()
        settings = read_json(folder / "tokenizer_config.json")
        settings.pop("added_tokens_decoder", None)
        write_text(folder / "tokenizer_config.json", json.dumps(settings, ensure_ascii=False))
        write_text(folder / "tokenizer.json", json.dumps(rules, ensure_ascii=False))
        return AutoTokenizer.from_pretrained(folder)


# ---- the model


@contextmanager
def renumbered(model: SentenceTransformer, kept: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> Iterator[None]:
    """Within: a whole model reads the texts of a cut tokenizer, each token by the id that it had.

    It uses nothing of :func:`cut_vocabulary`, which is checked by it.
    """
    old = torch.tensor(kept)
    transformer, processor = model[0].auto_model, model[0].processor
    whole = transformer.forward

    @functools.wraps(whole)
    def forward(*args: Any, **given: Any) -> Any:
        return whole(*args, **given | {"input_ids": old.to(given["input_ids"].device)[given["input_ids"]]})

    model[0].processor = tokenizer
    transformer.forward = forward  # no hook: sentence-transformers calls it past them
    try:
        yield
    finally:
        del transformer.forward
        model[0].processor = processor


@torch.no_grad()
def cut_vocabulary(name: str, transformer: PreTrainedModel, kept: Sequence[int], multiple: int = 1) -> None:
    """Cut a model's tables in place to some of its tokens, and renumber those that its configuration names.

    ``kept`` are the ids of the tokens that stay, ascending: only their rows are read, of weights that are mapped into
    memory. Rows of zeros are added until the number of rows is a multiple of ``multiple``.

    Raises:
        UnsupportedArchitecture: No table follows the vocabulary, or something else than a table does.
    """
    tables, values = _changes(name, transformer, kept, multiple)
    cut: dict[torch.Tensor, torch.Tensor] = {}  # tied tables stay tied
    for path, attribute, rows in tables:
        module = transformer.get_submodule(path)
        table = getattr(module, attribute)
        if table not in cut:
            there = torch.tensor([i for i in kept if i < len(table)])
            smaller = table.new_zeros((rows, *table.shape[1:]))
            smaller[: len(there)] = table[there]
            cut[table] = nn.Parameter(smaller, table.requires_grad) if isinstance(table, nn.Parameter) else smaller
        setattr(module, attribute, cut[table])
    for path, attribute, value in values:
        setattr(transformer.get_submodule(path), attribute, value)
    for config in _configs(transformer):
        _cut_config(config, kept, multiple)


@dataclass(frozen=True)
class TokenTable:
    """A tensor with ``rows`` rows, one for each token, of ``width`` numbers.

    ``packed``: a row holds one slice for each layer, as Gemma 3n's per-layer embeddings do.
    """

    rows: int
    width: int
    packed: bool


def token_tables(name: str, transformer: PreTrainedModel) -> tuple[TokenTable, ...]:
    """The tables of a model, with or without weights; tied ones once."""
    half = {*range(text_config(transformer).vocab_size // 2), *named_ids(transformer)}
    tables: dict[torch.Tensor, str] = {}
    for path, attribute, _ in _changes(name, transformer, sorted(half), 1)[0]:
        tables[getattr(transformer.get_submodule(path), attribute)] = f"{path}.{attribute}".lstrip(".")
    packed = packed_tensors(transformer)
    return tuple(
        TokenTable(table.shape[0], table.numel() // table.shape[0], path in packed) for table, path in tables.items()
    )


def _changes(
    name: str, transformer: PreTrainedModel, kept: Sequence[int], multiple: int
) -> tuple[list[tuple[str, str, int]], list[tuple[str, str, Any]]]:
    """What a smaller vocabulary changes: (module, tensor, rows), and (module, attribute, value).

    Told by the models that transformers builds from the configuration as it is, and cut.
    """
    config = copy.deepcopy(transformer.config)
    before = build(type(transformer), copy.deepcopy(config))
    for part in {id(part): part for part in (config, text_config(config))}.values():
        _cut_config(part, kept, multiple)
    try:
        after = build(type(transformer), config)
    except Exception as error:  # of whatever kind: transformers does not take the cut configuration
        problem = f"transformers refuses a configuration of {len(kept)} tokens ({last_line(error)})"
        raise UnsupportedArchitecture(name, problem) from error
    tables: list[tuple[str, str, int]] = []
    values: list[tuple[str, str, Any]] = []
    for path, module in after.named_modules():
        old = before.get_submodule(path)
        found = len(tables)
        for attribute, was, now in changed_shapes(old, module):
            if not was or now != (_rows(was[0], kept, multiple), *was[1:]):
                problem = f"{path}.{attribute} follows the vocabulary and is no table of tokens: {was} would be {now}"
                raise UnsupportedArchitecture(name, problem)
            tables.append((path, attribute, now[0]))
        for attribute, is_, will_be in changed_values(old, module):
            if attribute == "padding_idx" and isinstance(module, nn.Embedding) and len(tables) == found:
                problem = f"{path} counts from the id of the padding token, which would change from {is_} to {will_be}"
                raise UnsupportedArchitecture(name, problem)
            if "vocab" in attribute and len(tables) == found and not isinstance(module, PreTrainedModel):
                problem = f"{path} computes with the number of tokens, and so with their ids"  # as hashes of n-grams do
                raise UnsupportedArchitecture(name, problem)
            values.append((path, attribute, will_be))
    if not tables:
        raise UnsupportedArchitecture(name, "none of its tables has a row for each token")
    return tables, values


# ---- configurations


def named_ids(transformer: PreTrainedModel) -> set[int]:
    """Ids of the tokens that a model's configuration names."""
    return {i for config in _configs(transformer) for ids in _ids_in(config).values() for i in ids}


def _configs(model: PreTrainedModel) -> list[PretrainedConfig]:
    """The configurations of a model and of its parts, each once; T5's encoder holds a copy of its own."""
    parts = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
    found = [config for part in parts for config in (part.config, text_config(part))]
    return list({id(config): config for config in found}.values())


def _cut_config(config: PretrainedConfig, kept: Sequence[int], multiple: int) -> None:
    """Edit a configuration in place: how many tokens there are, and the ids of those that it names."""
    place = {old: new for new, old in enumerate(kept)}
    for field, ids in _ids_in(config).items():
        moved = [place[i] for i in ids if i in place]  # the tokenizer may not have the others, nor have texts
        setattr(config, field, moved if isinstance(getattr(config, field), list) else next(iter(moved), None))
    for field in SIZES:
        if isinstance(size := getattr(config, field, None), int):
            setattr(config, field, _rows(size, kept, multiple))


def _rows(size: int, kept: Sequence[int], multiple: int) -> int:
    """How many rows a table of ``size`` rows has afterwards."""
    return math.ceil(sum(i < size for i in kept) / multiple) * multiple


def _ids_in(config: PretrainedConfig) -> dict[str, list[int]]:
    """The fields that name tokens by their ids; those with numbers that are no token's are left out."""
    size = getattr(config, "vocab_size", 0)
    found = {}
    for field, value in vars(config).items():
        ids = value if isinstance(value, list) else [value]
        if TOKEN_IDS.search(field) and ids and all(type(i) is int and 0 <= i < size for i in ids):
            found[field] = ids
    return found
