"""Cut a language model down to the text encoder you can afford.

The way through, each step a function here and a command of the same name:
``profile → scout → choose → prune → heal → evaluate → report``, and all of them together as ``study``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from secateur.choosing.choose import candidates, choose
    from secateur.errors import SecateurError
    from secateur.evaluation.evaluate import evaluate
    from secateur.evaluation.task_folder import check_tasks, make_task
    from secateur.exporting.export import export
    from secateur.healing.heal import heal
    from secateur.inference.encode import encode
    from secateur.inference.encoders import accelerate
    from secateur.inference.serve import serve
    from secateur.models.open_model import open_model
    from secateur.profiling.profile import profile
    from secateur.pruning.prune import prune
    from secateur.reporting.compare import compare
    from secateur.reporting.cost import cost
    from secateur.reporting.report import read_verdict, report
    from secateur.scouting.scout import scout
    from secateur.studies.study import plan_study, read_scores, read_status, study

__all__ = [
    "SecateurError",
    "accelerate",
    "candidates",
    "check_tasks",
    "choose",
    "compare",
    "cost",
    "encode",
    "evaluate",
    "export",
    "heal",
    "make_task",
    "open_model",
    "plan_study",
    "profile",
    "prune",
    "read_scores",
    "read_status",
    "read_verdict",
    "report",
    "scout",
    "serve",
    "study",
]

_HOMES = {
    "SecateurError": "errors",
    "accelerate": "inference.encoders",
    "candidates": "choosing.choose",
    "check_tasks": "evaluation.task_folder",
    "choose": "choosing.choose",
    "compare": "reporting.compare",
    "cost": "reporting.cost",
    "encode": "inference.encode",
    "evaluate": "evaluation.evaluate",
    "export": "exporting.export",
    "heal": "healing.heal",
    "make_task": "evaluation.task_folder",
    "open_model": "models.open_model",
    "plan_study": "studies.study",
    "profile": "profiling.profile",
    "prune": "pruning.prune",
    "read_scores": "studies.study",
    "read_status": "studies.study",
    "read_verdict": "reporting.report",
    "report": "reporting.report",
    "scout": "scouting.scout",
    "serve": "inference.serve",
    "study": "studies.study",
}
_EXTRAS = {"serve": "serve"}
"""Steps that need more than the extra ``torch`` → the one that brings all that they need."""


def __getattr__(name: str) -> Any:
    """Import a step's module when the step is first used: ``import secateur`` stays quick."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = importlib.import_module(f"{__name__}.{_HOMES[name]}")
    except ModuleNotFoundError as error:
        if str(error.name).startswith(__name__):
            raise
        from secateur.errors import MissingPackage

        install = f"pip install 'secateur[{_EXTRAS.get(name, 'torch')}]'"
        raise MissingPackage(str(error.name), f"secateur {name}", install) from None
    return getattr(module, name)


def __dir__() -> list[str]:
    return sorted(__all__)
