"""Which layers of a trained embedder to keep, when the whole teaches them on texts alone.

    python benchmarks/embedder_layers.py MODEL TEXTS TASKS [--keep 0-2 0,3,5 ...] [--steps 200] [--scout-steps 40]

MODEL is an embedder's folder, TEXTS a file of texts to learn from, TASKS a folder of task folders. Of these only the
parts for training and development are read, never the test parts. Prints a Markdown table: for each set of layers,
trained by itself, the mean cosine with the whole model's vectors, and the share of each text's ten nearest texts that
stay, averaged over the tasks; then the same at each depth of two trainings of several depths, of evenly spaced layers
and of the first ones, which has as many more steps as its steps are cheaper.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np

import secateur
from secateur.choosing.choose import ranges
from secateur.choosing.selectors import layers_of
from secateur.models.blocks import depth_of
from secateur.progress import silent
from secateur.scouting.scout import step_cost
from token_choice import neighbours, opened, read_parts, vectors


def main() -> None:
    args = arguments()
    parts, _ = read_parts(args.tasks)
    whole = opened(args.model)
    depth = depth_of(whole[0].auto_model)
    expected = {name: vectors(whole, texts) for name, texts in parts.items()}

    def report(about: str, layers: str, steps: int, folder: Path) -> None:
        model = opened(folder)
        found = {name: vectors(model, texts) for name, texts in parts.items()}
        cosine = np.mean([(found[name] * expected[name]).sum(1).mean() for name in parts])
        same = np.mean([neighbours(found[name], expected[name]) for name in parts])
        print(f"| {about} | {layers} | {steps} | {cosine:.3f} | {same:.3f} |", flush=True)

    print("| | layers (from 0) | steps | cosine | neighbours |\n|---|---|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        settings = {"teacher": args.model, "cache": work / "vectors", "progress": silent, "seed": args.seed}
        settings |= {"batch_size": args.batch_size, "max_length": args.max_length}
        for number, keep in enumerate(args.keep):
            cut = secateur.prune(args.model, keep=keep, out=work / f"cut-{number}")
            if number == 0:
                report("not trained", keep, 0, cut)
            healed = secateur.heal(cut, args.texts, **settings, steps=args.steps, out=work / f"healed-{number}")
            report("trained alone", keep, args.steps, healed)
        rungs = range(2, depth)
        for which in ("uniform", "first"):
            steps = round(args.scout_steps * step_cost("uniform", rungs, depth) / step_cost(which, rungs, depth))
            elastic = work / which
            secateur.heal(
                args.model, args.texts, **settings, steps=steps, depths=list(rungs), layers=which, out=elastic
            )
            for rung in rungs:
                kept = layers_of(which, rung, depth)
                cut = secateur.prune(elastic, keep=kept, out=work / f"{which}-{rung}")
                report("several depths at once", ranges(kept), steps, cut)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("texts", type=Path)
    parser.add_argument("tasks", type=Path)
    parser.add_argument("--keep", nargs="+", default=["0-2", "3-5", "0,2,4", "0,1,5", "0,4,5", "0,3,5"])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--scout-steps", type=int, default=40, help="of the training of evenly spaced layers")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--max-length", type=int, default=48, help="tokens per text in training")
    parser.add_argument("--seed", type=int, default=1)
    return parser.parse_args()


if __name__ == "__main__":
    main()
