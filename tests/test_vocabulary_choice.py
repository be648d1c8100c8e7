"""Sizes of the vocabulary beside depths: their costs against really cut models, and budgets against all pairs tried."""

from __future__ import annotations

import itertools
import json
import shlex
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, LlamaConfig, LlamaModel, PreTrainedTokenizerFast

import architectures
import secateur
from conftest import write_pairs
from published import CORPUS, byte_level_bpe
from secateur.choosing.budgets import cut_cost
from secateur.cli.commands import main
from secateur.errors import ConfigError, DataError, ModelError, SecateurError
from secateur.models.open_model import open_model, open_skeleton
from secateur.options import ChooseOptions, make
from secateur.provenance import provenance
from secateur.results import Origin, Profile, RungRow, Scout, load
from secateur.vocabulary.choice import COVERAGE, count_vocabulary

SIZES = (560, 500, 440, 380)
"""Stand for the round sizes, of a vocabulary of 600 tokens."""
DEPTH = 4


@pytest.fixture(autouse=True)
def sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("secateur.vocabulary.choice.ROUND_SIZES", SIZES)


def write_model(folder: Path, architecture: str = "llama") -> Path:
    """A random model, whose table has more rows than its tokenizer tokens."""
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "model_max_length": 64}
    PreTrainedTokenizerFast(tokenizer_object=byte_level_bpe(), **special).save_pretrained(folder)
    torch.manual_seed(0)
    if architecture != "llama":
        config = architectures.config_of(architecture)
        config.vocab_size, config.vocab_size_per_layer_input, config.pad_token_id = 640, 620, 1
        AutoModel.from_config(config).save_pretrained(folder)
        return folder
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": DEPTH, "num_attention_heads": 4}
    LlamaModel(LlamaConfig(vocab_size=640, **sizes, max_position_embeddings=64, pad_token_id=1)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, texts, pairs, a profile, and a scout with the model that it trained; to be read only."""
    home = tmp_path_factory.mktemp("home")
    write_model(home / "tiny")
    lines = [line.strip() for line in CORPUS if len(line.split()) > 2]
    (home / "texts.txt").write_text("\n".join(lines), encoding="utf-8")
    rows = [{"query": one, "positive": two} for one, two in itertools.pairwise(lines[:40])]
    write_pairs(home / "pairs.jsonl", rows)
    secateur.profile(home / "tiny", home / "pairs.jsonl", out=home / "profile", batch_size=8, dtype="float32")
    scout_of(load(home / "profile", Profile)).save(home / "scout")
    open_model(home / "tiny").save(str(home / "scout" / "model"), create_model_card=False)
    return home


def scout_of(profile: Profile, lows: Sequence[float] = (-3, -1.5, -0.5)) -> Scout:
    """Depth 3 is within a point, depth 2 within two."""
    rows = [RungRow(k, True, 0.6 + low / 100, 0.5, 0.7, low / 100, low / 100, 0.01) for k, low in enumerate(lows, 1)]
    rows.append(RungRow(DEPTH, True, 0.6, 0.5, 0.7, 0.0))
    return Scout(provenance(), "tiny", DEPTH, "tasks", tuple(rows), layer_costs=profile.layer_costs)


def stored(folder: Path) -> tuple[int, int]:
    """Parameters and bytes of the weights in a model's folder."""
    tensors = [tensor for file in folder.rglob("*.safetensors") for tensor in load_file(file).values()]
    return sum(t.numel() for t in tensors), sum(t.numel() * t.element_size() for t in tensors)


def test_an_id_that_no_token_has_is_named_no_more(home: Path, tmp_path: Path):
    source, out = shutil.copytree(home / "tiny", tmp_path / "odd"), tmp_path / "cut"
    config = json.loads((source / "config.json").read_text())
    config |= {"pad_token_id": 635, "bos_token_id": 638, "eos_token_id": [2, 639]}
    (source / "config.json").write_text(json.dumps(config))
    secateur.prune(source, vocab=[home / "texts.txt"], vocab_size=400, out=out)
    config = json.loads((out / "config.json").read_text())
    assert [config[f"{name}_token_id"] for name in ("pad", "bos", "eos")] == [None, None, [2]]


# What a size costs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["scout", "profile"])
def test_sizes_with_what_they_cost(kind: str, home: Path, tmp_path: Path):
    found = secateur.candidates(home / kind, vocab=home / "texts.txt", vocab_size=400)
    told = found.vocabulary
    assert [row.tokens for row in told.rows] == [600, 560, 500, 440, 400, 380]
    layers = 3 if kind == "scout" else secateur.choose(home / kind)["large"]
    assert (told.size, told.layers) == (400, layers)
    whole = told.rows[0]
    for row in told.rows[1:]:
        out = tmp_path / str(row.tokens)
        cut = {"vocab": home / "texts.txt", "vocab_size": row.tokens, "out": out}
        secateur.prune(home / "tiny", layers, **cut)
        assert (row.parameters, row.bytes) == stored(out)
        written = load(out, Origin).vocabulary
        for key in ("coverage", "changed", "tokens_per_text"):
            assert getattr(row, key) == getattr(written.row, key)
        assert whole.tokens_per_text == written.tokens_per_text
    assert (whole.coverage, whole.changed, whole.unknown) == (1, 0, 0)
    secateur.prune(home / "tiny", layers, out=tmp_path / "whole")
    assert (whole.parameters, whole.bytes) == stored(tmp_path / "whole")
    for row, less in itertools.pairwise(told.rows):
        assert row.coverage >= less.coverage and row.tokens_per_text <= less.tokens_per_text


def test_tables_that_hold_a_slice_for_each_layer(home: Path, tmp_path: Path):
    folder = write_model(tmp_path / "gemma", "gemma4_text")
    secateur.profile(folder, home / "texts.txt", out=tmp_path / "profile", max_examples=16, batch_size=8)
    profile = load(tmp_path / "profile", Profile)
    found = secateur.candidates(profile, vocab=home / "texts.txt", max_latency_ms=1e9, vocab_size=400)
    rows = {row.tokens: row for row in found.vocabulary.rows}
    for size, more in ((400, {"vocab": home / "texts.txt", "vocab_size": 400}), (600, {})):
        cut = secateur.prune(folder, found.vocabulary.layers, out=tmp_path / f"cut-{size}", **more)
        assert rows[size].bytes == stored(cut)[1]
    cut = secateur.prune(folder, 4, vocab=home / "texts.txt", vocab_size=400, out=tmp_path / "four")
    for less, depth in ((0, 4), (1, 3)):
        given = {"vocab": home / "texts.txt", "vocab_size": 400, "max_bytes": stored(cut)[1] - less}
        assert secateur.choose(profile, **given) == {"budget": depth, "vocab_size": 400}


# Budgets --------------------------------------------------------------------------------------------------------------


def by_hand(table: Scout, sizes: Sequence[int], cost: dict[tuple[int, int], int], limit: float) -> tuple[int, int]:
    """The rule, by trying all pairs: 3 layers are within the tolerance, and 4 have the highest score."""
    for size in sizes:
        if cost[3, size] <= limit:
            return 3, size
    depth = max(row.depth for row in table.depths if cost[row.depth, sizes[-1]] <= limit)
    return depth, max(size for size in sizes if cost[depth, size] <= limit)


@pytest.mark.parametrize(("limit", "column"), [("max_params", "parameters"), ("max_bytes", "bytes")])
def test_budgets_are_met_over_both(limit: str, column: str, home: Path, tmp_path: Path):
    table = load(home / "scout", Scout)
    sizes = (600, 560, 500, 440)
    vocab: dict[str, Any] = {"vocab": home / "texts.txt"}
    rows = {row.tokens: row for row in secateur.candidates(home / "scout", **vocab, vocab_size=600).vocabulary.rows}
    coverage = (rows[440].coverage + rows[380].coverage) / 2
    place = {"parameters": 0, "bytes": 1}[column]
    cost = {}
    least = secateur.choose(home / "scout", **vocab, vocab_coverage=coverage)["vocab_size"]
    assert 380 < least <= 440
    sizes = (*(size for size in sizes if size > least), least)
    for depth, size in itertools.product((1, 2, 3, 4), sizes):
        out = tmp_path / f"{depth}-{size}"
        secateur.prune(home / "tiny", depth, **({**vocab, "vocab_size": size} if size < 600 else {}), out=out)
        cost[depth, size] = stored(out)[place]
    seen = set()
    for value in cost.values():
        for allowed in (value, value - 1):
            given = {**vocab, limit: allowed, "vocab_coverage": coverage}
            if allowed < cost[1, least]:
                with pytest.raises(ConfigError, match=rf"no depth has at most .*depth 1, has .* with {least} tokens"):
                    secateur.choose(home / "scout", **given)
                continue
            depth, size = by_hand(table, sizes, cost, allowed)
            assert secateur.choose(home / "scout", **given) == {"chosen": depth, "vocab_size": size}
            seen.add((depth, size))
    assert {depth for depth, _ in seen} == {1, 2, 3} and {size for _, size in seen} == set(sizes)


def test_a_named_size_is_the_only_one_and_the_depth_gives_way(home: Path):
    table, vocab = home / "scout", home / "texts.txt"
    rows = {row.tokens: row for row in secateur.candidates(table, vocab=vocab, vocab_size=380).vocabulary.rows}
    assert rows[380].coverage < COVERAGE
    ask = {"vocab": vocab, "vocab_size": 380}
    assert secateur.choose(table, **ask, max_params=1e9) == {"chosen": 3, "vocab_size": 380}
    assert secateur.choose(table, **ask, max_params=rows[380].parameters - 1) == {"chosen": 2, "vocab_size": 380}
    assert secateur.choose(table, vocab=vocab, max_params=1e9) == {"chosen": 3, "vocab_size": 600}


def test_a_limit_of_time_is_about_the_depth_alone(home: Path):
    table, vocab = load(home / "profile", Profile), home / "texts.txt"
    times = [1000 * cut_cost(table, range(k)).latency for k in (2, 3)]
    alone = secateur.choose(scout_of(table), max_latency_ms=sum(times) / 2)
    both = secateur.choose(scout_of(table), max_latency_ms=sum(times) / 2, vocab=vocab, model=home / "tiny")
    assert both == {**alone, "vocab_size": secateur.choose(home / "scout", vocab=vocab)["vocab_size"]}


def test_a_budget_of_a_profile(home: Path):
    vocab, table = home / "texts.txt", load(home / "profile", Profile)
    falling = replace(table, depths=tuple(replace(row, loss=5.0 - row.depth) for row in table.depths))
    assert secateur.choose(falling) == {"small": 2, "large": 4}
    with_all, none = cut_cost(falling, range(4)).parameters, cut_cost(falling, range(3)).parameters
    assert secateur.choose(falling, max_params=with_all - 1) == {"budget": 3}
    found = secateur.candidates(falling, max_params=with_all - 1, vocab=vocab, vocab_coverage=0.5)
    assert [len(row.blocks) for row in found.rows if row.name == "budget"] == [4] and found.vocabulary.size == 560
    assert none < found.vocabulary.rows[1].parameters < with_all
    assert found.vocabulary.reason == "560 of 600 tokens stay, the largest of these sizes with which 4 layers fit."


def test_the_sentence_says_how_a_budget_is_met(home: Path):
    table, vocab = home / "scout", home / "texts.txt"
    free = secateur.candidates(table, vocab=vocab, vocab_coverage=0.5)
    loose = secateur.candidates(table, vocab=vocab, max_params=1e9)
    assert loose.vocabulary.reason == "600 of 600 tokens stay, the largest of these sizes with which 3 layers fit."
    least = free.vocabulary.rows[-1]
    tight = secateur.candidates(table, vocab=vocab, vocab_coverage=0.5, max_params=least.parameters - 1)
    assert "stay, the largest of these sizes with which 2 layers fit." in tight.vocabulary.reason
    assert "(to lose at most 1 point at 95 % confidence takes 3 layers)" in tight.reason
    assert (tight.chosen, free.chosen) == (2, 3) and "the highest score of those that fit" in tight.reason
    assert [row.fits for row in tight.rows] == [True, True, False, False]
    chosen = next(row for row in tight.vocabulary.rows if row.tokens == tight.vocabulary.size)
    assert chosen.parameters < least.parameters


def test_without_vocab_all_is_as_before(home: Path):
    for kind in ("scout", "profile"):
        found = secateur.candidates(home / kind)
        assert found.vocabulary is None


# The model ------------------------------------------------------------------------------------------------------------


def test_where_the_model_is_found(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    vocab, profile = home / "texts.txt", load(home / "profile", Profile)
    assert profile.source == str((home / "tiny").resolve())
    ask = {"vocab": vocab, "vocab_size": 400}
    for given in (home / "scout", home / "scout" / "scout.json"):
        assert str(home / "scout" / "model") in secateur.candidates(given, **ask).vocabulary.command
    assert f"secateur prune {home / 'tiny'} --to" in secateur.candidates(profile, **ask).vocabulary.command
    earlier = replace(profile, source="")
    for table in (earlier, load(home / "scout", Scout)):
        with pytest.raises(ConfigError, match=r"model: tiny cannot be opened any more: name the model of the "):
            secateur.choose(table, **ask)
        assert secateur.choose(table, **ask, model=home / "tiny")["vocab_size"] == 400
    shutil.copytree(home / "tiny", tmp_path / "tiny")
    assert secateur.choose(earlier, **ask)["vocab_size"] == 400
    with pytest.raises(ModelError, match="no such file"):
        secateur.choose(profile, **ask, model="./nowhere")
    with pytest.raises(ConfigError, match="has 4 layers, but the profile is of a model of 3"):
        secateur.choose(replace(profile, depth=3, depths=profile.depths[:3]), **ask)


def test_a_skeleton_counts_as_the_model_does(home: Path, tmp_path: Path):
    """Prompts keep their tokens; the folder is as of an older sentence-transformers, with the transformer inside."""
    model = open_model(home / "tiny")
    model.prompts = {"query": "zx9 qj:", "document": ""}
    model.save(str(tmp_path / "embedder"), create_model_card=False)
    old = tmp_path / "old"
    shutil.copytree(tmp_path / "embedder", old)
    modules = json.loads((old / "modules.json").read_text())
    modules[0]["path"] = "0_Transformer"
    (old / "modules.json").write_text(json.dumps(modules))
    (old / "0_Transformer").mkdir()
    for file in [file for file in old.iterdir() if file.is_file()]:
        if file.name not in ("modules.json", "config_sentence_transformers.json"):
            file.rename(old / "0_Transformer" / file.name)
    options = make(ChooseOptions, {"profile": home / "profile", "vocab": home / "texts.txt"})
    for folder in (home / "tiny", tmp_path / "embedder", old):
        whole = open_model(folder) if folder != old else SentenceTransformer(str(folder), device="cpu")
        skeleton, tokenizer, prompts = open_skeleton(folder)
        assert all(parameter.is_meta for parameter in skeleton.parameters())
        counts = [
            count_vocabulary("tiny", whole.tokenizer, whole[0].auto_model, options, prompts=whole.prompts.values()),
            count_vocabulary("tiny", tokenizer, skeleton, options, prompts=prompts),
        ]
        assert counts[0].order.tolist() == counts[1].order.tolist() and counts[0].needed == counts[1].needed
    assert len(counts[1].needed) > len(set(range(6)) | set(range(256)))


# The command ----------------------------------------------------------------------------------------------------------


def run(words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    monkeypatch.setattr("sys.argv", shlex.split(words))
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0), *capsys.readouterr()


@pytest.mark.parametrize("kind", ["scout", "profile"])
def test_the_command_that_is_printed_meets_the_budget(kind: str, home: Path, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    for name in ("texts.txt", "tiny", "scout", "profile"):
        (tmp_path / name).symlink_to(home / name)
    (tmp_path / "own.jsonl").write_text(
        "".join(json.dumps({"body": line}) + "\n" for line in (home / "texts.txt").read_text().splitlines())
    )
    limit = cut_cost(load(home / kind, Scout if kind == "scout" else Profile), range(2)).parameters
    ask = f"secateur choose {kind} --vocab own.jsonl --columns text=body --vocab-coverage 0.6 --max-params {limit}"
    code, shown, _ = run(ask, monkeypatch, capsys)
    assert code == 0
    lines = shown.splitlines()
    found = json.loads(run(f"{ask} --json", monkeypatch, capsys)[1])
    vocabulary = found["vocabulary"]
    command = next(line for line in lines if line.startswith("secateur prune "))
    assert command == vocabulary["command"] and vocabulary["reason"] in lines
    assert run(command, monkeypatch, capsys)[0] == 0
    out = tmp_path / command.split()[-1]
    written = load(out, Origin)
    assert stored(out)[0] <= limit
    assert len(written.kept) == vocabulary["layers"]
    assert written.vocabulary.row.tokens == vocabulary["size"] < 600
    table = lines[next(i for i, line in enumerate(lines) if line.startswith("vocabularies, with ")) :]
    assert all(len(line) <= 80 for line in table[: table.index(vocabulary["reason"])])
    assert "chosen" in shown


@pytest.mark.parametrize(
    ("ask", "says"),
    [
        ("scout --vocab-size 400", "vocab_size: needs texts to count tokens on: give --vocab FILE"),
        ("scout --columns text=body", "columns: needs texts to count tokens on: give --vocab FILE"),
        ("scout --model tiny", "model: is only opened to count tokens: give --vocab FILE, too"),
        ("scout --vocab nowhere.txt", "nowhere.txt: no such file"),
        ("scout --vocab texts.txt --vocab-size 601", "vocab_size: the vocabulary has 600 tokens: at most 600"),
        ("scout --vocab texts.txt --vocab-size 9", "are special, or what rare words fall back to: at least"),
        ("scout --vocab texts.txt --model nowhere/at/all", "no such file or folder"),
        ("scout --vocab texts.txt --max-params 1000", "tokens, the fewest that are allowed"),
        (
            "moved --vocab texts.txt",
            "model: /gone/tiny cannot be opened any more: name the model of the profile: --model MODEL",
        ),
    ],
)
def test_mistakes_are_one_line(ask: str, says: str, home: Path, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("texts.txt", "scout"):
        (tmp_path / name).symlink_to(home / name)
    replace(load(home / "profile", Profile), source="/gone/tiny").save(tmp_path / "moved")
    code, shown, error = run(f"secateur choose {ask}", monkeypatch, capsys)
    assert (code, shown) == (2, "") and says in error.splitlines()[-1]


def test_a_table_without_costs_tells_sizes_but_meets_no_budget(home: Path):
    earlier = replace(load(home / "profile", Profile), layer_costs=())
    found = secateur.candidates(earlier, vocab=home / "texts.txt", vocab_size=400)
    assert [row.parameters for row in found.vocabulary.rows] == [None] * 6
    with pytest.raises(DataError, match="profile again"):
        secateur.choose(earlier, vocab=home / "texts.txt", max_params=1e9)
    with pytest.raises(SecateurError, match="no scout"):
        secateur.choose(home, vocab=home / "texts.txt")
