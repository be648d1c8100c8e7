from __future__ import annotations

import json
import shlex
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

import secateur
from conftest import example_pairs, llama_model, tiny_transformer, write_pairs
from killing import run_until
from secateur import cli
from secateur.artifacts import Costs, Origin, Profile, Scores, Training, load
from secateur.errors import ConfigError, DataError, IllegalDepth, ModelError, OutputError, SecateurError
from task_folders import example_rows, write_task

OPTIONS = {"depths": ["1", "small"], "steps": 10, "batch_size": 8, "learning_rate": 1e-3, "lora_rank": 4}
OPTIONS |= {"precision": "float32", "max_examples": 16, "scale": 20.0, "sample": 16}
VARIANTS = ["tiny-2-zero-shot", "tiny-2-healed", "tiny-1-healed"]


def make_place(folder: Path) -> Path:
    """A folder with a model of two blocks, data and a task; its name has a blank, as folders of people do."""
    place = folder / "my place"
    place.mkdir()
    tiny_transformer(place / "tiny", "llama", depth=2)
    write_pairs(place / "words.jsonl", example_pairs(), "find the word")
    write_task(place / "task", "sts", example_rows("sts"), instruction="compare")
    return place


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_place(tmp_path_factory.mktemp("study"))


def run_study(place: Path, out: str = "run", **changes: object) -> Path:
    options = OPTIONS | {"data": [place / "words.jsonl"], "tasks": [str(place / "task")]} | changes
    return secateur.study([place / "tiny"], **options, out=place / out)


@pytest.fixture(scope="module")
def run(place: Path) -> Path:
    assert run_study(place) == place / "run" / "report.html"
    return place / "run"


def tables(run: Path) -> dict[str, object]:
    """All that a study found out, without the times."""
    profile = load(run / "profiles" / "tiny", Profile)
    return {
        "scores": [row | {"seconds": 0} for row in secateur.read_scores(run).to_dicts()],
        "profile": profile.rows,
        "losses": {name: load(run / "models" / name, Training).losses for name in VARIANTS[1:]},
        "choice": json.loads((run / "profiles" / "tiny" / "choice.json").read_text()),
        "costs": [(row.model, row.depth, row.parameters) for row in load(run, Costs).rows],
        "kept": {name: load(run / "models" / name, Origin).kept for name in VARIANTS},
    }


def test_a_study_goes_the_whole_way(run: Path):
    found = tables(run)
    assert [row["model"] for row in found["scores"]] == VARIANTS
    assert [row["task"] for row in found["scores"]] == ["task"] * 3
    assert found["kept"] == {VARIANTS[0]: (0, 1), VARIANTS[1]: (0, 1), VARIANTS[2]: (0,)}
    assert [name for name, *_ in found["costs"]] == VARIANTS
    expected = {"study.yaml", "models", "profiles", "pruned", "scores", "costs.json", "report.html", "report.md"}
    assert {path.name for path in run.iterdir()} - {"figures"} == expected
    assert sorted(path.name for path in (run / "models").iterdir()) == sorted(VARIANTS)


def test_a_finished_study_does_nothing_again_but_the_report(run: Path, place: Path):
    kept = [path for part in ("models", "pruned", "scores", "profiles") for path in run.glob(f"{part}/**/*")]
    kept += [run / "costs.json", run / "study.yaml"]
    times = {path: path.stat().st_mtime_ns for path in kept if path.is_file() and path.name != "README.md"}
    (run / "report.html").unlink()
    assert run_study(place).is_file()
    (run / "report.html").unlink()
    assert secateur.study(out=run).is_file()
    assert {path: path.stat().st_mtime_ns for path in times} == times


@pytest.mark.parametrize("changes", [{"steps": 11}, {"depths": ["1"]}, {"sample": None}, {"seed": 1}, {"tasks": []}])
def test_other_options_are_refused_in_the_same_run_folder(changes: dict[str, object], run: Path, place: Path):
    with pytest.raises(ConfigError, match=r"name a new run folder") as caught:
        run_study(place, **changes)
    assert caught.value.key == next(iter(changes))


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"data": ["nowhere.jsonl"]}, DataError, "no such file"),
        ({"data": []}, ConfigError, "no data"),
        ({"tasks": ["./nowhere"]}, DataError, "nowhere"),
        ({"depths": ["3"]}, IllegalDepth, "cannot cut 2 blocks to 3"),
        ({"depths": ["half"]}, ConfigError, "half"),
        ({"batch_size": 64}, DataError, "nothing fills a batch of 64"),
        ({"models": ["./nowhere"]}, ModelError, "no such file or folder"),
        ({"stepz": 1}, ConfigError, "no such option"),
    ],
)
def test_a_study_that_cannot_end_does_not_begin(changes, error, says, place: Path):
    """And does not keep its folder from the study that the user meant."""
    with pytest.raises(error, match=says):
        if "models" in changes:
            options = OPTIONS | {"data": [place / "words.jsonl"]}
            secateur.study([place / "tiny", *changes["models"]], **options, out=place / "not-begun")
        else:
            run_study(place, "not-begun", **changes)
    assert not (place / "not-begun").exists() or list((place / "not-begun").iterdir()) == []


def test_a_model_whose_name_begins_another_name_is_not_taken_for_it(place: Path, tmp_path: Path):
    """`tiny-1` and `tiny`, resumed: the folder of the one is not the other's."""
    from secateur.study import _depth

    (tmp_path / "models" / "tiny-1-7-zero-shot").mkdir(parents=True)
    assert _depth(tmp_path, "tiny", str(place / "tiny")) == 2
    assert _depth(tmp_path, "tiny-1", "nowhere") == 7


def test_the_printed_commands_give_the_same_tables(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    """Each table's command is typed again, in a copy of the run folder."""
    before = {
        "profile": load(run / "profiles" / "tiny", Profile),
        "scores": load(run / "scores" / VARIANTS[2], Scores),
        "healed": load(run / "models" / VARIANTS[2], Training),
    }
    for name, table in before.items():
        words = shlex.split(table.provenance.command)
        assert words[0] == "secateur"
        words[-1] = str(tmp_path / name)
        monkeypatch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit) as caught:
            cli.main()
        assert caught.value.code == 0, capsys.readouterr().err
    assert load(tmp_path / "profile", Profile).rows == before["profile"].rows
    again = load(tmp_path / "scores", Scores).to_dicts()
    assert [row | {"seconds": 0} for row in again] == [row | {"seconds": 0} for row in before["scores"].to_dicts()]
    assert load(tmp_path / "healed", Training).losses == before["healed"].losses
    history = load(run / "models" / VARIANTS[2], Origin).history
    assert [shlex.split(line)[1] for line in history] == ["prune", "prune", "heal"]


MOMENTS = (
    "models/*.partial/model.safetensors",
    "profiles/tiny/profile.json",
    "models/tiny-2-healed.partial/checkpoints/checkpoint-3/trainer_state.json",
    "models/tiny-2-healed.partial/model/secateur.json",
    "scores/*/scores.json",
)


@pytest.mark.slow
def test_a_study_killed_at_any_point_ends_with_the_same_tables(run: Path, tmp_path: Path):
    place = make_place(tmp_path)
    options = [word for name, value in OPTIONS.items() if name != "depths" for word in (f"--{name}", value)]
    options = [str(word).replace("_", "-") if str(word).startswith("--") else str(word) for word in options]
    command = ["study", place / "tiny", "--data", place / "words.jsonl", "--tasks", place / "task"]
    command += ["--depths", *OPTIONS["depths"], *options, "-o", place / "run"]
    for moment in MOMENTS:
        run_until(place / "run", moment, *command)
    run_study(place)
    assert tables(place / "run") == tables(run)
    assert not list((place / "run").rglob("*.partial"))
    for name in VARIANTS:
        one, other = (secateur.open_model(there / "models" / name, device="cpu") for there in (run, place / "run"))
        assert np.array_equal(one.encode(["the word"]), other.encode(["the word"]))


def test_what_a_kill_left_half_written_does_not_stop_a_study_but_other_files_do(place: Path, run: Path, tmp_path: Path):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    (copy / ".costs.json.0123abcd").write_text("{")
    assert secateur.study(out=copy).is_file()
    assert not (copy / ".costs.json.0123abcd").exists()
    for name in (".mine.0123abcd", "mine.txt"):
        (copy / name).write_text("mine")
        with pytest.raises(OutputError, match="already holds something else"):
            secateur.study(out=copy)
        (copy / name).unlink()


def test_every_error_is_one_of_secateurs(tmp_path: Path, place: Path):
    """A model that gives NaN stops the study with a line, and what is finished stays."""
    broken = llama_model(45, depth=2)
    broken.norm.weight.data.fill_(float("nan"))
    shutil.copytree(place / "tiny", tmp_path / "tiny")
    broken.save_pretrained(tmp_path / "tiny")
    options = OPTIONS | {"data": [place / "words.jsonl"], "out": tmp_path / "run"}
    with pytest.raises(SecateurError) as caught:
        secateur.study([tmp_path / "tiny"], **options)
    assert "\n" not in str(caught.value)
