"""Commands that are killed, with SIGKILL, at the moment at which a file appears, or after some time."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

_SCRIPT = """
import os, signal, sys, threading, time
from pathlib import Path

def watch(root, pattern):
    while not any(Path(root).glob(pattern)):
        time.sleep(0.0005)
    os.kill(os.getpid(), signal.SIGKILL)

threading.Thread(target=watch, args=sys.argv[1:3], daemon=True).start()
sys.argv = ["secateur", *sys.argv[3:]]
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
    command = [sys.executable, "-c", _SCRIPT, root, pattern, *arguments]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=300)
    assert done.returncode == -signal.SIGKILL, f"ended with {done.returncode} before {pattern}: {done.stderr}"
