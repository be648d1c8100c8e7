"""What a study leaves behind when it is killed at a given moment, without killing it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file


class Snapshots:
    """What a run folder holds at each moment at which a file or folder gets its name: what a kill there would leave.

    Moments are such as ``before costs.json`` and ``after models/tiny-1-healed``.
    """

    def __init__(self, run: Path, folder: Path, moments: Sequence[str]) -> None:
        self.run = run
        self.folder = folder
        self.wanted = moments
        self.moments: list[str] = []

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Within: they are taken."""
        with pytest.MonkeyPatch.context() as patch:
            for name in ("rename", "replace"):
                patch.setattr(os, name, self._rename(getattr(os, name)))
            yield
        assert sorted(self.moments) == sorted(self.wanted)

    def _rename(self, rename: Callable[..., None]) -> Callable[..., None]:
        def renamed(source: str, target: str, **options: object) -> None:
            path = Path(target)
            self._take(f"before {path.relative_to(self.run)}") if self.run in path.parents else None
            rename(source, target, **options)
            self._take(f"after {path.relative_to(self.run)}") if self.run in path.parents else None

        return renamed

    def _take(self, moment: str) -> None:
        if moment in self.wanted and moment not in self.moments:
            shutil.copytree(self.run, self.folder / str(len(self.moments)))
            self.moments.append(moment)

    def restored(self) -> Iterator[str]:
        """The run folder at each moment in turn; afterwards it is whole again."""
        whole = self.run.rename(self.run.with_name("whole"))
        try:
            for number, moment in enumerate(self.moments):
                shutil.copytree(self.folder / str(number), self.run)
                yield moment
                shutil.rmtree(self.run)
        finally:
            shutil.rmtree(self.run, ignore_errors=True)
            whole.rename(self.run)


def assert_each_step_was_done_once(run: Path) -> None:
    """By the journal: every step of the plan was begun, and never again after it was done."""
    entries = [json.loads(line) for line in (run / "steps.jsonl").read_text().splitlines()]
    done: list[str] = []
    for entry in entries:
        assert entry["step"] not in done, f"{entry} after it was done"
        done += [entry["step"]] if entry["outcome"] == "done" else []
    steps = json.loads((run / "plan.json").read_text())["steps"]
    assert {entry["step"] for entry in entries} == {step["name"] for step in steps}


def assert_same_weights(one: Path, other: Path, what: str = "") -> None:
    """Of two model folders, bit for bit."""
    first, second = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert all(torch.equal(first[key], second[key]) for key in first.keys() | second.keys()), what
