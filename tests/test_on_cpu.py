from __future__ import annotations

import pytest
import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from conftest import MakeEncoder
from secateur.healing.recipes import attention_in_float32

TEXTS = ["a hedge", "a longer hedge, cut back", "q"]


@pytest.mark.parametrize("architecture", ["bert", "llama"])
def test_attention_leaves_autocast_within_and_comes_back_after(architecture: str, make_encoder: MakeEncoder):
    model = make_encoder(architecture)
    stock = ALL_ATTENTION_FUNCTIONS["sdpa"]
    seen: list[torch.dtype] = []

    def attend() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(model.preprocess(TEXTS))["sentence_embedding"]

    exact = model(model.preprocess(TEXTS))["sentence_embedding"]
    plain = attend()
    with attention_in_float32():
        wide = ALL_ATTENTION_FUNCTIONS["sdpa"]
        ALL_ATTENTION_FUNCTIONS["sdpa"] = lambda *a, **k: (seen.append(wide(*a, **k)[0].dtype), wide(*a, **k))[1]
        inside = attend()
    assert seen == [torch.float32] * 3
    assert not torch.equal(inside, plain)
    assert torch.allclose(inside, exact, atol=0.05)
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is stock is sdpa_attention_forward
    assert torch.equal(attend(), plain)
