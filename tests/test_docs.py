"""The pages as a reader uses them: each block of code runs, on tiny models that have the names of real ones.

A block is left out where the comment before it says why: ``<!-- not run: needs a cluster -->``. The others, ``sh`` and
``python``, run one after the other in a folder for each page; ``<!-- in a folder of its own -->`` begins a new one, and
``<!-- file: study.yaml -->`` writes the block to a file. Trainings take a few steps, and small vocabularies have
300 tokens, whatever number is printed; ``report`` alone draws figures, and servers do not look for what is fastest.
"""

from __future__ import annotations

import json
import random
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path

import pytest
import yaml
from markdown_it import MarkdownIt
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Normalize, Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel, PreTrainedTokenizerFast

import secateur as package
from forked import start
from quick_checks import quick_checks as quick_checks
from quick_checks import quick_figures
from secateur.cli import commands

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted(path for path in (ROOT / "docs").rglob("*.md") if "example" not in path.parts)]
STEPS, TOKENS = "4", "300"
TRAININGS = ("heal", "scout", "study")
LANGUAGE_MODELS = {"MODEL": 8, "Qwen/Qwen3-0.6B": 8}
EMBEDDERS = {"sentence-transformers/all-MiniLM-L6-v2": 6, "intfloat/e5-small-v2": 8}
READY = ("profile", "scout", "cut", "healed")
"""Folders that a page may use without having made them."""


def blocks(page: Path) -> list[tuple[str, str, str]]:
    """Language, comment and text of each block of code."""
    tokens = MarkdownIt().parse(page.read_text(encoding="utf-8"))
    before = [None, *tokens]
    return [
        (token.info, last.content.strip() if last and last.type == "html_block" else "", token.content)
        for last, token in zip(before, tokens, strict=False)
        if token.type == "fence"
    ]


def runs(page: Path) -> bool:
    return any(kind in ("sh", "python") and "not run:" not in note for kind, note, _ in blocks(page))


def write_model(folder: Path, kind: str, depth: int, texts: list[str]) -> None:
    """A random model with a tokenizer that was made from the texts: byte-level BPE, or WordPiece."""
    special = {"pad_token": "<pad>", "unk_token": "<unk>", "model_max_length": 128}
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "max_position_embeddings": 128}
    if kind == "llama":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<pad>", "<unk>"], initial_alphabet=alphabet)
    else:
        tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(vocab_size=400, special_tokens=["<pad>", "<unk>"])
    tokenizer.train_from_iterator(texts, trainer)
    sizes |= {"vocab_size": tokenizer.get_vocab_size(), "num_hidden_layers": depth, "pad_token_id": 0}
    model = (
        LlamaModel(LlamaConfig(**sizes, num_key_value_heads=2)) if kind == "llama" else BertModel(BertConfig(**sizes))
    )
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    if kind == "bert":
        transformer = Transformer(str(folder))
        pooling = Pooling(transformer.get_embedding_dimension(), "mean")
        SentenceTransformer(modules=[transformer, pooling, Normalize()], device="cpu").save(str(folder))


def write_lines(file: Path, rows: list[dict[str, object]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory, quick_checks: None) -> Path:
    """The models, data and tasks that the pages name, and what their commands would have made of them."""
    folder = tmp_path_factory.mktemp("workshop")
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(3, 7))) for _ in range(300)]
    phrases = [" ".join(rng.sample(words, 4)) for _ in range(400)]
    pairs = [{"query": f"what is {text}?", "positive": f"{text}, and {rng.choice(words)}."} for text in phrases]
    texts = [pair["positive"] for pair in pairs]
    write_lines(folder / "pairs.jsonl", pairs[:320])
    write_lines(folder / "held-out.jsonl", pairs[320:360])
    write_lines(folder / "texts.jsonl", [{"text": text} for text in texts])
    (folder / "texts.txt").write_text("\n".join(texts), encoding="utf-8")
    task = folder / "tasks" / "my-search"
    judged = pairs[360:]
    write_lines(task / "corpus.jsonl", [{"_id": f"d{i}", "text": row["positive"]} for i, row in enumerate(judged)])
    write_lines(task / "queries.jsonl", [{"_id": f"q{i}", "text": row["query"]} for i, row in enumerate(judged)])
    lines = ["query-id\tcorpus-id\tscore", *(f"q{i}\td{i}\t1" for i in range(len(judged)))]
    (task / "qrels.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (task / "task.json").write_text('{"type": "retrieval"}', encoding="utf-8")
    for name, depth in LANGUAGE_MODELS.items():
        write_model(folder / name, "llama", depth, texts)
    for name, depth in EMBEDDERS.items():
        write_model(folder / name, "bert", depth, texts)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        secateur(["profile", "MODEL", "--data", "pairs.jsonl", "-o", "profile"])
        secateur(["scout", "MODEL", "--data", "pairs.jsonl", "--tasks", "tasks/my-search", "-o", "scout"])
        secateur(["prune", "MODEL", "--to", "2", "-o", "cut"])
        secateur(["heal", "cut", "--data", "pairs.jsonl", "-o", "healed"])
    return folder


def secateur(words: list[str]) -> None:
    """A command, in this process."""
    words = [found for word in words for found in (sorted(map(str, Path().glob(word))) if "*" in word else [word])]
    if "--vocab-size" in words:
        words[words.index("--vocab-size") + 1] = TOKENS
    if words[0] in TRAININGS and words[1] not in ("status", "resume"):
        words += ["--steps", STEPS]  # of an option that is given twice, the last one counts
    if words[0] == "export":
        words += ["--max-loss", "100"]  # random weights lose more than trained ones
    drawn = nullcontext() if words[0] == "report" else quick_figures()
    with pytest.MonkeyPatch.context() as patch, drawn, pytest.raises(SystemExit) as ended:
        patch.setattr(sys, "argv", ["secateur", *words])
        commands.main()
    assert not ended.value.code, f"secateur {shlex.join(words)}"


@contextmanager
def server(words: list[str], port: int) -> Iterator[None]:
    """``secateur serve`` in a process of its own, until the page ends."""
    log = Path("server.log")
    process = start([*words, "--backend", "torch", "--dtype", "float32", "--port", port], log, log)
    try:
        for _ in range(600):
            assert process.is_alive(), log.read_text()
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/ready").close()
                break
            except OSError:
                time.sleep(0.2)
        yield
    finally:
        process.terminate()
        process.join()


def free_port() -> int:
    with socket.socket() as given:
        given.bind(("127.0.0.1", 0))
        return given.getsockname()[1]


def shell(code: str, port: int, page: ExitStack) -> None:
    for line in code.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words[:2] == ["secateur", "serve"]:
            page.enter_context(server(words[1:], port))
        elif words[:1] == ["secateur"]:
            secateur(words[1:])
        elif words:
            subprocess.run(["bash", "-ec", line], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("page", filter(runs, PAGES), ids=lambda page: page.stem)
def test_what_a_page_shows_runs(page: Path, workshop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    code = "".join(text for _, note, text in blocks(page) if "not run:" not in note)
    made = re.findall(r"""(?:-o |out=")([\w-]+)""", code)
    left_out = shutil.ignore_patterns(*(name for name in READY if name in made))

    def new_folder(name: str) -> None:
        shutil.copytree(workshop, tmp_path / name, ignore=left_out)
        monkeypatch.chdir(tmp_path / name)

    new_folder("page")
    port, names = free_port(), {"__name__": "page"}
    with ExitStack() as servers:
        for number, (kind, note, text) in enumerate(blocks(page)):
            if "not run:" in note:
                continue
            if "in a folder of its own" in note:
                new_folder(f"page-{number}")
            if file := re.search(r"file: (\S+)", note):
                Path(file[1]).write_text(text, encoding="utf-8")
            elif kind == "sh":
                shell(text, port, servers)
            elif kind == "python":
                exec(re.sub(r"steps=\d+", f"steps={STEPS}", text).replace(":8000", f":{port}"), names)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_block_of_code_has_a_language_and_is_well_formed(page: Path):
    for kind, note, text in blocks(page):
        assert kind in ("sh", "python", "yaml", "json", "text", "console", "bibtex"), text
        assert not note or re.fullmatch(r"<!-- (not run: .+|file: \S+|in a folder of its own) -->", note), note
        if kind == "python":
            compile(text, str(page), "exec")
        if kind in ("yaml", "json"):
            yaml.safe_load(text)


def test_documents_that_code_and_pages_name_are_there():
    files = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "Makefile"]
    files += [path for name in ("src", "tests", "benchmarks") for path in (ROOT / name).rglob("*.py")]
    for file in files:
        for name in re.findall(r"\bdocs/[\w./-]+\.(?:md|html|png|ipynb|py)\b", file.read_text(encoding="utf-8")):
            assert (ROOT / name).is_file(), f"{file}: {name}"


def test_the_reference_has_every_function():
    page = (ROOT / "docs" / "reference" / "python.md").read_text(encoding="utf-8")
    assert set(package.__all__) - set(re.findall(r"^::: secateur\.(\w+)$", page, re.M)) == {"SecateurError"}


@pytest.mark.slow
def test_the_notebook_runs(workshop: Path, tmp_path: Path):
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    notebook = nbformat.read(ROOT / "docs" / "quickstart.ipynb", as_version=4)
    path = f"import sys; sys.path.append({str(Path(__file__).parent)!r})"
    quick = "import pytest, quick_checks; quick_checks.check_quickly(pytest.MonkeyPatch())"
    notebook.cells.insert(0, nbformat.v4.new_code_cell(f"{path}\n{quick}"))
    for cell in notebook.cells:
        cell.source = re.sub(r"steps=\d+", f"steps={STEPS}", cell.source)
    shutil.copytree(workshop, tmp_path / "page")
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path / "page")}}).execute()
