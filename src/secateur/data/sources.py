"""Data as a command is given it: files, folders of files and data sets by name, of pairs or of texts alone."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

from secateur.data.hub_sets import PREFIX, is_hub_name, parse_name
from secateur.data.pairs import Pairs, instruction_prompt, pair_of, pairs_of, read_beside
from secateur.data.tables import SUFFIXES, Draw, open_table
from secateur.data.texts import Texts, text_of, texts_of
from secateur.errors import DataError

Source = Pairs | Texts
Data = str | Path | Source | Sequence[str | Path | Source]


CHECKED_ROWS = 1000
"""Of each file, before anything heavy is imported."""


def read_sources(
    data: Data,
    instruction: str | None = None,
    columns: Mapping[str, str] | None = None,
    *,
    most: int | None = None,
    seed: int = 0,
) -> list[Source]:
    """Read and check all of the data.

    Args:
        data: Files, folders of them, names of data sets (:mod:`.hub_sets`), or what was read already.
        instruction: Goes before each anchor in place of those that come with the data, or before each text alone.
        columns: As for :func:`.open_table`.
        most: Keep about so many rows, shared evenly by the files, two of each at least. All are checked, and only
            these are held in memory.
        seed: What they are drawn by.

    Raises:
        ConfigError, DataError: Something is not right.
    """
    items = [file for item in _items(data) for file in ([item] if isinstance(item, Source) else data_files(item))]
    draw = None if most is None else Draw(max(2, most // max(1, len(items))), seed)
    return [
        read_source(item, instruction, columns, draw)
        if isinstance(item, Path)
        else item.sample(draw.rows, draw.seed)
        if draw
        else item
        for item in items
    ]


def read_source(
    data: str | Path,
    instruction: str | None = None,
    columns: Mapping[str, str] | None = None,
    draw: Draw | None = None,
) -> Source:
    """Read one file or data set, as :func:`read_sources` does."""
    table = open_table(data, columns)
    if table.of_texts:
        return texts_of(table, instruction_prompt(instruction or ""), draw)
    return pairs_of(table, instruction, draw)


def check_data(data: Data, columns: Mapping[str, str] | None = None) -> None:
    """Look at the names, formats, columns and first rows of data, quickly and without PyTorch.

    Of a data set of the Hub, only the name is looked at.

    Raises:
        ConfigError, DataError: As :func:`read_sources` would, as far as this can be told from
            :data:`CHECKED_ROWS` rows.
    """
    for item in _items(data):
        for file in [] if isinstance(item, Source) else data_files(item):
            if is_hub_name(file):
                parse_name(file)
                continue
            table = open_table(file, columns)
            parse = text_of if table.of_texts else pair_of
            if not table.of_texts and table.path:
                read_beside(table.path)
            rows = [parse(table.place, line, row) for line, row in itertools.islice(table.rows(), CHECKED_ROWS)]
            if not rows:
                raise DataError(table.place, "holds no text" if table.of_texts else "has no rows")


def _items(data: Data) -> Sequence[str | Path | Source]:
    return [data] if isinstance(data, (str, Path, Source)) else data


def data_files(path: str | Path) -> list[Path]:
    """A data file, or the name of a data set; of a folder, all data files in it, by name.

    Raises:
        DataError: A folder holds none.
    """
    folder = Path(path)
    if not folder.is_dir():
        return [folder]
    files = sorted(file for file in folder.iterdir() if file.name.lower().endswith(SUFFIXES))
    if not files:
        hint = f"expected {', '.join(SUFFIXES)}; a folder of the datasets library is named {PREFIX}{folder}"
        raise DataError(folder, "holds no data files", hint)
    return files
