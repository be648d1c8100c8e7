"""Other processes: a Ray cluster, and commands of secateur. No PyTorch is imported here, for Ray's own processes."""

from __future__ import annotations

import math
import os
import shlex
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from secateur.errors import ConfigError, MissingPackage, StepFailed


@contextmanager
def ray_cluster(address: str) -> Iterator[Any]:
    """Be connected to a Ray cluster; gives the ``ray`` module.

    Args:
        address: ``auto`` for the cluster that this machine belongs to, ``ray://host:10001``, or ``local`` for a new one
            on this machine alone. A process that is connected already stays so.

    Raises:
        MissingPackage: Ray is not installed.
        ConfigError: There is no cluster at that address.
    """
    try:
        import ray  # type: ignore[import-not-found,import-untyped,unused-ignore]
    except ImportError:
        raise MissingPackage("ray", "--ray", "pip install 'secateur[ray]'") from None
    ours, dashboard = not ray.is_initialized(), False if address == "local" else None
    try:
        if ours:
            place = urlsplit(address if "://" in address else f"//{address}")
            if place.port:  # Ray tries for many minutes to reach one where nothing listens
                socket.create_connection((place.hostname, place.port), 10).close()
            ray.init(address=address, include_dashboard=dashboard, log_to_driver=False, logging_level="ERROR")
    except (OSError, RuntimeError, ValueError) as error:
        first = (str(error).splitlines() or [""])[0]
        raise ConfigError("ray", address, f"no Ray cluster at {address} ({first:.200})") from None
    try:
        yield ray
    finally:
        if ours:
            ray.shutdown()  # type: ignore[no-untyped-call,unused-ignore]


def ray_share(ray: Any, count: int) -> tuple[int, float]:
    """Cores and GPUs that each of so many tasks or actors may ask for, so that all of them run at once.

    Ray hides the GPUs from a task that asks for none. Says so, on stderr, where the cluster has none.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) >= 1]
    cores = min((int(node["CPU"]) for node in nodes), default=1) // math.ceil(count / max(1, len(nodes)))
    gpus = int(ray.cluster_resources().get("GPU", 0))
    if not gpus:
        sys.stderr.write("the Ray cluster has no GPU: what runs on it runs on CPUs\n")
    # A share of a GPU must fit on one: three tasks on two GPUs ask for half of one each.
    return max(1, cores), 1 / math.ceil(count / gpus) if gpus else 0.0


def fresh_python(script: str, *arguments: str) -> list[str]:
    """The command that runs a script in a fresh Python, where no file of the current folder hides a library."""
    return [sys.executable, "-c", f"import sys; sys.path[:] = filter(None, sys.path)\n{script}", *arguments]


# The thread ends the process when the one that started it is gone, however that went.
_SCRIPT = """
import os, sys, threading
def watch():
    while os.read(0, 1):
        pass
    os._exit(1)
threading.Thread(target=watch, daemon=True).start()
sys.argv[0] = "secateur"
from secateur.cli import main
main()
"""


def run_command(
    command: Sequence[str],
    log: Path,
    folder: Path,
    threads: int,
    begun: Callable[[subprocess.Popen[bytes]], None] = lambda _: None,  # a task on a Ray cluster needs none
) -> None:
    """Run a command of secateur in a process of its own, which ends when this one does.

    Args:
        command: Its words; the first is ``secateur``.
        log: Where its output goes.
        folder: To run it in.
        threads: For its arithmetic.
        begun: Is given the process.

    Raises:
        StepFailed: It ended with an error.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as stream:
        stream.write(f"$ {shlex.join(command)}\n".encode())
        stream.flush()
        with (
            subprocess.Popen(  # noqa: S603 - this package's own command
                fresh_python(_SCRIPT, *command[1:]),
                cwd=folder,
                env=os.environ | {"OMP_NUM_THREADS": str(threads)},
                stdin=subprocess.PIPE,
                stdout=stream,
                stderr=subprocess.STDOUT,
            ) as process
        ):
            begun(process)
            code = process.wait()
    if code < 0:
        raise StepFailed(f"was ended by signal {-code}" + (", for want of memory perhaps" if code == -9 else ""))
    if code:
        said = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines()[1:] if line.strip()]
        raise StepFailed(said[-1].removeprefix("secateur: ") if said else f"ended with code {code}")
