"""The matrix: every architecture cut, saved, reloaded, padded and adapted, against oracles on the full model."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import transformers

from architectures import ARCHITECTURES, DEPTH, REFUSED, TOLERANCE, Outcome, outcome, row

DOCUMENT = Path(__file__).parent.parent / "docs" / "reference" / "architectures.md"

# What of the blocks' linear modules stays without an adapter, and why.
READ_PAST = re.compile(r"(mamba|mixer)\.(dt_proj|out_proj)$")  # state-space kernels read the weight itself
ROUTER = re.compile(r"\.router$")  # returns more than a product
NO_SUBSETS = {
    "big_bird",
    "diffllama",
    "esmc",
    "gemma3n_text",
    "gemma4_text",
    "gpt2+inverse_scale",
    "inkling2_text",
    "jamba",
    "olmo_hybrid",
    "qwen3_moe",
    "recurrent_gemma",
}
LEGAL = {
    "esmc": (DEPTH,),  # scales by its depth, which no field of the configuration can undo
    "gpt_neox_japanese": (DEPTH,),  # only the last block has biases
    "embedding_gemma2_text": (2, 4, 6),
    "gemma4_text": (2, 4, 6),
    "gemma4_text+moe": (2, 4, 6),
    "olmo_hybrid": (4, 5, 6),
}
PER_DEPTH = {"embedding_gemma2_text", "gemma3n_text", "inkling2_text", "opt+projected", "xlnet"}


@pytest.fixture(autouse=True)
def _quiet():
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


@pytest.fixture(params=ARCHITECTURES)
def result(request) -> Outcome:
    return outcome(request.param)


def test_architecture(result: Outcome):
    if result.name in REFUSED:
        assert REFUSED[result.name] in result.refused
        return
    assert not result.refused
    assert result.legal == LEGAL.get(result.name, tuple(range(1, DEPTH + 1)))
    assert result.in_memory < TOLERANCE, "cut in memory"
    assert result.reloaded < TOLERANCE, "saved and reloaded by stock transformers"
    assert not result.keys, "tensors of the folder that did not fit"
    assert result.tail_is_norm == (result.name not in PER_DEPTH)
    if result.tail_is_norm:
        assert result.through_norm < TOLERANCE, "one-pass profile"
    if result.name in NO_SUBSETS:
        assert result.subset is None
        assert "nearest legal" in result.subset_refused
    else:
        assert result.subset < TOLERANCE, "blocks 0, 2 and the last"
    assert result.padding in {"both", "right", "none"}
    _check_adapters(result)


def _check_adapters(result: Outcome) -> None:
    assert result.adapters > 0
    assert not [name for name in result.idle if "correction_coefs" not in name]  # Gemma 3n reads that weight itself
    assert not [name for name in result.bare if not any(rule.search(name) for rule in (READ_PAST, ROUTER))]


def test_refusals_name_the_nearest_legal_depths():
    assert outcome("gemma4_text").illegal.endswith("nearest legal: 2")
    assert "layer_types" in outcome("gemma4_text").illegal
    assert outcome("olmo_hybrid").illegal.endswith("nearest legal: 4")


@pytest.mark.parametrize("name", ["gpt2", "bert", "opt", "llama", "qwen3", "modernbert", "mamba"])
def test_right_padding_is_always_safe_for_the_common_ones(name):
    assert outcome(name).padding in {"both", "right"}


def test_the_document_is_the_outcome():
    document = DOCUMENT.read_text(encoding="utf-8")
    if f"transformers {transformers.__version__}," not in " ".join(document.split()):
        pytest.skip("the document was measured with another transformers")
    lines = document.splitlines()
    assert [line for line in lines if line.startswith("| ")][1:] == [row(outcome(name)) for name in ARCHITECTURES]
