"""Runs the steps of a plan: one after another in this process, in processes side by side, or on a Ray cluster.

The journal, ``RUN/steps.jsonl``, has a line for each start and each end of a step. A step that fails leaves
``RUN/logs/<step>.log``; whatever does not depend on it goes on.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
import traceback
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from secateur.clusters import ray_cluster, ray_share, run_command
from secateur.errors import OutputError, SecateurError
from secateur.evaluation.evaluate import evaluate
from secateur.files import output_errors
from secateur.healing.heal import heal
from secateur.profiling.profile import profile
from secateur.progress import Progress
from secateur.provenance import acting_as
from secateur.pruning.prune import prune
from secateur.reporting.cost import cost
from secateur.reporting.run import JOURNAL, read_journal
from secateur.scouting.scout import scout
from secateur.studies import records
from secateur.studies.steps import Plan, Step

LOGS = "logs"
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    function.__name__: function for function in (prune, profile, heal, scout, evaluate, cost)
}


@dataclass(frozen=True)
class State:
    """How far a study is. ``seconds`` are those of the finished steps, ``failed`` says why, ``running`` since when."""

    plan: Plan
    done: Collection[str]
    running: Mapping[str, float]
    failed: Mapping[str, str]
    seconds: Mapping[str, float]

    @property
    def expected(self) -> dict[str, float | None]:
        """Step → the seconds that it took, or will take, about; None where nobody knows.

        An estimate is multiplied by what the finished steps of its kind took beside theirs (those of all kinds, where
        none of its kind has finished).
        """

        def factor(kind: str) -> float | None:
            done = [step for step in self.plan.steps if step.name in self.seconds and step.seconds]
            done = [step for step in done if kind in (step.kind, "")]
            estimated = sum(step.seconds or 0 for step in done)
            return sum(self.seconds[step.name] for step in done) / estimated if estimated else None

        factors = {step.kind: factor(step.kind) or factor("") or 1.0 for step in self.plan.steps}
        left = {step.name: step.seconds and step.seconds * factors[step.kind] for step in self.plan.steps}
        return {name: self.seconds.get(name, seconds) for name, seconds in left.items()}

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
        return "blocked" if step.name in self.plan.blocked(self.failed) else "waiting"


@dataclass(frozen=True)
class Executor:
    """How steps are run: ``slots`` of them at once. ``run`` does one, given where its log goes, and raises."""

    slots: int
    run: Callable[[Step, Path], None]
    close: Callable[[], None] = lambda: None


@dataclass
class Scheduler:
    """Runs what of a plan is not done, each step once the steps that it depends on are done.

    Attributes:
        run: The run folder, for journal and logs.
        make_plan: Gives the plan, told the steps that failed; asked again after each step, for profiles and scouts add
            to it.
        executor: Runs one.
        callback: Told of every change.
    """

    run: Path
    make_plan: Callable[[Collection[str]], Plan]
    executor: Executor
    callback: Callable[[State], None]
    plan: Plan = field(default_factory=Plan)
    done: set[str] = field(default_factory=set)
    running: dict[str, float] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def go(self) -> dict[str, str]:
        """Run all that can be run.

        Returns:
            Failed step → why.

        Raises:
            OutputError: The disk is full, or the run folder cannot be written.
            DataError: The journal is broken.
        """
        with output_errors(self.run / JOURNAL), (self.run / JOURNAL).open("ab+") as stream:
            stream.seek(0)
            stream.truncate(stream.read().rfind(b"\n") + 1)  # without the torn line of a killed process
        self.seconds = taken_seconds(read_journal(self.run))
        futures: dict[Future[Exception | None], Step] = {}
        pool = ThreadPoolExecutor(self.executor.slots)
        try:
            while True:
                ready = self.ready()
                for step in ready:
                    self.write(step, "started", started=_now())
                    self.running[step.name] = time.monotonic()
                    self.tell()
                    if self.executor.slots > 1:
                        futures[pool.submit(self.attempt, step)] = step
                    else:  # in the main thread, where Ctrl-C arrives
                        self.end(step, self.attempt(step))
                if not futures and not ready:
                    return self.failed
                for future in wait(futures, return_when=FIRST_COMPLETED).done:
                    self.end(futures.pop(future), future.result())
        finally:
            self.executor.close()
            pool.shutdown(cancel_futures=True)

    def ready(self) -> list[Step]:
        """Make the plan, see what of it is there already, and give the steps to begin now."""
        self.plan = self.make_plan(self.failed)
        self.failed |= self.plan.failed
        able: list[Step] = []
        for step in self.plan.steps:
            over = step.name in self.done or step.name in self.failed or step.name in self.running
            if step.known and not over and self.done.issuperset(step.depends_on):
                if records.is_done(step, self.plan, self.run, keep=True):
                    self.done.add(step.name)
                else:
                    able.append(step)
        self.tell()
        shared = [step for step in able if not step.exclusive]
        if shared and not any(step.exclusive for step in self.plan.steps if step.name in self.running):
            return shared[: self.executor.slots - len(self.running)]
        return able[:1] if not self.running else []

    def attempt(self, step: Step) -> Exception | None:
        """Run a step; gives what it raised, of whatever kind: it is the step that fails, not the study."""
        try:
            self.executor.run(step, self.log(step))
        except Exception as error:
            return error
        return None

    def end(self, step: Step, error: Exception | None) -> None:
        seconds = time.monotonic() - self.running.pop(step.name)
        times = {"ended": _now(), "seconds": round(seconds, 3)}
        if error is None:
            records.record(step, self.plan, self.run)
            self.done.add(step.name)
            self.seconds[step.name] = seconds
            self.write(step, "done", **times)
        else:
            reason = str(error) if isinstance(error, (SecateurError, OSError)) else f"{type(error).__name__}: {error}"
            self.failed[step.name] = " ".join(reason.split())
            self.write(step, "failed", **times, error=self.failed[step.name], log=str(self.log(step)))
        self.tell()
        if isinstance(error, OutputError) and error.concerns_all:
            raise error  # nothing else can be written either

    def write(self, step: Step, outcome: str, **entry: Any) -> None:
        """Add a line to the journal, on disk before this returns."""
        line = json.dumps({"step": step.name, "outcome": outcome, **entry, "command": step.command_line})
        with output_errors(self.run / JOURNAL), (self.run / JOURNAL).open("a", encoding="utf-8") as stream:
            stream.write(line + "\n")
            stream.flush()
            os.fsync(stream.fileno())

    def log(self, step: Step) -> Path:
        """Where a step's output goes."""
        return self.run / LOGS / f"{step.name.replace(' ', '-')}.log"

    def tell(self) -> None:
        self.callback(State(self.plan, set(self.done), dict(self.running), dict(self.failed), dict(self.seconds)))


def taken_seconds(entries: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Finished step → how long it took, of the last time."""
    return {entry["step"]: entry["seconds"] for entry in entries if entry["outcome"] == "done" and entry["seconds"]}


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")


def in_this_process(progress: Progress) -> Executor:
    """One step after another, here: the libraries are imported once."""

    def run(step: Step, log: Path) -> None:
        def named(_: str, done: int, total: int) -> None:
            progress(step.name, done, total)

        try:
            with acting_as(step.command_line):
                _FUNCTIONS[step.kind](step.options, progress=named)
        except Exception:
            with suppress(OSError):  # the disk is full, perhaps: the step's own error says more
                log.parent.mkdir(parents=True, exist_ok=True)
                log.write_text(f"$ {step.command_line}\n{traceback.format_exc()}", encoding="utf-8")
            raise

    return Executor(1, run)


def in_processes(jobs: int) -> Executor:
    """Each step in a process of its own, ``jobs`` at once, which share the processor's cores.

    A step that takes its process with it, for want of memory, fails alone. All end when this process does.
    """
    threads = max(1, torch.get_num_threads() // jobs)
    processes: set[subprocess.Popen[bytes]] = set()

    def run(step: Step, log: Path) -> None:
        run_command(step.command, log, Path.cwd(), threads, processes)

    def close() -> None:
        for process in list(processes):
            process.kill()

    return Executor(jobs, run, close)


def on_ray(address: str, jobs: int) -> Executor:
    """Each step as a task of a Ray cluster, whose GPUs the steps share.

    Every node needs secateur at the same version, and the working folder, the data and the run folder under the same
    paths (a shared file system).

    Args:
        address: As for :func:`.ray_cluster`, and so with its errors.
        jobs: Steps at once; 1: as many as the cluster has GPUs or, without any, cores, with one each.
    """
    connection = ExitStack()
    ray = connection.enter_context(ray_cluster(address))
    has = ray.cluster_resources()
    cores = int(has.get("CPU", 1))
    slots = min(jobs, cores) if jobs > 1 else int(has.get("GPU", 0)) or cores
    threads, gpus = ray_share(ray, slots)
    task = ray.remote(num_cpus=threads)(run_command)

    def run(step: Step, log: Path) -> None:
        try:
            own = task.options(num_gpus=0 if step.kind == "prune" else gpus)
            ray.get(own.remote(step.command, log.absolute(), Path.cwd(), threads))
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None

    return Executor(slots, run, connection.close)
