"""Plans as data, and running them: what comes after what, what goes on after a failure, what the journal says."""

from __future__ import annotations

import errno
import json
import threading
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest

from secateur.errors import ConfigError, IllegalDepth, OutputError
from secateur.files import output_error
from secateur.options import CostOptions, HealOptions, PruneOptions, StudyOptions, make
from secateur.provenance import provenance
from secateur.reporting.run import read_journal
from secateur.results import DepthRow, Profile
from secateur.studies.plan import PRESETS, Base, Plan, Step, plan_steps
from secateur.studies.runner import Executor, Scheduler, State, on_ray

BASES = [Base("big", "org/big", 10), Base("tiny", "tiny", 4)]


def options(**given: object) -> StudyOptions:
    return make(
        StudyOptions, {"models": ["org/big", "tiny"], "data": ["a.jsonl"], "tasks": ["t"], "out": "run", **given}
    )


def profile_of(base: str, losses: list[float | None]) -> Profile:
    rows = tuple(DepthRow(i + 1, loss, 0.0, 0.1, 1.0) for i, loss in enumerate(losses))
    return Profile(provenance(command="x"), base, len(losses), "mean", 20.0, "float32", 8, 1, 32, "", rows)


def names(plan: Plan) -> list[str]:
    return [variant.name for _, variant in plan.models]


def test_models_depths_recipes_and_seeds_are_multiplied():
    study = options(
        depths=["2", "uniform:2"], recipes={"none": {}, "lora": {}, "blocks": {"train": "blocks"}}, seeds=[1, 2]
    )
    plan = plan_steps(study, BASES, {})
    own = [name.removeprefix("tiny-") for name in names(plan) if name.startswith("tiny")]
    trained = [f"{recipe}-seed{seed}" for recipe in ("lora", "blocks") for seed in (1, 2)]
    expected = ["4-zero-shot", *(f"4-{t}" for t in trained)]
    for label in ("2", "2-uniform"):
        expected += [f"{label}-zero-shot", *(f"{label}-{t}" for t in trained)]
    assert sorted(own) == sorted(expected)
    assert len(names(plan)) == len(set(names(plan))) == 2 * len(expected)
    heal = next(step for step in plan.steps if step.name == "heal tiny-2-uniform-blocks-seed2")
    assert heal.command_line == (
        "secateur heal run/models/tiny-2-uniform-zero-shot --data a.jsonl --train blocks --seed 2 "
        "-o run/models/tiny-2-uniform-blocks-seed2"
    )


def test_every_step_comes_after_those_that_it_needs_and_makes_something_of_its_own():
    plan = plan_steps(options(depths=["0.3", "2", "large"], seeds=[1, 2]), BASES, {})
    seen: set[str] = set()
    for step in plan.steps:
        assert seen.issuperset(step.depends_on), step.name
        seen.add(step.name)
    assert len(seen) == len(plan.steps) == len({step.output for step in plan.steps})


def test_what_a_profile_decides_stands_open_until_it_is_there():
    study = options(depths=["small", "1"])
    before = plan_steps(study, BASES[1:], {})
    assert "tiny-(small)-healed" in names(before)
    waiting = next(step for step in before.steps if step.name == "heal tiny-(small)-healed")
    assert not waiting.known
    assert "profile tiny" in waiting.depends_on
    after = plan_steps(study, BASES[1:], {"tiny": profile_of("tiny", [3.0, 2.0, 1.0, 2.0])})
    assert names(after) == ["tiny-4-zero-shot", "tiny-4-healed", "tiny-2-healed", "tiny-1-healed"]
    assert all(step.known for step in after.steps)
    same = plan_steps(study, BASES[1:], {"tiny": profile_of("tiny", [1.0, 2.0, 1.0, 2.0])})
    assert [variant.specs for _, variant in same.models if variant.name == "tiny-1-healed"] == [("small", "1")]
    assert names(same) == ["tiny-4-zero-shot", "tiny-4-healed", "tiny-1-healed"]


@pytest.mark.parametrize(
    ("given", "tasks"), [({}, None), ({"depth_scores": True}, ["task"]), ({"depths": ["best-task"]}, ["task"])]
)
def test_profiles_score_the_tasks_where_it_is_asked_for_or_needed(given, tasks):
    plan = plan_steps(options(tasks=["task"], sample=50, **given), BASES, {})
    measured = [step.options for step in plan.steps if step.kind == "profile"]
    assert [step.tasks or None for step in measured] == [tasks] * len(BASES)
    assert [step.sample for step in measured] == [50 if tasks else None] * len(BASES)


def test_a_profile_that_does_not_tell_fails_its_depths_alone():
    study = options(depths=["small", "1"])
    plan = plan_steps(study, BASES[1:], {"tiny": profile_of("tiny", [None] * 4)})
    assert list(plan.failed) == ["prune tiny-(small)"]
    assert plan.blocked(plan.failed) == {"heal tiny-(small)-healed", "evaluate tiny-(small)-healed"}
    cost = plan.steps[-1]
    assert cost.known
    assert [Path(model).name for model in cost.options.models] == [
        "tiny-4-zero-shot",
        "tiny-4-healed",
        "tiny-1-healed",
    ]


@pytest.mark.parametrize(
    ("given", "error", "key"),
    [
        ({"recipes": {"a-b": {}}}, ConfigError, "recipes"),
        ({"recipes": {"none": {"steps": 3}}}, ConfigError, "recipes"),
        ({"recipes": {"mine": {"steps": 0}}}, ConfigError, "recipes.mine.steps"),
        ({"recipes": {"mine": {"stepz": 1}}}, ConfigError, "recipes.mine.stepz"),
        ({"recipes": {"mine": {"seed": 1}}}, ConfigError, "recipes.mine.seed"),
        ({"depths": ["half"]}, ConfigError, "to"),
        ({"depths": ["block-influence:11"]}, IllegalDepth, None),
        ({"depths": ["5"]}, IllegalDepth, None),
    ],
)
def test_a_description_that_is_not_right_is_refused_with_its_place(given, error, key):
    with pytest.raises(error) as caught:
        plan_steps(options(**given), BASES, {})
    assert key is None or caught.value.key == key


@pytest.mark.parametrize("given", [{"seeds": [1, 1]}, {"seeds": ["x"]}, {"jobs": 0}, {"recipes": 3}])
def test_options_that_are_not_right_are_refused(given):
    with pytest.raises(ConfigError) as caught:
        options(**given)
    assert caught.value.key.split(".")[0] == next(iter(given))


def test_commands_say_what_their_options_say():
    """Each command, parsed again, gives the options of the step."""
    plan = plan_steps(options(depths=["2"], steps=7, gradient_checkpointing=True), BASES[1:], {})
    heal = next(step for step in plan.steps if step.name == "heal tiny-2-healed")
    assert heal.command[:3] == ("secateur", "heal", "run/pruned/tiny-2")
    assert "--gradient-checkpointing" in heal.command
    words = dict(zip(heal.command[3::1], heal.command[4::1], strict=False))
    assert words["--steps"] == "7"
    assert heal.options.steps == 7


def test_mapped_columns_go_to_every_command_that_reads_the_data():
    study = options(columns="query=question,positive=best answer", depths=["2"], data=["hf:org/set:all[train]"])
    assert study.columns == {"query": "question", "positive": "best answer"}
    lines = [step.command_line for step in plan_steps(study, BASES[1:], {}).steps if step.kind in ("profile", "heal")]
    assert len(lines) == 3
    assert all(
        "--data 'hf:org/set:all[train]'" in line and "--columns 'query=question,positive=best answer'" in line
        for line in lines
    )
    for value in ("query", "query=", ["query=a,=b"]):
        with pytest.raises(ConfigError, match=r"columns: .* of the form query=question"):
            options(columns=value)


def test_the_whole_teaches_its_parts_and_not_itself():
    plan = plan_steps(options(**PRESETS["shrink"]), BASES[1:], {})
    assert names(plan) == ["tiny-4-zero-shot", "tiny-3-distilled", "tiny-2-distilled", "tiny-1-distilled"]
    heals = [step for step in plan.steps if step.kind == "heal"]
    assert {step.options.teacher for step in heals} == {"run/models/tiny-4-zero-shot"}


def test_estimates_are_corrected_by_what_has_finished():
    told = {"a": 10.0, "b": 10.0, "c": 4.0, "d": None}
    kinds = {"a": "heal", "b": "heal", "c": "profile", "d": "evaluate"}
    steps = [Step(name, kinds[name], HealOptions.model_construct(), Path(name), seconds=told[name]) for name in told]
    assert State(Plan(steps), (), {}, {}, {}).expected == told
    state = State(Plan(steps), {"a"}, {}, {}, {"a": 20.0})
    assert state.expected == {"a": 20.0, "b": 20.0, "c": 8.0, "d": None}
    assert state.seconds_left == 28.0


# Running --------------------------------------------------------------------------------------------------------------


def step(run: Path, name: str, *needed: str) -> Step:
    return Step(name, "prune", make(PruneOptions, {"model": "m", "out": run / name}), run / name, needed)


def work(run: Path, steps: list[Step], do, slots: int = 1) -> tuple[dict[str, str], list[State]]:
    """Run a plan whose steps make an empty file, after ``do``."""
    states: list[State] = []

    def run_one(one: Step, log: Path) -> None:
        do(one.name)
        one.output.touch()

    scheduler = Scheduler(
        run,
        make_plan=lambda _: Plan(steps),
        is_done=lambda one, _: one.output.exists(),
        record=lambda one, _: None,
        executor=Executor(slots, run_one),
        callback=states.append,
    )
    return scheduler.go(), states


def outcomes(run: Path) -> list[tuple[str, str]]:
    return [(entry["step"], entry["outcome"]) for entry in read_journal(run)]


def test_what_does_not_need_a_failed_step_goes_on_and_a_second_run_does_the_rest(tmp_path: Path):
    steps = [step(tmp_path, "a"), step(tmp_path, "b", "a"), step(tmp_path, "c"), step(tmp_path, "d", "b", "c")]
    broken = {"b"}

    def do(name: str) -> None:
        if name in broken:
            raise ValueError("broken\nin two lines")

    failed, states = work(tmp_path, steps, do)
    assert failed == {"b": "ValueError: broken in two lines"}
    assert {one.name: states[-1].of(one) for one in steps} == {"a": "done", "b": "failed", "c": "done", "d": "blocked"}
    broken.clear()
    assert work(tmp_path, steps, do)[0] == {}
    ended = [name for name, outcome in outcomes(tmp_path) if outcome == "done"]
    assert sorted(ended) == ["a", "b", "c", "d"]
    entries = {(e["step"], e["outcome"]): e for e in read_journal(tmp_path)}
    assert entries["b", "failed"]["error"] == "ValueError: broken in two lines"
    assert entries["b", "done"]["command"] == f"secateur prune m -o {tmp_path / 'b'}"


def test_two_steps_run_at_once_and_what_is_timed_runs_alone(tmp_path: Path):
    meeting = threading.Barrier(2, timeout=20)
    at_work: set[str] = set()
    beside: dict[str, set[str]] = {}

    def do(name: str) -> None:
        at_work.add(name)
        if name in "ab":
            meeting.wait()  # neither ends before the other has begun
        beside[name] = set(at_work)
        at_work.discard(name)

    options = make(CostOptions, {"models": ["m"], "out": tmp_path / "timed"})
    steps = [Step("timed", "cost", options, tmp_path / "timed")]
    steps += [step(tmp_path, "a"), step(tmp_path, "b"), step(tmp_path, "c", "a")]
    failed, _ = work(tmp_path, steps, do, slots=3)
    assert failed == {}
    assert beside["timed"] == {"timed"}


def test_the_journal_survives_a_torn_line_and_a_result_without_its_line(tmp_path: Path):
    entry = {"step": "a", "outcome": "started", "started": "then", "command": "x"}
    (tmp_path / "steps.jsonl").write_text(json.dumps(entry) + '\n{"step": "b", "outc')
    (tmp_path / "a").touch()
    begun: list[str] = []
    assert work(tmp_path, [step(tmp_path, "a"), step(tmp_path, "b", "a")], begun.append)[0] == {}
    assert begun == ["b"]
    assert outcomes(tmp_path) == [("a", "started"), ("b", "started"), ("b", "done")]


def test_a_place_that_cannot_be_written_ends_the_study(tmp_path: Path):
    begun: list[str] = []

    def do(name: str) -> None:
        begun.append(name)
        raise output_error(tmp_path, OSError(errno.ENOSPC, "No space left on device"))

    with pytest.raises(OutputError, match="full"):
        work(tmp_path, [step(tmp_path, "a"), step(tmp_path, "b")], do)
    assert begun == ["a"]


def test_a_place_that_holds_something_else_fails_its_step_alone(tmp_path: Path):
    def do(name: str) -> None:
        if name == "a":
            raise OutputError(tmp_path / "a", "already holds something else")

    failed, _ = work(tmp_path, [step(tmp_path, "a"), step(tmp_path, "b")], do)
    assert list(failed) == ["a"]
    assert outcomes(tmp_path)[-1] == ("b", "done")


def test_steps_on_a_cluster_share_its_gpus(monkeypatch: pytest.MonkeyPatch):
    """A task that asks for no GPU does not see any."""
    asked: list[dict[str, float]] = []
    ray = SimpleNamespace(
        cluster_resources=lambda: {"CPU": 8.0, "GPU": 2.0},
        remote=lambda **needs: asked.append(needs) or (lambda _: None),
    )
    monkeypatch.setattr("secateur.studies.runner.ray_cluster", lambda address: nullcontext(ray))
    assert [on_ray("auto", jobs).slots for jobs in (1, 4)] == [8, 4]
    assert asked == [{"num_cpus": 1, "num_gpus": 0.25}, {"num_cpus": 2, "num_gpus": 0.5}]
