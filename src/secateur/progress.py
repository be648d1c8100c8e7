"""How long work tells how far it is: one callback, which the command line turns into a bar."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""Called as ``progress(what, done, total)``, from 0 to ``total``."""


def silent(what: str, done: int, total: int) -> None:
    """Tell nobody."""
