"""Healing by a teacher, at several depths, and on texts alone, through the function that users call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer

import secateur
from conftest import example_pairs, tiny_transformer
from quick_checks import quick_checks as quick_checks
from quick_checks import quick_figures
from secateur.data.sources import Pair, Pairs, read_pairs, read_texts
from secateur.data.vectors import PROBES, VectorCache, fingerprint_model
from secateur.errors import ConfigError, DataError
from secateur.healing.losses import Loss
from secateur.healing.recipes import TrainingConfig, training_config
from secateur.healing.teacher import LABEL, Teacher, open_teacher, teach
from secateur.healing.trainer import train
from secateur.healing.training_data import training_sets, used_rows
from secateur.options import HealOptions, make
from secateur.provenance import Fingerprint
from secateur.results import Training, load

SOURCE = Fingerprint("data", "", 1)
SETTINGS = {"steps": 30, "batch_size": 8, "precision": "float32"}
TAUGHT = TrainingConfig(**SETTINGS, has_teacher=True, learning_rate=1e-3)


@pytest.fixture(autouse=True)
def no_check_in_another_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each written model, which takes seconds; test_heal.py has it."""
    monkeypatch.setattr("secateur.models.save.difference", lambda *_: 0.0)


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


def teacher_of(name: object, max_length: int | None = None, **given: object) -> Teacher:
    options = make(HealOptions, {"model": "m", "data": ["d"], "out": "o", "teacher": str(name)} | given)
    return open_teacher(options, max_length)


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
    assert sum(len(np.load(file)) for file in kept if "keys" not in file.name) == 80 + len(PROBES)
    sets, _ = training_sets([read_texts(texts_file)], TAUGHT)
    again = teach(sets, TAUGHT, teacher_of(llama_folder, 128), cache)
    assert sorted(cache.rglob("*.npy")) == kept
    assert again[0][0].rows.column_names == ["text", LABEL]


def test_a_model_teaches_itself_however_its_folder_is_written(llama_folder: Path, texts_file: Path, tmp_path: Path):
    options = SETTINGS | {"steps": 1, "depths": [2]}
    out = secateur.heal(llama_folder, texts_file, teacher=f"{llama_folder}/", **options, out=tmp_path / "out")
    assert load(out, Training).settings["layers"] == "uniform"


def test_pairs_with_a_teacher_at_several_depths_and_sizes(
    llama_folder: Path, pairs_file: Path, wide: Path, tmp_path: Path
):
    options = SETTINGS | {"steps": 4, "depths": [1], "dims": [8], "learning_rate": 1e-3}
    out = secateur.heal(llama_folder, pairs_file, teacher=wide, **options, out=tmp_path / "elastic")
    settings = load(out, Training).settings
    assert settings["objective"] == "contrastive loss and distillation"
    assert (settings["recipe"], settings["teacher_weight"]) == ("finetune", 0.5)
    assert (settings["depths"], settings["dims"]) == ([1], [8])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elastic"]


def test_texts_alone_without_a_teacher_are_their_own_positives(llama_folder: Path, texts_file: Path, tmp_path: Path):
    out = secateur.heal(
        llama_folder, texts_file, **(SETTINGS | {"recipe": "l3prune", "learning_rate": 1e-3}), out=tmp_path / "alone"
    )
    table = load(out, Training)
    assert table.settings["objective"] == "contrastive loss, each text its own positive under dropout (SimCSE)"
    assert table.settings["data"] == {"words.txt": 80}
    losses = [row.loss for row in table.losses]
    assert 0 < np.mean(losses[-5:]) < np.mean(losses[:5])


def test_a_teacher_reads_what_the_student_reads(llama_folder: Path, pairs_file: Path, texts_file: Path, tmp_path: Path):
    sources = [read_pairs(pairs_file), replace(read_texts(texts_file), prompt="say;\n", passage_prompt="say;\n")]
    sets, _ = training_sets(sources, TAUGHT)
    sets, vectors = teach(sets, TAUGHT, teacher_of(llama_folder, device="cpu"), tmp_path)
    model = secateur.open_model(llama_folder, device="cpu")
    for item, prompts in zip(sets, (["find the word;\n", "", ""], ["say;\n"]), strict=True):
        row = item.rows[3]
        found = vectors.read(np.array(row.pop(LABEL)))
        expected = [
            model.encode(text, prompt=prompt or None) for text, prompt in zip(row.values(), prompts, strict=True)
        ]
        assert np.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("steps", [1, 5, 30])
def test_the_rows_that_a_training_reads_are_known_before_it(llama_folder: Path, tmp_path: Path, steps: int):
    rows = {n: tuple(Pair(f"{n} {i}", f"{i} of {n}") for i in range(n)) for n in (40, 24, 9)}
    pairs = [Pairs(f"{n}", own, "", "", SOURCE) for n, own in rows.items()]
    config = TrainingConfig(steps=steps, batch_size=8, precision="float32", seed=3, learning_rate=2e-4)
    sets, _ = training_sets(pairs, config)
    sets = [replace(item, rows=item.rows.add_column("label", list(range(len(item.rows))))) for item in sets]
    model = secateur.open_model(llama_folder, device="cpu")
    expected = used_rows(sets, config)
    read: list[set[int]] = [set() for _ in sets]

    class Watching(Loss):
        def forward(self, features: Sequence[dict], labels: torch.Tensor) -> torch.Tensor:
            features = list(features)
            first = model.tokenizer.decode(features[0]["input_ids"][0], skip_special_tokens=True)
            of = next(i for i, n in enumerate((40, 24, 9)) if first.replace(" ", "").startswith(str(n)))
            read[of].update(labels.tolist())
            return super().forward(features, labels)

    train(model, sets, config, tmp_path, make_loss=Watching)
    assert [set(rows) for rows in expected] == read
    assert steps > 5 or sum(map(len, expected)) == 8 * steps


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
        (pairs_file, {"distill": "both"}, ConfigError, "distill: there is no teacher"),
        (pairs_file, taught | {"distill": "x"}, ConfigError, "distill: 'x' is not valid"),
        (pairs_file, taught | {"teacher_weight": 2.0}, ConfigError, "teacher_weight: 2.0 is not valid"),
        (texts_file, taught | {"teacher_weight": 0.5}, ConfigError, "teacher_weight: .* from the teacher alone"),
        (pairs_file, {"depths": [9]}, ConfigError, "depths: is 9: the model has 3 "),
        (pairs_file, {"dims": [99]}, ConfigError, "dims: is 99: the vectors have 32 numbers"),
        (pairs_file, {"eval_data": texts_file}, DataError, "holds texts alone"),
        (few, taught, DataError, r"nothing fills a batch of 8 \(few.txt: 2 texts\)"),
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


def test_texts_are_pairs_of_themselves_only_without_a_teacher(pairs_file: Path, texts_file: Path):
    texts = read_texts(texts_file)
    for taught, columns in ((False, ["anchor", "positive"]), (True, ["text"])):
        sets, _ = training_sets([texts], replace(TAUGHT, has_teacher=taught))
        assert [item.rows.column_names for item in sets] == [columns]
    options = make(HealOptions, {"model": "m", "data": ["d"], "out": "o", "teacher": "t"})
    both, alone = (training_config(options, sources) for sources in ([read_pairs(pairs_file), texts], [texts]))
    assert (both.recipe, both.teacher_weight, alone.recipe, alone.teacher_weight) == ("finetune", 0.5, "distill", 1.0)


class Recording:
    """Stands before sentence-transformers' ``encode``: what a model was asked for, at what length."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[tuple[str, int]] = []
        encode = SentenceTransformer.encode

        def recorded(model: SentenceTransformer, texts: list[str], *args: object, **options: object) -> np.ndarray:
            self.asked += [(text, model.max_seq_length) for text in texts]
            return encode(model, texts, *args, **options)

        monkeypatch.setattr(SentenceTransformer, "encode", recorded)


@pytest.mark.slow
def test_the_texts_of_batches_alone_are_encoded_at_the_length_of_the_training(
    llama_folder: Path, pairs_file: Path, texts_file: Path, wide: Path, tmp_path: Path, monkeypatch
):
    """What the training reads is what the teacher was asked for: over two sets, some epochs, and from a checkpoint."""
    read: list[int] = []
    forward = Loss.forward

    def recorded(loss: Loss, features: Sequence[dict], labels: torch.Tensor) -> torch.Tensor:
        read.extend(labels.flatten().tolist())
        return forward(loss, features, labels)

    monkeypatch.setattr(Loss, "forward", recorded)
    for steps, some in ((3, True), (30, False)):
        read.clear()
        folder, options = tmp_path / str(steps), SETTINGS | {"steps": steps, "max_length": 9, "instruction": ""}
        secateur.heal(
            llama_folder, [pairs_file, texts_file], teacher=wide, cache=folder / "v", **options, out=folder / "healed"
        )
        kept = sum(len(np.load(file)) for file in (folder / "v").rglob("*.keys.npy")) - len(PROBES)
        assert len(set(read)) == kept
        assert (kept < 60) == some
    cache = VectorCache(tmp_path / "30" / "v", fingerprint_model(secateur.open_model(wide, device="cpu")))
    text = read_texts(texts_file).rows[0]
    model = secateur.open_model(wide, device="cpu")
    model.max_seq_length = 9
    found = cache.read(cache.rows([text], "9 tokens: "))
    assert np.allclose(found, model.encode([text]), atol=1e-5)
    assert not np.allclose(found, secateur.open_model(wide, device="cpu").encode([text]), atol=1e-2)


@pytest.mark.slow
def test_a_study_asks_the_teacher_once_for_each_text(texts_file: Path, tmp_path: Path, monkeypatch, quick_checks: None):
    model, recording = tiny_transformer(tmp_path / "tiny", "bert", depth=4), Recording(monkeypatch)
    options = {"depths": ["1", "2", "3"], "recipes": {"distilled": {}}, "teacher": "self"}
    options |= {"seeds": [1, 2], "steps": 3, "batch_size": 8, "precision": "float32"}
    options |= {"max_length": 12, "max_examples": 8}
    with quick_figures():
        secateur.study([model], data=[texts_file], **options, out=tmp_path / "run")
    healed = [folder.name for folder in (tmp_path / "run" / "models").iterdir() if "distilled" in folder.name]
    assert len(healed) == 6  # three depths, two seeds
    rows = set(read_texts(texts_file).rows)
    asked = [text for text, length in recording.asked if length == 12 and text in rows]
    assert len(asked) == len(set(asked))
    assert 3 * 8 < len(asked) <= 2 * 3 * 8 < len(rows)


@pytest.mark.slow
def test_near_duplicates_are_taught_as_well(llama_folder: Path, tmp_path: Path):
    """300 texts, many of them the same but for a blank or a letter: no NaN, and the teacher's gaps stay."""
    words = [str(row["query"]) for row in example_pairs(60)]
    rows = [text for word in words for text in (word, word, f"{word} ", word.upper(), f"{word}.")]
    file = tmp_path / "near.txt"
    file.write_text("\n".join(rows), encoding="utf-8")
    cut = secateur.prune(llama_folder, to="2", out=tmp_path / "cut")
    options = SETTINGS | {"steps": 400, "batch_size": 16, "distill": "both"}
    healed = secateur.heal(cut, file, teacher=llama_folder, **options, out=tmp_path / "healed")
    assert np.isfinite([row.loss for row in load(healed, Training).losses]).all()

    def gap(folder: Path) -> float:
        model = secateur.open_model(folder, device="cpu")
        one, near = (model.encode(texts, normalize_embeddings=True) for texts in (words, [f"{w}." for w in words]))
        cosines = one @ near.T
        return float(np.diag(cosines).mean() - cosines[~np.eye(len(words), dtype=bool)].mean())

    assert gap(healed) >= 0.9 * gap(llama_folder)
