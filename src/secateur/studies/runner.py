"""Runs the steps of a plan: one after another in this process, in processes side by side, or on a Ray cluster.

The journal, ``RUN/steps.jsonl``, has a line for each start and each end of a step. A step that fails leaves
``RUN/logs/<step>.log``; whatever does not depend on it goes on.

A step is done when its output is there, and is still of its options and inputs: ``RUN/done/<step>.json`` records these,
with the SHA-256 of the files that it read, and those of the steps before it. Names on the Hub and mteb's tasks have no
files to compare.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
import traceback
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from secateur.clusters import ray_cluster, ray_share, run_command
from secateur.data.sources import data_files, stem
from secateur.errors import ConfigError, DataError, OutputError, SecateurError
from secateur.evaluation.evaluate import evaluate
from secateur.files import output_errors
from secateur.healing.heal import heal
from secateur.options import Names
from secateur.profiling.profile import profile
from secateur.progress import Progress
from secateur.provenance import ASIDE, Made, acting_as, fingerprint_files, model_files, now, sha256_of, versions_of
from secateur.pruning.prune import prune
from secateur.reporting.cost import cost
from secateur.reporting.run import JOURNAL, read_journal
from secateur.scouting.scout import scout
from secateur.studies.steps import COMMANDS, MODELS, Plan, State, Step

RECORDS = "done"
MEASURED = ("evaluate", "cost")
"""Steps whose results are of the models and library versions of now: else they run again. Others make a model or a
profile, which is never made again by itself."""
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    function.__name__: function for function in (prune, profile, heal, scout, evaluate, cost)
}


@dataclass(frozen=True)
class Executor:
    """How steps are run: ``slots`` of them at once. ``run`` does one, given where its log goes, and raises."""

    slots: int
    run: Callable[[Step, Path], None]
    close: Callable[[], None] = lambda: None


@dataclass
class Scheduler:
    """Runs what of a plan is not done, each step once the steps that it depends on are done.

    ``run`` is the run folder. ``make_plan`` gives the plan, told the steps that failed; it is asked again after each
    step, for profiles and scouts decide on it. ``callback`` is told of every change.
    """

    run: Path
    make_plan: Callable[[Collection[str]], Plan]
    executor: Executor
    callback: Callable[[State], None]
    state: State = field(default_factory=lambda: State(done=set()))

    def go(self) -> dict[str, str]:
        """Run all that can be run; gives the failed steps, each with the reason.

        Raises:
            OutputError: The disk is full, or the run folder cannot be written.
            DataError: The journal is broken.
        """
        with output_errors(self.run / JOURNAL), (self.run / JOURNAL).open("ab+") as stream:
            stream.seek(0)
            stream.truncate(stream.read().rfind(b"\n") + 1)  # without the torn line of a killed process
        self.state.seconds, self.state.slots = taken_seconds(read_journal(self.run)), self.executor.slots
        futures: dict[Future[Exception | None], Step] = {}
        pool = ThreadPoolExecutor(self.executor.slots)
        try:
            while (ready := self._ready()) or futures:
                for step in ready:
                    self._write(step, "started", started=now())
                    self.state.running[step.name] = time.time()
                    self.callback(self.state)
                    if self.executor.slots > 1:
                        futures[pool.submit(self._attempt, step)] = step
                    else:  # in the main thread, where Ctrl-C arrives
                        self._end(step, self._attempt(step))
                for future in wait(futures, return_when=FIRST_COMPLETED).done:
                    self._end(futures.pop(future), future.result())
            return self.state.failed
        finally:
            self.executor.close()
            pool.shutdown(cancel_futures=True)

    def _ready(self) -> list[Step]:
        """Make the plan, see what of it is there already, and give the steps to begin now."""
        state = self.state
        state.plan = plan = self.make_plan(state.failed)
        for name in plan.failed.keys() - state.failed.keys():
            state.failed[name] = plan.failed[name]
            step = next(step for step in plan.steps if step.name == name)
            self._write(step, "failed", error=plan.failed[name])
        able: list[Step] = []
        done: set[str] = set(state.done)
        for step in plan.steps:
            if state.of(step) == "waiting" and done.issuperset(step.depends_on):
                if is_done(step, plan, self.run):
                    if not (self.run / RECORDS / f"{step.stem}.json").is_file():  # killed before it was written
                        record(step, plan, self.run)
                    done.add(step.name)
                else:
                    able.append(step)
        state.done = done
        self.callback(state)
        return able[: self.executor.slots - len(state.running)]

    def _attempt(self, step: Step) -> Exception | None:
        """Run a step; gives what it raised, of whatever kind: it is the step that fails, not the study."""
        try:
            self.executor.run(step, self.run / "logs" / f"{step.stem}.log")
        except Exception as error:
            return error
        return None

    def _end(self, step: Step, error: Exception | None) -> None:
        state, name = self.state, step.name
        seconds = time.time() - state.running.pop(name)
        times = {"ended": now(), "seconds": round(seconds, 3)}
        if error is None:
            record(step, state.plan, self.run)
            state.done = {*state.done, name}
            state.seconds[name] = seconds
            self._write(step, "done", **times)
        else:
            reason = str(error) if isinstance(error, (SecateurError, OSError)) else f"{type(error).__name__}: {error}"
            state.failed[name] = " ".join(reason.split())
            log = str(self.run / "logs" / f"{step.stem}.log")
            self._write(step, "failed", **times, error=state.failed[name], log=log)
        self.callback(state)
        if isinstance(error, OutputError) and error.concerns_all:
            raise error  # nothing else can be written either

    def _write(self, step: Step, outcome: str, **entry: Any) -> None:
        """Add a line to the journal, on disk before this returns."""
        line = json.dumps({"step": step.name, "outcome": outcome, **entry, "command": step.command_line})
        with output_errors(self.run / JOURNAL), (self.run / JOURNAL).open("a", encoding="utf-8") as stream:
            stream.write(line + "\n")
            stream.flush()
            os.fsync(stream.fileno())


def taken_seconds(entries: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Finished step → how long it took, of the last time."""
    return {entry["step"]: entry["seconds"] for entry in entries if entry["outcome"] == "done" and entry["seconds"]}


# Where steps run ------------------------------------------------------------------------------------------------------


def in_this_process(progress: Progress) -> Executor:
    """One step after another, here: the libraries are imported once."""

    def run(step: Step, log: Path) -> None:
        try:
            with acting_as(step.command_line):
                _FUNCTIONS[step.kind](step.options, progress=lambda _, done, total: progress(step.name, done, total))
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
    processes: list[subprocess.Popen[bytes]] = []

    def run(step: Step, log: Path) -> None:
        run_command(step.command, log, Path.cwd(), threads, processes.append)

    def close() -> None:
        for process in processes:
            process.kill()  # does nothing where it has ended

    return Executor(jobs, run, close)


def on_ray(address: str, jobs: int) -> Executor:
    """Each step as a task of a Ray cluster, whose GPUs the steps share.

    Every node needs secateur at the same version, and the working folder, the data and the run folder under the same
    paths. ``address`` and errors are those of :func:`.ray_cluster`; with ``jobs`` of 1, as many steps run at once as
    the cluster has GPUs or, without any, cores.
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


# What is done ---------------------------------------------------------------------------------------------------------


def _made_from(step: Step, plan: Plan, run: Path) -> Made:
    """What a step's output follows from: of a study's own models the steps that made them, or files where measured."""
    options = step.options.model_dump(mode="json", include=step.options.model_fields_set - ASIDE)
    measured = step.kind in MEASURED
    inputs: dict[str, Any] = {}
    for name, value in list(options.items()):
        marks = [mark.what for mark in type(step.options).model_fields[name].metadata if isinstance(mark, Names)]
        if not {"model", "data", "task"}.intersection(marks):
            continue
        for item in value if isinstance(value, list) else [value]:
            maker = _maker(item, plan)
            if measured and (maker or Path(item).parent == run / MODELS):
                inputs[str(Path(item).relative_to(run))] = fingerprint_files(item)
            elif maker is None:
                inputs[item] = _files(item, marks[0])
            else:
                inputs[name] = asdict(_made_from(maker, plan, run))
            if maker or measured:
                options.pop(name, None)
    if step.kind == "heal":
        options.setdefault("recipe", "default")
    return Made(step.kind, options, inputs, versions_of() if measured else "")


def _maker(item: str, plan: Plan) -> Step | None:
    """The step of a study that writes a model, or the task folders of a scout."""
    for step in plan.steps:
        if step.kind in ("prune", "heal") and item == str(step.output):
            return step
        if step.kind == "scout" and step.output.parent in Path(item).parents:
            return step
    return None


def _files(item: str, what: str) -> dict[str, str] | None:
    """Files of a model, of data or of a task, by SHA-256; None for what is not on this disk."""
    path = Path(item)
    if not path.exists():
        return None
    if what == "data" or (what == "task" and path.is_file()):
        files = data_files(path)
        files += [about for file in files if (about := file.with_name(stem(file) + ".json")).is_file()]
    elif what == "task":
        files = sorted(file for file in path.rglob("*") if file.is_file())
    else:
        files = model_files(path)
    return {str(file): sha256_of(file) for file in files}


def is_done(step: Step, plan: Plan, run: Path) -> bool:
    """Whether a step's output is there, and is of the present options and inputs.

    A model or profile without a record is whole as well: its study was killed before the record was written.
    """
    if not step.output.exists():
        return False
    changes = _made_from(step, plan, run).changes_since(run / RECORDS, f"{step.stem}.json")
    return changes == [] or (changes is None and step.kind not in MEASURED)


def record(step: Step, plan: Plan, run: Path) -> None:
    """Write what a step's output was made from; what a killed training left beside it goes."""
    shutil.rmtree(step.output.with_name(step.output.name + ".partial"), ignore_errors=True)
    _made_from(step, plan, run).record(run / RECORDS, f"{step.stem}.json")


def check_done(plan: Plan, run: Path) -> None:
    """Refuse to go on where a result that is there was made otherwise than it would be now.

    Models, depths, recipes, seeds and tasks may be added: that changes no result.

    Raises:
        ConfigError: With other options, as of an edited ``study.yaml``.
        DataError: From a file that has changed.
    """
    known = {name for options in COMMANDS.values() for name in options.model_fields}
    there = {step.name for step in plan.steps if step.output.exists()}
    for step in plan.steps:
        if step.kind == "cost" or step.name not in there:
            continue
        made, output = _made_from(step, plan, run), step.output.relative_to(run)
        changed = made.changes_since(run / RECORDS, f"{step.stem}.json") or []
        if step.kind in MEASURED:  # of other models, of other versions, or before its model is there, it is made again
            own = changed if there.issuperset(step.depends_on) else []
            changed = [name for name in own if name not in ("versions", *made.inputs)]
        if options := [name for name in changed if name in known]:
            hint = "change it back, remove the result, or name a new run folder (as for a study of an older version)"
            what = f"changed in {run}/study.yaml since {output} was made"
            raise ConfigError(", ".join(options), None, what, hint)
        if changed:
            hint = f"bring the old state back, or name a new run folder ({output} was made from it)"
            raise DataError(changed[0], "has changed since the study began", hint)
