"""Cut a language model down to the text encoder you can afford.

The way through, each step a function here and a command of the same name:
``profile → scout → choose → prune → heal → evaluate → report``, and all of them together as ``study``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from secateur.choosing.choose import candidates as candidates
    from secateur.choosing.choose import choose as choose
    from secateur.errors import SecateurError as SecateurError
    from secateur.evaluation.evaluate import evaluate as evaluate
    from secateur.evaluation.task_folder import check_tasks as check_tasks
    from secateur.evaluation.task_folder import make_task as make_task
    from secateur.exporting.export import export as export
    from secateur.healing.heal import heal as heal
    from secateur.inference.encode import encode as encode
    from secateur.inference.encoders import accelerate as accelerate
    from secateur.inference.serve import serve as serve
    from secateur.models.open_model import open_model as open_model
    from secateur.profiling.profile import profile as profile
    from secateur.pruning.prune import prune as prune
    from secateur.reporting.compare import compare as compare
    from secateur.reporting.cost import cost as cost
    from secateur.reporting.report import read_verdict as read_verdict
    from secateur.reporting.report import report as report
    from secateur.scouting.scout import scout as scout
    from secateur.studies.study import plan_study as plan_study
    from secateur.studies.study import read_scores as read_scores
    from secateur.studies.study import read_status as read_status
    from secateur.studies.study import study as study

_HOMES = {
    "choosing.choose": "candidates choose",
    "errors": "SecateurError",
    "evaluation.evaluate": "evaluate",
    "evaluation.task_folder": "check_tasks make_task",
    "exporting.export": "export",
    "healing.heal": "heal",
    "inference.encode": "encode",
    "inference.encoders": "accelerate",
    "inference.serve": "serve",
    "models.open_model": "open_model",
    "profiling.profile": "profile",
    "pruning.prune": "prune",
    "reporting.compare": "compare",
    "reporting.cost": "cost",
    "reporting.report": "read_verdict report",
    "scouting.scout": "scout",
    "studies.study": "plan_study read_scores read_status study",
}
"""Module → the names that are had from this package."""
__all__ = sorted(name for names in _HOMES.values() for name in names.split())


def __getattr__(name: str) -> Any:
    """Import a step's module when the step is first used: ``import secateur`` stays quick."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = next(module for module, names in _HOMES.items() if name in names.split())
    try:
        module = importlib.import_module(f"{__name__}.{home}")
    except ModuleNotFoundError as error:
        if str(error.name).startswith(__name__):
            raise
        from secateur.errors import MissingPackage

        install = f"pip install 'secateur[{'serve' if name == 'serve' else 'torch'}]'"
        raise MissingPackage(str(error.name), f"secateur {name}", install) from None
    return getattr(module, name)


def __dir__() -> list[str]:
    return __all__
