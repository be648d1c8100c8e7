"""How much of which texts is tokenized at once: what a tokenizer returns is many times larger than its ids."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

CHARACTERS_PER_TOKEN = 64
"""Tokens are shorter than this, or so few that more of a text must be looked at."""

SLICE_CHARACTERS = 1 << 16


def slices(texts: Sequence[str], longest: int) -> Iterator[Sequence[str]]:
    """Texts in order, as many together as have :data:`SLICE_CHARACTERS`, if so many count of each as ``longest``."""
    start = characters = 0
    for end, text in enumerate(texts):
        length = min(len(text), longest)
        if end > start and characters + length > SLICE_CHARACTERS:
            yield texts[start:end]
            start, characters = end, 0
        characters += length
    if start < len(texts):
        yield texts[start:]


def cut_characters(text: str, longest: int, side: str) -> str:
    """A text without what lies beyond so many characters, on the side (``left``, ``right``) that a tokenizer cuts."""
    return text[:longest] if side == "right" else text[-longest:]
