"""How a model is opened for encoding: what is said once, and given to every worker."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from sentence_transformers.util import get_device_name

from secateur.models.open_model import MAX_LENGTH
from secateur.options import SavedPooling
from secateur.provenance import is_export
from secateur.runtime.core import LENGTH_STEP

AUTO, TORCH = "auto", "torch"


@dataclass(frozen=True)
class Opening:
    """How a model is opened for encoding.

    Attributes:
        model: A model folder, a Hub id, whatever else ``open_model`` takes; or a folder that ``export`` wrote.
        backend: What runs it; ``auto`` is for :func:`.choose` to decide, and means ``torch`` until then.
        dtype: In what it multiplies; ``auto`` as well, and means float32 on a CPU, what is stored on a GPU.
        batch_tokens: Tokens in a batch, padding included; default: by the device.
        length_step: Batches are padded to a multiple of this.
        threads: Its share of the processor; default: all of it.
        calibration: Texts of the run, by which int8 rounds; so a worker elsewhere, which converts anew, does the same.
    """

    model: str
    dtype: str = AUTO
    pooling: SavedPooling | None = None
    max_length: int = MAX_LENGTH
    device: str | None = None
    trust_remote_code: bool = False
    batch_tokens: int | None = None
    length_step: int = LENGTH_STEP
    threads: int | None = None
    backend: str = AUTO
    calibration: tuple[str, ...] = ()

    @property
    def exported(self) -> bool:
        """Whether the model is a folder that ``secateur export`` wrote."""
        return is_export(self.model)

    @property
    def on_cpu(self) -> bool:
        """Whether it runs on the processor."""
        return self.exported or torch.device(self.device or get_device_name()).type == "cpu"
