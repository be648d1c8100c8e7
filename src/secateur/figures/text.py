"""Names and texts as they are drawn."""

from __future__ import annotations

import re

NAME_LENGTH = 40
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")


def shorten(text: str, length: int = NAME_LENGTH) -> str:
    """A name as it is drawn: printable, with its middle left out where it is longer than ``length`` characters."""
    text = printable(text)
    if len(text) <= length:
        return text
    head = (length - 1) // 2
    return f"{text[:head]}…{text[-(length - 1 - head) :]}"


def printable(text: str) -> str:
    """The text without control characters, lone surrogates, and marks that turn the reading order."""
    return _UNPRINTABLE.sub("�", text)
