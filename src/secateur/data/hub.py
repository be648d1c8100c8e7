"""Data sets of the Hugging Face ``datasets`` library, by name: ``hf:NAME@REVISION:CONFIG[SPLIT]``.

All but ``NAME`` may be left out: ``hf:sentence-transformers/all-nli:triplet`` is the split ``train`` (or the only one)
of the configuration ``triplet``. ``SPLIT`` may be a slice, as ``datasets`` has them: ``[train[:10000]]``. ``NAME`` is
one of the Hub's, a folder that ``load_dataset`` reads, or one that ``save_to_disk`` wrote. The library runs no code
that comes with data.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from secateur.errors import DataError
from secateur.progress import quiet

if TYPE_CHECKING:
    import datasets

PREFIX = "hf:"
_FORM = re.compile(r"hf:(?P<name>[^:@\[\]]+)(@(?P<revision>[^:\[\]]+))?(:(?P<config>[^\[\]]+))?(\[(?P<split>.+)\])?")
_COMMIT = re.compile(r"[0-9a-f]{40}")


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
        """What the set is called among others: its name without the owner, with configuration and split."""
        parts = [Path(self.name).name, self.config, self.split]
        return "-".join(re.sub(r"[^\w.-]+", "_", part).strip("_") for part in parts if part)


def is_hub_name(data: str | Path) -> bool:
    """Whether this is the name of a data set, and not of a file."""
    return str(data).startswith(PREFIX)


def parse_name(data: str | Path) -> HubName:
    """Take a name apart; a DataError where it is not of the form."""
    found = _FORM.fullmatch(str(data))
    if not found:
        raise DataError(data, "is no name of a data set", "hf:NAME, hf:NAME:CONFIG or hf:NAME@REVISION:CONFIG[SPLIT]")
    return HubName(**found.groupdict() | {"name": os.path.expanduser(found["name"])})  # noqa: PTH111 - not a path, perhaps


def load_set(data: str | Path) -> tuple[HubName, datasets.Dataset]:
    """Load a data set from the Hub or a folder; the name that is returned has the revision that was found.

    Raises:
        DataError: There is none of this name, or it has no such configuration or split; or it comes with code.
    """
    asked = parse_name(data)
    import datasets  # takes a second, which files need not wait for

    revision = asked.revision
    try:
        with quiet():
            if any((Path(asked.name) / file).is_file() for file in ("state.json", "dataset_dict.json")):
                if asked.config or asked.revision:
                    raise ValueError("a folder that was saved to disk has no configurations and revisions")
                loaded = datasets.load_from_disk(asked.name)
                if asked.split:
                    splits = loaded if isinstance(loaded, dict) else {"train": loaded}
                    sizes = {name: len(rows) for name, rows in splits.items()}
                    wanted = datasets.ReadInstruction.from_spec(asked.split).to_absolute(sizes)
                    parts = [splits[part.splitname].select(range(part.from_, part.to)) for part in wanted]
                    loaded = datasets.concatenate_datasets(parts)
            else:
                builder = datasets.load_dataset_builder(asked.name, asked.config, revision=asked.revision)
                builder.download_and_prepare()
                revision = builder.hash if _COMMIT.fullmatch(builder.hash or "") else revision
                loaded = builder.as_dataset(split=asked.split)
    except Exception as error:  # whatever the library raises, as KeyError where a saved folder is damaged or empty
        raise DataError(data, f"cannot be loaded ({' '.join(str(error).split())})") from error
    found = replace(asked, revision=revision)
    if not isinstance(loaded, dict):
        return found, loaded
    split = next(iter(loaded)) if len(loaded) == 1 else "train"
    if split not in loaded:
        raise DataError(str(asked), f"has no split {split}", f"it has {', '.join(loaded) or 'none'}")
    return found, loaded[split]
