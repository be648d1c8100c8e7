from __future__ import annotations

import csv
import gzip
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pyarrow
import pyarrow.feather
import pyarrow.parquet as parquet
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import quantize_embeddings

from conftest import LETTERS, MakeEncoder, tiny_transformer
from forked import forked_encoders as forked_encoders
from forked import run, run_until
from secateur import accelerate, encode, evaluate, export, open_model
from secateur.cli import app
from secateur.data.rows import read_column
from secateur.errors import ConfigError, DataError, ModelError, OutputError, SecateurError
from secateur.inference import encoders
from secateur.inference.backends import choose, open_encoder
from secateur.inference.encode import SHARD
from secateur.inference.encoders import ModelEncoder, Opening
from secateur.measures.metrics import paired_cosines
from secateur.models import forward
from task_folders import example_rows, write_task

SCRIPTS = (
    "The gardener cut the hedge.",
    "Садовник подрезал изгородь.",
    "Ο κηπουρός έκοψε τον φράχτη.",
    "園丁修剪了樹籬。",
    "庭師が生け垣を刈り込んだ。",
    "정원사가 울타리를 잘랐다.",
    "قص البستاني السياج.",
    "הגנן גזם את הגדר החיה.",
    "माली ने बाड़ काटी।",
    "คนสวนตัดพุ่มไม้",
)
ODD = ("", " ", "🌿✂️🧑‍🌾", "a\x00b\x07\x1b[0m\t\r\n", "a" * 100_000, "cut the hedge back. " * 5000, "x")
MIXED = (*SCRIPTS, *ODD, *(f"text {i} " + "and so on, " * (i % 9) for i in range(40)))


def tiny_encoder(folder: Path) -> Path:
    """A tiny language model with a prompt, cut off at 64 tokens."""
    opened = open_model(
        tiny_transformer(folder / "plain", "llama", depth=2), pooling="mean", max_length=64, device="cpu"
    )
    opened.prompts = {"query": "find the word that is meant: "}
    opened.save(str(folder / "tiny"))
    return folder / "tiny"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_encoder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def reference(model: Path) -> SentenceTransformer:
    return SentenceTransformer(str(model), device="cpu")


def write_lines(file: Path, texts) -> Path:
    file.write_text("".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts)))
    return file


def vectors_of(file: Path) -> np.ndarray:
    if file.suffix.lower() == ".npy":
        return np.load(file)
    table = parquet.read_table(file) if file.suffix == ".parquet" else pyarrow.feather.read_table(file)
    assert table["row"].to_pylist() == list(range(len(table)))
    return np.array(table["embedding"].to_pylist())


def same(found: np.ndarray, expected: np.ndarray, least: float = 0.9999) -> None:
    assert found.shape == expected.shape
    assert paired_cosines(found, expected).min() >= least
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), np.linalg.norm(expected, axis=1), rtol=1e-3)


# --- the engine ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["bert", "llama"])
@pytest.mark.parametrize("prompt", ["", "find the word that is meant: "])
def test_accelerate_gives_the_vectors_of_the_model(make_encoder: MakeEncoder, architecture: str, prompt: str):
    own = make_encoder(architecture)
    fast = accelerate(own, batch_tokens=128)
    same(fast.encode(list(MIXED), prompt=prompt), own.encode(list(MIXED), prompt=prompt))


@pytest.mark.parametrize("pooling", ["weighted_mean", "mean", "lasttoken", "cls"])
def test_a_shared_instruction_is_pooled_as_it_should_be(llama_folder: Path, pooling: str):
    own = open_model(llama_folder, pooling=pooling, device="cpu")
    texts = [f"{i} and so on"[: 3 + i % 7] for i in range(50)]
    prompt = "a long instruction, that all of them share;\n"
    same(accelerate(own).encode(texts, prompt=prompt), own.encode(texts, prompt=prompt))


def test_a_prompt_is_run_once(make_encoder: MakeEncoder):
    own = make_encoder("llama")
    tokens = []
    own[0].auto_model.embed_tokens.register_forward_hook(lambda _, args, out: tokens.append(args[0].numel()))
    texts = [f"{i:04}" for i in range(400)]
    encoder = ModelEncoder(own)
    encoder.encode_texts(texts, "0123456789" * 5)  # finds out that the prompt can be shared
    tokens.clear()
    encoder.encode_texts(texts, "0123456789" * 5)
    assert sum(tokens) < 400 * 10, "54 tokens each where the prompt is run with every text"


def test_what_is_known_of_a_prompt_does_not_outlive_the_weights(make_encoder: MakeEncoder):
    own = make_encoder("llama")
    fast, texts, prompt = accelerate(own), [f"{i} and so on" for i in range(20)], "find the word that is meant: "
    before = fast.encode(texts, prompt=prompt)
    for block in own[0].auto_model.layers:
        block.mlp.down_proj.weight.data.mul_(-3)  # as peft merges: no version counter tells
    assert paired_cosines(fast.encode(texts, prompt=prompt), before).max() < 0.99
    same(fast.encode(texts, prompt=prompt), own.encode(texts, prompt=prompt))


def test_a_prompt_that_comes_out_a_little_otherwise_is_run_with_every_text(make_encoder: MakeEncoder, monkeypatch):
    """As with caches that round what they keep."""
    texts, prompt = [f"{i} and so on" for i in range(20)], "find the word that is meant: "
    exact = make_encoder("llama").encode(texts, prompt=prompt)

    def run_prefix(transformer, start):
        prefix = forward.run_prefix(transformer, start)
        for layer in prefix.cache.layers:
            layer.values = layer.values * 1.02
        return prefix

    monkeypatch.setattr(encoders, "run_prefix", run_prefix)
    found = ModelEncoder(make_encoder("llama")).encode_texts(texts, prompt)
    np.testing.assert_allclose(found, exact, atol=1e-5)


def test_without_memory_for_a_shared_prompt_it_is_run_with_every_text(make_encoder: MakeEncoder, monkeypatch):
    def run_prefix(*_: object) -> None:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(encoders, "run_prefix", run_prefix)
    own, texts, prompt = make_encoder("llama"), [f"{i} and so on" for i in range(20)], "find the word that is meant: "
    same(ModelEncoder(own).encode_texts(texts, prompt), own.encode(texts, prompt=prompt))


def test_of_a_long_text_so_much_is_tokenized_as_the_model_reads(make_encoder: MakeEncoder):
    own = make_encoder("bert")
    own.max_seq_length = 16
    spaces = " " * 20_000
    texts = ["one" + spaces + "two" + spaces + "three", spaces, "a" * 200_000, f"{spaces}end", "x y " * 50_000]
    lengths = []
    tokenize = own.preprocess

    def count(texts: list[str], **options):
        lengths.extend(map(len, texts))
        return tokenize(texts, **options)

    own.preprocess = count
    encoder = ModelEncoder(own)
    lengths.clear()
    found = encoder.encode_texts(texts)
    assert sorted(lengths)[:2] == [1024, 1024]
    del own.preprocess
    same(found, own.encode(texts))


def test_accelerate_gives_as_many_numbers_as_are_asked_for(make_encoder: MakeEncoder):
    own = make_encoder("bert")
    own.truncate_dim = 8
    fast = accelerate(own)
    for asked in (None, 4, 8, 16):
        same(fast.encode(["one", "two"], truncate_dim=asked), own.encode(["one", "two"], truncate_dim=asked))


def test_accelerate_reads_as_much_of_a_text_as_the_model_does_now(make_encoder: MakeEncoder):
    own = make_encoder("bert")
    own.max_seq_length = 16
    fast = accelerate(own)
    for length in (64, 8):
        fast.max_seq_length = length
        same(fast.encode(["cut the hedge " * 9]), own.encode(["cut the hedge " * 9]))


def test_accelerate_keeps_the_signature(make_encoder: MakeEncoder):
    own = make_encoder("llama", prompts={"query": "what? "})
    fast = accelerate(own)
    texts = ["one", "two", "one", "three, and more"]
    for options in (
        {"convert_to_tensor": True},
        {"normalize_embeddings": True, "truncate_dim": 8},
        {"prompt_name": "query"},
        {"precision": "binary"},
        {"convert_to_numpy": False},
    ):
        found, expected = fast.encode(texts, **options), own.encode(texts, **options)
        assert type(found) is type(expected)
        same(np.stack([np.asarray(v) for v in found]), np.stack([np.asarray(v) for v in expected]))
    assert fast.encode("one").shape == own.encode("one").shape
    assert fast.encode([]).shape == own.encode([]).shape
    tokens = fast.encode(["one"], output_value="token_embeddings")
    np.testing.assert_allclose(tokens[0], own.encode(["one"], output_value="token_embeddings")[0])
    same(fast.encode_query(texts), own.encode_query(texts))
    assert isinstance(fast, SentenceTransformer)


def test_a_name_is_no_model_to_accelerate(llama_folder: Path):
    for name in (llama_folder, str(llama_folder)):
        with pytest.raises(ModelError, match=r"is not an open SentenceTransformer: open it with secateur.open_model"):
            accelerate(name)


@pytest.mark.parametrize("kind", ["sts", "retrieval"])
def test_an_accelerated_model_has_the_same_scores(make_encoder: MakeEncoder, tmp_path: Path, kind: str):
    own = make_encoder("llama", prompts={"query": "find the word that is meant: "})
    task = write_task(tmp_path / kind, kind, example_rows(kind), instruction="find the word that is meant")
    scores = evaluate([own, accelerate(own)], [task], names=["own", "fast"])
    first, second = (row.score for row in scores.rows)
    assert second == pytest.approx(first, abs=1e-4)


def test_auto_measures_where_there_is_much_to_encode_on_texts_of_the_run(model: Path, tmp_path: Path, monkeypatch):
    asked = []

    def look(opening, least, texts, count, prompts_of):
        chosen = choose(opening, least, texts, count, prompts_of)
        asked.append((texts, count, prompts_of(chosen.encoder)))
        return chosen

    monkeypatch.setattr("secateur.inference.encode.choose", look)
    few, many = ["one", "two"], [f"{i} {'word ' * (20 + i % 60)}" for i in range(1000)]
    for number, texts in enumerate((few, many)):
        file = write_lines(tmp_path / f"{number}.jsonl", texts * 2)
        encode(model, [file], out=tmp_path / f"{number}.npy", prompt_name="query", backend="torch")
    (_, nothing, _), (drawn, count, prompts) = asked
    assert (nothing, count, prompts) == (0, 1000, ["find the word that is meant: "])
    assert len(set(drawn)) == len(drawn) == 64
    assert set(drawn) <= set(many)
    assert set(drawn) != set(many[:64]), "not the first ones"


# --- files in, one file out ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".parquet", ".arrow", ".npy", ".NPY"])
def test_files_become_one_file_in_order(model: Path, reference, tmp_path: Path, suffix: str):
    lines = write_lines(tmp_path / "a.jsonl", MIXED)
    packed = tmp_path / "b.txt.gz"
    packed.write_bytes(gzip.compress(b"one\n\nthree\r\nfour"))
    done = encode(model, [lines, packed], out=tmp_path / f"v{suffix}", dtype="float32")
    expected = reference.encode([*MIXED, "one", "", "three", "four"])
    same(vectors_of(done.file), expected)
    assert (done.rows, done.distinct, done.dimension) == (len(MIXED) + 4, len(MIXED) + 3, 32)
    assert [item.name for item in tmp_path.iterdir() if "partial" in item.name] == []


def test_whatever_the_text_bfloat16_is_near_to_float32(model: Path, reference, tmp_path: Path):
    file = write_lines(tmp_path / "a.jsonl", MIXED)
    done = encode(model, [file], out=tmp_path / "v.npy", dtype="bfloat16")
    assert done.dtype == "bfloat16"
    assert paired_cosines(vectors_of(done.file), reference.encode(list(MIXED))).min() >= 0.999


def test_every_input_format_gives_the_same(model: Path, tmp_path: Path):
    texts = ["one", "two, with a comma", 'three "quoted"\nlines', "émigré 🌿"]
    write_lines(tmp_path / "a.jsonl", texts)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    with (tmp_path / "a.csv").open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([("id", "text"), *enumerate(texts)])
    parquet.write_table(pyarrow.table({"id": range(4), "text": texts}), tmp_path / "a.parquet")
    names = ["a.jsonl", "a.jsonl.gz", "a.csv", "a.parquet"]
    (tmp_path / "capitals").mkdir()
    names += [f"capitals/{shutil.copy(tmp_path / name, tmp_path / 'capitals' / name.upper()).name}" for name in names]
    found = [
        vectors_of(encode(model, [tmp_path / name], out=tmp_path / f"{name}.npy", dtype="float32").file)
        for name in names
    ]
    for other in found[1:]:
        np.testing.assert_array_equal(found[0], other)


def test_prompts_lengths_and_precisions(model: Path, reference, tmp_path: Path):
    file = write_lines(tmp_path / "a.jsonl", [*SCRIPTS, *LETTERS])
    texts = [*SCRIPTS, *LETTERS]

    def run(name: str, **options):
        return vectors_of(encode(model, [file], out=tmp_path / f"{name}.npy", dtype="float32", **options).file)

    same(run("prompt", prompt_name="query"), reference.encode(texts, prompt_name="query"))
    same(run("instruction", instruction="find"), reference.encode(texts, prompt="find;\n"))
    short = reference.encode(texts, truncate_dim=8, normalize_embeddings=True)
    same(run("short", dimensions=8, normalize=True), short)
    whole = run("whole")
    np.testing.assert_array_equal(run("int8", precision="int8"), quantize_embeddings(whole, "int8"))
    np.testing.assert_array_equal(run("binary", precision="binary"), quantize_embeddings(whole, "binary"))
    ranges = np.array(json.loads((tmp_path / "int8.npy.json").read_text())["ranges"])
    np.testing.assert_allclose(ranges, [whole.min(axis=0), whole.max(axis=0)])


@pytest.mark.parametrize("suffix", [".npy", ".parquet", ".arrow"])
def test_queries_are_rounded_by_the_ranges_of_the_documents(model: Path, reference, tmp_path: Path, suffix: str):
    documents, query = write_lines(tmp_path / "a.jsonl", SCRIPTS), write_lines(tmp_path / "b.jsonl", ["a hedge"])
    options = {"precision": "int8", "dtype": "float32"}
    earlier = encode(model, documents, out=tmp_path / f"documents{suffix}", **options).file
    done = encode(model, query, out=tmp_path / "query.npy", ranges=earlier, **options)
    whole = encode(model, documents, out=tmp_path / "whole.npy", dtype="float32").file
    ranges = np.stack([np.load(whole).min(axis=0), np.load(whole).max(axis=0)])
    alone = vectors_of(encode(model, query, out=tmp_path / "alone.npy", dtype="float32").file)
    np.testing.assert_array_equal(vectors_of(done.file), quantize_embeddings(alone, "int8", ranges=ranges))
    told = json.loads((tmp_path / "query.npy.json").read_text())["ranges"]
    np.testing.assert_allclose(told, ranges, rtol=1e-6)
    for wrong, says in (
        ({"dimensions": 8}, "2 by 32 ranges, not 2 by 8"),
        ({"dtype": "bfloat16"}, "another dtype"),
        ({"normalize": True}, "another --normalize"),
    ):
        with pytest.raises(ConfigError, match=says):
            encode(model, query, out=tmp_path / "no.npy", ranges=earlier, **options | wrong)
    with pytest.raises(ConfigError, match="goes with --precision int8"):
        encode(model, query, out=tmp_path / "no.npy", ranges=earlier)


@pytest.mark.parametrize("texts", [["one"], ["one"] * 5, ["é", "ü"]])
def test_vectors_without_ranges_are_not_rounded(model: Path, tmp_path: Path, texts: list[str]):
    """The third are distinct texts of one vector: the tokenizer knows neither letter."""
    file = write_lines(tmp_path / "a.jsonl", texts)
    with pytest.raises(ConfigError, match=r"precision: all vectors are the same.*--ranges FILE"):
        encode(model, file, out=tmp_path / "v.npy", precision="int8")
    for wrong, says in (("whole.npy", "no such file"), ("a.jsonl", "broken JSON|tells no ranges")):
        with pytest.raises(DataError, match=says):
            encode(model, file, out=tmp_path / "v.npy", precision="int8", ranges=tmp_path / wrong)
    (tmp_path / "whole.npy.json").write_text("{}")
    with pytest.raises(DataError, match="tells no ranges"):
        encode(model, file, out=tmp_path / "v.npy", precision="int8", ranges=tmp_path / "whole.npy")


def test_each_distinct_text_is_encoded_once(model: Path, reference, tmp_path: Path):
    rng = random.Random(0)
    texts = [f"text {rng.randrange(300)}" for _ in range(SHARD + 500)]
    done = encode(model, [write_lines(tmp_path / "a.jsonl", texts)], out=tmp_path / "v.npy", dtype="float32")
    assert done.distinct == done.encoded == len(set(texts))
    by_text = dict(zip(sorted(set(texts)), reference.encode(sorted(set(texts))), strict=True))
    same(vectors_of(done.file), np.stack([by_text[text] for text in texts]))


@pytest.mark.slow
def test_killed_five_times_it_goes_on(model: Path, reference, tmp_path: Path):
    texts = [f"{i} {'word ' * (i % 5)}" for i in range(2 * SHARD + 100)]
    texts += texts[:100]
    file = write_lines(tmp_path / "a.jsonl", texts)
    command = ("encode", model, file, "-o", tmp_path / "v.parquet", "--dtype", "float32")
    for shard in ("texts.sqlite", "done.json", "00000000.npy", "00000001.npy", "result"):
        run_until(tmp_path / "v.parquet.partial", shard, *command)
    assert not (tmp_path / "v.parquet").exists()
    done = encode(model, [file], out=tmp_path / "v.parquet", dtype="float32")
    assert done.encoded < len(texts), "what was finished is not done again"
    same(vectors_of(done.file), reference.encode(texts))


def interrupted(model: Path, file: Path, out: Path, **options: object) -> None:
    """Run until the first text would be encoded."""

    def interrupt(what: str, *_: object) -> None:
        if what == "texts":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        encode(model, [file], out=out, progress=interrupt, **options)
    assert out.with_name(f"{out.name}.partial").exists()


def test_a_partial_run_is_finished_only_by_itself(model: Path, tmp_path: Path):
    file = write_lines(tmp_path / "a.jsonl", ["one", "two"])
    interrupted(model, file, tmp_path / "v.npy")
    with pytest.raises(OutputError, match="unfinished run with other prompt"):
        encode(model, [file], out=tmp_path / "v.npy", instruction="find")
    write_lines(file, ["one", "three"])
    with pytest.raises(OutputError, match="unfinished run with other inputs"):
        encode(model, [file], out=tmp_path / "v.npy")
    write_lines(file, ["one", "two"])
    encode(model, [file], out=tmp_path / "v.npy")
    with pytest.raises(OutputError, match="exists already"):
        encode(model, [file], out=tmp_path / "v.npy")
    interrupted(model, file, tmp_path / "w.npy")
    made = (tmp_path / "w.npy.partial" / "done.json").read_text()
    (tmp_path / "w.npy.partial" / "done.json").write_text("{}")
    with pytest.raises(DataError, match=r"done\.json: does not say what was made here: bring it back, or remove"):
        encode(model, [file], out=tmp_path / "w.npy")
    (tmp_path / "w.npy.partial" / "done.json").write_text(made)
    (tmp_path / "w.npy.partial" / "done.json").rename(tmp_path / "w.npy.partial" / "job.json")
    with pytest.raises(OutputError, match="unfinished run of an earlier version: remove the folder"):
        encode(model, [file], out=tmp_path / "w.npy")
    assert (tmp_path / "w.npy.partial" / "places.npy").exists(), "what was computed is not removed unasked"


def test_a_second_run_keeps_out_of_the_first_ones_way(model: Path, reference, tmp_path: Path):
    texts = [f"{i} {'word ' * (i % 5)}" for i in range(SHARD + 5)]
    file, other = write_lines(tmp_path / "a.jsonl", texts), write_lines(tmp_path / "b.jsonl", texts[::-1] * 2)
    refused = []

    def start_another(*_: object) -> None:
        with pytest.raises(OutputError, match="another run") as error:
            encode(model, other, out=tmp_path / "v.npy", dtype="float32")
        refused.append(error)

    encode(model, file, out=tmp_path / "v.npy", dtype="float32", progress=start_another)
    assert refused
    same(np.load(tmp_path / "v.npy"), reference.encode(texts))


def test_texts_that_change_once_they_were_read_are_in_nobodys_way(model: Path, reference, tmp_path: Path):
    texts = [f"{i} {'word ' * (i % 5)}" for i in range(SHARD + 5)]
    file = write_lines(tmp_path / "a.jsonl", texts)

    def change(what: str, *_: object) -> None:
        if what == "read":
            write_lines(file, [text[::-1] for text in texts[:-9]])

    encode(model, file, out=tmp_path / "v.npy", dtype="float32", progress=change)
    same(np.load(tmp_path / "v.npy"), reference.encode(texts))


def test_a_description_that_a_killed_run_left_is_in_nobodys_way(model: Path, reference, tmp_path: Path):
    file = write_lines(tmp_path / "a.jsonl", ["one", "two"])
    interrupted(model, file, tmp_path / "v.npy")
    (tmp_path / "v.npy.json").write_text("{}")
    encode(model, file, out=tmp_path / "v.npy")
    same(np.load(tmp_path / "v.npy"), reference.encode(["one", "two"]))
    assert json.loads((tmp_path / "v.npy.json").read_text())["inputs"]["rows"] == 2


class Killer(threading.Thread):
    """Kills one that a child of this process has started, one whose command line holds ``name``, once ``file`` is
    there.
    """

    def __init__(self, file: Path, name: str) -> None:
        super().__init__(daemon=True)
        self.file, self.name_of_victim = file, name
        self.killed = self.over = False

    def run(self) -> None:
        while not (self.killed or self.over):
            for child in psutil.Process().children(recursive=True) if self.file.exists() else []:
                if child.ppid() != os.getpid() and self.name_of_victim in " ".join(child.cmdline()):
                    child.kill()
                    self.killed = True
                    return
            time.sleep(0.005)

    def __enter__(self) -> Killer:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over = True
        self.join()


@pytest.mark.slow
def test_the_script_that_asks_for_processes_is_run_once(model: Path, reference, tmp_path: Path):
    """Without the ``if __name__ == "__main__"`` that multiprocessing wants of scripts."""
    write_lines(tmp_path / "a.jsonl", ["one", "two"])
    options = "out='v.npy', dtype='float32', backend='torch', processes=2"
    script = f"import secateur\nprint('run')\nsecateur.encode({str(model)!r}, 'a.jsonl', {options})\n"
    (tmp_path / "script.py").write_text(script)
    done = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "run\n"), done.stderr
    same(np.load(tmp_path / "v.npy"), reference.encode(["one", "two"]))


AT_THE_END = """
import atexit, os, sys
def tell():
    if torch := sys.modules.get("torch"):
        with open(f"{os.environ['TOLD']}/{os.getpid()}", "w") as file:
            file.write(str(torch.get_num_threads()))
atexit.register(tell)
"""


@pytest.mark.slow
def test_processes_have_their_share_of_the_threads(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("python", "told"):
        (tmp_path / name).mkdir()
    (tmp_path / "python" / "sitecustomize.py").write_text(AT_THE_END)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "python"), *filter(None, sys.path)]))
    monkeypatch.setenv("TOLD", str(tmp_path / "told"))
    file, threads = write_lines(tmp_path / "a.jsonl", ["one", "two"]), torch.get_num_threads()
    torch.set_num_threads(7)
    try:
        encode(model, [file], out=tmp_path / "v.npy", dtype="float32", backend="torch", processes=2)
    finally:
        torch.set_num_threads(threads)
    # Of two, one may be ended before it has begun: the other has done all there was.
    assert {int(file.read_text()) for file in (tmp_path / "told").iterdir()} == {3}


@pytest.mark.slow
@pytest.mark.usefixtures("forked_encoders")
@pytest.mark.parametrize(("name", "options"), [("forkserver", {"processes": 2}), ("TextEncoder", {"ray": "local"})])
def test_a_dead_worker_is_replaced(model: Path, reference, tmp_path: Path, name: str, options):
    if "ray" in options:
        pytest.importorskip("ray")
    texts = [f"{i} word" for i in range(4 * SHARD)]
    file = write_lines(tmp_path / "a.jsonl", texts)
    with Killer(tmp_path / "v.npy.partial" / "00000000.npy", name) as killer:
        done = encode(model, [file], out=tmp_path / "v.npy", dtype="float32", **options)
    assert killer.killed
    same(vectors_of(done.file), reference.encode(texts))


@pytest.mark.slow  # processes start
@pytest.mark.usefixtures("forked_encoders")
def test_no_worker_encodes_with_a_model_that_came_later(model: Path, tmp_path: Path):
    folder, file = shutil.copytree(model, tmp_path / "model"), write_lines(tmp_path / "a.jsonl", ["one"])

    def replace_it(what: str, done: int, *_: object) -> None:
        if (what, done) == ("model opened", 1):
            later = SentenceTransformer(str(folder), device="cpu")
            later[0].auto_model.get_input_embeddings().weight.data += 1
            later.save(str(folder))

    with pytest.raises(SecateurError, match="has been replaced since the work began"):
        encode(folder, file, out=tmp_path / "v.npy", processes=2, progress=replace_it)


@pytest.fixture(scope="module")
def exported(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("onnxruntime")
    folder = tmp_path_factory.mktemp("exports") / "exported"
    export(model, out=folder, to="onnx")
    return folder


def test_an_export_encodes_too(exported: Path, reference, tmp_path: Path):
    texts = ["one", "two and more", "", "one"]
    done = encode(exported, [write_lines(tmp_path / "a.jsonl", texts)], out=tmp_path / "v.npy")
    same(vectors_of(done.file), reference.encode(texts))
    assert (done.rows, done.distinct) == (4, 3)


def test_an_export_has_decided_how_it_encodes(exported: Path):
    for options in (
        {"dtype": "bfloat16"},
        {"dtype": "int8"},
        {"backend": "openvino"},
        {"device": "cpu"},
        {"pooling": "mean"},
        {"max_length": 8},
        {"trust_remote_code": True},
    ):
        with pytest.raises(ConfigError, match=f"{next(iter(options))}: cannot be chosen for an export"):
            open_encoder(Opening(str(exported), **options))
    assert open_encoder(Opening(str(exported), dtype="float32", backend="onnx")).dtype == "float32"


# --- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "one"}\n{"text": 5}\n', 'line 2, "text": holds a int, not a text'),
        ("a.jsonl", '{"text": "one"}\n{"text": null}\n', 'line 2, "text": has no text'),
        ("a.jsonl", '{"id": 1, "words": "one"}\n', "line 1: none of its columns is known .* id, words"),
        ("a.jsonl", '{"text": "one"}\n{"words": "one"}\n', "line 2: no column text: .* words"),
        ("a.jsonl", '{"text": "one"}\n{"text": \n', "line 2: broken JSON"),
        ("a.jsonl", '{"text": "one"}\n{"text": "a", "text": "b"}\n', 'line 2: .*the key "text" is there twice'),
        ("a.jsonl", "", "holds no text"),
        ("a.csv", "text,id,text\n1,one,a\n", 'line 1, "text": is the name of 2 columns'),
        ("a.csv", "id,words\n1,one\n", "line 2: none of its columns is known .* id, words"),
        ("a.csv", "id,text\n1,one\n2\n", "line 3: has 1 columns, the first line 2"),
        ("a.csv", 'id,text\n1,"one\n', "broken CSV"),
        ("a.txt", b"one\ntw\xff\n", "line 2: byte 3 is not UTF-8"),
        ("a.txt.gz", b"not gzip", "not a whole gzip file"),
        ("a.parquet", b"PAR1 no", "not a readable Parquet file"),
        ("a.xlsx", "", "of no known format"),
    ],
)
def test_a_mistake_in_the_input_is_found_before_the_model_is_opened(tmp_path: Path, name: str, content, message: str):
    file = tmp_path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=message):
        encode(tmp_path / "no model", [file], out=tmp_path / "v.npy")


def test_a_mistake_in_parquet_is_found(tmp_path: Path):
    file = tmp_path / "a.parquet"
    column = pyarrow.array(["one"] * 1500, pyarrow.string())
    parquet.write_table(pyarrow.table([column, column], names=["text", "text"]), file)
    with pytest.raises(DataError, match='"text": is the name of 2 columns'):
        list(read_column(file))
    broken = pyarrow.array([b"one"] * 1200 + [b"t\xff"], pyarrow.binary()).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"text": broken}), file)
    with pytest.raises(DataError, match="a text in the rows 1025 to 1201 is not UTF-8"):
        list(read_column(file))


def test_what_is_no_file_that_can_be_read_twice(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "folder.csv").mkdir()
    for name, says in (("pipe.txt", "write it into a file"), ("folder.csv", "is a folder"), ("a.txt", "no such file")):
        with pytest.raises(DataError, match=says):
            list(read_column(tmp_path / name))


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="a file that cannot be read, even by root")
@pytest.mark.parametrize("name", ["a.txt", "a.csv", "a.jsonl"])
def test_an_input_that_cannot_be_read_is_not_the_outputs_fault(name: str, tmp_path: Path):
    (tmp_path / name).symlink_to("/proc/self/mem")
    with pytest.raises(DataError, match=f"{name}: cannot be read"):
        encode(tmp_path / "no model", [tmp_path / name], out=tmp_path / "v.npy")


def test_ranges_that_are_not_there_are_told_before_the_texts_are_read(tmp_path: Path):
    file = write_lines(tmp_path / "a.jsonl", ["one", "two"])
    (tmp_path / "no model").mkdir()
    words = ["encode", tmp_path / "no model", file, "-o", tmp_path / "v.npy", "--ranges", tmp_path / "none.parquet"]
    with pytest.raises(DataError, match=r"none\.parquet: no such file"):
        app([*map(str, words), "--precision", "int8"], standalone_mode=False)


def test_mistakes_in_the_options(model: Path, tmp_path: Path):
    file = write_lines(tmp_path / "a.jsonl", ["one", "two"])
    with pytest.raises(ConfigError, match=r"one of .parquet, .arrow, .feather, .npy"):
        encode(model, [file], out=tmp_path / "v.json")
    with pytest.raises(ConfigError, match="its prompts: query"):
        encode(model, [file], out=tmp_path / "v.npy", prompt_name="passage")
    with pytest.raises(ConfigError, match="at most 32"):
        encode(model, [file], out=tmp_path / "v.npy", dimensions=64)
    with pytest.raises(DataError, match="no such file"):
        encode(model, [tmp_path / "b.jsonl"], out=tmp_path / "v.npy")
    with pytest.raises(DataError, match=r"no column words.*id, text"):
        encode(model, [file], out=tmp_path / "v.npy", column="words")
    for option in ({"dimensions": 0}, {"precision": "uint8"}, {"processes": 0}, {"files": []}):
        with pytest.raises(ConfigError, match=next(iter(option))):
            encode(model, out=tmp_path / "v.npy", **{"files": file, **option})
    assert [item.name for item in tmp_path.iterdir()] == ["a.jsonl"], "what has not begun leaves nothing behind"


@pytest.mark.parametrize("dtype", ["mixed", "foo"])
def test_a_number_format_that_is_none(model: Path, dtype: str):
    with pytest.raises(ConfigError, match=f"dtype: .*'{dtype}'"):
        encode(model, ["a.txt"], out="v.npy", dtype=dtype)
    with pytest.raises(ConfigError, match=f"dtype: .*'{dtype}'"):
        open_encoder(Opening(str(model), dtype=dtype, device="cpu"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_the_end_of_a_container_are_one_line(number: int, tmp_path: Path):
    write_lines(tmp_path / "a.jsonl", (f"{i}" for i in range(100_000)))
    (tmp_path / "no model").mkdir()  # it is opened after the texts have been read
    command = ("encode", tmp_path / "no model", tmp_path / "a.jsonl", "-o", tmp_path / "v.npy")
    done = run(*command, watch=(number, tmp_path / "v.npy.partial", "texts.sqlite"))
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr.splitlines()[-1] == "secateur: interrupted; the same command goes on where it can"
    assert "Traceback" not in done.stderr


def test_the_command(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    file = write_lines(tmp_path / "a.jsonl", ["one", "two", "one"])
    app(["encode", str(model), str(file), "-o", str(tmp_path / "v.parquet")], standalone_mode=False)
    told = capsys.readouterr()
    assert told.out.strip() == str(tmp_path / "v.parquet")
    assert "3 rows, 2 distinct texts, 32 dimensions" in told.err
    assert "encoded 2 texts" in told.err
    assert "tokens per second" in told.err
    app(["encode", str(model), str(write_lines(file, ["one"])), "-o", str(tmp_path / "w.npy")], standalone_mode=False)
    told = capsys.readouterr()
    assert "1 row, 1 distinct text, 32 dimensions" in told.err and "encoded 1 text," in told.err


@pytest.mark.usefixtures("forked_encoders")
@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_progress_counts_texts_and_tokens(model: Path, tmp_path: Path, processes: int):
    texts = ["a" * (1 + i % 9) + str(i) for i in range(SHARD + 10)]
    file, out, told = write_lines(tmp_path / "a.jsonl", [*texts, *texts]), tmp_path / "v.npy", []
    done = encode(
        model, [file], out=out, dtype="float32", processes=processes, progress=lambda *some: told.append(some)
    )
    assert done.tokens == sum(map(len, texts)), "one token a letter"
    assert [some for some in told if some[0] == "texts"][-1] == ("texts", len(texts), len(texts))
    assert [some for some in told if some[0] == "tokens"][-1] == ("tokens", done.tokens, 0)
    counts = [count for what, count, _ in told if what == "texts"]
    assert counts == sorted(counts)
    assert len(counts) >= (20 if processes == 1 else 2), "it is told while a shard is at work"
