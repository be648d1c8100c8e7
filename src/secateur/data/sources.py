"""Data as a command is given it: files, folders of files and data sets by name, of pairs or of texts alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from secateur.data.hub_sets import PREFIX
from secateur.data.pairs import Pairs, instruction_prompt, pairs_of
from secateur.data.tables import SUFFIXES, open_table
from secateur.data.texts import Texts, texts_of
from secateur.errors import DataError

Source = Pairs | Texts
Data = str | Path | Source | Sequence[str | Path | Source]


def read_sources(data: Data, instruction: str | None = None, columns: Mapping[str, str] | None = None) -> list[Source]:
    """Read and check all of the data.

    Args:
        data: Files, folders of them, names of data sets (:mod:`.hub_sets`), or what was read already.
        instruction: Goes before each anchor in place of those that come with the data, or before each text alone.
        columns: As for :func:`.open_table`.

    Raises:
        ConfigError, DataError: Something is not right.
    """
    items = [data] if isinstance(data, (str, Path, Pairs, Texts)) else list(data)
    found: list[Source] = []
    for item in items:
        if isinstance(item, (Pairs, Texts)):
            found.append(item)
        else:
            found += [read_source(file, instruction, columns) for file in data_files(item)]
    return found


def read_source(
    data: str | Path, instruction: str | None = None, columns: Mapping[str, str] | None = None
) -> Pairs | Texts:
    """Read one file or data set, as :func:`read_sources` does."""
    table = open_table(data, columns)
    if table.of_texts:
        return texts_of(table, instruction_prompt(instruction or ""))
    return pairs_of(table, instruction)


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
