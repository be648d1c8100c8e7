from __future__ import annotations

import csv
import gzip
import json
import subprocess
import sys
import tracemalloc
from pathlib import Path

import datasets
import pytest

from conftest import example_pairs, write_pairs
from secateur.data.rows import read_column
from secateur.data.sources import (
    E5_MIX,
    Pair,
    Pairs,
    Texts,
    batches,
    data_files,
    prompts_of,
    read_pairs,
    read_sources,
    read_texts,
)
from secateur.errors import ConfigError, DataError
from secateur.evaluation.task_folder import read_task_folder

ROWS = [
    {"query": 'with "quotes", a comma\nand a line', "positive": "Blätter 葉", "negative": "n1"},
    {"query": "q2", "positive": "p2", "negative": "n2"},
]


def as_csv(file: Path, rows: list[dict]) -> None:
    with file.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def as_parquet(file: Path, rows: list[dict]) -> None:
    import pyarrow
    import pyarrow.parquet as parquet

    parquet.write_table(pyarrow.Table.from_pylist(rows), file)


def as_gzip(file: Path, rows: list[dict]) -> None:
    file.write_bytes(gzip.compress("\n".join(json.dumps(row) for row in rows).encode()))


WRITERS = {"jsonl": write_pairs, "jsonl.gz": as_gzip, "csv": as_csv, "parquet": as_parquet}


@pytest.mark.parametrize("suffix", WRITERS)
def test_every_format_gives_the_same_pairs(suffix: str, tmp_path: Path):
    file = tmp_path / f"mine.{suffix}"
    WRITERS[suffix](file, ROWS)
    pairs = read_pairs(file)
    assert pairs.rows == tuple(Pair(row["query"], row["positive"], (row["negative"],)) for row in ROWS)
    assert (pairs.name, pairs.prompt, pairs.passage_prompt, pairs.source.rows) == ("mine", "", "", 2)


@pytest.mark.parametrize("suffix", WRITERS)
def test_a_row_without_a_negative_has_none(suffix: str, tmp_path: Path):
    file = tmp_path / f"mine.{suffix}"
    nothing = "" if suffix == "csv" else None
    WRITERS[suffix](file, [ROWS[0], {"query": "q2", "positive": "p2", "negative": nothing}])
    assert [row.negatives for row in read_pairs(file).rows] == [("n1",), ()]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_anchor_is_another_word_for_query_and_negatives_may_be_a_list(suffix: str, tmp_path: Path):
    file = tmp_path / f"mine.{suffix}"
    WRITERS[suffix](file, [{"anchor": "q", "positive": "p", "negative": ["a", "b"], "other": 1}])
    assert read_pairs(file).rows == (Pair("q", "p", ("a", "b")),)


def good_lines(bad: str, line: int = 37, last: int = 40) -> bytes:
    lines = [json.dumps({"query": f"q{i}", "positive": f"p{i}"}) for i in range(1, last + 1)]
    lines[line - 1] = bad
    return "\n".join(lines).encode()


def good_csv(bad: bytes) -> bytes:
    """The bad line is the 3001st, so that no reader has the whole file in its first buffer."""
    return b"query,positive\n" + b"".join(b"q%d,p%d\n" % (i, i) for i in range(2999)) + bad


@pytest.mark.parametrize(
    ("name", "content", "line", "field", "says"),
    [
        ("a.jsonl", good_lines('{"query": "q"'), 37, None, "broken JSON"),
        ("a.jsonl", good_lines('{"query": "q"}'), 37, "positive", "column is missing.*anchor.* and positive"),
        ("a.jsonl", good_lines('{"positive": "p"}'), 37, "query", "column is missing"),
        ("a.jsonl", good_lines('{"query": "", "positive": "p"}'), 37, "query", "text is empty"),
        ("a.jsonl", good_lines('{"query": "q", "positive": " \\t"}'), 37, "positive", "text is empty"),
        ("a.jsonl", good_lines('{"query": "q", "positive": null}'), 37, "positive", "is None, not a text"),
        ("a.jsonl", good_lines('{"query": 7, "positive": "p"}'), 37, "query", "is 7, not a text"),
        ("a.jsonl", good_lines('{"query": "q", "positive": ["p"]}'), 37, "positive", "not a text"),
        ("a.jsonl", good_lines('{"query": "q", "positive": "p", "negative": [""]}'), 37, "negative", "text is empty"),
        ("a.jsonl", good_lines('{"query": "q", "positive": "p", "negative": [1]}'), 37, "negative", "not a text"),
        ("a.jsonl", good_lines('["q", "p"]'), 37, None, "a list, not an object"),
        ("a.jsonl", good_lines("X").replace(b"X", b'{"query": "\xff"}'), 37, None, "not UTF-8"),
        ("a.jsonl", good_lines('{"query": "q", "query": "r"}'), 37, None, 'the key "query" is there twice'),
        ("a.jsonl", b"", None, None, "has no rows"),
        ("a.jsonl", b"\n \n", None, None, "has no rows"),
        ("a.jsonl.gz", gzip.compress(good_lines("X")), 37, None, "broken JSON"),
        (
            "a.jsonl.gz",
            gzip.compress(good_lines('{"query": "q", "positive": "p"}'))[:-9],
            40,
            None,
            "not a whole gzip file",
        ),
        ("a.jsonl.gz", good_lines("{}"), 1, None, "not a whole gzip file"),
        ("a.csv", good_csv(b"q,\n"), 3001, "positive", "text is empty"),
        ("a.csv", good_csv(b"q\n"), 3001, None, "has 1 columns, the first line 2"),
        ("a.csv", good_csv(b"q,p,n\n"), 3001, None, "has 3 columns, the first line 2"),
        ("a.csv", good_csv(b'q,"p\n1\n2\n'), 3001, None, "broken CSV"),
        ("a.csv", good_csv(b"q,\xff\n"), 3001, None, "not UTF-8"),
        ("a.csv", b"query,positive,query\nq,p,r\n", 1, "query", "is the name of 2 columns"),
        ("a.csv", b"query,answer\nq,p\n", 2, "positive", "column is missing"),
        ("a.csv", b"query,positive\n", None, None, "has no rows"),
        ("a.parquet", good_lines("{}"), None, None, "not a readable Parquet file"),
        ("a.xls", good_lines("{}"), None, None, "no known format: expected one of .jsonl"),
    ],
)
def test_a_mistake_is_found_in_its_file_line_and_field(name, content, line, field, says, tmp_path: Path):
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(DataError, match=says) as caught:
        read_pairs(file)
    assert (caught.value.file, caught.value.line, caught.value.field) == (str(file), line, field)


@pytest.mark.parametrize(
    ("rows", "field", "says"),
    [
        ([{"query": "q", "positive": "p"}, {"query": "q", "positive": ""}], "positive", "text is empty"),
        ([{"query": "q", "positive": "p"}, {"query": "q", "positive": None}], "positive", "not a text"),
        ([{"query": 1, "positive": "p"}] * 2, "query", "not a text"),
        ([{"text": "only"}] * 2, "query", "column is missing"),
    ],
)
def test_a_mistake_in_parquet_is_found_in_its_row(rows, field, says, tmp_path: Path):
    as_parquet(tmp_path / "a.parquet", rows)
    with pytest.raises(DataError, match=says) as caught:
        read_pairs(tmp_path / "a.parquet")
    assert (caught.value.line, caught.value.field) == (2 if rows[0] != rows[1] else 1, field)


def test_a_date_that_python_cannot_hold_is_told(tmp_path: Path):
    import pyarrow
    import pyarrow.parquet as parquet

    columns = {"query": ["q"], "positive": ["p"], "when": pyarrow.array([10**15], pyarrow.timestamp("s"))}
    parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="not a readable Parquet file"):
        read_task_folder(tmp_path / "a.parquet")
    assert len(read_pairs(tmp_path / "a.parquet").rows) == 1  # which reads its own columns alone


def test_a_csv_file_may_hold_long_texts(tmp_path: Path):
    text = "word " * 40_000
    (tmp_path / "long.csv").write_text(f"query,positive\nwhat is it,{text}\n")
    assert read_pairs(tmp_path / "long.csv").rows == (Pair("what is it", text),)


def test_missing_files_and_folders_are_named(tmp_path: Path):
    for name, says in (("nothing.jsonl", "no such file"), (".", "is a folder")):
        with pytest.raises(DataError, match=says) as caught:
            read_pairs(tmp_path / name)
        assert caught.value.file == str(tmp_path / name)


def test_the_file_beside_the_data_gives_instructions_unless_one_is_given(tmp_path: Path):
    file = write_pairs(tmp_path / "a.jsonl", example_pairs(3))
    beside = {"query_instruction": "Find it ", "passage_instruction": "Keep it", "licence": "MIT", "notes": 3}
    (tmp_path / "a.json").write_text(json.dumps(beside))
    pairs = read_pairs(file)
    assert (pairs.prompt, pairs.passage_prompt, pairs.source.licence) == ("Find it;\n", "Keep it;\n", "MIT")
    mine = read_pairs(file, instruction="Mine")
    assert (mine.prompt, mine.passage_prompt, mine.source.licence) == ("Mine;\n", "Keep it;\n", "MIT")
    none = read_pairs(file, instruction="")
    assert (none.prompt, none.passage_prompt) == ("", "Keep it;\n")
    assert prompts_of(file) == {"Find it;\n", "Keep it;\n"}
    (tmp_path / "a.json").write_text("[]")  # beside texts alone, it may be anything, such as the same texts
    assert prompts_of(file, {"text": "positive"}) == set()


@pytest.mark.parametrize(
    ("content", "line", "field", "says"),
    [
        (b'{"query_instruction": 3}', None, "query_instruction", "not a text"),
        (b"[]", None, None, "not an object"),
        (b'{\n"query_instruction" "x"}', 2, None, "broken JSON"),
        (b"[" * 100_000, None, None, "nested too deeply"),
        (b'{"query_instruction": "\\ud800"}', None, None, "half of a surrogate pair"),
    ],
)
def test_a_mistake_in_the_file_beside_the_data_is_found(content, line, field, says, tmp_path: Path):
    file = write_pairs(tmp_path / "a.jsonl", example_pairs(3))
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(DataError, match=says) as caught:
        read_pairs(file)
    assert (caught.value.file, caught.value.line, caught.value.field) == (str(tmp_path / "a.json"), line, field)


@pytest.fixture
def hundred(tmp_path: Path) -> Pairs:
    rows = [{"query": f"q{i}", "positive": f"p{i}", "negative": [f"n{i}", f"m{i}"]} for i in range(100)]
    return read_pairs(write_pairs(tmp_path / "a.jsonl", rows, "Do it"))


def test_a_sample_follows_from_the_seed_and_keeps_the_order_of_the_file(hundred: Pairs):
    one, again, other = (hundred.sample(30, seed).rows for seed in (1, 1, 2))
    assert one == again != other
    assert len(set(one)) == 30
    assert [row for row in hundred.rows if row in one] == list(one)
    assert hundred.sample(30, 1).source.rows == 30
    assert hundred.sample(100, 1) == hundred == hundred.sample(1000, 1)


def test_batches_are_full_and_in_order(hundred: Pairs):
    made = batches(hundred, 32)
    assert [text for batch in made for text in batch.anchors] == [f"q{i}" for i in range(96)]
    assert made[1].positives == tuple(f"p{i}" for i in range(32, 64))
    assert made[1].negatives[:4] == ("n32", "m32", "n33", "m33")
    assert {batch.prompt for batch in made} == {"Do it;\n"}
    (only,) = batches(hundred, 101)
    assert len(only.anchors) == 100


def test_a_folder_of_the_e5_mix_is_read_with_its_instructions(tmp_path: Path):
    row = {"query": "who?", "positive": "me", "negative": "you"}
    for name in json.loads(E5_MIX.read_text())["instructions"]:
        write_pairs(tmp_path / f"{name}.jsonl", [row])
    found = [read_pairs(file) for file in data_files(tmp_path)]
    assert len(found) == 14
    prompts = {pairs.name: pairs.prompt for pairs in found}
    assert prompts["fever"] == "Given a claim, retrieve documents that support or refute the claim;\n"
    assert {pairs.passage_prompt for pairs in found} == {""}
    assert found[0].rows[0].negatives == ("you",)
    (tmp_path / "._nq.jsonl").write_bytes(b"\0")  # what macOS puts beside a file on other disks, and into archives
    assert len(data_files(tmp_path)) == 14
    (tmp_path / "nq.jsonl").unlink()
    assert read_pairs(tmp_path / "fever.jsonl").prompt == ""
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(DataError, match="holds no data files"):
        data_files(empty)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def save_set(folder: Path, rows: list[dict], form: str) -> str:
    """Write rows as the datasets library keeps them; the name to read them by."""
    data = datasets.Dataset.from_list(rows)
    if form == "parquet":
        (folder / "triplet").mkdir(parents=True)
        data.to_parquet(folder / "triplet" / "train-00000-of-00001.parquet")
        data.select([0]).to_parquet(folder / "triplet" / "dev-00000-of-00001.parquet")
        (folder / "README.md").write_text(
            "---\nconfigs:\n- config_name: triplet\n  data_files:\n  - split: train\n    path: triplet/train-*\n"
            "  - split: dev\n    path: triplet/dev-*\n---\n"
        )
        return f"hf:{folder}:triplet"
    if form == "splits":
        datasets.DatasetDict({"train": data, "dev": data.select([0])}).save_to_disk(folder)
    else:
        data.save_to_disk(folder)
    return f"hf:{folder}"


OTHERWISE = [{"premise": row["query"], "yes": row["positive"], "no": row["negative"], "idx": 7} for row in ROWS]
MAP = {"anchor": "premise", "positive": "yes", "negative": "no"}


@pytest.mark.parametrize("form", ["parquet", "splits", "saved"])
def test_a_data_set_by_name_gives_the_pairs_of_a_file(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = tmp_path / "f.jsonl"
    write_pairs(file, ROWS)
    named = save_set(tmp_path / "owner" / "set.v1", OTHERWISE, form)
    found = read_pairs(named, columns=MAP)
    assert found.rows == read_pairs(file).rows
    assert found.name == ("set.v1-triplet" if form == "parquet" else "set.v1")
    assert (found.source.name, found.source.rows, len(found.source.sha256)) == (named, 2, 64)
    assert read_pairs(named, columns=MAP, instruction="Do it").prompt == "Do it;\n"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert read_pairs(named.replace(str(tmp_path), "~"), columns=MAP).rows == found.rows
    changed = save_set(tmp_path / "changed", [*OTHERWISE[:1], {**OTHERWISE[1], "no": "n3"}], form)
    assert read_pairs(changed, columns=MAP).source.sha256 != found.source.sha256
    assert read_pairs(f"{named}[train[1:]]", columns=MAP).rows == found.rows[1:]
    if form != "saved":
        dev = read_pairs(f"{named}[dev]", columns=MAP)
        assert (dev.rows, dev.name) == (found.rows[:1], f"{found.name}-dev")
        assert read_pairs(f"{named}[train[:50%]+dev]", columns=MAP).rows == found.rows[:1] * 2


@pytest.mark.parametrize(
    ("ending", "says"),
    [
        (":nonesuch", "nonesuch.*triplet"),
        (":triplet[test]", r'cannot be loaded \(Unknown split "test"'),
        (":triplet[", "is no name of a data set: hf:NAME"),
        ("/nowhere", "cannot be loaded"),
        ("/damaged", "cannot be loaded"),
        ("/splits[test[:1]]", r'cannot be loaded \(Unknown split "test"'),
    ],
)
def test_a_mistake_in_the_name_of_a_data_set_is_told(ending: str, says: str, tmp_path: Path):
    save_set(tmp_path / "set", OTHERWISE, "parquet")
    save_set(tmp_path / "set" / "damaged", OTHERWISE, "saved")
    (tmp_path / "set" / "damaged" / "state.json").write_text("{}")
    save_set(tmp_path / "set" / "splits", OTHERWISE, "splits")
    with pytest.raises(DataError, match=says) as caught:
        read_pairs(f"hf:{tmp_path / 'set'}{ending}")
    assert f"hf:{tmp_path / 'set'}" in str(caught.value)


def test_code_that_comes_with_data_is_not_run(tmp_path: Path):
    ran = tmp_path / "ran"
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "set.py").write_text(f"open({str(ran)!r}, 'w')")
    with pytest.raises(DataError, match="cannot be loaded"):
        read_pairs(f"hf:{tmp_path / 'set'}")
    assert not ran.exists()


@pytest.mark.parametrize("suffix", [*WRITERS, "hf"])
def test_columns_are_mapped_and_missing_ones_named(suffix: str, tmp_path: Path):
    data = tmp_path / f"data.{suffix}"
    if suffix == "hf":
        data = save_set(tmp_path / "set", OTHERWISE, "saved")
    else:
        WRITERS[suffix](data, OTHERWISE)
    assert [row.anchor for row in read_pairs(data, columns=MAP).rows] == [row["query"] for row in ROWS]
    assert not any(row.negatives for row in read_pairs(data, columns={"query": "premise", "positive": "yes"}).rows)
    (texts,) = read_sources([data], "say", {"text": "no"})
    assert isinstance(texts, Texts)
    assert (texts.rows, texts.prompt) == (("n1", "n2"), "say;\n")
    file = write_pairs(tmp_path / "pairs.jsonl", [{"query": "q", "positive": "p", "body": "b"}])
    (texts,) = read_sources([file], columns={"text": "body"})
    assert isinstance(texts, Texts) and texts.rows == ("b",)
    missing = {"positive": "column is missing: .*here are premise, yes, no", "negative": "no row has a negative"}
    for role, says in missing.items():
        with pytest.raises(DataError, match=says) as caught:
            read_pairs(data, columns={**MAP, role: "absent"})
        assert (caught.value.file, caught.value.field) == (str(data), "absent")
    with pytest.raises(ConfigError, match="no data file has the column absent for text: here are premise, yes"):
        read_sources([data], columns={"query": "premise", "positive": "yes", "text": "absent"})
    with pytest.raises(ConfigError, match="no data file has the column absent for positive: here are query, positive"):
        read_sources([file], columns={"positive": "absent", "query": "body"})
    assert len(read_sources([file, data], columns={"text": "no"})) == 2  # it is in one of them
    with pytest.raises(DataError, match=r"needs query .*, or text .see --columns.*here are premise, yes"):
        read_pairs(data, columns={"positive": "yes"})
    with pytest.raises(ConfigError, match="answer is no role"):
        read_pairs(data, columns={"answer": "yes"})
    with pytest.raises(ConfigError, match="two words for one"):
        read_pairs(data, columns={"query": "premise", "anchor": "premise"})


GOOD = b'{"query": "q", "positive": "p", "text": "t", "label": "l"}\n'
HEADER = b"query,positive,text,label\nq,p,t,l\n"


def second(row: str) -> bytes:
    return GOOD + row.encode() + b"\n"


def damaged_parquet() -> bytes:
    """A file whose second row group is overwritten, and whose footer is whole."""
    import pyarrow
    import pyarrow.parquet as parquet

    sink = pyarrow.BufferOutputStream()
    table = pyarrow.Table.from_pylist([{"query": f"q{i}", "positive": f"p{i}", "text": f"t{i}"} for i in range(4000)])
    parquet.write_table(table, sink, row_group_size=2048, compression="none", use_dictionary=False)
    content = bytearray(sink.getvalue().to_pybytes())
    group = parquet.ParquetFile(pyarrow.BufferReader(bytes(content))).metadata.row_group(1)
    start = group.column(0).data_page_offset
    content[start : start + group.total_byte_size] = b"\xff" * group.total_byte_size
    return bytes(content)


HOSTILE = {
    "nested 100,000 deep": ("jsonl", second("[" * 100_000), 2, "nested too deeply"),
    "an object nested 100,000 deep": ("jsonl", second('{"text":' * 100_000), 2, "nested too deeply"),
    "an integer of 5,000 digits": ("jsonl", second('{"text": ' + "9" * 5000 + "}"), 2, "digits"),
    "an integer of 4,000 digits": ("jsonl", second('{"text": ' + "9" * 4000 + "}"), 2, ""),
    "NaN": ("jsonl", second('{"text": NaN}'), 2, "NaN is not a JSON number"),
    "infinity": ("jsonl", second('{"text": -Infinity}'), 2, "-Infinity is not"),
    "half a surrogate pair": ("jsonl", second('{"text": "\\ud800"}'), 2, "half of a surrogate pair"),
    "a NUL byte": ("jsonl", second('{"text": "\0"}'), 2, "NUL byte"),
    "UTF-16 without a mark": ("csv", HEADER.decode().encode("utf-16-le"), 1, "NUL byte"),
    "UTF-16 with a mark": ("csv", HEADER.decode().encode("utf-16"), 1, "not UTF-8"),
    "carriage returns alone": ("csv", HEADER.replace(b"\n", b"\r"), 1, "broken CSV"),
    "carriage returns alone in JSON": ("jsonl", GOOD.replace(b"\n", b"\r") * 3, 1, "broken JSON"),
    "a quote that is not closed": ("csv", HEADER + b'"q,p,t,l\n' * 3, 3, "broken CSV"),
    "a list": ("jsonl", second('["t"]'), 2, "a list, not an object"),
    "a list of lists": ("jsonl", second('{"query": [["q"]], "positive": "p", "text": [["t"]]}'), 2, "not a text"),
    "a packed file cut short": ("jsonl.gz", gzip.compress(GOOD)[:-9], 2, "not a whole gzip file"),
    "a packed file that is none": ("jsonl.gz", GOOD, 1, "not a whole gzip file"),
    "damage inside a packed file": ("jsonl.gz", gzip.compress(GOOD)[:12] + b"\xff" * 40, 1, "not a whole gzip file"),
    "a Parquet file cut short": ("parquet", damaged_parquet()[:-9], None, "not a readable Parquet file"),
    "damage inside a Parquet file": ("parquet", damaged_parquet(), 2049, "not a readable Parquet file"),
    "nothing": ("parquet", b"", None, "not a readable Parquet file"),
}
READERS = {
    "pairs": read_pairs,
    "texts": read_texts,
    "encode": lambda file: list(read_column(file, "text")),
    "task": lambda file: read_task_folder(file.parent),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_file_is_one_line_with_file_and_line_in_every_reader(case: str, tmp_path: Path):
    suffix, content, line, says = HOSTILE[case]
    file = tmp_path / f"test.{suffix}"
    file.write_bytes(content)
    (tmp_path / "task.json").write_text('{"type": "clustering"}')
    for name, read in READERS.items():
        if name == "task" and not suffix.startswith("jsonl"):
            continue
        with pytest.raises(DataError) as caught:
            read(file)
        assert "\n" not in str(caught.value), name
        assert len(str(caught.value)) < 600, name
        assert (caught.value.file, caught.value.line) == (str(file), line), name
        assert says in str(caught.value) or "not a text" in str(caught.value), name


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "csv", "txt", "json"])
def test_a_byte_order_mark_is_left_out_by_every_reader(suffix: str, tmp_path: Path):
    contents = {"csv": b"query,positive,text\nq,p,t\n", "txt": b"t\n"}
    content = b"\xef\xbb\xbf" + contents.get(suffix, b'{"query": "q", "positive": "p", "text": "t"}\n')
    file = tmp_path / f"a.{suffix}"
    if suffix == "json":
        file.write_bytes(b'\xef\xbb\xbf{"query_instruction": "Do it"}')
        assert read_pairs(write_pairs(tmp_path / "a.jsonl", example_pairs(3))).prompt == "Do it;\n"
        return
    file.write_bytes(gzip.compress(content) if suffix.endswith("gz") else content)
    assert list(read_column(file)) == list(read_texts(file).rows) == ["t"]
    if suffix != "txt":
        assert read_pairs(file).rows == (Pair("q", "p"),)


@pytest.mark.parametrize("suffix", [*WRITERS, "hf"])
def test_drawn_rows_are_those_of_the_whole_and_alone_in_memory(suffix: str, tmp_path: Path):
    rows = [{"query": f"query {i}", "positive": f"positive {i} {'word ' * 400}"} for i in range(5000)]
    data = tmp_path / f"data.{suffix}"
    if suffix == "hf":
        data = save_set(tmp_path / "set", rows, "saved")
    else:
        WRITERS[suffix](data, rows)
    del rows
    read_sources([data], most=100, seed=3)  # what is imported on the way is not counted
    tracemalloc.start()
    (drawn,) = read_sources([data], most=100, seed=3)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 6 << 20, "the texts are 10 MB"
    assert drawn == read_pairs(data).sample(100, 3)
    assert len(drawn.rows) == drawn.source.rows == 100


def test_most_rows_are_shared_by_the_files_and_all_are_checked(tmp_path: Path):
    files = [write_pairs(tmp_path / f"{name}.jsonl", example_pairs(50, seed)) for seed, name in enumerate("ab")]
    assert [len(source.rows) for source in read_sources(files, most=20, seed=1)] == [10, 10]
    read = [read_pairs(file) for file in files]
    assert read_sources(read, most=20, seed=1) == read_sources(files, most=20, seed=1)
    with files[1].open("a") as stream:
        stream.write('{"query": "q"}\n')
    with pytest.raises(DataError, match="line 51"):
        read_sources(files, most=20, seed=1)


def test_of_one_large_row_group_a_piece_is_in_memory(tmp_path: Path):
    """Arrow's memory is its own: what it holds at most while the rows are read, against what the texts take."""
    import pyarrow
    import pyarrow.parquet as parquet

    file = tmp_path / "one.parquet"
    texts = [f"{i} " + "".join(chr(97 + (i * j) % 26) for j in range(300)) for i in range(40_000)]
    table = pyarrow.table({"query": texts, "positive": texts, "vector": [[0.5] * 30] * len(texts)})
    parquet.write_table(table, file, row_group_size=len(texts), use_dictionary=False, compression="none")
    script = (
        "import pyarrow, sys\nfrom secateur.data.sources import read_sources\n"
        "(drawn,) = read_sources([sys.argv[1]], most=10, seed=1)\n"
        "print(len(drawn.rows), pyarrow.default_memory_pool().max_memory())"
    )
    done = subprocess.run([sys.executable, "-c", script, file], capture_output=True, text=True, check=True)
    count, most = map(int, done.stdout.split())
    assert (count, most < file.stat().st_size / 3) == (10, True), most


MISTAKES = {
    "profile": ("profile", "no-model", "--data", "bad.csv", "-o", "out"),
    "heal": ("heal", "no-model", "--data", "bad.csv", "-o", "out"),
    "held out": ("heal", "no-model", "--data", "good.jsonl", "--eval-data", "bad.csv", "-o", "out"),
    "study": ("study", "no-model", "--data", "bad.csv", "-o", "out"),
    "encode": ("encode", "no-model", "bad.csv", "-o", "out.npy"),
    "data set": ("profile", "no-model", "--data", "hf:a:b[", "-o", "out"),
    "beside": ("profile", "no-model", "--data", "told.jsonl", "-o", "out"),
}


def test_a_mistake_in_the_data_is_told_before_anything_heavy_is_imported(tmp_path: Path):
    (tmp_path / "good.jsonl").write_bytes(GOOD)
    (tmp_path / "told.jsonl").write_bytes(GOOD)
    (tmp_path / "told.json").write_text("[" * 100_000)
    (tmp_path / "bad.csv").write_bytes(b"query,positive,text\nq,p,t\nq,,\xff\n")
    script = (
        "import atexit, sys\nfrom secateur.cli import main\n"
        "heavy = {'torch', 'transformers', 'sentence_transformers', 'datasets', 'mteb', 'pandas', 'safetensors'}\n"
        "atexit.register(lambda: print(sorted(heavy & set(sys.modules))))\nmain()"
    )
    says = {"data set": "hf:a:b[: is no name", "beside": "told.json: broken JSON (it is nested too deeply)"}
    for name, command in MISTAKES.items():
        done = subprocess.run([sys.executable, "-c", script, *command], cwd=tmp_path, capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (2, "[]\n"), (name, done)
        assert done.stderr.startswith("secateur: ") and done.stderr.count("\n") == 1, name
        assert says.get(name, "bad.csv, line 3: ") in done.stderr, name
    assert sorted(file.name for file in tmp_path.iterdir()) == ["bad.csv", "good.jsonl", "told.json", "told.jsonl"]
