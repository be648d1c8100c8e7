"""The profile against the paper's procedure written out plainly, and against the cut models themselves."""

from __future__ import annotations

import copy
import json
import math
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import architectures
from conftest import LETTERS, example_pairs, tiny_transformer
from secateur.choosing.choose import choose
from secateur.cli import app
from secateur.data.sources import read_pairs, read_texts
from secateur.errors import ConfigError, DataError, ModelError
from secateur.measures.costs import BATCH, BATCHES, SINGLES
from secateur.measures.intervals import looks
from secateur.models.blocks import blocks_of
from secateur.models.cutting import cut, legal_depths
from secateur.models.forward import batch_of, tokenize
from secateur.models.open_model import open_model
from secateur.profiling.depths import DepthEncoder, check_depths, depth_vectors
from secateur.profiling.profile import profile
from secateur.results import Profile, load
from secateur.runtime.core import FULL_RATE, PADDING, plan_batches
from task_folders import example_rows, write_task

INSTRUCTION = "find the word that is asked for"
SHARED = Path(os.environ.get("SECATEUR_SHARED", Path(__file__).parents[2] / "shared"))
GOLDEN = SHARED / "data" / "golden"


def write(file: Path, rows: list[dict]) -> Path:
    file.write_text("\n".join(json.dumps(row) for row in rows))
    return file


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("profile")


@pytest.fixture(scope="module")
def pairs(folder) -> Path:
    rows = example_pairs(24)
    for row in rows[::3]:
        row["query"] += " " + "and so on " * 3  # lengths that differ
    return write(folder / "pairs.jsonl", rows)


@pytest.fixture(scope="module")
def llama(folder) -> Path:
    return tiny_transformer(folder / "llama", "llama", depth=4)


def architecture(folder: Path, name: str) -> Path:
    """A tiny random model of an architecture, with a tokenizer of one token a letter."""
    home = folder / name
    if not home.exists():
        vocabulary = {token: i for i, token in enumerate(["<pad>", "<unk>", "<s>", *LETTERS])}
        tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
        special = {"pad_token": "<pad>", "unk_token": "<unk>", "model_max_length": 64}
        model = architectures.model_of(name)
        model.save_pretrained(home)
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(home)
    return home


def papers_losses(model, pairs, prompt: str, scale: float, size: int) -> np.ndarray:
    """L3Prune's selection as METHOD says it: one text at a time, loops, the other layers bypassed; (depths,)."""
    transformer, tokenizer = model[0].auto_model, model.tokenizer
    depth = len(blocks_of(transformer))

    @torch.no_grad()
    def vector(text: str, prompt: str, kept: int) -> np.ndarray:
        ids = torch.tensor([tokenizer(prompt + text)["input_ids"]])
        skipped = len(tokenizer(prompt.rstrip(" "))["input_ids"]) if prompt else 0  # a blank is the text's
        with architectures.bypassed(transformer, range(kept)):
            states = transformer(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state[0, skipped:]
        backwards = model[1].pooling_mode == "weightedmean"
        weights = [i + 1 if backwards else 1 for i in range(len(states))]
        return sum(w * s.numpy() for w, s in zip(weights, states, strict=True)) / sum(weights)

    def cosine(a: np.ndarray, b: np.ndarray) -> float:
        return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))

    losses = np.zeros(depth)
    starts = range(0, len(pairs.rows) - size + 1, size)
    for kept in range(1, depth + 1):
        for start in starts:
            rows = pairs.rows[start : start + size]
            anchors = [vector(row.anchor, prompt, kept) for row in rows]
            others = [vector(row.positive, "", kept) for row in rows]
            others += [vector(text, "", kept) for row in rows for text in row.negatives]
            for i, anchor in enumerate(anchors):
                scores = [scale * cosine(anchor, other) for other in others]
                losses[kept - 1] += (math.log(sum(map(math.exp, scores))) - scores[i]) / (size * len(starts))
    return losses


TEN = (
    "llama", "qwen2", "qwen3", "gemma2", "gemma3_text", "gpt2", "phi3", "mistral", "bert", "modernbert",
)  # fmt: skip


@pytest.mark.parametrize("name", TEN)
def test_losses_are_the_papers(folder, name):
    data = read_pairs(write(folder / "few.jsonl", example_pairs(12)), instruction="find it")
    pooling, prompt = ("l3prune", "find it; ")
    if name in ("bert", "modernbert"):
        pooling, prompt = ("mean", "find it:")
        data = replace(data, prompt=prompt)
    model = open_model(architecture(folder, name), pooling=pooling, max_length=64, dtype="float32")
    found = profile(model, data, batch_size=6)
    expected = papers_losses(model, data, prompt, 20, 6)
    assert (found.pooling, found.prompt) == (pooling, prompt)
    assert np.abs([row.loss for row in found.rows] - expected).max() < 1e-3
    assert choose(found) == {"small": int(expected[:3].argmin()) + 1, "large": int(expected[3:].argmin()) + 4}
    assert not [note for note in found.notes if "pass of its own" in note]


def test_false_negatives_count_neither_in_the_loss_nor_in_the_ranks(folder):
    """Four rows of one file in one batch: a passage of two anchors, an anchor of two passages, a passage twice."""
    rows = [
        {"query": "red", "positive": "apple", "negative": ["sky"]},
        {"query": "round", "positive": "apple", "negative": ["sky"]},
        {"query": "red", "positive": "brick", "negative": ["sea"]},
        {"query": "blue", "positive": "sky", "negative": ["red"]},
    ]
    passages = ["apple", "apple", "brick", "sky", "sky", "sky", "sea", "red"]  # positives, then negatives
    model = open_model(architecture(folder, "llama"), max_length=64, dtype="float32")
    found = profile(model, write(folder / "repeated.jsonl", rows), batch_size=4)
    anchors, others = (
        model.encode(texts, normalize_embeddings=True) for texts in ([r["query"] for r in rows], passages)
    )
    cosines = anchors.astype(np.float64) @ others.T
    # "red" has two passages and is no negative of its own; the sky is a negative of "red" and "round" three times.
    negatives = {0: [3, 4, 5, 6], 1: [2, 3, 4, 5, 6, 7], 2: [3, 4, 5, 6], 3: [0, 1, 2, 6, 7]}
    documents = {0: [3, 6], 1: [2, 3, 6, 7], 2: [3, 6], 3: [0, 2, 6, 7]}
    losses = [np.log1p(np.exp(20 * (cosines[i, negatives[i]] - cosines[i, i])).sum()) for i in range(4)]
    ranks = [1 + int((cosines[i, documents[i]] > cosines[i, i]).sum()) for i in range(4)]
    last = found.depths[-1]
    assert last.loss == pytest.approx(np.mean(losses), abs=1e-4)
    assert last.ndcg_at_10 == pytest.approx(np.mean([1 / math.log2(1 + rank) for rank in ranks]), abs=1e-5)
    assert last.accuracy == pytest.approx(np.mean([rank == 1 for rank in ranks]))
    same = [{"query": f"is it {word}?", "positive": "yes"} for word in ("red", "blue", "round")]
    with pytest.raises(DataError, match="every passage is a positive of every anchor"):
        profile(model, write(folder / "same.jsonl", same), batch_size=3)


def test_the_vectors_of_a_model_that_truncates_them_are_truncated_at_every_depth(folder):
    data = read_pairs(write(folder / "cut.jsonl", example_pairs(6)))
    model = open_model(architecture(folder, "llama"), max_length=64, dtype="float32")
    model.truncate_dim = 8
    found = profile(model, data, batch_size=6)
    for depth in (1, len(found.depths)):
        pruned = copy.deepcopy(model)
        cut(pruned[0].auto_model, range(depth))
        columns = [row.anchor for row in data.rows], [row.positive for row in data.rows]
        texts = [*columns[0], *columns[1], *(text for row in data.rows for text in row.negatives)]
        vectors = pruned.encode(texts, normalize_embeddings=True).astype(np.float64)
        assert vectors.shape[1] == 8
        scores = 20 * vectors[:6] @ vectors[6:].T
        loss = np.mean(np.log(np.exp(scores).sum(axis=1)) - scores.diagonal())
        assert found.depths[depth - 1].loss == pytest.approx(loss, abs=1e-4)


@pytest.mark.parametrize(
    "name", ["llama", "gemma3_text", "bert", "opt+projected", "inkling2_text", "xlnet", "falcon_mamba"]
)
def test_the_vector_at_each_depth_is_that_of_the_cut_model(folder, name):
    model = open_model(architecture(folder, name), max_length=64, dtype="float32")
    texts = [f"{row['query']} {'x' * i}" for i, row in enumerate(example_pairs(12))]
    prompt = "find the word;\n"
    encoder = DepthEncoder(model, budget=120)
    by_row = {row: v for b in encoder.run(texts, prompt) for row, v in zip(b.rows, b.vectors, strict=True)}
    found = torch.stack([by_row[row] for row in range(len(texts))])
    for depth in legal_depths(model[0].auto_model.config):
        pruned = copy.deepcopy(model)
        cut(pruned[0].auto_model, range(depth))
        # One by one: some of these architectures see the padding of a batch.
        alone = name in ("xlnet", "falcon_mamba")
        expected = pruned.encode(texts, prompt=prompt, batch_size=1 if alone else 4, convert_to_tensor=True)
        tolerance = 1e-4 if not alone else 1
        assert (found[:, depth - 1] - expected).abs().max() < tolerance, depth


@pytest.mark.parametrize(
    ("name", "layers", "kept"),
    [
        ("llama", "first", ((0,), (0, 1, 2))),
        ("llama", "uniform", ((0,), (0, 2, 3))),
        ("bert", "uniform", ((0,), (0, 2, 3))),
    ],
)
def test_gradients_flow_through_every_depth_as_through_the_cut_models(name, layers, kept, make_encoder):
    model = make_encoder(name, depth=4).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    depths = check_depths(model, [3, 1, 3], layers=layers)
    assert depths == (1, 3, 4)
    features = model.preprocess(["a word", "a longer text"], prompt="find: ")
    vectors = depth_vectors(model, features, depths, layers=layers)
    for place, (depth, own) in enumerate(zip(depths, (*kept, range(4)), strict=True)):
        pruned = copy.deepcopy(model)
        cut(pruned[0].auto_model, own)
        expected = pruned(dict(features))["sentence_embedding"]
        assert torch.allclose(vectors[:, place], expected, atol=1e-5), depth
        model.zero_grad()
        vectors[:, place].square().sum().backward(retain_graph=True)
        expected.square().sum().backward()
        for place_in_cut, layer in enumerate(own):
            whole, alone = blocks_of(model[0].auto_model)[layer], blocks_of(pruned[0].auto_model)[place_in_cut]
            for first, same in zip(whole.parameters(), alone.parameters(), strict=True):
                assert torch.allclose(first.grad, same.grad, atol=1e-5), (depth, layer)
        others = [blocks_of(model[0].auto_model)[layer] for layer in set(range(4)) - set(own)]
        assert not any(p.grad is not None and p.grad.any() for layer in others for p in layer.parameters()), depth
    for wrong in ([0], [5]):
        with pytest.raises(ConfigError, match=f"depths: is {wrong[0]}: the model has 4 layers"):
            check_depths(model, wrong, layers=layers)


def test_a_shared_instruction_is_computed_once_with_the_same_vectors(llama):
    model = open_model(llama, dtype="float32")
    texts = [row["query"] + "x" * (i % 20) for i, row in enumerate(example_pairs(150))]
    ran = []
    model[0].auto_model.embed_tokens.register_forward_hook(lambda _, args, __: ran.append(args[0].numel()))

    def read(prompt: str, together: int) -> tuple[torch.Tensor, torch.Tensor, int, int]:
        encoder = DepthEncoder(model)
        rows, influence, tokens = {}, 0, 0
        ran.clear()
        for start in range(0, len(texts), together):
            part = texts[start : start + together]
            for batch in encoder.run(part, prompt):
                rows |= {start + row: v for row, v in zip(batch.rows, batch.vectors, strict=True)}
                influence, tokens = influence + batch.influence, tokens + batch.tokens
        assert not encoder.notes
        return torch.stack([rows[i] for i in range(len(texts))]), influence / tokens, tokens, sum(ran)

    once, influence, tokens, computed = read(INSTRUCTION + "; ", len(texts))
    anew, expected, same_tokens, plainly = read(INSTRUCTION + "; ", 8)  # too few texts to share
    assert (once - anew).abs().max() < 1e-4
    assert torch.allclose(influence, expected, atol=1e-5)
    assert tokens == same_tokens
    assert computed < 0.8 * plainly


@pytest.mark.parametrize("name", ["weighted_mean", "mean", "lasttoken", "cls"])
def test_every_pooling_is_the_models_own(llama, name):
    model = open_model(llama, pooling=name, dtype="float32")
    texts, prompt = [row["query"] + "x" * i for i, row in enumerate(example_pairs(6))], INSTRUCTION + "; "
    expected = model.encode(texts, prompt=prompt, convert_to_tensor=True)
    for batch in DepthEncoder(model).run(texts, prompt):
        assert torch.allclose(batch.vectors[:, -1], expected[list(batch.rows)], atol=1e-5)


def test_each_distinct_text_is_run_once(llama, folder):
    rows = [{**row, "query": "what is it?"} for row in example_pairs(16)]  # one query for all
    model = open_model(llama, dtype="float32")
    sizes = []
    model[0].auto_model.layers[0].register_forward_hook(lambda _, args, __: sizes.append(len(args[0])))
    found = profile(model, write(folder / "same.jsonl", rows), batch_size=4)
    distinct = {row["query"] for row in rows} | {row["positive"] for row in rows} | {r["negative"][0] for r in rows}
    assert found.texts == len(distinct)
    probes = 2 * 2 + 4  # twice the model is asked whether it is blind to what follows; the quick way is checked
    timed = 1 + (1 + SINGLES) + (1 + BATCHES) * BATCH  # what the parts of the model cost
    assert sum(sizes) <= len(distinct) + probes + timed


def test_angles_influence_and_tables_have_their_shapes(llama, pairs, tmp_path):
    found = profile(llama, pairs, batch_size=4, dtype="float32", out=tmp_path / "out")
    assert load(tmp_path / "out", Profile) == found
    old = json.loads((tmp_path / "out" / "profile.json").read_text()) | {"losses_by_pooling": {"mean": [1.0] * 4}}
    (tmp_path / "old.json").write_text(json.dumps(old))
    assert load(tmp_path / "old.json", Profile) == found
    cka, angular = np.array(found.cka), np.array(found.angular)
    assert cka.shape == (4, 4) and angular.shape == (5, 5)
    assert np.allclose(np.diag(cka), 1) and np.allclose(np.diag(angular), 0)
    assert np.allclose(cka, cka.T) and ((cka >= 0) & (cka <= 1 + 1e-6)).all()
    assert np.array(found.batch_losses).mean(axis=0) == pytest.approx([row.loss for row in found.rows])
    for row in found.rows:
        assert row.loss_low <= row.loss <= row.loss_high
        assert 0 <= row.accuracy <= row.ndcg_at_10 <= 1
    assert sum(row.selection_probability for row in found.rows) == pytest.approx(2)


@torch.no_grad()
def raw_states(transformer, ids: torch.Tensor) -> list[np.ndarray]:
    """The last token's state before the first layer and after each, none of them normed."""
    caught = []
    handles = [transformer.layers[0].register_forward_pre_hook(lambda _, args: caught.append(args[0]))]
    handles += [
        block.register_forward_hook(lambda _, __, output: caught.append(output)) for block in transformer.layers
    ]
    transformer(input_ids=ids)
    for handle in handles:
        handle.remove()
    return [states.reshape(-1, states.shape[-1])[-1].numpy() for states in caught]


def test_the_angle_is_that_of_the_last_tokens_states(llama):
    model = open_model(llama, dtype="float32")
    texts = ["a word?", "a much longer text, so that there is padding."]
    (batch,) = DepthEncoder(model).run(texts)
    angles = np.zeros((5, 5))
    for text in texts:
        ids = torch.tensor([model.tokenizer(text)["input_ids"]])
        states = raw_states(model[0].auto_model, ids)
        for i, one in enumerate(states):
            for j, other in enumerate(states):
                cos = one @ other / np.linalg.norm(one) / np.linalg.norm(other)
                angles[i, j] += math.acos(min(1, max(-1, float(cos)))) / math.pi if i != j else 0
    assert np.allclose(batch.angles.numpy(), angles, atol=1e-4)


@pytest.mark.parametrize("tied", [True, False])
def test_next_token_loss_is_that_of_the_language_model(tied, tmp_path):
    home = tiny_transformer(tmp_path / "lm", "llama", depth=3)
    config = LlamaConfig.from_pretrained(home)
    config.tie_word_embeddings = tied
    language_model = LlamaForCausalLM(config).eval()
    language_model.save_pretrained(home)
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(row["query"] for row in example_pairs(40)))
    found = profile(home, texts, dtype="float32", batch_size=8)
    # Every position of every text, where the profile samples 32: equal within the sample's spread.
    losses = []
    tokenizer = PreTrainedTokenizerFast.from_pretrained(home)
    with torch.no_grad():
        for text in read_texts(texts).rows:
            ids = torch.tensor([tokenizer(text)["input_ids"]])
            scores = language_model(input_ids=ids).logits[0, :-1].log_softmax(-1)
            losses += (-scores[torch.arange(len(scores)), ids[0, 1:]]).tolist()
    spread = np.std(losses) / math.sqrt(32)
    assert found.rows[-1].next_token_loss == pytest.approx(np.mean(losses), abs=4 * spread)


def test_no_next_token_loss_without_a_head(folder, llama, pairs):
    untied = profile(llama, pairs, batch_size=8, dtype="float32")  # its config is not tied, its folder has no head
    both_ways = profile(tiny_transformer(folder / "bert", "bert"), pairs, batch_size=8, dtype="float32")
    assert all(row.next_token_loss is None for row in (*untied.rows, *both_ways.rows))


def test_texts_alone_tell_all_but_the_supervised_columns(llama, folder):
    rows = [{"text": row["query"]} for row in example_pairs(20)]
    found = profile(llama, write(folder / "texts.jsonl", rows), dtype="float32", batch_size=8)
    assert all(row.loss is None and row.selection_probability is None and row.accuracy is None for row in found.rows)
    assert all(row.effective_rank > 1 and row.uniformity < 0 and row.block_influence > 0 for row in found.rows)
    assert len(found.cka) == 4 and any("texts alone" in note for note in found.notes)
    with pytest.raises(DataError, match="texts alone"):
        choose(found)


def test_early_stopping_ends_with_the_full_choice(folder):
    data, apart = write(folder / "many.jsonl", example_pairs(200)), tiny_transformer(folder / "apart", "llama", 3, 2)
    full = profile(apart, data, batch_size=4, dtype="float32")
    early = profile(apart, data, batch_size=4, dtype="float32", early_stopping=True)
    assert choose(early) == choose(full)
    assert early.batches < full.batches == 50
    assert early.converged and early.batches in looks(50)
    assert any("early stopping after" in note for note in early.notes)
    # Batches are visited in the same order, so what was read is what the full pass read first.
    assert np.allclose(early.batch_losses, full.batch_losses[: early.batches], atol=1e-4)


def test_what_fails_after_the_measuring_costs_no_more_than_itself(folder, pairs, tmp_path, monkeypatch):
    """An operation that nobody counts; then a task whose scores cannot be had."""
    model = open_model(tiny_transformer(folder / "uncounted", depth=2), dtype="float32")
    monkeypatch.setattr("secateur.measures.costs.FlopCounterMode.get_flop_counts", fail_to_count)
    found = profile(model, pairs, batch_size=4, out=tmp_path / "uncounted")
    assert found.layer_costs == () and "no costs of cut models: unknown operation" in found.notes
    assert load(tmp_path / "uncounted", Profile) == found and (tmp_path / "uncounted/curve.png").is_file()

    task = write_task(tmp_path / "t", "sts", example_rows("sts"))
    monkeypatch.setattr("secateur.profiling.depth_scores.score_task", failing)
    with pytest.raises(DataError, match="cannot be had"):
        profile(folder / "uncounted", pairs, batch_size=4, dtype="float32", tasks=[task], out=tmp_path / "scoreless")
    kept = load(tmp_path / "scoreless", Profile)
    assert [row.loss for row in kept.rows] == pytest.approx([row.loss for row in found.rows])
    assert kept.task_scores == ()


def fail_to_count(_: object) -> None:
    raise NotImplementedError("unknown operation")


def failing(*_: object) -> None:
    raise DataError("t", "cannot be had")


def test_fewer_than_five_batches_have_no_intervals(llama, pairs):
    few = profile(llama, pairs, batch_size=8, dtype="float32")
    assert few.batches == 3
    assert all(row.loss_low is None and row.selection_probability is None and row.loss_se > 0 for row in few.rows)
    assert any("3 batches are too few for intervals" in note for note in few.notes)


def test_early_stopping_with_texts_alone_is_refused(llama, folder):
    texts = write(folder / "unlabelled.jsonl", [{"text": row["query"]} for row in example_pairs(20)])
    with pytest.raises(ConfigError, match="early_stopping: needs losses, and the data are texts alone"):
        profile(llama, texts, early_stopping=True)
    with pytest.raises(ConfigError, match="early_stopping: needs losses"):
        flags = ["--early-stopping", "-o", str(folder / "none")]
        app(["profile", str(llama), "--data", str(texts), *flags], standalone_mode=False)


def test_half_precision_gives_nearly_the_same(llama, pairs):
    exact = profile(llama, pairs, batch_size=8, dtype="float32")
    rough = profile(llama, pairs, batch_size=8, dtype="bfloat16")
    assert rough.dtype == "bfloat16"
    assert [row.loss for row in rough.rows] == pytest.approx([row.loss for row in exact.rows], abs=0.1)


@pytest.mark.parametrize(("can", "dtype"), [(True, "bfloat16"), (False, "float32")])
def test_auto_takes_the_number_format_by_what_the_processor_says_and_no_clock(llama, pairs, monkeypatch, can, dtype):
    monkeypatch.setattr("secateur.profiling.profile.multiplies_bfloat16", lambda: can)
    found = profile(llama, pairs, batch_size=8)
    assert found.dtype == dtype
    assert f"dtype {dtype}: this processor" in found.notes[0]
    again = profile(llama, pairs, batch_size=8, dtype=found.dtype)
    assert again.batch_losses == found.batch_losses


def test_one_row_and_identical_texts_are_refused(llama, folder):
    row = example_pairs(1)[0]
    for rows in ([row], [row] * 5, [{"text": "same"}] * 3):
        with pytest.raises(DataError, match="fewer than two different"):
            profile(llama, write(folder / "bad.jsonl", rows))


def test_a_drawing_of_one_pair_or_text_is_refused(llama, folder):
    row, other = example_pairs(2)
    mostly = write(folder / "mostly.jsonl", [row] * 50 + [other])
    with pytest.raises(DataError, match="two different pairs were drawn from it: raise --max-examples"):
        profile(llama, mostly, max_examples=4, dtype="float32")
    texts = write(folder / "mostly_texts.jsonl", [{"text": "same"}] * 50 + [{"text": "other"}])
    with pytest.raises(DataError, match="two different texts were drawn from it"):
        profile(llama, texts, max_examples=2, dtype="float32")


def test_empty_texts_are_refused_with_their_line(llama, folder):
    with pytest.raises(DataError, match='line 2, "text": the text is empty'):
        profile(llama, write(folder / "empty.jsonl", [{"text": "a"}, {"text": " "}]))
    model = open_model(llama, dtype="float32")
    with pytest.raises(DataError, match="has no tokens"):
        list(DepthEncoder(model).run(["word", ""]))


def test_without_an_instruction_the_models_default_prompt_goes_before_every_text(make_encoder, pairs, tmp_path):
    bare = make_encoder("llama")
    own = make_encoder("llama", prompts={"own": "own;\n", "query": "other;\n"}, default_prompt_name="own")
    told = tmp_path / "told.jsonl"
    told.write_text(pairs.read_text())
    told.with_suffix(".json").write_text(json.dumps({"query_instruction": "own", "passage_instruction": "own"}))
    texts = write(tmp_path / "texts.jsonl", [{"text": f"word {i}"} for i in range(8)])

    def columns(model, data, **options) -> tuple:
        found = profile(model, data, batch_size=8, **options)
        return found.prompt, [(row.loss, row.uniformity) for row in found.depths]

    assert columns(own, pairs) == columns(bare, told) == columns(own, told)
    assert columns(own, pairs) != columns(bare, pairs) == columns(own, pairs, instruction="")
    assert columns(own, texts) == columns(bare, texts, instruction="own") != columns(bare, texts)


def test_an_open_model_is_measured_as_it_encodes_and_is_not_opened_otherwise(make_encoder, pairs):
    model = make_encoder()  # of BERT's kind, with dropout
    assert profile(model.train(), pairs, batch_size=8).rows == profile(model.eval(), pairs, batch_size=8).rows
    for option in ({"pooling": "cls"}, {"max_length": 8}, {"dtype": "bfloat16"}):
        with pytest.raises(ConfigError, match=f"^{next(iter(option))}: .*leave it out"):
            profile(model, pairs, **option)


def test_the_same_data_twice_are_refused(llama, pairs, tmp_path):
    again = tmp_path / "again.jsonl"
    again.write_text(pairs.read_text())
    for second in (pairs, again):
        with pytest.raises(DataError, match=r"is there twice.*name it once"):
            profile(llama, [pairs, second])


@pytest.mark.parametrize(
    "option",
    [
        {"scale": -1.0},
        {"scale": 0},
        {"scale": math.nan},
        {"scale": math.inf},
        {"max_examples": 1},
        {"max_length": -3},
        {"dtype": "foo"},
        {"batch_size": 2.5},
        {"batch_size": 1},
        {"seed": None},
        {"seed": 2**32},
        {"pooling": "max"},
        {"sample": 0},
    ],
)
def test_numbers_and_names_that_will_not_do_are_refused_before_any_work(option, llama, pairs, tmp_path):
    (name,) = option
    with pytest.raises(ConfigError, match=f"^{name}: .* is not valid"):
        profile(llama, pairs, out=tmp_path / "out", **option)
    assert not (tmp_path / "out").exists()


def test_a_trained_embedder_keeps_its_own_length(make_encoder, pairs, tmp_path):
    make_encoder().save(str(tmp_path / "embedder"))
    with pytest.raises(ConfigError, match=r"max_length: .* is a trained embedder"):
        profile(tmp_path / "embedder", pairs, max_length=16)


def test_an_instruction_that_fills_the_length_is_refused(llama, pairs):
    with pytest.raises(DataError, match="its prompt fills them all"):
        profile(llama, pairs, instruction="x" * 60, max_length=32, batch_size=8, dtype="float32")


def test_weights_that_are_not_finite_are_refused_with_their_depth(llama, pairs):
    model = open_model(llama, dtype="float32")
    with torch.no_grad():
        model[0].auto_model.layers[2].mlp.up_proj.weight[0] = math.nan
    with pytest.raises(ModelError, match="not finite at depth 3"):
        profile(model, pairs, batch_size=8)


def test_a_head_with_numbers_that_are_not_finite_is_said(tmp_path, pairs):
    config = LlamaConfig.from_pretrained(tiny_transformer(tmp_path / "lm", "llama", depth=2))
    config.tie_word_embeddings = False
    language_model = LlamaForCausalLM(config)
    with torch.no_grad():
        language_model.lm_head.weight[3] = math.nan
    language_model.save_pretrained(tmp_path / "lm")
    found = profile(tmp_path / "lm", pairs, batch_size=8, dtype="float32")
    assert all(row.next_token_loss is None and math.isfinite(row.loss) for row in found.rows)
    assert any("next-token loss is no number at depth 1, 2: the language-model head" in note for note in found.notes)


def test_the_same_vector_for_all_texts_is_said(folder, llama):
    rows = [{"text": "w" + row["query"]} for row in example_pairs(12)]  # the first token is all that cls pooling sees
    found = profile(llama, write(folder / "first.jsonl", rows), pooling="cls", dtype="float32", batch_size=4)
    assert all(row.effective_rank is None for row in found.rows)
    assert any("the same at depth 1, 2, 3, 4" in note for note in found.notes)
    assert "NaN" not in json.dumps(found.to_dicts())


def test_a_batch_too_large_for_the_memory_is_halved(llama):
    model = open_model(llama, dtype="float32")
    texts = [row["query"] for row in example_pairs(32)]
    expected = DepthEncoder(model)
    whole = {row: v for b in expected.run(texts) for row, v in zip(b.rows, b.vectors, strict=True)}

    def refuse(_, args) -> None:
        if len(args[0]) > 10:
            raise torch.OutOfMemoryError("DefaultCPUAllocator: can't allocate memory")

    model[0].auto_model.layers[1].register_forward_pre_hook(refuse)
    encoder = DepthEncoder(model)
    found = {row: v for b in encoder.run(texts) for row, v in zip(b.rows, b.vectors, strict=True)}
    assert encoder.notes == ["a batch was too large for the memory and was halved"]
    assert all(torch.allclose(found[i], whole[i], atol=1e-5) for i in range(32))


def test_a_model_that_has_room_for_few_texts_only_is_still_profiled(llama, pairs):
    expected = profile(llama, pairs, batch_size=8, dtype="float32", instruction=INSTRUCTION)
    model = open_model(llama, dtype="float32")

    def refuse(_, args) -> None:
        if len(args[0]) > 3:  # less than what the quick ways are tried on
            raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")

    model[0].auto_model.layers[1].register_forward_pre_hook(refuse)
    found = profile(model, pairs, batch_size=8, instruction=INSTRUCTION)
    assert [row.loss for row in found.rows] == pytest.approx([row.loss for row in expected.rows], abs=1e-4)
    assert "a batch was too large for the memory and was halved" in found.notes
    assert found.layer_costs == () and any("no costs of cut models" in note for note in found.notes)


def test_a_single_text_too_large_for_the_memory_is_said(llama, pairs):
    model = open_model(llama, dtype="float32")

    def refuse(_, args) -> None:
        if args[0].shape[1] > 14:
            raise MemoryError

    model[0].auto_model.layers[1].register_forward_pre_hook(refuse)
    with pytest.raises(ModelError, match=r"a text of [0-9]+ tokens does not fit into memory: lower --max-length"):
        profile(model, pairs, batch_size=8)


def test_batches_keep_to_the_budget_are_little_padded_and_run_every_text_once():
    lengths = torch.randint(1, 90, (600,), generator=torch.Generator().manual_seed(0))
    batches = plan_batches(lengths.tolist(), 512)
    assert sorted(i for batch in batches for i in batch) == list(range(600))
    for batch in batches:
        padded = len(batch) * int(lengths[batch].max())
        assert padded <= 512
        assert padded <= PADDING * int(lengths[batch].sum()) or padded <= FULL_RATE + 2 * 90
    assert sum(len(batch) * int(lengths[batch].max()) for batch in batches) <= PADDING * int(lengths.sum())
    assert plan_batches([600, 3], 512) == [[0], [1]]


@pytest.mark.parametrize("side", ["left", "right"])
def test_batches_are_padded_on_the_right_whatever_the_tokenizer_does(llama, side):
    model = open_model(llama, dtype="float32")
    model.tokenizer.padding_side = side
    texts = ["abc", "a longer text", "defghij"]
    batch = batch_of(tokenize(model, texts), [0, 2])
    expected = model.tokenizer(["abc", "defghij"], padding=True, padding_side="right")
    assert batch["input_ids"].tolist() == expected["input_ids"]
    assert batch["attention_mask"].tolist() == expected["attention_mask"]


@pytest.mark.slow
@pytest.mark.skipif(not GOLDEN.is_dir(), reason="the reference losses are not here")
def test_smollm2_gives_the_losses_of_the_public_code(monkeypatch):
    pytest.importorskip("gguf")
    reference = json.loads((GOLDEN / "losses.json").read_text())
    model = open_model("smollm2", pooling="l3prune", dtype="float32")
    data = read_pairs(GOLDEN / "triplets.jsonl", instruction=reference["instruction"])

    def assert_near(found: Profile, most: float) -> None:
        expected = reference["results"][f"{found.scale:g}"]
        assert np.abs(np.array(expected["losses"]) - [row.loss for row in found.rows]).max() < most
        assert choose(found) == {"small": expected["small"], "large": expected["large"]}

    assert_near(profile(model, data, scale=20), 1e-3)

    # The public code tokenizes a text alone and pools that many tokens from the end, which is off where a text's first
    # word has another number of tokens after a blank. Counted its way, nothing else is left.
    from secateur.models.forward import L3PrunePooling

    tokenizer = model.tokenizer
    prompt = f"{reference['instruction']}; "
    by_ids = {
        tuple(tokenizer(prompt + row.anchor)["input_ids"]): len(tokenizer(row.anchor)["input_ids"]) for row in data.rows
    }
    plain = L3PrunePooling.forward

    def publicly(self, features, **kwargs):
        if "prompt_length" not in features:
            return plain(self, features, **kwargs)
        mask = features["attention_mask"].clone()
        for row, (ids, real) in enumerate(zip(features["input_ids"], mask.bool(), strict=True)):
            places = real.nonzero().flatten()
            mask[row, places[: -by_ids[tuple(ids[real].tolist())]]] = 0
        text_only = {key: value for key, value in features.items() if key != "prompt_length"}
        return features | {
            "sentence_embedding": plain(self, text_only | {"attention_mask": mask})["sentence_embedding"]
        }

    monkeypatch.setattr(L3PrunePooling, "forward", publicly)
    assert_near(profile(model, data, scale=50), 1e-5)
