"""Runs the steps of a plan: one after another in this process, in processes side by side, or on a Ray cluster.

What a step makes is there whole or not at all, so that what is there is done. The journal, ``RUN/steps.jsonl``, has a
line for each start and each end of a step; it is locked while a study runs, so that no two work in one folder. A step
that fails leaves ``RUN/logs/<step>.log``; whatever does not need it goes on.
"""

from __future__ import annotations

import fcntl
import json
import os
import shlex
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import IO, Any

from secateur.clusters import ray_cluster
from secateur.errors import OutputError, SecateurError, StepFailed
from secateur.evaluation.evaluate import evaluate
from secateur.files import output_error
from secateur.healing.heal import heal
from secateur.profiling.profile import profile
from secateur.progress import Progress, silent
from secateur.provenance import acting_as
from secateur.pruning.prune import prune
from secateur.reporting.cost import cost
from secateur.reporting.run import JOURNAL, complete_lines
from secateur.reporting.run import read_journal as read_journal
from secateur.studies.estimate import corrected
from secateur.studies.plan import Plan, Step, blocked

LOGS = "logs"
LOCK_SECONDS = 10.0
"""How long a study waits for the steps of one that was just killed to end as well."""

_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "prune": prune,
    "profile": profile,
    "heal": heal,
    "evaluate": evaluate,
    "cost": cost,
}


@dataclass(frozen=True)
class State:
    """How far a study is. ``seconds`` are those of the finished steps, ``failed`` says why, ``running`` since when."""

    plan: Plan
    done: frozenset[str]
    running: Mapping[str, float]
    failed: Mapping[str, str]
    seconds: Mapping[str, float]

    @property
    def expected(self) -> dict[str, float | None]:
        """Step → the seconds that it took, or will take, about; None where nobody knows."""
        told = {step.name: step.seconds for step in self.plan.steps}
        taken = {name: seconds for name, seconds in self.seconds.items() if name in told}
        return corrected(told, {step.name: step.kind for step in self.plan.steps}, taken)

    @property
    def seconds_left(self) -> float:
        """Estimated work of the steps that are left and can be done, one after another."""
        now, expected = time.monotonic(), self.expected
        spent = {name: now - since for name, since in self.running.items()}
        left = [step.name for step in self.plan.steps if self.of(step) in ("waiting", "running")]
        return sum(max(0.0, (expected[name] or 0.0) - spent.get(name, 0.0)) for name in left)

    def of(self, step: Step) -> str:
        """``done``, ``running``, ``failed``, ``blocked`` (by one that failed) or ``waiting``."""
        for name, steps in (("done", self.done), ("running", self.running), ("failed", self.failed)):
            if step.name in steps:
                return name
        return "blocked" if step.name in blocked(self.plan, self.failed) else "waiting"


Watch = Callable[[State], None]
Execute = Callable[[Step, Path], None]


@dataclass(frozen=True)
class Executor:
    """How steps are run: ``slots`` of them at once; ``run`` does one, given where its log goes, and raises."""

    slots: int
    run: Execute
    close: Callable[[], None] = field(default=lambda: None)

    def submit(self, pool: ThreadPoolExecutor | None, step: Step, log: Path) -> Future[None]:
        """Begin a step; without a pool, do it."""
        if pool is not None:
            return pool.submit(self.run, step, log)
        future: Future[None] = Future()
        try:
            self.run(step, log)
            future.set_result(None)
        except Exception as error:  # of whatever kind: it is the step that fails, not the study
            future.set_exception(error)
        return future


@dataclass
class Journal:
    """``steps.jsonl``: what was begun and how it ended, one JSON object a line."""

    file: Path
    stream: IO[bytes]

    @classmethod
    @contextmanager
    def open(cls, run: Path) -> Iterator[Journal]:
        """Lock and open the journal of a run folder.

        Raises:
            OutputError: Another study works in the folder, or it cannot be written.
        """
        file = run / JOURNAL
        try:
            stream = file.open("ab+")
        except OSError as error:
            raise output_error(file, error) from error
        with stream:
            _lock(stream, run)
            _cut_torn_line(stream)
            yield cls(file, stream)

    def write(self, **entry: Any) -> None:
        """Add a line, on disk before this returns."""
        try:
            self.stream.write(json.dumps(entry, ensure_ascii=False).encode() + b"\n")
            self.stream.flush()
            os.fsync(self.stream.fileno())
        except OSError as error:
            raise output_error(self.file, error) from error


def _lock(stream: IO[bytes], run: Path) -> None:
    """Keep other studies out of a run folder. Where the disk knows no locks (some network disks), there is none."""
    until = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > until:
                raise OutputError(run, "another study is at work there", "wait for it, or stop it") from None
            time.sleep(0.1)
        except OSError:
            return


def _cut_torn_line(stream: IO[bytes]) -> None:
    """Remove what a killed process left of a line."""
    stream.seek(0)
    stream.truncate(len(complete_lines(stream.read())))


def is_locked(run: Path) -> bool:
    """Whether a study is at work in a run folder."""
    try:
        with (run / JOURNAL).open("rb") as stream:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    except OSError:  # a disk that knows no locks does not tell
        return False
    return False


def taken_seconds(entries: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Finished step → how long it took, of the last time."""
    return {entry["step"]: entry["seconds"] for entry in entries if entry["outcome"] == "done" and entry["seconds"]}


def run_steps(
    replan: Callable[[Sequence[str]], Plan],
    is_done: Callable[[Step], bool],
    executor: Executor,
    run: Path,
    journal: Journal,
    watch: Watch,
) -> dict[str, str]:
    """Run what is not done, each step once the steps that it needs are done.

    Args:
        replan: Gives the plan, told the steps that failed; asked again after each step, for profiles add to it.
        is_done: Whether what a step makes is there.
        executor: Runs one.
        run: The run folder, for the logs.
        journal: Told of every start and end.
        watch: Told of every change.

    Returns:
        Failed step → why.

    Raises:
        OutputError: The disk is full, or the run folder cannot be written.
        DataError: The journal is broken.
    """
    entries = read_journal(run)
    open_ends = {entry["step"]: entry for entry in entries}
    open_ends = {name: entry for name, entry in open_ends.items() if entry["outcome"] == "started"}
    board = _Board(run, journal, watch, taken_seconds(entries), open_ends)
    pool = ThreadPoolExecutor(executor.slots) if executor.slots > 1 else None
    futures: dict[Future[None], str] = {}
    try:
        while True:
            board.look(replan(list(board.failed)), is_done)
            for step in board.ready(executor.slots - len(futures)):
                board.begin(step)
                futures[executor.submit(pool, step, board.log(step))] = step.name
            if not futures:
                return board.failed
            finished, _ = wait(futures, return_when=FIRST_COMPLETED)
            for future in finished:
                board.end(futures.pop(future), future.exception())
    finally:
        executor.close()
        if pool is not None:
            pool.shutdown(cancel_futures=True)


@dataclass
class _Board:
    """What is done, what runs and what failed, while a plan is run."""

    run: Path
    journal: Journal
    watch: Watch
    seconds: dict[str, float]
    open_ends: dict[str, dict[str, Any]]
    plan: Plan = field(default_factory=lambda: Plan((), ()))
    done: set[str] = field(default_factory=set)
    running: dict[str, float] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    begun: dict[str, str] = field(default_factory=dict)

    def look(self, plan: Plan, is_done: Callable[[Step], bool]) -> None:
        """Take up a plan, and see what of it is there already."""
        known = {step.name for step in self.plan.steps if step.known}
        self.plan = plan
        self.failed |= plan.failed
        for step in plan.steps:
            # What is timed together must be looked at again: the models may have changed since.
            if step.known and (step.name not in known or step.alone) and step.name not in self.failed:
                (self.done.add if is_done(step) else self.done.discard)(step.name)
            if step.name in self.done and step.name in self.open_ends:
                # Killed after the result had its name, before the journal had its line.
                self.journal.write(
                    **self.open_ends.pop(step.name) | {"outcome": "done", "ended": _now(), "seconds": None}
                )
        self.tell()

    def ready(self, free: int) -> list[Step]:
        """Steps to begin now, at most ``free``."""
        over = self.done | self.failed.keys() | self.running.keys()
        able = [s for s in self.plan.steps if s.known and s.name not in over and self.done.issuperset(s.needs)]
        together = [step for step in able if not step.alone]
        if any(step.alone for step in self.plan.steps if step.name in self.running):
            return []
        return together[:free] if together else able[:1] if not self.running else []

    def begin(self, step: Step) -> None:
        self.begun[step.name] = _now()
        self.open_ends.pop(step.name, None)
        self.running[step.name] = time.monotonic()
        entry = {"step": step.name, "outcome": "started", "started": self.begun[step.name]}
        self.journal.write(**entry, command=step.command_line)
        self.tell()

    def end(self, name: str, error: BaseException | None) -> None:
        seconds = time.monotonic() - self.running.pop(name)
        step = next(step for step in self.plan.steps if step.name == name)
        entry: dict[str, Any] = {
            "step": name,
            "outcome": "failed" if error else "done",
            "started": self.begun[name],
            "ended": _now(),
        }
        entry |= {"seconds": round(seconds, 3), "command": step.command_line}
        if error is None:
            self.done.add(name)
            self.seconds[name] = seconds
            self.journal.write(**entry)
        else:
            self.failed[name] = " ".join(_reason(error).split())
            self.journal.write(**entry, error=self.failed[name], log=str(self.log(step)))
        self.tell()
        if isinstance(error, OutputError) and error.concerns_all:
            raise error  # nothing else can be written either

    def log(self, step: Step) -> Path:
        """Where a step's output goes."""
        return self.run / LOGS / f"{step.name.replace(' ', '-')}.log"

    def tell(self) -> None:
        state = State(self.plan, frozenset(self.done), dict(self.running), dict(self.failed), dict(self.seconds))
        self.watch(state)


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")


def _reason(error: BaseException) -> str:
    return str(error) if isinstance(error, (SecateurError, OSError)) else f"{type(error).__name__}: {error}"


def in_this_process(progress: Progress = silent) -> Executor:
    """One step after another, here: what the libraries need to start is paid once."""

    def run(step: Step, log: Path) -> None:
        def named(_: str, done: int, total: int) -> None:
            progress(step.name, done, total)

        try:
            with acting_as(step.command_line):
                _FUNCTIONS[step.kind](**step.options, progress=named)
        except Exception:
            _write_log(log, f"$ {step.command_line}\n{traceback.format_exc()}")
            raise

    return Executor(1, run)


def _write_log(log: Path, text: str) -> None:
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text(text, encoding="utf-8")
    except OSError:  # the disk is full, perhaps: the step's own error says more
        return


def in_processes(jobs: int) -> Executor:
    """Each step a process of its own, ``jobs`` at once, which share the processor's cores.

    A step that takes its process with it, for want of memory, fails alone. All end when this process does.
    """
    threads = max(1, cores() // jobs)
    processes: set[subprocess.Popen[bytes]] = set()

    def run(step: Step, log: Path) -> None:
        run_command(step.command, log, Path.cwd(), threads, processes)

    def close() -> None:
        for process in list(processes):
            process.kill()

    return Executor(jobs, run, close)


def on_ray(address: str, jobs: int) -> Executor:
    """Each step a task of a Ray cluster.

    Every node needs secateur at the same version, and the working folder, the data and the run folder under the same
    paths (a shared file system).

    Args:
        address: As for :func:`.ray_cluster`, and so with its errors.
        jobs: Steps at once; 1: as many as the cluster has cores, with one core each.
    """
    connection = ExitStack()
    ray = connection.enter_context(ray_cluster(address))
    available = int(ray.cluster_resources().get("CPU", 1))
    threads = max(1, available // jobs) if jobs > 1 else 1
    slots = min(jobs, available) if jobs > 1 else available
    task = ray.remote(num_cpus=threads)(run_command)

    def run(step: Step, log: Path) -> None:
        try:
            ray.get(task.remote(step.command, log.absolute(), Path.cwd(), threads))
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None

    return Executor(slots, run, connection.close)


def cores() -> int:
    """Threads that a study may use: ``OMP_NUM_THREADS``, or the cores that this process may run on."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    if given.isdigit() and int(given):
        return int(given)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# The watcher ends the process when the one that started it is gone, however that went.
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
    processes: set[subprocess.Popen[bytes]] | None = None,
) -> None:
    """Run a command of secateur in a process of its own, which ends when this one does.

    Args:
        command: Its words; the first is ``secateur``.
        log: Where its output goes.
        folder: To run it in.
        threads: For its arithmetic.
        processes: It is a member of while it runs.

    Raises:
        StepFailed: It ended with an error.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    with log.open("wb") as stream:
        stream.write(f"$ {shlex.join(command)}\n".encode())
        stream.flush()
        process = subprocess.Popen(  # noqa: S603 - this package's own command
            [sys.executable, "-c", _SCRIPT, *command[1:]],
            cwd=folder,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=stream,
            stderr=subprocess.STDOUT,
        )
        members = processes if processes is not None else set()
        members.add(process)
        with process:
            process.wait()
        members.discard(process)
    if process.returncode:
        raise StepFailed(_last_line(log, process.returncode))


def _last_line(log: Path, code: int) -> str:
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines()[1:] if line.strip()]
    if code < 0:
        return f"was ended by signal {-code}" + (", for want of memory perhaps" if code == -9 else "")
    return lines[-1].removeprefix("secateur: ") if lines else f"ended with code {code}"
