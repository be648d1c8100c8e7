"""Numbers and texts as a report prints them, in HTML and in Markdown."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Callable, Sequence

from secateur.figures.text import printable

NONE = "–"


def score(value: float | None) -> str:
    """A score from 0 to 1 as points of 100."""
    return NONE if value is None or math.isnan(value) else _minus(f"{100 * value:.1f}")


def signed(difference: float | None) -> str:
    """A difference of scores as points of 100, with its sign."""
    if difference is None or math.isnan(difference):
        return NONE
    text = _minus(f"{100 * difference:+.1f}")
    return "0.0" if text[1:] == "0.0" else text


def percent(share: float, digits: int = 1) -> str:
    return _minus(f"{100 * share:.{digits}f}\N{NO-BREAK SPACE}%")


def _minus(number: str) -> str:
    return number.replace("-", "−")


def span(low: float | None, high: float | None, say: Callable[[float], str] = score) -> str:
    """An interval, or nothing where there is none."""
    return "" if low is None or high is None else f"{say(low)} to {say(high)}"


def loss(value: float | None) -> str:
    return NONE if value is None else f"{value:.3f}"


def speed(value: float | None) -> str:
    return NONE if value is None else f"{value:,.{0 if value >= 100 else 1 if value >= 10 else 2}f}"


def duration(value: float | None) -> str:
    """Seconds in the unit that suits them; nothing measured is 0."""
    if not value:
        return NONE
    return f"{1000 * value:.1f}\N{NO-BREAK SPACE}ms" if value < 1 else f"{value:.1f}\N{NO-BREAK SPACE}s"


def count(value: float) -> str:
    return _scaled(value, (("B", 1e9), ("M", 1e6), ("k", 1e3)), "")


def byte_size(value: float) -> str:
    return _scaled(value, (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)), "bytes")


def _scaled(value: float, units: Sequence[tuple[str, float]], plain: str) -> str:
    for unit, size in units:
        if value >= size:
            return f"{value / size:.1f}\N{NO-BREAK SPACE}{unit}"
    return f"{value:g}\N{NO-BREAK SPACE}{plain}".strip()


def check(value: float | None) -> str:
    return NONE if value is None else f"{value:.1e}"


def decimal(value: float | None) -> str:
    return NONE if value is None else f"{value:.1f}"


def seconds(value: float) -> str:
    return f"{value / 60:.0f}\N{NO-BREAK SPACE}min" if value >= 600 else f"{value:.0f}\N{NO-BREAK SPACE}s"


def given(value: object) -> str:
    return NONE if value is None else str(value)


def moment(created: str) -> str:
    """An ISO 8601 time without its seconds."""
    return created[:16].replace("T", " ") + (" UTC" if created.endswith("+00:00") else "")


def capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def plural(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 'es' if noun.endswith('ch') else 's'}"


def markdown(value: object) -> str:
    """A text as one line of Markdown that shows it as it is: no markup, no HTML, no formula, no new table cell."""
    text = html.escape(printable(re.sub(r"\s+", " ", str(value))), quote=False)
    text = re.sub(r"([\\`*_\[\]|~$])", r"\\\1", text)
    text = re.sub(r"^([-+=#])", r"\\\1", text)
    return re.sub(r"^(\d+)([.)] )", r"\1\\\2", text)


def code(text: str) -> str:
    """Lines of code as they are shown: nothing in them hides, or turns what is copied."""
    return "\n".join(printable(line) for line in text.expandtabs(4).splitlines())


def fenced(text: str, language: str = "") -> str:
    """A code block whose fence is longer than any in the text."""
    text = code(text)
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall(r"`+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}"
