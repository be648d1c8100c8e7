"""Commands that are killed or interrupted at the moment at which a file appears, or after some time."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

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


_LATER = """
import os, signal, sys, threading, time

def watch(seconds):
    while "secateur.studies.study" not in sys.modules:
        time.sleep(0.001)
    time.sleep(float(seconds))
    os.killpg(0, signal.SIGKILL)

threading.Thread(target=watch, args=sys.argv[1:2], daemon=True).start()
sys.argv = ["secateur", *sys.argv[2:]]
from secateur.cli import main
main()
"""


def run_for(seconds: float, *arguments: object) -> bool:
    """Run a study, and kill its process group so many seconds after its modules are there; whether that came first."""
    command = [sys.executable, "-c", _LATER, seconds, *arguments]
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, timeout=900, start_new_session=True
    )
    assert done.returncode in (0, -signal.SIGKILL), done.stderr
    return done.returncode != 0


def run_until(root: Path, pattern: str, *arguments: object) -> None:
    """Run ``secateur`` with these arguments, and kill it once ``pattern`` matches below ``root``."""
    done = signalled(signal.SIGKILL, root, pattern, *arguments)
    assert done.returncode == -signal.SIGKILL, f"ended with {done.returncode} before {pattern}: {done.stderr}"


def signalled(number: int, root: Path, pattern: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """As :func:`run_until`, with any signal, whatever comes of it."""
    command = [sys.executable, "-c", _SCRIPT, root, pattern, int(number), *arguments]
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=300)
