"""How to train many depths at once, and how to go on from there: ways of the scout and of the polish, side by side.

    python benchmarks/scout.py MODEL DATA -o OUT [--rows ROW ...] [--steps 60] [--seeds 1]

MODEL is a bare language model's folder, DATA a folder of training files. From every file some rows are held out, chosen
by a hash of the anchor; each row of the table is trained on the others and scored, at every depth it has, by nDCG@10 of
finding each held-out anchor's positive among the held-out passages of its file, averaged over files. No evaluation task
is looked at. A row and seed is a file of OUT, which is skipped when it is there; --table prints what is there.

Rows ``scout-...`` are elastic trainings of all depths; ``alone-K`` are separate trainings of the first K layers;
``alone-K-both``, ``-all`` and ``-gte`` have other losses (:data:`LOSSES`); ``polish-K`` go on from the weights of the
scout ``--from`` at K layers, ``polish-K-taught`` with its full depth as teacher. Settings follow a name:
``polish-7+learning_rate=1e-4+steps=257``.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import random
import shutil
import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from scipy.stats import spearmanr
from sentence_transformers import SentenceTransformer
from torch import Tensor
from torch.nn.functional import cross_entropy

from secateur.data.sources import Pairs, read_pairs
from secateur.data.vectors import fingerprint_model
from secateur.files import read_json, write_text
from secateur.healing.losses import Loss, batch_mask, contrastive_loss, similarity_loss
from secateur.healing.recipes import RECIPES, TrainingConfig
from secateur.healing.teacher import Teacher, teach
from secateur.healing.trainer import train
from secateur.healing.training_data import training_sets
from secateur.measures.metrics import cosines, false_negative_mask, retrieval, text_numbers
from secateur.models.cutting import cut
from secateur.models.open_model import open_model
from secateur.profiling.depths import DepthEncoder

LADDER = (6, 7, 9, 12, 15, 19, 24, 30)
SHARE = 0.5
"""Weight of what a deeper exit teaches, where it does."""


class Elastic(Loss):
    """The mean over depths of the contrastive loss; the other ways are its subclasses."""

    def losses(self, columns: Sequence[Tensor]) -> list[Tensor]:
        """The loss at each depth of ``columns``, each (texts, depths, dimension)."""
        mask = batch_mask(self._keys)
        depths = range(columns[0].shape[1])
        return [contrastive_loss([c[:, d] for c in columns], mask, self.config.scale) for d in depths]

    def _loss_of(self, columns: Sequence[Tensor], labels: Tensor | None) -> Tensor:
        return self.together(self.losses(columns), columns)

    def together(self, losses: list[Tensor], columns: Sequence[Tensor]) -> Tensor:
        return torch.stack(losses).mean()


class Sampled(Elastic):
    """In each step the full depth and so many others, drawn anew (as in slimmable networks, arXiv 1903.05134)."""

    count, smallest = 2, False

    def _embed(self, features: dict[str, Any]) -> dict[str, Tensor]:
        inner = list(self._ladder[:-1])
        drawn = self._drawn.sample(inner[self.smallest :], self.count)
        self._depths = (*sorted({*drawn, *inner[: self.smallest]}), self._ladder[-1])
        return super()._embed(features)

    def forward(self, sentence_features: Any, labels: Tensor | None = None) -> Tensor:
        if not hasattr(self, "_ladder"):
            self._ladder, self._step = self._depths, 0
        self._drawn = random.Random(self._step)
        self._step += 1
        return super().forward(sentence_features, labels)


class Sandwich(Sampled):
    """The full depth, the smallest, and one other."""

    count, smallest = 1, True


class Single(Elastic):
    """One depth in each step, drawn anew, and no layer beyond it is run; the full depth in ``share`` of the steps."""

    share, steps_run = 0.25, 0

    def forward(self, sentence_features: Any, labels: Tensor | None = None) -> Tensor:
        drawn = random.Random(self.steps_run)
        self.steps_run += 1
        inner = LADDER[:-1]
        depth = LADDER[-1] if drawn.random() < self.share else drawn.choice(inner)
        transformer: Any = self._student[0][0].auto_model
        layers, self._depths = transformer.layers, ()
        transformer.layers = layers[:depth]
        try:
            loss: Tensor = super().forward(sentence_features, labels)
            return loss
        finally:
            transformer.layers = layers


class Deep(Elastic):
    """The full depth has a weight of its own; the others share the rest."""

    full = 0.5

    def together(self, losses: list[Tensor], columns: Sequence[Tensor]) -> Tensor:
        return self.full * losses[-1] + (1 - self.full) * torch.stack(losses[:-1]).mean()


class Proportional(Elastic):
    """A weight in proportion to the depth."""

    def together(self, losses: list[Tensor], columns: Sequence[Tensor]) -> Tensor:
        weights = torch.tensor([float(depth) for depth in self._depths])
        return (weights / weights.sum()) @ torch.stack(losses)


class Taught(Elastic):
    """The full depth teaches the others by its similarities within the batch; the teacher's side is detached."""

    full: float | None = None
    vectors = False
    next_deeper = False

    def together(self, losses: list[Tensor], columns: Sequence[Tensor]) -> Tensor:
        keys = torch.cat(self._keys)
        same = keys == keys[:, None]
        states = torch.cat(list(columns))  # (texts, depths, dimension)
        last = len(losses) - 1
        parts = []
        for depth, loss in enumerate(losses[:-1]):
            teacher = states[:, depth + 1 if self.next_deeper else last].detach()
            if self.vectors:
                near = 1 - torch.nn.functional.cosine_similarity(states[:, depth], teacher).mean()
            else:
                near = similarity_loss(states[:, depth], teacher, same, self.config.scale) * self.config.scale
            parts.append((1 - SHARE) * loss + SHARE * near)
        if self.full is None:
            return torch.stack([*parts, losses[-1]]).mean()
        return self.full * losses[-1] + (1 - self.full) * torch.stack(parts).mean()


class Directions(Elastic):
    """Beside the anchors' softmax over passages that of the positives over anchors; with ``among``, other anchors and
    positives are negatives of their like; with ``joint``, all are in one softmax (GTE, arXiv 2308.03281, equation 2).
    """

    among = joint = False

    def losses(self, columns: Sequence[Tensor]) -> list[Tensor]:
        anchors, positives = self._keys[:2]
        alike = (anchors == anchors[:, None]) | (positives == positives[:, None]) | (positives[:, None] == anchors)
        mask = batch_mask(self._keys)
        return [self._loss_between([c[:, d] for c in columns], mask, alike) for d in range(columns[0].shape[1])]

    def _loss_between(self, columns: Sequence[Tensor], mask: Tensor | None, alike: Tensor) -> Tensor:
        """``mask`` (rows, passages) and ``alike`` (rows, rows) are true where two are no negatives of each other."""
        anchors, positives = columns[:2]
        own = torch.arange(len(anchors))
        forth = cosines(anchors, torch.cat(list(columns[1:])))
        forth = forth if mask is None else forth.masked_fill(mask, -torch.inf)
        back = cosines(positives, anchors).masked_fill(alike & (own != own[:, None]), -torch.inf)
        anchors, positives = (cosines(c, c).masked_fill(alike, -torch.inf) for c in (anchors, positives))
        if self.joint:
            back = back.masked_fill(own == own[:, None], -torch.inf)  # it is in the softmax already
            return cross_entropy(torch.cat([forth, anchors, back, positives], dim=1) * self.config.scale, own)
        parts = [(forth, anchors), (back, positives)] if self.among else [(forth,), (back,)]
        return torch.stack([cross_entropy(torch.cat(p, dim=1) * self.config.scale, own) for p in parts]).mean()


def way(kind: type[Elastic], **numbers: Any) -> type[Elastic]:
    return type(kind.__name__, (kind,), numbers)


SCOUTS: dict[str, tuple[str, type[Elastic], tuple[int, ...]]] = {
    "scout-mean": ("mean over 8 depths", Elastic, LADDER),
    "scout-mean-4": ("mean over 4 depths", Elastic, (7, 15, 24, 30)),
    "scout-sampled": ("full depth and 2 drawn by step", Sampled, LADDER),
    "scout-sandwich": ("full depth, smallest, 1 drawn by step", Sandwich, LADDER),
    "scout-single": ("one depth drawn by step", Single, LADDER),
    "scout-deep": ("half of the weight on full depth", Deep, LADDER),
    "scout-proportional": ("weights in proportion to depth", Proportional, LADDER),
    "scout-taught": ("full depth teaches the others similarities", Taught, LADDER),
    "scout-taught-vectors": ("full depth teaches the others vectors", way(Taught, vectors=True), LADDER),
    "scout-taught-next": ("each depth teaches the next smaller one", way(Taught, next_deeper=True), LADDER),
    "scout-taught-deep": ("taught similarities, half of the weight on full depth", way(Taught, full=0.5), LADDER),
}
LOSSES = {"both": Directions, "all": way(Directions, among=True), "gte": way(Directions, joint=True)}


def main() -> None:
    args = arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    if not args.table:
        torch.set_num_threads(args.threads)
        for seed, name in itertools.product(args.seeds, args.rows):
            file = args.out / f"{name}-{seed}.json"
            if not file.is_file():
                print(time.strftime("%H:%M:%S"), file.stem, flush=True)
                write_text(file, json.dumps(run(args, name, seed), indent=1))
    print(table(args))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--rows", nargs="+", default=list(SCOUTS))
    parser.add_argument("--from", dest="scout", default="scout-mean", help="the scout that a polish goes on from")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--max-length", type=int, default=32)
    parser.add_argument("--held-out", type=int, default=60, help="rows of each file")
    parser.add_argument("--pooling", default=None)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--table", action="store_true", help="only print the table of what is there")
    return parser.parse_args()


def as_teacher(model: SentenceTransformer, config: TrainingConfig) -> Teacher:
    model.max_seq_length = config.max_length
    encode = partial(model.encode, show_progress_bar=False)
    return Teacher("scout", fingerprint_model(model), lambda texts, prompt: encode(texts, prompt=prompt or None))


def split(pairs: Pairs, count: int) -> tuple[Pairs, Pairs]:
    """Rows to train on, and rows held out, which share no anchor and no positive with them."""

    def order(row: Any) -> bytes:
        return hashlib.sha256(row.anchor.encode()).digest()

    held = sorted(pairs.rows, key=order)[:count]
    known = {text for row in held for text in (row.anchor, row.positive)}
    left = tuple(row for row in pairs.rows if known.isdisjoint((row.anchor, row.positive)))
    return replace(pairs, rows=left), replace(pairs, rows=tuple(held))


def run(args: argparse.Namespace, name: str, seed: int) -> dict[str, Any]:
    """Train and score one row."""
    row, (name, *given) = f"{name}-{seed}", name.split("+")
    settings = {key: json.loads(value) for key, value in (item.split("=") for item in given)}
    files = sorted(path for path in args.data.iterdir() if path.name.endswith((".jsonl", ".jsonl.gz")))
    parts = [split(read_pairs(file), args.held_out) for file in files]
    numbers: dict[str, Any] = {**RECIPES["finetune"], "train": "blocks", "steps": args.steps, "seed": seed}
    numbers |= {"batch_size": args.batch_size, "max_length": args.max_length} | settings
    model = open_model(args.model, device="cpu", pooling=args.pooling)
    make: Callable[..., Loss] = Elastic
    depths: tuple[int, ...] = ()
    teacher = None
    if name in SCOUTS:
        _, make, depths = SCOUTS[name]
    else:
        kind, blocks, *how = name.split("-")
        make = LOSSES[how[0]] if how and how[0] in LOSSES else make
        if kind == "polish":
            model.load_state_dict(load_file(args.out / f"{args.scout}-{seed}.safetensors"))
        if "taught" in how:
            teacher, numbers["has_teacher"] = deepcopy(model), True
        cut(model[0].auto_model, range(int(blocks)))
    config = TrainingConfig(**numbers, depths=tuple(depths))
    sets, _ = training_sets([rest for rest, _ in parts], config)
    model.prompts.update({rest.name: rest.prompt for rest, _ in parts if rest.prompt})
    started = time.perf_counter()
    if teacher is not None:
        sets, vectors = teach(sets, config, as_teacher(teacher, config), args.out / "vectors")
        make = partial(Loss, teacher=vectors)
    outcome = train(model, sets, config, args.out / f"checkpoints-{row}", make)
    seconds = time.perf_counter() - started
    if name in SCOUTS:
        save_file({k: v.contiguous() for k, v in model.state_dict().items()}, args.out / f"{row}.safetensors")
    shutil.rmtree(args.out / f"checkpoints-{row}")
    model.max_seq_length = args.max_length
    found = scores(model, [held for _, held in parts])
    wanted = depths or (len(found),)
    return {
        "steps": outcome.steps,
        "seconds": seconds,
        "losses": [(row.step, row.loss) for row in outcome.losses],
        "ndcg": {depth: found[depth - 1] for depth in wanted},
        "all": found,
    }


@torch.no_grad()
def scores(model: SentenceTransformer, held: Sequence[Pairs]) -> list[float]:
    """nDCG@10 at every depth, averaged over files."""
    model.eval()
    encoder = DepthEncoder(model)
    found = []
    for pairs in held:
        anchors = _vectors(encoder, pairs.anchors, pairs.prompt)
        passages = _vectors(encoder, [*pairs.positives, *pairs.negatives], pairs.passage_prompt)
        numbers = text_numbers(pairs.anchors, pairs.positives, pairs.negatives)
        mask = false_negative_mask(*numbers, once=True)
        similar = cosines(anchors.transpose(0, 1), passages.transpose(0, 1)).masked_fill(mask, -torch.inf)
        found.append(retrieval(similar).ndcg_at_10)
    return [float(value) for value in torch.stack(found).mean(dim=0)]


def _vectors(encoder: DepthEncoder, texts: Sequence[str], prompt: str) -> Tensor:
    """(texts, depths, dimension)."""
    rows: dict[int, Tensor] = {}
    for batch in encoder.run(list(texts), prompt):
        rows |= dict(zip(batch.rows, batch.vectors, strict=True))
    return torch.stack([rows[i] for i in range(len(texts))])


def table(args: argparse.Namespace) -> str:
    """Points of 100 by depth; over several seeds the mean ± their standard error."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for file in sorted(args.out.glob("*.json")):
        rows.setdefault(file.stem.rpartition("-")[0], []).append(read_json(file))
    depths = sorted({int(depth) for own in rows.values() for item in own for depth in item["ndcg"]})
    alone = {int(n.split("-")[1]): own for n, own in rows.items() if n.startswith("alone-") and "+" not in n}
    lines = [
        f"| row | {' | '.join(map(str, depths))} | mean | rank corr. | steps | s |",
        "|---|" + "---:|" * (len(depths) + 4),
    ]
    for name, own in rows.items():
        cells = [_cell([item["ndcg"][str(depth)] for item in own if str(depth) in item["ndcg"]]) for depth in depths]
        mean = _cell([fmean(item["ndcg"].values()) for item in own]) if len(own[0]["ndcg"]) > 1 else ""
        common = [depth for depth in alone if depth <= len(own[0]["all"])]
        corr = ""
        if name in SCOUTS and len(common) > 3:
            mine = [fmean(item["all"][d - 1] for item in own) for d in common]
            corr = f"{spearmanr(mine, [fmean(i['all'][d - 1] for i in alone[d]) for d in common]).statistic:.2f}"
        about = SCOUTS[name][0] if name in SCOUTS else name
        cells += [mean, corr, str(own[0]["steps"]), f"{fmean(item['seconds'] for item in own):.0f}"]
        lines.append(f"| {about} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(values: Sequence[float]) -> str:
    if not values:
        return ""
    spread = f" ± {100 * stdev(values) / len(values) ** 0.5:.2f}" if len(values) > 1 else ""
    return f"{100 * fmean(values):.2f}{spread}"


if __name__ == "__main__":
    main()
