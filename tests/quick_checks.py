"""Scripts for fresh Python processes, run in this one: a process needs seven seconds to import torch."""

from __future__ import annotations

import io
import re
import subprocess
import sys
from contextlib import redirect_stdout
from typing import Any

import pytest

_run = subprocess.run


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


@pytest.fixture(scope="module")
def quick_checks():
    """Written models are reopened and compared in this process, and timed for a moment.

    The check itself is tested with the models, and the times with the costs.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subprocess, "run", _run_here)
        patch.setattr("secateur.reporting.cost.LEAST_SECONDS", 0.01)
        yield
