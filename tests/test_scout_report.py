"""The report of a run with a scout: what to do, what every depth is worth, and where each number comes from."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from secateur.errors import ConfigError, DataError
from secateur.reporting.card import CARD_MARK
from secateur.reporting.findings import summarize
from secateur.reporting.report import report
from secateur.reporting.run import read_run
from secateur.reporting.tables import rung_table
from secateur.reporting.verdict import notes, recommend, scout_sentences
from secateur.results import (
    CostRow,
    Costs,
    DepthScoreRow,
    LayerCost,
    LossRow,
    Origin,
    RungRow,
    ScoreRow,
    Scores,
    Scout,
    Training,
    VocabularyCut,
    VocabularyRow,
    load,
)
from test_report import NLI, SICK, TASKS, made, model_row, plain, read, write_profile

COMMAND = "secateur scout org/tiny --data allnli.jsonl.gz --tasks eval --steps 60 -o scouts/tiny"
RUNGS = (
    RungRow(3, True, 0.503, 0.481, 0.525, -0.091, -0.107, -0.075),
    RungRow(4, True, 0.581, 0.559, 0.603, -0.006, -0.0093, 0.002),
    RungRow(5, False, 0.584, 0.562, 0.606, -0.003, -0.0085, 0.004),
    RungRow(6, True, 0.591, 0.569, 0.613, 0.004, -0.004, 0.012),
    RungRow(8, True, 0.587, 0.565, 0.609, 0.0),
)
MEAN = {"tiny-8-zero-shot": 0.301, "tiny-8-scout": 0.592, "tiny-4-scout": 0.585, "tiny-4-polished": 0.604}
PARAMETERS = {8: 40_000_000, 4: 18_400_000}
SPEEDS = {8: (100.0, 96.0, 104.0), 4: (230.0, 222.0, 241.0)}


def write_scout(run: Path, name: str = "tiny", chosen: int | None = 4, rungs=RUNGS, seed: int = 7) -> Path:
    folder, full = run / "scouts" / name, max(row.depth for row in rungs)
    scores = tuple(
        DepthScoreRow(task, kind, metric, row.depth, row.score + add, row.low, row.high, samples)
        for (task, kind, metric, samples), add in zip(TASKS, (0.02, -0.02), strict=True)
        for row in rungs
        if row.score == row.score
    )
    costs = tuple(LayerCost(k, 1_000_000 if k else 8_000_000, 4, 1.0, 0.001, 0.002) for k in range(full + 1))
    notes = ("words.jsonl: 3 rows were left out",)
    Scout(made(COMMAND, seed, NLI), "tiny", full, "tasks", tuple(rungs), scores, costs, notes).save(folder)
    losses = tuple(LossRow(step, 3.0 - step / 100, 1e-4) for step in (20, 40, 60))
    settings = {"learning_rate": 3e-4, "depths": [3, 4, 6, 8]}
    Training(made(COMMAND, seed, NLI), "tiny-8-zero-shot", 60, 412.0, 1_000_000, settings, {}, losses).save(
        folder / "model"
    )
    if chosen is not None:
        (folder / "choice.json").write_text(json.dumps({"chosen": chosen}))
    return folder


def write_model(run: Path, name: str, mean: float, seed: int = 7, own: float = 0.0005) -> None:
    """A model with its scores, whose draws are the rows' noise, shared by all models, and a little of its own."""
    depth, recipe = int(name.split("-")[1]), name.partition("-")[2].partition("-")[2]
    history = ["secateur prune org/tiny --to 8"]
    history += [COMMAND, f"secateur prune scouts/tiny/model --to {depth}"] if recipe != "zero-shot" else []
    history += ["secateur heal models/tiny-4-scout --steps 120"] if "polished" in recipe else []
    folder = run / "models" / name
    Origin(made(history[-1]), "org/tiny", 8, tuple(range(depth)), "mean", 1.5e-7, tuple(history)).save(folder)
    if "polished" in recipe:
        losses = (LossRow(120, 1.234, 1e-4),)
        settings = {"learning_rate": 3e-4}
        Training(made(history[-1], seed, SICK), "tiny-4-scout", 120, 77.0, 99, settings, {}, losses).save(folder)
    rows = []
    for place, (task, kind, metric, samples) in enumerate(TASKS):
        file = run / "scores" / name / "draws" / f"{task}.npy"
        file.parent.mkdir(parents=True, exist_ok=True)
        shared = np.random.default_rng(place).normal(0, 0.02, 2000)
        np.save(file, mean + shared + np.random.default_rng([place, depth, seed]).normal(0, own, 2000))
        row = ScoreRow(name, task, kind, metric, mean, samples, 1.0, data=task, unit="rows", units=samples, draws=task)
        rows.append(row)
    Scores(made(f"secateur evaluate {name}"), tuple(rows)).save(run / "scores" / name)


def write_run(run: Path) -> Path:
    write_profile(run)
    write_scout(run)
    rows = []
    for name, mean in MEAN.items():
        write_model(run, name, mean)
        depth = int(name.split("-")[1])
        rows.append(CostRow(name, depth, PARAMETERS[depth], 10_000_000, 4321 * depth, *SPEEDS[depth]))
    Costs(made("secateur cost models"), tuple(rows)).save(run)
    (run / "study.yaml").write_text("models: [org/tiny]\ntolerance: null\nbest: false\nmax_params: null\n")
    return run


def test_a_depth_of_evenly_spaced_layers_has_their_parameters(tmp_path: Path) -> None:
    table = load(write_scout(tmp_path), Scout)
    costs = [*table.layer_costs[:-1], replace(table.layer_costs[-1], parameters=5_000_000)]  # the last is larger
    replace(table, layers="uniform", layer_costs=tuple(costs)).save(tmp_path / "scouts" / "tiny")
    rows = rung_table(read_run(tmp_path).scouts[0]).rows
    assert [plain(str(row[2])) for row in rows] == ["15.0 M", "16.0 M", "17.0 M", "18.0 M", "20.0 M"]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("secateur.figures.rendered", lambda figure: b"")
    return write_run(tmp_path / "demo")


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With its report, to be read only."""
    folder = write_run(tmp_path_factory.mktemp("reported") / "demo")
    report(folder)
    return folder


def told(run: Path) -> list[str]:
    """What is said of the scout."""
    return [plain(line) for line in scout_sentences(read_run(run))]


def found(run: Path):
    return recommend(summarize(read_run(run)))


def rewrite(run: Path, *rungs: RungRow, **study) -> None:
    """Other rungs, and what the study was asked for."""
    write_scout(run, rungs=rungs or RUNGS)
    (run / "study.yaml").write_text(json.dumps(study))


def choose(run: Path, depth: int) -> None:
    (run / "scouts" / "tiny" / "choice.json").write_text(json.dumps({"chosen": depth}))


def test_the_choice_of_the_scout_is_told_and_what_it_made_is_shipped(reported: Path) -> None:
    (choice,) = told(reported)
    assert choice == (
        "tiny, on your 2 tasks: 4 of 8 layers, the fewest that lose at most 1 point at 95 % confidence: −0.6 points "
        "(95 % interval −0.9 to +0.2) against all 8 in the same training; with 3 layers −9.1 points (95 % interval "
        "−10.7 to −7.5). 75 % of the parameters, 1.8 × the speed."
    )
    draws = [
        np.mean([np.load(reported / f"scores/{name}/draws/{task[0]}.npy") for task in TASKS], axis=0)
        for name in ("tiny-4-polished", "tiny-8-scout")
    ]
    low, high = 100 * np.quantile(draws[0] - draws[1], [0.025, 0.975])
    page, markdown = read(reported / "report.html"), (reported / "report.md").read_text(encoding="utf-8")
    assert choice in plain(page.text)
    assert choice in plain(markdown)
    shipped = found(reported)
    assert plain(shipped.headline) == (
        f"Ship tiny-4-polished: +1.2 points (+{low:.1f} to +{high:.1f}, significantly better), 2.30 × as fast, 50 % of "
        "the size."
    )
    assert "relative to tiny-8-scout, the full model" in shipped.reasons[0]
    assert shipped.reasons[0].endswith(
        "It had only the scout’s training; trained further in the same way, it might score higher."
    )
    assert shipped.command(reported) == f"secateur serve {reported / 'models' / 'tiny-4-polished'}"


@pytest.mark.parametrize(
    ("chosen", "study", "words"),
    [
        (6, {"tolerance": 0.5}, "tiny, on your 2 tasks: 6 of 8 layers, the fewest that lose at most 0.5 points"),
        (6, {"best": True}, "tiny, on your 2 tasks: 6 of 8 layers, the highest of 5 scores: +0.4 points (95 %"),
        (3, {"max_params": 11e6}, "Note: more may be lost than the tolerance."),
        (3, {}, "3 of 8 layers are chosen; by these scores it would be this: 4 of 8 layers, the fewest"),
        (7, {}, "7 of 8 layers are chosen; by these scores it would be this: 4 of 8 layers"),
        (4, {"max_params": 1}, "4 of 8 layers are chosen: max_params: no depth has at most 1 parameter:"),
    ],
    ids=["stricter", "best", "budget", "edited", "not scored", "another budget"],
)  # fmt: skip
def test_a_choice_is_said_to_be_what_it_was_asked_to_be(run: Path, chosen: int, study, words: str) -> None:
    rewrite(run, **study)
    choose(run, chosen)
    assert words in told(run)[0]


def test_where_the_scout_cuts_nothing_all_layers_are_kept(run: Path) -> None:
    shutil.copytree(run / "scouts" / "tiny", run / "scouts" / "tiny-seed2")  # the first seed's scout decides
    (run / "scouts" / "tiny-seed2" / "choice.json").unlink()
    choose(run, 8)
    for name in ("tiny-4-scout", "tiny-4-polished"):
        shutil.rmtree(run / "models" / name)
        shutil.rmtree(run / "scores" / name)
    assert found(run).headline.startswith("Keep all layers for now: no smaller depth is shown to be as good.")
    rewrite(run, best=True)
    choose(run, 8)
    assert found(run).headline.startswith("Keep all layers for now: no smaller depth has a higher score.")
    rewrite(run, max_params=1)
    assert found(run).headline.startswith("Ship nothing yet: no model here fits your budget of 1 parameters.")


def test_a_broken_study_is_an_error_that_names_what_is_wrong(run: Path) -> None:
    rewrite(run, tolerance="much")
    with pytest.raises(ConfigError, match="tolerance"):
        report(run)
    (run / "study.yaml").write_text("- a list\n")
    with pytest.raises(DataError, match=r"study\.yaml"):
        report(run)


def test_where_a_teacher_judges_texts_a_cut_may_lose_five_points_of_similarity(run: Path) -> None:
    for part in ("models", "scores"):
        shutil.rmtree(run / part / "tiny-4-scout")
    write_model(run, "tiny-4-polished", 0.554)
    assert found(run).headline.startswith("Keep tiny-8-scout")
    replace(load(run / "scouts" / "tiny", Scout), judge="texts").save(run / "scouts" / "tiny")
    assert found(run).headline.startswith("Ship tiny-4-polished: −3.8 points")
    assert "at most 5 points" in told(run)[0]


def test_a_difference_that_may_be_none_is_called_so(run: Path) -> None:
    write_model(run, "tiny-4-polished", 0.593, own=0.01)
    assert "Ship tiny-4-polished: +0.1 points (−" in found(run).headline
    assert "no significant difference" in found(run).headline


def test_without_the_scouts_full_depth_a_polished_model_is_compared_with_the_untrained_one(run: Path) -> None:
    for part in ("models", "scores"):
        shutil.rmtree(run / part / "tiny-8-scout")
    (run / "costs.json").unlink()
    assert "+30.3 points" in found(run).headline and "relative to tiny-8-zero-shot" in found(run).reasons[0]


def test_a_full_depth_that_was_polished_too_is_the_one_to_compare_with(run: Path) -> None:
    write_model(run, "tiny-8-polished", 0.61)
    assert "Ship tiny-4-polished: −0.6 points (" in found(run).headline
    assert "relative to tiny-8-polished" in found(run).reasons[0] and "scout’s training" not in found(run).reasons[0]


def test_the_scout_that_decided_is_told_and_other_seeds_count_as_repetitions(run: Path) -> None:
    for part in ("models", "scores"):
        for name in list((run / part).iterdir()):
            if name.name != "tiny-8-zero-shot":
                shutil.rmtree(name)
    shutil.rmtree(run / "scouts")
    (run / "costs.json").unlink()
    write_scout(run, "tiny-seed1", 4, seed=1)
    write_scout(run, "tiny-seed2", None, [*RUNGS[:1], replace(RUNGS[1], difference=-0.011), *RUNGS[2:]], seed=2)
    for seed, mean in ((1, 0.60), (2, 0.61)):
        write_model(run, f"tiny-4-polished-seed{seed}", mean, seed)
        write_model(run, f"tiny-8-scout-seed{seed}", 0.592, seed)
    (choice,) = told(run)
    assert choice.startswith("tiny-seed1, on your 2 tasks: 4 of 8 layers, the fewest that lose at most 1 point")
    shipped = found(run)
    assert shipped.headline.startswith(
        "Not decided yet: tiny-4-polished shows no significant difference (+1.3 points, "
    )
    assert shipped.headline.endswith("test queries or pairs and train more seeds before you ship it.")
    assert {v.name: v.scout.name for v in read_run(run).variants if v.scout} == {
        f"tiny-{which}-seed{seed}": f"tiny-seed{seed}" for which in ("4-polished", "8-scout") for seed in (1, 2)
    }


def test_the_scouts_section_has_every_depth_with_what_was_measured_there(reported: Path) -> None:
    page = read(reported / "report.html")
    sections = [a["id"] for tag, a in page.tags if tag == "h2" and "id" in a]
    assert sections == [
        *("frontier", "tasks", "sure", "worth", "size", "depth", "models", "costs", "training", "commands"),
        "provenance",
    ]
    rows = {
        row[0]: [plain(cell) for cell in row[1:]] for row in page.cells if row[1:2] in (["trained"], ["scored only"])
    }
    assert list(rows) == ["3", "4 chosen", "5", "6", "8"]
    assert rows["4 chosen"] == ["trained", "12.0 M", "58.155.9 to 60.3", "−0.6−0.9 to +0.2"]
    assert rows["5"][0] == "scored only"
    assert rows["3"][3] == "−9.1−10.7 to −7.5 ▼ worse"
    assert rows["8"][2:4] == ["58.756.5 to 60.9", "–"]
    assert "Note: words.jsonl: 3 rows were left out." in page.text
    assert "of the band, at most 1 point may be lost." in page.text
    assert ["4", "60.155.9 to 60.3", "56.155.9 to 60.3"] in page.cells
    assert (reported / "figures" / "frontier-1.png").read_bytes().startswith(b"\x89PNG")
    assert "(figures/frontier-1.png)" in (reported / "report.md").read_text(encoding="utf-8")


def test_where_a_scouts_numbers_come_from(reported: Path) -> None:
    page, markdown = read(reported / "report.html"), (reported / "report.md").read_text(encoding="utf-8")
    assert COMMAND in page.text and COMMAND in markdown and NLI.sha256 in page.text
    assert "Scout of tiny; training of the scout of tiny" in page.text  # in the commands
    assert "the scout of tiny: 60 steps in" in page.text and "tiny-4-polished: 120 steps in" in page.text
    assert "tiny-4-scout: 60 steps" not in page.text  # a cut has no training of its own


def test_a_card_names_the_scout_that_its_model_is_from(reported: Path) -> None:
    card = plain((reported / "models" / "tiny-4-polished" / "README.md").read_text(encoding="utf-8"))
    assert CARD_MARK in card
    assert "from a training of several depths at once, then trained alone." in card
    assert "Training continued from tiny-4-scout, which has a scout's weights." in card
    assert "Scout: secateur scout org/tiny --data allnli.jsonl.gz --tasks eval --steps 60 -o scouts/tiny" in card
    assert NLI.sha256 in card and SICK.sha256 in card  # of the scout's data, and of its own
    cut = (reported / "models" / "tiny-4-scout" / "README.md").read_text(encoding="utf-8")
    assert "from a training of several depths at once." in cut and "alone" not in cut
    assert "not been trained after the cut" in cut
    whole = (reported / "models" / "tiny-8-scout" / "README.md").read_text(encoding="utf-8")
    assert "60 steps" in whole and "not been trained" not in whole
    assert "as they came" in (reported / "models" / "tiny-8-zero-shot" / "README.md").read_text(encoding="utf-8")


@pytest.fixture
def trimmed(run: Path) -> Path:
    """All models but the one that came have 8,000 tokens, and the whole one is there with these, untrained."""
    write_model(run, "tiny-8-trimmed", 0.289, seed=8)
    row = VocabularyRow(8000, 0.962, 0.31, 24.1, unknown=0.0004)
    cut = VocabularyCut(row, 49152, 22.0, 24000, ("/home/me/texts.txt",), {"SICK-R": 0.95, "NLI": 0.9})
    for folder in (run / "models").iterdir():
        if folder.name != "tiny-8-zero-shot":
            replace(load(folder, Origin), vocabulary=cut).save(folder)
    sizes = {"tiny-8-zero-shot": 40_000_000, "tiny-8-trimmed": 30_000_000, "tiny-4-polished": 12_000_000}
    costs = [CostRow(name, int(name[5]), size, 10_000_000, 4321, 100.0, 96.0, 104.0) for name, size in sizes.items()]
    Costs(made("secateur cost models"), tuple(costs)).save(run)
    return run


def test_a_cut_vocabulary_is_told_with_what_it_costs(trimmed: Path) -> None:
    assert found(trimmed).headline.startswith("Ship tiny-4-polished: +1.2 points (")
    page = read(report(trimmed))
    row = [plain(cell) for cell in model_row(page, "tiny-8-trimmed")]
    assert row[2:4] == ["8,000 of 49,152", "30.0 M"]
    assert any(cell.startswith("−1.2−1.") and "to tiny, zero-shot" in cell for cell in row)
    remarks = [plain(note) for note in notes(summarize(read_run(trimmed)))]
    assert remarks[0] == (
        "tiny: the vocabulary has 90.0 % of the tokens of the task NLI, of texts that were held out 96.2 %: it was cut "
        "by texts of another language or kind."
    )
    assert not [note for note in remarks if "SICK-R" in note]  # covered well enough


def test_a_cut_vocabulary_has_its_section_its_columns_and_its_place_in_the_card(trimmed: Path) -> None:
    page = read(report(trimmed))
    for said in (
        "Vocabulary: 8,000 of 49,152 tokens, chosen by 24,000 texts of /home/me/texts.txt.",
        "Newly unknown tokens: 0.04 %.",
        "Of the tokens of tasks stay: SICK-R 95.0 %, NLI 90.0 %.",
    ):
        assert said in plain(page.text)
    assert "8,000 of 49,152" in model_row(page, "tiny-4-polished")
    assert "8,000 of 49,152" not in model_row(page, "tiny-8-zero-shot")
    assert any("+1.2" in cell and "tiny, scout" in cell for cell in model_row(page, "tiny-4-polished"))
    assert {"tiny, trimmed", "tiny, zero-shot", "tiny, polished"} <= {v.series for v in read_run(trimmed).variants}
    cards = {
        name: plain((trimmed / "models" / name / "README.md").read_text(encoding="utf-8"))
        for name in ("tiny-8-zero-shot", "tiny-8-trimmed", "tiny-4-polished")
    }
    for said in (
        "of org/tiny with 8,000 of 49,152 tokens",
        "Vocabulary: 8,000 of 49,152 tokens, chosen by 24,000 texts of texts.txt.",
        "96.2 % of the tokens stay, and 31.0 % of the texts have one that does not; a text has 24.1 tokens on average, "
        "22.0 before.",
        "Newly unknown tokens: 0.04 %.",
        "Its vocabulary is for texts like those of texts.txt. Others, above all in other languages and scripts, are",
        "Its tokenizer does not cover every character",
        "Its biases are those of the base model",
    ):
        assert all(said in cards[name] for name in ("tiny-8-trimmed", "tiny-4-polished")), said
        assert said not in cards["tiny-8-zero-shot"]


def test_a_scout_alone_is_enough(tmp_path: Path) -> None:
    write_scout(tmp_path, chosen=None)
    page = read(report(tmp_path))
    assert {a["id"] for tag, a in page.tags if tag == "h2" and "id" in a} == {
        *("worth", "training", "commands", "provenance"),
    }
    assert told(tmp_path)[0].startswith("tiny, on your 2 tasks: no depth is chosen yet; by these scores it would be")
    scout = load(tmp_path / "scouts" / "tiny", Scout)
    one = tuple(row for row in scout.task_scores if row.task == TASKS[0][0])
    replace(scout, task_scores=one).save(tmp_path / "scouts" / "tiny")
    assert told(tmp_path)[0].startswith("tiny, on your task: ")


def test_a_depth_without_a_score_is_shown_and_not_told(run: Path) -> None:
    rewrite(run, replace(RUNGS[0], score=float("nan"), difference=float("nan")), *RUNGS[1:])
    assert load(run / "scouts" / "tiny", Scout).rows[0].score is None
    page = read(report(run))
    assert next(row for row in page.cells if row[:2] == ["3", "trained"])[3].startswith("–")
    assert "against all 8 in the same training; with 3 layers no score." in told(run)[0]


@pytest.mark.parametrize("choice", ['{"chosen": 9}', '{"chosen": true}', "[2]", "{"])
def test_a_broken_choice_of_a_scout_is_an_error_and_nothing_is_written(run: Path, choice: str) -> None:
    (run / "scouts" / "tiny" / "choice.json").write_text(choice)
    with pytest.raises(DataError, match=r"choice\.json"):
        report(run)
    assert not (run / "report.html").exists()
