"""Every selector's choice on real models, with its zero-shot loss: the tables of docs/explanation/defaults.md.

    python benchmarks/choosing.py PAIRS --models smollm2 gemma-3-270m.gguf -o FOLDER
        [--tasks TASK ...] [--sample 300] [--examples 640] [--seed 42]

A profile measures depths only, so each chosen set of other layers is cut in memory and measured on the same batches.
``--tasks`` is what best-task chooses by. FOLDER keeps profiles and losses: what is there is not measured again.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import torch

from secateur.choosing.choose import Candidate, candidates, ranges
from secateur.choosing.selectors import is_prefix
from secateur.files import write_text
from secateur.models import model_label
from secateur.models.cutting import cut
from secateur.models.open_model import open_model
from secateur.profiling.profile import profile
from secateur.results import Profile, load

DTYPE = "float32"


def profile_of(model: str, options: argparse.Namespace) -> Profile:
    folder = options.out / f"profile-{model_label(model)}"
    if not (folder / Profile.file).is_file():
        settings = {"max_examples": options.examples, "seed": options.seed, "dtype": DTYPE}
        profile(model, options.pairs, tasks=options.tasks, sample=options.sample, out=folder, **settings)
    return load(folder, Profile)


def loss_of_set(model: str, row: Candidate, options: argparse.Namespace) -> tuple[float, float, float]:
    """Loss of a model cut to a set of layers, and its interval, on the batches of the whole model's profile."""
    file = options.out / f"set-{model_label(model)}-{ranges(row.blocks)}.json"
    if not file.is_file():
        opened = open_model(model, dtype=DTYPE)
        cut(opened[0].auto_model, row.blocks)
        last = profile(opened, options.pairs, max_examples=options.examples, seed=options.seed).rows[-1]
        write_text(file, json.dumps([last.loss, last.loss_low, last.loss_high]))
    loss, low, high = json.loads(file.read_text())
    return loss, low, high


def table(model: str, options: argparse.Namespace) -> str:
    found = candidates(profile_of(model, options))
    lines = [
        f"**{found.model}**, {found.depth} layers:",
        "",
        "| selector | layers kept | sure | zero-shot loss (95 % interval) | M parameters | MB | MFLOPs | speed |",
        "|---|---|---:|---|---:|---:|---:|---:|",
    ]
    for row in found.rows:
        if is_prefix(row.blocks):
            loss, low, high, kept = row.loss, row.loss_low, row.loss_high, str(len(row.blocks))
        else:
            loss, low, high = loss_of_set(model, row, options)
            kept = f"{len(row.blocks)}: {ranges(row.blocks)}"
        sure = "" if row.selection_probability is None else f"{row.selection_probability:.0%}"
        lines.append(
            f"| `{row.name}` | {kept} | {sure} | {loss:.3f} ({low:.3f} to {high:.3f}) | {row.parameters / 1e6:.1f} | "
            f"{row.bytes / 1e6:.0f} | {row.flops_per_token / 1e6:.0f} | {row.speed:.1f} × |"
        )
    notes = [f"`{row.name}`: {row.warning}." for row in found.rows if row.warning]
    notes += [f"`{name}`: {why}." for name, why in found.refused.items()]
    return "\n".join([*lines, "", *notes])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", type=Path)
    parser.add_argument("--models", nargs="+", default=["smollm2"])
    parser.add_argument("--tasks", nargs="*", default=[])
    parser.add_argument("--sample", type=int, default=300)
    parser.add_argument("--examples", type=int, default=640)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("-o", "--out", type=Path, required=True)
    options = parser.parse_args()
    print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores, {torch.get_num_threads()} thread(s)\n")
    for model in options.models:
        print(table(model, options), flush=True)
        print()


if __name__ == "__main__":
    main()
