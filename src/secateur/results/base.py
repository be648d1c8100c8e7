"""Results are tables: one frozen dataclass each, saved as one JSON file with its provenance.

``rows`` are tidy: one per (model, depth) or per (model, task). ``load(path, kind)`` gives back what
``table.save(path)`` wrote; every number can be traced to a command, a seed and a data file by
:class:`.Provenance`.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar, cast

from pydantic import TypeAdapter, ValidationError, WrapValidator
from pydantic_core import to_json

from secateur.errors import DataError
from secateur.files import read_json, write_bytes
from secateur.provenance import Provenance

SCHEMA_VERSION = 1

T = TypeVar("T", bound="Table")
Float = Annotated[float, WrapValidator(lambda value, check: None if value is None else check(value))]
"""A number; what is not finite is written as null, and read as None."""
Matrix = tuple[tuple[float | None, ...], ...]


@dataclass(frozen=True)
class Table:
    """Rows and their provenance. Subclasses say what a row is.

    Attributes:
        kind: Name of the table in its file; tells a profile from scores.
        file: Name that the table's file has by convention: ``KIND.json`` where the class does not say another.
        rows_in: Name of the attribute that holds the rows.
    """

    kind: ClassVar[str] = ""
    file: ClassVar[str] = ""
    rows_in: ClassVar[str] = ""

    provenance: Provenance

    def __init_subclass__(cls, *, kind: str = "", file: str = "", rows_in: str = "") -> None:
        if kind:
            cls.kind, cls.file, cls.rows_in = kind, file or f"{kind}.json", rows_in

    @property
    def rows(self) -> tuple[Any, ...]:
        """The tidy rows, each a frozen dataclass."""
        return tuple(getattr(self, self.rows_in))

    @property
    def commands(self) -> tuple[str, ...]:
        """The commands that the rows come from."""
        return (self.provenance.command,)

    def to_dicts(self) -> list[dict[str, Any]]:
        """One flat dict per row."""
        return [asdict(row) for row in self.rows]

    def to_dataframe(self) -> Any:
        """The rows as a ``pandas.DataFrame``."""
        import pandas as pd

        return pd.DataFrame(self.to_dicts())

    def save(self, folder: str | Path) -> Path:
        """Write the table into ``folder`` under its conventional name, whole or not at all."""
        path = Path(folder) / self.file
        content = {"kind": self.kind, "schema_version": SCHEMA_VERSION, **asdict(self)}
        # JSON has no NaN: a number that is not finite is null, never a word that other readers refuse.
        write_bytes(path, to_json(content, indent=1, inf_nan_mode="null") + b"\n")
        return path


def load(path: str | Path, kind: type[T]) -> T:
    """Read a table back.

    Args:
        path: The file, or the folder that holds it under its conventional name.
        kind: The table class expected there.

    Raises:
        DataError: The file is missing, is not JSON, is another kind of table, or of a newer schema; or a value is
            missing or invalid.
    """
    file = Path(path) / kind.file if Path(path).is_dir() else Path(path)
    content = read_json(file)
    if not isinstance(content, dict) or content.get("kind") != kind.kind:
        found = content.get("kind") if isinstance(content, dict) else type(content).__name__
        hint = f"give the file that secateur wrote as {kind.file}"
        raise DataError(file, f"holds {found!r}, not a {kind.kind}", hint)
    version = content.get("schema_version")
    if version != SCHEMA_VERSION:
        raise DataError(file, f"schema version {version}, but this secateur reads {SCHEMA_VERSION}")
    try:
        text = json.dumps(content, ensure_ascii=False).encode("utf-8", "replace")  # lone surrogates
        table: T = _adapter(cast(Any, kind)).validate_json(text, strict=True)
        return table
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        if first["type"] in ("missing", "unexpected_keyword_argument"):
            raise DataError(file, f"is not a whole {kind.kind}", f"missing or unexpected: {key}") from None
        raise DataError(file, f"{first['input']!r:.60} is not valid", "make the file again", field=key) from None


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)
