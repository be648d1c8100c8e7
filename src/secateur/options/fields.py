"""Types of options, and the options that several commands share, each with its description."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from secateur.options.base import Names, argument

SavedPooling = Literal["weighted_mean", "mean", "lasttoken", "cls"]
"""Poolings that a saved folder can have: sentence-transformers' own."""
PoolingName = Literal["weighted_mean", "mean", "lasttoken", "cls", "l3prune"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]


PROFILE_FILES = (
    *("profile.json", "choice.json"),
    *(f"{name}.{kind}" for name in ("curve", "cka", "angles", "solved") for kind in ("png", "svg")),
)
SCOUT_FILES = (
    *("scout.json", "model", "model.partial", "tasks", "tasks.partial", "draws", "cache", "done.json"),
    *("choice.json", "frontier.png", "frontier.svg"),
)
STUDY_FILES = (
    *("study.yaml", "plan.json", "steps.jsonl", "table.csv", "costs.json", "report.html", "report.md"),
    *("data", "tasks", "models", "profiles", "scouts", "pruned", "scores", "figures", "cache", "logs", "done"),
)


def name_or_object(value: Any) -> Any:
    """A path becomes text; an object (an opened model, a task, a table) stays as it is; numbers are refused."""
    if value is None or isinstance(value, (int, float, list, dict, tuple)):
        raise ValueError("a name or a path is expected")
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def path_text(value: Any) -> Any:
    """A path becomes text."""
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def texts(value: Any) -> Any:
    """Numbers and paths in a list become texts."""
    items = listed(value)
    return [str(item) for item in items] if isinstance(items, list) else items


def listed(value: Any) -> Any:
    """One name stands for a list of one."""
    if isinstance(value, (str, os.PathLike)):
        return [value]
    return list(value) if isinstance(value, (tuple, set)) else value


def comma_separated(value: Any) -> Any:
    """``6,12`` becomes a list."""
    items = value if isinstance(value, (list, tuple)) else [value]
    return None if value is None else [part for item in items for part in str(item).split(",")]


def _columns(given: Any) -> Any:
    """``query=question,positive=answer`` becomes a mapping."""
    if not given or not isinstance(given, (str, list)):
        return given or None
    words = [word for item in ([given] if isinstance(given, str) else given) for word in str(item).split(",")]
    pairs = [word.partition("=") for word in words]
    for word, (role, _, column) in zip(words, pairs, strict=True):
        if not role.strip() or not column.strip():
            raise ValueError(f"{word!r} is not of the form query=question")
    return {role.strip(): column.strip() for role, _, column in pairs}


AnyName = Annotated[Any, BeforeValidator(name_or_object)]
ModelName = Annotated[AnyName, Names("model")]
Data = Annotated[list[Path], BeforeValidator(listed), Names("data")]
Models = Annotated[list[AnyName], BeforeValidator(listed), Names("model")]
Tasks = Annotated[list[AnyName], BeforeValidator(listed), Names("task")]
Files = Annotated[list[Path], BeforeValidator(listed), Names("file")]
Seed = Annotated[int, Field(ge=0, lt=1 << 32)]
"""The range that numpy takes."""

MODEL = "A Hub id, a model folder, a .gguf file, or smollm2."
ENDPOINT = "a server with the OpenAI embeddings API: https://host/v1#model-name."
OTHERS = (
    MODEL
    + " Or something that can be compared, but not cut: a static embedding (model2vec), a folder that export wrote, or "
) + ENDPOINT
DATA = (
    "Files of query (or anchor), positive and optional negative: .jsonl, .csv, .tsv (also .gz) or .parquet; folders of "
    "them; or data sets of the Hub: hf:NAME:CONFIG[SPLIT]."
)
TEXTS = " Or of texts alone: .txt, or .jsonl with text."
POOLING = "How a bare language model pools its tokens [default: weighted_mean, or mean with bidirectional attention]."

Model = Annotated[ModelName, argument(MODEL)]
Columns = Annotated[
    dict[str, str] | None,
    BeforeValidator(_columns),
    Field(
        description="Your column names, where they differ: query=question,positive=answer,negative=wrong, or text=body."
    ),
]
Instruction = Annotated[
    str | None, Field(description="Instruction before each query, instead of the one that comes with the data.")
]
Pooling = Annotated[SavedPooling | None, Field(description=POOLING)]
MaxLength = Annotated[int, Field(ge=1, description="Tokens after which a text is cut, for a bare language model.")]
Backend = Annotated[
    Literal["auto", "torch", "onnx", "openvino"],
    Field(
        description="What runs the model on a CPU: PyTorch, ONNX Runtime or OpenVINO (for these it is converted once, "
        "into its own folder); auto: the fastest of those installed that keeps --min-cosine, or PyTorch if it finishes "
        "before a conversion would. A GPU always uses PyTorch."
    ),
]
Arithmetic = Annotated[
    Literal["auto", "float32", "bfloat16", "float16", "int8", "mixed", "stored"],
    Field(
        description="Data type of the matrix products: float32; bfloat16; float16; int8 (not in PyTorch); mixed: in "
        "PyTorch, linear layers in bfloat16 and the rest in float32; stored: PyTorch, as the weights are; auto: the "
        "fastest that keeps --min-cosine."
    ),
]
MinCosine = Annotated[
    float,
    Field(
        ge=-1,
        le=1,
        description="Lowest cosine to PyTorch's float32 vectors that auto accepts, measured on some of your texts; "
        "0.98 allows int8.",
    ),
]
BatchTokens = Annotated[
    int | None,
    Field(ge=1, description="Tokens in a batch, padding included [default: 1,024 on a CPU, 8,192 on a GPU]."),
]
ModelNames = Annotated[
    list[str] | None, Field(description="What to call the models [default: the last part of their paths].")
]
Sample = Annotated[
    int | None,
    Field(ge=1, description="Use at most this many rows of each task, sampled by the seed, the same for all models."),
]
SampleSeed = Annotated[Seed, Field(description="Random seed of the sample.")]
HeldOut = Annotated[
    int,
    Field(
        ge=10,
        description="Without tasks: number of rows of the data that score the depths and are not trained on; at most "
        "a tenth of each file.",
    ),
]
Cache = Annotated[
    Path | None, Field(description="Folder that keeps vectors, so that no text is encoded twice by the same model.")
]
Jobs = Annotated[
    int, Field(ge=1, description="Number of steps that run at the same time, each in a process of its own.")
]
Ray = Annotated[
    str | None,
    Field(description="Run the steps on a Ray cluster: its address, auto for this machine's, local for a new one."),
]
Device = Annotated[str | None, Field(description="Torch device [default: the GPU where there is one].")]
TrustRemoteCode = Annotated[bool, Field(description="Run the model code that a repository contains.")]
