"""Plans as data, and running them: what comes after what, what goes on after a failure, what the journal says."""

from __future__ import annotations

import errno
import json
import re
import threading
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from secateur.errors import ConfigError, IllegalDepth, OutputError
from secateur.files import output_error
from secateur.options import HealOptions, PruneOptions, StudyOptions, make
from secateur.provenance import provenance
from secateur.reporting.run import read_journal
from secateur.results import DepthRow, DepthScoreRow, LayerCost, Profile, RungRow, Scout
from secateur.studies.plan import plan_steps
from secateur.studies.runner import Executor, Scheduler, on_ray
from secateur.studies.steps import Base, Plan, State, Step
from secateur.studies.study import PRESETS

BASES = [Base("big", "org/big", 10), Base("tiny", "tiny", 4)]


def options(**given: object) -> StudyOptions:
    return make(
        StudyOptions, {"models": ["org/big", "tiny"], "data": ["a.jsonl"], "tasks": ["t"], "out": "run", **given}
    )


def profile_of(base: str, losses: list[float | None]) -> Profile:
    rows = tuple(DepthRow(i + 1, loss, 0.0, 0.1, 1.0) for i, loss in enumerate(losses))
    return Profile(provenance(), base, len(losses), "mean", 20.0, "float32", 8, 1, 32, "", rows)


def names(plan: Plan) -> list[str]:
    return [step.output.name for step in plan.models]


def waiting_for(plan: Plan, step: str) -> list[str]:
    """The steps that cannot be done without this one."""
    return [found.name for found in plan.steps if found.name in plan.blocked({step})]


def test_models_depths_recipes_and_seeds_are_multiplied():
    study = options(
        depths=["2", "uniform:2"], recipes={"none": {}, "lora": {}, "blocks": {"train": "blocks"}}, seeds=[1, 2]
    )
    plan = plan_steps(study, BASES, {}, {})
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


def test_a_vocabulary_is_cut_last():
    study = options(vocab_size=8000, depths=["2"], recipes={"none": {}, "taught": {}}, teacher="self")
    steps = {step.name: step for step in plan_steps(study, BASES[1:], {}, {}).steps}
    for made, source in (
        ("tiny-4-trimmed", "models/tiny-4-zero-shot"),
        ("tiny-2-trimmed", "pruned/tiny-2"),
        ("tiny-2-taught", "trained/tiny-2-taught"),
    ):
        said = f"secateur prune run/{source} --vocab a.jsonl --vocab-size 8000 -o run/models/{made}"
        assert steps[f"trim {made}"].command_line == said
        assert steps[f"evaluate {made}"].depends_on == (f"trim {made}",)
    assert (
        steps["profile tiny"].options.model
        == steps["prune tiny-2-trimmed"].options.model
        == "run/models/tiny-4-zero-shot"
    )
    assert steps["heal tiny-2-taught"].options.model == "run/pruned/tiny-2"
    assert steps["heal tiny-2-taught"].options.teacher == "run/models/tiny-4-zero-shot"
    assert "heal tiny-4-taught" not in steps
    assert {"evaluate tiny-4-zero-shot", "evaluate tiny-4-trimmed"} <= steps.keys()
    scouted = plan_steps(options(vocab=["b.txt"], teacher="self"), BASES[1:], {}, {})
    steps = {step.name: step for step in scouted.steps}
    assert steps["scout tiny"].options.model == steps["profile tiny"].options.model == "run/models/tiny-4-zero-shot"
    assert steps["scout tiny"].options.teacher == "run/models/tiny-4-zero-shot"
    assert steps["scout tiny"].depends_on == ("prune tiny-4-zero-shot", "trim tiny-4-trimmed")
    assert steps["trim tiny-4-trimmed"].options.vocab == [Path("b.txt")]
    assert [name for name in names(scouted) if "(" not in name][:2] == ["tiny-4-zero-shot", "tiny-4-trimmed"]
    for name in ("trimmed", "scout", "polished", "baseline"):  # the report would take its models for others
        with pytest.raises(ConfigError, match=f"^recipes: {name} is what a study calls other models"):
            plan_steps(options(depths=["2"], recipes={name: {}}), BASES, {}, {})


@pytest.mark.parametrize(
    "given", [{"depths": ["0.3", "2", "large"]}, {}, {"vocab_size": 8000}, {"tasks": []}, {"polish": [4, 1]}]
)
def test_every_step_comes_after_those_that_it_needs_and_makes_something_of_its_own(given):
    plan = plan_steps(options(**given, seeds=[1, 2]), BASES, {}, {})
    seen: set[str] = set()
    for step in plan.steps:
        assert seen.issuperset(step.depends_on), step.name
        seen.add(step.name)
    assert len(seen) == len(plan.steps) == len({step.output for step in plan.steps})


def test_what_a_profile_decides_stands_open_until_it_is_there():
    study = options(depths=["small", "1"])
    before = plan_steps(study, BASES[1:], {}, {})
    assert "tiny-(small)-healed" in names(before)
    cut = ["prune tiny-(small)", "heal tiny-(small)-healed", "evaluate tiny-(small)-healed"]
    assert waiting_for(before, "profile tiny") == [*cut, "cost all"]
    after = plan_steps(study, BASES[1:], {"tiny": profile_of("tiny", [3.0, 2.0, 1.0, 2.0])}, {})
    assert names(after) == ["tiny-4-zero-shot", "tiny-4-healed", "tiny-2-healed", "tiny-1-healed"]
    same = plan_steps(study, BASES[1:], {"tiny": profile_of("tiny", [1.0, 2.0, 1.0, 2.0])}, {})
    assert names(same) == ["tiny-4-zero-shot", "tiny-4-healed", "tiny-1-healed"]


@pytest.mark.parametrize(
    ("given", "tasks"), [({}, None), ({"depth_scores": True}, ["task"]), ({"depths": ["best-task"]}, ["task"])]
)
def test_profiles_score_the_tasks_where_it_is_asked_for_or_needed(given, tasks):
    plan = plan_steps(options(tasks=["task"], sample=50, **given), BASES, {}, {})
    measured = [step.options for step in plan.steps if step.kind == "profile"]
    assert [step.tasks or None for step in measured] == [tasks] * len(BASES)
    assert [step.sample for step in measured] == [50 if tasks else None] * len(BASES)


def test_a_profile_that_does_not_tell_fails_its_depths_alone():
    study = options(depths=["small", "1"])
    plan = plan_steps(study, BASES[1:], {"tiny": profile_of("tiny", [None] * 4)}, {})
    assert list(plan.failed) == ["prune tiny-(small)"]
    assert plan.blocked(plan.failed) == {"heal tiny-(small)-healed", "evaluate tiny-(small)-healed"}
    assert [Path(model).name for model in plan.steps[-1].options.models] == [
        "tiny-4-zero-shot",
        "tiny-4-healed",
        "tiny-1-healed",
    ]


@pytest.mark.parametrize(
    ("given", "error", "key"),
    [
        ({"depths": ["2"], "recipes": {"a-b": {}}}, ConfigError, "recipes"),
        ({"depths": ["2"], "recipes": {"none": {"steps": 3}}}, ConfigError, "recipes"),
        ({"depths": ["2"], "recipes": {"mine": {"steps": 0}}}, ConfigError, "recipes.mine.steps"),
        ({"depths": ["2"], "recipes": {"mine": {"stepz": 1}}}, ConfigError, "recipes.mine.stepz"),
        ({"depths": ["2"], "recipes": {"mine": {"seed": 1}}}, ConfigError, "recipes.mine.seed"),
        ({"recipes": {"mine": {}}}, ConfigError, "recipes"),
        ({"depths": ["chosen"]}, ConfigError, "depths"),
        ({"depths": ["2"], "ladder": [2]}, ConfigError, "ladder"),
        ({"depths": ["2"], "polish": [2]}, ConfigError, "polish"),
        ({"depths": ["2"], "layers": "uniform"}, ConfigError, "layers"),
        ({"depths": ["2"], "tolerance": 2.0}, ConfigError, "tolerance"),
        ({"depths": ["2"], "best": True}, ConfigError, "best"),
        ({"depths": ["2"], "max_params": 1e6}, ConfigError, "max_params"),
        ({"ladder": [2, 5]}, IllegalDepth, None),
        ({"polish": [5]}, IllegalDepth, None),
        ({"depths": ["half"]}, ConfigError, "depths"),
        ({"depths": ["2.5"]}, ConfigError, "depths"),
        ({"depths": ["block-influence:11"]}, IllegalDepth, None),
        ({"depths": ["5"]}, IllegalDepth, None),
    ],
)
def test_a_description_that_is_not_right_is_refused_with_its_place(given, error, key):
    with pytest.raises(error) as caught:
        plan_steps(options(**given), BASES, {}, {})
    assert key is None or (caught.value.key == key and str(caught.value).startswith(f"{key}: "))


@pytest.mark.parametrize("given", [{"seeds": [1, 1]}, {"seeds": ["x"]}, {"jobs": 0}, {"recipes": 3}])
def test_options_that_are_not_right_are_refused(given):
    with pytest.raises(ConfigError) as caught:
        options(**given)
    assert caught.value.key.split(".")[0] == next(iter(given))


def test_commands_say_what_their_options_say():
    """Each command, parsed again, gives the options of the step."""
    plan = plan_steps(options(depths=["2"], steps=7, gradient_checkpointing=True), BASES[1:], {}, {})
    heal = next(step for step in plan.steps if step.name == "heal tiny-2-healed")
    assert heal.command[:3] == ("secateur", "heal", "run/pruned/tiny-2")
    assert "--gradient-checkpointing" in heal.command
    words = dict(zip(heal.command[3::1], heal.command[4::1], strict=False))
    assert words["--steps"] == "7"
    assert heal.options.steps == 7


def test_mapped_columns_go_to_every_command_that_reads_the_data():
    study = options(columns="query=question,positive=best answer", depths=["2"], data=["hf:org/set:all[train]"])
    assert study.columns == {"query": "question", "positive": "best answer"}
    lines = [
        step.command_line for step in plan_steps(study, BASES[1:], {}, {}).steps if step.kind in ("profile", "heal")
    ]
    assert len(lines) == 3
    assert all(
        "--data 'hf:org/set:all[train]'" in line and "--columns 'query=question,positive=best answer'" in line
        for line in lines
    )
    for value in ("query", "query=", ["query=a,=b"]):
        with pytest.raises(ConfigError, match=r"columns: .* of the form query=question"):
            options(columns=value)


def test_the_whole_teaches_its_parts_and_not_itself():
    plan = plan_steps(options(depths=["0.25", "0.5", "0.75"], teacher="self"), BASES[1:], {}, {})
    assert names(plan) == ["tiny-4-zero-shot", "tiny-3-healed", "tiny-2-healed", "tiny-1-healed"]
    heals = [step for step in plan.steps if step.kind == "heal"]
    assert {step.options.teacher for step in heals} == {"run/models/tiny-4-zero-shot"}


# With a scout ---------------------------------------------------------------------------------------------------------


def scout_of(lows: dict[int, float], depth: int = 4, judge: str = "tasks", task: str = "t") -> Scout:
    """Each rung scores half; the lower end of its difference to the full depth is told."""
    rungs = [RungRow(k, True, 0.5, 0.4, 0.6, low + 0.01, low, low + 0.02) for k, low in sorted(lows.items())]
    rungs.append(RungRow(depth, True, 0.5, 0.4, 0.6, 0.0))
    scores = tuple(DepthScoreRow(task, "Retrieval", "ndcg_at_10", rung.depth, 0.5) for rung in rungs)
    costs = tuple(LayerCost(layer, 100, 400, 1.0, 1e-3, 1e-3) for layer in range(depth + 1))
    return Scout(provenance(), "tiny", depth, judge, tuple(rungs), scores, costs)


def lines_of(plan: Plan) -> dict[str, str]:
    return {step.name: step.command_line for step in plan.steps}


def test_what_a_scout_decides_stands_open_until_it_is_there():
    before = plan_steps(options(steps=100), BASES[1:], {}, {})
    assert names(before) == ["tiny-4-zero-shot", "tiny-4-scout", "tiny-(chosen)-scout", "tiny-(chosen)-polished"]
    own = ["prune tiny-4-scout", "evaluate tiny-4-scout", "prune tiny-(chosen)-scout", "evaluate tiny-(chosen)-scout"]
    polished = ["heal tiny-(chosen)-polished", "evaluate tiny-(chosen)-polished"]
    assert waiting_for(before, "scout tiny") == [*own, *polished, "cost all"]
    after = plan_steps(options(steps=100), BASES[1:], {}, {"tiny": scout_of({1: -0.3, 2: -0.005, 3: 0.0})})
    assert names(after) == ["tiny-4-zero-shot", "tiny-4-scout", "tiny-2-scout", "tiny-2-polished"]
    lines, data = lines_of(after), "--data a.jsonl"
    assert lines["scout tiny"] == (
        f"secateur scout run/models/tiny-4-zero-shot {data} --steps 25 --tasks t -o run/scouts/tiny"
    )
    assert lines["prune tiny-4-scout"] == "secateur prune run/scouts/tiny/model --to 4 -o run/models/tiny-4-scout"
    assert lines["prune tiny-2-scout"] == "secateur prune run/scouts/tiny/model --to 2 -o run/models/tiny-2-scout"
    assert lines["heal tiny-2-polished"] == (  # what the scout left, twice at half of the depth
        f"secateur heal run/models/tiny-2-scout {data} --steps 150 -o run/models/tiny-2-polished"
    )
    assert [step.name for step in after.steps if step.kind == "evaluate"] == [f"evaluate {m}" for m in names(after)]


@pytest.mark.parametrize(
    ("given", "polished"),
    [
        ({}, [2]),
        ({"tolerance": 40.0}, [1]),
        ({"tolerance": 0.0}, [3]),
        ({"max_params": 200}, [1]),
        ({"polish": [1, 3]}, [3, 1]),
        ({"polish": [4, 2]}, [4, 2]),
    ],
)
def test_the_depth_is_chosen_by_scores_and_budget_or_by_the_user(given, polished):
    plan = plan_steps(options(**given), BASES[1:], {}, {"tiny": scout_of({1: -0.3, 2: -0.005, 3: 0.0})})
    assert [name for name in names(plan) if "polished" in name] == [f"tiny-{depth}-polished" for depth in polished]
    assert [name for name in names(plan) if "scout" in name] == [
        f"tiny-{k}-scout" for k in sorted({4, *polished})[::-1]
    ]
    assert lines_of(plan).get("heal tiny-3-polished", "--steps 1000").split("--steps ")[1][:4] == "1000"


def test_depths_that_the_user_polishes_wait_for_no_choice():
    plan = plan_steps(options(polish=[2]), BASES[1:], {}, {})
    assert names(plan) == ["tiny-4-zero-shot", "tiny-4-scout", "tiny-2-scout", "tiny-2-polished"]


def test_where_no_smaller_depth_is_good_enough_the_whole_is_polished():
    plan = plan_steps(options(), BASES[1:], {}, {"tiny": scout_of({1: -0.3, 2: -0.2, 3: -0.1})})
    assert names(plan) == ["tiny-4-zero-shot", "tiny-4-scout", "tiny-4-polished"]
    assert "--steps 750 " in lines_of(plan)["heal tiny-4-polished"]


def test_a_budget_that_nothing_fits_fails_the_cut_alone():
    plan = plan_steps(options(max_params=1), BASES[1:], {}, {"tiny": scout_of({2: 0.0})})
    assert list(plan.failed) == ["prune tiny-(chosen)-scout"]
    assert [Path(model).name for model in plan.steps[-1].options.models] == ["tiny-4-zero-shot", "tiny-4-scout"]


def test_without_tasks_the_rows_that_the_scout_held_out_score_and_are_not_trained_on():
    before = plan_steps(options(tasks=[]), BASES[1:], {}, {})
    waiting = {"evaluate tiny-4-zero-shot", "evaluate tiny-4-scout", "heal tiny-(chosen)-polished"}
    assert waiting <= set(waiting_for(before, "scout tiny"))
    scout = scout_of({2: 0.0}, judge="pairs", task="a-held-out")
    plan = plan_steps(options(tasks=[]), BASES[1:], {}, {"tiny": scout})
    lines, held = lines_of(plan), "run/scouts/tiny/tasks/a-held-out"
    for name in names(plan):
        assert f"--tasks {held} " in lines[f"evaluate {name}"]
    assert f"--exclude {held} " in lines["heal tiny-2-polished"]
    assert "--exclude" not in lines["scout tiny"]


def test_each_seed_has_a_scout_and_the_first_ones_scores_choose():
    study = options(seeds=[3, 5])
    plan = plan_steps(study, BASES[1:], {}, {"tiny-seed3": scout_of({2: 0.0})})
    expected = [f"tiny-{what}-seed{seed}" for seed in (3, 5) for what in ("4-scout", "2-scout", "2-polished")]
    assert names(plan) == ["tiny-4-zero-shot", *expected]
    lines = lines_of(plan)
    assert "--seed 5 --tasks t -o run/scouts/tiny-seed5" in lines["scout tiny-seed5"]
    assert lines["prune tiny-2-scout-seed5"].startswith("secateur prune run/scouts/tiny-seed5/model --to 2 ")
    assert "--seed 5 " in lines["heal tiny-2-polished-seed5"]
    before = plan_steps(study, BASES[1:], {}, {})
    cut = next(step for step in before.steps if step.name == "prune tiny-(chosen)-scout-seed5")
    assert set(cut.depends_on) == {"scout tiny-seed3", "scout tiny-seed5"}
    held = plan_steps(options(seeds=[3, 5], tasks=[]), BASES[1:], {}, {"tiny-seed3": scout_of({2: 0.0}, task="a")})
    folder = "run/scouts/tiny-seed3/tasks/a"  # all are scored on the same rows, which none is trained on
    assert f"--exclude {folder} " in lines_of(held)["scout tiny-seed5"]
    assert f"--tasks {folder} " in lines_of(held)["scout tiny-seed5"]
    assert f"--tasks {folder} " in lines_of(held)["evaluate tiny-2-polished-seed5"]


def test_a_scout_is_taught_by_the_whole_and_so_is_its_polish():
    plan = plan_steps(options(**PRESETS["shrink"]), BASES[1:], {}, {"tiny": scout_of({2: 0.0})})
    taught = [step.options for step in plan.steps if step.kind in ("scout", "heal")]
    assert len(taught) == 2
    assert {(step.teacher, step.cache) for step in taught} == {("run/models/tiny-4-zero-shot", Path("run/cache"))}


def test_estimates_are_corrected_by_what_has_finished():
    told = {"short": 1.0, "long": 60.0, "other": 39.0, "unknown": None}
    kinds = {"short": "prune", "long": "heal", "other": "profile", "unknown": "evaluate"}
    steps = [Step(name, kinds[name], HealOptions.model_construct(), Path(name), seconds=told[name]) for name in told]
    assert State(Plan(steps), (), {}, {}, {}).expected == told
    state = State(Plan(steps), {"short"}, {}, {}, {"short": 12.0})  # twelve times as long, but it was one of a hundred
    assert state.expected == {"short": 12.0, "long": 120.0, "other": 78.0, "unknown": None}
    assert state.seconds_left == 198.0
    state = State(Plan(steps), {"long"}, {}, {}, {"long": 200.0})
    assert state.expected == {"short": 3.0, "long": 200.0, "other": 117.0, "unknown": None}
    shown, body = state._repr_html_().split("</p>")  # what a notebook shows
    assert shown == "<p>1 done, 3 waiting; about 120\N{NO-BREAK SPACE}s left"
    cells = re.findall("<td>(.*?)</td>", body)
    times = ["about 3.0\N{NO-BREAK SPACE}s", "200\N{NO-BREAK SPACE}s", "about 117\N{NO-BREAK SPACE}s", "?"]
    assert cells[0::4] == [*told]
    assert cells[1::4] == ["waiting", "done", "waiting", "waiting"]
    assert cells[3::4] == times


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


def test_a_step_that_can_never_be_done_is_in_the_journal(tmp_path: Path):
    plan = Plan([step(tmp_path, "a"), step(tmp_path, "b"), step(tmp_path, "c", "b")], {"b": "no depth fits"})
    scheduler = Scheduler(tmp_path, lambda _: plan, Executor(1, lambda one, _: one.output.touch()), lambda _: None)
    assert scheduler.go() == {"b": "no depth fits"}
    assert outcomes(tmp_path) == [("b", "failed"), ("a", "started"), ("a", "done")]


def test_two_steps_run_at_once(tmp_path: Path):
    meeting = threading.Barrier(2, timeout=20)

    def do(name: str) -> None:
        if name in "ab":
            meeting.wait()  # neither ends before the other has begun

    steps = [step(tmp_path, "a"), step(tmp_path, "b"), step(tmp_path, "c", "a")]
    assert work(tmp_path, steps, do, slots=3)[0] == {}


@pytest.mark.parametrize("given", [{"depths": ["1", "2"]}, {}])
def test_what_is_timed_waits_for_all_else_but_what_failed(given):
    plan = plan_steps(options(**given), BASES, {}, {})
    *others, cost = plan.steps
    assert cost.depends_on == tuple(step.name for step in others)
    failed = next(step.name for step in plan.steps if step.kind == "evaluate")
    assert failed not in plan_steps(options(**given), BASES, {}, {}, {failed}).steps[-1].depends_on


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


@pytest.mark.parametrize(
    ("gpus", "jobs", "slots", "cores", "share"),
    [(2, 1, 2, 4, 1.0), (2, 4, 4, 2, 0.5), (2, 3, 3, 2, 0.5), (0, 1, 8, 1, 0.0), (0, 3, 3, 2, 0.0)],
)
def test_steps_on_a_cluster_share_its_gpus(
    gpus: int, jobs: int, slots: int, cores: int, share: float, tmp_path: Path, monkeypatch, capsys
):
    """A task that asks for no GPU sees none; and a share fits on one, for else it would wait for ever."""
    asked: list[dict[str, float]] = []

    def remote(**needs: float) -> Callable[[object], object]:
        options = lambda **more: asked.append(needs | more) or SimpleNamespace(remote=lambda *_: None)  # noqa: E731
        return lambda _: SimpleNamespace(options=options)

    nodes = [{"Alive": alive, "Resources": {"CPU": cpus}} for alive, cpus in ((True, 4.0), (True, 4.0), (False, 1.0))]
    nodes += [{"Alive": True, "Resources": {}}]  # a head that computes nothing
    ray = SimpleNamespace(
        cluster_resources=lambda: {"CPU": 8.0} | ({"GPU": float(gpus)} if gpus else {}),
        nodes=lambda: nodes,
        remote=remote,
        get=lambda _: None,
        exceptions=SimpleNamespace(RayTaskError=RuntimeError),
    )
    monkeypatch.setattr("secateur.studies.runner.ray_cluster", lambda address: nullcontext(ray))
    executor = on_ray("auto", jobs)
    assert executor.slots == slots
    for kind in ("heal", "evaluate", "prune"):
        executor.run(replace(step(tmp_path, kind), kind=kind), tmp_path / "log")
    assert [need["num_gpus"] for need in asked] == [share, share, 0]
    assert {need["num_cpus"] for need in asked} == {cores}
    assert ("no GPU" in capsys.readouterr().err) == (gpus == 0)
