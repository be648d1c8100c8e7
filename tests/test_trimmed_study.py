"""Studies that cut the vocabulary: the last thing that is done to a model, beside the one as it came."""

from __future__ import annotations

import csv
import json
import shutil
import sys
from itertools import chain, pairwise
from pathlib import Path

import pytest
import yaml
from sentence_transformers import SentenceTransformer
from transformers import AutoTokenizer

import secateur
from conftest import tiny_transformer, write_pairs
from published import CORPUS, write_model
from quick_checks import quick_checks as quick_checks
from secateur import cli
from secateur.choosing.budgets import cut_cost
from secateur.errors import ConfigError, UnsupportedArchitecture
from secateur.reporting.run import read_run, read_scout
from secateur.results import Costs, Origin, Scout, Training, load
from secateur.studies.study import join_tables
from task_folders import example_rows, sentences, write_task
from test_report import plain

SIZE = 300
OPTIONS = {"steps": 8, "batch_size": 8, "learning_rate": 1e-3, "precision": "float32", "max_examples": 16}
OPTIONS |= {"sample": 16, "profile_dtype": "float32", "vocab_size": SIZE}
WHOLE, TRIMMED, CUT = "tiny-6-zero-shot", "tiny-6-trimmed", ("tiny-6-scout", "tiny-2-scout", "tiny-2-polished")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, pairs about trees, a task about trees, and one about something else."""
    place = tmp_path_factory.mktemp("trimmed")
    write_model(place / "tiny", "bert")
    texts = sentences(120)
    write_pairs(place / "trees.jsonl", [{"query": text, "positive": f"{text} {text}"} for text in texts])
    (place / "trees.txt").write_text("\n".join(texts))
    write_task(place / "task", "sts", example_rows("sts"))
    lines = list(dict.fromkeys(line.strip() for line in CORPUS if len(line) > 30))
    rows = [{"sentence1": a, "sentence2": b, "score": i % 5} for i, (a, b) in enumerate(pairwise(lines[:40]))]
    write_task(place / "manual", "sts", {"test": rows})
    return place


@pytest.fixture(scope="module")
def run(place: Path, quick_checks: None) -> Path:
    tasks = [str(place / name) for name in ("task", "manual")]
    data = [place / "trees.jsonl"]
    options = OPTIONS | {"data": data, "tasks": tasks, "ladder": [2, 6], "polish": [2]}
    secateur.study([place / "tiny"], **options, out=place / "run")
    return place / "run"


def tokens_of(run: Path, name: str) -> dict[str, int]:
    return AutoTokenizer.from_pretrained(run / "models" / name).get_vocab()


def test_the_vocabulary_is_cut_last_and_the_model_as_it_came_is_measured_too(run: Path):
    assert [row.model for row in load(run, Costs).rows] == [WHOLE, TRIMMED, *CUT]
    before = tokens_of(run, WHOLE)
    assert load(run / "models" / WHOLE, Origin).vocabulary is None
    record = load(run / "models" / TRIMMED, Origin).vocabulary
    for name in (TRIMMED, *CUT):
        assert len(tokens_of(run, name)) == SIZE == record.row.tokens < len(before) == record.tokens
        assert load(run / "models" / name, Origin).vocabulary == record
    costs = {row.model: row for row in load(run, Costs).rows}
    gone = costs[WHOLE].parameters - costs[TRIMMED].parameters
    assert gone == costs[WHOLE].embedding_parameters - costs[TRIMMED].embedding_parameters
    assert gone * len(before) == costs[WHOLE].embedding_parameters * (len(before) - SIZE)
    assert load(run / "models" / TRIMMED, Origin).kept == load(run / "models" / WHOLE, Origin).kept
    assert load(run / "scouts" / "tiny", Scout).provenance.command.split()[2] == str(run / "models" / WHOLE)
    for folder in ("scouts/tiny/model", "pruned/tiny-2", f"trained/{CUT[2]}"):
        assert load(run / folder, Origin).vocabulary is None
    trained, cut = (SentenceTransformer(str(run / folder / CUT[2]), device="cpu") for folder in ("trained", "models"))
    kept = [text for text in sentences(120) if set(trained.tokenizer.tokenize(text)) <= tokens_of(run, CUT[2]).keys()]
    assert kept
    assert cut.encode(kept) == pytest.approx(trained.encode(kept), abs=1e-6)
    variants = {variant.name: variant for variant in read_run(run).variants}
    assert variants[CUT[2]].own_training == load(run / "trained" / CUT[2], Training)
    variant = variants[TRIMMED]
    assert (variant.recipe, variant.selection, variant.is_full) == ("trimmed", "", True)


def test_the_table_says_how_the_vocabulary_was_cut(run: Path):
    rows = {row["variant"]: row for row in join_tables(run) if row["task"] == "task"}
    assert {name: (row["tokens"], row["recipe"]) for name, row in rows.items()} == {
        WHOLE: (None, "none"),
        TRIMMED: (SIZE, "none"),
        CUT[0]: (SIZE, "scout"),
        CUT[1]: (SIZE, "scout"),
        CUT[2]: (SIZE, "polished"),
    }
    assert rows[TRIMMED]["of_tokens"] == len(tokens_of(run, WHOLE))
    assert rows[TRIMMED]["vocabulary_from"].endswith("trees.jsonl")
    with (run / "table.csv").open() as stream:
        found = {row["variant"]: row for row in csv.DictReader(stream)}
    assert found[WHOLE]["coverage"] == "" and float(found[TRIMMED]["coverage"]) == rows[TRIMMED]["coverage"]


def test_tasks_of_other_texts_than_those_that_chose_the_tokens_are_told(run: Path, place: Path):
    old, new = AutoTokenizer.from_pretrained(run / "models" / WHOLE), tokens_of(run, TRIMMED)
    rows = map(json.loads, (place / "manual" / "test.jsonl").read_text().splitlines())
    texts = dict.fromkeys(chain.from_iterable((row["sentence1"], row["sentence2"]) for row in rows))
    tokens = list(chain.from_iterable(map(old.tokenize, texts)))
    coverage = load(run / "models" / TRIMMED, Origin).vocabulary.task_coverage
    assert coverage["manual"] == pytest.approx(sum(token in new for token in tokens) / len(tokens))
    assert coverage["manual"] < 0.95 < coverage["task"]
    (note,) = secateur.read_status(run).plan.notes
    assert "the task manual" in note and f"{100 * coverage['manual']:.1f}" in note
    assert plain(note) in plain((run / "report.md").read_text())


def test_the_note_stands_in_the_plan_and_on_standard_error(run: Path, place: Path, tmp_path: Path, monkeypatch, capsys):
    def command(*words: object) -> tuple[str, str]:
        monkeypatch.setattr(sys, "argv", ["secateur", *map(str, words)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        assert caught.value.code == 0
        return capsys.readouterr()

    told = "the vocabulary has"
    assert command("study", "status", run)[0].count(told) == 1
    assert command("study", "resume", run)[1].count(told) == 1
    words = ("--vocab", place / "trees.jsonl", "--vocab-size", SIZE, "--vocab-tasks", place / "manual", place / "task")
    assert command("prune", place / "tiny", *words, "-o", tmp_path / "cut")[1].count(told) == 1


def test_a_vocabulary_that_cannot_be_cut_is_refused_before_the_study_begins(place: Path, tmp_path: Path):
    words = tiny_transformer(tmp_path / "words")
    options = OPTIONS | {"data": place / "trees.jsonl", "tasks": [str(place / "task")]}
    with pytest.raises(UnsupportedArchitecture, match="of the kind WordLevel, of which no token can be spared"):
        secateur.plan_study([words], **options, out=tmp_path / "run")
    assert secateur.plan_study([words], **options | {"vocab_size": None}, out=tmp_path / "run").plan.steps


def test_a_finished_study_is_done_and_its_vocabulary_stays_as_it_is(run: Path, place: Path, tmp_path: Path):
    state = secateur.read_status(run)
    assert {state.of(step) for step in state.plan.steps} == {"done"}
    with pytest.raises(ConfigError, match=r"^vocab_size: is 310 here, but 300 in"):
        secateur.study(vocab_size=310, out=run)
    copy = shutil.copytree(run, tmp_path / "run")
    settings = yaml.safe_load((copy / "study.yaml").read_text())
    (copy / "study.yaml").write_text(yaml.safe_dump(settings | {"vocab_size": 310}))
    with pytest.raises(ConfigError, match=r"^vocab_size: changed in"):
        secateur.study(out=copy)


def test_the_report_and_the_cards_say_what_was_cut(run: Path):
    report = plain((run / "report.md").read_text())
    whole = len(tokens_of(run, WHOLE))
    assert f"Vocabulary: {SIZE} of {whole} tokens" in report
    cards = {name: plain((run / "models" / name / "README.md").read_text()) for name in (WHOLE, TRIMMED, CUT[2])}
    for name in (TRIMMED, CUT[2]):
        assert f"{SIZE} of {whole} tokens, chosen by 240 texts of trees.jsonl" in cards[name]
        assert "in other languages and scripts, are split into more tokens" in cards[name]
    assert "Vocabulary:" not in cards[WHOLE] and "its languages are those" in cards[WHOLE]


def test_a_budget_is_met_with_the_tokens_that_stay(run: Path):
    """The depth is chosen by what the finished models cost, not by what the scout's weigh."""
    costs = {row.model: row for row in load(run, Costs).rows}
    scout = read_scout(run / "scouts" / "tiny")
    for depth, name in ((6, CUT[0]), (2, CUT[1])):
        told = cut_cost(scout, range(depth))
        assert (told.parameters, told.bytes) == (costs[name].parameters, 4 * costs[name].parameters)
        assert told.bytes == costs[name].memory_bytes


def test_depths_that_are_named_are_taught_with_all_tokens(place: Path, quick_checks: None):
    """The whole model learns nothing from itself."""
    options = {"data": [place / "trees.txt"], "depths": ["6", "2"], "recipes": {"none": {}, "taught": {}}}
    options |= {"teacher": "self", "tasks": [str(place / "task")]}
    secateur.study([place / "tiny"], **OPTIONS | options, out=place / "grid")
    names = [WHOLE, TRIMMED, "tiny-2-trimmed", "tiny-2-taught"]
    assert [row.model for row in load(place / "grid", Costs).rows] == names
    assert Path(load(place / "grid" / "trained" / names[3], Training).settings["teacher"]).name == WHOLE
    assert load(place / "grid" / "pruned" / "tiny-2", Origin).vocabulary is None
    for name in names[2:]:
        assert load(place / "grid" / "models" / name, Origin).vocabulary.row.tokens == SIZE
