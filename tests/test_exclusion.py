"""What ``heal --exclude`` leaves out of the data, told by the texts that the training is given."""

from __future__ import annotations

from pathlib import Path

import pytest

import secateur
from conftest import example_pairs, write_pairs
from secateur.errors import ConfigError, DataError
from secateur.evaluation.task_folder import read_task_folder
from secateur.healing import heal as healing
from secateur.results import Training, load
from task_folders import write_task

SETTINGS = {"steps": 2, "batch_size": 8, "precision": "float32", "train": "blocks"}


@pytest.fixture(autouse=True)
def no_check_in_another_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("secateur.models.save.difference", lambda *_: 0.0)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """All texts of the sets that reach the trainer."""
    texts: list[str] = []
    train = healing.train

    def spy(model, sets, *rest, **more):
        for item in sets:
            columns = [column for column in item.rows.column_names if column != "label"]
            texts.extend(text for column in columns for text in item.rows[column])
        return train(model, sets, *rest, **more)

    monkeypatch.setattr(healing, "train", spy)
    return texts


def judge(folder: Path, rows: list[dict[str, object]]) -> Path:
    """A retrieval task with the anchor of the first row, the positive of the second, a negative and a titled text."""
    corpus = [
        {"_id": "a", "title": "", "text": rows[1]["positive"]},
        {"_id": "b", "title": "", "text": rows[2]["negative"][0]},
        {"_id": "c", "title": "what is", "text": str(rows[3]["query"]).removeprefix("what is ")},
    ]
    queries = [{"_id": "q", "text": rows[0]["query"]}]
    return write_task(folder, "retrieval", {"corpus": corpus, "queries": queries, "qrels": [("q", "a", 1)]})


def test_no_text_of_an_excluded_task_is_trained_on(llama_folder: Path, tmp_path: Path, seen: list[str]):
    rows = example_pairs(24)
    for row in rows:
        row["negative"] = [*row["negative"], "a b c."]
    data, task = write_pairs(tmp_path / "words.jsonl", rows), judge(tmp_path / "judge", rows)
    out = secateur.heal(llama_folder, data, **SETTINGS, exclude=[task], out=tmp_path / "out")
    assert not set(seen) & {rows[0]["query"], rows[1]["positive"], rows[2]["negative"][0], rows[3]["query"]}
    assert {rows[2]["query"], rows[4]["query"], "a b c."} <= set(seen)
    table = load(out, Training)
    assert table.settings["exclude"] == [{"name": "judge", "sha256": read_task_folder(task).source.sha256}]
    assert table.settings["data"] == {"words": 21}
    told = "words.jsonl: not trained on, as their texts judge the model: 3 of 24 rows, and negatives of others"
    assert table.settings["notes"][0] == told
    assert [item.rows for item in table.provenance.data] == [21]


def test_texts_are_left_out_too(llama_folder: Path, tmp_path: Path, seen: list[str]):
    rows = example_pairs(24)
    data = tmp_path / "texts.txt"
    data.write_text("".join(f"{row['query']}\n" for row in rows))
    options = {**SETTINGS, "recipe": "distill", "teacher": str(llama_folder)}
    secateur.heal(llama_folder, data, **options, exclude=[judge(tmp_path / "judge", rows)], out=tmp_path / "out")
    assert set(seen) & {row["query"] for row in rows} == {row["query"] for row in rows[1:3] + rows[4:]}


def test_a_training_goes_on_with_the_same_exclusions_alone(llama_folder: Path, tmp_path: Path):
    rows = example_pairs(24)
    data, task = write_pairs(tmp_path / "words.jsonl", rows), judge(tmp_path / "judge", rows)

    def kill(what: str, done: int, total: int) -> None:
        if done == 2 * SETTINGS["batch_size"]:  # of which the first step has its checkpoint
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        secateur.heal(llama_folder, data, **SETTINGS, exclude=[task], out=tmp_path / "out", progress=kill)
    with pytest.raises(ConfigError, match=r"unfinished training .*other rows; .*other exclude"):
        secateur.heal(llama_folder, data, **SETTINGS, out=tmp_path / "out")
    secateur.heal(llama_folder, data, **SETTINGS, exclude=[task], out=tmp_path / "out")


def test_mistakes_are_said_in_a_line(llama_folder: Path, tmp_path: Path):
    rows = example_pairs(24)
    data = write_pairs(tmp_path / "words.jsonl", rows[:1])
    with pytest.raises(DataError, match="every row holds a text of an excluded task"):
        task = judge(tmp_path / "judge", rows)
        secateur.heal(llama_folder, data, **SETTINGS, exclude=[task], out=tmp_path / "out")
    with pytest.raises(ConfigError, match=r"exclude: STS12 is no folder or file: name a task folder"):
        secateur.heal(llama_folder, data, **SETTINGS, exclude=["STS12"], out=tmp_path / "out")
