"""Scores by depth against ``evaluate`` on the models cut to each depth."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from conftest import MakeEncoder, example_pairs, tiny_transformer, write_pairs
from secateur.errors import ConfigError, DataError, OutputError
from secateur.evaluation.evaluate import evaluate
from secateur.evaluation.tasks import open_task
from secateur.models.cutting import cut
from secateur.models.open_model import open_model
from secateur.profiling.depth_scores import notes_on, score_depths
from secateur.profiling.depths import DepthEncoder
from secateur.profiling.profile import profile
from secateur.pruning.prune import prune
from secateur.results import Profile, Scores, load
from task_folders import TYPES, example_rows, write_task

SHARED = Path(os.environ.get("SECATEUR_SHARED", Path(__file__).parents[2] / "shared"))


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> list[Path]:
    home = tmp_path_factory.mktemp("tasks")
    return [write_task(home / kind, kind, example_rows(kind), name=kind, instruction="find it") for kind in TYPES]


def depth_scores(model, tasks, depths=(1, 2, 3)):
    found = list(score_depths(DepthEncoder(model), [(task, depths) for task in tasks]))
    return found, notes_on(found)


def assert_the_same(found: Profile, depth: int, scores: Scores) -> None:
    rows = {(row.task, row.depth): row for row in found.task_scores}
    assert len(rows) == len(scores.rows) * found.depth
    for row in scores.rows:
        same = rows[row.task, depth]
        assert (same.kind, same.metric, same.samples) == (row.type, row.metric, row.samples)
        assert same.score == pytest.approx(row.score, abs=1e-4), (row.task, depth)
        assert (same.low, same.high) == (pytest.approx(row.low, abs=1e-3), pytest.approx(row.high, abs=1e-3))


def test_scores_are_those_of_the_cut_models(tasks, llama_folder, pairs_file, tmp_path):
    options = {"batch_size": 8, "dtype": "float32", "tasks": tasks, "sample": 16}
    found = profile(llama_folder, pairs_file, **options, out=tmp_path / "out")
    assert load(tmp_path / "out", Profile) == found
    assert {item.name for item in found.provenance.data} >= {*TYPES}
    for depth in (1, 2, 3):
        model = open_model(llama_folder, dtype="float32")
        cut(model[0].auto_model, range(depth))
        assert_the_same(found, depth, evaluate([model], tasks, sample=16))


@pytest.mark.parametrize("prompts", [{"query": "find it;\n"}, {"query": "a: ", "document": "b: "}, {}])
def test_prompts_are_those_that_evaluate_chooses(tasks, make_encoder: MakeEncoder, prompts):
    model = make_encoder("llama", depth=2, prompts=prompts)
    own = [tasks[TYPES.index(kind)] for kind in ("retrieval", "sts")]
    expected = {row.task: row.score for row in evaluate([model], own, names=["m"]).rows}
    found, _ = depth_scores(model, [open_task(task) for task in own], (1, 2))
    assert {score.task: score.row.score for score in found if score.depth == 2} == pytest.approx(expected, abs=1e-4)
    assert model.prompts == {"query": "", "document": "", **prompts} and "encode" not in vars(model)


def test_each_text_is_run_once_for_all_depths(tasks, llama_folder):
    model = open_model(llama_folder, dtype="float32")
    ran = []
    model[0].auto_model.layers[0].register_forward_hook(lambda _, args, __: ran.append(len(args[0])))
    depth_scores(model, [open_task(tasks[TYPES.index("sts")])])
    assert sum(ran) <= 48 + 2 + 4  # is it blind to what follows; and quick ways are compared with the plain one


def test_some_depths_alone_have_the_same_scores_and_replicates(tasks, llama_folder):
    model, own = open_model(llama_folder, dtype="float32"), [open_task(task) for task in tasks[:5]]
    every, some = depth_scores(model, own)[0], depth_scores(model, own, [3, 1])[0]
    assert [score.depth for score in some] == [3, 1] * 5
    same = {(score.task, score.depth): score for score in every}
    for score in some:
        assert score.row == same[score.task, score.depth].row
        assert np.array_equal(score.replicates, same[score.task, score.depth].replicates)


def test_a_score_that_is_no_number_is_left_out_and_said(tasks, tmp_path):
    rows = example_rows("sts")
    for row in rows["test"]:  # the first letter is all that cls pooling sees
        row["sentence1"], row["sentence2"] = "w" + row["sentence1"], "w" + row["sentence2"]
    task = write_task(tmp_path / "same", "sts", rows, name="same")
    model = open_model(tiny_transformer(tmp_path / "llama", "llama", depth=2), pooling="cls", dtype="float32")
    found, notes = depth_scores(model, [open_task(task)], (1, 2))
    assert [(score.depth, score.row) for score in found] == [(1, None), (2, None)]
    assert notes == ["cosine_spearman on same is no number at depth 1, 2: the vectors there are all alike"]


def test_mistakes_are_found_before_the_pass(llama_folder, tmp_path, tasks):
    data = write_pairs(tmp_path / "pairs.jsonl", example_pairs())
    calls: list[str] = []
    for options, error, words in (
        ({"tasks": [tmp_path / "nonesuch"]}, DataError, "neither a task folder"),
        ({"tasks": [tasks[0], tasks[0]]}, ConfigError, "two tasks are called"),
        ({"sample": 5}, ConfigError, "give tasks"),
    ):
        with pytest.raises(error, match=words):
            profile(llama_folder, data, progress=lambda what, *_: calls.append(what), **options)
    assert not calls


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the full device is Linux's")
def test_a_full_disk_of_temporary_files_is_said(tasks, llama_folder, monkeypatch):
    monkeypatch.setattr("tempfile.TemporaryFile", lambda: Path("/dev/full").open("w+b"))  # noqa: SIM115
    with pytest.raises(OutputError, match="the disk is full"):
        depth_scores(open_model(llama_folder, dtype="float32"), [open_task(tasks[0])])


@pytest.mark.slow
@pytest.mark.skipif(not (SHARED / "data" / "eval").is_dir(), reason="the evaluation tasks are not here")
def test_smollm2_scores_are_those_of_the_cut_models(tmp_path):
    pytest.importorskip("gguf")
    tasks = [SHARED / "data" / "eval" / name for name in ("STSBenchmark", "TrecQA")]
    data = write_pairs(tmp_path / "pairs.jsonl", example_pairs())
    found = profile("smollm2", data, batch_size=8, dtype="float32", tasks=tasks, sample=5)
    pruned = prune("smollm2", 7, dtype="float32", out=tmp_path / "pruned")
    assert_the_same(found, 7, evaluate([pruned], tasks, sample=5))
