"""Finding and cutting layers, where the matrix (test_architectures.py) does not look: fields, refusals, traps."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import (
    AutoModel,
    BartConfig,
    BartModel,
    DeepseekV4Config,
    Gemma3ForConditionalGeneration,
    GlmMoeDsaConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen4ExpTextConfig,
    ResNetConfig,
    T5Config,
    T5Model,
)

from architectures import ARCHITECTURES, DEPTH, TOLERANCE, batch, bypassed, config_of, distance, model_of, states
from secateur.errors import IllegalDepth, UnsupportedArchitecture
from secateur.healing.recipes import TrainingConfig, add_adapters
from secateur.models import blocks, cutting


def llama(layers: int = DEPTH, **fields) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=120,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        **fields,
    )


def naive_cut(model: PreTrainedModel, depth: int) -> None:
    """The three lines that everyone writes."""
    model.layers = model.layers[:depth]
    model.config.num_hidden_layers = depth
    model.config.use_cache = False


def reloaded(model: PreTrainedModel, folder) -> PreTrainedModel:
    model.save_pretrained(folder)
    return AutoModel.from_pretrained(folder).eval()


class TestFinding:
    def test_blocks_and_norm_of_a_language_model(self):
        model = LlamaForCausalLM(llama())
        assert blocks.find_stack(model) == blocks.Stack("model.layers", "model.norm")
        assert blocks.blocks_of(model) is model.model.layers
        assert blocks.final_norm(model) is model.model.norm

    def test_post_norm_encoders_have_no_final_norm(self):
        assert isinstance(blocks.final_norm(model_of("bert")), nn.Identity)

    def test_the_vision_tower_of_equal_depth_is_not_taken_for_the_text_tower(self):
        model = Gemma3ForConditionalGeneration(config_of("gemma3"))
        assert blocks.find_stack(model).path == "model.language_model.layers"

    @pytest.mark.parametrize("model", [lambda: T5Model(tiny_t5()), lambda: BartModel(tiny_bart())], ids=["t5", "bart"])
    def test_whole_encoder_decoders_are_refused(self, model):
        with pytest.raises(UnsupportedArchitecture, match="open its encoder alone"):
            blocks.find_stack(model())

    def test_of_an_encoder_decoder_configuration_the_encoder_is_judged(self):
        assert cutting.legal_depths(tiny_t5()) == (1, 2)
        assert type(blocks.skeleton(tiny_t5())).__name__ == "T5EncoderModel"

    def test_shared_blocks_are_refused_in_a_clear_line(self):
        for refused in (blocks.find_stack, blocks.depth_of, lambda model: cutting.cut(model, [0])):
            with pytest.raises(UnsupportedArchitecture, match="its 6 layers share the weights of 1, so none"):
                refused(model_of("albert"))
        with pytest.raises(UnsupportedArchitecture, match="share the weights"):
            cutting.check_keep(config_of("albert"), [0, 1])

    def test_a_model_without_a_stack_of_blocks_is_refused(self):
        with pytest.raises(UnsupportedArchitecture, match="ResNetModel has no list of its layers"):
            blocks.find_stack(AutoModel.from_config(ResNetConfig(hidden_sizes=[8], depths=[1], embedding_size=8)))

    def test_a_configuration_without_a_text_model_is_refused(self):
        config = llama()
        config.__class__ = type("HomemadeConfig", (LlamaConfig,), {"model_type": "homemade"})
        with pytest.raises(UnsupportedArchitecture, match="no text model of the type homemade"):
            cutting.legal_depths(config)


def tiny_t5() -> T5Config:
    return T5Config(vocab_size=50, d_model=16, d_kv=4, d_ff=16, num_layers=2, num_heads=2)


def tiny_bart() -> BartConfig:
    sizes = {f"{side}_{what}": 2 for side in ("encoder", "decoder") for what in ("layers", "attention_heads")}
    return BartConfig(vocab_size=50, d_model=16, encoder_ffn_dim=16, decoder_ffn_dim=16, **sizes)


class TestLinearNames:
    def test_fused_projections_and_conv1d(self):
        assert blocks.linear_names(model_of("phi3")) == (
            "self_attn.o_proj",
            "self_attn.qkv_proj",
            "mlp.gate_up_proj",
            "mlp.down_proj",
        )
        assert blocks.linear_names(model_of("gpt2")) == ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")

    def test_only_what_returns_a_product_takes_an_adapter(self):
        """A router of Llama 4 returns scores, too, and DeepSeek V4 has a product for each group of heads."""
        sizes = {"num_hidden_layers": 3, "num_attention_heads": 4, "head_dim": 16, "q_lora_rank": 8, "o_lora_rank": 4}
        sizes |= {"vocab_size": 60, "hidden_size": 32, "moe_intermediate_size": 16, "n_routed_experts": 4}
        config = DeepseekV4Config(**sizes, num_experts_per_tok=2, index_n_heads=2, o_groups=2, hc_mult=2)
        deepseek = AutoModel.from_config(config)
        for model, left_out in ((deepseek, "self_attn.o_a_proj"), (model_of("llama4_text"), "feed_forward.router")):
            linear = {name for name, part in model.layers[-1].named_modules() if isinstance(part, nn.Linear)}
            assert linear - set(blocks.linear_names(model)) == {left_out}
            add_adapters(model, TrainingConfig())
            assert model(input_ids=torch.tensor([[5, 6, 7]])).last_hidden_state.isfinite().all()

    def test_the_vision_tower_is_left_alone_though_it_has_the_same_names(self):
        model = model_of("gemma3")
        add_adapters(model, TrainingConfig())
        adapted = [name for name, module in model.named_modules() if isinstance(module, LoraLayer)]
        assert len(adapted) == DEPTH * 7
        assert all(name.startswith("language_model.layers.") for name in adapted)


class TestTail:
    @pytest.mark.parametrize("name", ["llama", "bert", "opt", "mamba"])
    def test_a_norm_alone(self, name):
        assert blocks.tail_is_norm(model_of(name), batch())

    @pytest.mark.parametrize("name", ["gemma3n_text", "opt+projected", "xlnet"])
    def test_something_else_stands_after_the_blocks(self, name):
        assert not blocks.tail_is_norm(model_of(name), batch())

    def test_no_hook_is_left(self):
        model = model_of("llama")
        blocks.tail_is_norm(model, batch())
        assert not model.layers[-1]._forward_hooks


class TestConfig:
    def test_every_field_with_one_item_for_each_layer_is_sliced(self):
        config = config_of("smollm3")
        before = copy.deepcopy(config)
        cutting.cut_config(config, [0, 3, 5])
        assert config.num_hidden_layers == 3
        assert config.no_rope_layers == [before.no_rope_layers[i] for i in (0, 3, 5)]
        assert config.layer_types == [before.layer_types[i] for i in (0, 3, 5)]

    def test_index_lists_are_renumbered(self):
        config = config_of("qwen2_moe")
        assert config.mlp_only_layers == [0, 4]
        cutting.cut_config(config, [1, 4, 5])
        assert config.mlp_only_layers == [1]
        config = Qwen4ExpTextConfig(num_hidden_layers=6, ple_layer_ids=[2, 5], eos_token_id=2)  # counted from 1
        cutting.cut_config(config, [1, 2, 4])
        assert config.ple_layer_ids == [1, 3]

    @pytest.mark.parametrize(("depth", "windows"), [(1, 1), (2, 2), (4, 2)])
    def test_counters(self, depth, windows):
        config = config_of("qwen2+sliding")
        cutting.cut_config(config, range(depth))
        assert config.max_window_layers == windows
        dense = config_of("deepseek_v3")
        cutting.cut_config(dense, range(depth))
        assert dense.first_k_dense_replace == windows

    def test_shared_caches_are_counted_from_the_back(self):
        config = config_of("gemma4_text")
        assert config.num_kv_shared_layers == 2
        cutting.cut_config(config, range(5))
        assert config.num_kv_shared_layers == 1
        cutting.cut_config(config, range(4))
        assert config.num_kv_shared_layers == 0

    def test_only_the_text_part_of_a_multimodal_configuration_is_cut(self):
        config = config_of("gemma3")
        cutting.cut_config(config, range(2))
        assert (config.text_config.num_hidden_layers, config.vision_config.num_hidden_layers) == (2, DEPTH)
        assert blocks.text_config(config) is config.text_config

    def test_lists_of_the_same_length_that_are_not_about_layers_stay(self):
        config = llama(layers=2, eos_token_id=[3, 4])
        cutting.cut_config(config, [0])
        assert config.eos_token_id == [3, 4]

    @settings(max_examples=40, deadline=None)
    @given(st.sets(st.integers(0, DEPTH - 1), min_size=1), st.sampled_from(["qwen2", "gemma2", "modernbert", "lfm2"]))
    def test_the_kept_layers_keep_their_types(self, kept, name):
        keep = sorted(kept)
        config = config_of(name)
        types = list(config.layer_types)
        cutting.cut_config(config, keep)
        assert list(config.layer_types) == [types[i] for i in keep]


class TestRefusals:
    @pytest.mark.parametrize(
        ("keep", "problem"),
        [
            ([], "at least one layer must stay"),
            (range(7), "its layers are 0 to 5"),
            ([-1, 0], "its layers are 0 to 5"),
            ([0, 6], "its layers are 0 to 5"),
            ([0, 1, 1], "layers must ascend, each at most once"),
            ([2, 0], "layers must ascend, each at most once"),
        ],
    )
    def test_blocks_that_are_not_there(self, keep, problem):
        with pytest.raises(IllegalDepth, match=problem) as error:
            cutting.check_keep(llama(), keep)
        assert error.value.depth == DEPTH
        assert error.value.nearest

    @pytest.mark.parametrize(("depth", "nearest"), [(1, (2,)), (3, (2, 4)), (5, (4, 6))])
    def test_gemma_4_must_end_on_full_attention(self, depth, nearest):
        with pytest.raises(IllegalDepth, match="layer_types") as error:
            cutting.check_keep(config_of("gemma4_text"), range(depth))
        assert error.value.nearest == nearest
        assert f"nearest legal: {', '.join(map(str, nearest))}" in str(error.value)

    def test_a_first_layer_that_takes_what_an_earlier_one_selects_is_refused(self):
        config = GlmMoeDsaConfig(num_hidden_layers=6, indexer_types=["full", "shared", "shared"] * 2)
        with pytest.raises(IllegalDepth, match="layer 1 takes what an earlier one selects, and would be the first"):
            cutting.check_keep(config, [1, 3])
        cutting.check_keep(config, [0, 4])

    def test_a_depth_that_the_blocks_are_scaled_by_is_refused(self):
        with pytest.raises(IllegalDepth, match="scaling_factor depends on place or depth") as error:
            cutting.check_keep(config_of("esmc"), range(3))
        assert error.value.nearest == (DEPTH,)

    def test_what_transformers_cannot_build_is_refused(self):
        config = llama()
        config.hidden_act = "no such activation"
        with pytest.raises(UnsupportedArchitecture, match="cannot build it"):
            cutting.legal_depths(config)

    @pytest.mark.parametrize("name", ["diffllama", "jamba", "gpt2+inverse_scale"])
    def test_blocks_that_depend_on_their_place_may_not_move(self, name):
        config = config_of(name)
        with pytest.raises(IllegalDepth, match="depends on place or depth"):
            cutting.check_keep(config, [0, 2, 5])
        cutting.check_keep(config, range(3))

    def test_a_refused_cut_leaves_the_model_as_it_was(self):
        model = model_of("diffllama")
        before = states(model, batch())
        with pytest.raises(IllegalDepth):
            cutting.cut(model, [1, 2])
        assert model.config.num_hidden_layers == len(model.layers) == DEPTH
        assert torch.equal(states(model, batch()), before)

    def test_judging_edits_nothing(self):
        config = config_of("gemma4_text")
        before = config.to_dict()
        cutting.legal_depths(config)
        assert config.to_dict() == before


class TestCut:
    def test_the_naive_cut_of_minicpm3_reloads_wrong_and_this_one_does_not(self, tmp_path):
        """Its residuals are scaled by the depth in the configuration."""
        model = model_of("minicpm3")
        with bypassed(model, range(3)):
            expected = states(model, batch())
        naive, ours = copy.deepcopy(model), copy.deepcopy(model)
        naive_cut(naive, 3)
        cutting.cut(ours, range(3))
        assert distance(states(naive, batch()), expected) < TOLERANCE
        assert distance(states(reloaded(naive, tmp_path / "naive"), batch()), expected) > 0.05
        assert distance(states(reloaded(ours, tmp_path / "ours"), batch()), expected) < TOLERANCE

    def test_the_naive_cut_of_nemotron_h_reloads_wrong_and_this_one_does_not(self, tmp_path):
        """It counts its layers by their kinds and ignores the number."""
        model = model_of("nemotron_h")
        with bypassed(model, range(3)):
            expected = states(model, batch())
        naive, ours = copy.deepcopy(model), copy.deepcopy(model)
        naive_cut(naive, 3)
        cutting.cut(ours, range(3))
        assert distance(states(reloaded(naive, tmp_path / "naive"), batch()), expected) > 0.005
        back = reloaded(ours, tmp_path / "ours")
        assert blocks.depth_of(back) == 3
        assert distance(states(back, batch()), expected) < TOLERANCE

    @pytest.mark.parametrize("name", ["llama", "gemma3n_text", "gemma3", "umt5", "nemotron_h", "zamba2"])
    def test_cutting_twice_is_cutting_once(self, name):
        once, twice = model_of(name), model_of(name)
        cutting.cut(once, range(2))
        cutting.cut(twice, range(4))
        cutting.cut(twice, range(2))
        assert torch.equal(states(once, batch()), states(twice, batch()))
        assert once.config.to_dict() == twice.config.to_dict()

    def test_packed_tensors_keep_the_slices_of_the_kept_blocks(self):
        model = model_of("gemma3n_text")
        table = model.embed_tokens_per_layer.weight.detach().clone()
        projection = model.per_layer_model_projection.weight.detach().clone()
        cutting.cut(model, range(4))
        assert torch.equal(model.embed_tokens_per_layer.weight, table[:, : 4 * 8])
        assert torch.equal(model.per_layer_model_projection.weight, projection[: 4 * 8])
        assert model.per_layer_model_projection.out_features == 4 * 8

    def test_packed_tensors_follow_a_subset(self):
        model = model_of("embedding_gemma2_text")
        with bypassed(model, [1, 4, 5]):
            expected = states(model, batch())
        cutting.cut(model, [1, 4, 5])
        assert distance(states(model, batch()), expected) < TOLERANCE

    def test_positions_are_renumbered_and_caches_are_off(self):
        model = model_of("llama")
        assert model.config.use_cache
        cutting.cut(model, [0, 2, 5])
        assert [block.self_attn.layer_idx for block in model.layers] == [0, 1, 2]
        assert not model.config.use_cache
        cached = model(**batch(), use_cache=True)
        assert len(cached.past_key_values.layers) == 3

    def test_the_vision_tower_and_the_head_stay(self):
        model = Gemma3ForConditionalGeneration(config_of("gemma3"))
        vision = sum(parameter.numel() for parameter in model.model.vision_tower.parameters())
        cutting.cut(model, range(2))
        assert len(model.model.language_model.layers) == model.config.text_config.num_hidden_layers == 2
        assert sum(parameter.numel() for parameter in model.model.vision_tower.parameters()) == vision
        assert model.get_output_embeddings() is model.lm_head

    def test_weights_are_not_copied(self):
        model = model_of("llama")
        kept = model.layers[4].mlp.up_proj.weight
        cutting.cut(model, [0, 4])
        assert model.layers[1].mlp.up_proj.weight is kept

    @pytest.mark.parametrize("name", ["llama", "bert", "gpt2", "qwen2", "t5", "gemma3"])
    def test_all_blocks_change_nothing(self, name):
        model = model_of(name)
        before = states(model, batch())
        cutting.cut(model, range(DEPTH))
        assert torch.equal(states(model, batch()), before)

    @pytest.mark.parametrize("name", ["gemma4_text+moe", "zamba2", "llama4_text", "granitemoehybrid"])
    @pytest.mark.parametrize("keep", [[0, 3], [1, 2, 5], [0, 1, 2, 3, 5]], ids=str)
    def test_what_is_judged_legal_is_right_after_reloading(self, name, keep, tmp_path):
        model = model_of(name)
        try:
            cutting.check_keep(model.config, keep)
        except IllegalDepth as error:
            assert error.nearest
            return
        with bypassed(model, keep):
            expected = states(model, batch())
        cutting.cut(model, keep)
        assert distance(states(reloaded(model, tmp_path), batch()), expected) < TOLERANCE


def test_legal_depths_agree_with_check_keep():
    for name in ("gemma4_text", "olmo_hybrid", "minicpm3", "qwen3"):
        config = config_of(name)
        legal = cutting.legal_depths(config)
        for depth in range(1, DEPTH + 1):
            if depth in legal:
                cutting.check_keep(config, range(depth))
            else:
                with pytest.raises(IllegalDepth):
                    cutting.check_keep(config, range(depth))


def test_at_least_eighty_model_types_are_measured():
    assert len({name.partition("+")[0] for name in ARCHITECTURES}) >= 80
