"""Types and sentences that the options of several commands share."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator

SavedPooling = Literal["weighted_mean", "mean", "lasttoken", "cls"]
"""Poolings that a saved folder can have: sentence-transformers' own."""
PoolingName = Literal["weighted_mean", "mean", "lasttoken", "cls", "l3prune"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]


def _check_dtype(name: str) -> str:
    if not re.fullmatch(r"auto|float32|bfloat16|float16|mixed(:\d+x\d+(,\d+x\d+)*)?", name):
        raise ValueError("one of auto, float32, mixed, bfloat16, float16; or such as mixed:8x30,24x12")
    return name


Arithmetic = Annotated[str, AfterValidator(_check_dtype)]

MODEL = "A Hub id, a model folder, a .gguf file, or smollm2."
PROFILE_FILES = (
    *("profile.json", "choice.json"),
    *(f"{name}.{kind}" for name in ("curve", "cka", "angles", "solved") for kind in ("png", "svg")),
)
STUDY_FILES = (
    *("study.yaml", "plan.json", "steps.jsonl", "table.csv", "costs.json", "report.html", "report.md"),
    *("data", "tasks", "models", "profiles", "pruned", "scores", "figures", "cache", "logs", "done"),
)
COLUMNS = (
    "What the data call these columns, where otherwise: query=question,positive=answer,negative=wrong, or text=body."
)
DATA = (
    "Files of query (or anchor), positive and optional negative: .jsonl, .jsonl.gz, .csv or .parquet; folders of them; "
    "or data sets of the Hub: hf:NAME:CONFIG[SPLIT]."
)
TEXTS = " Or of texts alone: .txt, or .jsonl with text."
INSTRUCTION = "Goes before each query, in place of the one that comes with the data."
POOLING = "How a bare language model pools its tokens [default: weighted_mean, or mean where attention goes both ways]."
LENGTH = "Tokens after which a text is cut, for a bare language model."
TRUST = "Run the model code that a repository brings along."
CACHE = "Folder that keeps vectors, so that no text is encoded twice by the same model."
ARITHMETIC = (
    "In what the model multiplies: float32; bfloat16 or float16; mixed: linear layers multiply in bfloat16, the rest "
    "is float32; auto: the fastest that keeps a cosine of 0.9999 to float32, measured on the machine and your texts."
)
BATCH = "Tokens in a batch, padding included [default: 1,024 on a CPU, 8,192 on a GPU]."
DEVICE = "Torch device [default: the GPU where there is one]."
