"""Real tokenizers of each kind, in the class that each model type is published with: opened, saved, cut."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest
import torch
from sentence_transformers import SentenceTransformer
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerFast, Qwen2Tokenizer, Qwen3_5Config

import architectures
import secateur
from published import PUBLISHED, WHOLE_WAY, write_model
from secateur.data.sources import instruction_prompt

TEXTS = (
    "the word one",
    "Text, wrapped  twice",
    "  indented",
    "x",
    "(Ωmega) 2nd",
    "葉 🌿",
    "two\nlines",
    "ends in a blank ",
)


def test_the_text_tower_of_a_multimodal_model_has_the_tokenizer_of_the_whole(tmp_path: Path):
    """Qwen 3.5's files name the class of Qwen 2, which splits before marks; its own is known by the model's type."""
    text = "माली ने बाड़ काटी, คนสวนตัดรั้วต้นไม้"
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trained.train_from_iterator([text] * 3, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet))
    PreTrainedTokenizerFast(tokenizer_object=trained, pad_token="!").save_pretrained(tmp_path / "whole")
    file = tmp_path / "whole" / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tokenizer_class": "Qwen2Tokenizer"}))
    sizes = architectures.COMMON | architectures.DELTA | {"vocab_size": 400}
    vision = architectures.QWEN_VISION | {"depth": 1, "deepstack_visual_indexes": []}
    AutoModel.from_config(Qwen3_5Config(text_config=sizes, vision_config=vision)).save_pretrained(tmp_path / "whole")
    secateur.prune(tmp_path / "whole", 4, out=tmp_path / "cut")
    opened = [kind.from_pretrained(tmp_path / "cut") for kind in (AutoTokenizer, Qwen2Tokenizer)]
    opened.insert(0, AutoTokenizer.from_pretrained(tmp_path / "whole"))
    whole, cut, other = (tokenizer(text)["input_ids"] for tokenizer in opened)
    assert whole == cut != other


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory):
    return cache(lambda name: write_model(tmp_path_factory.mktemp("published") / name, name))


def pooled_by_hand(folder: Path, prompt: str, text: str, backwards: bool) -> torch.Tensor:
    """Where the text begins is told by the tokenizer's offsets; what follows it (an end token) is pooled as well."""
    encoded = AutoTokenizer.from_pretrained(folder)(prompt + text, return_offsets_mapping=True, return_tensors="pt")
    ends = encoded.pop("offset_mapping")[0, :, 1]
    first = int((ends > len(prompt)).nonzero()[0]) if prompt else 0
    transformer = AutoModel.from_pretrained(folder)
    transformer = transformer.get_encoder() if transformer.config.is_encoder_decoder else transformer
    with torch.no_grad():
        states = transformer(**encoded).last_hidden_state[0, first:]
    places = torch.arange(first + 1.0, first + 1 + len(states)) if backwards else torch.ones(len(states))
    return torch.nn.functional.normalize(places @ states, dim=0)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_tokenizer_stays_as_it_came_and_the_text_alone_is_pooled(name: str, folder_of, tmp_path: Path):
    folder = folder_of(name)
    model = secateur.open_model(folder, device="cpu")
    model.save(str(tmp_path / "saved"), create_model_card=False)
    stock = SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    source = AutoTokenizer.from_pretrained(folder)
    saved = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert [saved(text)["input_ids"] for text in TEXTS] == [source(text)["input_ids"] for text in TEXTS]
    backwards = stock[1].pooling_mode == "weightedmean"
    for prompt in ("", instruction_prompt("find the word")):
        expected = torch.stack([pooled_by_hand(folder, prompt, text, backwards) for text in TEXTS])
        for opened in (model, stock):
            found = opened.encode(list(TEXTS), prompt=prompt, convert_to_tensor=True)
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=0, msg=lambda m: f"{prompt!r}: {m}")  # noqa: B023


@pytest.mark.slow
@pytest.mark.parametrize("name", WHOLE_WAY)
def test_each_kind_of_tokenizer_is_cut_and_verified(name: str, folder_of, tmp_path: Path):
    source = folder_of(name)
    secateur.prune(source, 2, out=tmp_path / "cut")
    cut = SentenceTransformer(str(tmp_path / "cut"), device="cpu")
    transformer = AutoModel.from_pretrained(source)
    tokenizer = AutoTokenizer.from_pretrained(source)
    for text in TEXTS:
        features = tokenizer(text, return_tensors="pt")
        with architectures.bypassed(transformer, (0, 1)), torch.no_grad():
            states = transformer(**features).last_hidden_state[0]
            found = cut[0](dict(features))["token_embeddings"][0]
        torch.testing.assert_close(found, states, atol=1e-5, rtol=0)
