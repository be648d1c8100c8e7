from __future__ import annotations

import json
from pathlib import Path

import pytest

import secateur
from conftest import MakeEncoder
from secateur.errors import ConfigError, DataError, OutputError
from secateur.evaluation.task_folder import TaskFolder, read_task_folder
from task_folders import sentences, write_lines

BODIES = [f"{text} and so on for a while, until it is long enough" for text in sentences(60, seed=2)]
TITLES = [f"All about number {i}" for i in range(60)]


def write_titled(file: Path) -> Path:
    """60 texts with titles, among them copies, an empty one, one without a title, and two that share one."""
    rows = [{"title": title, "body": body} for title, body in zip(TITLES, BODIES, strict=True)]
    rows[7]["title"] = None
    rows[9]["title"] = rows[8]["title"].upper()
    rows[10]["body"] = f"{TITLES[10]}\n\n{BODIES[10]}"
    write_lines(file, [*rows, {"title": "Again", "body": f" {BODIES[3].upper()}"}, {"title": "Nothing", "body": "-"}])
    return file


def asked(task: TaskFolder) -> dict[str, str]:
    """Query → the one document that is relevant to it."""
    texts = {row["_id"]: row["text"] for name in ("queries", "corpus") for row in task.tables[name]}
    found = {texts[row["query-id"]]: texts[row["corpus-id"]] for row in task.tables["qrels"]}
    assert len(found) == len(task.tables["queries"]) == len(task.tables["qrels"])
    return found


def test_titles_ask_for_their_texts(tmp_path: Path):
    made = secateur.make_task(write_titled(tmp_path / "notes.jsonl"), out=tmp_path / "tasks" / "notes")
    task = read_task_folder(made.folder)
    assert [row["text"] for row in task.tables["corpus"]] == BODIES
    able = [i for i in range(60) if i not in (7, 8, 9)]
    assert asked(task) == {TITLES[i]: BODIES[i] for i in able}
    assert (made.name, made.how, made.texts, made.documents, made.queries) == (
        *("notes-from-titles", "title → body"),
        *(62, 60, 57),
    )
    assert not any(row["title"] for row in task.tables["corpus"])


def test_first_sentences_ask_for_the_rest_of_all_texts(tmp_path: Path):
    texts = [f"Dr. Who is at number {i}. {body}. The end." for i, body in enumerate(BODIES)]
    texts += [
        "Only one sentence, which is all that there is to this one",
        "中文的第一句话在这里。" + "第二句话比第一句话长得多。" * 3,
    ]
    write_lines(tmp_path / "notes.jsonl", [{"text": text} for text in texts])
    made = secateur.make_task(tmp_path / "notes.jsonl", out=tmp_path / "first", queries=10)
    task = read_task_folder(made.folder)
    rests = [f"{body}. The end." for body in BODIES]
    assert [row["text"] for row in task.tables["corpus"]] == [*rests, texts[60], "第二句话比第一句话长得多。" * 3]
    found = asked(task)
    assert (len(found), made.queries, made.documents) == (10, 10, 62)
    assert found.items() <= {f"Dr. Who is at number {i}.": rest for i, rest in enumerate(rests)}.items() | {
        ("中文的第一句话在这里。", "第二句话比第一句话长得多。" * 3)
    }


def test_the_seed_decides_and_nothing_else(tmp_path: Path):
    file = write_titled(tmp_path / "notes.jsonl")
    folders = [
        secateur.make_task(file, out=tmp_path / f"{number}" / "same", queries=20, seed=seed).folder
        for number, seed in enumerate((1, 1, 2))
    ]
    contents = [{item.name: item.read_bytes() for item in folder.iterdir()} for folder in folders]
    assert contents[0] == contents[1]
    assert contents[0]["corpus.jsonl"] == contents[2]["corpus.jsonl"]
    assert contents[0]["queries.jsonl"] != contents[2]["queries.jsonl"]


def test_each_score_says_that_nobody_judged_the_task(make_encoder: MakeEncoder, tmp_path: Path):
    secateur.make_task(write_titled(tmp_path / "notes.jsonl"), out=tmp_path / "notes")
    row = secateur.evaluate([make_encoder()], [tmp_path / "notes"], names=["m"]).rows[0]
    caution = "made from texts alone (title → body): easier than what people ask, and no person judged it"
    assert (row.task, row.note) == ("notes-from-titles", caution)
    about = json.loads((tmp_path / "notes" / "task.json").read_text())
    assert about["notes"] == "Made from notes.jsonl (title → body), seed 42; no person judged what is relevant."
    assert secateur.check_tasks(tmp_path / "notes")[0].task.note == caution


@pytest.mark.parametrize(
    ("name", "content", "options", "says"),
    [
        ("a.csv", "heading;words\nx;y\n", {}, "the column is missing: .*--text; here are heading, words"),
        ("a.jsonl", '{"text": "Short."}\n' * 3, {}, "none of its texts can have a query: texts need two sentences"),
        ("a.jsonl", '{"text": 3}\n', {}, 'line 1, "text": is 3, not a text'),
        ("a.jsonl", '{"text": "a"}\n', {"title": "headlin"}, 'line 1, "headlin": the column is missing'),
        ("a.txt", "", {}, "has no rows"),
        ("a.txt", b"caf\xe9", {}, "byte 4 is not UTF-8"),
    ],
)
def test_what_is_no_texts_says_so_and_writes_nothing(name, content, options, says, tmp_path: Path):
    file = tmp_path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=says):
        secateur.make_task(file, out=tmp_path / "out", **options)
    assert [item.name for item in tmp_path.iterdir()] == [name]


def test_a_folder_that_is_there_is_left_alone(tmp_path: Path):
    file = write_titled(tmp_path / "notes.jsonl")
    secateur.make_task(file, out=tmp_path / "out")
    with pytest.raises(OutputError, match="is there already"):
        secateur.make_task(file, out=tmp_path / "out", seed=1)
    with pytest.raises(ConfigError, match="queries: 0 is not valid"):
        secateur.make_task(file, out=tmp_path / "other", queries=0)
