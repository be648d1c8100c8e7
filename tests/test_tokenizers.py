"""Real tokenizers of each kind, in the class that each model type is published with: opened, saved, cut."""

from __future__ import annotations

import json
import pydoc
import textwrap
from functools import cache
from pathlib import Path

import pytest
import torch
import transformers
from sentence_transformers import SentenceTransformer
from tokenizers import BertWordPieceTokenizer, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerBase

import architectures
import secateur
from secateur.data.sources import instruction_prompt

CORPUS = [line for module in (textwrap, pydoc) for line in pydoc.plain(pydoc.render_doc(module)).splitlines()]
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
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
PUBLISHED = {
    "qwen2": "Qwen2Tokenizer",
    "qwen3": "Qwen2Tokenizer",
    "qwen3_5_text": "Qwen2Tokenizer",
    "gpt2": "GPT2Tokenizer",
    "opt": "GPT2Tokenizer",
    "starcoder2": "GPT2Tokenizer",
    "gpt_neox": "GPTNeoXTokenizer",
    "cohere": "CohereTokenizer",
    "roberta": "RobertaTokenizer",
    "llama": "LlamaTokenizer",
    "mistral": "LlamaTokenizer",
    "phi3": "LlamaTokenizer",
    "gemma": "GemmaTokenizer",
    "gemma3_text": "GemmaTokenizer",
    "bert": "BertTokenizer",
    "distilbert": "DistilBertTokenizer",
    "electra": "ElectraTokenizer",
    "xlm-roberta": "XLMRobertaTokenizer",
    "camembert": "CamembertTokenizer",
    "t5": "T5Tokenizer",
}
WHOLE_WAY = ("qwen2", "mistral", "bert", "xlm-roberta")
"""One of each kind: byte-level BPE, BPE with byte fallback, WordPiece, Unigram."""


@cache
def byte_level_bpe() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = [*SPECIAL, "<|endoftext|>"]
    tokenizer.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=600, special_tokens=special, initial_alphabet=alphabet)
    )
    return tokenizer


@cache
def bpe_with_byte_fallback() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    special = [*SPECIAL, "<bos>", "<eos>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=700, special_tokens=special))
    return tokenizer


@cache
def wordpiece() -> Tokenizer:
    tokenizer = BertWordPieceTokenizer()
    tokenizer.train_from_iterator(CORPUS, vocab_size=500)
    return tokenizer._tokenizer


@cache
def unigram() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    tokenizer.train_from_iterator(
        CORPUS, trainers.UnigramTrainer(vocab_size=500, special_tokens=SPECIAL, unk_token="<unk>")
    )
    return tokenizer


def published(name: str) -> PreTrainedTokenizerBase:
    """A tokenizer trained here, as the class that models of this type are published with builds it."""
    kind = {"Llama": bpe_with_byte_fallback, "Gemma": bpe_with_byte_fallback, "Bert": wordpiece, "Electra": wordpiece}
    kind |= {"DistilBert": wordpiece, "XLMRoberta": unigram, "T5": unigram, "Camembert": unigram}
    trained = kind.get(name.removesuffix("Tokenizer"), byte_level_bpe)()
    parts = {"vocab": trained.get_vocab()}
    written = json.loads(trained.to_str())["model"]
    if isinstance(trained.model, models.BPE):
        parts["merges"] = [tuple(merge) for merge in written["merges"]]
    if isinstance(trained.model, models.Unigram):
        parts["vocab"] = [tuple(item) for item in written["vocab"]]
    return getattr(transformers, name)(**parts, model_max_length=64)


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory):
    """Folders as on the Hub: a random model of a type, and its tokenizer."""

    def make(name: str) -> Path:
        folder = tmp_path_factory.mktemp("published") / name
        tokenizer = published(PUBLISHED[name])
        tokenizer.save_pretrained(folder)
        config = architectures.config_of(name)
        config.vocab_size, config.pad_token_id = len(tokenizer), tokenizer.pad_token_id
        torch.manual_seed(0)
        AutoModel.from_config(config).save_pretrained(folder)
        return folder

    return cache(make)


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
