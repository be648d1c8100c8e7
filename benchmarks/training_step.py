"""What a training step costs beside the plain way, and on a cut model beside the whole one.

    python benchmarks/training_step.py MODEL DATA [--small 7] [--batch-size 32] [--max-length 64] [--repeats 5]

MODEL is a language model's folder, DATA a folder of training files. Three ways take turns on the same batches, each
drawn from one file: ``plain`` is a loop as one writes it, in float32, every text padded to the maximum length, one
pass for each column; ``secateur`` is the step of ``secateur heal``; ``small`` the same on the model's first layers. A
step is all of it: tokens, loss, gradients, clipping, the optimizer. Prints the median over the batches of the ratios,
in seconds and in processor seconds (other work on the machine disturbs the latter less), after one batch that is not
counted.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from datasets import DatasetDict
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from torch.nn.functional import pad

from secateur.data.sources import data_files, read_pairs
from secateur.healing.losses import Loss
from secateur.healing.recipes import TrainingConfig, decide, prepare, training_arguments
from secateur.healing.trainer import Trainer
from secateur.healing.training_data import TrainingSet, training_sets
from secateur.models.cutting import cut
from secateur.models.open_model import open_model

Step = Callable[[TrainingSet], float]
"""One training step on the rows of a set; its loss."""


def main() -> None:
    args = arguments()
    config = TrainingConfig(batch_size=args.batch_size, max_length=args.max_length, train=args.train)
    sets, _ = training_sets([read_pairs(file) for file in data_files(args.data)], config)
    rng = random.Random(args.seed)
    weights = [len(item.rows) for item in sets]
    seconds: dict[str, list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        ways = {
            "plain": plain(open_part(args.model, None), config),
            "secateur": ours(open_part(args.model, None), config, sets, Path(folder)),
            "small": ours(open_part(args.model, args.small), config, sets, Path(folder)),
        }
        for batch in rng.choices(sets, weights, k=1 + args.repeats):
            rows = batch.rows.select(rng.sample(range(len(batch.rows)), args.batch_size))
            for name, step in ways.items():
                begin = time.perf_counter(), time.process_time()
                loss = step(replace(batch, rows=rows))
                took = time.perf_counter() - begin[0], time.process_time() - begin[1]
                seconds.setdefault(name, []).append(took)
                print(
                    f"{batch.name:24} {name:10} {took[0]:7.2f} s {took[1]:7.2f} processor s, loss {loss:.3f}",
                    flush=True,
                )
    precision = "bfloat16" if config.uses_bfloat16(torch.device("cpu")) else "float32"
    print(f"{args.train}, {args.batch_size} rows of at most {args.max_length} tokens, {precision}, ", end="")
    print(f"{torch.get_num_threads()} threads, median of {args.repeats} batches")
    for name, over, under in (("plain / secateur", "plain", "secateur"), ("small / full depth", "small", "secateur")):
        ratios = [
            statistics.median(a[clock] / b[clock] for a, b in list(zip(seconds[over], seconds[under], strict=True))[1:])
            for clock in (0, 1)
        ]
        print(f"{name:20} {ratios[0]:6.2f} in seconds {ratios[1]:6.2f} in processor seconds")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--train", choices=("lora", "blocks", "all"), default="lora")
    parser.add_argument("--small", type=int, default=7, help="layers of the small cut")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--max-length", type=int, default=64, help="tokens per text")
    parser.add_argument("--repeats", type=int, default=5, help="batches")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def open_part(folder: Path, blocks: int | None) -> SentenceTransformer:
    """A model, or its first layers, as ``heal`` trains it."""
    model = open_model(folder, device="cpu")
    if blocks is not None:
        cut(model[0].auto_model, range(blocks))
    return model


def plain(model: SentenceTransformer, config: TrainingConfig) -> Step:
    """Stock calls alone; what is trained, and the optimizer's numbers, are the configuration's."""
    config = decide(model, config)
    prepare(model, config)
    model.float().train()
    model.max_seq_length = config.max_length
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=config.learning_rate, weight_decay=0.0)
    loss_of = MultipleNegativesRankingLoss(model, scale=config.scale)

    def step(batch: TrainingSet) -> float:
        columns = [
            to_full_length(model, model.preprocess(list(batch.rows[name]), prompt=batch.prompts.get(name)))
            for name in batch.rows.column_names
        ]
        vectors = [model(features)["sentence_embedding"] for features in columns]
        loss = loss_of.compute_loss_from_embeddings(vectors, None)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


def to_full_length(model: SentenceTransformer, features: dict[str, Any]) -> dict[str, Any]:
    missing = model.max_seq_length - features["input_ids"].shape[1]
    fill = {"input_ids": model.tokenizer.pad_token_id}
    return {
        key: pad(value, (0, missing), value=fill.get(key, 0)) if torch.is_tensor(value) and value.ndim == 2 else value
        for key, value in features.items()
    }


def ours(model: SentenceTransformer, config: TrainingConfig, sets: Sequence[TrainingSet], folder: Path) -> Step:
    """What the trainer's own loop does with a batch, but for checkpoints and logs."""
    config = decide(model, config)
    prepare(model, config)
    model.max_seq_length = config.max_length
    trainer = Trainer(
        model=model,
        args=training_arguments(config, folder, {item.name: item.prompts for item in sets}),
        train_dataset=DatasetDict({item.name: item.rows for item in sets}),
        loss=Loss(model, config),
    )
    trainer.create_optimizer()
    trainer.model_wrapped, trainer.optimizer = trainer.accelerator.prepare(model, trainer.optimizer)
    trainer.current_gradient_accumulation_steps = 1

    def step(batch: TrainingSet) -> float:
        rows = [{"dataset_name": batch.name, **row} for row in batch.rows]
        loss = trainer.training_step(trainer.model_wrapped, trainer.data_collator(rows))
        trainer.accelerator.clip_grad_norm_(trainer.model_wrapped.parameters(), trainer.args.max_grad_norm)
        trainer.optimizer.step()
        trainer.model_wrapped.zero_grad()
        return float(loss.detach())

    return step


if __name__ == "__main__":
    main()
