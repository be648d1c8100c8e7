"""A depth → a plain model folder that holds the first blocks and nothing of the others."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from secateur.artifacts import Origin, Profile, load, new_folder, provenance
from secateur.blocks import check_keep, cut, depth_of
from secateur.choose import target_depth
from secateur.models import model_label, open_model, save_model
from secateur.pooling import PoolingName
from secateur.progress import Progress, silent


def prune(
    model: str | Path,
    to: str | int | float,
    *,
    profile: Profile | str | Path | None = None,
    pooling: PoolingName | None = None,
    max_length: int = 512,
    dtype: str = "auto",
    trust_remote_code: bool = False,
    out: str | Path,
    progress: Progress = silent,
) -> Path:
    """Cut a model to its first blocks and write it as a plain model folder.

    Args:
        model: Anything :func:`secateur.models.open_model` opens.
        to: ``large``, ``small``, a number of blocks to keep, or a share to remove.
        profile: Where ``large`` and ``small`` come from.
        pooling: For a bare language model.
        max_length: Tokens per text, for a bare language model.
        dtype: Of the written weights.
        trust_remote_code: As for ``open_model``.
        out: The folder to write; it must not hold anything yet.
        progress: Told after each step.

    Returns:
        ``out``. The folder has been reopened in a fresh process and gives the vectors of the cut model.

    Raises:
        ModelError, IllegalDepth, ConfigError, OutputError: Bad input.
        VerificationFailed: The written folder gives other vectors.
    """
    with new_folder(out) as folder:
        progress("prune", 0, 3)
        opened = open_model(
            model,
            pooling=pooling,
            max_length=max_length,
            dtype=dtype,
            device="cpu",
            trust_remote_code=trust_remote_code,
        )
        progress("prune", 1, 3)
        transformer = opened[0].auto_model
        depth = depth_of(transformer)
        keep = range(target_depth(to, depth, profile))
        check_keep(transformer.config, keep)
        cut(transformer, keep)
        progress("prune", 2, 3)
        save_model(opened, folder, origin_of(model, depth, keep))
        progress("prune", 3, 3)
    return Path(out)


def origin_of(model: str | Path, depth: int, keep: Sequence[int]) -> Origin:
    """Where a cut model comes from: what its own ``secateur.json`` says, continued by this cut."""
    earlier = _earlier(model)
    now = provenance()
    if earlier is None:
        return Origin(now, model_label(model), depth, tuple(keep), "", 0.0, (now.command,))
    kept = tuple(earlier.kept[index] for index in keep)
    history = (*earlier.history, now.command)
    return Origin(now, earlier.base_model, earlier.depth, kept, earlier.pooling, earlier.check, history)


def _earlier(model: str | Path) -> Origin | None:
    file = Path(model) / Origin.file
    return load(file, Origin) if file.is_file() else None
