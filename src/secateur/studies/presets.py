"""Studies by name: options that are decided already. What the user gives besides them wins."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from secateur.data.demo import demo_study
from secateur.options import StudyOptions
from secateur.progress import Progress

PAPER_MODELS = (
    "meta-llama/Meta-Llama-3-8B-Instruct",
    "mistralai/Mistral-7B-Instruct-v0.2",
    "Qwen/Qwen2-7B-Instruct",
    "microsoft/Phi-3-mini-4k-instruct",
)
PAPER_SHARES = ("0.1", "0.2", "0.3", "0.4", "0.5", "0.6", "0.7", "0.8")
SHRINK: Mapping[str, Any] = {"depths": ["0.25", "0.5", "0.75"], "recipes": {"distilled": {}}, "teacher": "self"}
"""One embedder and texts of its use: three depths, each of which imitates the vectors of the whole."""

PAPER_BENCHMARK = "MTEB(eng, v1)"


def fill_in(given: StudyOptions, run: Path, progress: Progress) -> StudyOptions:
    """The options of a preset where the user left them open; without one, the options as they are.

    Raises:
        DataError: The demo's data cannot be made.
    """
    if given.preset == "demo":
        return demo_study(given, run, progress)
    if given.preset == "paper":
        return _unless_given(given, paper())
    if given.preset == "shrink":
        return _unless_given(given, SHRINK)
    return given


def paper() -> Mapping[str, Any]:
    """The experiments of L3Prune (arXiv 2410.14578, sections 4 and 5), its data left to the user.

    Four models, 10 to 80 % of their blocks removed and both of L3Prune's depths, 1,000 steps of 64 pairs, English MTEB.
    """
    return {
        "models": list(PAPER_MODELS),
        "depths": ["large", "small", *PAPER_SHARES],
        "tasks": [PAPER_BENCHMARK],
        "gradient_checkpointing": True,
    }


def _unless_given(given: StudyOptions, decided: Mapping[str, Any]) -> StudyOptions:
    return given.model_copy(update={key: value for key, value in decided.items() if key not in given.model_fields_set})
