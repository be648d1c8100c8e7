"""Commands that are killed or interrupted at the moment at which a file appears."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from subprocess import CompletedProcess, run  # also where a test has another one (quick_checks)

_SCRIPT = """
import os, signal, sys, threading, time
from pathlib import Path

def watch(root, pattern, number):
    while not any(Path(root).glob(pattern)):
        time.sleep(0.0005)
    os.kill(os.getpid(), int(number))

signal.signal(signal.SIGINT, signal.default_int_handler)  # also where it is ignored, as in the background of a shell
threading.Thread(target=watch, args=sys.argv[1:4], daemon=True).start()
sys.argv = ["secateur", *sys.argv[4:]]
from secateur.cli import main
main()
"""


def run_until(root: Path, pattern: str, *arguments: object) -> None:
    """Run ``secateur`` with these arguments, and kill it once ``pattern`` matches below ``root``."""
    done = signalled(signal.SIGKILL, root, pattern, *arguments)
    assert done.returncode == -signal.SIGKILL, f"ended with {done.returncode} before {pattern}: {done.stderr}"


def signalled(number: int, root: Path, pattern: str, *arguments: object) -> CompletedProcess[str]:
    """As :func:`run_until`, with any signal, whatever comes of it."""
    command = [sys.executable, "-c", _SCRIPT, root, pattern, int(number), *arguments]
    return run([str(word) for word in command], capture_output=True, text=True, timeout=300)
