"""Studies that scout: from a model, data and tasks to the depth that its scores choose, polished."""

from __future__ import annotations

import csv
import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

import secateur
from conftest import example_pairs, tiny_transformer, write_pairs
from forked import forked_steps as forked_steps
from quick_checks import quick_checks as quick_checks
from quick_checks import quick_figures
from secateur import cli
from secateur.errors import ConfigError, StudyFailed
from secateur.evaluation.task_folder import read_task_folder, texts_of
from secateur.results import Costs, Origin, Scores, Scout, Training, load
from secateur.studies.study import join_tables
from snapshots import Snapshots, assert_each_step_was_done_once, assert_same_weights
from task_folders import example_rows, write_task

OPTIONS = {"ladder": [1, 2], "steps": 8, "batch_size": 8, "learning_rate": 1e-3, "precision": "float32"}
OPTIONS |= {"max_examples": 16, "sample": 16, "profile_dtype": "float32"}
VARIANTS = ["tiny-4-zero-shot", "tiny-4-scout", "tiny-1-scout", "tiny-1-polished"]
MOMENTS = (
    "after scouts/tiny/model",  # the training has ended, nothing is scored
    "before scouts/tiny/scout.json",
    "before scouts/tiny/frontier.png",
    "before scouts/tiny/choice.json",
    "after models/tiny-1-scout",  # its record is missing
)
"""What comes after has its moments in test_study.py."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model of four blocks, data and a task; its name has a blank, as folders of people do."""
    place = tmp_path_factory.mktemp("scouted") / "my place"
    place.mkdir()
    tiny_transformer(place / "tiny", "llama", depth=4)
    write_pairs(place / "words.jsonl", example_pairs(), "find the word")
    write_task(place / "task", "sts", example_rows("sts"), instruction="compare")
    return place


def run_study(place: Path, out: str = "run", **changes: object) -> Path:
    """With a tolerance that every depth is within: the smallest that was trained is chosen."""
    options = OPTIONS | {"data": [place / "words.jsonl"], "tasks": [str(place / "task")], "tolerance": 100.0} | changes
    return secateur.study([place / "tiny"], **options, out=place / out)


@pytest.fixture(scope="module")
def snapshots(place: Path) -> Snapshots:
    return Snapshots(place / "run", place / "snapshots", MOMENTS)


@pytest.fixture(scope="module")
def run(place: Path, snapshots: Snapshots, quick_checks: None) -> Iterator[Path]:
    with snapshots.taken():
        assert run_study(place) == place / "run" / "report.html"
    with quick_figures():
        yield place / "run"


def tables(run: Path) -> dict[str, object]:
    """All that a study found out, without the times, and where it lies."""
    changing = {"seconds": 0, "source": "", "command": "", "created": ""}
    scout = load(run / "scouts" / "tiny", Scout)
    return {
        "scores": [row | changing for row in secateur.read_scores(run).to_dicts()],
        "scout": (scout.depths, scout.task_scores),
        "losses": [
            load(folder, Training).losses for folder in (run / "scouts/tiny/model", run / "models" / VARIANTS[3])
        ],
        "choice": json.loads((run / "scouts" / "tiny" / "choice.json").read_text()),
        "costs": [(row.model, row.depth, row.parameters) for row in load(run, Costs).rows],
    }


def test_the_smallest_depth_that_is_good_enough_is_polished(run: Path):
    found = tables(run)
    assert [row["model"] for row in found["scores"]] == VARIANTS
    assert [name for name, *_ in found["costs"]] == VARIANTS
    assert found["choice"] == {"chosen": 1}
    rungs = {row.depth: row for row in load(run / "scouts" / "tiny", Scout).depths}
    assert list(rungs) == [1, 2, 4]
    scores = {row.model: row.score for row in secateur.read_scores(run).rows}
    assert rungs[1].score == pytest.approx(scores["tiny-1-scout"], abs=1e-5)
    assert rungs[4].score == pytest.approx(scores["tiny-4-scout"], abs=1e-5)
    assert load(run / "scouts" / "tiny" / "model", Training).steps == 2  # a quarter of all
    assert load(run / "models" / "tiny-1-polished", Training).steps == 24  # the rest, at a quarter of the blocks
    assert load(run / "models" / "tiny-1-scout", Origin).kept == (0,)
    whole, cut = (load_file(run / "models" / name / "model.safetensors") for name in VARIANTS[1:3])
    assert all(torch.equal(whole[key], cut[key]) for key in cut)
    expected = {"study.yaml", "plan.json", "steps.jsonl", "models", "profiles", "scouts", "scores", "cache", "done"}
    expected |= {"costs.json", "table.csv", "report.html", "report.md"}
    assert {path.name for path in run.iterdir()} - {"figures"} == expected


def test_the_joined_table_has_a_row_for_each_model_and_task(run: Path):
    rows = join_tables(run)
    assert sorted((row["variant"], row["task"]) for row in rows) == sorted((name, "task") for name in VARIANTS)
    assert [(row["kept"], row["recipe"], row["seed"], row["steps"]) for row in rows] == [
        (1, "polished", 42, 24),
        (4, "scout", 42, 2),
        (1, "scout", 42, 2),
        (4, "none", None, None),
    ]
    with (run / "table.csv").open() as stream:
        assert [float(row["score"]) for row in csv.DictReader(stream)] == [row["score"] for row in rows]


def test_a_finished_study_does_nothing_again_but_the_report(run: Path, place: Path):
    kept = [path for part in ("models", "scouts", "scores", "profiles") for path in run.glob(f"{part}/**/*")]
    times = {path: path.stat().st_mtime_ns for path in kept if path.is_file() and path.name != "README.md"}
    (run / "report.html").unlink()
    assert run_study(place).is_file()
    assert secateur.study(out=run).is_file()
    assert {path: path.stat().st_mtime_ns for path in times} == times
    state = secateur.read_status(run)
    assert {state.of(step) for step in state.plan.steps} == {"done"}


def test_a_study_killed_at_any_point_ends_with_the_same_tables(run: Path, snapshots: Snapshots):
    for moment in snapshots.restored():
        whole = run.with_name("whole")
        assert secateur.study(out=run).is_file()
        assert tables(run) == tables(whole), moment
        assert not list(run.rglob("*.partial")), moment
        assert_each_step_was_done_once(run)
        for name in VARIANTS:
            assert_same_weights(run / "models" / name, whole / "models" / name, moment)


@pytest.mark.slow
@pytest.mark.usefixtures("forked_steps")
def test_processes_side_by_side_give_the_same_scores(run: Path, tmp_path: Path):
    copy = shutil.copytree(run, tmp_path / "run")
    for gone in (*copy.glob("models/tiny-1-*"), *copy.glob("scores/tiny-1-*")):
        shutil.rmtree(gone)
    for name in ("costs.json", "steps.jsonl"):
        (copy / name).unlink()
    assert secateur.study(out=copy, jobs=2).is_file()
    scores = {row.model: row.score for row in secateur.read_scores(run).rows}
    assert {row.model: row.score for row in secateur.read_scores(copy).rows} == pytest.approx(scores, rel=1e-3)


def edit(run: Path, **values: object) -> None:
    settings = yaml.safe_load((run / "study.yaml").read_text())
    (run / "study.yaml").write_text(yaml.safe_dump(settings | values))


def test_another_choice_adds_to_a_study_and_changes_nothing_that_is_there(run: Path, tmp_path: Path):
    copy = shutil.copytree(run, tmp_path / "run")
    edit(copy, polish=[2, 1])
    state = secateur.plan_study(out=copy)
    left = [step.name for step in state.plan.steps if state.of(step) != "done"]
    new = [f"{kind} tiny-2-{what}" for what in ("scout", "polished") for kind in ("prune", "evaluate")]
    assert left == [*new[:2], "heal tiny-2-polished", new[3], "cost all"]
    edit(copy, polish=[], steps=16)
    for _ in range(2):
        with pytest.raises(ConfigError, match=r"^steps: changed in .*scouts/tiny/frontier\.png"):
            secateur.study(out=copy)
        (copy / "plan.json").unlink(missing_ok=True)  # can be made anew, and excuses nothing


def test_a_budget_that_nothing_fits_leaves_the_rest_whole(run: Path, tmp_path: Path):
    copy = shutil.copytree(run, tmp_path / "run")
    edit(copy, max_params=1)
    with pytest.raises(StudyFailed) as caught:
        secateur.study(out=copy)
    assert list(caught.value.failed) == ["prune tiny-(chosen)-scout"]
    assert {row.model for row in load(copy, Costs).rows} == set(VARIANTS)  # those of the earlier choice stay
    assert not (copy / "scouts" / "tiny" / "choice.json").exists()
    assert "max_params: no depth has at most 1 parameter:" in caught.value.failed["prune tiny-(chosen)-scout"]
    assert caught.value.page is not None
    assert "What failed" in caught.value.page.read_text()
    edit(copy, max_params=None)
    assert "What failed" not in secateur.study(out=copy).read_text()


def test_texts_alone_are_scouted_by_the_whole_model_on_texts_that_nothing_is_trained_on(
    place: Path, quick_checks: None
):
    texts = [str(pair["positive"]) for pair in example_pairs(240)]
    (place / "notes.txt").write_text("".join(f"{text}\n" for text in texts * 10))
    run_study(place, "texts", data=[place / "notes.txt"], tasks=[], seeds=[1, 2], ladder=[2, 3])
    run = place / "texts"
    models = [f"tiny-{what}-seed{seed}" for seed in (1, 2) for what in ("4-scout", "2-scout", "2-polished")]
    scores = secateur.read_scores(run).rows
    assert [(row.model, row.task) for row in scores] == [
        (name, "notes-held-out") for name in ["tiny-4-zero-shot", *models]
    ]
    assert len({row.data for row in scores}) == 1  # all on the same task
    assert load(run / "scouts" / "tiny-seed1", Scout).judge == "texts"
    assert (run / "scouts" / "tiny-seed1" / "choice.json").is_file()
    held = set(texts_of(read_task_folder(run / "scouts" / "tiny-seed1" / "tasks" / "notes-held-out")))
    assert len(held) == len(set(texts)) // 10
    for folder in (
        run / "scouts/tiny-seed1/model",
        run / "scouts/tiny-seed2/model",
        run / "models/tiny-2-polished-seed2",
    ):
        settings = load(folder, Training).settings
        assert settings["data"] == {"notes.txt": len(set(texts)) - len(held)}
        assert settings["recipe"] == "distill"
        assert Path(settings["teacher"]).name == "tiny-4-zero-shot"
    # A step of evenly spaced layers takes a pass at each depth, 2, 3 and 4: a quarter of 8 steps pays for one.
    assert load(run / "scouts/tiny-seed1/model", Training).steps == 1
    for name in ("tiny-2-scout-seed1", "tiny-2-polished-seed2"):  # evenly spaced ones, not the first
        assert load(run / "models" / name, Origin).kept == (0, 3)
    study = yaml.safe_load((run / "study.yaml").read_text())
    assert (study["teacher"], study["layers"]) == ("self", "uniform")
    state = secateur.plan_study(out=run)
    assert {state.of(step) for step in state.plan.steps} == {"done"}


def test_held_out_rows_are_known_wherever_the_run_folder_lies(place: Path, tmp_path: Path, quick_checks: None):
    write_pairs(place / "many.jsonl", example_pairs(240), "find the word")
    run_study(place, "pairs", data=[place / "many.jsonl"], tasks=[], polish=[1])
    copy = shutil.copytree(place / "pairs", tmp_path / "elsewhere")
    state = secateur.plan_study(out=copy)
    assert {state.of(step) for step in state.plan.steps} == {"done"}
    (task,) = (copy / "scouts" / "tiny" / "tasks").iterdir()
    with (task / "qrels.tsv").open("a") as stream:
        stream.write("t0\tt3\t1\n")
    state = secateur.plan_study(out=copy)
    left = {step.kind for step in state.plan.steps if state.of(step) != "done"}
    assert left == {"evaluate"}
    assert {row.task for row in load(copy / "scores" / "tiny-1-polished", Scores).rows} == {"many-held-out"}


def test_a_study_is_planned_and_told_on_the_command_line(place: Path, run: Path, tmp_path: Path, monkeypatch, capsys):
    def command(*words: object) -> str:
        monkeypatch.setattr(sys, "argv", ["secateur", *map(str, words)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        assert caught.value.code == 0
        return capsys.readouterr().out

    words = ["study", place / "tiny", "--data", place / "words.jsonl", "--tasks", place / "task"]
    said = command(*words, "--batch-size", "8", "--tolerance", "2", "--ladder", "1,2", "-o", tmp_path / "run", "--plan")
    assert "scout tiny" in said and "heal tiny-(chosen)-polished" in said
    assert not (tmp_path / "run").exists()
    assert "waiting" not in command("study", "status", run)
    said = " ".join(command("study", "resume", run).split())
    verdict = re.findall(r"^\*\*(.+)\*\*$", (run / "report.md").read_text(), re.MULTILINE)
    assert len(verdict) == 1
    assert [sentence for sentence in verdict if sentence.replace("\\", "") not in said] == []
