"""Everything that can go wrong, as one tree under :class:`SecateurError`.

Every member says what was wrong and what would be right, and carries the values that disagree as attributes. The
command line prints ``str(error)`` on one line and exits with 2.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping, Sequence
from pathlib import Path


class SecateurError(Exception):
    """Base of all errors that secateur raises on purpose.

    Args:
        problem: What was wrong and where, with the values that disagree.
        hint: What would be right; empty where the problem says it already.
    """

    def __init__(self, problem: str, hint: str = "") -> None:
        self.problem = problem
        self.hint = hint
        super().__init__(f"{problem}: {hint}" if hint else problem)


class ModelError(SecateurError):
    """A model that cannot be opened. ``model`` is what the user named."""

    def __init__(self, model: str | Path, problem: str, hint: str = "") -> None:
        self.model = str(model)
        super().__init__(f"model {self.model}: {problem}", hint)


class UnsupportedArchitecture(ModelError):
    """A model whose layers cannot be found, or cannot be cut at all."""


class IllegalDepth(SecateurError):
    """A depth, or a set of layers, that a model cannot be cut to.

    ``asked`` is what was asked for, ``depth`` how many layers the model has, ``nearest`` the closest legal depths.
    """

    def __init__(self, asked: object, depth: int, problem: str, nearest: Sequence[int] = ()) -> None:
        self.asked = asked
        self.depth = depth
        self.nearest = tuple(nearest)
        hint = f"nearest legal: {', '.join(map(str, self.nearest))}" if self.nearest else ""
        super().__init__(f"cannot cut a model of {depth} layers to {asked}: {problem}", hint)


class DataError(SecateurError):
    """A file with texts, pairs or a task. ``line`` counts from 1; ``field`` is the column or key."""

    def __init__(
        self, file: str | Path, problem: str, hint: str = "", *, line: int | None = None, field: str | None = None
    ) -> None:
        self.file = str(file)
        self.line = line
        self.field = field
        where = self.file + (f", line {line}" if line is not None else "") + (f', "{field}"' if field else "")
        super().__init__(f"{where}: {problem}", hint)


class ConfigError(SecateurError):
    """An option, or a key of the configuration ``file``. ``key`` and ``value`` are what was given."""

    def __init__(self, key: str, value: object, problem: str, hint: str = "", file: Path | None = None) -> None:
        self.key = key
        self.value = value
        self._given = problem, hint, file
        super().__init__(f"{file}, {key}: {problem}" if file else f"{key}: {problem}", hint)

    def of(self, key: str) -> ConfigError:
        """The same error, told of the option ``key``, of whose value this one is a part."""
        return ConfigError(key, self.value, *self._given)


class OutputError(SecateurError):
    """A place that results cannot be written to. ``concerns_all``: for a reason for which no other could be, either."""

    def __init__(self, path: str | Path, problem: str, hint: str = "", *, concerns_all: bool = False) -> None:
        self.path = Path(path)
        self.concerns_all = concerns_all
        super().__init__(f"output {path}: {problem}", hint)


class MissingPackage(SecateurError):
    """An optional dependency that a command needs. ``install`` is the command that brings it."""

    def __init__(self, package: str, purpose: str, install: str) -> None:
        self.package = package
        self.install = install
        super().__init__(f"{purpose} needs the package {package}", install)


class VerificationFailed(SecateurError):
    """A written model that does not give the expected vectors: they differ by ``measured``, more than ``allowed``."""

    def __init__(self, what: str | Path, measured: float, allowed: float) -> None:
        problem = f"{what}: after reloading, vectors differ by {measured:.3g}, more than {allowed:.3g}"
        super().__init__(problem, "the folder is not safe to use; please report the architecture")


class ExportTooFar(SecateurError):
    """An export whose vectors or scores are too far from the original's; ``problem`` says by how much."""

    def __init__(self, out: str | Path, problem: str, hint: str) -> None:
        super().__init__(f"{out}: {problem}; nothing was written", hint)


class TrainingDiverged(SecateurError):
    """A training whose loss is not finite or exploded at ``step``; ``checkpoint`` is the last good state."""

    def __init__(self, step: int, loss: float, checkpoint: str | Path | None) -> None:
        self.step, self.loss, self.checkpoint = step, loss, checkpoint
        kept = f"the last good state is {checkpoint}" if checkpoint else "no state was saved before it"
        super().__init__(f"training diverged at step {step} (loss {loss:g}); {kept}", "try a smaller learning rate")


class StepFailed(SecateurError):
    """A step of a study that ended with an error in another process; the message is the last line of its log."""


class StudyFailed(SecateurError):
    """Steps of a study that failed; what does not need them is done. ``failed`` is step → why, ``page`` the report."""

    def __init__(self, run: str | Path, failed: Mapping[str, str], page: Path | None) -> None:
        self.failed = dict(failed)
        self.page = page
        said = "; ".join(f"{name}: {reason}" for name, reason in failed.items())
        many = f"{len(failed)} steps" if len(failed) > 1 else "a step"
        super().__init__(f"{many} failed ({said})", f"see {run}/logs; the same command tries again")


SYSTEM = {
    errno.ENOSPC: ("the disk is full", "free some space and run the same command again"),
    errno.EDQUOT: ("the disk quota is used up", "free some space and run the same command again"),
    errno.EMFILE: ("too many files are open", "raise the limit (ulimit -n) and run the same command again"),
    errno.ENFILE: ("too many files are open on this machine", "run the same command again later"),
    errno.EACCES: ("no permission to write there", "name another folder"),
    errno.EROFS: ("the file system is read-only", "name another folder"),
}
"""What the system may refuse → in words, and the way out."""
_NUMBERS = tuple(SYSTEM)[:4]


def system_error(error: BaseException) -> OSError | None:
    """A full disk or too many open files, where that is behind an exception, whatever library tells it.

    sqlite, safetensors and Arrow have errors of their own for these, with the number or the words in their text.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in _NUMBERS:
            return cause
        said = str(cause)
        for number in _NUMBERS:
            if os.strerror(number) in said or f"os error {number}" in said:
                return OSError(number, os.strerror(number))
        if "disk is full" in said:  # sqlite3.OperationalError
            return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        cause = cause.__cause__ or cause.__context__
    return None
