"""Data sets of the Hugging Face ``datasets`` library, by name: ``hf:NAME@REVISION:CONFIG[SPLIT]``.

All but ``NAME`` may be left out: ``hf:sentence-transformers/all-nli:triplet`` is the split ``train`` (or the only one)
of the configuration ``triplet``. ``SPLIT`` may be a slice, as ``datasets`` has them: ``[train[:10000]]``. ``NAME`` is
one of the Hub's, a folder that ``load_dataset`` reads, or one that ``save_to_disk`` wrote. The library runs no code
that comes with data.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from secateur.errors import DataError
from secateur.progress import quiet
from secateur.provenance import Fingerprint

if TYPE_CHECKING:
    import datasets

PREFIX = "hf:"
FORM = "hf:NAME, hf:NAME:CONFIG or hf:NAME@REVISION:CONFIG[SPLIT]"
TRAIN = "train"

_FORM = re.compile(r"hf:(?P<name>[^:@\[\]]+)(@(?P<revision>[^:\[\]]+))?(:(?P<config>[^\[\]]+))?(\[(?P<split>.+)\])?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_AT_ONCE = 1000


@dataclass(frozen=True)
class HubName:
    """The parts of ``hf:NAME@REVISION:CONFIG[SPLIT]``."""

    name: str
    revision: str | None = None
    config: str | None = None
    split: str | None = None

    def __str__(self) -> str:
        parts = (("@{}", self.revision), (":{}", self.config), ("[{}]", self.split))
        return PREFIX + self.name + "".join(form.format(part) for form, part in parts if part)

    @property
    def label(self) -> str:
        """What the set is called among others: its name without the owner, and what was asked of it."""
        parts = [Path(self.name).name, self.config, self.split]
        return "-".join(re.sub(r"[^\w.-]+", "_", part).strip("_") for part in parts if part)


@dataclass(frozen=True)
class HubSet:
    """An opened data set; ``name`` has the revision that was found on the Hub."""

    name: HubName
    data: datasets.Dataset

    def rows(self, wanted: Collection[str]) -> Iterator[tuple[int, Mapping[str, Any]]]:
        """Number, from 1, and columns of each row; those not ``wanted`` are left out where any is wanted."""
        taken = [column for column in self.data.column_names if column in wanted]
        number = 0
        for piece in (self.data.select_columns(taken) if taken else self.data).iter(_AT_ONCE):
            for values in zip(*piece.values(), strict=True):
                number += 1
                yield number, dict(zip(piece, values, strict=True))

    def fingerprint(self, rows: int, wanted: Collection[str]) -> Fingerprint:
        """The name with its revision, and the hash of the rows as JSON, wherever they are kept."""
        digest = hashlib.sha256()
        for _, row in self.rows(wanted):
            digest.update(json.dumps(row, sort_keys=True, default=str).encode())
        return Fingerprint(str(self.name), digest.hexdigest(), rows, str(self.data.info.license or ""))


def is_hub_name(data: str | Path) -> bool:
    """Whether this is the name of a data set, and not of a file."""
    return str(data).startswith(PREFIX)


def parse_name(data: str | Path) -> HubName:
    """Take a name apart.

    Raises:
        DataError: It is not of the form.
    """
    found = _FORM.fullmatch(str(data))
    if not found:
        raise DataError(data, "is no name of a data set", FORM)
    return HubName(**found.groupdict())


def open_set(data: str | Path) -> HubSet:
    """Load a data set, from the Hub or a folder.

    Raises:
        DataError: There is none of this name, or it has no such configuration or split; or it comes with code.
    """
    asked = parse_name(data)
    import datasets  # takes a second, which files need not wait for

    try:
        with quiet():
            return _saved(asked) if _was_saved(asked) else _built(asked)
    except (datasets.exceptions.DatasetsError, OSError, ValueError, RuntimeError) as error:
        raise DataError(data, f"cannot be loaded ({' '.join(str(error).split())})") from error


def _was_saved(asked: HubName) -> bool:
    """Whether ``save_to_disk`` wrote it."""
    return any((Path(asked.name) / file).is_file() for file in ("state.json", "dataset_dict.json"))


def _saved(asked: HubName) -> HubSet:
    if asked.config or asked.revision:
        raise DataError(
            str(asked), "was saved to disk, without configurations and revisions", f"hf:{asked.name}[SPLIT]"
        )
    import datasets

    loaded = datasets.load_from_disk(asked.name)
    if isinstance(loaded, datasets.DatasetDict):
        whole = re.split(r"\[", asked.split or "")[0]
        if asked.split and whole != asked.split and whole in loaded:
            raise DataError(str(asked), "was saved to disk: its splits have no slices", f"hf:{asked.name}[{whole}]")
        return HubSet(asked, loaded[_split(asked, loaded)])
    if asked.split:
        raise DataError(str(asked), "was saved to disk without splits", f"hf:{asked.name}")
    return HubSet(asked, loaded)


def _built(asked: HubName) -> HubSet:
    import datasets

    builder = datasets.load_dataset_builder(asked.name, asked.config, revision=asked.revision)
    builder.download_and_prepare()
    data = builder.as_dataset(split=_split(asked, builder.info.splits))
    found = builder.hash if not Path(asked.name).exists() and _COMMIT.fullmatch(builder.hash or "") else None
    return HubSet(replace(asked, revision=found or asked.revision), data)


def _split(asked: HubName, there: Collection[str]) -> str:
    """The split asked for; else the one to train on, or the only one."""
    if asked.split is not None:
        if re.split(r"[\[+]", asked.split)[0] in there:
            return asked.split
        raise DataError(str(asked), f"has no split {asked.split}", f"it has {', '.join(there)}")
    if TRAIN not in there and len(there) > 1:
        raise DataError(str(asked), "has several splits, none of them called train", f"name one of {', '.join(there)}")
    return TRAIN if TRAIN in there else next(iter(there))
