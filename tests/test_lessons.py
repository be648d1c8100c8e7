"""Healing by a teacher, at several depths, and on texts alone, through the function that users call."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer

import secateur
from conftest import example_pairs, tiny_transformer, write_pairs
from secateur.artifacts import Training, load
from secateur.config import HealOptions, make
from secateur.data.pairs import Pair, Pairs, read_pairs
from secateur.data.texts import read_texts
from secateur.data.vectors import fingerprint_model
from secateur.errors import ConfigError, DataError
from secateur.healing.lessons import LABEL, find_aim, sets_of, teach
from secateur.healing.objectives import Objective
from secateur.healing.recipe import make_recipe
from secateur.healing.teacher import PROBE, open_teacher
from secateur.healing.train import TrainingSet, rows_used, train, training_sets
from secateur.progress import silent
from secateur.provenance import Fingerprint

SOURCE = Fingerprint("data", "", 1)
SETTINGS = {"steps": 30, "batch_size": 8, "precision": "float32"}


@pytest.fixture(scope="module")
def texts_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("texts") / "words.txt"
    rows = [str(row[key]) for row in example_pairs(40) for key in ("query", "positive")]
    file.write_text("\n".join([*rows, *rows[:5]]) + "\n", encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher of another architecture."""
    return tiny_transformer(tmp_path_factory.mktemp("wide") / "bert", "bert", depth=2, seed=5)


def every(sets: Sequence[TrainingSet]) -> list[range]:
    return [range(len(item.rows)) for item in sets]


def closeness(one: Path, other: Path) -> float:
    """Mean cosine of two models' vectors of texts that neither was trained on."""
    texts = [str(row["query"]) for row in example_pairs(20, seed=9)]
    vectors = [secateur.open_model(folder, device="cpu").encode(texts) for folder in (one, other)]
    return float((vectors[0] * vectors[1]).sum(axis=1).mean())


def test_a_cut_model_is_taught_by_the_whole_one_on_texts_alone(llama_folder: Path, texts_file: Path, tmp_path: Path):
    cut, cache = secateur.prune(llama_folder, to="2", out=tmp_path / "cut"), tmp_path / "vectors"
    out = secateur.heal(cut, texts_file, teacher=llama_folder, cache=cache, **SETTINGS, out=tmp_path / "taught")
    table = load(out, Training)
    told = {key: table.settings[key] for key in ("recipe", "objective", "teacher", "teacher_weight")}
    assert told == {
        "recipe": "distill",
        "objective": "distillation",
        "teacher": str(llama_folder),
        "teacher_weight": 1.0,
    }
    whole = secateur.open_model(llama_folder, device="cpu")
    assert table.settings["teacher_fingerprint"] == fingerprint_model(whole)
    assert np.mean([row.loss for row in table.losses[-5:]]) < 0.7 * np.mean([row.loss for row in table.losses[:5]])
    assert 1 - closeness(out, llama_folder) < 0.7 * (1 - closeness(cut, llama_folder))
    assert table.prompts == {}
    kept = sorted(cache.rglob("*.npy"))
    assert sum(len(np.load(file)) for file in kept if "keys" not in file.name) == 80 + 1  # and the probe
    sets = sets_of([read_texts(texts_file)], 8, find_aim([], taught=True))
    again = teach(sets, every(sets), open_teacher(llama_folder), cache, silent)
    assert sorted(cache.rglob("*.npy")) == kept
    assert again[0][0].rows.column_names == ["text", LABEL]


def test_pairs_with_a_teacher_at_several_depths_and_sizes(
    llama_folder: Path, pairs_file: Path, wide: Path, tmp_path: Path
):
    options = SETTINGS | {"steps": 4, "depths": [1], "dims": [8], "learning_rate": 1e-3}
    out = secateur.heal(llama_folder, pairs_file, teacher=wide, **options, out=tmp_path / "elastic")
    settings = load(out, Training).settings
    assert settings["objective"] == "contrast and distillation"
    assert (settings["recipe"], settings["teacher_weight"]) == ("l3prune", 0.5)
    assert (settings["depths"], settings["dims"]) == ((1,), (8,))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elastic"]


def test_texts_alone_without_a_teacher_are_their_own_positives(llama_folder: Path, texts_file: Path, tmp_path: Path):
    out = secateur.heal(llama_folder, texts_file, **(SETTINGS | {"learning_rate": 1e-3}), out=tmp_path / "alone")
    table = load(out, Training)
    assert table.settings["objective"] == "contrast, each text alone its own positive under dropout (SimCSE)"
    assert table.settings["data"] == {"words.txt": 80}
    losses = [row.loss for row in table.losses]
    assert 0 < np.mean(losses[-5:]) < np.mean(losses[:5])


def test_a_teacher_reads_what_the_student_reads(llama_folder: Path, pairs_file: Path, texts_file: Path, tmp_path: Path):
    sources = [read_pairs(pairs_file), read_texts(texts_file, "say;\n")]
    aim = find_aim(sources, taught=True)
    sets = sets_of(sources, 8, aim)
    sets, vectors = teach(sets, every(sets), open_teacher(llama_folder, device="cpu"), tmp_path, silent)
    model = secateur.open_model(llama_folder, device="cpu")
    for item, prompts in zip(sets, (["find the word;\n", "", ""], ["say;\n"]), strict=True):
        row = item.rows[3]
        found = vectors.read(np.array(row.pop(LABEL)))
        expected = [
            model.encode(text, prompt=prompt or None) for text, prompt in zip(row.values(), prompts, strict=True)
        ]
        assert np.allclose(found, expected, atol=1e-5)


@pytest.mark.slow
def test_a_teacher_is_asked_once_for_the_texts_that_are_trained_on_and_for_no_others(
    llama_folder: Path, texts_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Two depths, two seeds and a run again, each of 3 steps of 8 of the 80 texts; at the length of the training."""
    asked: list[str] = []
    lengths: set[int] = set()
    stock = SentenceTransformer.encode

    def counted(model: SentenceTransformer, texts: list[str], **options: object) -> np.ndarray:
        if "_encode" in sys._getframe(1).f_code.co_name:  # the teacher's
            asked.extend(texts)
            lengths.add(model.max_seq_length)
        return stock(model, texts, **options)

    monkeypatch.setattr(SentenceTransformer, "encode", counted)
    read: set[str] = set()
    forward = Objective.forward

    def watched(loss: Objective, features: list[dict], labels: torch.Tensor) -> torch.Tensor:
        features = list(features)
        read.update(loss.model.tokenizer.batch_decode(features[0]["input_ids"], skip_special_tokens=True))
        return forward(loss, features, labels)

    monkeypatch.setattr(Objective, "forward", watched)
    options = SETTINGS | {"steps": 3, "max_length": 20, "teacher": llama_folder, "cache": tmp_path / "vectors"}
    cut = secateur.prune(llama_folder, to=2, out=tmp_path / "cut")
    for run, (student, seed) in enumerate([(cut, 1), (cut, 2), (llama_folder, 1), (llama_folder, 1)]):
        secateur.heal(student, texts_file, **options, seed=seed, out=tmp_path / f"run-{run}")
    texts = [text for text in asked if text != PROBE]
    assert len(texts) == len(set(texts)) <= 2 * 3 * 8
    assert {text[:20].replace(" ", "") for text in texts} == {text.replace(" ", "")[:20] for text in read}
    assert lengths == {20}


@pytest.mark.parametrize("steps", [1, 5, 30])
def test_the_rows_that_a_training_reads_are_known_before_it(llama_folder: Path, tmp_path: Path, steps: int):
    rows = {n: tuple(Pair(f"{n} {i}", f"{i} of {n}") for i in range(n)) for n in (40, 24, 9)}
    pairs = [Pairs(f"{n}", own, "", "", SOURCE) for n, own in rows.items()]
    sets = training_sets(pairs, 8)
    sets = [replace(item, rows=item.rows.add_column("label", list(range(len(item.rows))))) for item in sets]
    model = secateur.open_model(llama_folder, device="cpu")
    recipe = make_recipe("l3prune", steps=steps, batch_size=8, precision="float32", seed=3)
    expected = rows_used(model, sets, recipe, tmp_path)
    read: list[set[int]] = [set() for _ in sets]

    class Watching(Objective):
        def forward(self, features: Sequence[dict], labels: torch.Tensor) -> torch.Tensor:
            features = list(features)
            first = model.tokenizer.decode(features[0]["input_ids"][0], skip_special_tokens=True)
            of = next(i for i, n in enumerate((40, 24, 9)) if first.replace(" ", "").startswith(str(n)))
            read[of].update(labels.tolist())
            return super().forward(features, labels)

    train(model, sets, recipe, tmp_path, silent, lambda model, recipe: Watching(model, scale=recipe.scale))
    if steps < 9:
        assert [set(rows) for rows in expected] == read
        assert sum(map(len, expected)) == 8 * steps
    else:
        assert [set(rows) for rows in expected] == [set(range(len(item.rows))) for item in sets]


def test_mistakes_are_told_before_anything_is_written(
    llama_folder: Path, pairs_file: Path, texts_file: Path, tmp_path: Path
):
    few = tmp_path / "few.txt"
    few.write_text("one\ntwo\n", encoding="utf-8")
    namesake = tmp_path / "words.txt"
    namesake.write_text(texts_file.read_text(), encoding="utf-8")
    taught = {"teacher": llama_folder}
    for data, options, kind, told in (
        (pairs_file, {"teacher_weight": 0.5}, ConfigError, "teacher_weight: there is no teacher"),
        (pairs_file, {"teacher_model": "m"}, ConfigError, "teacher_model: there is no teacher"),
        (pairs_file, taught | {"teacher_model": "m"}, ConfigError, "teacher_model: names a server's model"),
        (pairs_file, {"distill": "both"}, ConfigError, "distill: there is no teacher"),
        (pairs_file, taught | {"distill": "x"}, ConfigError, "distill: is 'x'"),
        (pairs_file, taught | {"teacher_weight": 2.0}, ConfigError, "teacher_weight: is 2.0"),
        (pairs_file, {"depths": [9]}, ConfigError, "depths: is 9: the model has 3 blocks"),
        (pairs_file, {"dims": [99]}, ConfigError, "dims: is 99: the vectors have 32 numbers"),
        (pairs_file, {"eval_data": texts_file}, DataError, "holds texts alone"),
        (few, taught, DataError, "2 texts do not fill a batch of 8"),
        ([texts_file, namesake], taught, DataError, "two data files have this name"),
    ):
        with pytest.raises(kind, match=told):
            secateur.heal(llama_folder, data, **(SETTINGS | options), out=tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["few.txt", "words.txt"]


def test_numbers_may_stand_with_commas():
    values = {"model": "m", "data": ["d"], "out": "o", "depths": ["6,12", "24"], "dims": [64]}
    options = make(HealOptions, values)
    assert (options.depths, options.dims) == ([6, 12, 24], [64])
    with pytest.raises(ConfigError, match="depths"):
        make(HealOptions, values | {"depths": "6,many"})


def test_texts_alone_are_pairs_of_themselves_only_without_a_teacher(pairs_file: Path, texts_file: Path, tmp_path: Path):
    sources: list[Pairs] = [read_pairs(write_pairs(tmp_path / "p.jsonl", example_pairs(9)))]
    texts = read_texts(texts_file)
    alone, taught = (find_aim([*sources, texts], taught=told) for told in (False, True))
    assert [item.rows.column_names for item in sets_of([texts], 8, alone)] == [["anchor", "positive"]]
    assert [item.rows.column_names for item in sets_of([texts], 8, taught)] == [["text"]]
    assert taught.teacher_weight == 0.5
    assert find_aim([texts], taught=True).teacher_weight == 1.0
