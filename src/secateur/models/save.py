"""Writes a model as a plain folder that every reader understands, and compares it with the model in a fresh process."""

from __future__ import annotations

import inspect
import json
import shutil
import subprocess
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer

from secateur.clusters import fresh_python
from secateur.errors import ModelError, VerificationFailed
from secateur.files import read_json, write_text
from secateur.models.blocks import text_config
from secateur.models.compat import drop_layer_pattern
from secateur.models.forward import pooling_name
from secateur.progress import quiet
from secateur.results import Origin

PROBES = (
    "The gardener cut the hedge back to half its height.",
    "def add(a, b): return a + b",
    "Blätter, 葉, листья 🌿",
    "one; ",
)
"""Texts on which a written folder is compared with the model it was written from."""
TEN_SCRIPTS = (
    "The gardener cut the hedge back to half its height.",
    "Садовник подстриг живую изгородь наполовину.",
    "园丁把树篱修剪到一半高。",
    "庭師は生け垣を半分の高さに刈り込んだ。",
    "정원사가 울타리를 절반 높이로 다듬었다.",
    "قلّم البستاني السياج إلى نصف ارتفاعه.",
    "הגנן גזם את הגדר החיה לחצי מגובהה.",
    "माली ने बाड़ को आधी ऊँचाई तक काट दिया।",
    "คนสวนตัดแต่งรั้วต้นไม้ให้เหลือครึ่งหนึ่ง",
    "Ο κηπουρός κλάδεψε τον φράχτη στο μισό ύψος.",
    "def prune(model, depth): return model[:depth]  # 🌿",
)
"""Ten scripts and a line of code, on which other runtimes and arithmetics are compared."""
LONG = " ".join(PROBES) + " " + "cut the hedge back to half, " * 72
"""A text of more than 512 tokens: positions and lengths that a short text does not reach are compared on it."""
TOLERANCE = 1e-5
"""The largest difference between numbers of vectors that is let pass."""
MODULES = "modules.json"
NO_LIMIT = 1 << 24
"""A tokenizer that knows no limit says some 10^30."""


def save_model(
    model: SentenceTransformer, folder: Path, origin: Origin, *, expected: np.ndarray | None = None
) -> Origin:
    """Write a model as a plain folder, reopen it in a fresh process with stock libraries, and compare vectors.

    ``origin`` is written as ``secateur.json``, and returned, with its ``check`` filled in. ``expected`` are the vectors
    of the uncut source (:func:`probe`); by default, what the model in memory gives.
    """
    write_files(model, folder)
    against = "the model in memory" if expected is None else "the whole source"
    with quiet():
        expected = probe(model) if expected is None else expected
    largest = difference(folder, expected, str(model.device))
    written = replace(origin, pooling=pooling_name(model), check=largest, checked_against=against)
    written.save(folder)
    return written


def write_files(model: SentenceTransformer, folder: Path, *, weights: bool = True) -> None:
    """Write a model's folder; without ``weights``, all but those of the transformer, which are there already."""
    transformer = model[0].model
    drop_layer_pattern(text_config(transformer))
    if not weights:
        transformer.save_pretrained = lambda *_, **__: None
    try:
        with quiet():
            model.save(str(folder), create_model_card=False)
    finally:
        vars(transformer).pop("save_pretrained", None)
    write_for_all_readers(folder, model)
    for file in folder.rglob("*.safetensors"):
        # safetensors lets nobody but the owner read what it writes; here the umask decides, as for modules.json.
        shutil.copymode(folder / MODULES, file)


# ---- the check


def probe(model: SentenceTransformer) -> np.ndarray:
    """Vectors (rows, dimension) of the probes, each alone and all in one batch, without and with each prompt, and of a
    text as long as the model reads. A fresh process runs these very lines.
    """
    prompts = ["", *sorted({prompt for prompt in model.prompts.values() if prompt})]
    parts = [
        model.encode(list(PROBES), prompt=prompt, batch_size=batch, show_progress_bar=False)
        for prompt in prompts
        for batch in (1, len(PROBES))
    ]
    parts.append(model.encode([LONG], prompt="", show_progress_bar=False))
    return np.concatenate(parts).astype(np.float32)


_SCRIPT = f"""
import numpy as np
import torch
from sentence_transformers import SentenceTransformer

{inspect.getsource(probe)}

folder, device, threads, out, *PROBES, LONG = sys.argv[1:]
torch.set_num_threads(int(threads))
vectors = probe(SentenceTransformer(folder, device=device))
assert not any(name.split(".")[0] == "secateur" for name in sys.modules)
np.save(out, vectors)
"""


def reopen(folder: Path, device: str) -> np.ndarray:
    """What :func:`probe` gives for a folder in a fresh process, in which stock libraries open it."""
    with tempfile.TemporaryDirectory(prefix="secateur-") as scratch:
        out, threads = str(Path(scratch) / "vectors.npy"), str(torch.get_num_threads())
        command = fresh_python(_SCRIPT, str(folder), device, threads, out, *PROBES, LONG)
        done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - our own script
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1][:300]
            raise ModelError(folder, f"does not reopen in a fresh process ({last})")
        return np.load(out)


def difference(folder: Path, expected: np.ndarray, device: str = "cpu") -> float:
    """The largest difference between a folder's vectors, reopened in a fresh process, and the expected ones."""
    vectors = reopen(folder, device)
    same_shape = vectors.shape == expected.shape
    largest = float(np.abs(expected - vectors).max()) if same_shape else float("inf")
    if not largest <= TOLERANCE:
        raise VerificationFailed(folder, largest, TOLERANCE)
    return largest


# ---- files for readers that do not go through sentence-transformers

SUPERSEDED = ("max_length", "stride", "truncation_strategy", "pad_to_multiple_of")
"""Keys that transformers copies into tokenizer_config.json from the tokenizer.json that it opened."""
_LEGACY_TYPES = ("Transformer", "Pooling", "Normalize", "Dense")
_POOLING_KEYS = {
    "cls": "pooling_mode_cls_token",
    "mean": "pooling_mode_mean_tokens",
    "max": "pooling_mode_max_tokens",
    "mean_sqrt_len_tokens": "pooling_mode_mean_sqrt_len_tokens",
    "weightedmean": "pooling_mode_weightedmean_tokens",
    "lasttoken": "pooling_mode_lasttoken",
}
"""text-embeddings-inference reads only these booleans, of which sentence-transformers 6 writes only the name."""


def longest_text(model: SentenceTransformer) -> int | None:
    """Tokens after which a model cuts a text, special ones included; None: it never does."""
    limit = model.max_seq_length
    return int(limit) if limit and limit < NO_LIMIT else None


def write_for_all_readers(folder: Path, model: SentenceTransformer) -> None:
    """Make all files of a folder say where a text is cut, on which side, how it is padded, and how states are pooled.

    ``tokenizers`` alone, fastembed, transformers.js, text-embeddings-inference and llama.cpp each look at another one.
    """
    modules = read_json(folder / MODULES)
    for module in modules:
        name = module["type"].rpartition(".")[2]
        if name in _LEGACY_TYPES:
            module["type"] = f"sentence_transformers.models.{name}"
        config = folder / module["path"] / "config.json"
        mode = read_json(config).get("pooling_mode") if name == "Pooling" else None
        if mode is not None:
            modes = [mode] if isinstance(mode, str) else mode
            _update(config, {key: mode in modes for mode, key in _POOLING_KEYS.items()})
    _write(folder / MODULES, modules)
    is_first = modules[0]["type"].endswith(".Transformer")
    if is_first and getattr(model.tokenizer, "backend_tokenizer", None) is not None:
        _write_tokenizer(folder / modules[0]["path"], model)


def _write(file: Path, content: Any) -> None:
    write_text(file, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def _update(file: Path, changes: dict[str, Any]) -> None:
    before = read_json(file) if file.is_file() else {}
    _write(file, {key: value for key, value in before.items() if key not in SUPERSEDED} | changes)


def _write_tokenizer(folder: Path, model: SentenceTransformer) -> None:
    tokenizer, limit = model.tokenizer, longest_text(model)
    alone = tokenizer.backend_tokenizer  # transformers sets its truncation and padding anew for each call
    alone.no_truncation()
    alone.no_padding()
    if limit:
        alone.enable_truncation(limit, direction=tokenizer.truncation_side)
    if tokenizer.pad_token is not None:
        padding = {"pad_id": tokenizer.pad_token_id, "pad_type_id": tokenizer.pad_token_type_id}
        alone.enable_padding(direction=tokenizer.padding_side, pad_token=tokenizer.pad_token, **padding)
    alone.save(str(folder / "tokenizer.json"))
    sides = {"truncation_side": tokenizer.truncation_side, "padding_side": tokenizer.padding_side}
    length = {"model_max_length": limit} if limit else {}
    _update(folder / "tokenizer_config.json", tokenizer.special_tokens_map | sides | length)
    # Older folders name it after their architecture, such as sentence_roberta_config.json.
    settings = next(folder.glob("sentence_*_config.json"), folder / "sentence_bert_config.json")
    _update(settings, {"max_seq_length": limit} if limit else {})
    added = {token.content: token for token in tokenizer.added_tokens_decoder.values()}
    keys = ("content", "lstrip", "normalized", "rstrip", "single_word")
    named = {name: added[token] for name, token in tokenizer.special_tokens_map.items() if token in added}
    described = {name: {key: getattr(token, key) for key in keys} for name, token in named.items()}
    _write(folder / "special_tokens_map.json", described)
