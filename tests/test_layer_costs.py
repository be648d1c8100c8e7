"""The parts of a model against models that are really cut: what is counted must be what is there."""

from __future__ import annotations

import copy
import json
import struct
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from architectures import batch, model_of, padding_id, states
from conftest import MakeEncoder, tiny_transformer
from secateur.choosing.budgets import cut_cost
from secateur.measures.costs import flops_per_token, layer_sizes, measure_layers
from secateur.models.blocks import blocks_of
from secateur.models.cutting import cut, legal_depths
from secateur.models.open_model import open_model
from secateur.profiling.profile import profile
from secateur.pruning.prune import prune

VARIED = (
    "llama", "gemma3_text", "gemma3n_text", "gemma4_text", "gpt2", "bert", "opt", "t5", "mixtral",
    "falcon_mamba", "zamba2",
)  # fmt: skip


class Wrapped(torch.nn.Module):
    """A transformer as the SentenceTransformer that the counters ask for; every text is a batch of three."""

    def __init__(self, transformer):
        super().__init__()
        self.auto_model = transformer.eval()

    def __getitem__(self, _):
        return self

    def preprocess(self, _):
        return batch(pad=padding_id(self.auto_model))

    def forward(self, features):
        return states(self.auto_model, features)


@pytest.mark.parametrize("name", VARIED)
def test_sizes_of_every_depth_are_those_of_the_cut_model(name: str, tmp_path: Path):
    whole = model_of(name)
    sizes = layer_sizes(Wrapped(whole))
    for depth in legal_depths(whole.config):
        small = copy.deepcopy(whole)
        cut(small, range(depth))
        kept = sizes[: depth + 1]
        assert sum(parameters for parameters, _ in kept) == sum(p.numel() for p in small.parameters()), depth
        folder = tmp_path / str(depth)
        small.save_pretrained(folder)
        assert sum(size for _, size in kept) == stored_bytes(folder), depth


def stored_bytes(folder: Path) -> int:
    """Bytes of all tensors in a folder, from the file's header alone."""
    with (folder / "model.safetensors").open("rb") as stream:
        header = json.loads(stream.read(struct.unpack("<Q", stream.read(8))[0]))
    return max(end for key, about in header.items() if key != "__metadata__" for end in [about["data_offsets"][1]])


def test_costs_of_a_set_of_blocks_are_those_of_the_cut_encoder(make_encoder: MakeEncoder):
    model = make_encoder("llama", depth=6)
    parts = measure_layers(model, layer_sizes(model))
    assert [row.layer for row in parts] == [*range(7)]
    for blocks in ((0,), (0, 1, 2), (1, 4), tuple(range(6))):
        small = copy.deepcopy(model)
        cut(small[0].auto_model, blocks)
        found = cut_cost(SimpleNamespace(layer_costs=parts, depth=6), blocks)
        assert found.parameters == sum(p.numel() for p in small.parameters())
        assert found.flops_per_token == pytest.approx(flops_per_token(small, 128)[0][0])


@pytest.mark.parametrize("name", ["mixtral", "deberta", "mamba"])
def test_operations_of_layers_add_up_to_those_of_the_model(name: str):
    """Experts that torch's counter does not know by itself, tables handed from module to module, a scan."""
    model = Wrapped(model_of(name))
    config = model.auto_model.config
    outside, *layers = flops_per_token(model, 12, blocks_of(model.auto_model))[0]
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as dense:
        model.requires_grad_(False)(model.preprocess([]))
    experts = 0
    if name == "mixtral":
        experts = 2 * 36 * config.num_experts_per_tok * 3 * config.hidden_size * config.intermediate_size * len(layers)
    assert outside >= 0 and min(layers) > 0
    assert 12 * (outside + sum(layers)) == pytest.approx(dense.get_total_flops() + experts)


def test_the_time_of_a_layer_is_what_passes_while_it_runs(make_encoder: MakeEncoder, monkeypatch: pytest.MonkeyPatch):
    """By a clock that goes on in the third layer alone."""
    model = make_encoder("llama", depth=4)
    now = [0]
    monkeypatch.setattr("secateur.measures.costs.time", SimpleNamespace(perf_counter=lambda: now[0]))
    model[0].auto_model.layers[2].mlp.register_forward_hook(lambda *_: now.__setitem__(0, now[0] + 7))
    parts = measure_layers(model, layer_sizes(model))
    assert [row.latency for row in parts] == [row.seconds for row in parts] == [0, 0, 0, 7, 0]


@pytest.mark.slow
def test_a_profile_predicts_the_weights_that_prune_writes(pairs_file: Path, tmp_path: Path):
    source = tiny_transformer(tmp_path / "llama", "llama", depth=4)
    open_model(source, dtype="bfloat16")[0].auto_model.save_pretrained(source)
    found = profile(source, pairs_file, batch_size=8)  # the weights stay as stored, whatever computes
    out = prune(source, "uniform:3", out=tmp_path / "cut")
    assert cut_cost(found, (0, 2, 3)).bytes == stored_bytes(out)
