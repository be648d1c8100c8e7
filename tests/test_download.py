"""Of a model on the Hub, only the small files and the bytes of the kept blocks are fetched."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, BertConfig, BertModel, PreTrainedModel

import secateur
from architectures import model_of
from conftest import MakeEncoder, tiny_transformer
from hub import StandIn, fetch_from, serve
from secateur.errors import ModelError
from secateur.models import cutting
from secateur.models.open_model import fetch as fetch_model
from secateur.models.open_model import open_model
from secateur.pruning import download
from secateur.pruning.download import fetch_kept, wanted_tensors

DEPTH = 5
SIZES = {
    "vocab_size": 60,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def tiny(kind: str = "llama", **fields: object) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(SIZES | fields)))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    (tmp_path / "hub").mkdir()
    with serve(tmp_path / "hub") as server:
        fetch_from(server, tmp_path / "cache", monkeypatch)
        yield server


def fetch(keep: Sequence[int], out: Path) -> Path:
    out.mkdir()
    return fetch_kept("me/tiny", fetch_model("me/tiny", weights=False), lambda depth: keep, out)


def same(folder: Path, whole: PreTrainedModel, keep: Sequence[int]) -> None:
    """What was fetched, opened and cut, is the model cut to these blocks, bit for bit."""
    found = AutoModel.from_pretrained(folder)
    for model in (found, whole):
        cutting.cut(model, keep)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor), name


def weights_of(model: PreTrainedModel, keep: Sequence[int]) -> int:
    """Bytes of the model cut to these blocks."""
    dropped = [part for i, part in enumerate(model.layers) if i not in keep]
    gone = sum(p.numel() * p.element_size() for part in dropped for p in part.parameters())
    return sum(p.numel() * p.element_size() for p in model.parameters()) - gone


@pytest.mark.parametrize("shard", ["100KB", "5GB"])
@pytest.mark.parametrize("keep", [[0, 1], [0, 3]], ids=["first", "some"])
def test_only_what_is_kept_is_sent(hub: StandIn, tmp_path: Path, shard: str, keep: list[int]):
    model = tiny()
    model.save_pretrained(hub.root, max_shard_size=shard)
    fetched = fetch(keep, tmp_path / "out")
    kept = weights_of(model.base_model, keep)
    headers = sum(8 + int.from_bytes(f.read_bytes()[:8], "little") for f in hub.root.glob("*.safetensors"))
    small = sum(file.stat().st_size for file in hub.root.glob("*.json"))
    assert hub.sent == kept + headers + small
    same(fetched, model.base_model, keep)
    assert {line.split("/")[4] for line in hub.asked if "/resolve/" in line} == {hub.commit}


def test_what_is_not_wanted_takes_no_room(hub: StandIn, tmp_path: Path):
    tiny(num_hidden_layers=40).save_pretrained(hub.root)
    fetched = fetch([0], tmp_path / "out")
    file = fetched / "model.safetensors"
    assert file.stat().st_size == (hub.root / "model.safetensors").stat().st_size
    assert file.stat().st_blocks * 512 < 0.2 * file.stat().st_size


def test_a_server_without_ranges_is_refused(hub: StandIn, tmp_path: Path):
    hub.ranges = False
    tiny().save_pretrained(hub.root)
    with pytest.raises(ModelError, match=r"does not send the range .*: fetch the model \(hf download\)"):
        fetch([0], tmp_path / "out")


def test_a_connection_that_breaks_is_taken_up_again(hub: StandIn, tmp_path: Path):
    model = tiny()
    model.save_pretrained(hub.root)
    hub.break_after = 100_000
    same(fetch([0, 1], tmp_path / "out"), model.base_model, [0, 1])
    assert hub.break_after is None


def test_shards_in_the_cache_are_read_there_offline_too(hub: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model = tiny()
    model.save_pretrained(hub.root, max_shard_size="100KB")
    for file in hub.root.iterdir():
        huggingface_hub.hf_hub_download("me/tiny", file.name)
    before = hub.sent
    fetch([0], tmp_path / "online")
    assert hub.sent == before
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    asked = len(hub.asked)
    same(fetch([0, 1], tmp_path / "offline"), model.base_model, [0, 1])
    with pytest.raises(ModelError, match="HF_HUB_OFFLINE"):
        fetch_model("me/other")
    assert len(hub.asked) == asked


def test_a_model_in_the_cache_opens_where_the_hub_cannot_be_reached(hub: StandIn, make_encoder: MakeEncoder):
    """Which is tried twice, not five times for each file that a model may have."""
    whole = make_encoder("llama")
    whole.save(str(hub.root))
    vectors = open_model("me/tiny", device="cpu").encode(["a text"])
    assert vectors == pytest.approx(whole.encode(["a text"]), abs=1e-6)
    hub.is_down, asked = True, len(hub.asked)
    assert (open_model("me/tiny", device="cpu").encode(["a text"]) == vectors).all()
    assert [line.split()[:2] for line in hub.asked[asked:]] == [["HEAD", "/"]] * 2
    with pytest.raises(ModelError, match="the Hub cannot be reached"):
        open_model("me/other")
    hub.is_down = False
    with pytest.raises(ModelError, match="no such model on the Hub"):
        open_model("me/other")


def test_refusals(hub: StandIn, tmp_path: Path):
    with pytest.raises(ModelError, match="me/none: no such folder, and no such model on the Hub"):
        fetch_model("me/none")
    tiny().config.save_pretrained(hub.root)
    with pytest.raises(ModelError, match=r"me/tiny: has no safetensors"):
        fetch([0], tmp_path / "a")
    tiny().save_pretrained(hub.root)
    file = hub.root / "model.safetensors"
    content = file.read_bytes()
    for number, header in enumerate(
        [b"\xff" * 8, content[:8] + b"[" + content[9:], content[:8] + b"{}" + content[10:]]
    ):
        file.write_bytes(header + content[len(header) :])
        with pytest.raises(ModelError, match=r"me/tiny.*(damaged|no weights)"):
            fetch([0], tmp_path / str(number))
    file.write_bytes(content)
    hub.commit = "beef00" + "0" * 34
    index = {"weight_map": {"model.norm.weight": "../stolen.safetensors"}}
    (hub.root / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"'\.\./stolen.safetensors', which is no"):
        fetch([0], tmp_path / "b")


def wanted(model: PreTrainedModel, folder: Path, keep: Sequence[int]) -> set[str]:
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    shapes = {name: {"shape": list(tensor.shape)} for name, tensor in tensors.items()}
    return wanted_tensors("me/tiny", AutoConfig.from_pretrained(folder), shapes, lambda depth: keep)


def test_heads_decoders_and_vision_towers_are_not_wanted(tmp_path: Path):
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 4, "num_decoder_layers": 4, "num_heads": 4}
    t5 = transformers.T5ForConditionalGeneration(transformers.T5Config(vocab_size=60, **sizes))
    names = wanted(t5, tmp_path / "t5", [0, 1])
    assert {name.split(".")[0] for name in names} <= {"encoder", "shared"}
    assert {name.split(".")[2] for name in names if ".block." in name} == {"0", "1"}
    names = wanted(model_of("gemma3"), tmp_path / "gemma3", [0, 2])
    assert not [name for name in names if "vision" in name or "projector" in name]
    assert {name.split("layers.")[1].split(".")[0] for name in names if "layers." in name} == {"0", "2"}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bert", "gpt2", "mixtral", "gemma3n_text", "nemotron_h", "opt", "distilbert"])
def test_the_blocks_of_other_architectures(tmp_path: Path, name: str):
    model = model_of(name)
    names = wanted(model, tmp_path / name, [0, 1])
    assert len(names) < len(load_file(tmp_path / name / "model.safetensors"))


def test_a_tensor_that_was_left_out_by_mistake_is_found(hub: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = tiny_transformer(tmp_path / "m", "llama")
    for file in folder.iterdir():
        (hub.root / file.name).write_bytes(file.read_bytes())
    needed = download.wanted_tensors
    lost = "layers.0.mlp.up_proj.weight"
    monkeypatch.setattr(download, "wanted_tensors", lambda *args: needed(*args) - {lost})
    with pytest.raises(ModelError, match=rf"me/tiny: {lost} has only zeros: fetch the model"):
        secateur.prune("me/tiny", 1, out=tmp_path / "out")


def test_robertas_one_type_of_tokens_is_zeros(hub: StandIn, tmp_path: Path):
    folder = tiny_transformer(tmp_path / "m", "bert")
    model = BertModel(BertConfig.from_pretrained(folder, type_vocab_size=1))
    model.embeddings.token_type_embeddings.weight.data.zero_()
    model.save_pretrained(folder)
    for file in folder.iterdir():
        (hub.root / file.name).write_bytes(file.read_bytes())
    out = secateur.prune("me/tiny", 1, out=tmp_path / "out")
    assert not load_file(out / "model.safetensors")["embeddings.token_type_embeddings.weight"].any()


def test_a_download_that_fails_leaves_nothing(hub: StandIn, tmp_path: Path):
    folder = tiny_transformer(tmp_path / "m", "llama")
    for file in folder.iterdir():
        (hub.root / file.name).write_bytes(file.read_bytes())
    os.truncate(hub.root / "model.safetensors", 5000)
    with pytest.raises(ModelError, match="me/tiny"):
        secateur.prune("me/tiny", 1, out=tmp_path / "results" / "out")
    assert list((tmp_path / "results").iterdir()) == []
