"""Checkpoints cut without being opened: the same bits as the model cut in memory, and hostile files refused."""

from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import peft
import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load as load_bytes
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedModel

from architectures import ARCHITECTURES, model_of
from hub import StandIn, serve
from secateur.checkpoints.checkpoint import Pruned, prune_checkpoint
from secateur.checkpoints.shards import read_header
from secateur.checkpoints.sources import Folder
from secateur.errors import IllegalDepth, ModelError, OutputError, SecateurError, UnsupportedArchitecture
from secateur.models import blocks

DEPTH = 5
COMMON = {
    "vocab_size": 60,
    "hidden_size": 32,
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
EXPERTS = {"num_local_experts": 8, "num_experts_per_tok": 2}
WITHOUT = {
    "gpt2": ("num_key_value_heads", "head_dim", "intermediate_size"),
    "bert": ("num_key_value_heads", "head_dim"),
}
PER_LAYER = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 60}


def tiny(kind: str, head: type = AutoModelForCausalLM, dtype: torch.dtype = torch.float32, **fields) -> PreTrainedModel:
    """A tiny random model, no two of its tensors alike."""
    torch.manual_seed(0)
    common = {key: value for key, value in COMMON.items() if key not in WITHOUT.get(kind, ())}
    model = head.from_config(AutoConfig.for_model(kind, **(common | fields)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return model.to(dtype)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """A sharded checkpoint with a head."""
    tiny("llama").save_pretrained(tmp_path / "llama", max_shard_size="40KB")
    assert len(list((tmp_path / "llama").glob("*.safetensors"))) > 3
    return tmp_path / "llama"


def same(out: Path, whole: PreTrainedModel, keep: list[int], load: type = AutoModel) -> PreTrainedModel:
    """The folder, opened by transformers, is the model cut in memory: the same tensors, bit for bit."""
    expected = copy.deepcopy(whole)
    blocks.cut(expected, keep)
    found, report = load.from_pretrained(out, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    assert type(found) is type(expected)
    assert found.config.architectures == [type(expected).__name__]
    left, right = found.state_dict(), expected.state_dict()
    assert left.keys() == right.keys()
    for name, tensor in right.items():
        assert left[name].dtype == tensor.dtype and torch.equal(left[name], tensor), name
    return found


CASES = {
    "llama": ("llama", {}),
    "llama+tied": ("llama", {"tie_word_embeddings": True}),
    "mistral": ("mistral", {"sliding_window": 8}),
    "qwen3": ("qwen3", {}),
    "gemma3_text": ("gemma3_text", {"sliding_window": 8}),
    "gpt2": ("gpt2", {}),
    "mixtral": ("mixtral", EXPERTS),
    "bamba": ("bamba", {"attn_layer_indices": [1, 4], "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 4}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("keep", [[0, 1, 2], [1, 2, 4]], ids=["first", "some"])
@pytest.mark.parametrize("case", CASES)
def test_equals_the_model_cut_in_memory(tmp_path, out, case, keep, dtype):
    kind, fields = CASES[case]
    model = tiny(kind, dtype=dtype, **fields)
    model.save_pretrained(tmp_path / "m", max_shard_size="60KB")
    told = []
    result = prune_checkpoint(
        tmp_path / "m", keep, out, max_shard_bytes=50_000, progress=lambda *step: told.append(step)
    )
    found = same(out, model.base_model, keep)
    ids = torch.arange(3, 15).reshape(2, 6)
    assert torch.isfinite(found.eval()(input_ids=ids, use_cache=False).last_hidden_state).all()
    written = {name: tensor for file in out.glob("*.safetensors") for name, tensor in load_file(file).items()}
    assert set(result.kept) == set(written)
    assert result.bytes_kept == sum(t.numel() * t.element_size() for t in written.values())
    assert sorted(result.shards) == sorted(file.name for file in out.glob("*.safetensors"))
    assert told[-1] == (result.bytes_kept, result.bytes_kept)
    assert ("lm_head.weight" in result.dropped) == (case not in ("llama+tied", "gpt2", "gemma3_text"))


def test_reads_what_it_keeps(llama, out):
    result = prune_checkpoint(llama, [0, 1], out)
    headers = sum(int.from_bytes(file.read_bytes()[:8], "little") + 8 for file in llama.glob("*.safetensors"))
    assert result.bytes_kept <= result.bytes_read <= result.bytes_kept + headers
    assert result.shards == ("model.safetensors",)


def test_names_are_those_that_transformers_would_write(llama, out, tmp_path):
    prune_checkpoint(llama, [1, 3], out)
    reference = AutoModel.from_pretrained(llama)
    blocks.cut(reference, [1, 3])
    reference.save_pretrained(tmp_path / "reference")
    assert load_file(out / "model.safetensors").keys() == load_file(tmp_path / "reference/model.safetensors").keys()


def test_configuration_tells_no_paths(llama, out):
    edit_json(llama / "config.json", auto_map={"AutoModel": "modeling.Own"})
    prune_checkpoint(llama, [0], out)
    text = (out / "config.json").read_text()
    assert str(llama) not in text and "auto_map" not in text
    assert json.loads(text)["use_cache"] is False


def test_bert_without_pooler_says_so(tmp_path, out):
    tiny("bert", AutoModelForMaskedLM).save_pretrained(tmp_path / "m")
    result = prune_checkpoint(tmp_path / "m", [0, 1], out)
    assert result.missing == ("pooler.dense.bias", "pooler.dense.weight")
    assert any(name.startswith("cls.") for name in result.dropped)


def test_bert_with_pooler(tmp_path, out):
    model = tiny("bert", AutoModel)
    model.save_pretrained(tmp_path / "m")
    assert prune_checkpoint(tmp_path / "m", [0, 2], out).missing == ()
    same(out, model, [0, 2])


def test_old_names_are_understood(tmp_path, out):
    model = tiny("bert", AutoModel)
    model.save_pretrained(tmp_path / "m")
    file = tmp_path / "m/model.safetensors"
    old = {
        "bert."
        + name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for name, tensor in load_file(file).items()
    }
    save_file(old, file, {"format": "pt"})
    prune_checkpoint(tmp_path / "m", [1, 2], out)
    same(out, model, [1, 2])


@pytest.mark.parametrize("old", [False, True])
def test_text_tower_of_a_multimodal_model(tmp_path, out, old):
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": DEPTH, "num_attention_heads": 4}
    config = AutoConfig.for_model(
        "gemma3",
        text_config=COMMON | {"sliding_window": 8},
        vision_config=vision | {"image_size": 28, "patch_size": 14},
    )
    torch.manual_seed(0)
    model = transformers.Gemma3ForConditionalGeneration(config)
    model.save_pretrained(tmp_path / "m")
    file = tmp_path / "m/model.safetensors"
    names = {name: tensor for name, tensor in load_file(file).items()}
    if old:
        names = {re.sub(r"^model\.language_model\.", "language_model.model.", name): t for name, t in names.items()}
        names = {re.sub(r"^model\.(vision|multi)", r"\1", name): t for name, t in names.items()}
        save_file(names, file, {"format": "pt"})
    result = prune_checkpoint(tmp_path / "m", [0, 2], out)
    same(out, model.model.language_model, [0, 2])
    assert any("vision" in name for name in result.dropped)


@pytest.mark.parametrize("keep", [[0, 1, 2, 3], [2, 3]])
def test_packed_per_layer_embeddings_are_sliced(tmp_path, out, keep):
    kinds = ["sliding_attention", "full_attention"] * 3
    depth = {"num_hidden_layers": 6, "layer_types": kinds, "sliding_window": 8, "num_kv_shared_layers": 0}
    model = tiny("gemma4_text", AutoModel, global_head_dim=16, **depth, **PER_LAYER)
    model.save_pretrained(tmp_path / "m")
    prune_checkpoint(tmp_path / "m", keep, out)
    same(out, model, keep)


def test_encoder_of_an_encoder_decoder(tmp_path, out):
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 4, "num_decoder_layers": 4, "num_heads": 4}
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(vocab_size=60, **sizes))
    model.save_pretrained(tmp_path / "m")
    result = prune_checkpoint(tmp_path / "m", [0, 1], out)
    encoder = transformers.T5EncoderModel.from_pretrained(tmp_path / "m")
    same(out, encoder, [0, 1], transformers.T5EncoderModel)
    assert any(name.startswith("decoder.") for name in result.dropped)


def test_small_files_come_along_and_code_does_not(llama, out):
    for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "chat_template.jinja"):
        (llama / name).write_text("{}")
    for name in ("modeling.py", "vocab.pkl", "pytorch_model.bin", "training_args.bin", "notes.txt"):
        (llama / name).write_text("x")
    prune_checkpoint(llama, [0], out)
    expected = {"tokenizer.json", "tokenizer_config.json", "tokenizer.model", "chat_template.jinja"}
    assert {file.name for file in out.iterdir()} == expected | {
        "config.json",
        "generation_config.json",
        "model.safetensors",
    }


@pytest.mark.slow
@pytest.mark.parametrize("keep", [[0, 1, 2, 3], [1, 3, 5]], ids=["first", "some"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture(tmp_path, out, name, keep):
    """Each is cut to the same tensors as in memory, or refused as it is there."""
    whole = model_of(name)
    tower = getattr(whole, "language_model", whole)
    expected = copy.deepcopy(tower)
    try:
        blocks.cut(expected, keep)
    except SecateurError as refusal:
        kind = type(refusal)
        whole.save_pretrained(tmp_path / "m")
        with pytest.raises(kind):
            prune_checkpoint(tmp_path / "m", keep, out)
        return
    whole.save_pretrained(tmp_path / "m", max_shard_size="100KB")
    prune_checkpoint(tmp_path / "m", keep, out, max_shard_bytes=60_000)
    found = type(expected).from_pretrained(out).state_dict()
    assert found.keys() == expected.state_dict().keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.state_dict().items())


# ---- adapters


@pytest.fixture
def adapted(tmp_path: Path) -> tuple[Path, Path, PreTrainedModel]:
    return adapt(tmp_path, tiny("llama"), ["q_proj", "down_proj"])


def adapt(tmp_path: Path, model: PreTrainedModel, targets: list[str], **options) -> tuple[Path, Path, PreTrainedModel]:
    """A base, an adapter trained on it (random here), and what peft itself makes of the two."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    model.save_pretrained(base)
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=targets, init_lora_weights=False, **options)
    change = peft.get_peft_model(type(model).from_pretrained(base), config)
    change.save_pretrained(adapter)
    return base, adapter, change.merge_and_unload()


def close(out: Path, whole: PreTrainedModel, keep: list[int], atol: float) -> None:
    expected = copy.deepcopy(whole)
    blocks.cut(expected, keep)
    found = AutoModel.from_pretrained(out).state_dict()
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(found[name], tensor, atol=atol, rtol=atol)


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("rslora", [False, True])
def test_lora_is_merged(tmp_path, out, named, rslora):
    base, adapter, merged = adapt(tmp_path, tiny("llama"), ["q_proj", "down_proj"], use_rslora=rslora)
    if named:
        prune_checkpoint(adapter, [1, 3], out)
    else:
        prune_checkpoint(base, [1, 3], out, adapter=adapter)
    close(out, merged.base_model, [1, 3], 1e-5)


def test_lora_of_conv1d_is_transposed(tmp_path, out):
    base, adapter, merged = adapt(tmp_path, tiny("gpt2"), ["c_attn"], fan_in_fan_out=True)
    prune_checkpoint(base, [0, 1], out, adapter=adapter)
    close(out, merged.base_model, [0, 1], 1e-5)


def test_lora_of_the_base_class_in_bfloat16(tmp_path, out):
    base, adapter, merged = adapt(tmp_path, tiny("qwen3", AutoModel, torch.bfloat16), ["v_proj"])
    prune_checkpoint(base, [0, 4], out, adapter=adapter)
    close(out, merged, [0, 4], 2**-6)  # peft rounds twice, here it is once


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("use_dora", True, "use_dora"),
        ("bias", "all", "bias"),
        ("modules_to_save", ["embed_tokens"], "modules_to_save"),
        ("rank_pattern", {"q_proj": 8}, "rank_pattern"),
        ("peft_type", "IA3", "IA3"),
        ("init_lora_weights", "pissa", "pissa"),
        ("tomorrows_option", 1, "tomorrows_option"),
        ("r", 0, "r is 0"),
        ("lora_alpha", "six", "lora_alpha"),
    ],
)
def test_other_adapters_are_refused(adapted, out, field, value, says):
    base, adapter, _ = adapted
    edit_json(adapter / "adapter_config.json", **{field: value})
    refused(base, out, says, "adapter_config.json", adapter=adapter)


def test_adapter_of_another_base_is_refused(tmp_path, adapted, out):
    _, adapter, _ = adapted
    tiny("llama", hidden_size=64).save_pretrained(tmp_path / "wider")
    refused(tmp_path / "wider", out, "is this its base", adapter=adapter)
    tiny("gpt2").save_pretrained(tmp_path / "other")
    refused(tmp_path / "other", out, "is this its base", adapter=adapter)


def test_adapter_with_half_a_pair_is_refused(adapted, out):
    base, adapter, _ = adapted
    tensors = load_file(adapter / "adapter_model.safetensors")
    tensors.pop(next(name for name in tensors if "lora_B" in name))
    save_file(tensors, adapter / "adapter_model.safetensors")
    refused(base, out, "only one of the two", "adapter_model.safetensors", adapter=adapter)


# ---- broken and hostile checkpoints


def edit_json(file: Path, **fields) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def refused(source: Path, out: Path, *says: str, keep: tuple[int, ...] = (0, 1), **options) -> None:
    """One line that says what is wrong and names the file; nothing left behind."""
    with pytest.raises(ModelError) as caught:
        prune_checkpoint(source, keep, out, **options)
    message = str(caught.value)
    assert "\n" not in message
    for word in says:
        assert word in message
    assert list(out.iterdir()) == []


def rewrite_header(file: Path, edit, *, length: int | None = None) -> None:
    """Change a header as text, keeping the data."""
    content = file.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = edit(content[8 : 8 + size].decode()).encode()
    file.write_bytes((len(header) if length is None else length).to_bytes(8, "little") + header + content[8 + size :])


@pytest.fixture
def single(tmp_path: Path) -> Path:
    tiny("llama").save_pretrained(tmp_path / "single")
    return tmp_path / "single"


def first_shard(folder: Path) -> Path:
    names = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    return folder / names["model.layers.0.mlp.up_proj.weight"]


@pytest.mark.parametrize("cut", [1, 5000, -1, -9])
def test_truncated_shard(llama, out, cut):
    shard = first_shard(llama)
    os.truncate(shard, cut if cut > 0 else shard.stat().st_size + cut)
    refused(llama, out, "cut short", shard.name)


def test_bytes_after_the_last_tensor(llama, out):
    shard = first_shard(llama)
    shard.write_bytes(shard.read_bytes() + b"more")
    refused(llama, out, "header describes", shard.name)


def test_missing_shard(llama, out):
    shard = first_shard(llama)
    shard.unlink()
    refused(llama, out, "no such file", shard.name)


def test_index_that_lies(llama, out):
    index = llama / "model.safetensors.index.json"
    names = json.loads(index.read_text())["weight_map"]
    other = next(file for file in names.values() if file != names["model.norm.weight"])
    edit_json(index, weight_map=names | {"model.norm.weight": other})
    refused(llama, out, "model.norm.weight", other)


def test_one_tensor_in_two_shards(llama, out):
    shard = first_shard(llama)
    tensors = load_file(shard)
    other = next(file for file in llama.glob("*.safetensors") if file != shard)
    save_file(tensors | load_file(other), shard)
    refused(llama, out, shard.name, other.name)


@pytest.mark.parametrize("path", ["../stolen.safetensors", "/etc/x.safetensors", "a/../../x.safetensors", "", "x.bin"])
def test_index_that_leads_out(llama, out, path):
    index = llama / "model.safetensors.index.json"
    names = json.loads(index.read_text())["weight_map"]
    edit_json(index, weight_map=names | {"model.norm.weight": path})
    refused(llama, out, repr(path), index.name)


@pytest.mark.parametrize("content", ["", "[]", "{", '{"weight_map": []}', '{"weight_map": {"a": 1}}', "[" * 100_000])
def test_broken_index(llama, out, content):
    (llama / "model.safetensors.index.json").write_text(content)
    refused(llama, out, "model.safetensors.index.json")


@pytest.mark.parametrize("name", ["model-00001-of-00099.safetensors", "tokenizer.json", "config.json"])
def test_link_out_of_the_folder(llama, out, tmp_path, name):
    target = tmp_path / "elsewhere"
    if name.startswith("model"):
        name = first_shard(llama).name
    target.write_bytes((llama / name).read_bytes() if (llama / name).exists() else b"{}")
    (llama / name).unlink(missing_ok=True)
    (llama / name).symlink_to(target)
    refused(llama, out, "link out of", name)


def test_links_inside_a_hub_cache_are_followed(single, out, tmp_path):
    repo = tmp_path / "models--me--tiny"
    snapshot = repo / "snapshots" / ("0" * 40)
    (repo / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(single.iterdir())):
        (repo / "blobs" / str(number)).write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    prune_checkpoint(snapshot, [0, 1], out)
    same(out, AutoModelForCausalLM.from_pretrained(single).base_model, [0, 1])


def test_a_pipe_is_not_waited_for(single, out):
    (single / "model.safetensors").unlink()
    os.mkfifo(single / "model.safetensors")
    refused(single, out, "not a regular file", "model.safetensors")


NORM = '"model.norm.weight":{"dtype":"F32","shape":[32],"data_offsets":'


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (lambda text: text.replace('"F32"', '"F33"', 1), "unknown type"),
        (lambda text: text.replace('"F32"', '"F64"', 1), "do not hold"),
        (lambda text: text.replace('"dtype"', '"type"', 1), "must have dtype"),
        (lambda text: text.replace('"shape":[32]', '"shape":[true]', 1), "shape"),
        (lambda text: text.replace('"shape":[32]', '"shape":[-32]', 1), "shape"),
        (lambda text: text.replace('"shape":[32]', f'"shape":[{2**62},8]', 1), "do not hold"),
        (lambda text: text.replace('"shape":[32]', f'"shape":[{"9" * 5000}]', 1), "broken JSON"),
        (lambda text: shift(text, 4), "begins at"),
        (lambda text: shift(text, -4), "begins at"),
        (lambda text: shift(text, 1 << 40), "begins at"),
        (lambda text: text.replace("{", '{"model.norm.weight":[],', 1), "twice"),
        (lambda text: text.replace('{"format":"pt"}', '{"format":1}'), "__metadata__"),
        (lambda text: "[" + text[1:-1].rstrip(" }") + "]", "broken JSON"),
        (lambda text: "{" * 50_000, "broken JSON"),
        (lambda text: "[]", "not a JSON object"),
        (lambda text: text.replace('"model.norm.weight"', r'"model.\ud800.weight"'), "Unicode"),
    ],
)
def test_broken_header(single, out, edit, says):
    rewrite_header(single / "model.safetensors", edit)
    refused(single, out, says, "model.safetensors")


def shift(text: str, by: int) -> str:
    """Move one tensor in the middle of the file."""
    name = '"model.layers.2.mlp.up_proj.weight"'
    entry = re.search(re.escape(name) + r':\{[^}]*"data_offsets":\[(\d+),(\d+)\]', text)
    moved = entry[0].replace(f"[{entry[1]},{entry[2]}]", f"[{int(entry[1]) + by},{int(entry[2]) + by}]")
    assert moved != entry[0]
    return text.replace(entry[0], moved)


@pytest.mark.parametrize("length", [100_000_001, 2**63, 2**64 - 1])
def test_absurd_header_size(single, out, length):
    rewrite_header(single / "model.safetensors", lambda text: text, length=length)
    refused(single, out, "header", "model.safetensors")


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"num_hidden_layers": 4}, "block 4"),
        ({"num_hidden_layers": 7}, "block 5"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ({"num_hidden_layers": "many"}, "num_hidden_layers"),
        ({"intermediate_size": 64}, "shape"),
        ({"vocab_size": 61}, "shape"),
        ({"hidden_size": 0}, ""),
        ({"num_attention_heads": "four"}, "refuses"),
        ({"attention_bias": True}, "bias"),
        ({"model_type": "none_such"}, "none_such"),
        ({"model_type": ["llama"]}, "model_type"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantized"),
    ],
)
def test_configuration_that_disagrees(single, out, fields, says):
    edit_json(single / "config.json", **fields)
    refused(single, out, says)


def test_experts_that_are_not_all_there(tmp_path, out):
    tiny("mixtral", **EXPERTS).save_pretrained(tmp_path / "m")
    file = tmp_path / "m/model.safetensors"
    tensors = load_file(file)
    assert tensors.pop("model.layers.1.block_sparse_moe.experts.5.w1.weight") is not None
    save_file(tensors, file)
    refused(tmp_path / "m", out, str(tmp_path / "m"))


def test_a_block_that_is_not_all_there(single, out):
    file = single / "model.safetensors"
    tensors = load_file(file)
    tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, file)
    refused(single, out, "layers.1.mlp.up_proj.weight")


def test_pickled_weights_are_not_opened(single, out):
    (single / "model.safetensors").unlink()
    (single / "pytorch_model.bin").write_bytes(b"never read")
    refused(single, out, "from_pretrained", "save_pretrained", "pytorch_model.bin")


@pytest.mark.parametrize("name", ["none/such/folder", "./none", "/none"])
def test_no_such_folder(out, name):
    refused(name, out, "no such folder", name)


def test_no_weights_and_no_config(single, out, tmp_path):
    (single / "config.json").unlink()
    refused(single, out, "config.json", "no such file")
    (tmp_path / "config.json").write_text("{}")
    refused(tmp_path, out, "no weights")


def test_illegal_blocks(single, out):
    for keep in ([], [5], [1, 0], [0, 0], [-1]):
        with pytest.raises(IllegalDepth):
            prune_checkpoint(single, keep, out)
        assert list(out.iterdir()) == []


def test_shared_blocks_are_refused(tmp_path, out):
    torch.manual_seed(0)
    transformers.AlbertModel(transformers.AlbertConfig(hidden_size=32, num_attention_heads=4)).save_pretrained(
        tmp_path / "m"
    )
    with pytest.raises(UnsupportedArchitecture, match="share"):
        prune_checkpoint(tmp_path / "m", [0], out)


def test_a_folder_that_holds_something_is_not_touched(single, out):
    (out / "mine").write_text("mine")
    with pytest.raises(OutputError, match="not an empty folder"):
        prune_checkpoint(single, [0], out)
    assert [file.name for file in out.iterdir()] == ["mine"]


def test_a_failure_while_writing_leaves_nothing(llama, out):
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prune_checkpoint(llama, [0, 1], out, progress=stop)
    assert list(out.iterdir()) == []


# ---- the header reader under fuzz

NAMES = st.sampled_from(["a", "b", "__metadata__", "c.weight", ""])
NUMBERS = st.one_of(st.integers(-2, 40), st.sampled_from([2**31, 2**63, 2**64]), st.floats(), st.booleans(), st.none())
ENTRIES = st.one_of(
    st.fixed_dictionaries(
        {
            "dtype": st.sampled_from(["F32", "BF16", "U8", "F4", "f32", None]),
            "shape": st.lists(NUMBERS, max_size=3),
            "data_offsets": st.lists(NUMBERS, max_size=3),
        }
    ),
    st.dictionaries(st.sampled_from(["format", "dtype"]), st.text(max_size=3)),
    NUMBERS,
)
HEADERS = st.one_of(
    st.dictionaries(NAMES, ENTRIES, max_size=4).map(lambda header: json.dumps(header).encode()), st.binary(max_size=60)
)


@st.composite
def whole_files(draw) -> bytes:
    """Files that are right, with one thing or none changed."""
    sizes = draw(st.lists(st.integers(0, 6), max_size=4))
    ends = [sum(sizes[: i + 1]) * 2 for i in range(len(sizes))]
    header = {
        f"t{i}": {"dtype": "F16", "shape": [size], "data_offsets": [end - 2 * size, end]}
        for i, (size, end) in enumerate(zip(sizes, ends, strict=True))
    }
    text = json.dumps(header).encode()
    content = bytearray(len(text).to_bytes(8, "little") + text + bytes(sum(sizes) * 2))
    if draw(st.booleans()):
        content[draw(st.integers(0, len(content) - 1))] = draw(st.integers(0, 255))
    return bytes(content[: draw(st.integers(0, len(content)))] if draw(st.integers(0, 3)) == 0 else content)


@st.composite
def odd_files(draw) -> bytes:
    header, data = draw(HEADERS), draw(st.binary(max_size=48))
    length = draw(st.one_of(st.just(len(header)), st.integers(0, 120), st.integers(0, 2**64 - 1)))
    return length.to_bytes(8, "little") + header + data


def fuzz(content: bytes, folder: Path) -> None:
    (folder / "f.safetensors").write_bytes(content)
    try:
        tensors = read_header(Folder("m", folder), "f.safetensors")
    except ModelError as error:
        assert "f.safetensors" in str(error)
        return
    try:
        expected = load_bytes(content)
    except (SafetensorError, KeyError, RuntimeError, ValueError, OverflowError):
        return  # the safetensors library refuses some more: types that torch has not, other rules for metadata
    assert {name: tensor.shape for name, tensor in tensors.items()} == {n: tuple(t.shape) for n, t in expected.items()}
    for name, tensor in tensors.items():
        assert content[tensor.start : tensor.end] == expected[name].contiguous().view(torch.uint8).numpy().tobytes()


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.one_of(whole_files(), odd_files(), st.binary(max_size=40)))
def test_header_reader_gives_a_result_or_a_model_error(tmp_path, content):
    fuzz(content, tmp_path)


@pytest.mark.slow
@settings(max_examples=25_000, deadline=None, suppress_health_check=list(HealthCheck))
@given(content=st.one_of(whole_files(), odd_files(), st.binary(max_size=40)))
def test_header_reader_for_a_minute(tmp_path, content):
    fuzz(content, tmp_path)


def test_what_safetensors_accepts_is_accepted(tmp_path):
    tensors = {
        "a": torch.arange(6.0).reshape(2, 3),
        "b": torch.zeros(0, 4),
        "c": torch.tensor(True),
        "d": torch.ones(()),
    }
    save_file(tensors, tmp_path / "f.safetensors", {"format": "pt"})
    found = read_header(Folder("m", tmp_path), "f.safetensors")
    assert {name: tensor.shape for name, tensor in found.items()} == {"a": (2, 3), "b": (0, 4), "c": (), "d": ()}


# ---- the Hub


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    (tmp_path / "hub").mkdir()
    with serve(tmp_path / "hub") as server:
        yield server


@pytest.mark.parametrize("shard", ["40KB", "5GB"])
def test_hub_sends_only_what_is_kept(hub, out, shard):
    model = tiny("llama", hidden_size=128, intermediate_size=256)
    model.save_pretrained(hub.root, max_shard_size=shard)
    (hub.root / "tokenizer.json").write_text("{}")
    result = prune_checkpoint("me/tiny", [0, 1], out, endpoint=hub.address)
    same(out, model.base_model, [0, 1])
    weights = sum(file.stat().st_size for file in hub.root.glob("*.safetensors"))
    assert weights > 1.8 * result.bytes_kept
    small = sum(file.stat().st_size for file in hub.root.iterdir() if file.suffix == ".json")
    assert result.bytes_kept <= result.bytes_read <= 1.05 * result.bytes_kept + 20_000
    assert hub.sent == result.bytes_read + small
    assert (out / "tokenizer.json").exists()
    revisions = {re.match(r"\w+ /me/tiny/resolve/([^/]+)/", line)[1] for line in hub.asked}
    assert revisions == {"main", hub.commit}


def test_hub_gives_what_the_folder_gives(hub, out, tmp_path):
    tiny("mixtral", **EXPERTS).save_pretrained(hub.root, max_shard_size="90KB")
    prune_checkpoint("me/tiny", [0, 2, 3], out, endpoint=hub.address)
    (tmp_path / "local").mkdir()
    prune_checkpoint(hub.root, [0, 2, 3], tmp_path / "local")
    for file in (tmp_path / "local").iterdir():
        assert (out / file.name).read_bytes() == file.read_bytes(), file.name


def test_hub_without_ranges(hub, out):
    hub.ranges = False
    model = tiny("llama")
    model.save_pretrained(hub.root, max_shard_size="40KB")
    prune_checkpoint("me/tiny", [0], out, endpoint=hub.address)
    same(out, model.base_model, [0])
    needed = {first_shard(hub.root).name}
    fetched = {
        line.split("/")[-1].split()[0] for line in hub.asked if line.startswith("GET") and "safetensors " in line
    }
    assert needed <= fetched < {file.name for file in hub.root.glob("*.safetensors")}


def test_hub_connection_that_breaks_is_taken_up_again(hub, out):
    model = tiny("llama", hidden_size=128, intermediate_size=256)
    model.save_pretrained(hub.root)
    hub.break_after = 100_000
    prune_checkpoint("me/tiny", [0, 1], out, endpoint=hub.address)
    same(out, model.base_model, [0, 1])
    assert hub.break_after is None


def test_hub_shards_in_the_cache_are_read_there(hub, out):
    tiny("llama").save_pretrained(hub.root)
    huggingface_hub.hf_hub_download("me/tiny", "model.safetensors", endpoint=hub.address)
    before = hub.sent
    prune_checkpoint("me/tiny", [0], out, endpoint=hub.address)
    assert hub.sent - before < 20_000


@pytest.mark.parametrize("shard", ["40KB", "5GB"])
def test_hub_offline(hub, out, tmp_path, monkeypatch, shard):
    model = tiny("llama")
    model.save_pretrained(hub.root, max_shard_size=shard)
    for file in hub.root.iterdir():
        huggingface_hub.hf_hub_download("me/tiny", file.name, endpoint=hub.address)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    before = len(hub.asked)
    prune_checkpoint("me/tiny", [0, 1], out, endpoint=hub.address)
    same(out, model.base_model, [0, 1])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match="HF_HUB_OFFLINE"):
        prune_checkpoint("me/other", [0], tmp_path / "empty", endpoint=hub.address)
    assert len(hub.asked) == before


def test_hub_refusals(hub, out):
    refused("me/none", out, "me/none", "no such model", endpoint=hub.address)
    refused("me/tiny", out, "config.json", "no such file", endpoint=hub.address)
    (hub.root / "config.json").write_text("{}")
    refused("me/tiny", out, "no weights", endpoint=hub.address)
    (hub.root / "pytorch_model.bin").write_bytes(b"never read")
    refused("me/tiny", out, "pytorch_model.bin", "save_pretrained", endpoint=hub.address)


def test_hub_adapter_brings_its_base(hub, out, tmp_path):
    base, adapter, merged = adapt(tmp_path, tiny("llama"), ["q_proj"])
    for file in adapter.iterdir():
        (hub.root / file.name).write_bytes(file.read_bytes())
    assert isinstance(prune_checkpoint("me/tiny", [0, 1], out, endpoint=hub.address), Pruned)
    close(out, merged.base_model, [0, 1], 1e-5)
    assert issubclass(ModelError, SecateurError) and base.is_dir()
