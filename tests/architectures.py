"""Tiny random models of many architectures, and what a cut does to each: the matrix.

``python tests/architectures.py > docs/reference/architectures.md`` measures every architecture and writes the table.
"""

from __future__ import annotations

import contextlib
import copy
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import transformers
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import CONFIG_MAPPING, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from secateur.errors import IllegalDepth, UnsupportedArchitecture
from secateur.healing.recipes import TrainingConfig, add_adapters
from secateur.models import blocks, cutting

DEPTH, WIDTH, VOCABULARY = 6, 32, 120
LENGTHS = (12, 9, 5)
TOLERANCE = 1e-4  # of the largest state; float32 on CPU stays below 1e-5

COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
HEADS = ("num_attention_heads", "num_key_value_heads", "head_dim")
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
MAMBA2 = {
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_d_state": 4,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 8,
}
MLA = {
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
    "without": ("head_dim",),
}
DEEPSEEK_EXPERTS = {
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 2,
}
T5 = {
    "d_model": WIDTH,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": DEPTH,
    "num_decoder_layers": DEPTH,
    "num_heads": 4,
    "only": ("vocab_size", "pad_token_id"),
}
ALTERNATING = {"layer_types": ["sliding_attention", "full_attention"] * 3, "sliding_window": 8}
PER_LAYER_EMBEDDINGS = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCABULARY}
VISION = {
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}
QWEN_VISION = {
    "depth": DEPTH,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_heads": 4,
    "out_hidden_size": WIDTH,
    "deepstack_visual_indexes": [1, 2, 3],
    "num_position_embeddings": 16,
}
ROBERTA = {"pad_token_id": 1}
XLM = {"emb_dim": WIDTH, "n_layers": DEPTH, "n_heads": 4, "only": ("vocab_size", "max_position_embeddings")}

PIECES = "layers lie in pieces, in attentions"
REFUSED = {"albert": "share the weights", "flaubert": PIECES, "xlm": PIECES}

# By the name of a variant, "model_type" or "model_type+variant": fields that differ from COMMON.
# "without" drops common fields, "only" keeps no others; "text", "vision" and "encoder" are parts of composite models.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "afmoe": {**EXPERTS, "num_dense_layers": 2, "num_shared_experts": 1, "sliding_window": 8},
    "albert": {"embedding_size": 16},
    "apertus": {},
    "arcee": {},
    "bamba": {"attn_layer_indices": [1, 4], **MAMBA2},
    "bert": {},
    "bert-generation": {},
    "big_bird": {"attention_type": "original_full"},
    "biogpt": {},
    "bitnet": {},
    "bloom": {"without": ("intermediate_size", "num_key_value_heads", "head_dim")},
    "camembert": ROBERTA,
    "codegen": {"rotary_dim": 4},
    "cohere": {},
    "cohere2": {"sliding_window": 8},
    "cohere2_moe": {**EXPERTS, "sliding_window": 8},
    "convbert": {"embedding_size": WIDTH},
    "data2vec-text": ROBERTA,
    "deberta": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    "deberta-v2": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 8},
    "deepseek_v2": {**MLA, **DEEPSEEK_EXPERTS, "topk_method": "greedy"},
    "deepseek_v3": {**MLA, **DEEPSEEK_EXPERTS},
    "diffllama": {},
    "distilbert": {
        "dim": WIDTH,
        "n_heads": 4,
        "n_layers": DEPTH,
        "hidden_dim": 48,
        "only": ("vocab_size", "max_position_embeddings", "pad_token_id"),
    },
    "doge": {},
    "dots1": {**DEEPSEEK_EXPERTS, "sliding_window": 8, "max_window_layers": 2},
    "electra": {"embedding_size": WIDTH},
    "embedding_gemma2_text": {**ALTERNATING, **PER_LAYER_EMBEDDINGS, "global_head_dim": 16},
    "ernie": {},
    "ernie4_5": {},
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 16, "moe_layer_start_index": 2},
    "esm": {"mask_token_id": 3, "position_embedding_type": "rotary", "emb_layer_norm_before": True},
    "esmc": {"num_key_value_heads": 4},
    "eurobert": {},
    "exaone4": {"sliding_window": 8, "sliding_window_pattern": 2},
    "exaone_moe": {**DEEPSEEK_EXPERTS, "num_experts": 4, "sliding_window": 8},
    "falcon": {
        "new_decoder_architecture": True,
        "num_kv_heads": 2,
        "without": ("intermediate_size", "head_dim"),
    },
    "falcon+alibi": {"alibi": True, "without": ("intermediate_size", "head_dim")},
    "falcon_h1": {**MAMBA2, "mamba_d_ssm": 64},
    "falcon_mamba": {"state_size": 4, "without": ("intermediate_size", *HEADS)},
    "flaubert": XLM,
    "flex_olmo": {"num_experts": 4, "num_experts_per_tok": 2},
    "gemma": {},
    "gemma2": {"sliding_window": 8},
    "gemma3_text": {"sliding_window": 8},
    "gemma3_text+bidirectional": {"sliding_window": 8, "use_bidirectional_attention": True},
    "gemma3": {"text": {"sliding_window": 8}, "vision": VISION},
    "gemma3n_text": {
        **ALTERNATING,
        **PER_LAYER_EMBEDDINGS,
        "laurel_rank": 4,
        "num_kv_shared_layers": 2,
        "altup_num_inputs": 2,
    },
    "gemma4_text": {**ALTERNATING, **PER_LAYER_EMBEDDINGS, "global_head_dim": 16, "num_kv_shared_layers": 2},
    "gemma4_text+moe": {
        **ALTERNATING,
        "hidden_size_per_layer_input": 0,
        "global_head_dim": 16,
        "enable_moe_block": True,
        "num_experts": 4,
        "top_k_experts": 2,
        "moe_intermediate_size": 16,
    },
    "glm": {},
    "glm4": {},
    "glm4_moe": DEEPSEEK_EXPERTS,
    "glm4_moe_lite": {**MLA, **DEEPSEEK_EXPERTS},
    "gpt2": {"without": ("intermediate_size", "num_key_value_heads", "head_dim")},
    "gpt2+inverse_scale": {
        "scale_attn_by_inverse_layer_idx": True,
        "without": ("intermediate_size", "num_key_value_heads", "head_dim"),
    },
    "gpt_bigcode": {},
    "gpt_neo": {"num_layers": DEPTH, "num_heads": 4, "attention_types": [[["global", "local"], 3]]},
    "gpt_neox": {},
    "gpt_neox_japanese": {},
    "gpt_oss": {"sliding_window": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
    "gptj": {"rotary_dim": 4},
    "granite": {},
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "granitemoehybrid": {
        "layer_types": ["mamba", "attention", "mamba"] * 2,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "shared_intermediate_size": 16,
        **MAMBA2,
    },
    "granitemoeshared": {"num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 16},
    "gte": {},
    "helium": {},
    "hunyuan_v1_dense": {},
    "hunyuan_v1_moe": {"num_experts": 4, "moe_topk": 2},
    "hyperclovax": {},
    "inkling2_text": {
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 2,
        "swa_head_dim": 8,
        "sliding_window_size": 8,
        "d_rel": 4,
        "rel_extent": 16,
        "n_layers_per_attn_res_block": 2,
        "unpadded_vocab_size": VOCABULARY,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
    },
    "internlm3": {},
    "jamba": {
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "attn_layer_period": 3,
        "attn_layer_offset": 1,
        "use_mamba_kernels": False,
        "mamba_d_state": 4,
        "mamba_dt_rank": 4,
    },
    "jina_embeddings_v3": {},
    "kimi_linear": {**MLA, "q_lora_rank": None, **EXPERTS, "linear_head_dim": 8, "linear_num_heads": 4},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"] * 2, "conv_L_cache": 3, "block_ff_dim": 48},
    "lfm2_moe": {
        **EXPERTS,
        "layer_types": ["conv", "full_attention", "conv"] * 2,
        "conv_L_cache": 3,
        "num_dense_layers": 2,
    },
    "llama": {},
    "llama4_text": {
        "intermediate_size_mlp": 48,
        "num_local_experts": 2,
        "interleave_moe_layer_step": 2,
        "attention_chunk_size": 8,
    },
    "mamba": {"state_size": 4, "without": ("intermediate_size", *HEADS)},
    "mamba2": {
        "state_size": 4,
        "num_heads": 8,
        "head_dim": 8,
        "n_groups": 1,
        "chunk_size": 8,
        "without": ("intermediate_size", "num_attention_heads", "num_key_value_heads"),
    },
    "megatron-bert": {},
    "mimo_v2_flash": {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "v_head_dim": 8},
    "minicpm3": MLA,
    "minimax": {"num_local_experts": 2, "num_experts_per_tok": 1, "block_size": 8},
    "minimax_m2": EXPERTS,
    "ministral": {"sliding_window": 8},
    "ministral3": {"sliding_window": 8},
    "mistral": {"sliding_window": 8},
    "mistral3": {"text": {"model_type": "mistral"}, "vision": {**VISION, "model_type": "pixtral", "head_dim": 8}},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "mobilebert": {
        "embedding_size": WIDTH,
        "true_hidden_size": WIDTH,
        "intra_bottleneck_size": WIDTH,
        "num_feedforward_networks": 2,
    },
    "modernbert": {"local_attention": 8},
    "modernbert-decoder": {"local_attention": 8},
    "mpnet": {},
    "mpt": {
        "d_model": WIDTH,
        "n_heads": 4,
        "n_layers": DEPTH,
        "max_seq_len": 64,
        "expansion_ratio": 2,
        "only": ("vocab_size",),
    },
    "mt5": T5,
    "nanochat": {},
    "nemotron": {},
    "nemotron_h": {
        "layers_block_type": ["mamba", "moe", "attention"] * 2,
        "mamba_num_heads": 8,
        "mamba_head_dim": 8,
        "ssm_state_size": 4,
        "n_groups": 1,
        "chunk_size": 8,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "moe_shared_expert_intermediate_size": 16,
    },
    "nomic_bert": {},
    "nystromformer": {},
    "olmo": {},
    "olmo2": {},
    "olmo3": {"sliding_window": 8},
    "olmo_hybrid": DELTA,
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "openai-gpt": {"without": ("intermediate_size", "num_key_value_heads", "head_dim")},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": WIDTH},
    "opt+projected": {"ffn_dim": 48, "word_embed_proj_dim": 16, "do_layer_norm_before": False},
    "persimmon": {},
    "phi": {},
    "phi3": {"sliding_window": 8},
    "phimoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2": {},
    "qwen2+sliding": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
    "qwen2_moe": {"shared_expert_intermediate_size": 16, "mlp_only_layers": [0, 4], **EXPERTS},
    "qwen3": {},
    "qwen3_5_text": DELTA,
    "qwen3_5_moe_text": {**DELTA, **EXPERTS, "shared_expert_intermediate_size": 16},
    "qwen3_moe": {"mlp_only_layers": [1, 5], "decoder_sparse_step": 2, **EXPERTS},
    "qwen3_next": {"mlp_only_layers": [0], "shared_expert_intermediate_size": 16, **DELTA, **EXPERTS},
    "qwen3_vl": {"text": {}, "vision": QWEN_VISION},
    "recurrent_gemma": {"lru_width": WIDTH, "attention_window_size": 8, "num_key_value_heads": 1},
    "rembert": {"input_embedding_size": 16, "output_embedding_size": 16},
    "roberta": ROBERTA,
    "roberta-prelayernorm": ROBERTA,
    "roformer": {"embedding_size": WIDTH},
    "rwkv": {"attention_hidden_size": WIDTH, "without": HEADS},
    "seed_oss": {},
    "smollm3": {"no_rope_layer_interval": 2},
    "stablelm": {},
    "starcoder2": {},
    "t5": T5,
    "t5gemma": {"encoder": {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 3}},
    "umt5": T5,
    "vaultgemma": {"sliding_window": 8},
    "xglm": {"ffn_dim": 48, "d_model": WIDTH, "num_layers": DEPTH, "attention_heads": 4},
    "xlm": XLM,
    "xlm-roberta": ROBERTA,
    "xlm-roberta-xl": ROBERTA,
    "xlnet": {"d_model": WIDTH, "n_layer": DEPTH, "n_head": 4, "d_inner": 48, "only": ("vocab_size",)},
    "zamba2": {
        "num_mem_blocks": 1,
        "mamba_d_state": 4,
        "mamba_ngroups": 1,
        "n_mamba_heads": 8,
        "chunk_size": 8,
        "num_key_value_heads": 4,
        "layers_block_type": ["mamba", "hybrid", "mamba", "mamba", "hybrid", "mamba"],
        "attention_head_dim": 16,
    },
}
# Fields that some configurations take without declaring them.
UNDECLARED = {"global_head_dim", "sliding_window_pattern", "layers_block_type", "num_local_experts"}


def config_of(name: str) -> PretrainedConfig:
    """The tiny configuration of an architecture."""
    fields = dict(ARCHITECTURES[name])
    kind = CONFIG_MAPPING[name.partition("+")[0]]
    if "encoder" in fields:
        encoder = COMMON | fields["encoder"]
        decoder = encoder | {"cross_attention_hidden_size": WIDTH}
        return kind(encoder=encoder, decoder=decoder, pad_token_id=0, is_encoder_decoder=False)
    if "vision" in fields:
        return kind(text_config=COMMON | fields["text"], vision_config=fields["vision"])
    without, only = fields.pop("without", ()), fields.pop("only", COMMON)
    declared = set(kind.attribute_map) | {key for cls in kind.__mro__ for key in getattr(cls, "__annotations__", {})}
    common = {key: value for key, value in COMMON.items() if key in only and key not in without and key in declared}
    own = {key: value for key, value in fields.items() if key in declared | UNDECLARED or key in ARCHITECTURES[name]}
    return kind(**common | own)


def model_of(name: str) -> PreTrainedModel:
    """A tiny random model whose layers all differ, so that a wrong cut cannot look right."""
    torch.manual_seed(0)
    config = config_of(name)
    encoder = blocks.encoder_class(config)
    model = (encoder(config) if encoder else AutoModel.from_config(config)).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # The usual initialization is so small that layers hardly matter, and makes norms the identity.
            parameter.add_(0.1 * torch.randn_like(parameter)) if parameter.dim() < 2 else parameter.mul_(4)
    return model


def batch(side: str = "right", pad: int = 0) -> dict[str, torch.Tensor]:
    """Three texts of 12, 9 and 5 tokens, padded on one side."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.full((len(LENGTHS), max(LENGTHS)), pad)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(LENGTHS):
        place = slice(0, length) if side == "right" else slice(max(LENGTHS) - length, None)
        ids[row, place] = torch.randint(5, VOCABULARY - 10, (length,), generator=generator)
        mask[row, place] = 1
    return {"input_ids": ids, "attention_mask": mask}


def padding_id(model: PreTrainedModel) -> int:
    return getattr(blocks.text_config(model), "pad_token_id", None) or 0


@torch.no_grad()
def states(model: PreTrainedModel, features: dict[str, torch.Tensor]) -> torch.Tensor:
    """The last states of the real tokens: (tokens of all texts, width)."""
    hidden = model(**features).last_hidden_state
    return hidden[features["attention_mask"].bool()]


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference, relative to the largest value; infinite where shapes differ or a value is not a number."""
    if found.shape != expected.shape or not torch.isfinite(found).all():
        return float("inf")
    return float((found - expected).abs().max() / expected.abs().max())


@contextlib.contextmanager
def bypassed(model: PreTrainedModel, keep: Sequence[int]) -> Iterator[None]:
    """The oracle: in the full, untouched model, all layers but the kept ones hand on what they were given."""

    def hand_on(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        given = args[0] if args else kwargs["hidden_states"]
        return (given, *output[1:]) if isinstance(output, (tuple, list)) else given

    stack = model.get_submodule(blocks.find_stack(model).path)
    others = [block for i, block in enumerate(stack) if i not in keep]
    hooks = [block.register_forward_hook(hand_on, with_kwargs=True) for block in others]
    whole = dict(stack.named_children())
    if model.config.model_type == "inkling2_text":  # it keeps what a layer was given, whatever the layer makes of it
        del stack[max(keep) + 1 :]
    try:
        yield
    finally:
        stack._modules.update(whole)
        for hook in hooks:
            hook.remove()


@dataclass(frozen=True)
class Outcome:
    """What happened to one architecture; errors are relative to the largest state."""

    name: str
    refused: str = ""
    path: str = ""
    norm: str | None = None
    tail_is_norm: bool = False
    legal: tuple[int, ...] = ()
    illegal: str = ""  # what the refusal of the first illegal depth says
    kept: int = 0
    in_memory: float = float("inf")  # cut model against the full one with its later layers bypassed
    through_norm: float | None = None  # cut model against hooked layer output through the final norm
    reloaded: float = float("inf")  # saved and reloaded against the full one with its later layers bypassed
    keys: str = ""  # tensors missing, unexpected or mismatched on reloading
    subset: float | None = None  # as reloaded, for layers 0, 2 and the last; None where refused
    subset_refused: str = ""
    padding: str = ""  # sides on which a padded batch gives the vectors of its single texts
    lora: tuple[str, ...] = ()
    adapters: int = 0  # adapters that peft attached
    idle: tuple[str, ...] = ()  # adapters without a gradient
    bare: tuple[str, ...] = ()  # linear modules inside the layers that got no adapter


@cache
def outcome(name: str) -> Outcome:
    """Cut, save, reload, pad and adapt one architecture."""
    model = model_of(name)
    try:
        stack = blocks.find_stack(model)
        legal = cutting.legal_depths(model.config)
    except UnsupportedArchitecture as error:
        return Outcome(name, refused=str(error))
    kept = next((k for k in legal if k >= DEPTH // 2), DEPTH)
    features = batch(pad=padding_id(model))
    in_memory, reloaded, keys, back = cut_and_reload(model, range(kept), features)
    subset, subset_refused = None, ""
    try:
        subset = max(cut_and_reload(model, (0, 2, DEPTH - 1), features)[:2])
    except IllegalDepth as error:
        subset_refused = str(error)
    tail_is_norm = blocks.tail_is_norm(model, features)
    through_norm = distance(states(back, features), hooked(model, kept, features)) if tail_is_norm else None
    adapters, idle, bare = adapt(back, features)
    return Outcome(
        name,
        path=stack.path,
        norm=stack.norm,
        tail_is_norm=tail_is_norm,
        legal=legal,
        illegal=refusal(model.config, legal),
        kept=kept,
        in_memory=in_memory,
        through_norm=through_norm,
        reloaded=reloaded,
        keys=keys,
        subset=subset,
        subset_refused=subset_refused,
        padding=padding(model),
        lora=blocks.linear_names(model),
        adapters=adapters,
        idle=idle,
        bare=bare,
    )


def cut_and_reload(
    model: PreTrainedModel, keep: Sequence[int], features: dict[str, torch.Tensor]
) -> tuple[float, float, str, PreTrainedModel]:
    """Errors of the cut model in memory and reloaded, keys that did not fit, and the reloaded model."""
    with bypassed(model, keep):
        expected = states(model, features)
    pruned = copy.deepcopy(model)
    cutting.cut(pruned, keep)
    in_memory = distance(states(pruned, features), expected)
    with tempfile.TemporaryDirectory() as folder:
        pruned.save_pretrained(folder)
        back, report = (blocks.encoder_class(model.config) or AutoModel).from_pretrained(
            folder, output_loading_info=True
        )
    keys = ", ".join(f"{kind}: {sorted(found)[0]}" for kind, found in report.items() if found)
    return in_memory, distance(states(back.eval(), features), expected), keys, back


@torch.no_grad()
def hooked(model: PreTrainedModel, depth: int, features: dict[str, torch.Tensor]) -> torch.Tensor:
    """States after ``depth`` layers of the full model, through its final norm."""
    caught = []
    hook = blocks.blocks_of(model)[depth - 1].register_forward_hook(lambda *call: caught.append(call[-1]))
    model(**features)
    hook.remove()
    return blocks.final_norm(model)(blocks.states_of(caught[0]))[features["attention_mask"].bool()]


def refusal(config: PretrainedConfig, legal: Sequence[int]) -> str:
    """What the first illegal depth is told."""
    illegal = next((k for k in range(1, DEPTH) if k not in legal), None)
    if illegal is None:
        return ""
    try:
        cutting.check_keep(config, range(illegal))
    except IllegalDepth as error:
        return str(error)
    raise AssertionError(f"depth {illegal} is not in legal_depths, but check_keep accepts it")


def padding(model: PreTrainedModel) -> str:
    """The sides on which padding changes nothing."""
    sides = []
    for side in ("left", "right"):
        features = batch(side, padding_id(model))
        found = states(model, features)
        rows = zip(features["input_ids"], features["attention_mask"].bool(), strict=True)
        texts = [ids[real][None] for ids, real in rows]
        alone = [states(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}) for ids in texts]
        if distance(found, torch.cat(alone)) < TOLERANCE:
            sides.append(side)
    return "both" if len(sides) == 2 else "".join(sides) or "none"


def adapt(model: PreTrainedModel, features: dict[str, torch.Tensor]) -> tuple[int, tuple[str, ...], tuple[str, ...]]:
    """Train one step of LoRA: adapters attached, those without a gradient, linear modules left bare."""
    stack = blocks.blocks_of(model)
    linear = {id(module): name for name, module in stack.named_modules() if isinstance(module, (nn.Linear, Conv1D))}
    add_adapters(model, TrainingConfig(lora_rank=2))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # zeros, which let no gradient through
                parameter.normal_()
    model.train()(**features).last_hidden_state.square().mean().backward()
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, LoraLayer)}
    gradients = {name: layer.lora_B["default"].weight.grad for name, layer in layers.items()}
    idle = tuple(name for name, gradient in gradients.items() if gradient is None or not gradient.any())
    covered = {id(layer.get_base_layer()) for layer in layers.values()}
    bare = tuple(name for key, name in linear.items() if key not in covered)
    return len(layers), idle, bare


HEADER = """# Architectures

Which architectures secateur can cut, and to which depths. This was measured on tiny random models of {depth} layers
with transformers {version}, by `python tests/architectures.py > docs/reference/architectures.md`: each was cut, saved,
reloaded with stock transformers, and compared with the full model in which the other layers return their input
unchanged. An architecture that is not here is cut by the same rules, which look at structure and not at names.

- **Legal depths**: depths that the first layers can be cut to; secateur computes them for each model.
- **Subsets**: whether layers 0, 2 and the last can be kept alone.
- **Profile**: `one pass` where the final norm of a layer's states is what the model returns; `per depth` where
  something else stands after the layers, so that a profile takes a forward pass for each depth.
- **Padding**: the side on which a padded batch gives the vectors of its single texts; `none` where padding reaches the
  vectors on either side (convolutions or landmarks over the padding), so that texts should be encoded one by one or by
  equal length. A language model's folder is written with right padding.
- **LoRA targets**: what `secateur heal` adapts; packed experts are no linear modules, and stay as they are.

| architecture | layers | final norm | legal depths | subsets | profile | padding | LoRA targets |
|---|---|---|---|---|---|---|---|
"""


def row(result: Outcome) -> str:
    """One line of the table."""
    if result.refused:
        return f"| {result.name} | refused: {result.refused} | | | | | | |"
    cells = (
        result.name,
        f"`{result.path}`",
        f"`{result.norm}`" if result.norm else "none",
        legal_cell(result.legal),
        "yes" if result.subset is not None else "prefixes only" if len(result.legal) > 1 else "no",
        "one pass" if result.tail_is_norm else "per depth",
        result.padding,
        ", ".join(f"`{short}`" for short in dict.fromkeys(name.rpartition(".")[2] for name in result.lora)),
    )
    return f"| {' | '.join(cells)} |"


def legal_cell(legal: Sequence[int]) -> str:
    if len(legal) == DEPTH:
        return "all"
    cuts = [str(depth) for depth in legal if depth < DEPTH]
    return f"{', '.join(cuts)} of {DEPTH}" if cuts else "none: its layers depend on the depth"


def main() -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    sys.stdout.write(HEADER.format(depth=DEPTH, version=transformers.__version__))
    for name in ARCHITECTURES:
        sys.stdout.write(row(outcome(name)) + "\n")


if __name__ == "__main__":
    main()
