from __future__ import annotations

from pathlib import Path

import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling
from tokenizers import ByteLevelBPETokenizer
from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerFast

import secateur
from conftest import llama_model
from secateur.data.sources import instruction_prompt
from secateur.models.forward import make_pooling, pool, pooling_name
from secateur.profiling.depths import DepthEncoder

WIDTH = 5


def weighted_mean(states: torch.Tensor, pooled: list[int]) -> torch.Tensor:
    """The formula: Σ i·h_i / Σ i over the pooled tokens, numbered from 1."""
    weights = torch.arange(1, len(pooled) + 1, dtype=states.dtype)
    return (weights[:, None] * states[pooled]).sum(0) / weights.sum()


@pytest.fixture
def states() -> torch.Tensor:
    return torch.randn(3, 9, WIDTH, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("prompt_length", [0, 1, 3])
@pytest.mark.parametrize("as_tensor", [True, False])
def test_weighted_mean_counts_from_the_first_token_of_the_text(side, prompt_length, as_tensor, states):
    lengths = (9, 6, 4)
    spans = [range(9 - n, 9) if side == "left" else range(n) for n in lengths]
    mask = torch.tensor([[int(i in span) for i in range(9)] for span in spans])
    features = {"token_embeddings": states, "attention_mask": mask}
    if prompt_length:
        features["prompt_length"] = torch.tensor([prompt_length]) if as_tensor else prompt_length
    vectors = make_pooling("l3prune", WIDTH)(features)["sentence_embedding"]
    by_hand = [weighted_mean(row, list(span)[prompt_length:]) for row, span in zip(states, spans, strict=True)]
    assert torch.allclose(vectors, torch.stack(by_hand), atol=1e-6)
    assert torch.equal(features["attention_mask"], mask)


def test_without_a_prompt_the_stock_module_gives_the_same_and_with_one_it_does_not(states):
    ours = make_pooling("l3prune", WIDTH)
    stock = make_pooling("weighted_mean", WIDTH)
    assert type(stock) is Pooling
    features = {"token_embeddings": states, "attention_mask": torch.ones(3, 9, dtype=torch.int64)}
    assert torch.equal(ours(dict(features))["sentence_embedding"], stock(dict(features))["sentence_embedding"])
    features["prompt_length"] = 3
    assert not torch.allclose(ours(dict(features))["sentence_embedding"], stock(dict(features))["sentence_embedding"])


def test_the_other_poolings_are_the_fields_own(states):
    features = {"token_embeddings": states, "attention_mask": torch.ones(3, 9, dtype=torch.int64), "prompt_length": 2}
    expected = {"mean": states[:, 2:].mean(1), "lasttoken": states[:, -1], "cls": states[:, 0]}
    for name, vectors in expected.items():
        assert torch.allclose(make_pooling(name, WIDTH)(dict(features))["sentence_embedding"], vectors, atol=1e-6)


def test_pool_runs_everything_after_the_transformer(make_encoder):
    model = make_encoder("bert", prompts={"query": "find; "})
    features = model.preprocess(["some text", "a"], prompt="find; ")
    with torch.no_grad():
        states = model[0](dict(features))["token_embeddings"]
        vectors = pool(model, states, features)
    assert torch.allclose(vectors, model.encode(["some text", "a"], prompt="find; ", convert_to_tensor=True), atol=1e-6)
    assert pooling_name(model) == "mean"


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama whose tokenizer glues a blank to the word after it, as those of most language models do."""
    folder = tmp_path_factory.mktemp("bytes") / "llama"
    bpe = ByteLevelBPETokenizer()
    corpus = ["Instruct; the word one two three; gather the leaves under the tree"] * 4
    bpe.train_from_iterator(corpus, vocab_size=320, min_frequency=1, special_tokens=["<eos>"], show_progress=False)
    PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<eos>").save_pretrained(folder)
    llama_model(bpe.get_vocab_size()).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("text", ["the word one", "Ωmega, 2nd", "x"])
def test_the_papers_profile_pools_every_word_of_the_text_and_none_of_the_prompt(text: str, byte_level: Path):
    """Where the text begins is told by the tokenizer's offsets; the blank that ends the prompt is the text's."""
    model = secateur.open_model(byte_level, pooling="l3prune", device="cpu")
    prompt = "Instruct; "
    encoded = AutoTokenizer.from_pretrained(byte_level)(prompt + text, return_offsets_mapping=True, return_tensors="pt")
    pooled = [i for i, (_, end) in enumerate(encoded.pop("offset_mapping")[0]) if end > len(prompt.rstrip())]
    with torch.no_grad():
        states = AutoModel.from_pretrained(byte_level)(**encoded).last_hidden_state[0]
    expected = torch.nn.functional.normalize(weighted_mean(states, pooled), dim=0)
    (found,) = DepthEncoder(model).run([text], prompt)
    assert torch.allclose(found.vectors[0, -1], expected, atol=1e-5)


def test_a_profile_pools_as_the_written_folder_does(byte_level: Path, tmp_path: Path):
    """Under an instruction, too: the vector at the last depth is what stock libraries give for the saved folder."""
    texts, prompt = ["the word one", "Ωmega, 2nd", "x"], instruction_prompt("gather the leaves")
    model = secateur.open_model(byte_level, device="cpu")
    model.save(str(tmp_path / "saved"), create_model_card=False)
    (found,) = DepthEncoder(model).run(texts, prompt)
    expected = SentenceTransformer(str(tmp_path / "saved"), device="cpu").encode(
        texts, prompt=prompt, convert_to_tensor=True
    )
    assert torch.allclose(found.vectors[:, -1], expected[list(found.rows)], atol=1e-5)
