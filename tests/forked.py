"""Processes forked from one that has imported the libraries, which takes each of them seconds of its own."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from subprocess import CompletedProcess
from types import SimpleNamespace

import pytest
import torch

from secateur.inference import workers
from secateur.studies import runner

processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(
    ["conftest", "forked", "secateur.inference.encode", "secateur.inference.serve", "secateur.studies.study"]
)
Watch = tuple[int, Path, str]
"""A signal for the process itself, and the pattern below a folder at which it comes."""


def start(
    words: Sequence[object],
    out: Path,
    err: Path,
    *,
    environment: Mapping[str, str] | None = None,
    watch: Watch | None = None,
) -> BaseProcess:
    """Start a command of secateur, in this folder; what it says goes to files."""
    for file in (out, err):
        file.touch()  # for whoever looks at once
    options = (list(map(str, words)), Path.cwd(), out, err, dict(environment or {}), watch)
    process = processes.Process(target=_command, args=options)
    process.start()
    return process


def run(
    *words: object, environment: Mapping[str, str] | None = None, watch: Watch | None = None
) -> CompletedProcess[str]:
    """As :func:`start`, until it has ended, whatever comes of it."""
    with tempfile.TemporaryDirectory() as folder:
        streams = [Path(folder, name) for name in ("out", "err")]
        process = start(words, *streams, environment=environment, watch=watch)
        process.join(300)
        has_ended = process.exitcode is not None
        process.kill()
        assert has_ended, f"secateur {words} has not ended"
        return CompletedProcess(words, process.exitcode, *(stream.read_text() for stream in streams))


def run_until(root: Path, pattern: str, *words: object) -> None:
    """Run a command, and kill it once ``pattern`` matches below ``root``."""
    done = run(*words, watch=(signal.SIGKILL, root, pattern))
    assert done.returncode == -signal.SIGKILL, f"ended with {done.returncode} before {pattern}: {done.stderr}"


def _command(
    words: list[str], folder: Path, out: Path, err: Path, environment: dict[str, str], watch: Watch | None
) -> None:
    """What the process does. Written folders are reopened in it, and the encoders that it starts are forks of it."""
    from conftest import reopen_here
    from secateur.cli import main
    from secateur.models import save

    os.chdir(folder)
    for stream, file in ((sys.stdout, out), (sys.stderr, err)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream.fileno())
    os.environ.update(environment)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    save.reopen = reopen_here
    workers.multiprocessing = _starting_by("fork")
    # Also where it is ignored, as in the background of a shell.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if watch:
        threading.Thread(target=_watch, args=watch, daemon=True).start()
    sys.argv = ["secateur", *words]
    main()


def _watch(number: int, root: Path, pattern: str) -> None:
    while not any(root.glob(pattern)):
        time.sleep(0.0005)
    os.kill(os.getpid(), number)


def _starting_by(method: str) -> SimpleNamespace:
    return SimpleNamespace(get_context=lambda _: multiprocessing.get_context(method))


@pytest.fixture
def forked_encoders(monkeypatch: pytest.MonkeyPatch) -> None:
    """Encoders in processes of their own are forked."""
    monkeypatch.setattr(workers, "multiprocessing", _starting_by("forkserver"))


@pytest.fixture
def forked_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of a study that run side by side are forked."""
    monkeypatch.setattr(runner, "run_command", _run_command)


def _run_command(
    command: Sequence[str], log: Path, folder: Path, threads: int, begun: Callable[[BaseProcess], None]
) -> None:
    assert folder == Path.cwd()
    log.parent.mkdir(parents=True, exist_ok=True)
    process = start(command[1:], log, log, environment={"OMP_NUM_THREADS": str(threads)})
    begun(process)
    process.join()
    assert process.exitcode == 0, log.read_text()
