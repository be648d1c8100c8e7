from __future__ import annotations

import csv
import errno
import json
import os
import shlex
import shutil
import sys
from collections.abc import Iterator
from dataclasses import is_dataclass
from datetime import UTC, datetime
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file, save_file

import secateur
from conftest import example_pairs, llama_model, tiny_transformer, write_pairs
from forked import forked_steps as forked_steps
from forked import run_until
from quick_checks import quick_checks as quick_checks
from quick_checks import quick_figures
from secateur import cli
from secateur.errors import ConfigError, DataError, IllegalDepth, ModelError, OutputError, SecateurError, StudyFailed
from secateur.files import lock
from secateur.reporting.run import read_run
from secateur.results import Costs, Origin, Profile, Scores, Training, load
from secateur.studies.study import join_tables
from snapshots import Snapshots, assert_each_step_was_done_once, assert_same_weights
from task_folders import example_rows, write_lines, write_task

OPTIONS = {"depths": ["1", "small"], "steps": 10, "batch_size": 8, "learning_rate": 1e-3, "lora_rank": 4}
OPTIONS |= {"precision": "float32", "max_examples": 16, "scale": 20.0, "sample": 16, "profile_dtype": "float32"}
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


MOMENTS = (
    "after models/tiny-2-zero-shot",  # its record is missing
    "before profiles/tiny/profile.json",
    "before profiles/tiny/curve.png",
    "before models/tiny-2-healed",  # the training has ended
    "after models/tiny-2-healed",
    "after scores/tiny-2-healed/scores.json",
    "after done/evaluate-tiny-1-healed.json",  # the journal's line is missing
    "before costs.json",
    "before table.csv",
)


@pytest.fixture(scope="module")
def snapshots(place: Path) -> Snapshots:
    return Snapshots(place / "run", place / "snapshots", MOMENTS)


@pytest.fixture(scope="module")
def run(place: Path, snapshots: Snapshots, quick_checks: None) -> Iterator[Path]:
    with snapshots.taken():
        assert run_study(place) == place / "run" / "report.html"
    with quick_figures():
        yield place / "run"


_CHANGING = {"seconds": 0, "source": "", "command": "", "created": ""}


def tables(run: Path) -> dict[str, object]:
    """All that a study found out, without the times, and where it lies."""
    profile = load(run / "profiles" / "tiny", Profile)
    return {
        "scores": [row | _CHANGING for row in secateur.read_scores(run).to_dicts()],
        "profile": profile.rows,
        "losses": {name: load(run / "models" / name, Training).losses for name in VARIANTS[1:]},
        "choice": json.loads((run / "profiles" / "tiny" / "choice.json").read_text()),
        "costs": [(row.model, row.depth, row.parameters) for row in load(run, Costs).rows],
        "kept": {name: load(run / "models" / name, Origin).kept for name in VARIANTS},
    }


def assert_same_but_for_rounding(found: object, expected: object) -> None:
    """Processes side by side have other numbers of threads, which sum in another order."""
    values, known = values_apart(found), values_apart(expected)
    assert values.keys() == known.keys()
    for path, value in known.items():
        near = pytest.approx(value, rel=1e-3, abs=1e-6) if isinstance(value, float) else value
        assert values[path] == near, path


def values_apart(found: object, name: str = "") -> dict[str, object]:
    """Each value of a nested table under its path; without the fingerprints of weights, which tell of every bit."""
    if is_dataclass(found):
        found = vars(found)
    if isinstance(found, dict):
        parts = [(key, value) for key, value in found.items() if key != "weights"]
    elif isinstance(found, list | tuple):
        parts = list(enumerate(found))
    else:
        return {name: found}
    return {path: value for key, part in parts for path, value in values_apart(part, f"{name}/{key}").items()}


def test_a_study_goes_the_whole_way(run: Path):
    found = tables(run)
    assert [row["model"] for row in found["scores"]] == VARIANTS
    assert [row["task"] for row in found["scores"]] == ["task"] * 3
    assert found["kept"] == {VARIANTS[0]: (0, 1), VARIANTS[1]: (0, 1), VARIANTS[2]: (0,)}
    assert [name for name, *_ in found["costs"]] == VARIANTS
    expected = {"study.yaml", "plan.json", "steps.jsonl", "models", "profiles", "pruned", "scores", "cache", "done"}
    expected |= {"costs.json", "table.csv", "report.html", "report.md"}
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


def test_a_run_folder_named_like_the_model_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for out in ("smollm2", "smollm2/run"):
        with pytest.raises(ConfigError, match="the name of the model"):
            secateur.study(["smollm2"], data=["pairs.jsonl"], out=out)
    assert not (tmp_path / "smollm2").exists()


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
        ({"depths": ["3"]}, IllegalDepth, "cannot cut a model of 2 layers to 3"),
        ({"depths": ["half"]}, ConfigError, "half"),
        ({"batch_size": 64}, DataError, "nothing fills a batch of 64"),
        ({"depths": [], "tasks": []}, DataError, "queries can be held out"),
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
    assert [row | _CHANGING for row in again] == [row | _CHANGING for row in before["scores"].to_dicts()]
    assert load(tmp_path / "healed", Training).losses == before["healed"].losses
    history = load(run / "models" / VARIANTS[2], Origin).history
    assert [shlex.split(line)[1] for line in history] == ["prune", "prune", "heal"]


def test_a_study_killed_at_any_point_ends_with_the_same_tables(run: Path, snapshots: Snapshots):
    for moment in snapshots.restored():
        whole = run.with_name("whole")
        assert secateur.study(out=run).is_file()
        assert tables(run) == tables(whole), moment
        assert not list(run.rglob("*.partial")), moment
        assert_each_step_was_done_once(run)
        for name in VARIANTS:
            assert_same_weights(run / "models" / name, whole / "models" / name, moment)


def without(run: Path, tmp_path: Path, *variants: str) -> Path:
    """A copy of a run, some of whose models were not trained yet."""
    copy = copied(run, tmp_path)
    for name in variants:
        shutil.rmtree(copy / "models" / name)
        shutil.rmtree(copy / "scores" / name)
    (copy / "costs.json").unlink()
    lines = (copy / "steps.jsonl").read_text().splitlines(keepends=True)
    gone = {f"{kind} {name}" for kind in ("heal", "evaluate") for name in variants} | {"cost all"}
    (copy / "steps.jsonl").write_text("".join(line for line in lines if json.loads(line)["step"] not in gone))
    return copy


@pytest.mark.slow
@pytest.mark.usefixtures("forked_steps")
def test_processes_side_by_side_give_the_same_tables_after_a_kill(run: Path, tmp_path: Path):
    copy = without(run, tmp_path, *VARIANTS[1:])
    moment = "models/*.partial/checkpoints/checkpoint-*/trainer_state.json"
    run_until(copy, moment, "study", "resume", copy, "--jobs", "2")
    assert secateur.study(out=copy, jobs=2).is_file()
    assert_same_but_for_rounding(tables(copy), tables(run))
    assert_each_step_was_done_once(copy)
    begun = [entry["step"] for entry in map(json.loads, (copy / "steps.jsonl").read_text().splitlines())]
    assert begun.count(f"heal {VARIANTS[1]}") == 3  # started, killed, started, done


@pytest.mark.slow
def test_a_ray_cluster_gives_the_same_tables(run: Path, tmp_path: Path):
    pytest.importorskip("ray")
    copy = copied(run, tmp_path)
    shutil.rmtree(copy / "scores" / VARIANTS[2])
    assert secateur.study(out=copy, ray="local", jobs=2).is_file()
    assert (copy / "logs" / f"evaluate-{VARIANTS[2]}.log").read_text().startswith("$ secateur evaluate ")
    assert_same_but_for_rounding(tables(copy), tables(run))


def test_a_cluster_that_is_not_there_claims_no_folder(place: Path):
    pytest.importorskip("ray")
    for address in ("127.0.0.1:9", "ray://127.0.0.1:9", "auto"):
        with pytest.raises(ConfigError, match=f"^ray: no Ray cluster at {address} "):
            run_study(place, "elsewhere", ray=address)
    assert not (place / "elsewhere" / "study.yaml").exists()  # which would name that cluster in the next run, too


def test_the_joined_table_has_a_row_for_each_model_and_task(run: Path):
    rows = join_tables(run)
    assert [(row["variant"], row["task"], row["kept"], row["recipe"], row["seed"]) for row in rows] == [
        ("tiny-2-healed", "task", 2, "healed", 42),
        ("tiny-1-healed", "task", 1, "healed", 42),
        ("tiny-2-zero-shot", "task", 2, "none", None),
    ]
    scores = {row.model: row.score for row in secateur.read_scores(run).rows}
    assert {row["variant"]: row["score"] for row in rows} == scores
    with (run / "table.csv").open() as stream:
        written = list(csv.DictReader(stream))
    assert [float(row["score"]) for row in written] == [row["score"] for row in rows]


def copied(run: Path, tmp_path: Path) -> Path:
    return shutil.copytree(run, tmp_path / "run")


def test_scores_and_costs_of_a_model_that_changed_are_measured_again(run: Path, tmp_path: Path):
    copy = copied(run, tmp_path)
    state = secateur.plan_study(out=copy)
    assert {state.of(step) for step in state.plan.steps} == {"done"}  # wherever the folder lies
    changed = copy / "models" / VARIANTS[2] / "model.safetensors"
    weights = load_file(changed)
    save_file({name: tensor * 1.5 for name, tensor in weights.items()}, changed, {"format": "pt"})
    state = secateur.plan_study(out=copy)
    left = [step for step in state.plan.steps if state.of(step) != "done"]
    assert [step.name for step in left] == [f"evaluate {VARIANTS[2]}", "cost all"]
    assert secateur.study(out=copy).is_file()
    old, new = (load(there / "scores" / VARIANTS[2], Scores).rows[0] for there in (run, copy))
    assert new.weights != old.weights
    state = secateur.plan_study(out=copy)
    assert {state.of(step) for step in state.plan.steps} == {"done"}


def test_the_status_counts_what_a_running_step_has_left(run: Path, tmp_path: Path):
    copy = copied(run, tmp_path)
    (copy / "costs.json").unlink()
    begun = {"outcome": "started", "started": datetime.now(UTC).isoformat(timespec="milliseconds")}
    with (copy / "steps.jsonl").open("a") as journal:
        for entry in ({"outcome": "done", "seconds": 1000.0}, begun):  # the time before tells how long it takes
            journal.write(json.dumps({"step": "cost all", "command": "", **entry}) + "\n")
    with lock(copy / "done"):
        state = secateur.read_status(copy)
    assert list(state.running) == ["cost all"]
    assert 800 < state.seconds_left <= 1000


def test_scores_of_other_versions_are_not_those_of_a_study(run: Path, tmp_path: Path):
    copy = copied(run, tmp_path)
    file = copy / "done" / f"evaluate-{VARIANTS[0]}.json"
    file.write_text(file.read_text().replace("mteb 2.", "mteb 1."))
    state = secateur.plan_study(out=copy)
    assert [step.name for step in state.plan.steps if state.of(step) != "done"] == [f"evaluate {VARIANTS[0]}"]


def test_a_study_runs_on_a_disk_without_locks(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def no_lock(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", no_lock)
    copy = copied(run, tmp_path)
    (copy / "report.html").unlink()
    assert secateur.study(out=copy).is_file()
    assert secateur.read_status(copy).done


@pytest.mark.parametrize("what", ["tiny/config.json", "words.jsonl", "words.json", "task/pairs.jsonl"])
def test_a_study_does_not_go_on_with_other_inputs(what: str, run: Path, place: Path, tmp_path: Path):
    copy = copied(run, tmp_path)
    (file,) = place.glob(what) if "pairs" not in what else [next(place.glob("task/*.jsonl"))]
    before = file.read_bytes()
    try:
        file.write_bytes(before + b"\n")
        with pytest.raises(DataError, match="has changed since the study began"):
            secateur.study(out=copy)
    finally:
        file.write_bytes(before)
    assert secateur.study(out=copy).is_file()


def test_inputs_that_were_away_for_a_while_are_those_of_before(run: Path, place: Path, tmp_path: Path):
    copy, names = copied(run, tmp_path), ("tiny", "words.jsonl", "words.json", "task")
    for name in names:
        (place / name).rename(place / f"{name}.away")
    try:
        assert secateur.study(out=copy).is_file()
    finally:
        for name in names:
            (place / f"{name}.away").rename(place / name)
    state = secateur.plan_study(out=copy)
    assert {state.of(step) for step in state.plan.steps} == {"done"}


@pytest.mark.slow
def test_a_task_that_is_a_file_is_an_input(place: Path):
    rows = example_rows("sts")["test"]
    write_lines(place / "judged.jsonl", rows)
    run_study(place, "filed", tasks=[str(place / "judged.jsonl")], depths=["1"], steps=1)
    write_lines(place / "judged.jsonl", rows[1:])
    state = secateur.plan_study(out=place / "filed")
    assert {step.kind for step in state.plan.steps if state.of(step) != "done"} == {"evaluate"}


def edit(run: Path, key: str, value: object) -> None:
    settings = yaml.safe_load((run / "study.yaml").read_text())
    (run / "study.yaml").write_text(yaml.safe_dump(settings | {key: value}))


def test_an_edited_study_is_refused_where_results_are_of_other_options(run: Path, tmp_path: Path):
    copy = copied(run, tmp_path)
    edit(copy, "steps", 60)
    for go_on in (lambda: secateur.study(out=copy), lambda: secateur.plan_study(out=copy)):
        with pytest.raises(ConfigError, match=r"^steps: changed in .* since models/tiny-2-healed was made"):
            go_on()
    edit(copy, "steps", 10)
    edit(copy, "recipe", "l3prune")
    with pytest.raises(ConfigError, match=r"^recipe: changed in .*models/tiny-2-healed"):
        secateur.plan_study(out=copy)
    edit(copy, "recipe", None)
    edit(copy, "mini_batch_tokens", 64)  # needs less memory for the same result
    edit(copy, "gradient_checkpointing", True)
    state = secateur.plan_study(out=copy)
    assert {state.of(step) for step in state.plan.steps} == {"done"}
    assert secateur.study(out=copy).is_file()


def test_a_study_can_be_added_to(run: Path, tmp_path: Path):
    copy = copied(run, tmp_path)
    edit(copy, "recipes", {"none": {}, "healed": {}})
    state = secateur.plan_study(out=copy)
    waiting = {step.name for step in state.plan.steps if state.of(step) == "waiting"}
    assert waiting == {"prune tiny-1-zero-shot", "evaluate tiny-1-zero-shot", "cost all"}


def test_another_spelling_of_the_run_is_the_same_run(run: Path, place: Path, monkeypatch: pytest.MonkeyPatch):
    times = {path: path.stat().st_mtime_ns for path in run.glob("models/*/*.safetensors")}
    monkeypatch.chdir(place)
    assert secateur.study(out="run").is_file()
    assert run_study(Path(), "../my place/run").is_file()
    assert {path: path.stat().st_mtime_ns for path in times} == times


def test_a_choice_follows_its_profile(run: Path, tmp_path: Path):
    copy = copied(run, tmp_path)
    folder = copy / "profiles" / "tiny"
    chosen = (folder / "choice.json").read_text()
    other = json.loads(chosen) | {"small": 2, "large": 1, "chosen_from": "another profile"}
    (folder / "choice.json").write_text(json.dumps(other))
    assert not read_run(copy).choices["tiny"]
    assert secateur.study(out=copy).is_file()
    assert (folder / "choice.json").read_text() == chosen


def test_a_broken_plan_or_journal_is_an_error_with_its_place(run: Path, tmp_path: Path):
    copy = copied(run, tmp_path)
    plan, journal = (copy / "plan.json").read_text(), (copy / "steps.jsonl").read_text()
    (copy / "steps.jsonl").write_text(journal + '{"step": "b", "outc')
    assert secateur.study(out=copy).is_file()
    assert (copy / "steps.jsonl").read_text() == journal
    (copy / "steps.jsonl").write_text("broken\n" + journal)
    with pytest.raises(DataError, match=r"steps\.jsonl, line 1"):
        secateur.read_status(copy)
    (copy / "steps.jsonl").write_text(journal)
    for broken in (
        "{",
        "{}",
        "[]",
        *(plan.replace(f'"{key}": ', f'"{key}": "many", "":') for key in ("depth", "rows")),
    ):
        assert broken != plan
        (copy / "plan.json").write_text(broken)
        for go_on in (lambda: secateur.read_status(copy), lambda: secateur.study(out=copy)):
            with pytest.raises(DataError, match=r"plan\.json: is not a whole plan"):
                go_on()
    (copy / "plan.json").unlink()
    with pytest.raises(DataError, match=r"plan\.json: no such file: secateur study resume .* makes it again"):
        secateur.read_status(copy)


def test_a_plan_is_shown_and_nothing_is_written(place: Path, tmp_path: Path, monkeypatch, capsys):
    state = secateur.plan_study(
        [place / "tiny"], data=[place / "words.jsonl"], tasks=[str(place / "task")], batch_size=8, out=tmp_path / "run"
    )
    assert {state.of(step) for step in state.plan.steps} == {"waiting"}
    assert all(step.seconds and step.seconds > 0 for step in state.plan.steps)
    assert state.seconds_left == pytest.approx(sum(step.seconds or 0 for step in state.plan.steps))
    assert not (tmp_path / "run").exists()
    words = ["study", place / "tiny", "--data", place / "words.jsonl", "--tasks", place / "task"]
    words += ["--batch-size", "8", "-o", tmp_path / "run"]
    monkeypatch.setattr(sys, "argv", ["secateur", *map(str, words), "--plan"])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 0
    assert "heal tiny-(chosen)-polished" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


def test_the_papers_study_is_on_the_english_tasks_of_mteb(place: Path, tmp_path: Path):
    tiny_transformer(tmp_path / "ten", "llama", depth=10)
    data = [place / "words.jsonl"]
    state = secateur.plan_study([tmp_path / "ten"], preset="paper", data=data, batch_size=8, out=tmp_path / "run")
    steps = [step for step in state.plan.steps if step.kind == "evaluate"]
    assert steps
    for step in steps:
        assert len(step.options.tasks) == 56
        assert "MTEB(eng, v1)/STS17" in step.options.tasks
    models = {step.output.name for step in state.plan.models}
    assert {f"ten-{depth}-healed" for depth in (*range(2, 11), "(large)", "(small)")} <= models
    first = next(step for step in state.plan.steps if step.kind == "prune")
    assert (first.options.model, first.options.pooling) == (str(tmp_path / "ten"), "weighted_mean")


def test_status_and_resume_are_commands(run: Path, place: Path, tmp_path: Path, monkeypatch, capsys):
    def command(*words: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["secateur", *map(str, words)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        said = capsys.readouterr()
        return int(caught.value.code or 0), said.out + said.err

    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    assert "waiting" not in command("study", "status", copy)[1]
    shutil.rmtree(copy / "scores" / VARIANTS[2])
    code, said = command("study", "status", copy)
    assert code == 0
    assert "2 waiting" in said  # the costs wait for all others
    (copy / "plan.json").unlink()
    edit(copy, "ray", "127.0.0.1:9")  # of a cluster that is gone
    assert command("study", "resume", copy, "--ray", "")[0] == 0
    assert "waiting" not in command("study", "status", copy)[1]
    assert secateur.read_scores(copy).to_dicts()[2]["score"] == secateur.read_scores(run).to_dicts()[2]["score"]
    for what in ("status", "resume"):
        assert command("study", what, tmp_path / "nowhere") == (
            2,
            f"secateur: {tmp_path / 'nowhere'}: holds no study: name the folder that `secateur study` was given\n",
        )


def test_one_models_failure_leaves_the_others_whole(run: Path, place: Path, tmp_path: Path):
    """The weights of a finished step's model are spoilt: what needs it fails with a log, the rest is done."""
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    for gone in (*(copy / "scores").iterdir(), copy / "models" / VARIANTS[2]):
        shutil.rmtree(gone)
    (copy / "costs.json").unlink()
    shutil.rmtree(copy / "cache")
    (copy / "pruned" / "tiny-1" / "model.safetensors").write_bytes(b"spoilt")
    with pytest.raises(StudyFailed) as caught:
        secateur.study(out=copy)
    assert list(caught.value.failed) == [f"heal {VARIANTS[2]}"]
    assert "Traceback" in (copy / "logs" / f"heal-{VARIANTS[2]}.log").read_text()
    assert caught.value.page is not None
    assert {row.model for row in load(copy, Costs).rows} == set(VARIANTS[:2])
    assert {row.model for row in secateur.read_scores(copy).rows} == set(VARIANTS[:2])
    state = secateur.read_status(copy)
    assert {step.name: state.of(step) for step in state.plan.steps if state.of(step) != "done"} == {
        f"heal {VARIANTS[2]}": "failed",
        f"evaluate {VARIANTS[2]}": "blocked",
    }


def test_hidden_files_do_not_stop_a_study_but_other_files_do(place: Path, run: Path, tmp_path: Path):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    for name in (".costs.json.0123abcd", ".DS_Store"):  # half written before a kill; of macOS, which showed the folder
        (copy / name).write_text("{")
    assert secateur.study(out=copy).is_file()
    (copy / "mine.txt").write_text("mine")
    with pytest.raises(OutputError, match="already holds something else"):
        secateur.study(out=copy)


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


def test_a_second_study_in_a_folder_is_refused(place: Path, run: Path):
    with lock(run / "done"), pytest.raises(OutputError, match="another run is working in it") as refused:
        run_study(place)
    assert refused.value.path == run
