"""Commands that are killed or interrupted at the moment at which a file appears."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path
from subprocess import CompletedProcess

processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["secateur.healing.heal", "secateur.inference.encode", "secateur.studies.runner"])
"""Each command has a process of its own, forked from one that has imported the libraries, which takes it seconds."""


def run_until(root: Path, pattern: str, *arguments: object) -> None:
    """Run ``secateur`` with these arguments, and kill it once ``pattern`` matches below ``root``."""
    done = signalled(signal.SIGKILL, root, pattern, *arguments)
    assert done.returncode == -signal.SIGKILL, f"ended with {done.returncode} before {pattern}: {done.stderr}"


def signalled(number: int, root: Path, pattern: str, *arguments: object) -> CompletedProcess[str]:
    """As :func:`run_until`, with any signal, whatever comes of it."""
    words = [str(word) for word in arguments]
    with tempfile.TemporaryDirectory() as folder:
        streams = [Path(folder, name) for name in ("out", "err")]
        process = processes.Process(target=_command, args=(words, int(number), root, pattern, *streams))
        process.start()
        process.join(300)
        has_ended = process.exitcode is not None
        process.kill()
        assert has_ended, f"secateur {words} has not ended"
        return CompletedProcess(words, process.exitcode, *(stream.read_text() for stream in streams))


def _command(words: list[str], number: int, root: Path, pattern: str, out: Path, err: Path) -> None:
    """What the process does."""
    for stream, file in ((sys.stdout, out), (sys.stderr, err)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), stream.fileno())
    # Also where it is ignored, as in the background of a shell.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Thread(target=_watch, args=(root, pattern, number), daemon=True).start()
    sys.argv = ["secateur", *words]
    from secateur.cli import main

    main()


def _watch(root: Path, pattern: str, number: int) -> None:
    while not any(root.glob(pattern)):
        time.sleep(0.0005)
    os.kill(os.getpid(), number)
