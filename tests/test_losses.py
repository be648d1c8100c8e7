from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss, MultipleNegativesRankingLoss

from conftest import MakeEncoder, example_pairs
from secateur.data.vectors import PROBES, VectorCache
from secateur.errors import ConfigError
from secateur.healing.losses import Loss, batch_mask, contrastive_loss, mini_batches, row_keys, set_dropout
from secateur.healing.recipes import TrainingConfig, training_arguments
from secateur.healing.teacher import Teacher, keep_vectors
from secateur.healing.trainer import Trainer, rounded_lengths
from secateur.models.blocks import blocks_of
from secateur.models.cutting import cut
from secateur.profiling.depths import depth_vectors

ANCHORS = ["what is a hedge?", "who cuts it", "when", "where do they stand now?"]
POSITIVES = ["a row of shrubs", "the gardener", "in spring, before the birds", "here"]
NEGATIVES = ["a wall", "the cat", "never", "a rather longer text than the others"]
SCALE = 20.0


def config(**changes: Any) -> TrainingConfig:
    return TrainingConfig(**({"scale": SCALE} | changes))


def tokens(model: SentenceTransformer, *columns: Sequence[str], prompt: str | None = None) -> list[dict[str, Any]]:
    prompts = [prompt, *[None] * (len(columns) - 1)]
    return [model.preprocess(list(texts), prompt=before) for texts, before in zip(columns, prompts, strict=True)]


def taught(folder: Path, texts: Sequence[str], dimension: int) -> tuple[VectorCache, np.ndarray]:
    """A teacher's random vectors, not of length 1, as kept and as they are."""
    vectors = np.random.default_rng(0).normal(size=(len(texts), dimension)).astype(np.float32)
    known = dict(zip(texts, vectors, strict=True))
    known |= {probe: np.eye(dimension, dtype=np.float32)[i] for i, probe in enumerate(PROBES)}
    teacher = Teacher("t", "f" * 64, lambda asked, _: np.array([known[text] for text in asked]))
    return keep_vectors(teacher, {"": texts}, folder), vectors


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def info_nce(anchors: np.ndarray, candidates: np.ndarray, left_out: set[tuple[int, int]] = frozenset()) -> float:
    """Anchor i's own candidate is the i-th."""
    values = []
    for i, anchor in enumerate(unit(anchors)):
        scores = {
            j: SCALE * float(anchor @ other) for j, other in enumerate(unit(candidates)) if (i, j) not in left_out
        }
        values.append(math.log(sum(map(math.exp, scores.values()))) - scores[i])
    return sum(values) / len(values)


def divergence(vectors: np.ndarray, targets: np.ndarray) -> float:
    """Mean over texts of KL(teacher's shares of the others, the student's)."""
    total = 0.0
    for i in range(len(vectors)):
        others = [j for j in range(len(vectors)) if j != i]
        p, q = (np.exp([SCALE * float(unit(v)[i] @ unit(v)[j]) for j in others]) for v in (targets, vectors))
        p, q = p / p.sum(), q / q.sum()
        total += float((p * np.log(p / q)).sum())
    return total / len(vectors) / SCALE


def test_false_negatives_are_left_out_of_the_contrastive_loss(make_encoder: MakeEncoder):
    model = make_encoder()
    anchors = ["same", "other", "same", "b"]
    positives = ["a", "a", "c", "d"]
    negatives = ["e", "b", "d", "same"]
    keys = [row_keys(column) for column in tokens(model, anchors, positives, negatives)]
    masked = {(int(i), int(j)) for i, j in batch_mask(keys).nonzero()}
    # 0 and 1 have one positive; 0 and 2 one anchor, so that "a" is a positive of 2 wherever it stands; "d" is the
    # positive of 3; "b" and "same" are anchors.
    assert masked == {(0, 1), (1, 0), (0, 2), (2, 0), (2, 1), (3, 6), (3, 5), (0, 7), (2, 7)}
    columns = [torch.from_numpy(model.encode(texts)) for texts in (anchors, positives, negatives)]
    found = float(contrastive_loss(columns, batch_mask(keys), SCALE))
    assert found == pytest.approx(info_nce(columns[0].numpy(), torch.cat(columns[1:]).numpy(), masked), abs=1e-5)
    plain = float(MultipleNegativesRankingLoss(None, SCALE).compute_loss_from_embeddings(columns, None))
    assert float(contrastive_loss(columns, None, SCALE)) == pytest.approx(plain, abs=1e-5) != pytest.approx(found)


@pytest.mark.parametrize(
    ("weight", "distill"), [(0.0, "vectors"), (0.3, "vectors"), (0.3, "both"), (1.0, "similarities")]
)
def test_the_loss_of_pairs_with_a_teacher_is_what_its_formula_says(
    weight: float, distill: str, make_encoder, tmp_path: Path
):
    model = make_encoder()
    texts = ANCHORS + POSITIVES + NEGATIVES
    teacher, targets = taught(tmp_path, texts, 32)
    loss = Loss(model, config(has_teacher=True, teacher_weight=weight, distill=distill), teacher)
    labels = torch.from_numpy(
        np.stack([teacher.rows(column, "") for column in (ANCHORS, POSITIVES, NEGATIVES)], axis=1)
    )
    found = loss(tokens(model, ANCHORS, POSITIVES, NEGATIVES), labels)
    vectors = model.encode(texts)
    near = float((1 - (unit(vectors) * unit(targets)).sum(axis=1)).mean())
    taught_part = {"vectors": near, "similarities": divergence(vectors, targets)}
    part = taught_part.get(distill, sum(taught_part.values()))
    expected = (1 - weight) * info_nce(vectors[:4], vectors[4:]) + weight * part
    assert float(found) == pytest.approx(expected, abs=1e-4)


def test_unlabelled_texts_go_through_a_linear_map_where_the_widths_differ(make_encoder: MakeEncoder, tmp_path: Path):
    model = make_encoder()
    teacher, targets = taught(tmp_path, ANCHORS, 5)
    loss = Loss(model, config(has_teacher=True, teacher_weight=1.0, distill="both"), teacher)
    own = {name: p for name, p in loss.named_parameters() if not name.startswith("model.") and ".model." not in name}
    assert sorted(tuple(p.shape) for p in own.values()) == [(5,), (5, 32)]
    found = loss(tokens(model, ANCHORS), torch.from_numpy(teacher.rows(ANCHORS, ""))[:, None])
    found.backward()
    assert all(p.grad is not None for p in own.values())
    vectors = model.encode(ANCHORS)
    weight, bias = (next(p for p in own.values() if p.ndim == n).detach().numpy() for n in (2, 1))
    mapped = vectors @ weight.T + bias
    near = float((1 - (unit(mapped) * unit(targets)).sum(axis=1)).mean())
    assert float(found) == pytest.approx(near + divergence(vectors, targets), abs=1e-4)


def test_duplicates_do_not_drown_the_similarities_of_the_others(make_encoder: MakeEncoder, tmp_path: Path):
    model = make_encoder()
    texts = ["one", "one", "two", "three"]
    teacher, _ = taught(tmp_path, ["one", "two", "three"], 7)
    loss = Loss(model, config(has_teacher=True, teacher_weight=1.0, distill="both"), teacher)
    once, twice = (
        loss(tokens(model, column), torch.from_numpy(teacher.rows(column, ""))[:, None])
        for column in (texts[1:], texts)
    )
    assert torch.isfinite(once) and torch.isfinite(twice)
    pair = ["one", "one"]  # nothing but duplicates: only the vectors themselves are left
    lonely = loss(tokens(model, pair), torch.from_numpy(teacher.rows(pair, ""))[:, None])
    assert 0 <= float(lonely) <= 2


def test_the_elastic_loss_is_the_mean_over_depths_and_sizes(make_encoder: MakeEncoder):
    model = make_encoder("llama", depth=3)
    columns = (ANCHORS, POSITIVES, NEGATIVES)
    found = Loss(model, config(depths=(1,), dims=(8, 16)))(tokens(model, *columns))
    expected = []
    for depth, size in itertools.product((1, 3), (8, 16, 32)):
        pruned = copy.deepcopy(model)
        cut(pruned[0].auto_model, range(depth))
        anchors, positives, negatives = (pruned.encode(texts)[:, :size] for texts in columns)
        expected.append(info_nce(anchors, np.concatenate([positives, negatives])))
    assert float(found) == pytest.approx(np.mean(expected), abs=1e-4)
    alone = Loss(model, config(dims=(8, 16)))(tokens(model, *columns))
    stock = MatryoshkaLoss(model, MultipleNegativesRankingLoss(model, scale=SCALE), [32, 16, 8])
    assert float(alone) == pytest.approx(float(stock(tokens(model, *columns), None)) / 3, abs=1e-4)


def gradients(model: SentenceTransformer, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("layers", ["first", "uniform"])
@pytest.mark.parametrize("way", ["mini-batches", "checkpointing"])
def test_saving_memory_changes_no_gradient(way: str, layers: str, make_encoder: MakeEncoder, tmp_path: Path):
    model = make_encoder("llama", depth=3)
    teacher, _ = taught(tmp_path, ANCHORS + POSITIVES, 5)
    labels = torch.from_numpy(np.stack([teacher.rows(ANCHORS, ""), teacher.rows(POSITIVES, "")], axis=1))
    options = {"has_teacher": True, "depths": (1, 2), "layers": layers, "dims": (8,)}
    torch.manual_seed(1)
    plain = Loss(model, config(**options), teacher)
    torch.manual_seed(1)
    thrifty = Loss(model, config(**options, mini_batch_tokens=30 if way == "mini-batches" else None), teacher)
    expected = plain(tokens(model, ANCHORS, POSITIVES), labels)
    before = gradients(model, expected)
    model.train()
    if way == "checkpointing":
        model[0].auto_model.gradient_checkpointing_enable()
    found = thrifty(tokens(model, ANCHORS, POSITIVES), labels)
    assert float(found) == pytest.approx(float(expected), abs=1e-5)
    after = gradients(model, found)
    assert before.keys() == after.keys()
    assert all(torch.allclose(before[name], after[name], atol=1e-4) for name in before)


def test_a_few_steps_lower_the_loss_at_every_depth(make_encoder: MakeEncoder):
    model = make_encoder("llama", depth=4)
    elastic = Loss(model, config(depths=(1, 2)))
    features = tokens(model, ANCHORS, POSITIVES, NEGATIVES)

    @torch.no_grad()
    def by_depth() -> list[float]:
        columns = [depth_vectors(model, column, (1, 2, 4)) for column in features]
        return [float(contrastive_loss([c[:, i] for c in columns], None, SCALE)) for i in range(3)]

    before = by_depth()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(5):
        optimizer.zero_grad()
        elastic(features).backward()
        optimizer.step()
    assert all(after < 0.9 * first for first, after in zip(before, by_depth(), strict=True))


def test_mistakes_are_told(make_encoder: MakeEncoder):
    model = make_encoder(depth=3)
    for option, told in (
        ({"depths": (4,)}, "depths: is 4: the model has 3 "),
        ({"depths": (0,)}, "depths: is 0"),
        ({"dims": (33,)}, "dims: is 33: the vectors have 32 numbers"),
    ):
        with pytest.raises(ConfigError, match=told):
            Loss(model, config(**option))


def same_twice(model: SentenceTransformer) -> bool:
    features: Callable[[], dict[str, Any]] = lambda: model.preprocess(ANCHORS)  # noqa: E731
    with torch.no_grad():
        return torch.equal(model(features())["sentence_embedding"], model(features())["sentence_embedding"])


@pytest.mark.parametrize(("architecture", "attention"), [("bert", 0.1), ("llama", 0.0), ("llama", 0.1)])
def test_dropout_makes_two_views_of_a_text_in_training_alone(
    architecture: str, attention: float, make_encoder: MakeEncoder
):
    model = make_encoder(architecture)
    for layer in blocks_of(model[0].auto_model) if architecture == "llama" else ():
        layer.self_attn.attention_dropout = attention
    expected = model.encode(ANCHORS)
    assert same_twice(model.train()) == (not attention)
    taught = copy.deepcopy(model)
    set_dropout(taught, config(has_teacher=True))
    assert same_twice(taught)
    set_dropout(model, config(unsupervised=True))
    assert not same_twice(model)
    assert np.array_equal(model.eval().encode(ANCHORS), expected)


def long_and_short(model: torch.nn.Module, count: int) -> list[dict[str, torch.Tensor]]:
    """Texts of very different lengths, in no order; the anchors with a prompt."""
    rows = example_pairs(count)
    texts = [[f"{row[key]}" * (1 + 7 * i % 5) for i, row in enumerate(rows)] for key in ("query", "positive")]
    texts.append(["".join(row["negative"]) for row in rows])
    return [model.preprocess(column, prompt="find: " if i == 0 else None) for i, column in enumerate(texts)]


@pytest.mark.parametrize("architecture", ["bert", "llama"])
@pytest.mark.parametrize("size", [1, 100, 100_000])
def test_loss_and_gradients_are_those_of_the_whole_batch(make_encoder: MakeEncoder, architecture: str, size: int):
    model = make_encoder(architecture).eval()  # no dropout: it would draw in another order
    other = copy.deepcopy(model)
    features = long_and_short(model, 9)
    found = []
    for own, loss in (
        (model, MultipleNegativesRankingLoss(model, scale=SCALE)),
        (other, Loss(other, config(mini_batch_tokens=size))),
    ):
        loss = loss([dict(column) for column in features], None)
        loss.backward()
        found.append(loss.item())
        assert any(p.grad is not None and p.grad.abs().max() > 0 for p in own.parameters())
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    for (name, one), two in zip(model.named_parameters(), other.parameters(), strict=True):
        if one.grad is not None:
            assert torch.allclose(one.grad, two.grad, rtol=1e-3, atol=1e-6), name


def test_a_mini_batch_holds_at_most_so_many_tokens_in_few_shapes(make_encoder: MakeEncoder):
    model = make_encoder("llama")
    for features in long_and_short(model, 40):
        pieces, places = mini_batches(features, 200)
        shapes = [piece["input_ids"].shape for piece in pieces]
        assert sum(rows for rows, _ in shapes) == 40
        assert all(rows * width <= 200 or rows == 1 for rows, width in shapes)
        assert all(rows.bit_count() == 1 for rows, _ in shapes[:-1])
        assert len(set(shapes)) <= 12
        back = torch.cat([piece["attention_mask"].sum(dim=1) for piece in pieces])[places]
        assert torch.equal(back, features["attention_mask"].sum(dim=1))


def test_no_text_is_in_a_batch_twice_in_whatever_column(make_encoder: MakeEncoder, tmp_path: Path):
    """Each row shares a text with its neighbours: its positive is the next one's negative, and anchors repeat."""
    rows = [{"anchor": f"a{i // 2}", "positive": f"p{i}", "negative_1": f"p{(i + 1) % 24}"} for i in range(24)]
    arguments = training_arguments(config(batch_size=4, learning_rate=1e-3), tmp_path)
    trainer = Trainer(
        model=make_encoder(), args=arguments, train_dataset=Dataset.from_list(rows), loss=torch.nn.Identity()
    )
    drawn = list(trainer.get_train_dataloader().batch_sampler)
    assert len(drawn) >= 5
    for batch in drawn:
        texts = [text for i in batch for text in rows[i].values()]
        assert len(texts) == len(set(texts))


@pytest.mark.parametrize("size", [None, 20])
def test_texts_that_are_the_same_once_they_are_cut_are_no_negatives(size: int | None, make_encoder: MakeEncoder):
    model = make_encoder("llama").eval()
    model.max_seq_length = 4
    anchors, positives = ["abc", "bcd", "cde", "def", "efg"], ["word one", "hedge", "word two", "spade", "word three"]
    loss = Loss(model, config(mini_batch_tokens=size))
    found = loss([model.preprocess(anchors), model.preprocess(positives)], None)
    similar = SCALE * torch.from_numpy(model.encode(anchors) @ model.encode(positives).T).double()
    others = {0: (1, 3), 1: (0, 2, 3, 4), 2: (1, 3), 3: (0, 1, 2, 4), 4: (1, 3)}
    expected = [math.log(sum(math.exp(similar[i, j] - similar[i, i]) for j in (i, *others[i]))) for i in others]
    assert float(found.detach()) == pytest.approx(sum(expected) / 5, rel=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
def test_batches_are_padded_to_few_lengths_whatever_the_longest_text_may_have(side: str, make_encoder: MakeEncoder):
    model = make_encoder("llama")
    model.max_seq_length, model.tokenizer.padding_side = 30, side
    plain = model.preprocess(ANCHORS)
    padded = rounded_lengths(model)(ANCHORS)
    assert (plain["input_ids"].shape[1], padded["input_ids"].shape[1]) == (24, 30)  # positions may end there
    assert torch.equal(padded["attention_mask"].sum(dim=1), plain["attention_mask"].sum(dim=1))
    found, expected = (model(features)["sentence_embedding"] for features in (padded, plain))
    assert torch.allclose(found, expected, atol=1e-5)
