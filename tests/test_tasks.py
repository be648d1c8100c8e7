from __future__ import annotations

import gzip
import importlib
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import mteb
import pytest

import secateur.evaluation
from secateur.errors import ConfigError, DataError
from secateur.evaluation.task_folder import (
    DISTRACTORS_PER_QUERY,
    TRAIN_PER_LABEL,
    read_task_folder,
    sample_task,
    texts_of,
)
from secateur.evaluation.tasks import count_samples, expand, open_task
from task_folders import TYPES, example_rows, write_lines, write_task


@pytest.mark.parametrize("type_", TYPES)
def test_every_type_becomes_a_loaded_mteb_task(type_: str, tmp_path: Path):
    path = write_task(tmp_path / "mine", type_, example_rows(type_), licence="MIT", instruction="Do it", notes="Ours.")
    task = open_task(path)
    made = task.make()
    assert made.data_loaded
    assert (task.name, made.metadata.type.lower()) == ("mine", type_.replace("_", ""))
    assert count_samples(made) == 24
    assert "MIT" in made.metadata.description
    assert made.metadata.prompt == ({"query": "Do it"} if task.asymmetric else "Do it")
    assert task.asymmetric == (type_ in ("retrieval", "reranking"))


def test_labels_become_integers_in_the_order_of_their_names(tmp_path: Path):
    rows = example_rows("classification")
    data = open_task(write_task(tmp_path / "t", "classification", rows)).make().dataset
    assert data["test"]["label"] == [int(row["label"][-1]) for row in rows["test"]]
    assert data["train"]["text"] == [row["text"] for row in rows["train"]]


def test_retrieval_keeps_ids_titles_and_grades(tmp_path: Path):
    rows = example_rows("retrieval")
    rows["corpus"][0]["title"] = "A title"
    rows["qrels"][0] = ("q0", "d0", 3)
    split = open_task(write_task(tmp_path / "t", "retrieval", rows)).make().dataset["default"]["test"]
    assert split["corpus"][0] == {"id": "d0", "title": "A title", "text": rows["corpus"][0]["text"]}
    assert texts_of(read_task_folder(tmp_path / "t"))[0] == f"A title {rows['corpus'][0]['text']}"  # as mteb encodes it
    assert split["relevant_docs"]["q0"] == {"d0": 3}


def test_gzip_and_blank_lines_change_nothing(tmp_path: Path):
    rows = example_rows("sts")
    plain = read_task_folder(write_task(tmp_path / "plain", "sts", rows))
    packed = write_task(tmp_path / "packed", "sts", {})
    lines = "\n\n".join(json.dumps(row) for row in rows["test"])
    (packed / "test.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    assert read_task_folder(packed).tables == plain.tables


@pytest.mark.parametrize(("kind", "name"), [("sts", "test.jsonl"), ("sts", "task.json"), ("retrieval", "qrels.tsv")])
def test_a_byte_order_mark_is_left_out(kind: str, name: str, tmp_path: Path):
    file = write_task(tmp_path / "t", kind, example_rows(kind)) / name
    plain = read_task_folder(tmp_path / "t")
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    marked = read_task_folder(tmp_path / "t")
    assert (marked.tables, marked.type, marked.name) == (plain.tables, plain.type, plain.name)


def test_empty_documents_leave_the_corpus_but_not_the_judgments(tmp_path: Path):
    rows = example_rows("retrieval")
    rows["corpus"][0]["text"] = " "
    split = open_task(write_task(tmp_path / "t", "retrieval", rows)).make().dataset["default"]["test"]
    assert "d0" not in split["corpus"]["id"]
    assert split["relevant_docs"]["q0"] == {"d0": 1}


def test_the_fingerprint_follows_the_data_and_the_metric_only(tmp_path: Path):
    rows = example_rows("sts")
    one = read_task_folder(write_task(tmp_path / "one", "sts", rows))
    renamed = read_task_folder(write_task(tmp_path / "two", "sts", rows, notes="other"))
    metric = read_task_folder(write_task(tmp_path / "three", "sts", rows, metric="cosine_pearson"))
    rows["test"][0]["score"] += 1
    changed = read_task_folder(write_task(tmp_path / "four", "sts", rows))
    hashes = [task.source.sha256 for task in (one, renamed, metric, changed)]
    assert hashes[0] == hashes[1]
    assert len(set(hashes)) == 3


def replaced(table: str, index: int, **values: object):
    def change(rows):
        row = rows[table][index]
        rows[table][index] = {key: value for key, value in (row | values).items() if value is not ...}

    return change


def appended(table: str, *new: object):
    return lambda rows: rows[table].extend(new)


@pytest.mark.parametrize(
    ("type_", "change", "file", "line", "field", "says"),
    [
        ("sts", replaced("test", 4, score=...), "test.jsonl", 5, "score", "is missing"),
        ("sts", replaced("test", 4, score="high"), "test.jsonl", 5, "score", "not a number"),
        ("sts", replaced("test", 4, score=True), "test.jsonl", 5, "score", "not a number"),
        ("sts", replaced("test", 0, sentence2="  "), "test.jsonl", 1, "sentence2", "text is empty"),
        ("sts", replaced("test", 0, sentence1=3), "test.jsonl", 1, "sentence1", "not a text"),
        ("sts", replaced("test", 0, sentence1=None), "test.jsonl", 1, "sentence1", "not a text"),
        ("sts", appended("test", ["a", "b", 1]), "test.jsonl", 25, None, "not an object"),
        ("sts", lambda rows: rows["test"].clear(), "test.jsonl", None, None, "no rows"),
        ("sts", lambda rows: [row.update(score=2) for row in rows["test"]], "test.jsonl", None, "score", "every row"),
        ("sts", lambda rows: rows.pop("test"), "test.jsonl", None, None, "no such file"),
        ("pair_classification", replaced("test", 1, label=2), "test.jsonl", 2, "label", "not 0 or 1"),
        ("pair_classification", replaced("test", 1, label="1"), "test.jsonl", 2, "label", "not 0 or 1"),
        ("classification", replaced("test", 2, label="new"), "test.jsonl", 3, "label", "does not occur in train"),
        ("classification", replaced("train", 2, label=[1]), "train.jsonl", 3, "label", "not a text"),
        ("classification", replaced("train", 2, label=None), "train.jsonl", 3, "label", "not a text"),
        ("sts", replaced("test", 4, score=10**400), "test.jsonl", 5, "score", "not a number"),
        ("retrieval", replaced("corpus", 3, _id=1e17), "corpus.jsonl", 4, "_id", "too large to tell ids apart"),
        ("retrieval", replaced("corpus", 3, _id=True), "corpus.jsonl", 4, "_id", "not a text"),
        ("classification", lambda rows: rows.pop("train"), "train.jsonl", None, None, "no such file"),
        (
            "clustering",
            lambda rows: [r.update(label="x") for r in rows["test"]],
            "test.jsonl",
            None,
            "label",
            "every row",
        ),
        (
            "retrieval",
            appended("qrels", ("q1", "d999", 1)),
            "qrels.tsv",
            50,
            "corpus-id",
            "'d999' is not in corpus",
        ),
        (
            "retrieval",
            appended("qrels", ("q99", "d1", 1)),
            "qrels.tsv",
            50,
            "query-id",
            "'q99' is not in queries",
        ),
        ("retrieval", appended("qrels", ("q1", "d1", "1.5")), "qrels.tsv", 50, "score", "not an integer"),
        (
            "retrieval",
            appended("qrels", ("q1", "d1", "9" * 5000)),
            "qrels.tsv",
            50,
            "score",
            "not an integer of at most",
        ),
        (
            "retrieval",
            appended("qrels", ("q1", "d1")),
            "qrels.tsv",
            50,
            None,
            "has 2 columns, the first line 3",
        ),
        ("retrieval", appended("qrels", ("q0", "d0", 1)), "qrels.tsv", 50, None, "twice"),
        ("retrieval", replaced("corpus", 3, _id="d0"), "corpus.jsonl", 4, None, "'d0' occurs twice"),
        ("retrieval", replaced("corpus", 3, text=["x"]), "corpus.jsonl", 4, "text", "not a text"),
        ("retrieval", replaced("queries", 3, text=""), "queries.jsonl", 4, "text", "text is empty"),
        ("reranking", replaced("test", 3, negative=[]), "test.jsonl", 4, "negative", "empty list"),
        (
            "reranking",
            replaced("test", 3, positive=["x", "y"], negative=["z", "y"]),
            "test.jsonl",
            4,
            "negative",
            '"y" is a',
        ),
        ("reranking", replaced("test", 3, positive="x"), "test.jsonl", 4, "positive", "not a list"),
        ("reranking", replaced("test", 3, positive=["x", ""]), "test.jsonl", 4, "positive", "text is empty"),
        ("summarization", replaced("test", 3, relevance=[1.0]), "test.jsonl", 4, "relevance", "1 numbers for 4"),
        (
            "summarization",
            lambda rows: [r.update(relevance=[i] * 4) for i, r in enumerate(rows["test"])],
            "test.jsonl",
            None,
            "relevance",
            "the same for all summaries in each row",
        ),
    ],
)
def test_a_mistake_is_found_in_its_file_line_and_field(type_, change, file, line, field, says, tmp_path: Path):
    rows = example_rows(type_)
    change(rows)
    with pytest.raises(DataError, match=says) as caught:
        open_task(write_task(tmp_path / "t", type_, rows))
    assert (Path(caught.value.file).name, caught.value.line, caught.value.field) == (file, line, field)


def test_ids_and_labels_are_what_a_table_makes_of_them(tmp_path: Path):
    """Huge integers stay apart; a column that had gaps has floats; flags are labels."""
    rows = example_rows("retrieval", 4)
    huge = 2**63
    for number, row in enumerate(rows["corpus"]):
        row["_id"] = huge + number
    for number, row in enumerate(rows["queries"]):
        row["_id"] = float(number)
    rows["qrels"] = [(number, huge + number, 1) for number in range(4)]
    split = open_task(write_task(tmp_path / "ids", "retrieval", rows)).make().dataset["default"]["test"]
    assert split["relevant_docs"] == {str(number): {str(huge + number): 1} for number in range(4)}
    assert len(set(split["corpus"]["id"])) == 12

    labels = [1, 1.0, 4.5, True, False, "true", 10**30]
    texts = [{"text": f"text {i}", "label": label} for i, label in enumerate(labels)]
    tables = read_task_folder(write_task(tmp_path / "labels", "clustering", {"test": texts})).tables
    assert [row["label"] for row in tables["test"]] == ["1", "1", "4.5", "true", "false", "true", str(10**30)]
    pairs = example_rows("pair_classification", 4)
    for row, label in zip(pairs["test"], (True, False, 1.0, 0.0), strict=True):
        row["label"] = label
    tables = read_task_folder(write_task(tmp_path / "pairs", "pair_classification", pairs)).tables
    assert [row["label"] for row in tables["test"]] == [1, 0, 1, 0]


def test_a_beir_folder_is_a_retrieval_task_as_it_was_downloaded(tmp_path: Path):
    rows = example_rows("retrieval")
    ours = open_task(write_task(tmp_path / "ours", "retrieval", rows))
    beir = write_task(tmp_path / "scifact", "retrieval", rows)
    (beir / "task.json").unlink()
    (beir / "qrels").mkdir()
    (beir / "qrels.tsv").rename(beir / "qrels" / "test.tsv")
    with (beir / "queries.jsonl").open("a") as stream:
        stream.write(json.dumps({"_id": "other", "text": "of the training split", "metadata": {}}) + "\n")
    task = open_task(beir)
    assert (task.name, task.metadata.type, task.metadata.main_score) == ("scifact", "Retrieval", "ndcg_at_10")
    theirs, made = task.make().dataset["default"]["test"], ours.make().dataset["default"]["test"]
    assert theirs["queries"].to_list() == made["queries"].to_list()  # those of other splits are not encoded
    assert theirs["corpus"].to_list() == made["corpus"].to_list()
    assert theirs["relevant_docs"] == made["relevant_docs"]


def test_identical_ids_are_ignored_where_that_is_asked_for(tmp_path: Path):
    path = write_task(tmp_path / "t", "retrieval", example_rows("retrieval"), ignore_identical_ids=True)
    other = write_task(tmp_path / "u", "retrieval", example_rows("retrieval"))
    assert open_task(path).make().ignore_identical_ids and not open_task(other).make().ignore_identical_ids
    assert open_task(path).source.sha256 != open_task(other).source.sha256
    for type_, value in (("retrieval", "yes"), ("sts", True)):
        with pytest.raises(DataError, match=r'"ignore_identical_ids": is .*: true or false, of retrieval'):
            open_task(write_task(tmp_path / type_, type_, example_rows(type_), ignore_identical_ids=value))


def test_broken_json_and_bytes_are_found_in_their_line(tmp_path: Path):
    path = write_task(tmp_path / "t", "sts", example_rows("sts"))
    for line, says in ((b'{"sentence1": ', "broken JSON"), (b'{"sentence1": "\xff"}', "not UTF-8")):
        file = path / "test.jsonl"
        good = file.read_bytes().splitlines()[:24]
        file.write_bytes(b"\n".join([*good, line]))
        with pytest.raises(DataError, match=says) as caught:
            open_task(path)
        assert caught.value.line == 25


@pytest.mark.parametrize(
    ("about", "field", "says"),
    [
        ({"type": "translation"}, "type", "unknown type 'translation'.*sts"),
        ({"type": 3}, "type", "not a text"),
        ({"metric": "accuracy"}, "metric", "sts has no metric 'accuracy'.*cosine_spearman"),
        ({"instruction": ["x"]}, "instruction", "not a text"),
        ({"name": ""}, "name", "not a text"),
    ],
)
def test_task_json_is_checked(about, field, says, tmp_path: Path):
    path = write_task(tmp_path / "t", "sts", example_rows("sts"))
    (path / "task.json").write_text(json.dumps({"type": "sts"} | about))
    with pytest.raises(DataError, match=says) as caught:
        open_task(path)
    assert (Path(caught.value.file).name, caught.value.field) == ("task.json", field)


def test_average_precision_needs_two_labels_in_both_files(tmp_path: Path):
    rows = example_rows("classification")
    rows["test"] = [row for row in rows["test"] if row["label"] != "class 1"]
    with pytest.raises(DataError, match="ap needs exactly two labels"):
        open_task(write_task(tmp_path / "t", "classification", rows, metric="ap"))


def test_what_is_no_task_folder_says_so(tmp_path: Path):
    with pytest.raises(DataError, match=r"has no task\.json"):
        open_task(tmp_path)
    path = write_task(tmp_path / "t", "sts", example_rows("sts"))
    (path / "task.json").write_text('{"name": "x"}')
    (path / "test.jsonl").rename(path / "test.txt")
    with pytest.raises(DataError, match='"type": is missing, and the files do not tell it'):
        open_task(path)
    (path / "test.txt").rename(path / "test.jsonl")
    (path / "task.json").write_text('{"type": "sts",\n oops}')
    with pytest.raises(DataError, match="line 2: broken JSON"):
        open_task(path)
    write_lines(path / "test.jsonl.gz", [])
    (path / "task.json").write_text('{"type": "sts"}')
    with pytest.raises(DataError, match="stands beside"):
        open_task(path)


def test_mteb_names_are_looked_up_in_mteb():
    task = open_task("STS12")
    assert (task.metadata.type, task.metadata.main_score, task.asymmetric) == ("STS", "cosine_spearman", False)
    assert task.instruction
    with pytest.raises(DataError, match=r"STS129.*neither a task folder nor.*did you mean STS1"):
        open_task("STS129")
    with pytest.raises(DataError, match="text alone"):
        open_task("CIFAR10")
    with pytest.raises(ConfigError, match="only task folders are sampled"):
        open_task("STS12", sample=10)


def test_a_benchmark_is_its_tasks_on_the_languages_and_splits_that_it_takes(tmp_path: Path):
    folder = write_task(tmp_path / "t", "sts", example_rows("sts"))
    names = expand([folder, "MTEB(eng, v1)", "STS12", "unknown"])
    assert (names[0], *names[-2:]) == (folder, "STS12", "unknown")
    members = names[1:-2]
    assert members == [f"MTEB(eng, v1)/{task.metadata.name}" for task in mteb.get_benchmark("MTEB(eng, v1)").tasks]
    assert {"MTEB(eng, v1)/STS17", "MTEB(eng, v1)/CQADupstackRetrieval"} < set(members)
    english, whole = open_task("MTEB(eng, v1)/STS17"), open_task("STS17")
    assert english.name == whole.name == "STS17"
    assert english.instruction == whole.instruction
    assert english.source.sha256 != whole.source.sha256
    assert (
        open_task("MTEB(eng, v1)/CQADupstackRetrieval").instruction
        == open_task("CQADupstackAndroidRetrieval").instruction
    )
    for name in ("MTEB(eng, v1)/STS129", "MTEB(eng, v9)/STS12", "MTEB(eng, v9)"):
        with pytest.raises(DataError, match="neither a task folder nor"):
            open_task(name)


def test_an_mteb_task_that_cannot_be_downloaded_is_one_clear_error(tmp_path: Path):
    script = """
from secateur.errors import DataError
from secateur.evaluation.tasks import open_task
try:
    open_task("STS12").make()
except DataError as error:
    print(error)
"""
    environment = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path), "HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("STS12: mteb cannot load its data (")
    assert done.stdout.strip().endswith("go online, or give a task folder")


def test_a_home_folder_that_cannot_be_written_is_no_reason_to_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").touch()  # root may write anywhere, but not into a file
    environment = {key: value for key, value in os.environ.items() if key != "MTEB_CACHE"}
    monkeypatch.setattr(os, "environ", environment | {"HOME": str(tmp_path / "file")})
    importlib.reload(secateur.evaluation)
    assert mteb.cache.ResultCache().cache_path.is_dir()  # as mteb does when it is imported


@pytest.mark.parametrize("type_", TYPES)
def test_a_sample_is_decided_by_its_seed(type_: str, tmp_path: Path):
    task = read_task_folder(write_task(tmp_path / "t", type_, example_rows(type_, 40)))
    one, same, other = (sample_task(task, 12, seed).tables for seed in (1, 1, 2))
    main = "queries" if type_ == "retrieval" else "test"
    assert one == same != other
    assert len(one[main]) == 12
    assert all(row in task.tables[main] for row in one[main])
    assert sample_task(task, 1000, 1) is task


def test_a_sample_keeps_the_proportions_of_the_labels(tmp_path: Path):
    labels = ["many"] * 80 + ["some"] * 15 + ["few"] * 5
    rows = [{"text": f"text {i}", "label": label} for i, label in enumerate(labels)]
    task = read_task_folder(write_task(tmp_path / "t", "classification", {"train": rows, "test": rows}))
    sample = sample_task(task, 20, 3).tables
    assert Counter(row["label"] for row in sample["test"]) == {"many": 16, "some": 3, "few": 1}
    least = Counter(row["label"] for row in sample["train"])
    assert all(least[label] >= min(TRAIN_PER_LABEL, size) for label, size in Counter(labels).items())
    tiny = Counter(row["label"] for row in sample_task(task, 1, 3).tables["test"])
    assert tiny == {"many": 1, "some": 1, "few": 1}


def test_sampled_queries_keep_all_their_documents(tmp_path: Path):
    task = read_task_folder(write_task(tmp_path / "t", "retrieval", example_rows("retrieval", 200)))
    sample = sample_task(task, 5, 42).tables
    queries, corpus = {row["_id"] for row in sample["queries"]}, {row["_id"] for row in sample["corpus"]}
    judged = [row for row in task.tables["qrels"] if row["query-id"] in queries]
    assert list(sample["qrels"]) == judged
    needed = {row["corpus-id"] for row in judged}
    assert needed <= corpus
    assert len(corpus) == len(needed) + 5 * DISTRACTORS_PER_QUERY


def test_few_texts_are_all_clustered_and_many_by_mtebs_share(tmp_path: Path):
    few = write_task(tmp_path / "few", "clustering", example_rows("clustering"))
    rows = [{"text": f"text {i}", "label": i % 2} for i in range(1000)]
    many = write_task(tmp_path / "many", "clustering", {"test": rows})
    made = [open_task(few), open_task(many), open_task(many, sample=500)]
    assert [task.make().max_fraction_of_documents_to_embed for task in made] == [None, 0.04, None]


@pytest.mark.parametrize("name", ["../up", "a/b", ".hidden", "x" * 121, "a\x00b"])
def test_a_name_that_cannot_be_a_file_name_is_refused(name: str, tmp_path: Path):
    with pytest.raises(DataError, match=r'"name": .*file names'):
        open_task(write_task(tmp_path / "t", "sts", example_rows("sts"), name=name))
