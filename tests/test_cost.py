"""Counts against closed forms, on tiny models of many architectures; times are only there."""

from __future__ import annotations

import gc
import importlib.util
import itertools
import json
import struct
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from sentence_transformers import SentenceTransformer

from architectures import model_of
from conftest import MakeEncoder
from secateur.errors import ConfigError, ModelError
from secateur.measures.costs import flops_per_token
from secateur.models.open_model import open_model
from secateur.provenance import fingerprint_files
from secateur.reporting import cost as cost_module
from secateur.reporting.cost import bytes_on_disk, cost, measure_alone, texts_of
from secateur.reporting.tables import cost_table
from secateur.results import Costs, load


def test_operations_per_token_of_a_llama_are_the_closed_form(make_encoder: MakeEncoder):
    model = make_encoder("llama", depth=2)
    c = model[0].auto_model.config
    heads = c.hidden_size * (2 + 2 * c.num_key_value_heads / c.num_attention_heads)
    for length in (16, 64):
        (flops,), tokens = flops_per_token(model, length)
        block = 2 * c.hidden_size * (heads + 3 * c.intermediate_size) + 4 * length * c.hidden_size
        assert tokens == length
        assert flops == 2 * block
    assert flops_per_token(model, 5000)[1] == 128  # the longest text that it takes


def tensors_of(folder: Path) -> dict[str, int]:
    """Elements of each stored tensor, from the file's header alone."""
    with (folder / "model.safetensors").open("rb") as stream:
        header = json.loads(stream.read(struct.unpack("<Q", stream.read(8))[0]))
    sizes = {}
    for name, about in header.items():
        if name != "__metadata__":
            sizes[name] = 1
            for side in about["shape"]:
                sizes[name] *= side
    return sizes


@pytest.mark.parametrize(
    "name", ["llama", "gemma3_text", "gpt2", "bert", "mpnet", "opt", "t5", "mixtral", "qwen3", "phi3"]
)
def test_parameters_are_those_in_the_file(name: str, tmp_path: Path):
    model = model_of(name)
    model.save_pretrained(tmp_path)
    stored = tensors_of(tmp_path)
    assert sum(parameter.numel() for parameter in model.parameters()) == sum(stored.values())
    table = model.get_input_embeddings().weight
    assert table.numel() == model.config.vocab_size * table.shape[1] in stored.values()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every piece of work takes a tenth of a second."""
    ticks = itertools.count()
    monkeypatch.setattr(cost_module, "time", SimpleNamespace(perf_counter=lambda: next(ticks) / 10))


def test_costs_of_models_side_by_side(make_encoder: MakeEncoder, tmp_path: Path, clock: None):
    folders = {}
    for depth in (6, 1):
        folders[f"tiny-{depth}"] = tmp_path / f"tiny-{depth}"
        make_encoder("llama", depth=depth).save(str(folders[f"tiny-{depth}"]), create_model_card=False)
    told: list[tuple[str, int, int]] = []
    costs = cost(
        list(folders.values()),
        names=list(folders),
        repetitions=1,
        out=tmp_path / "out",
        progress=lambda *args: told.append(args),
    )
    assert told == [("cost", i, 2) for i in range(3)]
    assert load(tmp_path / "out", Costs) == costs
    large, small = costs.rows
    assert (large.model, large.depth, small.model, small.depth) == ("tiny-6", 6, "tiny-1", 1)
    for row in costs.rows:
        stored = tensors_of(folders[row.model])
        assert row.parameters == sum(stored.values())
        assert row.embedding_parameters == next(n for name, n in stored.items() if "embed_tokens" in name)
        assert row.memory_bytes == 4 * row.parameters
        assert row.bytes == sum(f.stat().st_size for f in folders[row.model].rglob("*") if f.is_file())
        assert [row.speed_low, row.texts_per_second, row.speed_high] == pytest.approx([160] * 3)
        assert [row.long_speed_low, row.long_texts_per_second, row.long_speed_high] == pytest.approx([20] * 3)
        assert [row.latency_p50, row.latency_p95, row.load_seconds] == pytest.approx([0.1] * 3)
        assert (row.dtype, row.device, row.threads) == ("float32", "cpu", torch.get_num_threads())
        assert (row.short_batch, row.long_batch) in [(a, b) for a in (4, 16) for b in (1, 2)]
    measured_once = f"160 ({large.short_tokens:.0f} tokens, batches of {large.short_batch})"  # without a range
    assert measured_once in cost_table(costs.rows).to_markdown()
    assert large.parameters - small.parameters == 5 * (large.parameters - large.embedding_parameters - 32) // 6
    assert large.flops_per_token > 5 * small.flops_per_token


def test_speeds_are_medians_in_the_quickest_batch_size_and_latencies_are_quantiles(monkeypatch: pytest.MonkeyPatch):
    """A model that takes so long as it says, on a clock that only it moves."""
    now = 0.0

    class Encoder:
        device = torch.device("cpu")

        def encode(self, texts: list[str], batch_size: int, show_progress_bar: bool) -> None:
            nonlocal now
            now += slower * (0.5 if batch_size == 1 else len(texts) * {4: 0.02, 16: 0.01, 2: 0.1}[batch_size])

    monkeypatch.setattr(cost_module, "time", SimpleNamespace(perf_counter=lambda: now))
    slower = 1.0
    timer = cost_module._Timer("m", "m", None, open=Encoder())
    timer.warm_up(cost_module.QUICK)
    assert timer.batches == {"short": 16, "long": 2}
    for factor in (1.0, 2.0, 4.0):
        slower = factor
        timer.measure(cost_module.QUICK)
    assert timer.speeds["short"] == pytest.approx([100, 50, 25])
    assert timer.speeds["long"] == pytest.approx([10, 5, 2.5])
    assert timer.latencies == pytest.approx([0.5] * 5 + [1.0] * 5 + [2.0] * 5)


def test_models_that_do_not_fit_together_take_turns_in_memory(
    make_encoder: MakeEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: None
):
    """The real opening, watched: whenever a model is opened, no other is there."""
    for depth in (3, 1):
        make_encoder("llama", depth=depth).save(str(tmp_path / f"tiny-{depth}"), create_model_card=False)
    folders = [tmp_path / "tiny-3", tmp_path / "tiny-1"]
    together = cost(folders, repetitions=1)
    opened: list[weakref.ref[SentenceTransformer]] = []

    def watched(source: Path, **options: object) -> SentenceTransformer:
        gc.collect()
        assert not any(model() for model in opened)
        model = open_model(source, **options)
        opened.append(weakref.ref(model))
        return model

    monkeypatch.setattr("secateur.reporting.cost.open_embedder", watched)
    monkeypatch.setattr("secateur.reporting.cost.ROOM", 0.0)
    apart = cost(folders, repetitions=1)
    assert len(opened) == 2 * 2  # to warm up, and to measure
    counted = ("model", "depth", "parameters", "embedding_parameters", "bytes", "memory_bytes", "flops_per_token")
    for one, other in zip(apart.rows, together.rows, strict=True):
        assert [getattr(one, name) for name in counted] == [getattr(other, name) for name in counted]
        assert one.load_seconds == pytest.approx(0.1)


@pytest.mark.slow
def test_peak_memory_and_load_time_are_those_of_a_fresh_process(make_encoder: MakeEncoder, tmp_path: Path):
    make_encoder("llama").save(str(tmp_path / "tiny"), create_model_card=False)
    ballast = torch.ones(400_000_000)  # this process's memory is not the other's
    alone = measure_alone(tmp_path / "tiny", "cpu", 1)
    assert 1e8 < alone["peak_bytes"] < ballast.nbytes
    assert alone["load_seconds"] > 0
    with pytest.raises(ModelError, match="no such file"):
        measure_alone(tmp_path / "nothing", "cpu", 1)


def test_no_module_of_unix_alone_is_needed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "resource", None)
    spec = importlib.util.find_spec(cost_module.__name__)
    spec.loader.exec_module(importlib.util.module_from_spec(spec))


def test_texts_differ_and_long_ones_are_long():
    assert len(set(texts_of("short", 50))) == len(set(texts_of("long", 50))) == 50
    assert len(texts_of("long", 1)[0].split()) > 12 * len(texts_of("short", 1)[0].split())


def test_another_model_in_a_models_folder_is_not_counted(make_encoder: MakeEncoder, tmp_path: Path):
    folder = tmp_path / "model"
    make_encoder().save(str(folder))
    before, fingerprint = bytes_on_disk(folder), fingerprint_files(folder)
    make_encoder(depth=1).save(str(folder / "cut"))
    assert bytes_on_disk(folder) == before > bytes_on_disk(folder / "cut")
    assert fingerprint_files(folder) == fingerprint != fingerprint_files(folder / "cut")


def test_wrong_arguments_are_refused(tmp_path: Path):
    for arguments, options, says in (
        ([[]], {}, "models: is missing"),
        ([["a/final", "a/final"]], {}, "two models are called"),
        ([["a", "b"]], {"names": ["one"]}, "1 name for 2 models"),
        ([["a"]], {"repetitions": 0}, "repetitions: 0 is not valid"),
    ):
        with pytest.raises(ConfigError, match=says):
            cost(*arguments, **options)
    with pytest.raises(ModelError, match="not found"):
        bytes_on_disk("nobody/no-such-model")


def test_costs_tell_the_files_and_versions_that_they_are_of(make_encoder: MakeEncoder, tmp_path: Path, clock: None):
    make_encoder().save(str(tmp_path / "model"))
    (first,) = cost([tmp_path / "model"], repetitions=1).rows
    (tmp_path / "model" / "README.md").write_text("no vector depends on it")
    assert first.files == fingerprint_files(tmp_path / "model")
    assert f"torch {torch.__version__.partition('+')[0]}" in first.versions
    make_encoder(seed=1).save(str(tmp_path / "model"))
    assert first.files != fingerprint_files(tmp_path / "model")
