"""Cut a language model down to the text encoder you can afford.

The way through, each step a function here and a command of the same name:
``profile → choose → prune → heal → evaluate → report``, and all of them together as ``study``.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from secateur.candidates import candidates
    from secateur.choose import choose
    from secateur.compare import compare
    from secateur.cost import cost
    from secateur.encode import encode
    from secateur.engine import accelerate
    from secateur.errors import SecateurError
    from secateur.evaluate import evaluate
    from secateur.export import export
    from secateur.heal import heal
    from secateur.models import open_model
    from secateur.profile import profile
    from secateur.prune import prune
    from secateur.report import report
    from secateur.serve import serve
    from secateur.study import plan_study, read_scores, read_status, study

__all__ = [
    "SecateurError",
    "accelerate",
    "candidates",
    "choose",
    "compare",
    "cost",
    "encode",
    "evaluate",
    "export",
    "heal",
    "open_model",
    "plan_study",
    "profile",
    "prune",
    "read_scores",
    "read_status",
    "report",
    "serve",
    "study",
]

_HOMES = {"SecateurError": "errors", "accelerate": "engine", "open_model": "models"}
_HOMES |= dict.fromkeys(("plan_study", "read_scores", "read_status"), "study")
_EXTRAS = {"serve": "serve"}
"""Steps whose packages do not come with secateur itself → the extra that brings them."""


def __getattr__(name: str) -> Any:
    """Import a step's module when the step is first used: ``import secateur`` stays quick."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = importlib.import_module(f"{__name__}.{_HOMES.get(name, name)}")
    except ModuleNotFoundError as error:
        if name not in _EXTRAS or str(error.name).startswith(__name__):
            raise
        from secateur.errors import MissingPackage

        install = f"pip install 'secateur[{_EXTRAS[name]}]'"
        raise MissingPackage(str(error.name), f"secateur {name}", install) from None
    return getattr(module, name)


def __dir__() -> list[str]:
    return sorted(__all__)


class _Package(ModuleType):
    """Steps and their modules share names: ``secateur.profile`` is the step, also once its module is imported."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in __all__ and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
