"""LoRA adapters merged by prune: what peft itself makes of base and adapter; others refused by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel, T5Config
from transformers import T5ForConditionalGeneration as T5

import secateur
from conftest import tiny_transformer
from secateur.errors import ModelError
from secateur.models import cutting

SIZES = {
    "vocab_size": 45,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}


def tiny(kind: str = "llama", head: type = AutoModelForCausalLM, **fields: object) -> PreTrainedModel:
    torch.manual_seed(0)
    return head.from_config(AutoConfig.for_model(kind, **(SIZES | fields)))


def adapt(folder: Path, model: PreTrainedModel, targets: list[str], **options) -> tuple[Path, Path, PreTrainedModel]:
    """A base, an adapter trained on it (random here), and what peft itself makes of the two."""
    base, adapter = tiny_transformer(folder / "base"), folder / "adapter"
    model.save_pretrained(base)
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=targets, init_lora_weights=False, **options)
    change = peft.get_peft_model(type(model).from_pretrained(base), config)
    change.save_pretrained(adapter)
    return base, adapter, change.merge_and_unload()


def close(out: Path, whole: PreTrainedModel, keep: list[int], atol: float = 1e-5) -> None:
    cutting.cut(whole, keep)
    found = type(whole).from_pretrained(out).state_dict()
    for name, tensor in whole.state_dict().items():
        torch.testing.assert_close(found[name], tensor, atol=atol, rtol=atol)


Q_OF_1 = "model.layers.1.self_attn.q_proj"
OPTIONS = [
    {},
    {"use_rslora": True},
    {"use_dora": True},
    {"rank_pattern": {"q_proj": 2}},
    {"rank_pattern": {Q_OF_1: 2}, "alpha_pattern": {Q_OF_1: 60}},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_adapters_are_merged(tmp_path: Path, options: dict[str, object]):
    base, adapter, merged = adapt(tmp_path, tiny(), ["q_proj", "down_proj"], **options)
    out = secateur.prune(base, keep=[1, 3], adapter=adapter, out=tmp_path / "out")
    close(out, merged.base_model, [1, 3])


def test_changes_of_token_embeddings_are_merged(tmp_path: Path):
    base, adapter, merged = adapt(tmp_path, tiny(), ["q_proj", "embed_tokens"])
    out = secateur.prune(base, keep=[1, 3], adapter=adapter, out=tmp_path / "out")
    close(out, merged.base_model, [1, 3])


def test_an_adapter_brings_its_base(tmp_path: Path):
    _, adapter, merged = adapt(tmp_path, tiny(), ["q_proj"])
    close(secateur.prune(adapter, 2, out=tmp_path / "out"), merged.base_model, [0, 1])


def test_an_embedder_with_an_adapter_is_trained_as_the_merged_one(pairs_file: Path, make_encoder, tmp_path: Path):
    model = make_encoder("llama")
    model.save(str(tmp_path / "base"))
    model = SentenceTransformer(str(tmp_path / "base"), device="cpu")
    model.add_adapter(peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    model.save(str(tmp_path / "adapted"))
    assert not (tmp_path / "adapted" / "model.safetensors").exists()
    secateur.prune(tmp_path / "adapted", 3, out=tmp_path / "merged")
    found = []
    for name in ("adapted", "merged"):
        options = {"steps": 3, "batch_size": 4, "precision": "float32", "device": "cpu"}
        out = secateur.heal(tmp_path / name, pairs_file, **options, out=tmp_path / f"{name}-healed")
        found.append(SentenceTransformer(str(out), device="cpu").encode(["abc", "what is it?"]))
    np.testing.assert_allclose(*found, atol=1e-5)


def test_a_base_that_is_gone_is_told(adapted: tuple[Path, Path], tmp_path: Path):
    base, adapter = adapted
    with pytest.raises(ModelError, match="is an adapter without its base"):
        secateur.open_model(adapter)
    base.rename(tmp_path / "moved")
    with pytest.raises(ModelError, match=f"adapter_config.json: names the base {base}, which is not there"):
        secateur.prune(adapter, 1, out=tmp_path / "out")


@pytest.mark.parametrize("alone", [True, False])
def test_an_adapter_is_merged_on_top_of_the_models_own(alone: bool, tmp_path: Path):
    base, own, merged = adapt(tmp_path, tiny(), ["q_proj"])
    _, second, both = adapt(tmp_path / "more", merged, ["q_proj"])
    if not alone:  # transformers itself opens an adapter that lies beside the weights
        for file in own.iterdir():
            shutil.copy(file, base)
    out = secateur.prune(own if alone else base, 2, adapter=second, out=tmp_path / "out")
    close(out, both.base_model, [0, 1])


def test_the_adapter_of_conv1d(tmp_path: Path):
    base, adapter, merged = adapt(tmp_path, tiny("gpt2"), ["c_attn"], fan_in_fan_out=True)
    out = secateur.prune(base, 2, adapter=adapter, out=tmp_path / "out")
    close(out, merged.base_model, [0, 1])


def test_the_adapter_of_the_base_class_is_rounded_once(tmp_path: Path):
    base, adapter, merged = adapt(
        tmp_path, tiny("qwen3", AutoModel, head_dim=8, num_key_value_heads=2).to(torch.bfloat16), ["v_proj"]
    )
    out = secateur.prune(base, keep=[0, 3], adapter=adapter, out=tmp_path / "out")
    close(out, merged, [0, 3], 2**-6)  # peft rounds twice


def test_what_an_adapter_changes_outside_of_the_encoder_is_left_out(tmp_path: Path):
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 3, "num_decoder_layers": 3, "num_heads": 4}
    base, adapter, merged = adapt(tmp_path, T5(T5Config(vocab_size=45, **sizes)), ["q"])
    out = secateur.prune(base, 2, adapter=adapter, out=tmp_path / "out")
    tensors, right = load_file(out / "model.safetensors"), merged.state_dict()
    for name in ("encoder.block.0.layer.0.SelfAttention.q.weight", "encoder.block.1.layer.0.SelfAttention.q.weight"):
        torch.testing.assert_close(tensors[name], right[name])


@pytest.fixture
def adapted(tmp_path: Path) -> tuple[Path, Path]:
    return adapt(tmp_path, tiny(), ["q_proj"])[:2]


def edit(file: Path, **fields: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def without_a_half(adapter: Path) -> None:
    tensors = load_file(adapter / "adapter_model.safetensors")
    tensors.pop(next(name for name in tensors if "lora_B" in name))
    save_file(tensors, adapter / "adapter_model.safetensors")


def of_another_rank(adapter: Path) -> None:
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file({name: torch.zeros(3, 3) for name in tensors}, adapter / "adapter_model.safetensors")


def half_written(adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").write_bytes(b"1234")


def only_a_pickle(adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")


REFUSED = {
    "trained biases": ({"bias": "all"}, "bias"),
    "trained embeddings": ({"modules_to_save": ["embed_tokens"]}, "modules_to_save"),
    "another method": ({"peft_type": "IA3"}, "is a IA3 adapter"),
    "a changed base": ({"init_lora_weights": "pissa"}, "pissa"),
    "an unknown option": ({"tomorrows_option": 1}, "tomorrows_option"),
    "words that call it": ({"alora_invocation_tokens": [5]}, "the adapter cannot be merged"),
    "no rank": ({"r": 0}, "does not fit"),
    "a text for a number": ({"lora_alpha": "six"}, "does not fit"),
    "half of a pair": (without_a_half, "has no weights for"),
    "another rank": (of_another_rank, "does not fit"),
    "half a file": (half_written, "adapter_model.safetensors.*damaged"),
    "a pickle": (only_a_pickle, "has no adapter_model.safetensors"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_other_adapters_are_refused(adapted: tuple[Path, Path], tmp_path: Path, case: str):
    base, adapter = adapted
    change, says = REFUSED[case]
    if callable(change):
        change(adapter)
    else:
        edit(adapter / "adapter_config.json", **change)
    with pytest.raises(ModelError, match=says) as caught:
        secateur.prune(base, 1, adapter=adapter, out=tmp_path / "out")
    assert "\n" not in str(caught.value) and str(adapter) in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_the_adapter_of_another_base_is_refused(adapted: tuple[Path, Path], tmp_path: Path, kind: str):
    other = tiny_transformer(tmp_path / "other")
    tiny(kind, hidden_size=64).save_pretrained(other)
    with pytest.raises(ModelError, match="is this its base"):
        secateur.prune(other, 1, adapter=adapted[1], out=tmp_path / "out")
