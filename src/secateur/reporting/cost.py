"""What a model costs: parameters, bytes and operations counted, times measured, all on the model as it is.

Times are those of ``encode``, the tokenizer included, which is what a user waits for. Repetitions go around all models
in turn, so that a slow minute of the machine hits each of them alike: ratios between models are steadier than the
times. The first round finds the quickest batch of each model, warms it up, and is not counted. Models stay open from
round to round as far as the memory goes; the others are opened anew for each of theirs, and warmed up by a text.
"""

from __future__ import annotations

import gc
import json
import math
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil  # type: ignore[import-untyped]
import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import get_device_name

from secateur.errors import ConfigError, ModelError
from secateur.files import read_json
from secateur.measures.flops import flops_per_token
from secateur.models import demo_model, model_label
from secateur.models.blocks import depth_of, embeddings_of
from secateur.models.forward import wait
from secateur.models.open_model import open_model
from secateur.models.save import MODULES
from secateur.progress import Progress, quiet, silent
from secateur.provenance import fingerprint_files, provenance, versions_of
from secateur.results import CostRow, Costs

SHORT = "Return element {n} of the sequence, or raise an error where there is none."
LONG = " ".join([SHORT] * 16)
"""A short text has some 20 tokens, a long one some 300."""
FLOPS_TOKENS = 128
ROOM = 0.5
"""Share of the free memory that models may hold from round to round; the rest is for the one at work."""
LEAST_SECONDS = 0.3
"""A shorter piece of work is repeated until it takes so long: chance weighs less."""


@dataclass(frozen=True)
class Amount:
    """How much is encoded in one repetition, and the batches that are tried."""

    latencies: int
    short_texts: int
    short_batches: tuple[int, ...]
    long_texts: int
    long_batches: tuple[int, ...]


QUICK = Amount(5, 16, (4, 16), 2, (1, 2))
THOROUGH = Amount(30, 256, (1, 4, 16, 64, 256), 32, (1, 2, 4, 8, 16, 32))


def cost(
    models: Mapping[str, str | Path] | Sequence[str | Path],
    *,
    repetitions: int = 3,
    thorough: bool = False,
    device: str | None = None,
    out: str | Path | None = None,
    progress: Progress = silent,
) -> Costs:
    """Count and time models side by side. Of those that do not fit into memory together, one is there at a time.

    Args:
        models: Anything :func:`.open_model` opens; or name → such.
        repetitions: Timed rounds.
        thorough: Sixteen times as many texts, more batches to choose from, and the load time and peak memory of each
            model in a process of its own. Else the load time is that in this process, and the peak is not measured.
        device: Torch device; default: the GPU where there is one.
        out: Folder for ``costs.json``. It is written too where a model fails after it was timed, without that model.
        progress: Told after each round.

    Raises:
        ModelError: A model cannot be opened.
        ConfigError: No models, two of one name, or no repetitions.
        OutputError: ``out`` cannot be written.
    """
    named = _named(models)
    if repetitions < 1:
        raise ConfigError("repetitions", repetitions, f"{repetitions} rounds are none", "1 or more")
    amount = THOROUGH if thorough else QUICK
    room = ROOM * free_memory(torch.device(device or get_device_name()))
    runs = [_Run(name, model, device) for name, model in named.items()]
    for turn in range(repetitions + 1):
        progress("cost", turn, repetitions + 1)
        for run in runs if turn % 2 else reversed(runs):
            run.take_turn(amount)
            if sum(other.held for other in runs) > room:
                run.close()
    progress("cost", repetitions + 1, repetitions + 1)
    rows: list[CostRow] = []
    failures: list[Exception] = []
    for run in runs:
        try:
            rows.append(run.row(thorough))
        except Exception as error:  # of whatever kind: the times of the others are kept
            failures.append(error)
        run.close()
    costs = Costs(provenance=provenance(), costs=tuple(rows))
    if out is not None and rows:
        costs.save(out)
    if failures:
        raise failures[0]
    return costs


def _named(models: Mapping[str, str | Path] | Sequence[str | Path]) -> dict[str, str | Path]:
    if not models:
        raise ConfigError("models", models, "there are none", "name one at least")
    if isinstance(models, Mapping):
        return dict(models)
    named = {model_label(model): model for model in models}
    if len(named) < len(models):
        raise ConfigError("models", models, "two models have the same name", "rename one of the folders")
    return named


@dataclass
class _Run:
    """One model and its times so far, in seconds."""

    name: str
    source: str | Path
    device: str | None
    open: SentenceTransformer | None = None
    load_seconds: float = 0.0
    batches: dict[str, int] = field(default_factory=dict)
    passes: dict[str, int] = field(default_factory=dict)
    latencies: list[float] = field(default_factory=list)
    speeds: dict[str, list[float]] = field(default_factory=lambda: {"short": [], "long": []})

    @property
    def model(self) -> SentenceTransformer:
        """The model, opened where it is not."""
        if self.open is None:
            started = time.perf_counter()
            self.open = open_model(self.source, device=self.device)
            self.load_seconds = self.load_seconds or time.perf_counter() - started
            self._encode(short_texts(1), 1)
        return self.open

    @property
    def held(self) -> int:
        """Bytes of its weights in memory; 0 while it is closed."""
        return bytes_in_memory(self.open) if self.open is not None else 0

    def close(self) -> None:
        """Leave the memory to others."""
        self.open = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def take_turn(self, amount: Amount) -> None:
        """One repetition, or before the first one what is needed for them."""
        if self.batches:
            self.measure(amount)
        else:
            self.warm_up(amount)

    def warm_up(self, amount: Amount) -> None:
        """Find the quickest batch of each kind of text."""
        for kind, texts, batches in (
            ("short", short_texts(amount.short_texts), amount.short_batches),
            ("long", long_texts(amount.long_texts), amount.long_batches),
        ):
            self._encode(texts[:1], 1)
            seconds = {batch: self._quickest(texts, batch) for batch in batches if batch <= len(texts)}
            self.batches[kind] = min(seconds, key=lambda batch: seconds[batch])
            self.passes[kind] = math.ceil(LEAST_SECONDS / min(seconds.values()))

    def _quickest(self, texts: Sequence[str], batch: int) -> float:
        """Of several passes, where they are so quick that chance would decide between batches."""
        passes = [self._encode(texts, batch)]
        while sum(passes) < LEAST_SECONDS:
            passes.append(self._encode(texts, batch))
        return min(passes)

    def measure(self, amount: Amount) -> None:
        """One repetition."""
        short, long = short_texts(amount.short_texts), long_texts(amount.long_texts)
        alone = [short[i % len(short)] for i in range(amount.latencies)]
        self.latencies += [self._encode([text], 1) for text in alone]
        for kind, texts in (("short", short), ("long", long)):
            passes = self.passes[kind]
            seconds = sum(self._encode(texts, self.batches[kind]) for _ in range(passes))
            self.speeds[kind].append(passes * len(texts) / seconds)

    def _encode(self, texts: Sequence[str], batch: int) -> float:
        encode: Callable[[], Any] = lambda: self.model.encode(list(texts), batch_size=batch, show_progress_bar=False)  # noqa: E731
        return seconds_of(encode, self.model.device)

    def row(self, thorough: bool) -> CostRow:
        transformer = self.model[0].auto_model
        flops, tokens = flops_per_token(self.model, FLOPS_TOKENS)
        alone = measure_alone(self.source, str(self.model.device), self.batches["long"]) if thorough else {}
        long = self.speeds["long"]
        return CostRow(
            model=self.name,
            depth=depth_of(transformer),
            parameters=sum(parameter.numel() for parameter in self.model.parameters()),
            embedding_parameters=sum(parameter.numel() for parameter in embeddings_of(transformer).parameters()),
            bytes=bytes_on_disk(self.source),
            texts_per_second=statistics.median(self.speeds["short"]),
            speed_low=min(self.speeds["short"]),
            speed_high=max(self.speeds["short"]),
            memory_bytes=bytes_in_memory(self.model),
            peak_bytes=int(alone["peak"]) if alone else None,
            flops_per_token=flops,
            flops_tokens=tokens,
            load_seconds=alone.get("load", self.load_seconds),
            latency_p50=float(np.quantile(self.latencies, 0.5)),
            latency_p95=float(np.quantile(self.latencies, 0.95)),
            short_tokens=self._tokens(short_texts(1)),
            short_batch=self.batches["short"],
            long_tokens=self._tokens(long_texts(1)),
            long_batch=self.batches["long"],
            long_texts_per_second=statistics.median(long),
            long_speed_low=min(long),
            long_speed_high=max(long),
            dtype=str(next(self.model.parameters()).dtype).removeprefix("torch."),
            device=device_name(self.model.device),
            threads=torch.get_num_threads(),
            files=fingerprint_files(self.source),
            versions=versions_of(),
        )

    def _tokens(self, texts: list[str]) -> float:
        return float(self.model.preprocess(texts)["input_ids"].shape[1])


def short_texts(count: int) -> list[str]:
    """Distinct texts of some 20 tokens."""
    return [SHORT.format(n=n) for n in range(count)]


def long_texts(count: int) -> list[str]:
    """Distinct texts of some 300 tokens."""
    return [LONG.format(n=n) for n in range(count)]


def seconds_of(work: Callable[[], Any], device: torch.device) -> float:
    """Wall time of some work, that which it left running on the device included."""
    wait(device)
    started = time.perf_counter()
    with torch.inference_mode():
        work()
    wait(device)
    return time.perf_counter() - started


def device_name(device: torch.device) -> str:
    """``cpu``, or the name of the GPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def bytes_in_memory(model: SentenceTransformer) -> int:
    """Bytes of a model's parameters and buffers."""
    return sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a GPU, or in this machine's memory."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def bytes_on_disk(model: str | Path) -> int:
    """Bytes of a model's files: in its folder and its modules', of a GGUF file, or what the Hub's cache holds."""
    path = demo_model() if str(model) == "smollm2" and not Path(model).exists() else Path(model).expanduser()
    if path.is_file():
        return path.stat().st_size
    if not path.is_dir():
        try:
            path = Path(snapshot_download(str(model), local_files_only=True))
        except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError) as error:
            raise ModelError(model, "its files are not found") from error
    return sum(file.stat().st_size for file in _own_files(path))


def _own_files(folder: Path) -> list[Path]:
    """Other folders in a model's are no part of it, such as a model that was cut from it."""
    modules = read_json(folder / MODULES) if (folder / MODULES).is_file() else []
    places = {str(module["path"]) for module in modules} - {"", "."}
    found = {*folder.iterdir(), *(file for place in places for file in (folder / place).rglob("*"))}
    return [file for file in found if file.is_file()]


_ALONE = "import sys; from secateur.reporting.cost import report_alone; report_alone(*sys.argv[1:])"


def measure_alone(model: str | Path, device: str, batch: int) -> dict[str, float]:
    """Open a model and encode long texts with it in a fresh process: ``load`` in seconds and ``peak`` in bytes.

    The peak is that of the process, of which the libraries take several hundred megabytes; on a GPU it is that of the
    device's memory.

    Raises:
        ModelError: The process failed.
    """
    command = [sys.executable, "-c", _ALONE, str(model), device, str(batch)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - this module
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1][:300]
        raise ModelError(model, f"cannot be measured in a process of its own ({reason})")
    measured: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return measured


def report_alone(model: str, device: str, batch: str) -> None:
    """What :func:`measure_alone` runs: measure this process, and write the result to its standard output."""
    started = time.perf_counter()
    opened = open_model(model, device=device)
    loaded = time.perf_counter() - started
    with quiet():
        opened.encode(long_texts(int(batch)), batch_size=int(batch), show_progress_bar=False)
    on_gpu = opened.device.type == "cuda"
    peak = torch.cuda.max_memory_allocated(opened.device) if on_gpu else peak_memory()
    sys.stdout.write(json.dumps({"load": loaded, "peak": peak}) + "\n")


def peak_memory() -> int:
    """The most memory that this process held, in bytes.

    Linux tells it in ``/proc``: there, ``ru_maxrss`` starts at that of the process which started this one.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
