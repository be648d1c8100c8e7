"""Scripts for fresh Python processes, run in this one: a process needs seven seconds to import torch."""

from __future__ import annotations

import io
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any

import pytest
from matplotlib.figure import Figure

from secateur import figures
from secateur.reporting import cost

_run, _rendered = subprocess.run, figures.rendered


def _run_here(command: Any, **options: Any) -> subprocess.CompletedProcess[str]:
    if not isinstance(command, list) or command[:2] != [sys.executable, "-c"]:
        return _run(command, **options)
    said, before = io.StringIO(), sys.argv
    sys.argv = ["-c", *command[3:]]
    try:
        with redirect_stdout(said):
            # The script makes sure that this package is not imported where it runs.
            exec(re.sub("^assert .*$", "", command[2], flags=re.MULTILINE), {"__name__": "__main__"})
    except Exception as error:
        return subprocess.CompletedProcess(command, 1, said.getvalue(), f"{type(error).__name__}: {error}")
    finally:
        sys.argv = before
    return subprocess.CompletedProcess(command, 0, said.getvalue(), "")


def check_quickly(patch: pytest.MonkeyPatch) -> None:
    """Have written models be reopened and compared in this process, and timed for a moment.

    The check itself is tested with the models, and the times with the costs.
    """
    patch.setattr(subprocess, "run", _run_here)
    patch.setattr(cost, "LEAST_SECONDS", 0.01)
    patch.setattr(cost, "THOROUGH", cost.QUICK._replace(latencies=10))


@pytest.fixture(scope="module")
def quick_checks() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        check_quickly(patch)
        yield


def _draw_nothing(figure: Figure, kind: str = "png") -> bytes:
    return _rendered(Figure(figsize=(1, 1)), kind)


@contextmanager
def quick_figures() -> Iterator[None]:
    """Within: figures are empty. Drawing those of a report takes longer than resuming its study.

    What they show is tested with the figures and the report.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "rendered", _draw_nothing)
        patch.setattr(figures, "_label_points", lambda *_: None)
        yield
