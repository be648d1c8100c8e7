"""Tiny random encoders, built in memory: no download, milliseconds a batch."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Normalize, Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel, PreTrainedTokenizerFast

from secateur.models import save

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789;:,.?' "
MakeEncoder = Callable[..., SentenceTransformer]
LONGEST = (
    *("test_export", "test_gguf", "test_docs", "test_study", "test_backends", "test_scouted_study", "test_encode"),
    *("test_serve", "test_distributed", "test_evaluate"),
)
"""Files of tests that take minutes, the longest first."""


def tiny_transformer(folder: Path, architecture: str = "bert", depth: int = 3, seed: int = 0) -> Path:
    """Write a random transformer, one token a letter, as a plain transformers folder."""
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<unk>", *LETTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    special = {"pad_token": "<pad>", "unk_token": "<unk>", "model_max_length": 128}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    make = bert_model if architecture == "bert" else llama_model
    make(len(vocabulary), depth, seed).save_pretrained(folder)
    return folder


def llama_model(vocabulary: int, depth: int = 3, seed: int = 0) -> LlamaModel:
    torch.manual_seed(seed)
    return LlamaModel(LlamaConfig(**_sizes(vocabulary, depth), num_key_value_heads=2))


def bert_model(vocabulary: int, depth: int = 3, seed: int = 0) -> BertModel:
    torch.manual_seed(seed)
    return BertModel(BertConfig(**_sizes(vocabulary, depth)))


def _sizes(vocabulary: int, depth: int) -> dict[str, Any]:
    sizes = {"vocab_size": vocabulary, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": depth}
    sizes |= {"num_attention_heads": 4, "max_position_embeddings": 128, "pad_token_id": 0}
    return sizes | {"initializer_range": 0.3}


def example_pairs(count: int = 24, seed: int = 0) -> list[dict[str, object]]:
    """Queries whose positive repeats their word, in letters that the tiny tokenizer knows."""
    rng = random.Random(seed)
    words = ["".join(rng.choices("abcdefghij", k=5)) for _ in range(count)]
    return [{"query": f"what is {w}?", "positive": f"{w}, {w}.", "negative": [f"{w[::-1]}."]} for w in words]


def write_pairs(file: Path, rows: Sequence[Mapping[str, object]], instruction: str = "") -> Path:
    """A JSON Lines data file, and its instruction in the JSON file beside it."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    if instruction:
        file.with_suffix(".json").write_text(json.dumps({"query_instruction": instruction}), encoding="utf-8")
    return file


def reopen_here(folder: Path, device: str) -> Any:
    return save.probe(SentenceTransformer(str(folder), device=device))


_reopen_afresh = save.reopen


@pytest.fixture(scope="session", autouse=True)
def _one_process() -> Iterator[None]:
    """Written folders are reopened in the process of the tests: another takes seconds to import torch."""
    save.reopen = reopen_here
    yield
    save.reopen = _reopen_afresh


@pytest.fixture(autouse=True)
def _fresh_process(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for tests that are marked ``fresh``."""
    if request.node.get_closest_marker("fresh"):
        monkeypatch.setattr(save, "reopen", _reopen_afresh)


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model of three blocks, a plain transformers folder, to be read only."""
    return tiny_transformer(tmp_path_factory.mktemp("llama") / "tiny", "llama", depth=3)


@pytest.fixture(scope="session")
def pairs_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 triplets with an instruction, to be read only."""
    return write_pairs(tmp_path_factory.mktemp("pairs") / "words.jsonl", example_pairs(), "find the word")


@pytest.fixture
def make_encoder(tmp_path: Path) -> MakeEncoder:
    """Factory of tiny ``SentenceTransformer``s: ``make_encoder("llama", depth=4, seed=1, prompts={...})``."""

    def make(architecture: str = "bert", depth: int = 3, seed: int = 0, **options: object) -> SentenceTransformer:
        folder = tiny_transformer(tmp_path / f"{architecture}-{depth}-{seed}", architecture, depth, seed)
        transformer = Transformer(str(folder))
        pooling = Pooling(transformer.get_embedding_dimension(), "mean", include_prompt=False)
        return SentenceTransformer(modules=[transformer, pooling, Normalize()], device="cpu", **options).eval()

    return make


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files come first: of two workers, none is left alone with one at the end."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    place = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: (place.get(item.path.stem, len(LONGEST)), -slow[item.path]))


@contextmanager
def disk_of(kilobytes: int, folder: Path) -> Iterator[Path]:
    """A file system of its own, so small that it is soon full."""
    folder.mkdir()
    options = ["-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs"]
    if (
        not sys.platform.startswith("linux")
        or subprocess.run(["mount", *options, folder], capture_output=True).returncode
    ):
        pytest.skip("file systems can be mounted by root alone, and like this on Linux")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)  # torch keeps the file open that it could not write
