from __future__ import annotations

import csv
import gzip
import json
import re
from pathlib import Path
from typing import Any

import mteb
import pandas
import pytest
from mteb.abstasks import AbsTaskRetrieval
from scipy.stats import spearmanr
from sentence_transformers.sentence_transformer.evaluation import (
    BinaryClassificationEvaluator,
    InformationRetrievalEvaluator,
)

import secateur
from conftest import MakeEncoder
from secateur.errors import DataError
from secateur.evaluation.evaluate import evaluate
from secateur.evaluation.task_folder import read_task_folder
from secateur.evaluation.task_formats import TYPES
from secateur.evaluation.tasks import open_task
from task_folders import sentences, write_lines

TEXTS = sentences(90, seed=4)
QUERIES = {f"q{i}": text for i, text in enumerate(TEXTS[:24])}
CORPUS = {f"d{i}": text for i, text in enumerate(TEXTS[24:])}
RELEVANT = {f"q{i}": [f"d{(3 * i + j) % 60}" for j in range(1 + i % 3)] for i in range(24)}
OTHERS = [text for id_, text in CORPUS.items() if not any(id_ in own for own in RELEVANT.values())]
ANSWERS = [(QUERIES[query], [CORPUS[document] for document in own]) for query, own in RELEVANT.items()]


def write_beir(folder: Path) -> Path:
    """As BEIR is unpacked, from a machine with Windows: other splits and columns, CRLF, a byte order mark."""
    (folder / "qrels").mkdir(parents=True)
    corpus = [{"_id": id_, "title": "", "text": text, "metadata": {"url": ""}} for id_, text in CORPUS.items()]
    write_lines(folder / "corpus.jsonl", corpus)
    queries = [{"_id": id_, "text": text, "metadata": {}} for id_, text in QUERIES.items()]
    write_lines(folder / "queries.jsonl", [*queries, {"_id": "train1", "text": "of another split"}])
    lines = ["query-id\tcorpus-id\tscore\tassessor", *(f"{q}\t{d}\t1\tann" for q, own in RELEVANT.items() for d in own)]
    (folder / "qrels" / "test.tsv").write_bytes(("\ufeff" + "\r\n".join(lines) + "\r\n").encode())
    (folder / "qrels" / "train.tsv").write_text("query-id\tcorpus-id\tscore\ntrain1\td1\t1\n")
    return folder


def write_tables(folder: Path) -> Path:
    """Of the ids, titles and grades that pandas writes, into CSV and Parquet."""
    folder.mkdir()
    pandas.DataFrame({"id": [*CORPUS], "text": [*CORPUS.values()]}).to_parquet(folder / "corpus.parquet")
    pandas.DataFrame({"id": [*QUERIES], "text": [*QUERIES.values()]}).to_csv(folder / "queries.csv.gz", index=False)
    judged = [(document, query, 1.0) for query, own in RELEVANT.items() for document in own]
    pandas.DataFrame(judged, columns=["doc_id", "query_id", "score"]).to_csv(folder / "qrels.csv", index=False)
    return folder


def write_dictionaries(file: Path) -> Path:
    """As LlamaIndex's ``EmbeddingQAFinetuneDataset.save_json``."""
    content = {"queries": QUERIES, "corpus": CORPUS, "relevant_docs": RELEVANT, "mode": "text"}
    file.write_text(json.dumps(content, indent=4))
    return file


def write_evaluator(folder: Path) -> Path:
    """What ``InformationRetrievalEvaluator`` is given, one file each; its sets as objects with grades."""
    folder.mkdir()
    graded = {query: dict.fromkeys(own, 1) for query, own in RELEVANT.items()}
    for name, content in (("queries", QUERIES), ("corpus", CORPUS), ("relevant_docs", graded)):
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def ragas_rows() -> list[dict[str, Any]]:
    rows = [{"user_input": query, "reference_contexts": own, "reference": "An answer."} for query, own in ANSWERS]
    return [{**row, "negatives": OTHERS if row is rows[3] else None} for row in rows]


def write_ragas(file: Path) -> Path:
    """As Ragas' ``EvaluationDataset.to_csv`` and ``to_jsonl``, with the rest of the corpus as negatives."""
    if file.suffix == ".csv":
        with file.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, ragas_rows()[0])
            writer.writeheader()
            writer.writerows(ragas_rows())
    elif file.suffix == ".json":
        file.write_text(json.dumps(ragas_rows()))
    else:
        write_lines(file, ragas_rows())
    return file


def write_positives(folder: Path) -> Path:
    """A row for each query and positive, and ``task.json`` with a name alone."""
    folder.mkdir()
    rows = [{"anchor": query, "positive": text} for query, own in ANSWERS for text in own]
    write_lines(folder / "mine.jsonl", [rows[0] | {"negative": OTHERS}, *rows])
    (folder / "task.json").write_text('{"name": "named"}')
    return folder


def test_every_format_scores_as_sentence_transformers_and_mteb_do(make_encoder: MakeEncoder, tmp_path: Path):
    model = make_encoder("llama")
    theirs = InformationRetrievalEvaluator(QUERIES, CORPUS, {q: set(own) for q, own in RELEVANT.items()}, name="t")
    expected = theirs(model)["t_cosine_ndcg@10"]
    places = [
        write_beir(tmp_path / "beir"),
        write_tables(tmp_path / "tables"),
        write_dictionaries(tmp_path / "llama.json"),
        write_evaluator(tmp_path / "evaluator"),
        write_ragas(tmp_path / "ragas.csv"),
        write_ragas(tmp_path / "ragas-lines.jsonl"),
        write_ragas(tmp_path / "ragas-list.json"),
        write_positives(tmp_path / "positives"),
    ]
    rows = evaluate([model], places, names=["m"], out=tmp_path / "out").rows
    names = ["beir", "tables", "llama", "evaluator", "ragas", "ragas-lines", "ragas-list", "named"]
    assert [row.task for row in rows] == names
    assert {row.metric for row in rows} == {"ndcg_at_10"}
    for row in rows:
        assert row.score == pytest.approx(expected, abs=1e-5), row.task
        told = "queries without a judgment, left out: 1 of 25" if row.task == "beir" else ""
        assert (row.samples, row.note) == (24, told), row.task
    again = evaluate([model], places, names=["m"], out=tmp_path / "out").rows
    assert again == rows  # seconds and all: nothing was scored again


def test_graded_judgments_count_as_in_mteb(make_encoder: MakeEncoder, tmp_path: Path):
    """A dictionary of grades is what mteb itself is given."""
    graded = {q: {d: 1 + (i + j) % 3 for j, d in enumerate(own)} for i, (q, own) in enumerate(RELEVANT.items())}
    graded["q0"] = {"d5": 0}
    (tmp_path / "graded.json").write_text(json.dumps({"queries": QUERIES, "corpus": CORPUS, "relevant_docs": graded}))
    task = open_task(tmp_path / "graded.json")
    made = task.make()
    assert isinstance(made, AbsTaskRetrieval)
    assert made.dataset["default"]["test"]["relevant_docs"] == graded
    model = make_encoder("llama")
    theirs = mteb.evaluate(model, made, cache=None, co2_tracker=False).task_results[0].get_score()
    ours = evaluate([model], [task], names=["m"]).rows[0]
    assert ours.score == pytest.approx(theirs, abs=1e-6)
    assert ours.note == "queries without a relevant document, which score 0 as in mteb: 1 of 24"


SIMILARITIES = ["cosine", "dot", "euclidean", "manhattan"]
SCORES = [round((7 * i % 24) / 5, 1) for i in range(24)]


def write_scored(file: Path, columns: tuple[str, str, str], scores: list[Any], delimiter: str = ",") -> Path:
    with file.open("w", newline="", encoding="utf-8-sig") as stream:
        writer = csv.writer(stream, delimiter=delimiter)
        writer.writerows([columns, *zip(TEXTS, TEXTS[24:48], scores, strict=False)])
    return file


def test_pairs_with_scores_are_scored_by_spearman_and_those_of_0_and_1_by_precision(
    make_encoder: MakeEncoder, tmp_path: Path
):
    model = make_encoder("llama")
    labels = [i % 2 for i in range(24)]
    (tmp_path / "folder").mkdir()
    places = [
        write_scored(tmp_path / "comma.csv", ("sentence1", "sentence2", "score"), SCORES),
        write_scored(tmp_path / "german.csv", ("text1", "text2", "similarity"), SCORES, ";"),
        write_scored(tmp_path / "folder" / "any.tsv", ("sentence_a", "sentence_b", "label"), SCORES, "\t"),
        write_scored(tmp_path / "binary.csv", ("sentence1", "sentence2", "label"), labels),
    ]
    one, two = (model.encode(texts, show_progress_bar=False) for texts in (TEXTS[:24], TEXTS[24:48]))
    rows = evaluate([model], places, names=["m"]).rows
    assert [row.metric for row in rows] == ["cosine_spearman"] * 3 + ["max_ap"]
    for row in rows[:3]:
        assert row.score == pytest.approx(spearmanr((one * two).sum(1), SCORES)[0], abs=1e-5)
    theirs = BinaryClassificationEvaluator(TEXTS[:24], TEXTS[24:48], labels, similarity_fn_names=SIMILARITIES)(model)
    assert rows[3].score == pytest.approx(theirs["max_ap"], abs=1e-5)


def test_tabs_end_cells_and_quotes_are_letters(tmp_path: Path):
    """As in the STS benchmark; a cell that pandas put into quotes loses them, and other splits are left out."""
    lines = [
        "split\tsentence1\tsentence2\tscore",
        'test\t"Hello," he said.\t5" wide\t1',
        'test\t"he said ""yes"""\tplain\t2.5',
        "train\tx\ty\t3",
    ]
    file = tmp_path / "stsbenchmark.tsv.gz"
    file.write_bytes(gzip.compress("\n".join(lines).encode()))
    task = read_task_folder(file)
    assert task.tables["test"] == (
        {"sentence1": '"Hello," he said.', "sentence2": '5" wide', "score": 1.0},
        {"sentence1": 'he said "yes"', "sentence2": "plain", "score": 2.5},
    )
    assert task.name == "stsbenchmark"
    assert task.note == ""


def test_lists_in_cells_are_those_of_json_or_python(tmp_path: Path):
    """PHP escapes slashes, and Python's json writes an emoji as a surrogate pair; a blank line may come first."""
    cells = [r'["a \ud83d\ude00", "b\/c"]', "['it', \"it's\"]", "[see below]"]
    with (tmp_path / "a.csv").open("w", newline="") as stream:
        stream.write("\r\nquery;positive\r\n")
        csv.writer(stream, delimiter=";").writerows((f"q{i}", cell) for i, cell in enumerate(cells))
    corpus = [row["text"] for row in read_task_folder(tmp_path / "a.csv").tables["corpus"]]
    assert corpus == ["a \U0001f600", "b/c", "it", "it's", "[see below]"]


def test_queries_that_have_no_answer_are_counted(tmp_path: Path):
    rows = [
        {"query": "a question", "positive": ["an answer", "a question"]},
        {"query": "nobody knows", "positive": []},
        {"query": "nor this", "positive": None},
    ]
    write_lines(tmp_path / "some.jsonl", rows)
    task = read_task_folder(tmp_path / "some.jsonl")
    assert [row["text"] for row in task.tables["queries"]] == ["a question"]
    assert task.note == "queries without a positive, left out: 2; positives that are their own query, left out: 1"
    sets = {"queries": {"a": "x", "b": "y", "c": "z"}, "corpus": {"d": "w", "e": " "}, "relevant_docs": {"a": ["d"]}}
    (tmp_path / "set.json").write_text(json.dumps({**sets, "relevant_docs": {"a": ["d"], "b": []}}))
    task = read_task_folder(tmp_path / "set.json")
    assert [row["text"] for row in task.tables["queries"]] == ["x"]
    assert task.note == "documents without text, left out: 1 of 2; queries without a judgment, left out: 2 of 3"


def dictionaries(**changed: object) -> str:
    content = {"queries": {"q1": "a", "q2": "b"}, "corpus": {"d1": "c"}, "relevant_docs": {"q1": ["d1"]}}
    return json.dumps(content | changed, indent=1)


PAIRS = "sentence1,sentence2,score\na,b,1\n"


@pytest.mark.parametrize(
    ("name", "content", "line", "field", "says"),
    [
        ("a.csv", PAIRS + "c,d,high\ne,f,0.5\ng,h,\n", 3, "score", "'high', not a number"),
        ("a.csv", 'sentence1;sentence2;score\na;b;"0,5"\n', 2, "score", "'0,5', not a number"),
        ("a.csv", PAIRS + "c,,2\n", 3, "sentence2", "the text is empty"),
        ("a.csv", "\n" + PAIRS + "c,,2\n", 4, "sentence2", "the text is empty"),
        ("a.csv", "sentence1,sentence2,score,split\na,b,1,train\nc,d,2,dev\n", None, "split", "the splits train, dev"),
        ("a.csv", "query,positive\na,\"['b' 'c']\"\n", 2, "positive", "texts without commas, as numpy prints them"),
        ("a.csv", 'query,positive\na,"[""b"", null]"\n', 2, "positive", "is None, not a text"),
        ("a.csv", 'query,positive\na,"[""\\ud83d""]"\n', 2, "positive", "half of a surrogate pair"),
        ("a.csv", PAIRS + "c,d\n", 3, None, "has 2 columns, the first line 3"),
        ("a.tsv", PAIRS.replace(",", "\t") + "a\tb\n", 3, None, "has 2 columns, the first line 3"),
        ("a.csv", PAIRS + "c,d,1\n", None, "score", "in every row"),
        ("a.csv", "sentence1,sentence2,score\n", None, None, "has no rows"),
        ("a.csv", "one,two,score\na,b,1\n", None, None, "none of a task: query and positive, or .*here are one, two"),
        ("a.csv", (PAIRS + "caf\u00e9,d,2\n").encode("cp1252"), 3, None, "byte 4 is not UTF-8.*iconv -f WINDOWS-1252"),
        ("a.csv", PAIRS.encode("utf-16"), 1, None, "is UTF-16, not UTF-8.*iconv -f UTF-16"),
        ("a.csv.gz", b"no gzip", 1, None, "is not a whole gzip file"),
        ("a.json", '{"queries": {},\n "corpus": }', 2, None, "broken JSON .*column 12"),
        ("a.json", '{"queries":\n "caf\u00e9"}'.encode("cp1252"), 2, None, "byte 6 is not UTF-8.*WINDOWS-1252"),
        ("a.json", "{}", None, "queries", 'is missing; here is .*: a question set has {"queries"'),
        ("a.json", "3", None, None, "holds a int, not a list or a question set"),
        ("a.json", '[{"query": "a", "positive": "b"}, 3]', None, "[1]", "holds a int"),
        ("a.json", '[{"query": "a", "positive": "b"}, {"query": "a"}]', None, "[1].positive", "column is missing"),
        ("a.json", '[{"query": "a", "positive": ["b", ""]}]', None, "[0].positive", "the text is empty"),
        ("a.json", "[]", None, None, "has no rows"),
        ("a.json", dictionaries(queries=["a"]), None, "queries", "is a list: a question set has"),
        ("a.json", dictionaries(queries={"q1": ""}), None, "queries.q1", "the text is empty"),
        ("a.json", dictionaries(queries={"q1": {"text": "a"}}), None, "queries.q1", "not a text"),
        ("a.json", dictionaries(corpus={"d1": 3}), None, "corpus.d1", "not a text"),
        ("a.json", '{"queries": {"q1": "a", "q1": "b"}}', None, None, 'the key "q1" is there twice'),
        ("a.json", dictionaries(relevant_docs={"q9": ["d1"]}), None, "relevant_docs.q9", "'q9' is not in queries"),
        (
            "a.json",
            dictionaries(relevant_docs={"q1": ["d9"], "q2": ["d8"]}),
            None,
            "relevant_docs.q1",
            "'d9' is not in corpus",
        ),
        ("a.json", dictionaries(relevant_docs={"q1": {"d1": "high"}}), None, "relevant_docs.q1", "not an integer"),
        ("a.json", dictionaries(relevant_docs={"q1": ["d1", "d1"]}), None, "relevant_docs.q1", "occurs twice"),
        ("a.json", dictionaries(relevant_docs={"q1": []}), None, None, "has no rows"),
        ("a.jsonl", '{"user_input": [{"content": "a"}], "reference_contexts": ["b"]}', 1, "user_input", "not a text"),
        ("a.jsonl", '{"query": "a", "positive": []}', None, None, "has no query with a positive"),
        ("a.jsonl", '{"query": "a", "positive": 3}', 1, "positive", "not a text"),
        ("a.txt", "text", None, None, "is no task: expected are corpus, queries and qrels"),
    ],
)
def test_a_mistake_is_found_in_its_file_and_line_or_key(name, content, line, field, says, tmp_path: Path):
    file = tmp_path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=says) as caught:
        read_task_folder(file)
    assert (Path(caught.value.file).name, caught.value.line, caught.value.field) == (name, line, field)
    check = secateur.check_tasks([file])[0]
    assert (check.path, check.problem, check.task) == (str(file), str(caught.value), None)


def test_the_same_id_twice_is_refused(tmp_path: Path):
    folder = write_beir(tmp_path / "beir")
    with (folder / "corpus.jsonl").open("a") as stream:
        stream.write('{"_id": "d2", "text": "other"}\n')
    with pytest.raises(DataError, match="line 67: 'd2' occurs twice"):
        read_task_folder(folder)


def test_task_json_names_what_its_files_do_not(tmp_path: Path):
    folder = write_positives(tmp_path / "positives")
    about = {"instruction": "Find it", "metric": "recall_at_5", "caution": "take care", "licence": "MIT"}
    (folder / "task.json").write_text(json.dumps(about))
    task = read_task_folder(folder)
    assert (task.name, task.type, task.instruction) == ("positives", "retrieval", "Find it")
    assert (task.metric, task.note, task.source.licence) == ("recall_at_5", "take care", "MIT")
    (folder / "task.json").write_text('{"type": "sts"}')
    with pytest.raises(DataError, match=r"none of a task of type sts: .*here are anchor, positive"):
        read_task_folder(folder)
    (folder / "task.json").write_text('{"type": "retrieval", "metric": "map"}')
    with pytest.raises(DataError, match=r"task\.json, \"metric\": retrieval has no metric 'map'"):
        read_task_folder(folder)


def test_a_data_file_has_the_instruction_that_stands_beside_it(tmp_path: Path):
    write_lines(tmp_path / "held.jsonl", [{"query": "a", "positive": "b"}])
    (tmp_path / "held.json").write_text('{"query_instruction": "Find it", "licence": "MIT"}')
    task = read_task_folder(tmp_path / "held.jsonl")
    assert (task.instruction, task.source.licence) == ("Find it", "MIT")
    (tmp_path / "held.jsonl").rename(tmp_path / "held.JSONL")
    assert read_task_folder(tmp_path / "held.JSONL").instruction == "Find it"
    (tmp_path / "held.JSONL").rename(tmp_path / "held.jsonl")
    (tmp_path / "held.json").write_text('{"query_instruction": 3}')
    with pytest.raises(DataError, match=r"held\.json, \"query_instruction\": is a int, not a text"):
        read_task_folder(tmp_path / "held.jsonl")


def test_cutoffs_are_those_of_mteb():
    for type_ in ("retrieval", "reranking"):
        taken = [k for k in range(1, 2000) if re.fullmatch(TYPES[type_].metrics, f"ndcg_at_{k}")]
        assert taken == list(AbsTaskRetrieval.k_values)


def test_the_fingerprint_follows_every_file(tmp_path: Path):
    folder = write_evaluator(tmp_path / "evaluator")
    hashes = {read_task_folder(folder).source.sha256}
    for name in ("queries", "corpus", "relevant_docs"):
        file = folder / f"{name}.json"
        file.write_text(file.read_text() + " ")
        hashes.add(read_task_folder(folder).source.sha256)
    assert len(hashes) == 4


def test_hidden_files_are_none_of_a_task(tmp_path: Path):
    """As macOS leaves them on other disks."""
    rows = [{"sentence1": text, "sentence2": text, "score": i} for i, text in enumerate(TEXTS)]
    write_lines(tmp_path / "pairs.jsonl", rows)
    (tmp_path / "._pairs.jsonl").write_bytes(b"\0\5\x16\7")
    assert read_task_folder(tmp_path).tables == read_task_folder(tmp_path / "pairs.jsonl").tables


def test_a_dev_split_is_used_where_there_is_no_test(tmp_path: Path):
    folder = write_beir(tmp_path / "beir")
    (folder / "qrels" / "test.tsv").rename(folder / "qrels" / "dev.tsv")
    task = read_task_folder(folder)
    assert task.note.startswith("judged by qrels/dev.tsv: there is no test split; queries without a judgment, ")
    (folder / "corpus.jsonl").unlink()
    with pytest.raises(DataError, match=r"corpus\.jsonl: no such file"):
        read_task_folder(folder)


def test_a_check_says_what_each_is_and_goes_on_after_a_broken_one(tmp_path: Path):
    broken = tmp_path / "broken.csv"
    broken.write_text("a,b\n1,2\n")
    places = [write_beir(tmp_path / "beir"), broken, write_ragas(tmp_path / "r.csv"), tmp_path / "nowhere"]
    beir, wrong, ragas, nowhere = secateur.check_tasks(places)
    judged = sum(len(own) for own in RELEVANT.values())
    assert (beir.task.what, beir.task.type, beir.task.metric) == ("BEIR folder", "retrieval", "ndcg_at_10")
    assert (ragas.task.what, ragas.task.name) == ("Ragas question set", "r")
    for check in (beir, ragas):
        counts = {name: len(rows) for name, rows in check.task.tables.items()}
        assert counts == {"corpus": len(CORPUS), "queries": 24, "qrels": judged}
    assert "broken.csv" in wrong.problem and nowhere.problem == f"{places[3]}: no such file or folder"
