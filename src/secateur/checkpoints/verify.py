"""What a written folder gives in a fresh process, and what its source gives at that depth: both must be the same.

Neither side uses what it checks. The folder is opened by stock libraries alone. The source is opened by transformers
from its own files, and its blocks that were cut away hand on what they are given; of how the cut was made, nothing is
used.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil  # type: ignore[import-untyped]
import torch
import transformers
from peft import PeftModel
from sentence_transformers import SentenceTransformer
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel

from secateur.checkpoints.lora import read_adapter
from secateur.checkpoints.sources import open_source
from secateur.errors import ModelError, VerificationFailed
from secateur.models.blocks import bypassed, cut_config, encoder_class, opens_at, skeleton, text_config

PROBES = (
    "The gardener cut the hedge back to half its height.",
    "def add(a, b): return a + b",
    "Blätter, 葉, листья 🌿",
    "one; ",
)
"""Texts on which a written folder is compared with the model it was written from."""

LONG = " ".join(PROBES) + " " + "cut the hedge back to half, " * 72
"""A text of more than 512 tokens: positions and lengths that a short text does not reach are compared on it."""

TOLERANCE = 1e-5
# A weight that an adapter was merged into may be rounded the other way: in float32, and in half precision.
MERGED_TOLERANCE, MERGED_HALF_TOLERANCE = 1e-4, 2e-2
# A source of at most this share of the free memory is opened whole.
SMALL = 0.25


@dataclass(frozen=True)
class Expected:
    """What a written folder should give: ``vectors`` (rows, dimension) of the probes, and what gave them.

    ``tokens`` are the ids of the probes, where they are known: they tell what differs if the vectors do.
    """

    vectors: np.ndarray
    source: str = "the model in memory"
    tolerance: float = TOLERANCE
    tokens: Sequence[Sequence[int]] = ()


def probe(model: SentenceTransformer) -> np.ndarray:
    """Vectors of the probes, each alone and all in one batch, without and with each prompt, and of a text as long as
    the model reads: (rows, dimension).
    """
    prompts = ["", *sorted({prompt for prompt in model.prompts.values() if prompt})]
    encode = model.encode
    parts = [encode(list(PROBES), prompt=p, batch_size=b, show_progress_bar=False) for p in prompts for b in (1, 4)]
    parts.append(encode([LONG], prompt="", show_progress_bar=False))
    return np.concatenate(parts).astype(np.float32)


def probe_tokens(model: SentenceTransformer) -> list[list[int]]:
    """The ids of the probes and of the long text, each alone."""
    return [model.preprocess([text])["input_ids"][0].tolist() for text in (*PROBES, LONG)]


_SCRIPT = """
import json, sys
import numpy as np
import torch
from sentence_transformers import SentenceTransformer
assert not any(name.split(".")[0] == "secateur" for name in sys.modules)
folder, device, threads, probes, out = sys.argv[1:]
torch.set_num_threads(int(threads))
model = SentenceTransformer(folder, device=device)
prompts = ["", *sorted({prompt for prompt in model.prompts.values() if prompt})]
encode, (*probes, long) = model.encode, json.loads(probes)
parts = [encode(probes, prompt=p, batch_size=b, show_progress_bar=False) for p in prompts for b in (1, 4)]
parts.append(encode([long], prompt="", show_progress_bar=False))
np.save(out, np.concatenate(parts).astype(np.float32))
print(json.dumps([model.preprocess([text])["input_ids"][0].tolist() for text in (*probes, long)]))
"""


def difference(folder: Path, expected: Expected, device: str) -> float:
    """The largest difference between a folder's vectors, reopened in a fresh process, and the expected ones.

    Raises:
        ModelError: The folder does not open.
        VerificationFailed: The difference is more than ``expected.tolerance``.
    """
    found, tokens = _probe_in_fresh_process(folder, device)
    largest = float(np.abs(expected.vectors - found).max()) if found.shape == expected.vectors.shape else float("inf")
    if not largest <= expected.tolerance:
        raise VerificationFailed(folder, largest, expected.tolerance, _cause(expected, found, tokens))
    return largest


def _cause(expected: Expected, found: np.ndarray, tokens: Sequence[Sequence[int]]) -> str:
    """What differs: the tokens of a text, the number or width of the vectors, or else what makes vectors of tokens."""
    for text, one, other in zip((*PROBES, LONG), expected.tokens, tokens, strict=False):
        if list(one) != list(other):
            return f"its tokenizer differs: {len(other)} tokens, not the same as the right {len(one)}, of {text[:40]!r}"
    if found.shape != expected.vectors.shape:
        return f"its prompts or dimension differ: {found.shape} vectors, not {expected.vectors.shape}"
    return "its tokens are the same, its weights or its configuration differ" if expected.tokens else ""


def _probe_in_fresh_process(folder: Path, device: str) -> tuple[np.ndarray, Sequence[Sequence[int]]]:
    with tempfile.TemporaryDirectory(prefix="secateur-") as scratch:
        vectors = Path(scratch) / "vectors.npy"
        arguments = [str(folder), device, str(torch.get_num_threads()), json.dumps([*PROBES, LONG]), str(vectors)]
        command = [sys.executable, "-c", _SCRIPT, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - our own script
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1][:300]
            raise ModelError(folder, f"does not reopen in a fresh process ({last})")
        loaded: np.ndarray = np.load(vectors)
        return loaded, json.loads(done.stdout.splitlines()[-1])


def expected_of(model: SentenceTransformer, source: PreTrainedModel, keep: Sequence[int]) -> np.ndarray:
    """Vectors of the probes with the kept blocks of ``source`` in the place of the model's own transformer."""
    transformer = model[0]
    own, transformer.model = transformer.model, source.eval()
    try:
        with bypassed(source, keep):
            return probe(model)
    finally:
        transformer.model = own


def expected_of_checkpoint(
    model: SentenceTransformer, folder: Path, keep: Sequence[int], *, adapter: str | None = None, partial: bool = False
) -> Expected:
    """What the blocks of a checkpoint give, read by transformers from its own files.

    A checkpoint that is large beside the free memory is opened with its configuration cut to the blocks up to the last
    kept one; transformers then reads those alone.

    Args:
        model: The cut model, for all that is not the transformer.
        folder: The checkpoint.
        keep: Indices of the kept blocks.
        adapter: A LoRA adapter, which peft merges.
        partial: Whether the folder has only the tensors of the kept blocks.
    """
    config = AutoConfig.from_pretrained(folder)
    depth, whole = max(keep) + 1, text_config(config).num_hidden_layers
    name = "the whole source"
    if depth < whole and (partial or not _is_small(folder)) and opens_at(config, depth):
        cut_config(config, range(depth))
        name = f"the source's first {depth} blocks"
    dtype = model[0].model.dtype
    if adapter is None:
        source = _load(encoder_class(config) or AutoModel, folder, config, dtype)
        return Expected(expected_of(model, source, keep), name)
    source = _merged(folder, config, adapter, dtype)
    tolerance = MERGED_TOLERANCE if dtype == torch.float32 else MERGED_HALF_TOLERANCE
    return Expected(expected_of(model, source, keep), f"{name}, merged by peft", tolerance)


def _is_small(folder: Path) -> bool:
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return size < SMALL * float(psutil.virtual_memory().available)


def _load(kind: type[PreTrainedModel], folder: Path, config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    return kind.from_pretrained(folder, config=config, dtype=dtype, use_safetensors=True)


def _merged(folder: Path, config: PretrainedConfig, adapter: str, dtype: torch.dtype) -> PreTrainedModel:
    """The base with the adapter merged by peft in float32, rounded once; of the class that the adapter was made for."""
    modules = {name for name, _ in skeleton(config).named_modules()}
    trained = getattr(transformers, (config.architectures or [""])[0], AutoModel)
    kind = AutoModel if modules.issuperset(read_adapter(open_source(adapter)).factors) else trained
    whole = PeftModel.from_pretrained(_load(kind, folder, config, torch.float32), adapter).merge_and_unload()
    part: PreTrainedModel = whole.get_encoder() if whole.config.is_encoder_decoder else whole.base_model
    return part.to(dtype)
