"""How long work tells how far it is: one callback, which the command line turns into a bar, and no other bars."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partialmethod

import datasets
import tqdm.auto  # type: ignore[import-untyped]
import transformers

Progress = Callable[[str, int, int], None]
"""Called as ``progress(what, done, total)``, from 0 to ``total``; a total of 0: nobody knows it."""

CHATTY = ("mteb", "sentence_transformers", "datasets")


def silent(what: str, done: int, total: int) -> None:
    """Tell nobody."""


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the bars, warnings and logs of the libraries off the screen."""
    loggers = [logging.getLogger(name) for name in CHATTY]
    levels = [logger.level for logger in loggers]
    verbosity, bar_init = transformers.logging.get_verbosity(), tqdm.auto.tqdm.__init__
    bars = transformers.logging.is_progress_bar_enabled()
    dataset_bars = not datasets.are_progress_bars_disabled()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            transformers.logging.set_verbosity_error()
            transformers.logging.disable_progress_bar()
            datasets.disable_progress_bars()
            # Some bars ask nobody; a bar that is told so explicitly still shows.
            tqdm.auto.tqdm.__init__ = partialmethod(bar_init, disable=True)
            yield
    finally:
        tqdm.auto.tqdm.__init__ = bar_init
        transformers.logging.set_verbosity(verbosity)
        if bars:
            transformers.logging.enable_progress_bar()
        if dataset_bars:
            datasets.enable_progress_bars()
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
