"""Tokenizers of each kind, trained here, in the class that each model type is published with; and folders with them."""

from __future__ import annotations

import json
import pydoc
import textwrap
from functools import cache
from pathlib import Path

import torch
import transformers
from tokenizers import BertWordPieceTokenizer, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import AutoModel, PreTrainedTokenizerBase

import architectures

CORPUS = [line for module in (textwrap, pydoc) for line in pydoc.plain(pydoc.render_doc(module)).splitlines()]
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
SCRIPTS = (
    "The gardener cut the hedge back",
    "Die Gärtnerin schnitt die Hecke",
    "Садовник подстриг живую изгородь",
    "Ο κηπουρός έκοψε τον φράχτη",
    "الحديقة الخضراء",
    "הגנן גזם את השיח",
    "माली ने बाड़ काटी",
    "คนสวนตัดรั้วต้นไม้",
    "园丁修剪了树篱",
    "庭師は生け垣を刈った",
    "정원사가 울타리를 다듬었다",
    "def add(a: int, b: int) -> int:\n\treturn a + b  # sum",
    "🌿✂️ 👩🏽‍🌾 emoji",
    "control \x00\x07\x1b characters\u200b\u202e",
    "",
    "   ",
    "x" * 300,
)
EVERY = {chr(code) for code in range(0x110000)}
SHORT = [word for line in CORPUS for word in line.split()][:400]
"""Texts of which many have only frequent tokens."""
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
        first = ["<pad>", "</s>", "<unk>"] if name == "T5Tokenizer" else []  # where its class looks for them
        parts["vocab"] = [(token, 0.0) for token in first]
        parts["vocab"] += [tuple(item) for item in written["vocab"] if item[0] not in first]
    return getattr(transformers, name)(**parts, model_max_length=64)


def write_model(folder: Path, name: str) -> Path:
    """A folder as on the Hub: a random model of a type, and its tokenizer."""
    tokenizer = published(PUBLISHED[name])
    tokenizer.save_pretrained(folder)
    config = architectures.config_of(name)
    config.vocab_size, config.pad_token_id = len(tokenizer), tokenizer.pad_token_id
    torch.manual_seed(0)
    AutoModel.from_config(config).save_pretrained(folder)
    return folder


def assert_same_where_all_tokens_stay(
    old: PreTrainedTokenizerBase, new: PreTrainedTokenizerBase, alone: Tokenizer, texts: list[str], known: set[str]
) -> list[str]:
    """Compare tokens by what they are; gives the texts of which all stayed. ``known`` are characters that all stay."""
    ids = new.get_vocab()
    unchanged = []
    for text in texts:
        before, after = old(text, truncation=False)["input_ids"], new(text, truncation=False)["input_ids"]
        tokens = old.convert_ids_to_tokens(before)
        assert after == alone.encode(text).ids
        if all(token in ids for token in tokens):
            assert new.convert_ids_to_tokens(after) == tokens
            unchanged.append(text)
        if old.unk_token is not None and known.issuperset(text):
            assert after.count(new.unk_token_id) <= before.count(old.unk_token_id), f"new unknown tokens: {text!r}"
    return unchanged
