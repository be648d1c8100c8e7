"""The contract of the command line: one line and exit code 2 for each mistake, results only where ``--out`` says."""

from __future__ import annotations

import io
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from transformers import ViTConfig, ViTModel

import forked
import secateur
from conftest import disk_of, example_pairs, write_pairs
from secateur import cli
from secateur import options as config
from secateur.cli import terminal
from secateur.errors import ConfigError, DataError, SecateurError
from secateur.provenance import command_line, provenance
from secateur.results import DepthRow, LayerCost, Profile, Scores, load
from task_folders import example_rows, write_task

COMMANDS = (
    *("profile", "scout", "choose", "prune", "heal", "evaluate", "tasks check", "tasks make", "cost", "compare"),
    *("report", "study", "study status", "study resume", "export", "encode", "serve"),
)


@dataclass(frozen=True)
class Ended:
    code: int
    out: str
    err: str


Run = Callable[..., Ended]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a command in this process, as the installed ``secateur`` does."""

    def run(*arguments: object) -> Ended:
        monkeypatch.setattr(sys, "argv", ["secateur", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            cli.main()
        return Ended(int(caught.value.code or 0), *capsys.readouterr())

    return run


@pytest.fixture
def place(tmp_path: Path, llama_folder: Path, pairs_file: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a model, data and a task, named as in the cases below."""
    (tmp_path / "model").symlink_to(llama_folder)
    for file in (pairs_file, pairs_file.with_suffix(".json")):
        shutil.copy(file, tmp_path)
    write_task(tmp_path / "task", "sts", example_rows("sts"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def is_one_line(ended: Ended) -> bool:
    return ended.code == 2 and ended.out == "" and ended.err.startswith("secateur: ") and ended.err.count("\n") == 1


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_one_sentence_and_an_example(command: str, run: Run):
    ended = run(*command.split(), "--help")
    paragraphs = [" ".join(part.split()) for part in ended.out.split("\n\n")]
    usage, sentence, example = paragraphs[:3]
    assert ended.code == 0
    assert usage.startswith(f"Usage: secateur {command}")
    assert sentence[-1] in ".?" and sentence.count(". ") == 0
    assert example.startswith(f"Example: secateur {command} ")
    assert set(re.findall(r"`secateur ([a-z ]+)`", " ".join(ended.out.split()))) <= {*COMMANDS}
    assert command != "cost" or "server" not in ended.out  # whose costs cannot be measured


@pytest.mark.parametrize("command", COMMANDS)
def test_the_example_has_no_unknown_options(command: str, run: Run):
    helped = run(*command.split(), "--help").out
    example = next(part for part in helped.split("\n\n") if "Example:" in part).split()
    assert all(word in helped.split("Options:")[1] for word in example if word.startswith("-"))


def lines_with_a_mistake(line: str) -> str:
    rows = [json.dumps(row) for row in example_pairs(40)]
    rows[36] = line
    return "\n".join(rows)


BAD_FILES: dict[str, str | bytes] = {
    "no-column.jsonl": lines_with_a_mistake('{"query": "q"}'),
    "broken.jsonl": lines_with_a_mistake('{"query": "q", "positive'),
    "empty-text.jsonl": lines_with_a_mistake('{"query": " ", "positive": "p"}'),
    "nothing.jsonl": "",
    "two.jsonl": lines_with_a_mistake('{"query": "q", "positive": "p"}').splitlines()[0],
}
BAD_DATA = {
    "no-column.jsonl": 'no-column.jsonl, line 37, "positive": the column is missing',
    "broken.jsonl": "broken.jsonl, line 37: broken JSON",
    "empty-text.jsonl": 'empty-text.jsonl, line 37, "query": the text is empty',
    "nothing.jsonl": "nothing.jsonl: has no rows",
    "absent.jsonl": "absent.jsonl: no such file",
    "model": "model: ",
}


@pytest.mark.parametrize("file", BAD_DATA)
@pytest.mark.parametrize("command", ["profile", "heal", "study"])
def test_bad_data_is_one_line_and_nothing_is_written(command: str, file: str, place: Path, run: Run):
    for name, content in BAD_FILES.items():
        (place / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    before = sorted(place.rglob("*"))
    ended = run(command, "model", "--data", file, "-o", "out")
    assert is_one_line(ended), ended
    assert BAD_DATA[file] in ended.err
    assert [path for path in sorted(place.rglob("*")) if path not in before and not path.is_dir()] == []


def bad_models(place: Path, llama: Path) -> dict[str, str]:
    """Names of models that cannot be opened, and what is said of each."""
    for name in ("no-config", "no-weights", "half", "no-block"):
        shutil.copytree(llama, place / name)
    (place / "no-config" / "config.json").unlink()
    (place / "no-weights" / "model.safetensors").unlink()
    content = (llama / "model.safetensors").read_bytes()
    (place / "half" / "model.safetensors").write_bytes(content[: len(content) // 2])
    settings = json.loads((llama / "config.json").read_text())
    (place / "no-block" / "config.json").write_text(json.dumps(settings | {"num_hidden_layers": 4}))
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    ViTModel(ViTConfig(**sizes, image_size=32)).save_pretrained(place / "images")
    return {
        "./nowhere": "no such file or folder",
        "no-config": "has no config.json",
        "no-weights": "has no safetensors",
        "half": "model.safetensors is damaged or half written",
        "no-block": "no weights for layers.3",
        "images": "not a text model",
        "words.jsonl": "is not a model folder",
    }


def test_a_model_that_cannot_be_opened_is_one_line_in_every_command(place: Path, llama_folder: Path, run: Run):
    for name, says in bad_models(place, llama_folder).items():
        for command in (
            ("profile", name, "--data", "words.jsonl"),
            ("prune", name, "--to", "1"),
            ("heal", name, "--data", "words.jsonl", "--batch-size", "8"),
            ("evaluate", name, "--tasks", "task"),
            ("study", name, "--data", "words.jsonl", "--batch-size", "8"),
        ):
            ended = run(*command, "-o", f"out-{command[0]}")
            assert is_one_line(ended), (command, ended)
            if command[0] != "prune":  # it reads the checkpoint itself, tensor by tensor, and has its own words
                assert f"model {name}: " in ended.err, command
                assert says in ended.err, command
            shutil.rmtree(f"out-{command[0]}", ignore_errors=True)
            shutil.rmtree(f"out-{command[0]}.partial", ignore_errors=True)


def test_an_export_is_neither_cut_nor_trained(place: Path, llama_folder: Path, run: Run):
    shutil.copytree(llama_folder, place / "exported", ignore=shutil.ignore_patterns("*.safetensors"))
    (place / "exported" / "export.json").write_text("{}")
    for command in (
        ("prune", "exported", "--to", "1"),
        ("heal", "exported", "--data", "words.jsonl", "--batch-size", "8"),
    ):
        ended = run(*command, "-o", "out")
        assert is_one_line(ended), ended
        assert "model exported: is an export, without weights to cut or train" in ended.err


@pytest.fixture
def measured(place: Path) -> Path:
    """A profile of the model's three depths."""
    losses = (2.0, 1.0, 3.0)
    rows = tuple(DepthRow(k, loss, None, 0.1, 2.0) for k, loss in enumerate(losses, start=1))
    about = {"model": "model", "depth": 3, "pooling": "weighted_mean", "scale": 20.0, "dtype": "float32"}
    about |= {"batch_size": 8, "batches": 1, "max_length": 128, "prompt": ""}
    Profile(provenance(), **about, depths=rows).save(place / "measured")
    return place / "measured"


def test_choose_prints_all_choices_side_by_side(measured: Path, run: Run):
    ended = run("choose", measured, "--json")
    assert (ended.code, ended.err) == (0, "")
    found = json.loads(ended.out)
    depths = {row["name"]: len(row["blocks"]) for row in found["rows"]}
    assert (depths["l3prune-small"], depths["l3prune-large"]) == (1, 2)
    assert secateur.choose(measured) == {"small": 1, "large": 2}
    assert "--tasks" in found["refused"]["best-task"]
    shown = run("choose", measured / "profile.json").out
    for row in found["rows"]:
        assert row["name"] in shown and (row["reason"] in shown or row["name"] == "full")
    assert "best-task: cannot be told: profile.json" in shown


def test_choose_within_a_budget(measured: Path, run: Run):
    ended = run("choose", measured, "--json", "--max-loss-increase", "1")
    assert [len(row["blocks"]) for row in json.loads(ended.out)["rows"] if row["name"] == "budget"] == [1]
    for option in ("--max-params", "--max-bytes", "--max-latency-ms"):
        ended = run("choose", measured, option, "1e6")
        assert is_one_line(ended) and "profile again" in ended.err  # it was saved without its parts
    assert "max_params: '0' is not valid" in run("choose", measured, "--max-params", "0").err


def test_prune_to_what_a_selector_chooses(measured: Path, place: Path, run: Run):
    for to, given, kept in (("large", ("--profile", measured), [0, 1]), ("uniform:2", (), [0, 2])):
        ended = run("prune", "model", "--to", to, *given, "-o", f"out-{to}")
        assert ended.code == 0, ended.err
        assert json.loads((place / f"out-{to}" / "secateur.json").read_text())["kept"] == kept


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("prune", "model", "--to", "0"), "cannot cut a model of 3 layers to 0"),
        (("prune", "model", "--to", "4"), "cannot cut a model of 3 layers to 4: that would keep 4: nearest legal: 3"),
        (("prune", "model", "--to", "-1"), "cannot cut a model of 3 layers to -1"),
        (("prune", "model", "--to", "0.9"), "cannot cut a model of 3 layers to 0.9: that would keep 0"),
        (("prune", "model", "--to", "1.5"), "to: is 1.5"),
        (("cost", "model", "--device", "banana"), "device: 'banana' is no device of torch"),
        (("prune", "model", "--to", "nan"), "to: is nan"),
        (("prune", "model", "--to", "inf"), "to: is inf"),
        (("prune", "model", "--to", "most"), "to: is 'most'"),
        (("prune", "model", "--to", "large"), "needs a profile: give --profile DIR"),
        (("prune", "model", "--to", "large", "--profile", "nowhere"), "nowhere: no such file"),
        (("prune", "model", "--to", "large", "--profile", "words.json"), "words.json: holds None, not a profile"),
        (("prune", "model", "--to", "1", "--pooling", "max"), "pooling: 'max' is not valid"),
        (("prune", "model"), "to: is missing"),
        (("prune", "--to", "1"), "model: is missing"),
        (("prune", "model", "--to", "1", "--nonesuch", "1"), "No such option: --nonesuch"),
        (("profile", "model"), "data: is missing"),
        (("profile", "model", "--data", "words.jsonl", "--scale", "0"), "scale: '0' is not valid"),
        (("profile", "model", "--data", "words.jsonl", "--batch-size", "1"), "batch_size: '1' is not valid"),
        (("profile", "model", "--data", "words.jsonl", "--seed", "x"), "seed"),
        (
            ("profile", "model", "--data", "words.jsonl", "--seed", "9" * 20),
            "seed: '99999999999999999999' is not valid",
        ),
        (("profile", "model", "--data", "words.jsonl", "--scale", "inf"), "scale: 'inf' is not valid"),
        (("heal", "model", "--data", "words.jsonl", "--seed", "-1"), "seed: '-1' is not valid"),
        (("heal", "model", "--data", "words.jsonl", "--scale", "inf"), "scale: 'inf' is not valid"),
        (("heal", "model", "--data", "words.jsonl", "--teacher", ""), "teacher: '' is not valid"),
        (
            ("evaluate", "model", "model", "--tasks", "task"),
            "two models are called model: give each its own name: --names",
        ),
        (("heal", "model", "--data", "words.jsonl"), "nothing fills a batch of 64"),
        (("heal", "model", "--data", "words.jsonl", "--steps", "0"), "steps: '0' is not valid"),
        (("evaluate", "--tasks", "task"), "models: is missing"),
        (("evaluate", "model", "--tasks", "task", "--sample", "0"), "sample: '0' is not valid"),
        (("evaluate", "model", "--tasks", "./nowhere"), "nowhere"),
        (("evaluate", "model", "--tasks", "NoSuchTaskAnywhere"), "NoSuchTaskAnywhere"),
        (("study",), "no model given"),
        (("study", "model"), "no data to profile and heal with"),
        (("study", "model", "--data", "words.jsonl", "--batch-size", "8", "--depths", "1", "9"), "3 layers to 9"),
        (("study", "model", "--data", "words.jsonl", "--batch-size", "8", "--tasks", "./nowhere"), "nowhere"),
        (("study", "model", "model", "--data", "words.jsonl"), "two models are called model"),
        (("study", "--preset", "other"), "preset: 'other' is not valid"),
    ],
)
def test_mistakes_in_options_are_one_line(arguments: tuple[str, ...], says: str, place: Path, run: Run):
    ended = run(*arguments, "-o", "out")
    assert is_one_line(ended), ended
    assert says in ended.err
    assert not [path for path in place.rglob("out*") if path.is_file() or path.suffix == ".partial"]


def test_heal_alone_is_started_in_several_processes(place: Path, run: Run, monkeypatch: pytest.MonkeyPatch):
    """Each of them would do all of it, or find that another is at it."""
    monkeypatch.setenv("WORLD_SIZE", "2")  # as torchrun does
    ended = run("scout", "model", "--data", "words.jsonl", "-o", "out")
    assert is_one_line(ended), ended
    assert "WORLD_SIZE: is 2, and heal alone is done by several processes together: start scout without" in ended.err
    assert not (place / "out").exists()


def test_tasks_are_made_and_checked(place: Path, run: Run):
    (place / "notes.txt").write_text(
        "".join(f"This is note {i}. It goes on for long enough to be found.{i}\n" for i in range(9))
    )
    made = run("tasks", "make", "notes.txt", "-o", "notes", "--queries", 5)
    assert made.code == 0, made
    assert made.out == (
        "notes-from-sentences: first sentence → rest, made from 9 texts; no person judged what is relevant\n"
        "  5 queries, 9 documents\nnotes\n"
    )
    good = run("tasks", "check", "notes", "task")
    assert (good.code, good.err) == (0, "")
    assert good.out.startswith('notes: task folder, scored as retrieval by ndcg_at_10, called "notes-from-sentences"\n')
    assert "  note: made from texts alone" in good.out
    assert "task: task folder, scored as sts by cosine_spearman\n  rows: test 24\n" in good.out
    bad = run("tasks", "check", "notes.txt", "task")
    assert (bad.code, bad.err) == (2, "")
    assert (
        bad.out.startswith("notes.txt: cannot be scored\n  wrong: notes.txt: is no task")
        and "task: task folder" in bad.out
    )
    assert "'tasks check'" in run("tasks").err  # what could be meant


AT_ONCE = [
    ("profile ./nowhere --data words.jsonl -o out", "model ./nowhere: no such file or folder"),
    ("profile model --data absent.jsonl -o out", "absent.jsonl: no such file"),
    ("profile model --data broken.jsonl -o out", "broken.jsonl, line 2: broken JSON"),
    ("profile model --data words.jsonl -o file", "output file: is a file"),
    ("profile model --data words.jsonl -o task", "output task: already holds something else"),
    ("profile model --data words.jsonl --dtype int4 -o out", "dtype: 'int4' is not valid"),
    ("choose nowhere", "nowhere: no such file"),
    ("prune model.gguf --to 1 -o out", "model model.gguf: no such file"),
    ("prune model --to most -o out", "to: is 'most'"),
    ("prune model --to large --profile words.json -o out", "words.json: holds None, not a profile"),
    ("prune model --to 1 -o task", "output task: is there already"),
    ("heal model --data absent.jsonl -o out", "absent.jsonl: no such file"),
    ("heal model --data words.jsonl --teacher ./nowhere -o out", "model ./nowhere: no such file or folder"),
    ("evaluate model --tasks ./nowhere -o out", "nowhere: no such file or folder"),
    ("evaluate model --tasks task -o file", "output file: is a file"),
    ("tasks make absent.txt -o out", "absent.txt: no such file"),
    ("tasks make words.jsonl -o task", "output task: is there already"),
    ("tasks make words.jsonl -o out", 'words.jsonl, line 1, "text": the column is missing'),
    ("cost ./nowhere -o out", "model ./nowhere: no such file or folder"),
    ("compare model ./nowhere --tasks task -o out", "model ./nowhere: no such file or folder"),
    ("compare model model --texts absent.txt -o out", "absent.txt: no such file"),
    ("export ./nowhere -o out", "model ./nowhere: no such file or folder"),
    ("export model -o task", "output task: is there already"),
    ("report nowhere", "nowhere: no such folder"),
    ("study model --data absent.jsonl -o out", "absent.jsonl: no such file"),
    ("study model --data words.jsonl --depths most -o out", "depths: is 'most'"),
    ("study model --data words.jsonl -o task", "output task: already holds something else"),
    ("study status task", "task: holds no study"),
    ("study resume task", "task: holds no study"),
    ("encode model absent.txt -o v.npy", "absent.txt: no such file"),
    ("encode model words.jsonl -o file", "output file: exists already"),
    ("serve ./nowhere", "model ./nowhere: no such file or folder"),
    ("serve model --api-key-file absent", "absent: no such file"),
    ("evaluate --config absent.yaml", "absent.yaml: no such file"),
]


def test_mistakes_are_told_before_anything_heavy_is_imported(place: Path):
    """All of them in one process, which has not imported torch at the end."""
    (place / "file").write_text("mine")
    (place / "broken.jsonl").write_text('{"query": "q", "positive": "p"}\n{"query": ')
    script = (
        "import contextlib, io, json, sys\n"
        "from secateur.cli import main\n"
        "told = []\n"
        "for line in json.load(sys.stdin):\n"
        "    sys.argv = ['secateur', *line.split()]\n"
        "    with contextlib.redirect_stderr(io.StringIO()) as error, contextlib.suppress(SystemExit):\n"
        "        main()\n"
        "    heavy = {'torch', 'mteb', 'sentence_transformers'} & set(sys.modules)\n"
        "    told.append([error.getvalue(), sorted(heavy)])\n"
        "print(json.dumps(told))\n"
    )
    lines = json.dumps([line for line, _ in AT_ONCE])
    ended = subprocess.run([sys.executable, "-c", script], input=lines, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    for (line, says), (told, heavy) in zip(AT_ONCE, json.loads(ended.stdout), strict=True):
        assert told.startswith("secateur: ") and says in told, (line, told)
        assert told.count("\n") == 1 and heavy == [], (line, told, heavy)
    assert not (place / "out").exists()


def test_models_get_the_names_that_they_are_given(place: Path, run: Run):
    ended = run("evaluate", "model", "model", "--names", "one", "two", "--tasks", "task", "-o", "scores")
    assert ended.code == 0, ended.err
    assert [row.model for row in load(place / "scores", Scores).rows] == ["one", "two"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("choose", "nowhere"), "nowhere: no such file"),
        (("choose", "words.jsonl"), "words.jsonl"),
        (("report", "nowhere"), "nowhere"),
        (("report", "task"), "task"),
        (("nonesuch",), "No such command 'nonesuch'"),
        (("prune", "model", "--to", "1"), "out: is missing"),
    ],
)
def test_mistakes_without_an_output_are_one_line(arguments: tuple[str, ...], says: str, place: Path, run: Run):
    ended = run(*arguments)
    assert is_one_line(ended), ended
    assert says in ended.err


@pytest.mark.parametrize("kind", ["folder", "file", "below a file"])
def test_an_output_that_holds_something_else_is_left_alone(kind: str, place: Path, run: Run):
    out = place / "out"
    if kind == "folder":
        out.mkdir()
    mine = out / "mine.txt" if kind == "folder" else out
    mine.write_text("mine")
    named = out / "deeper" if kind == "below a file" else out
    for command in (
        ("profile", "model", "--data", "words.jsonl"),
        ("prune", "model", "--to", "1"),
        ("heal", "model", "--data", "words.jsonl", "--batch-size", "8"),
        ("study", "model", "--data", "words.jsonl", "--batch-size", "8"),
    ):
        ended = run(*command, "-o", named)
        assert is_one_line(ended), (command, ended)
        assert f"output {named}" in ended.err, command
    assert mine.read_text() == "mine"
    assert not list(place.glob("out.partial"))


def test_options_come_from_yaml_and_the_command_line_wins(place: Path, run: Run):
    (place / "options.yaml").write_text("data: [words.jsonl]\nbatch_size: 6\nscale: 50\nmax_examples: 12\n")
    ended = run("profile", "model", "--config", "options.yaml", "--scale", "30", "-o", "out")
    assert ended.code == 0, ended.err
    table = load(place / "out", Profile)
    assert (table.scale, table.batch_size, table.batches) == (30.0, 6, 2)
    assert table.provenance.command == "secateur profile model --config options.yaml --scale 30 -o out"
    pictures = {f"{name}.{kind}" for name in ("curve", "cka", "angles") for kind in ("png", "svg")}
    assert {path.name for path in (place / "out").iterdir()} == {"profile.json", *pictures}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"data: [words.jsonl]\nsteps: 3\n", "options.yaml, steps: no such option: one of model, data"),
        (b"data: [words.jsonl]\nscale: much\n", "options.yaml, scale: 'much' is not valid"),
        (b"data: [words.jsonl]\n3: much\n", "options.yaml, 3: no such option"),
        (b"scale: 2024-13-45\n", "options.yaml: broken YAML (month must be in 1..12)"),
        (b"[" * 5000, "options.yaml: broken YAML"),
        (b"data: [words.jsonl\nscale: 1\n", "options.yaml, line 2: broken YAML"),
        (b"data: \x01\n", "options.yaml: broken YAML"),
        (b"data: \xff\n", "options.yaml: cannot be read"),
        (b"- data\n", "options.yaml: holds a list, not keys and values"),
        (
            b"scale: 1\ndata: [words.jsonl]\nscale: 2\n",
            "line 3: broken YAML (the key scale is there twice)",
        ),
        (b"columns: {query: a, positive: b, query: c}\n", "line 1: broken YAML (the key query is there twice)"),
    ],
)
def test_a_mistake_in_yaml_is_one_line(content: bytes, says: str, place: Path, run: Run):
    (place / "options.yaml").write_bytes(content)
    ended = run("profile", "model", "--config", "options.yaml", "-o", "out")
    assert is_one_line(ended), ended
    assert says in ended.err


@pytest.mark.parametrize(
    ("content", "read"),
    [
        ("depths:\nseeds:\npolish:\n", ([], [], [])),
        ("depths: 0.3\nseeds: 7\npolish: 2\n", (["0.3"], [7], [2])),
        ("depths: 2, uniform:3\nseeds: 1,2\npolish: '4, 2'\n", (["2", "uniform:3"], [1, 2], [4, 2])),
        ("depths: [2, random:3:1]\nseeds: [1]\npolish: [2]\n", (["2", "random:3:1"], [1], [2])),
        ("recipes: {a: &a {steps: 3}, b: {<<: *a, steps: 4}}\n", ([], [], [])),
    ],
    ids=["left empty", "one", "by commas", "lists", "merged"],
)
def test_several_values_are_written_in_several_ways(content: str, read: tuple[object, ...], tmp_path: Path):
    (tmp_path / "study.yaml").write_text(f"models: m\ndata: words.jsonl\n{content}")
    study = config.read_study(tmp_path)
    assert (study.depths, study.seeds, study.polish) == read
    assert study.recipes == ({"a": {"steps": 3}, "b": {"steps": 4}} if "recipes" in content else {"healed": {}})


def test_a_yaml_file_that_is_missing_is_one_line(run: Run):
    assert is_one_line(run("profile", "model", "--config", "./nowhere.yaml", "-o", "out"))


def test_options_written_as_yaml_are_read_back(tmp_path: Path):
    options = config.make(config.StudyOptions, {"models": ["m"], "data": ["a", "b"], "out": "run", "steps": 3})
    (tmp_path / "study.yaml").write_text(config.to_yaml(options))
    assert config.make(config.StudyOptions, config.read_yaml(tmp_path / "study.yaml")) == options
    for content, says in (("models: [m]\nsteps: 0", r"yaml, steps: 0 is not"), ("", r"yaml: names no model")):
        (tmp_path / "study.yaml").write_text(content)
        with pytest.raises(SecateurError, match=says):
            config.read_study(tmp_path)
    with pytest.raises(ConfigError, match="stepz: no such option"):
        config.make(config.StudyOptions, {"out": "run", "stepz": 3})
    with pytest.raises(DataError, match="no such file"):
        config.read_yaml(tmp_path / "nothing.yaml")


@pytest.mark.parametrize(
    "spelling", [("--data", "words.jsonl", "b.jsonl"), ("--data", "words.jsonl", "--data", "b.jsonl")]
)
def test_an_option_of_several_values_is_given_once_or_again(spelling: tuple[str, ...], place: Path, run: Run):
    write_pairs(place / "b.jsonl", example_pairs(8, seed=1))
    ended = run("profile", "model", *spelling, "--batch-size", "8", "-o", "out")
    assert ended.code == 0, ended.err
    assert [source.name for source in load(place / "out", Profile).provenance.data] == ["words.jsonl", "b.jsonl"]


@pytest.mark.parametrize("rest", [("-o", "out"), ()])
def test_an_option_of_several_values_needs_one(rest: tuple[str, ...], place: Path, run: Run):
    ended = run("heal", "model", "--data", "words.jsonl", "--exclude", *rest)  # as where a shell's variable is empty
    assert is_one_line(ended), ended
    assert ended.err == "secateur: exclude: is given without a value: --exclude takes one or more\n"


def test_a_file_in_the_models_place_is_told_as_such(place: Path, run: Run):
    ended = run("encode", "words.jsonl", "model", "-o", "vectors.npy")
    assert is_one_line(ended), ended
    assert ended.err == "secateur: model words.jsonl: is not a model folder or a .gguf file\n"


def test_an_argument_after_an_option_of_several_values_is_told_of(place: Path, run: Run):
    ended = run("evaluate", "--tasks", "task", "model", "-o", "out")
    assert is_one_line(ended), ended
    assert "models: is missing: name it before --tasks, which takes all words up to the next option" in ended.err


def test_a_bug_is_one_line_too_and_debug_shows_where(measured: Path, run: Run, monkeypatch: pytest.MonkeyPatch):
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("first line\nsecond line")

    monkeypatch.setattr(secateur, "candidates", broken, raising=False)
    ended = run("choose", measured)
    assert (ended.code, ended.out) == (1, "")
    assert ended.err == "secateur: unexpected ZeroDivisionError: first line second line; SECATEUR_DEBUG=1 shows where\n"
    monkeypatch.setenv("SECATEUR_DEBUG", "1")
    monkeypatch.setattr(sys, "argv", ["secateur", "choose", str(measured)])
    with pytest.raises(ZeroDivisionError):
        cli.main()


HEAL = ("heal", "model", "--data", "words.jsonl", "--batch-size", "8", "--steps", "2", "--precision", "float32")


@pytest.mark.parametrize(
    ("command", "kilobytes"),
    [
        (("profile", "model", "--data", "words.jsonl", "--batch-size", "8"), 4),
        (("prune", "model", "--to", "1"), 52),
        (HEAL, 52),  # safetensors cannot write
        (HEAL, 140),  # torch cannot write
        (("study", "model", "--data", "words.jsonl", "--tasks", "task", "--batch-size", "8"), 52),
    ],
)
def test_a_full_disk_is_one_line(command: tuple[str, ...], kilobytes: int, place: Path, run: Run):
    with disk_of(kilobytes, place / "small") as disk:
        ended = run(*command, "-o", disk / "out")
        assert not (disk / "out" / "model.safetensors").exists()
    assert ended.code == 2, ended
    assert ended.err.splitlines()[-1].startswith("secateur: output "), ended.err
    assert "the disk is full: free some space" in ended.err or "the disk is too full" in ended.err
    assert "Traceback" not in ended.err


@pytest.mark.parametrize("page", ["cp1251", "cp437", "ascii"])
def test_a_sign_that_the_code_page_lacks_is_replaced(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    depths = tuple(DepthRow(k, 3.0 - k, 0.1, 0.2, 5.0) for k in (1, 2, 3, 4))
    parts = tuple(LayerCost(part, 10, 40, 5.0, 0.001, 0.002) for part in range(5))
    made = provenance((), 42)
    Profile(made, "模型", 4, "mean", 20.0, "float32", 8, 6, 64, "", depths, layer_costs=parts).save(tmp_path)
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding=page, write_through=True) for _ in range(2))
    for name, value in (("stdout", out), ("stderr", err), ("argv", ["secateur", "choose", str(tmp_path)])):
        monkeypatch.setattr(sys, name, value)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    shown = out.buffer.getvalue().decode(page)
    assert "??: 4 layers" in shown and "l3prune-large" in shown


def test_the_installed_command_answers(tmp_path: Path):
    """One real process: the entry point, the exit code and the streams."""
    command = Path(sys.executable).with_name("secateur")
    if not command.is_file():
        pytest.skip("not installed as a command")
    done = subprocess.run(
        [command, "choose", "./nowhere"], capture_output=True, text=True, env=os.environ | {"COLUMNS": "20"}
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    version = subprocess.run([command, "--version"], capture_output=True, text=True)
    assert version.returncode == 0
    assert version.stdout.strip()[0].isdigit()


def completed(words: str, tmp_path: Path) -> list[str]:
    """What bash offers for the last of these words, by the function that ``--show-completion`` gives it."""
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("no bash")
    (tmp_path / "secateur").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m secateur "$@"\n')
    (tmp_path / "secateur").chmod(0o755)
    script = (
        'eval "$(_SECATEUR_COMPLETE=source_bash secateur)"\n'
        'COMP_WORDS=("$@") COMP_CWORD=$(($# - 1))\n_secateur_completion secateur\nprintf "%s\\n" "${COMPREPLY[@]}"'
    )
    ended = subprocess.run(
        [bash, "-c", script, "bash", *words.split(" ")],
        capture_output=True,
        text=True,
        env=os.environ | {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"},
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    return ended.stdout.split()


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("secateur s", ["scout", "study", "serve"]),
        ("secateur study status run --h", ["--help"]),
        ("secateur prune model --vocab-s", ["--vocab-size"]),
        ("secateur heal model --recipe ", ["finetune", "l3prune", "distill"]),
        ("secateur heal mod", []),  # bash goes on with files
    ],
)
def test_bash_completes_commands_options_and_choices(words: str, offered: list[str], tmp_path: Path):
    assert completed(words, tmp_path) == offered


def logged(script: str) -> list[str]:
    """The lines of a log, that is of a pipe, which are written every 0.2 seconds in place of every minute."""
    script = f"import sys, time\nfrom secateur.cli import main, terminal\nterminal.EVERY = 0.2\n{script}"
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (0, "")
    assert "\N{ESCAPE}" not in ended.stderr
    return [re.sub(r"[\d.]+\xa0m?s", "TIME", line) for line in ended.stderr.splitlines()]


def test_a_log_gets_a_line_now_and_then_of_what_is_done_and_what_is_left():
    lines = logged(
        "with terminal.work_bars('evaluate') as progress:\n"
        "    time.sleep(0.5)\n"
        "    progress('evaluate', 0, 3000)\n"
        "    time.sleep(0.5)\n"
        "    progress('evaluate', 1000, 3000)\n"
        "    time.sleep(0.5)\n"
        "    progress('evaluate', 3000, 3000)\n"
    )
    assert lines.pop().startswith("evaluate: 3000 in ")
    assert all(re.match(r"\d\d:\d\d:\d\d  ", line) for line in lines)
    assert list(dict.fromkeys(line[10:] for line in lines)) == [
        "evaluate: TIME so far",
        "evaluate: 0 of 3,000, TIME so far",
        "evaluate: 1,000 of 3,000, TIME so far, about TIME left",
    ]


def test_the_log_of_a_study_names_the_running_step_and_the_next_piece_of_its_work():
    lines = logged(
        "with terminal.study_bars() as (progress, _):\n"
        "    progress('scout', 10, 10)\n"
        "    progress('scout', 0, 100)\n"
        "    progress('scout', 20, 100)\n"
        "    time.sleep(0.5)\n"
    )
    assert {line[10:] for line in lines} == {"study: TIME so far", "scout: 20 of 100, TIME so far, about TIME left"}


def test_a_command_that_is_no_terminal_s_tells_how_far_it_is(place: Path, run: Run, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(terminal, "EVERY", 0.01)
    ended = run(*HEAL, "-o", "out")
    assert ended.code == 0, ended.err
    assert re.search(r"^\d\d:\d\d:\d\d  heal \(blocks\): \d+ of 16, ", ended.err, re.MULTILINE)
    assert str(ended.out).strip() == "out"


def test_open_shows_the_page_in_the_browser(measured: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    profiles = tmp_path / "a run" / "profiles"
    shutil.copytree(measured, profiles / "model")
    browser, seen = tmp_path / "browser", tmp_path / "seen"
    browser.write_text(f'#!/bin/sh\necho "$1" > "{seen}"\n')
    browser.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    ended = forked.run("report", "a run", "--open", environment={"BROWSER": str(browser)})
    page = profiles.parent / "report.html"
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.endswith(f"\n{page.relative_to(tmp_path)}\n")
    assert seen.read_text().strip() == page.as_uri()
    none = dict.fromkeys(("BROWSER", "DISPLAY", "WAYLAND_DISPLAY"), "") | {"PATH": str(tmp_path / "x")}
    ended = forked.run("report", "a run", "--open", environment=none)
    assert ended.returncode == 0 and ended.stdout.endswith(f"\n{page.relative_to(tmp_path)}\n")
    assert ended.stderr == "there is no browser here to open it in\n"


def test_a_study_has_a_bar_for_work_that_is_no_step():
    with terminal.study_bars() as (progress, _):
        for done in range(3):
            progress("read docstrings", done, 2)


def test_a_command_that_was_started_as_a_module_can_be_typed_again(monkeypatch: pytest.MonkeyPatch):
    told: list[str] = []
    monkeypatch.setattr(sys, "argv", ["/lib/secateur/__main__.py", "choose", "a b"])
    monkeypatch.setattr(cli, "main", lambda: told.append(command_line()))
    runpy.run_module("secateur", run_name="__main__")
    assert told == ["secateur choose 'a b'"]
