"""Parts of a document as data: texts, code, tables, pictures and sections, which a page and Markdown show alike."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from secateur.document import Table, printable, to_html, to_markdown


@dataclass(frozen=True)
class Text:
    """A paragraph; a note in it is less prominent."""

    text: str
    is_note: bool = False


@dataclass(frozen=True)
class Heading:
    text: str


@dataclass(frozen=True)
class Bullets:
    items: tuple[str, ...]


@dataclass(frozen=True)
class Code:
    """Something to copy, under what it is."""

    text: str
    language: str = ""
    title: str = ""


@dataclass(frozen=True)
class Picture:
    """A ``figure`` of matplotlib, as an ``svg`` element too; ``key`` names its file, without suffix."""

    key: str
    title: str
    caption: str
    svg: str
    figure: Any


@dataclass(frozen=True)
class Gallery:
    """Pictures side by side, where there is room."""

    pictures: tuple[Picture, ...]


@dataclass(frozen=True)
class Switch:
    """Pictures of which a page shows one, as chosen by what it is called; without scripts."""

    title: str
    pictures: Mapping[str, Picture]


@dataclass(frozen=True)
class Details:
    """What a page shows when its ``summary`` is clicked on."""

    summary: str
    blocks: tuple[Block, ...]


Block = Text | Heading | Bullets | Code | Table | Picture | Gallery | Switch | Details


@dataclass(frozen=True)
class Section:
    """Blocks under a title; ``key`` is the section's address in the page, which shows those that are open at once."""

    key: str
    title: str
    blocks: Sequence[Block]
    is_open: bool = False


def pictures_in(blocks: Sequence[Block]) -> Iterator[Picture]:
    """The pictures among blocks."""
    for block in blocks:
        if isinstance(block, Picture):
            yield block
        elif isinstance(block, Gallery):
            yield from block.pictures
        elif isinstance(block, Switch):
            yield from block.pictures.values()
        elif isinstance(block, Details):
            yield from pictures_in(block.blocks)


def block_to_html(block: Block) -> str:
    """A block as HTML."""
    match block:
        case Text(text, is_note):
            return f'<p class="quiet">{_escaped(text)}</p>' if is_note else f"<p>{_escaped(text)}</p>"
        case Heading(text):
            return f"<h3>{to_html(text)}</h3>"
        case Bullets(items):
            return "<ul>\n" + "\n".join(f"<li>{_escaped(item)}</li>" for item in items) + "\n</ul>"
        case Code(text, language, title):
            above = f"<p>{_escaped(title)}</p>\n" if title else ""
            kind = ' class="once"' if language == "sh" else ""  # one click selects the whole command
            return f'{above}<pre{kind} tabindex="0"><code>{html.escape(code(text))}</code></pre>'
        case Table():
            return block.to_html()
        case Picture():
            return _figure(block, ' class="wide"')
        case Gallery(pictures):
            return '<div class="plots">\n' + "\n".join(map(_figure, pictures)) + "\n</div>"
        case Switch(title, named):
            return _switch(title, named)
        case Details(summary, blocks):
            inside = "\n".join(map(block_to_html, blocks))
            return f"<details>\n<summary>{_escaped(summary)}</summary>\n{inside}\n</details>"


def block_to_markdown(block: Block) -> str:
    """A block as GitHub's Markdown; pictures are files in the folder ``figures``."""
    match block:
        case Text(text):
            return to_markdown(text)
        case Heading(text):
            return f"### {to_markdown(text)}"
        case Bullets(items):
            return "\n".join(f"- {to_markdown(item)}" for item in items)
        case Code(text, language, title):
            text = code(text)
            fence = "`" * max(3, 1 + max((len(run) for run in re.findall(r"`+", text)), default=0))
            return (f"{to_markdown(title)}:\n\n" if title else "") + f"{fence}{language}\n{text}\n{fence}"
        case Table():
            return block.to_markdown()
        case Picture(key, title, caption):
            return f"![{to_markdown(title)}](figures/{key}.png)\n\n{to_markdown(caption)}"
        case Gallery(pictures):
            return "\n\n".join(map(block_to_markdown, pictures))
        case Switch(_, named):
            return "\n\n".join(map(block_to_markdown, named.values()))
        case Details(summary, blocks):
            return "\n\n".join([f"{to_markdown(summary)}:", *map(block_to_markdown, blocks)])


def section_to_markdown(section: Section) -> str:
    """A section with its title."""
    return "\n\n".join([f"## {section.title}", *map(block_to_markdown, section.blocks)])


def code(text: str) -> str:
    """Lines of code as they are shown: nothing in them hides, or turns what is copied."""
    return "\n".join(printable(line) for line in text.expandtabs(4).splitlines())


def _switch(title: str, pictures: Mapping[str, Picture]) -> str:
    """Radio buttons before the pictures, so that CSS can show the one whose button is pressed; the first at first."""
    keys = [picture.key for picture in pictures.values()]
    buttons = "".join(
        f'<input type="radio" name="{keys[0]}" id="show-{key}"{" checked" * (key == keys[0])}>'
        f'<label for="show-{key}">{_escaped(name)}</label>'
        for name, key in zip(pictures, keys, strict=True)
    )
    shown = "\n".join(map(_figure, pictures.values()))
    return f'<fieldset class="switch"><legend>{_escaped(title)}</legend>\n{buttons}\n{shown}\n</fieldset>'


def _figure(picture: Picture, kind: str = "") -> str:
    return f"<figure{kind}>\n{picture.svg}\n<figcaption>{_escaped(picture.caption)}</figcaption>\n</figure>"


def _escaped(text: str) -> str:
    return html.escape(printable(text))
