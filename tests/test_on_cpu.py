from __future__ import annotations

import pytest
import torch
from transformers import SqueezeBertConfig, SqueezeBertModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from conftest import MakeEncoder
from secateur.errors import UnsupportedArchitecture
from secateur.healing.recipes import BitsDropout, TrainingConfig, attention_in_float32, prepare

TEXTS = ["a hedge", "a longer hedge, cut back", "q"]


@pytest.mark.parametrize("share", [0.05, 0.4])
def test_dropout_drops_its_share_and_keeps_the_mean(share: float):
    layer = BitsDropout(share)
    numbers = torch.ones(999, 1001, requires_grad=True)
    torch.manual_seed(0)
    dropped = layer(numbers)
    assert float((dropped == 0).float().mean()) == pytest.approx(share, abs=0.002)
    assert torch.allclose(dropped[dropped != 0], torch.tensor(1 / (1 - share)))
    neighbours = (dropped[:, 1:] == 0) & (dropped[:, :-1] == 0)
    assert float(neighbours.float().mean()) == pytest.approx(share**2, abs=0.002)
    dropped.sum().backward()
    assert numbers.grad is not None and torch.equal(numbers.grad, dropped.detach())
    again = layer(numbers)
    assert not torch.equal(dropped, again)
    torch.manual_seed(0)
    assert torch.equal(layer(numbers), dropped)
    assert torch.equal(layer.eval()(numbers), numbers)


def test_adapters_drop_as_the_recipe_says(make_encoder: MakeEncoder):
    model = make_encoder("llama")
    prepare(model, TrainingConfig(lora_dropout=0.2))
    found = [module.p for module in model.modules() if isinstance(module, BitsDropout)]
    assert found == [0.2] * 7 * 3


def test_a_model_without_linear_layers_cannot_have_adapters(make_encoder: MakeEncoder):
    model = make_encoder()
    sizes = {"vocab_size": 50, "hidden_size": 32, "embedding_size": 32, "num_attention_heads": 4}
    sizes |= {"num_hidden_layers": 2, "intermediate_size": 64}
    model[0].model = SqueezeBertModel(SqueezeBertConfig(**sizes))  # of convolutions over one token
    with pytest.raises(
        UnsupportedArchitecture, match=r"SqueezeBertModel: its layers have no linear modules.*--train b"
    ):
        prepare(model, TrainingConfig())


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
