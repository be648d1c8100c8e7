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
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss, MultipleNegativesRankingLoss

from conftest import MakeEncoder
from secateur.errors import ConfigError
from secateur.healing.batch_mask import batch_mask, row_keys
from secateur.healing.objectives import DepthVectors, Objective, contrastive_loss, dropout
from secateur.healing.teacher import PROBES, Teacher, TeacherVectors, keep_vectors
from secateur.models.cutting import cut

ANCHORS = ["what is a hedge?", "who cuts it", "when", "where do they stand now?"]
POSITIVES = ["a row of shrubs", "the gardener", "in spring, before the birds", "here"]
NEGATIVES = ["a wall", "the cat", "never", "a rather longer text than the others"]
SCALE = 20.0


def tokens(model: SentenceTransformer, *columns: Sequence[str], prompt: str | None = None) -> list[dict[str, Any]]:
    prompts = [prompt, *[None] * (len(columns) - 1)]
    return [model.preprocess(list(texts), prompt=before) for texts, before in zip(columns, prompts, strict=True)]


def taught(folder: Path, texts: Sequence[str], dimension: int) -> tuple[TeacherVectors, np.ndarray]:
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
    losses = []
    for i, anchor in enumerate(unit(anchors)):
        scores = {
            j: SCALE * float(anchor @ other) for j, other in enumerate(unit(candidates)) if (i, j) not in left_out
        }
        losses.append(math.log(sum(map(math.exp, scores.values()))) - scores[i])
    return sum(losses) / len(losses)


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
    never = {(int(i), int(j)) for i, j in batch_mask(keys).nonzero()}
    # 0 and 1 have one positive; 0 and 2 one anchor, so that "a" is a positive of 2 wherever it stands; "d" is the
    # positive of 3; "b" and "same" are anchors.
    assert never == {(0, 1), (1, 0), (0, 2), (2, 0), (2, 1), (3, 6), (3, 5), (0, 7), (2, 7)}
    columns = [torch.from_numpy(model.encode(texts)) for texts in (anchors, positives, negatives)]
    found = float(contrastive_loss(columns, batch_mask(keys), SCALE))
    assert found == pytest.approx(info_nce(columns[0].numpy(), torch.cat(columns[1:]).numpy(), never), abs=1e-5)
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
    loss = Objective(model, scale=SCALE, teacher=teacher, teacher_weight=weight, distill=distill)
    labels = torch.from_numpy(np.stack([teacher.rows(column) for column in (ANCHORS, POSITIVES, NEGATIVES)], axis=1))
    found = loss(tokens(model, ANCHORS, POSITIVES, NEGATIVES), labels)
    vectors = model.encode(texts)
    near = float((1 - (unit(vectors) * unit(targets)).sum(axis=1)).mean())
    taught_part = {"vectors": near, "similarities": divergence(vectors, targets)}
    part = taught_part.get(distill, sum(taught_part.values()))
    expected = (1 - weight) * info_nce(vectors[:4], vectors[4:]) + weight * part
    assert float(found) == pytest.approx(expected, abs=1e-4)


def test_texts_alone_go_through_a_linear_map_where_the_widths_differ(make_encoder: MakeEncoder, tmp_path: Path):
    model = make_encoder()
    teacher, targets = taught(tmp_path, ANCHORS, 5)
    loss = Objective(model, scale=SCALE, teacher=teacher, teacher_weight=1.0, distill="both")
    own = {name: p for name, p in loss.named_parameters() if not name.startswith("model.") and ".model." not in name}
    assert sorted(tuple(p.shape) for p in own.values()) == [(5,), (5, 32)]
    found = loss(tokens(model, ANCHORS), torch.from_numpy(teacher.rows(ANCHORS))[:, None])
    found.backward()
    assert all(p.grad is not None for p in own.values())
    vectors = model.encode(ANCHORS)
    weight, bias = (next(p for p in own.values() if p.ndim == n).detach().numpy() for n in (2, 1))
    mapped = vectors @ weight.T + bias
    near = float((1 - (unit(mapped) * unit(targets)).sum(axis=1)).mean())
    assert float(found) == pytest.approx(near + divergence(vectors, targets), abs=1e-4)


def test_doubles_do_not_drown_the_similarities_of_the_others(make_encoder: MakeEncoder, tmp_path: Path):
    model = make_encoder()
    texts = ["one", "one", "two", "three"]
    teacher, _ = taught(tmp_path, ["one", "two", "three"], 7)
    loss = Objective(model, scale=SCALE, teacher=teacher, teacher_weight=1.0, distill="both")
    once, twice = (
        loss(tokens(model, column), torch.from_numpy(teacher.rows(column))[:, None]) for column in (texts[1:], texts)
    )
    assert torch.isfinite(once) and torch.isfinite(twice)
    pair = ["one", "one"]  # nothing but doubles: only the vectors themselves are left
    lonely = loss(tokens(model, pair), torch.from_numpy(teacher.rows(pair))[:, None])
    assert 0 <= float(lonely) <= 2


@pytest.mark.parametrize("architecture", ["bert", "llama"])
def test_vectors_at_a_depth_are_those_of_the_model_cut_there(architecture: str, make_encoder: MakeEncoder):
    model = make_encoder(architecture, depth=4)
    reader = DepthVectors(model, [1, 3])
    assert reader.depths == (1, 3, 4)
    features = model.preprocess(ANCHORS, prompt="find: ")
    with torch.no_grad():
        found = reader(model, features)
    for i, depth in enumerate(reader.depths):
        pruned = copy.deepcopy(model)
        cut(pruned[0].auto_model, range(depth))
        expected = pruned.encode(ANCHORS, prompt="find: ", convert_to_tensor=True)
        assert torch.allclose(found[:, i], expected, atol=1e-5), depth
    assert not torch.allclose(found[:, 0], found[:, 1], atol=1e-2)


def test_the_elastic_loss_is_the_mean_over_depths_and_sizes(make_encoder: MakeEncoder):
    model = make_encoder("llama", depth=3)
    columns = (ANCHORS, POSITIVES, NEGATIVES)
    found = Objective(model, scale=SCALE, depths=[1], dims=[8, 16])(tokens(model, *columns))
    losses = []
    for depth, size in itertools.product((1, 3), (8, 16, 32)):
        pruned = copy.deepcopy(model)
        cut(pruned[0].auto_model, range(depth))
        anchors, positives, negatives = (pruned.encode(texts)[:, :size] for texts in columns)
        losses.append(info_nce(anchors, np.concatenate([positives, negatives])))
    assert float(found) == pytest.approx(np.mean(losses), abs=1e-4)
    alone = Objective(model, scale=SCALE, dims=[8, 16])(tokens(model, *columns))
    stock = MatryoshkaLoss(model, MultipleNegativesRankingLoss(model, scale=SCALE), [32, 16, 8])
    assert float(alone) == pytest.approx(float(stock(tokens(model, *columns), None)) / 3, abs=1e-4)


def gradients(model: SentenceTransformer, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("way", ["mini-batches", "checkpointing"])
def test_saving_memory_changes_no_gradient(way: str, make_encoder: MakeEncoder, tmp_path: Path):
    model = make_encoder("llama", depth=3)
    teacher, _ = taught(tmp_path, ANCHORS + POSITIVES, 5)
    labels = torch.from_numpy(np.stack([teacher.rows(ANCHORS), teacher.rows(POSITIVES)], axis=1))
    options = {"scale": SCALE, "teacher": teacher, "depths": [1], "dims": [8]}
    torch.manual_seed(1)
    plain = Objective(model, **options)
    torch.manual_seed(1)
    thrifty = Objective(model, **options, mini_batch_tokens=30 if way == "mini-batches" else None)
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
    elastic = Objective(model, scale=SCALE, depths=[1, 2])
    features = tokens(model, ANCHORS, POSITIVES, NEGATIVES)
    reader = DepthVectors(model, [1, 2])

    @torch.no_grad()
    def by_depth() -> list[float]:
        columns = [reader(model, column) for column in features]
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
        ({"depths": [4]}, "depths: is 4: the model has 3 blocks"),
        ({"depths": [0]}, "depths: is 0"),
        ({"dims": [33]}, "dims: is 33: the vectors have 32 numbers"),
        ({"teacher_weight": 1.5}, "teacher_weight: is 1.5"),
    ):
        with pytest.raises(ConfigError, match=told):
            Objective(model, scale=SCALE, **option)


def same_twice(model: SentenceTransformer) -> bool:
    features: Callable[[], dict[str, Any]] = lambda: model.preprocess(ANCHORS)  # noqa: E731
    with torch.no_grad():
        return torch.equal(model(features())["sentence_embedding"], model(features())["sentence_embedding"])


@pytest.mark.parametrize("architecture", ["bert", "llama"])
def test_dropout_makes_two_views_of_a_text_in_training_alone(architecture: str, make_encoder: MakeEncoder):
    model = make_encoder(architecture)
    expected = model.encode(ANCHORS)
    with dropout(model, 0.1):
        assert np.array_equal(model.eval().encode(ANCHORS), expected)
        assert not same_twice(model.train())
    with dropout(model, 0.0):
        assert same_twice(model.train())
    assert same_twice(model) == (architecture == "llama")
    assert np.array_equal(model.eval().encode(ANCHORS), expected)
