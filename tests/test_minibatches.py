from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

from conftest import MakeEncoder, example_pairs
from secateur.healing.minibatches import Column, MiniBatchedLoss
from secateur.healing.recipe import Recipe
from secateur.healing.train import TrainingSet, make_loss, training_arguments
from secateur.healing.trainer import Trainer

SCALE = 20.0


def columns(model: torch.nn.Module, count: int) -> list[dict[str, torch.Tensor]]:
    """Texts of very different lengths, in no order; the anchors with a prompt."""
    rows = example_pairs(count)
    texts = [[f"{row[key]}" * (1 + 7 * i % 5) for i, row in enumerate(rows)] for key in ("query", "positive")]
    texts.append(["".join(row["negative"]) for row in rows])
    return [model.preprocess(column, prompt="find: " if i == 0 else None) for i, column in enumerate(texts)]


@pytest.mark.parametrize("architecture", ["bert", "llama"])
@pytest.mark.parametrize("tokens", [1, 100, 100_000])
def test_loss_and_gradients_are_those_of_the_whole_batch(make_encoder: MakeEncoder, architecture: str, tokens: int):
    model = make_encoder(architecture).eval()  # no dropout: it would draw in another order
    other = copy.deepcopy(model)
    features = columns(model, 9)
    losses = []
    for own, loss in (
        (model, MultipleNegativesRankingLoss(model, scale=SCALE)),
        (other, MiniBatchedLoss(other, tokens, SCALE)),
    ):
        loss = loss([dict(column) for column in features], None)
        loss.backward()
        losses.append(loss.item())
        assert any(p.grad is not None and p.grad.abs().max() > 0 for p in own.parameters())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for (name, one), two in zip(model.named_parameters(), other.parameters(), strict=True):
        if one.grad is not None:
            assert torch.allclose(one.grad, two.grad, rtol=1e-3, atol=1e-6), name


def test_a_mini_batch_holds_at_most_so_many_tokens_in_few_shapes(make_encoder: MakeEncoder):
    model = make_encoder("llama")
    for features in columns(model, 40):
        column = Column(features, 200)
        pieces = [column.piece(begin, end)["input_ids"].shape for begin, end in column.ranges]
        assert sum(rows for rows, _ in pieces) == 40
        assert all(rows * width <= 200 or rows == 1 for rows, width in pieces)
        assert all(rows.bit_count() == 1 for rows, _ in pieces[:-1])
        assert len(set(pieces)) <= 12
        back = torch.cat([column.piece(b, e)["attention_mask"].sum(dim=1) for b, e in column.ranges])[column.places]
        assert torch.equal(back, features["attention_mask"].sum(dim=1))


def test_no_text_is_in_a_batch_twice_in_whatever_column(make_encoder: MakeEncoder, tmp_path: Path):
    """Each row shares a text with its neighbours: its positive is the next one's negative, and anchors repeat."""
    rows = [{"anchor": f"a{i // 2}", "positive": f"p{i}", "negative_1": f"p{(i + 1) % 24}"} for i in range(24)]
    arguments = training_arguments([TrainingSet("words", Dataset.from_list(rows), {})], Recipe(batch_size=4), tmp_path)
    trainer = Trainer(
        model=make_encoder(), args=arguments, train_dataset=Dataset.from_list(rows), loss=torch.nn.Identity()
    )
    drawn = list(trainer.get_train_dataloader().batch_sampler)
    assert len(drawn) >= 5
    for batch in drawn:
        texts = [text for i in batch for text in rows[i].values()]
        assert len(texts) == len(set(texts))


@pytest.mark.parametrize("tokens", [None, 20])
def test_texts_that_are_the_same_once_they_are_cut_are_no_negatives(make_encoder: MakeEncoder, tokens: int | None):
    model = make_encoder("llama").eval()
    model.max_seq_length = 4
    anchors, positives = ["abc", "bcd", "cde", "def", "efg"], ["word one", "hedge", "word two", "spade", "word three"]
    loss = make_loss(model, Recipe(scale=SCALE, mini_batch_tokens=tokens))
    if isinstance(loss, MiniBatchedLoss):
        loss.mini_batch_size = 2  # anchors that are compared at once
    found = loss([model.preprocess(anchors), model.preprocess(positives)], None)
    similar = SCALE * torch.from_numpy(model.encode(anchors) @ model.encode(positives).T).double()
    others = {0: (1, 3), 1: (0, 2, 3, 4), 2: (1, 3), 3: (0, 1, 2, 4), 4: (1, 3)}
    expected = [math.log(sum(math.exp(similar[i, j] - similar[i, i]) for j in (i, *others[i]))) for i in others]
    assert float(found.detach()) == pytest.approx(sum(expected) / 5, rel=1e-4)
