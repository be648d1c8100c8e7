"""Private interfaces of other libraries: each test names the function of models/compat.py that a new version breaks."""

from __future__ import annotations

import numpy as np
import peft
import torch
from safetensors.torch import load_file
from sentence_transformers.sentence_transformer.modules import Pooling
from transformers import AutoModel

from architectures import config_of, model_of
from conftest import MakeEncoder, llama_model
from secateur.models import compat


def test_is_ignored_tells_a_decoder_of_an_encoder():
    model = model_of("t5")
    assert compat.is_ignored(model, "decoder.block.0.layer.0.SelfAttention.q.weight")
    assert not compat.is_ignored(model, "encoder.block.0.layer.0.SelfAttention.q.weight")


def test_forget_origin_lets_a_model_be_saved_as_a_model(tmp_path):
    llama_model(45).save_pretrained(tmp_path / "base")
    base = AutoModel.from_pretrained(tmp_path / "base")
    base.add_adapter(peft.LoraConfig(target_modules=["q_proj"]))
    base.save_pretrained(tmp_path / "adapter")
    model = AutoModel.from_pretrained(tmp_path / "adapter")
    for layer in model.layers:
        layer.self_attn.q_proj = layer.self_attn.q_proj.get_base_layer()
    compat.forget_origin(model)
    model.save_pretrained(tmp_path / "out")
    names = load_file(tmp_path / "out" / "model.safetensors").keys()
    assert names == load_file(tmp_path / "base" / "model.safetensors").keys()


def test_forget_origin_undoes_a_key_mapping(tmp_path):
    llama_model(45).save_pretrained(tmp_path / "m")
    model = AutoModel.from_pretrained(tmp_path / "m", key_mapping={"^net\\.": ""})
    compat.forget_origin(model)
    model.save_pretrained(tmp_path / "out")
    assert "norm.weight" in load_file(tmp_path / "out" / "model.safetensors")


def test_drop_layer_pattern_drops_what_gemma_3_would_make_layer_types_from(tmp_path):
    config = config_of("gemma3_text")
    assert "_sliding_window_pattern" in vars(config)
    compat.drop_layer_pattern(config)
    config.save_pretrained(tmp_path)
    assert "sliding_window_pattern" not in (tmp_path / "config.json").read_text()


def test_cut_layer_overrides_renumbers_what_is_said_of_single_layers():
    config = config_of("llama")
    config.per_layer_config = {1: {"intermediate_size": 16}, 2: {"intermediate_size": 24}}
    compat.cut_layer_overrides(config, [0, 2])
    config.num_hidden_layers = 2
    assert [config.per_layer_config[i].intermediate_size for i in range(2)][1] == 24


def test_text_mask_masks_the_prompt_on_either_side():
    pooling = Pooling(4, "mean", include_prompt=False)
    mask = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1]])
    assert compat.text_mask(pooling, mask, 2).tolist() == [[0, 0, 1, 0], [0, 0, 0, 1]]


def test_encode_alone_takes_back_what_shares_the_texts_among_processes(make_encoder: MakeEncoder):
    model = make_encoder()
    model._distributed_inference = lambda texts, **_: np.zeros((len(texts), 1))
    assert model.encode(["a"]).shape == (1, 1)
    compat.encode_alone(model)
    assert model.encode(["a"]).shape == (1, 32)


def test_multiplies_bfloat16_answers():
    assert compat.multiplies_bfloat16() in (True, False)


def test_tensors_of_tells_absent_ones():
    assert compat.tensors_of(torch.nn.Linear(2, 2, bias=False)).keys() == {"weight", "bias"}
