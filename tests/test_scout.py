"""One training of several depths: its scores against ``evaluate`` on cut models, and what a killed one goes on with."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sentence_transformers.util import cos_sim

import secateur
from architectures import config_of
from conftest import example_pairs, tiny_transformer, write_pairs
from secateur.data.sources import read_texts
from secateur.errors import ConfigError, DataError, IllegalDepth, OutputError, UnsupportedArchitecture
from secateur.evaluation.replicates import read_replicates
from secateur.evaluation.task_folder import read_task_folder, texts_of
from secateur.files import lock
from secateur.healing import heal as healing
from secateur.models.open_model import open_model
from secateur.profiling.depths import legal_cuts
from secateur.results import Origin, Scout, Training, load
from secateur.scouting import scout as scouting
from secateur.scouting.scout import ladder, step_cost
from task_folders import example_rows, write_task

SETTINGS: dict[str, Any] = {"steps": 4, "batch_size": 8, "precision": "float32", "train": "blocks"}


@pytest.fixture(scope="module")
def four_layers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_transformer(tmp_path_factory.mktemp("llama") / "tiny", "llama", depth=4)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    home = tmp_path_factory.mktemp("tasks")
    return [write_task(home / kind, kind, example_rows(kind), name=kind) for kind in ("sts", "retrieval")]


@pytest.fixture(scope="module")
def scouted(four_layers: Path, pairs_file: Path, tasks: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A scout of depths 1, 2 and 4, judged by two tasks; to be copied, not changed."""
    out = tmp_path_factory.mktemp("scouted") / "out"
    secateur.scout(four_layers, pairs_file, **SETTINGS, depths=[1, 2], tasks=tasks, out=out)
    return out


@pytest.fixture(autouse=True)
def no_check_in_another_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each written model, which takes seconds."""
    monkeypatch.setattr("secateur.models.save.difference", lambda *_: 0.0)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """All texts of the sets that reach the trainer."""
    texts: set[str] = set()
    train = healing.train

    def spy(model: Any, sets: Any, *rest: Any, **more: Any) -> Any:
        for item in sets:
            for column in set(item.rows.column_names) - {"label"}:
                texts.update(item.rows[column])
        return train(model, sets, *rest, **more)

    monkeypatch.setattr(healing, "train", spy)
    return texts


# The ladder -----------------------------------------------------------------------------------------------------------


def test_the_ladder_is_about_eight_depths_from_a_fifth_to_all():
    assert ladder(30, range(1, 31)) == (6, 8, 10, 12, 15, 19, 24, 30)
    assert ladder(6, range(1, 7)) == (1, 2, 3, 4, 5, 6)
    assert ladder(1, [1]) == (1,)
    assert ladder(80, range(1, 81))[0] == 16
    assert ladder(6, range(1, 7), "uniform") == (2, 3, 4, 5, 6)
    assert ladder(1, [1], "uniform") == (1,)
    assert (step_cost("first", (2, 3), 4), step_cost("uniform", (2, 3), 4)) == (1, (2 + 3 + 4) / 4)


@pytest.mark.parametrize("depth", range(1, 60))
@pytest.mark.parametrize("period", [1, 2, 5, 6])
def test_every_rung_is_legal_and_the_next_is_higher(depth: int, period: int):
    legal = [*range(period, depth, period), depth]
    rungs = ladder(depth, legal)
    assert list(rungs) == sorted(set(rungs)) and set(rungs) <= set(legal)
    assert rungs[-1] == depth and len(rungs) <= 8
    assert abs(rungs[0] - max(1, depth / 5)) <= max(0.5, period)


def test_evenly_spaced_layers_are_tried_only_where_they_can_be_cut():
    every_other = config_of("qwen3_moe")  # experts in every second layer: 0, 2, 3, 5 would have them elsewhere
    assert legal_cuts(every_other, "first") == (1, 2, 3, 4, 5, 6)
    assert legal_cuts(every_other, "uniform") == (1, 2, 3, 6)
    assert legal_cuts(config_of("bert"), "uniform") == (1, 2, 3, 4, 5, 6)


# Scores ---------------------------------------------------------------------------------------------------------------


def test_a_rung_has_the_scores_of_the_cut_model(scouted: Path, tasks: list[Path], tmp_path: Path):
    found = load(scouted, Scout)
    assert [(row.depth, row.trained) for row in found.depths] == [(1, True), (2, True), (4, True)]
    assert (found.judge, found.depth, found.model) == ("tasks", 4, "tiny")
    assert [part.layer for part in found.layer_costs] == [0, 1, 2, 3, 4]
    cuts = [secateur.prune(scouted / "model", depth, out=tmp_path / f"cut-{depth}") for depth in (1, 2, 4)]
    scores = secateur.evaluate(cuts, tasks, out=tmp_path / "scores")
    rows = {(int(row.model.removeprefix("cut-")), row.task): row for row in scores.rows}
    assert len(found.task_scores) == len(rows) == 6
    for row in found.task_scores:
        same = rows[row.depth, row.task]
        assert row.score == pytest.approx(same.score, abs=1e-4)
        assert (row.low, row.high) == (pytest.approx(same.low, abs=1e-3), pytest.approx(same.high, abs=1e-3))
    drawn = {key: read_replicates(tmp_path / "scores", row) for key, row in rows.items()}
    names = ("sts", "retrieval")
    for row in found.depths:
        mean, full = (np.mean([rows[depth, name].score for name in names]) for depth in (row.depth, 4))
        assert (row.score, row.difference) == (pytest.approx(mean, abs=1e-4), pytest.approx(mean - full, abs=1e-4))
        own = sum(drawn[row.depth, name] for name in names) / 2
        assert (row.low, row.high) == pytest.approx(np.quantile(own, [0.025, 0.975]), abs=1e-3)
        if row.depth == 4:
            assert (row.difference, row.difference_low, row.difference_high) == (0.0, None, None)
            continue
        paired = own - sum(drawn[4, name] for name in names) / 2
        expected = np.quantile(paired, [0.025, 0.975])
        assert (row.difference_low, row.difference_high) == pytest.approx(expected, abs=1e-3)


def test_more_depths_are_scored_and_nothing_is_done_twice(
    scouted: Path, four_layers: Path, pairs_file: Path, tasks: list[Path], tmp_path: Path, monkeypatch
):
    out = shutil.copytree(scouted, tmp_path / "out")
    given = {**SETTINGS, "depths": [1, 2], "tasks": tasks, "out": out}
    monkeypatch.setattr(scouting, "heal", None)
    scored: list[int] = []
    keep = scouting.keep_score
    monkeypatch.setattr(scouting, "keep_score", lambda *own: (scored.append(own[2].depth), keep(*own)))
    before = load(out, Scout)
    more = secateur.scout(four_layers, pairs_file, **given, score=[3])
    assert scored == [3, 3]
    assert [(row.depth, row.trained) for row in more.depths] == [(1, True), (2, True), (3, False), (4, True)]
    assert [row for row in more.depths if row.trained] == list(before.depths)
    assert more.layer_costs == before.layer_costs
    model = open_model(out / "model")
    monkeypatch.setattr(scouting, "open_model", None)
    assert secateur.scout(four_layers, pairs_file, **given) == more == load(out, Scout)
    monkeypatch.setattr(scouting, "open_model", lambda *_, **__: model)
    with pytest.raises(ConfigError, match="score: is 5: the model has 4 layers"):
        secateur.scout(four_layers, pairs_file, **given, score=[5])


def test_a_model_that_teaches_itself_keeps_evenly_spaced_layers(four_layers: Path, tasks: list[Path], tmp_path: Path):
    data = tmp_path / "texts.txt"
    data.write_text("".join(f"{row['query']}\n" for row in example_pairs(300)))
    given: dict[str, Any] = {**SETTINGS, "depths": [2, 3], "teacher": "self", "tasks": tasks}
    found = secateur.scout(four_layers, data, **given, out=tmp_path / "out")
    assert found.layers == "uniform" and scouting.SPACED in found.notes
    kept = {2: (0, 3), 3: (0, 2, 3), 4: (0, 1, 2, 3)}
    model = tmp_path / "out" / "model"
    cuts = [secateur.prune(model, keep=own, out=tmp_path / f"cut-{depth}") for depth, own in kept.items()]
    scores = {(row.model, row.task): row.score for row in secateur.evaluate(cuts, tasks).rows}
    assert len(found.task_scores) == len(scores) == 6
    for row in found.task_scores:
        assert row.score == pytest.approx(scores[f"cut-{row.depth}", row.task], abs=1e-4)
    smallest = secateur.prune(model, "chosen", profile=loose(found, tmp_path / "loose"), out=tmp_path / "chosen")
    assert load(smallest, Origin).kept == kept[2]
    rows = secateur.candidates(found).rows
    for row, own in zip(rows, kept.values(), strict=True):
        parts = [part.bytes for part in found.layer_costs if part.layer == 0 or part.layer - 1 in own]
        assert row.bytes == sum(parts)
    first = secateur.scout(four_layers, data, **given, layers="first", out=tmp_path / "first")
    assert first.layers == "first" and scouting.SPACED not in first.notes


def loose(table: Scout, folder: Path) -> Path:
    """The table with differences of nothing, so that the smallest depth is chosen."""
    rows = [replace(row, difference_low=row.difference_low and 0.0) for row in table.depths]
    replace(table, depths=tuple(rows)).save(folder)
    return folder


# Held-out rows --------------------------------------------------------------------------------------------------------


def many_pairs(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Every fourth shares its anchor with the one before, every tenth has negatives that others have."""
    rows = example_pairs(count, seed)
    for number, row in enumerate(rows):
        if number % 4 == 3:
            row["query"] = rows[number - 1]["query"]
        if number % 10 == 9:
            row["negative"] = [rows[number - 9]["positive"], "a, b."]
    return rows


def test_without_tasks_held_out_pairs_judge_and_are_never_trained_on(four_layers: Path, tmp_path: Path, seen):
    rows = many_pairs(600)
    write_pairs(tmp_path / "words.jsonl", rows[:400], "find the word")
    write_pairs(tmp_path / "more.jsonl", rows[400:])
    write_pairs(tmp_path / "few.jsonl", example_pairs(20, seed=5))
    data = [tmp_path / f"{name}.jsonl" for name in ("words", "more", "few")]
    given = {**SETTINGS, "depths": [2], "held_out": 90, "out": tmp_path / "out"}
    found = secateur.scout(four_layers, data, **given)
    assert found.judge == "pairs" and [row.depth for row in found.depths] == [2, 4]
    folders = {folder.name: read_task_folder(folder) for folder in (tmp_path / "out" / "tasks").iterdir()}
    assert {name: folder.type for name, folder in folders.items()} == {
        "words-held-out": "retrieval",
        "more-held-out": "retrieval",
    }
    held = {text for folder in folders.values() for text in texts_of(folder)}
    assert held and not held & seen
    assert folders["words-held-out"].instruction == "find the word" and not folders["more-held-out"].instruction
    pairs = {(row["query"], row["positive"]) for row in rows}
    for name, most, own in (("words", 30, rows[:400]), ("more", 20, rows[400:])):
        tables = folders[f"{name}-held-out"].tables
        texts = {row["_id"]: row["text"] for row in (*tables["queries"], *tables["corpus"])}
        judged = {(texts[row["query-id"]], texts[row["corpus-id"]]) for row in tables["qrels"]}
        # All positives of a held-out anchor are relevant, so that rows which share one stand together.
        assert judged == {pair for pair in pairs if pair[0] in {query for query, _ in judged}}
        assert len({query for query, _ in judged}) >= 10 and len(judged) <= most
        negatives = {t for r in own if (r["query"], r["positive"]) in judged for t in r["negative"]} - {"a, b."}
        elsewhere = {row["positive"] for row in rows if (row["query"], row["positive"]) not in judged}
        assert {row["text"] for row in tables["corpus"]} == {text for _, text in judged} | (negatives - elsewhere)
    # Nothing else is lost: not the rows that share a negative, and no other file.
    left = {row["query"] for row in [*rows, *example_pairs(20, seed=5)]} - held
    assert left <= seen and "a, b." in seen
    assert "few.jsonl: none of its rows is held out, too few share no text with others" in found.notes
    assert secateur.scout(four_layers, data, **given) == found


def test_texts_are_judged_by_the_teachers_similarities(four_layers: Path, tmp_path: Path, seen):
    data = tmp_path / "texts.txt"
    data.write_text("".join(f"{row['query']}\n" for row in example_pairs(300)))
    given = {**SETTINGS, "depths": [2], "teacher": "self", "out": tmp_path / "out"}
    found = secateur.scout(four_layers, data, **given)
    assert found.judge == "texts"
    training = load(tmp_path / "out" / "model", Training).settings
    assert (training["teacher"], training["layers"]) == (str(four_layers), "uniform")
    folder = read_task_folder(tmp_path / "out" / "tasks" / "texts-held-out")
    texts = {row["_id"]: row["text"] for row in folder.tables["corpus"]}
    queries = {row["_id"]: row["text"] for row in folder.tables["queries"]}
    distinct = set(read_texts(data).rows)
    assert len(queries) == len(distinct) // 10 and set(queries.values()) <= distinct
    assert not set(queries.values()) & seen
    own = list(queries.values())
    vectors = open_model(four_layers).encode(own)
    cosines = cos_sim(vectors, vectors).double().numpy()
    for place, query in enumerate(queries):
        grades = {texts[r["corpus-id"]]: r["score"] for r in folder.tables["qrels"] if r["query-id"] == query}
        others = np.delete(cosines[place], place)
        above = 100 * (cosines[place] - others.mean()) / (1 - others.mean())
        assert grades.keys() >= {text for text, grade in zip(own, above, strict=True) if grade > 1} - {own[place]}
        assert all(abs(grade - above[own.index(text)]) < 0.51 for text, grade in grades.items())
        assert own[place] not in grades and min(grades.values()) > 0
    assert secateur.scout(four_layers, data, **given) == found


def test_what_cannot_be_judged_is_said_in_a_line(four_layers: Path, pairs_file: Path, tmp_path: Path):
    given = {**SETTINGS, "out": tmp_path / "out"}
    with pytest.raises(DataError, match=r"data: 0 queries can be held out .* it takes 20: name tasks with --tasks"):
        secateur.scout(four_layers, pairs_file, **given)
    texts = tmp_path / "texts.txt"
    texts.write_text("".join(f"{row['query']}\n" for row in example_pairs(300)))
    with pytest.raises(ConfigError, match=r"teacher: texts alone have no answers .*--teacher .*--tasks"):
        secateur.scout(four_layers, texts, **given)
    assert not (tmp_path / "out" / "tasks").exists()


# What goes wrong, and what stops --------------------------------------------------------------------------------------


def stop_at(what: str, count: int) -> Callable[[str, int, int], None]:
    def progress(name: str, done: int, total: int) -> None:
        if name.startswith(what) and done == count:
            raise KeyboardInterrupt

    return progress


def test_a_killed_scout_ends_as_if_it_had_not_been(
    scouted: Path, four_layers: Path, pairs_file: Path, tasks: list[Path], tmp_path: Path
):
    out = tmp_path / "out"
    given = {**SETTINGS, "depths": [2, 1, 4], "tasks": tasks, "out": out}

    def killed(what: str, count: int, **other: Any) -> None:
        with pytest.raises(KeyboardInterrupt):
            secateur.scout(four_layers, pairs_file, **(given | other), progress=stop_at(what, count))

    killed("heal", 0, learning_rate=1.0)  # before the first checkpoint nothing is lost, and all may change
    given["depths"] = [1, 2]
    killed("heal", 2 * SETTINGS["batch_size"])
    with pytest.raises(ConfigError, match=r"out holds a scout with other settings \(seed was 42, is 7\): remove it"):
        secateur.scout(four_layers, pairs_file, **given, seed=7)
    steps: list[tuple[str, int]] = []

    def kill_again(what: str, done: int, total: int) -> None:
        steps.append((what, done))
        stop_at("tasks by depth", 4)(what, done, total)

    with pytest.raises(KeyboardInterrupt):
        secateur.scout(four_layers, pairs_file, **given, progress=kill_again)
    assert steps[0][0].startswith("heal") and steps[0][1] == SETTINGS["batch_size"]
    assert len(list((out / "draws").iterdir())) == 4 and not (out / "scout.json").exists()
    totals: list[int] = []
    found = secateur.scout(four_layers, pairs_file, **given, progress=lambda what, done, total: totals.append(total))
    same = load(scouted, Scout)
    assert set(totals) == {2}
    assert (found.depths, found.task_scores) == (same.depths, same.task_scores)
    assert {item.name for item in out.iterdir()} == {item.name for item in scouted.iterdir()}


def test_a_scout_made_of_something_else_is_refused(
    scouted: Path, four_layers: Path, pairs_file: Path, tasks: list[Path], tmp_path: Path
):
    out = shutil.copytree(scouted, tmp_path / "out")
    given: dict[str, Any] = {**SETTINGS, "depths": [1, 2], "tasks": tasks, "out": out}

    def refused(told: str, data: Path = pairs_file, **other: Any) -> None:
        with pytest.raises(ConfigError, match=rf"out: .*out holds a scout with other settings \({told}\)"):
            secateur.scout(four_layers, data, **(given | other))

    refused("steps was 4, is 5", steps=5)
    refused("other tasks", tasks=tasks[:1])
    refused("other data; other prompts", write_pairs(tmp_path / "other.jsonl", example_pairs(30)))
    refused("other exclude", exclude=tasks)
    same = shutil.copy(pairs_file, tmp_path / pairs_file.name)
    beside = {"query_instruction": "find the word", "passage_instruction": "a word"}
    same.with_suffix(".json").write_text(json.dumps(beside))
    refused("other prompts", same)
    with lock(out), pytest.raises(OutputError, match="another run is working in it"):
        secateur.scout(four_layers, pairs_file, **given)
    (out / "mine.txt").write_text("")
    with pytest.raises(OutputError, match=r"already holds something else \(mine.txt\)"):
        secateur.scout(four_layers, pairs_file, **given)


def test_depths_that_cannot_be_are_refused_before_the_training(
    four_layers: Path, pairs_file: Path, tasks: list[Path], tmp_path: Path, monkeypatch
):
    monkeypatch.setattr(scouting, "heal", None)
    given: dict[str, Any] = {**SETTINGS, "tasks": tasks, "out": tmp_path / "out"}
    with pytest.raises(ConfigError, match="depths: is 9: the model has 4 layers"):
        secateur.scout(four_layers, pairs_file, **given, depths=[9])
    monkeypatch.setattr("secateur.profiling.depths.legal_depths", lambda config, layers: (2, 4))
    with pytest.raises(IllegalDepth, match="cannot cut a model of 4 layers to 3: the model cannot be cut there"):
        secateur.scout(four_layers, pairs_file, **given, score=[3], depths=[2])
    monkeypatch.setattr("secateur.profiling.depths.ends_with_norm", lambda model: False)
    with pytest.raises(UnsupportedArchitecture, match="more than a norm follows its layers"):
        secateur.scout(four_layers, pairs_file, **given, depths=[2])
    assert list((tmp_path / "out").iterdir()) == []


def test_a_rung_without_a_number_is_left_out_and_said(scouted: Path, four_layers, pairs_file, tasks, tmp_path):
    out = shutil.copytree(scouted, tmp_path / "out")
    for file in (out / "draws").iterdir():
        content = json.loads(file.read_text())
        if (content["task"], content["depth"]) == ("sts", 2):
            file.write_text(json.dumps(content | {"row": None, "replicates": None}))
    (out / "frontier.png").unlink()
    found = secateur.scout(four_layers, pairs_file, **SETTINGS, depths=[1, 2], tasks=tasks, out=out)
    assert [row.depth for row in found.depths] == [1, 4] and (out / "frontier.png").is_file()
    assert "depth 2 has no mean: a score there is no number" in found.notes
    assert "cosine_spearman on sts is no number at depth 2: the vectors there are all alike" in found.notes
