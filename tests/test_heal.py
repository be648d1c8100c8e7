from __future__ import annotations

import contextlib
import itertools
import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

import secateur
from conftest import MakeEncoder, disk_of, example_pairs, tiny_transformer, write_pairs
from forked import run_until
from secateur.data.sources import Pairs, read_pairs
from secateur.errors import ConfigError, DataError, ModelError, OutputError, TrainingDiverged
from secateur.evaluation.evaluate import is_instructed
from secateur.healing import recipes, training_data
from secateur.healing.losses import Loss
from secateur.healing.recipes import LEARNING_RATES, TrainingConfig, decide, training_arguments, training_config
from secateur.healing.trainer import TRAINED_WEIGHTS, TrainingResult, last_checkpoint, train
from secateur.healing.training_data import TrainingSet, held_out_ndcg, read_held_out
from secateur.healing.training_data import training_sets as sets_and_notes
from secateur.models.open_model import is_causal
from secateur.options import HealOptions, make
from secateur.results import Origin, Training, load
from task_folders import example_rows, write_task

STEPS = 20
SETTINGS = {
    "recipe": "l3prune",
    "steps": STEPS,
    "batch_size": 8,
    "learning_rate": 3e-3,
    "lora_rank": 4,
    "lora_dropout": 0.1,
}
SETTINGS |= {"precision": "float32", "scale": 20.0}


def training_sets(data: Sequence[Pairs], batch_size: int) -> list[TrainingSet]:
    return sets_and_notes(data, TrainingConfig(batch_size=batch_size))[0]


def config_of(**given: object) -> TrainingConfig:
    return training_config(make(HealOptions, {"model": "m", "data": ["d"], "out": "o"} | given))


@pytest.fixture(scope="module")
def healed(llama_folder: Path, pairs_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return secateur.heal(llama_folder, pairs_file, **SETTINGS, out=tmp_path_factory.mktemp("healed") / "model")


@pytest.fixture(autouse=True)
def no_check_in_another_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each written model, which takes seconds; the fixture ``healed`` is made before, with it."""
    monkeypatch.setattr("secateur.models.save.difference", lambda *_: 0.0)


def test_training_lowers_the_loss_and_leaves_a_plain_model(healed: Path, llama_folder: Path):
    table = load(healed, Training)
    losses = [row.loss for row in table.losses]
    assert [row.step for row in table.losses] == list(range(1, STEPS + 1))
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])
    assert list(healed.parent.iterdir()) == [healed]
    before, after = (load_file(folder / "model.safetensors") for folder in (llama_folder, healed))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    linear = {name for name, tensor in before.items() if tensor.ndim == 2 and "embed" not in name}
    assert before.keys() == after.keys()
    assert changed == linear
    assert table.trained_parameters == sum(4 * sum(before[name].shape) for name in linear)


def test_gradients_that_a_notebook_has_switched_off_are_computed(llama_folder: Path, pairs_file: Path, tmp_path: Path):
    losses = []
    for mode in (contextlib.nullcontext, torch.no_grad, torch.inference_mode):
        with mode():
            folder = secateur.heal(llama_folder, pairs_file, **SETTINGS | {"steps": 2}, out=tmp_path / mode.__name__)
        losses.append([row.loss for row in load(folder, Training).losses])
    assert losses[0] == losses[1] == losses[2]
    assert len(set(losses[0])) == 2


def test_a_healed_folder_knows_its_prompts_and_where_it_comes_from(healed: Path):
    model = secateur.open_model(healed, device="cpu")
    prompts = {name: prompt for name, prompt in model.prompts.items() if prompt}
    assert prompts == {"words": "find the word;\n", "query": "find the word;\n"}
    assert model.prompts["document"] == ""
    assert load(healed, Training).prompts["query"] == "find the word;\n"
    origin = load(healed, Origin)
    assert (origin.depth, origin.kept, origin.pooling) == (3, (0, 1, 2), "mean")
    assert origin.check <= 1e-5


def test_a_cut_model_on_the_hub_brings_its_history(llama_folder: Path, pairs_file: Path, tmp_path: Path, monkeypatch):
    commit, repository = "c0ffee" + "0" * 34, tmp_path / "models--me--tiny"
    cut = secateur.prune(llama_folder, keep=[0, 2], out=repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    out = secateur.heal("me/tiny", pairs_file, **SETTINGS | {"steps": 1}, out=tmp_path / "healed")
    before, after = load(cut, Origin), load(out, Origin)
    assert (after.base_model, after.depth, after.kept) == (llama_folder.name, 3, (0, 2))
    assert after.history[:-1] == before.history


WRITER = """
from pathlib import Path
class SummaryWriter:
    def __init__(self, log_dir):
        Path(log_dir).mkdir(parents=True)
        self.file = Path(log_dir, "events").open("a")
    def add_scalar(self, name, value, step):
        print(name, step, file=self.file)
    add_text = lambda *_: None
    flush = lambda self: self.file.flush()
    close = lambda self: self.file.close()
"""


def test_tensorboards_curves_outlive_the_training(llama_folder: Path, pairs_file: Path, tmp_path: Path, monkeypatch):
    (tmp_path / "tensorboardX.py").write_text(WRITER)
    monkeypatch.syspath_prepend(tmp_path)
    options = SETTINGS | {"steps": 2, "report_to": "tensorboard"}
    out = secateur.heal(llama_folder, pairs_file, **options, out=tmp_path / "out")
    (file,) = out.glob("runs/*/events")
    assert [line for line in file.read_text().splitlines() if "/loss" in line] == ["train/loss 1", "train/loss 2"]


def test_a_history_that_is_not_the_models_is_told_before_the_training(llama_folder: Path, pairs_file: Path, tmp_path):
    cut = secateur.prune(llama_folder, 2, out=tmp_path / "cut")
    origin = load(cut, Origin)
    replace(origin, kept=(0,)).save(cut)
    with pytest.raises(ModelError, match="lists 1 layers, but it has 2"):
        secateur.heal(cut, pairs_file, **SETTINGS, out=tmp_path / "out")
    assert not (tmp_path / "out.partial").exists()


def test_a_killed_training_ends_as_if_it_had_not_been(healed: Path, llama_folder: Path, pairs_file: Path, tmp_path):
    """Killed at a checkpoint; then, gone on, while the trained model is being written; with dropout."""
    out = tmp_path / "model"
    options = [f"--{name.replace('_', '-')}={value}" for name, value in SETTINGS.items()]
    command = ("heal", llama_folder, "--data", pairs_file, *options, "-o", out)
    for moment in ("checkpoint-8/trainer_state.json", "../model/model.safetensors"):
        run_until(tmp_path, f"model.partial/checkpoints/{moment}", *command)
        assert not out.exists()
    secateur.heal(llama_folder, pairs_file, **SETTINGS, out=out)
    assert load(out, Training).losses == load(healed, Training).losses
    one, other = (load_file(folder / "model.safetensors") for folder in (out, healed))
    assert all(torch.equal(one[name], other[name]) for name in one | other)
    assert list(tmp_path.iterdir()) == [out]


def test_a_batch_that_does_not_fit_into_memory_loses_nothing(
    healed: Path, llama_folder: Path, pairs_file: Path, tmp_path: Path, monkeypatch
):
    """At the sixth step, after two checkpoints; then gone on with, in mini-batches."""
    whole, calls = Loss.forward, itertools.count()

    def forward(self: Loss, *args: Any, **given: Any) -> Any:
        if self.config.mini_batch_tokens is None and next(calls) == 5:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return whole(self, *args, **given)

    monkeypatch.setattr(Loss, "forward", forward)
    out = tmp_path / "model"
    hint = "go on with --mini-batch-tokens 4096 or --gradient-checkpointing"
    with pytest.raises(ConfigError, match=f"^batch_size: a batch of .* does not fit into memory: {hint}$"):
        secateur.heal(llama_folder, pairs_file, **SETTINGS, out=out)
    steps: list[int] = []
    given = {**SETTINGS, "mini_batch_tokens": 64, "gradient_checkpointing": True}
    secateur.heal(llama_folder, pairs_file, **given, out=out, progress=lambda _, done, __: steps.append(done))
    assert steps[0] == 4 * SETTINGS["batch_size"]
    table = load(out, Training)
    assert (table.settings["mini_batch_tokens"], table.settings["gradient_checkpointing"]) == (64, True)
    losses, expected = ([row.loss for row in each.losses] for each in (table, load(healed, Training)))
    assert losses[:4] == expected[:4]
    assert losses == pytest.approx(expected, rel=0.2)  # of other draws of dropout
    assert list(tmp_path.iterdir()) == [out]


def test_a_disk_that_fills_up_on_the_way_loses_nothing(
    healed: Path, llama_folder: Path, pairs_file: Path, tmp_path: Path
):
    """Full from the fifth step on, so that the third checkpoint cannot be written; then freed."""
    with disk_of(4000, tmp_path / "small") as disk:
        filler = disk / "filler"

        def fill(what: str, done: int, total: int) -> None:
            if done == 5 * SETTINGS["batch_size"]:
                with contextlib.suppress(OSError), filler.open("wb", buffering=0) as stream:
                    while True:
                        stream.write(bytes(4096))

        out = disk / "model"
        with pytest.raises(OutputError, match=r"model: the disk is full: free some space and run the same command"):
            secateur.heal(llama_folder, pairs_file, **SETTINGS, out=out, progress=fill)
        assert not out.exists()
        assert Path(str(last_checkpoint(disk / "model.partial" / "checkpoints"))).name == "checkpoint-4"
        filler.unlink()
        steps: list[int] = []
        secateur.heal(llama_folder, pairs_file, **SETTINGS, out=out, progress=lambda _, done, __: steps.append(done))
        assert steps[0] == 4 * SETTINGS["batch_size"]
        assert load(out, Training).losses == load(healed, Training).losses
        one, other = (load_file(folder / "model.safetensors") for folder in (out, healed))
        assert all(torch.equal(one[name], other[name]) for name in one | other)
        assert list(disk.iterdir()) == [out]


def trained(
    folder: Path, data: Sequence[Pairs], llama: Path, **changes: object
) -> tuple[torch.nn.Module, TrainingResult]:
    config = TrainingConfig(**(SETTINGS | {"steps": 4} | changes))
    model = secateur.open_model(llama, device="cpu")
    outcome = train(model, training_sets(data, config.batch_size), config, folder)
    return model, outcome


@pytest.mark.parametrize("mode", ["lora", "blocks", "all"])
def test_each_mode_trains_what_it_says_and_goes_on_bit_for_bit(
    mode: str, llama_folder: Path, pairs_file: Path, tmp_path: Path
):
    options = {"train": mode, "learning_rate": 1e-3, "steps": 3}
    model, outcome = trained(tmp_path, [read_pairs(pairs_file)], llama_folder, **options)
    base, now = load_file(llama_folder / "model.safetensors"), dict(model[0].auto_model.named_parameters())
    changed = {name for name in base if not torch.equal(base[name], now[name])}
    linear = {name for name in base if base[name].ndim == 2 and "embed" not in name}
    assert changed == {"lora": linear, "blocks": set(base) - {"embed_tokens.weight"}, "all": set(base)}[mode]
    if mode != "lora":
        assert outcome.trained_parameters == sum(base[name].numel() for name in changed)
    shutil.rmtree(tmp_path / "checkpoint-3")
    again, same = trained(tmp_path, [read_pairs(pairs_file)], llama_folder, **options)
    assert same.losses == outcome.losses
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))


def test_no_warmup_is_so_long_that_nothing_is_learned(llama_folder: Path, pairs_file: Path, tmp_path: Path):
    model, _ = trained(tmp_path, [read_pairs(pairs_file)], llama_folder, steps=1, warmup=0.99)
    before = secateur.open_model(llama_folder, device="cpu")
    assert any(not torch.equal(p, q) for p, q in zip(model.parameters(), before.parameters(), strict=True))


def test_weights_stored_in_bfloat16_are_trained_in_float32(llama_folder: Path, pairs_file: Path, tmp_path: Path):
    """Their steps are below the last bit of a bfloat16; what is written has the format that it had."""
    config = TrainingConfig(**(SETTINGS | {"steps": 2, "train": "blocks", "learning_rate": 1e-5}))
    model = secateur.open_model(llama_folder, device="cpu", dtype="bfloat16")
    before = model[0].auto_model.norm.weight.detach().clone()
    train(model, training_sets([read_pairs(pairs_file)], 8), config, tmp_path)
    saved = load_file(tmp_path / "checkpoint-2" / TRAINED_WEIGHTS)
    norm = next(tensor for name, tensor in saved.items() if name.endswith("model.norm.weight"))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert norm.dtype == torch.float32
    assert not torch.equal(norm, before.float())
    assert torch.equal(model[0].auto_model.norm.weight, before)


def test_adapters_alone_are_trained_and_in_float32(llama_folder: Path, pairs_file: Path, tmp_path: Path):
    """Also where the weights are bfloat16; and not what stands after the pooling, as EmbeddingGemma's Dense."""
    model = secateur.open_model(llama_folder, device="cpu", dtype="bfloat16")
    model.insert(2, Dense(32, 32).to(torch.bfloat16))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    config = TrainingConfig(**(SETTINGS | {"steps": 2, "learning_rate": 0.1}))
    train(model, training_sets([read_pairs(pairs_file)], 8), config, tmp_path)
    saved = load_file(tmp_path / "checkpoint-2" / TRAINED_WEIGHTS)
    assert len(saved) == 2 * 7 * 3 and all("lora" in name for name in saved)
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    after = dict(model.named_parameters())
    assert {name: p.dtype for name, p in after.items()} == dict.fromkeys(before, torch.bfloat16)
    assert {name for name in before if not torch.equal(before[name], after[name])} == {
        name for name in before if name.endswith("_proj.weight")
    }


def test_precision_is_that_of_the_computation_under_adapters_too(llama_folder: Path, pairs_file: Path, tmp_path: Path):
    """In float32, weights that are stored in bfloat16 give the loss of the same weights stored in float32."""
    sets = training_sets([read_pairs(pairs_file)], 8)
    config = TrainingConfig(**(SETTINGS | {"steps": 1, "precision": "float32"}))
    half = secateur.open_model(llama_folder, device="cpu", dtype="bfloat16")
    whole = secateur.open_model(llama_folder, device="cpu")
    whole.load_state_dict(half.state_dict())
    losses = [train(own, sets, config, tmp_path / str(i)).losses for i, own in enumerate((half, whole))]
    assert losses[0] == losses[1]


def test_auto_trains_the_blocks_where_they_fit_and_says_so(llama_folder: Path, monkeypatch: pytest.MonkeyPatch):
    model = secateur.open_model(llama_folder, device="cpu")
    assert decide(model, TrainingConfig(train="auto")).train == "blocks"
    weights = sum(p.numel() for p in model[0].auto_model.layers.parameters())
    for memory, expected in ((32 * weights, "blocks"), (32 * weights - 1, "lora")):
        monkeypatch.setattr(recipes.psutil, "virtual_memory", lambda memory=memory: SimpleNamespace(total=memory))
        decided = decide(model, TrainingConfig(train="auto"))
        assert (decided.train, decided.learning_rate) == (expected, LEARNING_RATES[expected])


@pytest.mark.parametrize("device", ["cpu", "cuda:1"])
def test_training_takes_the_device_of_the_model_and_no_other(
    device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """With two GPUs (made up here), the stock arguments train on both, a whole batch on each, whatever was asked for;
    and where bfloat16 is emulated only, as on a T4, it is slower than float32.
    """
    current: list[torch.device] = []
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.set_device", current.append)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation=True: including_emulation)
    monkeypatch.setattr("secateur.healing.recipes.multiplies_bfloat16", lambda: True)
    where = torch.device(device)
    arguments = training_arguments(config_of(batch_size=8, learning_rate=1e-3), tmp_path, device=where)
    assert (arguments.device, arguments.train_batch_size) == (where, 8)
    assert arguments.n_gpu <= 1
    assert arguments.bf16 == (where.type == "cpu")
    assert current[-1:] == ([where] if where.type == "cuda" else [])


def scores_of(*values: float) -> Callable[[object], float]:
    """A measurement that gives one number after the other."""
    left = list(values)
    return lambda model: left.pop(0)


def test_the_best_model_is_kept_and_training_stops_when_it_gets_no_better(
    llama_folder: Path, pairs_file: Path, tmp_path: Path
):
    sets = training_sets([read_pairs(pairs_file)], 8)
    config = TrainingConfig(**(SETTINGS | {"steps": 10, "eval_every": 1, "patience": 2}))
    model = secateur.open_model(llama_folder, device="cpu")
    outcome = train(model, sets, config, tmp_path / "long", score=scores_of(0.1, 0.5, 0.4, 0.5))
    assert [(row.step, row.score) for row in outcome.evaluations] == [(1, 0.1), (2, 0.5), (3, 0.4), (4, 0.5)]
    assert outcome.best_step == 2
    best = load_file(tmp_path / "long" / "checkpoint-2" / TRAINED_WEIGHTS)
    name = "layers.0.self_attn.q_proj"
    a, b = (next(best[key] for key in best if f"{name}.lora_{x}" in key) for x in "AB")
    base = load_file(llama_folder / "model.safetensors")[f"{name}.weight"]
    merged = model[0].auto_model.get_submodule(name).weight
    assert torch.allclose(merged, base + config.lora_alpha / config.lora_rank * b @ a, atol=1e-6)
    # Killed after its last step, it has nothing left to train or to measure.
    again = secateur.open_model(llama_folder, device="cpu")
    same = train(again, sets, config, tmp_path / "long", score=scores_of())
    assert (same.evaluations, same.best_step) == (outcome.evaluations, 2)
    assert torch.equal(again[0].auto_model.get_submodule(name).weight, merged)


@pytest.mark.parametrize("mode", ["lora", "blocks"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_what_is_scored_is_what_is_written(
    mode: str, precision: str, llama_folder: Path, pairs_file: Path, tmp_path: Path
):
    """Of weights that came in bfloat16: rounded to it, and without autocast. Measuring changes no training."""
    texts = [str(row["query"]) for row in example_pairs(8, seed=1)]
    seen: list[np.ndarray] = []

    def score(model: SentenceTransformer) -> float:
        seen.append(model.encode(texts))
        return [0.1, 0.5, 0.3][len(seen) - 1]

    sets = training_sets([read_pairs(pairs_file)], 8)
    changes = {"steps": 3, "train": mode, "precision": precision, "lora_dropout": 0.0, "eval_every": 1}
    config = TrainingConfig(**(SETTINGS | changes))
    outcomes = []
    for own in (None, score):
        model = secateur.open_model(llama_folder, device="cpu", dtype="bfloat16")
        folder = tmp_path / str(own is None)
        outcomes.append(train(model, sets, config, folder, score=own))
    assert outcomes[1].best_step == 2
    assert np.array_equal(model.encode(texts), seen[1])
    assert not np.array_equal(seen[1], seen[2])
    assert outcomes[0].losses == outcomes[1].losses


def test_tasks_are_opened_once(llama_folder: Path, pairs_file: Path, tmp_path: Path):
    """Their files may go while a training runs."""
    task = write_task(tmp_path / "task", "sts", example_rows("sts"))
    held_out = read_held_out(make(HealOptions, {"model": "m", "data": ["d"], "out": "o", "eval_tasks": [task]}))
    assert held_out is not None
    score = held_out.score
    model = secateur.open_model(llama_folder, device="cpu")
    expected = secateur.evaluate([model], [task]).rows[0].score
    shutil.rmtree(task)
    assert [score(model), score(model)] == [expected, expected]


def test_a_training_that_learns_nothing_says_so(llama_folder: Path, tmp_path: Path):
    """The tokenizer knows no emoji, so that all anchors are one; and so are texts of nothing else."""
    rows = [{"query": chr(0x1F600 + i), "positive": f"face {i}"} for i in range(8)]
    pairs, texts = write_pairs(tmp_path / "faces.jsonl", rows), tmp_path / "faces.txt"
    texts.write_text("".join(f"{row['query']}\n" for row in rows), encoding="utf-8")
    for data, steps in ((pairs, 2), (texts, 12)):
        told: set[str] = set()

        def note(what: str, done: int, total: int, told: set[str] = told) -> None:
            told.add(what)

        settings = SETTINGS | {"steps": steps}
        with pytest.raises(DataError, match=f"the loss is 0 from the first step to step {min(steps, 10)}: nothing is"):
            secateur.heal(llama_folder, data, **settings, out=tmp_path / "out", progress=note)
        assert told == {"heal (lora)"}
        shutil.rmtree(tmp_path / "out.partial")


def test_held_out_rows_are_measured_on_the_way(llama_folder: Path, pairs_file: Path, tmp_path: Path):
    held_file = write_pairs(tmp_path / "held.jsonl", example_pairs(12, seed=1), "find the word")
    options = SETTINGS | {"steps": 4, "eval_data": [held_file], "eval_every": 2}
    healed = secateur.heal(llama_folder, pairs_file, **options, out=tmp_path / "out")
    table = load(healed, Training)
    assert [row.step for row in table.evaluations] == [2, 4]
    kept = max(row.score for row in table.evaluations)
    assert table.best_step == next(row.step for row in table.evaluations if row.score == kept)
    found = held_out_ndcg(secateur.open_model(healed, device="cpu"), read_pairs(held_file))
    assert found == pytest.approx(kept, abs=1e-5)
    with pytest.raises(ConfigError, match="nothing to measure on the way"):
        secateur.heal(llama_folder, pairs_file, **SETTINGS, patience=2, out=tmp_path / "other")


def test_equal_passages_are_one_document_of_the_held_out_ranking(
    make_encoder: MakeEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """By loops over distinct passages; the same in one piece and anchor by anchor."""
    model = make_encoder()
    rows = example_pairs(12)
    for i, row in enumerate(rows):
        row["negative"] = [*row["negative"], "no.", rows[(7 * i) % 12]["positive"]]
        row["positive"] = rows[i // 2]["positive"]  # of two anchors each
        row["query"] = rows[i - i % 3]["query"]  # with up to three passages each
    pairs = read_pairs(write_pairs(tmp_path / "held.jsonl", rows))
    relevant: dict[str, set[str]] = {}
    for row in pairs.rows:
        relevant.setdefault(row.anchor, set()).add(row.positive)
    corpus = sorted({text for row in pairs.rows for text in (row.positive, *row.negatives)})
    vectors = dict(zip(corpus, model.encode(corpus).astype(float), strict=True))
    gains = []
    for row in pairs.rows:
        scores = {text: float(model.encode(row.anchor).astype(float) @ vectors[text]) for text in corpus}
        others = set(corpus) - relevant[row.anchor]
        rank = 1 + sum(scores[text] > scores[row.positive] for text in others)
        gains.append(1 / math.log2(1 + rank) if rank <= 10 else 0)
    assert 0.1 < np.mean(gains) < 0.9
    assert held_out_ndcg(model, pairs) == pytest.approx(np.mean(gains), abs=1e-6)
    monkeypatch.setattr(training_data, "COMPARED", 1)
    assert held_out_ndcg(model, pairs) == pytest.approx(np.mean(gains), abs=1e-6)


def test_a_training_that_is_measured_goes_on_bit_for_bit_after_a_kill(
    llama_folder: Path, pairs_file: Path, tmp_path: Path
):
    """What the score draws at random must not change what the training draws."""
    sets = training_sets([read_pairs(pairs_file)], 8)
    config = TrainingConfig(**(SETTINGS | {"steps": 6, "eval_every": 2}))
    runs = []
    for killed in (False, True):
        values, folder = [0.1, 0.4, 0.2], tmp_path / str(killed)

        def score(model: object, values: list[float] = values) -> float:
            torch.rand(3)
            return values.pop(0)

        def kill(what: str, done: int, total: int) -> None:
            if done == 5 * 8:
                raise KeyboardInterrupt

        if killed:
            with pytest.raises(KeyboardInterrupt):
                model = secateur.open_model(llama_folder, device="cpu")
                train(model, sets, config, folder, score=score, progress=kill)
            assert values == [0.2]
        model = secateur.open_model(llama_folder, device="cpu")
        runs.append((model, train(model, sets, config, folder, score=score)))
        assert not values
    (one, whole), (other, resumed) = runs
    assert (resumed.losses, resumed.evaluations, resumed.best_step) == (whole.losses, whole.evaluations, 4)
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))


class Exploding(torch.nn.Module):
    """Grows a thousandfold after eleven steps."""

    def __init__(self, model: SentenceTransformer, config: TrainingConfig) -> None:
        super().__init__()
        self.loss, self.calls = Loss(model, config), 0

    def forward(self, features: object, labels: object) -> torch.Tensor:
        self.calls += 1
        return self.loss(features, labels) * (1000 if self.calls > 11 else 1)


def test_an_exploding_loss_stops_with_the_last_good_state(llama_folder: Path, pairs_file: Path, tmp_path: Path):
    model = secateur.open_model(llama_folder, device="cpu")
    sets = training_sets([read_pairs(pairs_file)], 8)
    config = TrainingConfig(**(SETTINGS | {"steps": 20}))
    with pytest.raises(TrainingDiverged) as caught:
        train(model, sets, config, tmp_path, make_loss=Exploding)
    assert caught.value.step == 12
    assert Path(str(caught.value.checkpoint)).name == "checkpoint-10"


def test_both_ways_is_kept_in_the_folder_and_refused_where_it_changes_nothing(
    llama_folder: Path, pairs_file: Path, tmp_path: Path
):
    settings = SETTINGS | {"steps": 1, "bidirectional": True}
    healed = secateur.heal(llama_folder, pairs_file, **settings, out=tmp_path / "out")
    assert not is_causal(SentenceTransformer(str(healed), device="cpu")[0])
    assert load(healed, Training).settings["bidirectional"] is True
    with pytest.raises(ModelError, match="attends both ways already"):
        secateur.heal(healed, pairs_file, **settings, out=tmp_path / "again")


def test_a_recipe_is_a_set_of_defaults():
    paper = config_of(recipe="l3prune")
    numbers = (paper.steps, paper.batch_size, paper.scale, paper.max_length, paper.warmup * paper.steps)
    assert numbers == (1000, 64, 50.0, 512, 300)
    assert (paper.train, paper.lora_rank, paper.lora_alpha, paper.lora_dropout) == ("lora", 16, 32, 0.05)
    assert (LEARNING_RATES["lora"], paper.learning_rate, paper.seed) == (2e-4, None, 42)
    given = config_of(steps=3, train="all")
    assert (given.steps, given.train, given.scale, given.max_length) == (3, "all", 20.0, 128)
    assert config_of(recipe="finetune", train="blocks", lora_rank=16).lora_rank == 16  # as the recipe has it
    assert config_of(recipe="finetune", lora_rank=4).lora_rank == 4


def test_options_of_adapters_without_effect_are_noted(llama_folder: Path, pairs_file: Path, tmp_path):
    given = {"steps": 1, "batch_size": 8, "precision": "float32", "lora_rank": 4, "lora_dropout": 0.0}
    settings = load(secateur.heal(llama_folder, pairs_file, **given, out=tmp_path / "out"), Training).settings
    assert settings["train"] == "blocks"
    told = "lora_rank, lora_dropout: without effect, for the weights are trained themselves (train blocks)"
    assert list(settings["notes"]) == [told]
    assert not {"lora_rank", "lora_alpha", "lora_dropout", "layers"} & settings.keys()


def test_merged_weights_are_the_base_and_the_product_of_the_factors(llama_folder: Path, pairs_file: Path, tmp_path):
    model, _ = trained(tmp_path, [read_pairs(pairs_file)], llama_folder, lora_alpha=6)
    base = load_file(llama_folder / "model.safetensors")
    factors = load_file(tmp_path / "checkpoint-4" / TRAINED_WEIGHTS)
    merged = dict(model[0].auto_model.named_parameters())
    assert merged.keys() == base.keys()
    found = 0
    for name, tensor in base.items():
        a, b = (
            next((factors[key] for key in factors if f"{name.removesuffix('weight')}lora_{x}" in key), None)
            for x in "AB"
        )
        expected = tensor if a is None else tensor + 6 / 4 * b @ a
        found += a is not None
        assert torch.allclose(merged[name], expected, atol=1e-6), name
    assert 2 * found == len(factors)


def test_gradient_checkpointing_changes_no_number(llama_folder: Path, pairs_file: Path, tmp_path: Path):
    pairs = [read_pairs(pairs_file)]
    (saved, ours), (plain, theirs) = (
        trained(tmp_path / str(on), pairs, llama_folder, gradient_checkpointing=on) for on in (True, False)
    )
    assert [model[0].auto_model.is_activation_checkpointing for model in (saved, plain)] == [True, False]
    assert [row.loss for row in ours.losses] == pytest.approx([row.loss for row in theirs.losses], abs=1e-5)


def test_a_checkpoint_that_was_not_written_to_its_end_is_passed_over(llama_folder: Path, pairs_file: Path, tmp_path):
    pairs = [read_pairs(pairs_file)]
    model, outcome = trained(tmp_path, pairs, llama_folder)
    (tmp_path / "checkpoint-4" / "trainer_state.json").write_text('{"best_')
    again, same = trained(tmp_path, pairs, llama_folder)
    assert same.losses == outcome.losses
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))


def test_every_checkpoint_is_at_a_logged_step(llama_folder: Path, pairs_file: Path, tmp_path: Path):
    """Else the loss logged next, a mean since the last one, would lack steps after a kill."""
    _, outcome = trained(tmp_path, [read_pairs(pairs_file)], llama_folder, steps=230)
    logged = {row.step for row in outcome.losses}
    kept = {int(folder.name.rpartition("-")[2]) for folder in tmp_path.iterdir()}
    assert len(kept) == 2
    assert kept - {230} <= logged


def test_rows_with_and_without_negatives_are_two_sets(tmp_path: Path):
    rows = example_pairs(16)
    for row in rows[:6]:
        del row["negative"]
    rows[7]["negative"] = ["one", "two"]
    pairs = read_pairs(write_pairs(tmp_path / "mixed.jsonl", rows, "find it"))
    bare, hard = training_sets([pairs], 6)
    assert (bare.name, bare.rows.column_names, len(bare.rows)) == ("mixed", ["anchor", "positive"], 6)
    assert (hard.name, hard.rows.column_names, len(hard.rows)) == (
        "mixed-hard",
        ["anchor", "positive", "negative_1"],
        10,
    )
    assert bare.prompts == hard.prompts == {"anchor": "find it;\n"}
    assert hard.rows[1]["negative_1"] == "one"
    (only,) = training_sets([pairs], 8)
    assert only.name == "mixed-hard"


def test_a_data_set_by_name_trains_as_a_file_does(llama_folder: Path, healed: Path, tmp_path: Path, pairs_file: Path):
    rows = read_pairs(pairs_file)
    columns = {"anchor": "question", "positive": "answer", "negative": "wrong"}
    named = [dict(zip(columns.values(), (p.anchor, p.positive, list(p.negatives)), strict=True)) for p in rows.rows]
    datasets.Dataset.from_list(named).save_to_disk(tmp_path / "words")
    given = {"columns": columns, "instruction": rows.prompt.removesuffix(";\n")}
    out = secateur.heal(llama_folder, f"hf:{tmp_path}/words", **SETTINGS, **given, out=tmp_path / "out")
    table = load(out, Training)
    assert [row.loss for row in table.losses] == [row.loss for row in load(healed, Training).losses]
    assert (table.provenance.data[0].name, table.provenance.data[0].rows) == (f"hf:{tmp_path}/words", len(rows.rows))
    assert table.settings["columns"] == columns


def test_mistakes_are_told_before_anything_is_written(llama_folder: Path, pairs_file: Path, tmp_path: Path):
    out = tmp_path / "out"
    with pytest.raises(DataError, match=r"nothing fills a batch of 64 \(words.jsonl: 24 rows\)"):
        secateur.heal(llama_folder, pairs_file, out=out)
    namesake = write_pairs(tmp_path / "words.jsonl", example_pairs(9))
    with pytest.raises(DataError, match="two data files have this name"):
        secateur.heal(llama_folder, [pairs_file, namesake], batch_size=8, out=out)
    wrong = ({"steps": 0}, {"learning_rate": -1.0}, {"batch_size": 1}, {"lora_dropout": 1.0}, {"precision": "x"})
    for option in (*wrong, {"report_to": "nonesuch"}):
        with pytest.raises(ConfigError, match=next(iter(option))):
            secateur.heal(llama_folder, pairs_file, **(SETTINGS | option), out=out)
    assert sorted(tmp_path.iterdir()) == [namesake]
    with pytest.raises(OutputError, match="is there already"):
        secateur.heal(llama_folder, pairs_file, **SETTINGS, out=tmp_path)


def test_a_diverging_training_says_at_which_step_and_keeps_its_settings(llama_folder: Path, pairs_file: Path, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(TrainingDiverged, match="try a smaller learning rate") as caught:
        secateur.heal(llama_folder, pairs_file, **(SETTINGS | {"learning_rate": 1e30}), out=out)
    assert 1 <= caught.value.step <= STEPS
    assert not math.isfinite(caught.value.loss)
    assert not out.exists()
    if caught.value.checkpoint:
        state = json.loads((Path(caught.value.checkpoint) / "trainer_state.json").read_text())
        assert all(math.isfinite(row["loss"]) for row in state["log_history"])
    told = r"unfinished training with other settings \(learning_rate was 1e\+30, is 0.003\)"
    with pytest.raises(ConfigError, match=told):
        secateur.heal(llama_folder, pairs_file, **SETTINGS, out=out)


def test_data_without_a_batch_of_different_texts_are_refused(llama_folder: Path, tmp_path: Path):
    rows = [
        {"query": f"what is {letter}?", "positive": ("yes.", "no.")[i % 2]} for i, letter in enumerate("abcdefghij")
    ]
    file = write_pairs(tmp_path / "dup.jsonl", rows)
    told = r"nothing fills a batch of 8 \(dup.jsonl: 10 rows, no more than 2 of them without a text in common\)"
    with pytest.raises(DataError, match=told):
        secateur.heal(llama_folder, file, **SETTINGS, out=tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == [file]
    chain = [{"query": f"word {i}", "positive": f"word {i + 1}"} for i in range(14)]
    with pytest.raises(DataError, match=r"14 rows, no more than [5-7] of them without a text in common"):
        secateur.heal(llama_folder, write_pairs(tmp_path / "chain.jsonl", chain), **SETTINGS, out=tmp_path / "out")
    (few,) = training_sets([read_pairs(file)], 2)
    assert len(few.rows) == 10


def test_a_training_that_runs_out_of_batches_is_no_success(llama_folder: Path, pairs_file: Path, tmp_path: Path):
    (item,) = training_sets([read_pairs(pairs_file)], 8)
    same = replace(item, rows=item.rows.select([0] * 16))
    model = secateur.open_model(llama_folder, device="cpu")
    with pytest.raises(DataError, match="gave no batch of 8 after 0 of 3 steps"):
        train(model, [same], TrainingConfig(**(SETTINGS | {"steps": 3})), tmp_path)


def test_what_is_not_trained_on_is_told_and_leaves_no_trace(llama_folder: Path, pairs_file: Path, tmp_path: Path):
    small = write_pairs(tmp_path / "small.jsonl", example_pairs(5, seed=2))
    rows = example_pairs(9, seed=3)
    for row in rows[1:]:
        row["negative"] = [*row["negative"], "one", "two"]
    many = write_pairs(tmp_path / "many.jsonl", rows, "find the word")
    options = SETTINGS | {"steps": 1}
    table = load(secateur.heal(llama_folder, [pairs_file, small, many], **options, out=tmp_path / "out"), Training)
    assert [item.name for item in table.provenance.data] == ["words.jsonl", "many.jsonl"]
    assert table.prompts["query"] == "find the word;\n"
    assert list(table.settings["notes"]) == [
        "small.jsonl: 5 rows: too few for a batch of 8, not trained on",
        "many.jsonl: 8 rows with up to 3 negatives; used: 1 per row, as many as every row has",
    ]


def test_what_a_model_puts_before_texts_is_trained_and_what_is_trained_stays(
    make_encoder: MakeEncoder, pairs_file: Path, tmp_path: Path
):
    """The default prompt where data bring no instruction; else theirs alone; and no prompt of an earlier healing."""
    model, plain = tmp_path / "model", write_pairs(tmp_path / "plain.jsonl", example_pairs(16))
    prompts = {"own": "look: ", "words": "say it;\n", "query": "say it;\n"}
    make_encoder("llama", 2, prompts=prompts, default_prompt_name="own").save(str(model))
    settings = SETTINGS | {"steps": 1}
    own = secateur.heal(model, plain, **settings, out=tmp_path / "own")
    table = load(own, Training)
    asked = replace(read_pairs(plain), prompt="look: ", passage_prompt="look: ")
    losses = [
        trained(tmp_path / pairs.prompt, [pairs], model, steps=1)[1].losses for pairs in (asked, read_pairs(plain))
    ]
    assert table.losses[0].loss == pytest.approx(losses[0][0].loss)
    assert table.losses[0].loss != pytest.approx(losses[1][0].loss)
    healed = secateur.open_model(own, device="cpu")
    assert (healed.default_prompt_name, healed.prompts["query"], healed.prompts["own"]) == ("own", "look: ", "look: ")
    assert not is_instructed(healed)
    told = secateur.open_model(secateur.heal(own, pairs_file, **settings, out=tmp_path / "told"), device="cpu")
    assert told.default_prompt_name is None
    assert told.prompts == {"words": "find the word;\n", "query": "find the word;\n", "document": ""}


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"train": "blocks", "lora_rank": 3}, "lora_rank: there are no adapters where train is blocks"),
        ({"train": "all", "lora_dropout": 0.5}, "lora_dropout: there are no adapters"),
        ({"cache": "cc"}, "cache: there is no teacher"),
        ({"layers": "uniform"}, "layers: no smaller depth is trained: give --depths"),
        ({"eval_every": 0}, "eval_every: 0 is not valid"),
        ({"patience": 0}, "patience: 0 is not valid"),
        ({"eval_sample": 0}, "eval_sample: 0 is not valid"),
        ({"recipe": "nonesuch"}, "recipe: 'nonesuch' is not valid: .*l3prune"),
        ({"steps": 2.5}, "steps: 2.5 is not valid: .*integer"),
        ({"seed": -1}, "seed: -1 is not valid"),
        ({"seed": 2**33}, "seed: 8589934592 is not valid"),
        ({"scale": math.inf}, "scale: inf is not valid: .*finite"),
        ({"learning_rate": math.nan}, "learning_rate: nan is not valid"),
        ({"max_length": 15}, 'max_length: is 15: the prompt "find the word;\n" would fill all of it: 16 or more'),
    ],
)
def test_numbers_that_are_none_or_do_nothing_are_refused(
    options: dict[str, object], told: str, llama_folder: Path, pairs_file: Path, tmp_path: Path
):
    given = {"steps": 4, "batch_size": 8, "eval_data": pairs_file} | options
    with pytest.raises(ConfigError, match=told):
        secateur.heal(llama_folder, pairs_file, **given, out=tmp_path / "out")
    assert not any(tmp_path.iterdir())


def test_a_length_without_room_for_a_text_is_refused(tmp_path: Path):
    """Of a tokenizer that puts two special tokens around each text, and cuts nothing where it is asked for one."""
    folder = tiny_transformer(tmp_path / "model", depth=1)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.post_processor = TemplateProcessing(single="<pad> $A <unk>", special_tokens=[("<pad>", 0), ("<unk>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    data = write_pairs(tmp_path / "plain.jsonl", example_pairs(8))
    with pytest.raises(ConfigError, match="max_length: is 2: the special tokens would fill all of it: 3 or more"):
        secateur.heal(folder, data, **SETTINGS, max_length=2, out=tmp_path / "out")


def test_rows_with_negatives_and_another_file_do_not_share_a_name(tmp_path: Path):
    rows = example_pairs(16)
    for row in rows[:8]:
        del row["negative"]
    files = [write_pairs(tmp_path / "words.jsonl", rows), write_pairs(tmp_path / "words-hard.jsonl", example_pairs(8))]
    with pytest.raises(DataError, match="words-hard: two data files have this name"):
        training_sets([read_pairs(file) for file in files], 8)
