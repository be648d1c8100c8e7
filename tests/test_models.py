from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from sentence_transformers import CrossEncoder, SentenceTransformer, SparseEncoder
from sentence_transformers.base.modules import Router, Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from transformers import (
    AutoModel,
    AutoTokenizer,
    RobertaConfig,
    RobertaModel,
    SiglipConfig,
    SiglipModel,
    ViTConfig,
    ViTModel,
)

import secateur
from conftest import tiny_transformer
from secateur.errors import ConfigError, ModelError, SecateurError, UnsupportedArchitecture
from secateur.models import model_names
from secateur.models.forward import pooling_name, wait
from secateur.models.open_model import is_causal
from secateur.models.save import save_model
from secateur.pruning.prune import origin_of

TEXTS = ["the hedge is cut back", "one", "def add: return a, b"]
CHAT = "{% for m in messages %}chat chat {{ m['content'] }}{% endfor %}"


def pooled(folder: Path, text: str, pooling: str = "mean", **options: object) -> torch.Tensor:
    """A text's vector by transformers alone: Σ h_i, or Σ i·h_i, over its tokens, at length 1."""
    encoded = AutoTokenizer.from_pretrained(folder, **options)(text, return_tensors="pt")
    with torch.no_grad():
        states = AutoModel.from_pretrained(folder, dtype=torch.float32, **options)(**encoded).last_hidden_state[0]
    weights = torch.arange(1.0, len(states) + 1) if pooling == "weighted_mean" else torch.ones(len(states))
    return torch.nn.functional.normalize(weights @ states, dim=0)


@pytest.mark.parametrize("pooling", [None, "mean", "weighted_mean"])
def test_a_language_model_gets_a_pooling(llama_folder: Path, pooling: str | None):
    model = secateur.open_model(llama_folder, device="cpu", pooling=pooling)
    expected = torch.stack([pooled(llama_folder, text, pooling or "mean") for text in TEXTS])
    assert torch.allclose(model.encode(TEXTS, convert_to_tensor=True), expected, atol=1e-5)
    assert pooling_name(model) == (pooling or "mean")


def test_a_chat_template_does_not_touch_the_texts(llama_folder: Path, tmp_path: Path):
    chatty = shutil.copytree(llama_folder, tmp_path / "chatty")
    tokenizer = AutoTokenizer.from_pretrained(chatty)
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(chatty)
    assert "chat chat" in AutoTokenizer.from_pretrained(chatty).chat_template
    vectors = [secateur.open_model(folder, device="cpu").encode(TEXTS) for folder in (llama_folder, chatty)]
    assert np.array_equal(*vectors)


def test_attention_is_measured(llama_folder: Path, tmp_path: Path):
    bert = secateur.open_model(tiny_transformer(tmp_path / "bert", "bert"), device="cpu")
    both_ways = shutil.copytree(llama_folder, tmp_path / "both-ways")
    config = json.loads((both_ways / "config.json").read_text())
    (both_ways / "config.json").write_text(json.dumps(config | {"is_causal": False}))
    for model, backwards in (
        (secateur.open_model(llama_folder, device="cpu"), True),
        (bert, False),
        (secateur.open_model(both_ways, device="cpu"), False),
    ):
        assert is_causal(model[0]) == backwards


def test_texts_are_cut_to_the_length_asked_for_and_never_beyond_the_model(llama_folder: Path):
    long = "thehedgeiscutbackbyhalf" * 20
    for asked, kept in ((10, 10), (1000, 128)):
        model = secateur.open_model(llama_folder, max_length=asked, device="cpu")
        assert np.allclose(model.encode(long), model.encode(long[:kept]), atol=1e-6)
        assert not np.allclose(model.encode(long), model.encode(long[: kept - 1]), atol=1e-6)


def test_a_trained_embedder_keeps_its_pooling_and_prompts(make_encoder, tmp_path: Path):
    trained = make_encoder("llama", prompts={"query": "find;\n"}, default_prompt_name="query")
    trained.save(str(tmp_path / "trained"), create_model_card=False)
    opened = secateur.open_model(tmp_path / "trained", device="cpu")
    assert (opened.prompts["query"], opened.default_prompt_name) == ("find;\n", "query")
    assert pooling_name(opened) == "mean"
    assert np.allclose(opened.encode(TEXTS), trained.encode(TEXTS), atol=1e-6)
    with pytest.raises(ModelError, match="pools its own way"):
        secateur.open_model(tmp_path / "trained", pooling="lasttoken")


def without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def only_a_pickle(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    without_weights(folder)


def half_written(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])


def without(part: str):
    def drop(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        kept = {name: tensor for name, tensor in tensors.items() if part not in name}
        assert len(kept) < len(tensors)
        save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})

    return drop


def with_config(**changes: object):
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))

    return change


def with_json(file: str, **changes: object):
    def change(folder: Path) -> None:
        content = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(content | changes))

    return change


def with_weights(edit):
    def change(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        edit(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return change


def without_a_shard(folder: Path) -> None:
    model = AutoModel.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="20KB")
    next(folder.glob("model-00002-of-*")).unlink()


def of_images(folder: Path) -> None:
    shutil.rmtree(folder)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    ViTModel(ViTConfig(**sizes, image_size=32)).save_pretrained(folder)


def of_images_and_texts(folder: Path) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    parts = {"text_config": sizes | {"vocab_size": 64}, "vision_config": sizes | {"image_size": 32, "patch_size": 16}}
    SiglipModel(SiglipConfig(**parts)).save_pretrained(folder)


def without_tokenizer(folder: Path) -> None:
    for file in folder.glob("token*"):
        file.unlink()


BROKEN = {
    "no config": (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
    "half a config": (lambda folder: (folder / "config.json").write_text('{\n"a": 1,'), "is not a valid JSON file"),
    "empty config": (lambda folder: (folder / "config.json").write_text("{}"), "model_type"),
    "unknown type": (with_config(model_type="nonesuch"), "not a text model"),
    "no weights": (without_weights, "has no safetensors"),
    "only a pickle": (only_a_pickle, "only pytorch_model.bin: convert it"),
    "half the weights": (half_written, "model.safetensors is damaged or half written"),
    "a block is missing": (without("layers.1."), "no weights for layers.1"),
    "a tensor is missing": (without("layers.1.mlp.up_proj"), "layers.1.mlp.up_proj"),
    "no embeddings": (without("embed_tokens"), "embed_tokens"),
    "fewer blocks than it says": (with_config(num_hidden_layers=5), "no weights for layers.3"),
    "images": (of_images, "not a text model"),
    "images and texts": (
        of_images_and_texts,
        "reads images, and its text part is no model of its own.* take a model of",
    ),
    "no tokenizer": (without_tokenizer, "not a text model"),
    "more blocks than it says": (with_config(num_hidden_layers=2), "no place for: layers.2"),
    "a negative number of blocks": (with_config(num_hidden_layers=-3), "no place for: layers.0"),
    "a bias that it does not say": (
        with_weights(lambda tensors: tensors.update({"layers.0.self_attn.q_proj.bias": torch.ones(32)})),
        "no place for: layers.0.self_attn.q_proj.bias",
    ),
    "another width": (with_config(intermediate_size=32), r"down_proj.* has the shape \(32, 64\)"),
    "a text for a number": (with_config(num_attention_heads="4"), "num_attention_heads.*expected"),
    "no heads": (with_config(num_attention_heads=0), "ZeroDivisionError"),
    "an unknown number format": (with_config(dtype="banana"), "no attribute 'banana'"),
    "a weight that is no number": (
        with_weights(lambda tensors: tensors["embed_tokens.weight"].__setitem__((40, 0), float("nan"))),
        "1 of its weights are not finite, first in embed_tokens.weight",
    ),
    "a length of 0": (with_json("tokenizer_config.json", model_max_length=0), "cuts texts after 0 tokens"),
    "a shard that the index names": (without_a_shard, "model-00002-of"),
    "another prefix": (
        with_weights(lambda tensors: [tensors.update({f"net.{key}": tensors.pop(key)}) for key in list(tensors)]),
        "no weights for",
    ),
}


def test_a_model_that_float16_is_too_small_for(llama_folder: Path, tmp_path: Path):
    folder = shutil.copytree(llama_folder, tmp_path / "model")
    with_weights(lambda tensors: [tensors[f"layers.1.mlp.{part}_proj.weight"].mul_(1e3) for part in ("up", "gate")])(
        folder
    )
    secateur.open_model(folder, device="cpu")
    with pytest.raises(ModelError, match="not finite: float16 is too small for it"):
        secateur.open_model(folder, device="cpu", dtype="float16")


def test_a_model_that_does_not_fit_into_memory(llama_folder: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    monkeypatch.setattr(SentenceTransformer, "to", full)
    with pytest.raises(ModelError, match=r"does not fit into memory .*20\.00 GiB"):
        secateur.open_model(llama_folder)


def test_the_device_at_work_is_waited_for_and_not_the_first(monkeypatch: pytest.MonkeyPatch):
    waited: list[torch.device] = []
    monkeypatch.setattr("torch.accelerator.synchronize", waited.append)
    wait(torch.device("cpu"))
    wait(torch.device("cuda:1"))
    assert waited == [torch.device("cuda:1")]


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_folder_is_told_in_one_line(case: str, llama_folder: Path, tmp_path: Path):
    breaks, says = BROKEN[case]
    folder = shutil.copytree(llama_folder, tmp_path / "model")
    breaks(folder)
    with pytest.raises(SecateurError, match=says) as caught:
        secateur.open_model(folder, device="cpu")
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


BROKEN_EMBEDDERS = {
    "no vocabulary": (without_tokenizer, "its tokenizer gives different texts the same ids"),
    "a pooling of another width": (with_json("1_Pooling/config.json", embedding_dimension=16), "32 numbers.* say 16"),
    "a pooling that is none": (with_json("1_Pooling/config.json", pooling_mode="nonesuch"), "Invalid pooling mode"),
    "a pooling without its file": (lambda folder: shutil.rmtree(folder / "1_Pooling"), "is not a text model"),
    "a length that is none": (with_json("sentence_bert_config.json", max_seq_length=-1), "cuts texts after -1"),
    "a prompt that is no text": (with_json("config_sentence_transformers.json", prompts={"q": 5}), "its prompt 'q'"),
    "no modules": (lambda folder: (folder / "modules.json").write_text("[]"), "is not a list of modules"),
    "modules that are none": (lambda folder: (folder / "modules.json").write_text("[{}]"), "is not a list of modules"),
}


@pytest.fixture(scope="module")
def embedder_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained embedder of bert, mean pooling, to be read only."""
    root = tmp_path_factory.mktemp("embedder")
    transformer = Transformer(str(tiny_transformer(root / "bert", "bert")))
    model = SentenceTransformer(modules=[transformer, Pooling(32, "mean")], device="cpu")
    model.save(str(root / "trained"), create_model_card=False)
    return root / "trained"


@pytest.mark.parametrize("case", BROKEN_EMBEDDERS)
def test_a_broken_embedder_is_told_in_one_line_whoever_opens_it(case: str, embedder_folder: Path, tmp_path: Path):
    breaks, says = BROKEN_EMBEDDERS[case]
    folder = shutil.copytree(embedder_folder, tmp_path / "model")
    breaks(folder)
    with pytest.raises(SecateurError, match=says) as caught:
        secateur.open_model(folder, device="cpu")
    with pytest.raises(SecateurError) as pruning:
        secateur.prune(folder, 2, out=tmp_path / "out")
    for told in (str(caught.value), str(pruning.value)):
        assert str(folder) in told and "\n" not in told and str(tmp_path / "out") not in told


def test_weights_that_are_missing_on_the_hub_are_told(
    llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    repository, commit = tmp_path / "hub" / "models--me--tiny", "c0ffee" + "0" * 34
    folder = shutil.copytree(llama_folder, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    constant = with_weights(lambda own: own.update({"layers.0.self_attn.masked_bias": torch.tensor(-1e9)}))
    for changes in (lambda _: None, constant):
        changes(folder)
        assert secateur.open_model("me/tiny", device="cpu").encode("a").shape == (32,)
    for breaks, says in (
        (without("layers.1.mlp.up_proj"), "me/tiny: has no weights for layers.1.mlp.up_proj.weight"),
        (only_a_pickle, "me/tiny: has no safetensors: convert it"),
    ):
        breaks(folder)
        with pytest.raises(ModelError, match=says):
            secateur.open_model("me/tiny", device="cpu")


def test_a_checkpoint_in_a_models_folder_is_no_part_of_it(llama_folder: Path, embedder_folder: Path, tmp_path: Path):
    for number, source in enumerate((llama_folder, embedder_folder)):
        folder = shutil.copytree(source, tmp_path / str(number))
        for breaks in (half_written, only_a_pickle):
            breaks(shutil.copytree(llama_folder, folder / f"checkpoint-{breaks.__name__}"))
        texts = ["a", "b c"]
        found, right = (secateur.open_model(place, device="cpu").encode(texts) for place in (folder, source))
        assert np.array_equal(found, right)


def test_a_router_of_two_models_is_told_in_one_line(embedder_folder: Path, tmp_path: Path):
    sides = [list(SentenceTransformer(str(embedder_folder), device="cpu")) for _ in range(2)]
    model = SentenceTransformer(modules=[Router.for_query_document(*sides)], device="cpu")
    model.save(str(tmp_path / "router"), create_model_card=False)
    with pytest.raises(UnsupportedArchitecture, match="begins with a Router, not with a transformer"):
        secateur.open_model(tmp_path / "router", device="cpu")


def test_a_folder_of_the_hubs_cache_is_called_as_the_model():
    folder = Path("hub/models--intfloat--e5-small-v2/snapshots")
    assert model_names([folder / ("a" * 40), "b"]) == ["e5-small-v2", "b"]
    assert model_names([folder / "a", folder / "b"]) == [str(folder / "a"), str(folder / "b")]


def test_a_reranker_or_a_sparse_encoder_is_no_embedder(llama_folder: Path, tmp_path: Path):
    bert = tiny_transformer(tmp_path / "bert", "bert")
    CrossEncoder(str(bert), device="cpu", num_labels=1).save_pretrained(str(tmp_path / "CrossEncoder"))
    modules = [Transformer(str(bert)), Pooling(32, "mean")]
    SparseEncoder(modules=modules, device="cpu").save_pretrained(str(tmp_path / "SparseEncoder"))
    one = shutil.copytree(tmp_path / "CrossEncoder", tmp_path / "one-class")  # as sentence-transformers wrote it once
    for file in ("modules.json", "config_sentence_transformers.json", "sentence_bert_config.json"):
        (one / file).unlink()
    noted = shutil.copytree(bert, tmp_path / "noted")  # as its versions 4 and 5, with any number of classes
    config = json.loads((noted / "config.json").read_text()) | {"sentence_transformers": {"version": "4.0.1"}}
    (noted / "config.json").write_text(json.dumps(config))
    for folder, kind in (("CrossEncoder",) * 2, ("SparseEncoder",) * 2, (one, "CrossEncoder"), (noted, "CrossEncoder")):
        with pytest.raises(UnsupportedArchitecture, match=f"is a {kind}, which gives a text no dense vector"):
            secateur.open_model(tmp_path / folder, device="cpu")


def test_an_old_folder_whose_transformer_is_in_a_folder_of_its_own(embedder_folder: Path, tmp_path: Path):
    old = shutil.copytree(embedder_folder, tmp_path / "old")
    (old / "0_Transformer").mkdir()
    for file in [file for file in old.iterdir() if file.is_file() and "modules" not in file.name]:
        if file.name != "config_sentence_transformers.json":
            file.rename(old / "0_Transformer" / file.name)
    modules = json.loads((old / "modules.json").read_text())
    (old / "modules.json").write_text(json.dumps([{**modules[0], "path": "0_Transformer"}, *modules[1:]]))
    expected = SentenceTransformer(str(old), device="cpu").encode(["one", "two and three"])
    np.testing.assert_array_equal(secateur.open_model(old, device="cpu").encode(["one", "two and three"]), expected)
    (old / "0_Transformer" / "config.json").write_text(
        json.dumps(json.loads((old / "0_Transformer" / "config.json").read_text()) | {"num_hidden_layers": 2})
    )
    with pytest.raises(ModelError, match="has no place for"):  # checked as any other's
        secateur.open_model(old, device="cpu")


def test_prompts_without_a_text_change_nothing(embedder_folder: Path, tmp_path: Path):
    folder = shutil.copytree(embedder_folder, tmp_path / "model")
    with_json("config_sentence_transformers.json", prompts={"query": None, "document": ""})(folder)
    model = secateur.open_model(folder, device="cpu")
    expected = SentenceTransformer(str(embedder_folder), device="cpu").encode(TEXTS)
    assert model.prompts == {"query": "", "document": ""}
    for name in ("query", "document"):
        assert np.array_equal(model.encode(TEXTS, prompt_name=name), expected)


ROBERTA = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}


@pytest.fixture
def roberta_folder(tmp_path: Path) -> Path:
    """RoBERTa with 66 rows of positions, of which two are none, and a tokenizer that names no length."""
    folder = tiny_transformer(tmp_path / "roberta")
    torch.manual_seed(0)
    config = RobertaConfig(vocab_size=45, max_position_embeddings=66, pad_token_id=1, **ROBERTA)
    RobertaModel(config).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.model_max_length = int(1e30)
    tokenizer.pad_token = "<unk>"  # id 1, as RoBERTa's
    tokenizer.save_pretrained(folder)
    return folder


def test_texts_are_cut_where_robertas_positions_end(roberta_folder: Path):
    text = "thehedgeiscutbackbyhalf" * 20
    model = secateur.open_model(roberta_folder, device="cpu")
    assert model.max_seq_length == 64  # 66 - pad_token_id - 1
    encoded = AutoTokenizer.from_pretrained(roberta_folder)(text[:64], return_tensors="pt")
    with torch.no_grad():
        states = AutoModel.from_pretrained(roberta_folder)(**encoded).last_hidden_state[0]
    expected = torch.nn.functional.normalize(states.mean(0), dim=0).numpy()
    assert np.allclose(model.encode(text), expected, atol=1e-5)


def test_an_embedder_that_names_more_tokens_than_it_has_positions_is_cut_to_these(roberta_folder: Path, tmp_path: Path):
    model = SentenceTransformer(modules=[Transformer(str(roberta_folder)), Pooling(32, "mean")], device="cpu")
    model.save(str(tmp_path / "trained"), create_model_card=False)
    out = secateur.prune(tmp_path / "trained", 3, out=tmp_path / "out")
    text = "thehedgeiscutbackbyhalf" * 20
    with pytest.raises((IndexError, RuntimeError)):
        model.encode(text)
    assert np.allclose(SentenceTransformer(str(out), device="cpu").encode(text), model.encode(text[:64]), atol=1e-6)


def test_added_tokens_in_a_table_of_more_rows(llama_folder: Path, tmp_path: Path):
    tokenizer, model = AutoTokenizer.from_pretrained(llama_folder), AutoModel.from_pretrained(llama_folder)
    tokenizer.add_tokens(["<hedge>"])
    model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=64)
    model.save_pretrained(tmp_path / "added")
    tokenizer.save_pretrained(tmp_path / "added")
    expected = pooled(tmp_path / "added", "a <hedge> b").numpy()
    out = secateur.prune(tmp_path / "added", 3, out=tmp_path / "out")
    for vector in (
        secateur.open_model(tmp_path / "added", device="cpu").encode("a <hedge> b"),
        SentenceTransformer(str(out), device="cpu").encode("a <hedge> b"),
    ):
        assert np.allclose(vector, expected, atol=1e-5)


@pytest.mark.parametrize(("pooling", "place"), [("lasttoken", -1), ("cls", 0)])
def test_one_tokens_state_where_the_tokenizer_adds_no_token_of_its_own(pooling: str, place: int, llama_folder: Path):
    encoded = AutoTokenizer.from_pretrained(llama_folder)(TEXTS[0], return_tensors="pt")
    with torch.no_grad():
        state = AutoModel.from_pretrained(llama_folder)(**encoded).last_hidden_state[0, place]
    model = secateur.open_model(llama_folder, pooling=pooling, device="cpu")
    vectors = model.encode([TEXTS[0], "a longer text, beside which the first one is padded"])
    assert np.allclose(vectors[0], torch.nn.functional.normalize(state, dim=0).numpy(), atol=1e-6)


@pytest.mark.parametrize(
    ("device", "says"), [("banana", "'banana' is no device of torch"), ("vulkan", "'vulkan' is no device of torch")]
)
def test_a_device_that_is_not_there_is_told(device: str, says: str, llama_folder: Path):
    with pytest.raises(ConfigError, match=says):
        secateur.open_model(llama_folder, device=device)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"dtype": "foo"}, "dtype: no such number format as 'foo': one of auto"),
        ({"max_length": 0}, "max_length: 0 tokens"),
    ],
)
def test_options_that_no_model_has(options: dict[str, object], says: str, llama_folder: Path):
    with pytest.raises(ConfigError, match=says):
        secateur.open_model(llama_folder, **options)


def test_what_is_no_model_is_told_in_one_line(tmp_path: Path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    names = {
        tmp_path / "nowhere": "no such file or folder",
        tmp_path / "nothing.gguf": "no such file",
        "./nowhere": "no such file or folder",
        "no-such-owner/no-such-model": "is not in the local cache|the Hub cannot be reached",
        tmp_path / "empty": "has no config.json",
        tmp_path / "file": "is not a model folder",
    }
    for name, says in names.items():
        with pytest.raises(ModelError, match=says) as caught:
            secateur.open_model(name)
        assert caught.value.model == str(name)
        assert "\n" not in str(caught.value)


STOCK = """
import json, sys
import numpy as np
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, AutoTokenizer
folder, texts, out = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]
model = SentenceTransformer(folder, device="cpu")
plain = model.encode(texts)
prompted = model.encode(texts, prompt_name="query")
states = AutoModel.from_pretrained(folder)(**AutoTokenizer.from_pretrained(folder)(texts[0], return_tensors="pt"))
np.savez(out, plain=plain, prompted=prompted, states=states.last_hidden_state.detach().numpy())
assert not any(name.startswith("secateur") for name in sys.modules)
"""


@pytest.fixture(scope="module")
def saved(llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "model"
    model = secateur.open_model(llama_folder, device="cpu")
    model.prompts["query"] = "find;\n"
    folder.mkdir()
    save_model(model, folder, origin_of(llama_folder, 3, range(3), llama_folder / "secateur.json"))
    return folder


def test_a_saved_folder_opens_without_secateur_and_gives_the_same_vectors(saved: Path, llama_folder: Path, tmp_path):
    command = [sys.executable, "-c", STOCK, str(saved), json.dumps(TEXTS), str(tmp_path / "out.npz")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    got = np.load(tmp_path / "out.npz")
    expected = torch.stack([pooled(llama_folder, text) for text in TEXTS]).numpy()
    assert np.allclose(got["plain"], expected, atol=1e-5)
    encoded = AutoTokenizer.from_pretrained(llama_folder)(TEXTS[0], return_tensors="pt")
    states = AutoModel.from_pretrained(llama_folder)(**encoded).last_hidden_state.detach().numpy()
    assert np.allclose(got["states"], states, atol=1e-5)
    reopened = secateur.open_model(saved, device="cpu").encode(TEXTS, prompt_name="query")
    assert np.allclose(got["prompted"], reopened, atol=1e-6)
    assert not np.allclose(got["prompted"], got["plain"], atol=1e-3)


def test_a_saved_folder_tells_its_pooling_in_both_spellings(saved: Path):
    settings = json.loads((saved / "1_Pooling" / "config.json").read_text())
    assert settings["pooling_mode"] == "mean"
    assert [key for key, value in settings.items() if value is True] == ["pooling_mode_mean_tokens"]
    assert settings["include_prompt"] is False
    modules = [module["type"] for module in json.loads((saved / "modules.json").read_text())]
    assert modules == [f"sentence_transformers.models.{name}" for name in ("Transformer", "Pooling", "Normalize")]
    assert sorted(saved.rglob("*.bin")) == []
