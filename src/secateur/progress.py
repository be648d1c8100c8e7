"""The progress callback of long work, which the command line turns into bars; the libraries' own bars are silenced."""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partialmethod

Progress = Callable[[str, int, int], None]
"""Called as ``progress(what, done, total)`` with ``done`` from 0 to ``total``; a total of 0 is unknown."""

CHATTY = ("mteb", "sentence_transformers", "datasets", "huggingface_hub")


def silent(what: str, done: int, total: int) -> None:
    """The default callback: does nothing."""


_lock = threading.Lock()
_inside = 0
_settings = ExitStack()
"""What puts the libraries' settings back."""


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the bars, warnings and logs of the libraries off the screen.

    Their settings are the process's, and not a thread's: the first that enters changes them, and the last that leaves
    puts them back.
    """
    global _inside
    with _lock:
        if not _inside:
            _silence(_settings)
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if not _inside:
                _settings.close()


def _silence(settings: ExitStack) -> None:
    import datasets  # these take seconds, which a command that only names a mistake need not wait for
    import tqdm.auto  # type: ignore[import-untyped]
    import transformers

    settings.enter_context(warnings.catch_warnings())
    warnings.simplefilter("ignore")
    for logger in map(logging.getLogger, CHATTY):
        settings.callback(logger.setLevel, logger.level)
        logger.setLevel(logging.ERROR)
    settings.callback(transformers.logging.set_verbosity, transformers.logging.get_verbosity())
    transformers.logging.set_verbosity_error()
    if not datasets.are_progress_bars_disabled():
        settings.callback(datasets.enable_progress_bars)
        datasets.disable_progress_bars()
    # All other bars are of this class, mteb's too, which no setting reaches; one that is told to show still does.
    settings.callback(setattr, tqdm.auto.tqdm, "__init__", tqdm.auto.tqdm.__init__)
    tqdm.auto.tqdm.__init__ = partialmethod(tqdm.auto.tqdm.__init__, disable=True)
