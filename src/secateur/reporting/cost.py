"""What a model costs: parameters, bytes and operations counted, times measured, all on the model as it is.

Times are those of ``encode``, the tokenizer included, which is what a user waits for. Repetitions go around all models
in turn, so that a slow minute of the machine affects each of them alike: ratios between models are steadier than the
times. The first round finds the quickest batch size of each model, warms it up, and is not counted. Models stay open
from round to round as far as the memory goes; the others are opened anew for each of theirs, and warmed up by a text.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil  # type: ignore[import-untyped]
import torch
from accelerate.utils.memory import clear_device_cache
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from sentence_transformers.util import get_device_name
from transformers import AutoConfig

from secateur import runtime
from secateur.clusters import fresh_python
from secateur.data.embedders import BlackBox, open_embedder
from secateur.errors import ConfigError, ModelError
from secateur.files import make_folder
from secateur.measures.costs import FLOPS_TOKENS, flops_per_token, size_of
from secateur.models import is_endpoint, model_names, resolve
from secateur.models.blocks import depth_of, skeleton
from secateur.models.forward import wait
from secateur.models.open_model import check_device
from secateur.options import CostOptions, step
from secateur.progress import Progress, quiet, silent
from secateur.provenance import all_files, fingerprint_files, provenance, versions_of
from secateur.results import CostRow, Costs

SHORT = "Return element {n} of the sequence, or raise an error where there is none."
LONG = " ".join([SHORT] * 16)
"""A short text has some 20 tokens, a long one some 300."""
ROOM = 0.5
"""Share of the free memory that models may hold from round to round; the rest is for the one at work."""
LEAST_SECONDS = 0.3
"""A shorter piece of work is repeated until it takes so long: chance weighs less."""


class Amount(NamedTuple):
    """How much is encoded in one repetition: texts alone, and texts of each kind in the best of some batch sizes."""

    latencies: int
    texts: dict[str, int]
    batches: dict[str, tuple[int, ...]]


QUICK = Amount(5, {"short": 16, "long": 2}, {"short": (4, 16), "long": (1, 2)})
THOROUGH = Amount(30, {"short": 256, "long": 32}, {"short": (1, 4, 16, 64, 256), "long": (1, 2, 4, 8, 16, 32)})


@step(CostOptions)
def cost(options: CostOptions, *, progress: Progress = silent) -> Costs:
    """Count and time models side by side. Of those that do not fit into memory together, one is there at a time.

    Raises:
        ModelError: A model cannot be opened.
        ConfigError: An option has an invalid value, two models have the same name, or one is an endpoint.
        OutputError: ``out`` cannot be written.
    """
    names = model_names(options.models, options.names)
    for model in filter(is_endpoint, options.models):
        raise ConfigError("models", model, f"{model} runs elsewhere: what it costs cannot be measured", "leave it out")
    if options.out is not None:
        make_folder(options.out)
    amount = THOROUGH if options.thorough else QUICK
    check_device(options.device)
    device = torch.device(options.device or get_device_name())
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    timers = [_Timer(name, model, options.device) for name, model in zip(names, options.models, strict=True)]
    turns = options.repetitions + 1
    for turn in range(turns):
        progress("cost", turn, turns)
        for timer in timers if turn % 2 else reversed(timers):
            if turn:
                timer.measure(amount)
            else:
                timer.warm_up(amount)
                timer.count(options.thorough)
            if sum(size_of(other.open)[1] for other in timers if other.open is not None) > ROOM * free:
                timer.close()
    progress("cost", turns, turns)
    costs = Costs(provenance=provenance(), costs=tuple(timer.row for timer in timers))
    if options.out is not None:
        costs.save(options.out)
    return costs


@dataclass
class _Timer:
    """One model, what was counted of it, and its times so far, in seconds; batch sizes and speeds by kind of text."""

    name: str
    source: str | Path
    device: str | None
    open: SentenceTransformer | None = None
    load_seconds: float = 0.0
    counted: dict[str, Any] = field(default_factory=dict)
    batches: dict[str, int] = field(default_factory=dict)
    latencies: list[float] = field(default_factory=list)
    speeds: dict[str, list[float]] = field(default_factory=dict)

    @property
    def model(self) -> SentenceTransformer:
        if self.open is None:
            started = time.perf_counter()
            self.open = open_embedder(self.source, device=self.device)
            self.load_seconds = self.load_seconds or time.perf_counter() - started
            self.encode(texts_of("short", 1), 1)
        return self.open

    def close(self) -> None:
        """Leave the memory to others."""
        self.open = None
        clear_device_cache(garbage_collection=True)

    def warm_up(self, amount: Amount) -> None:
        """Find the quickest batch size of each kind of text."""
        for kind, sizes in amount.batches.items():
            self.encode(texts_of(kind, 1), 1)
            speeds = {batch: self.speed(texts_of(kind, amount.texts[kind]), batch) for batch in sizes}
            self.batches[kind] = max(speeds, key=lambda batch: speeds[batch])

    def measure(self, amount: Amount) -> None:
        short = texts_of("short", amount.texts["short"])
        self.latencies += [self.encode([short[i % len(short)]], 1) for i in range(amount.latencies)]
        for kind, number in amount.texts.items():
            self.speeds.setdefault(kind, []).append(self.speed(texts_of(kind, number), self.batches[kind]))

    def speed(self, texts: Sequence[str], batch: int) -> float:
        """Texts per second, over passes enough that chance does not decide."""
        passes = [self.encode(texts, batch)]
        while sum(passes) < LEAST_SECONDS:
            passes.append(self.encode(texts, batch))
        return len(passes) * len(texts) / sum(passes)

    def encode(self, texts: Sequence[str], batch: int) -> float:
        """Wall time in seconds, that of what it left running on the device included."""
        model = self.model
        wait(model.device)
        started = time.perf_counter()
        with torch.inference_mode():
            model.encode(list(texts), batch_size=batch, show_progress_bar=False)
        wait(model.device)
        return time.perf_counter() - started

    def count(self, thorough: bool) -> None:
        """All that is no time, and what takes a process of its own."""
        model, module = self.model, self.model[0]
        weights = next(model.parameters(), None)
        self.counted = sizes_of(model, self.source) | {
            "bytes": bytes_on_disk(self.source),
            "memory_bytes": size_of(model)[1],
            "load_seconds": self.load_seconds,
            "short_tokens": tokens_of(model, "short"),
            "long_tokens": tokens_of(model, "long"),
            "dtype": module.source.dtype if weights is None else str(weights.dtype).removeprefix("torch."),
            "device": torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else model.device.type,
            "threads": torch.get_num_threads(),
            "files": fingerprint_files(self.source),
            "versions": versions_of(),
        }
        if thorough:
            self.counted |= measure_alone(self.source, str(model.device), self.batches["long"])

    @property
    def row(self) -> CostRow:
        timed: dict[str, Any] = {}
        for kind, prefix in (("short", ""), ("long", "long_")):
            speeds = self.speeds[kind]
            timed[f"{kind}_batch"] = self.batches[kind]
            timed[f"{prefix}texts_per_second"] = statistics.median(speeds)
            timed |= {f"{prefix}speed_low": min(speeds), f"{prefix}speed_high": max(speeds)}
        p50, p95 = (float(np.quantile(self.latencies, share)) for share in (0.5, 0.95))
        return CostRow(model=self.name, latency_p50=p50, latency_p95=p95, **timed, **self.counted)


def tokens_of(model: SentenceTransformer, kind: str) -> float:
    module, texts = model[0], texts_of(kind, 1)
    if isinstance(module, BlackBox) and isinstance(module.source, runtime.Encoder):
        return float(len(module.source.tokenize(texts)[0]))
    return float(model.preprocess(texts)["input_ids"].numel())


def sizes_of(model: SentenceTransformer, source: str | Path) -> dict[str, Any]:
    """Layers, parameters and operations, by the names in a row.

    A static embedding has no layers, and multiplies nothing. An export is counted as the transformer that it was made
    from; its operations are not.
    """
    if isinstance(model[0], StaticEmbedding):
        return {"depth": 0, "parameters": size_of(model)[0], "embedding_parameters": size_of(model)[0]}
    if isinstance(model[0], BlackBox):
        transformer = whole = skeleton(AutoConfig.from_pretrained(source))
        counted = {}
    else:
        whole, transformer = model, model[0].auto_model
        (flops,), tokens = flops_per_token(model, FLOPS_TOKENS)
        counted = {"flops_per_token": flops, "flops_tokens": tokens}
    embeddings, _ = size_of(transformer.get_input_embeddings())
    sizes = {"depth": depth_of(transformer), "parameters": size_of(whole)[0], "embedding_parameters": embeddings}
    return sizes | counted


def texts_of(kind: str, number: int) -> list[str]:
    """Distinct texts, ``short`` of some 20 tokens or ``long`` of some 300."""
    return [(SHORT if kind == "short" else LONG).format(n=n) for n in range(number)]


def bytes_on_disk(model: str | Path) -> int:
    """Bytes of :func:`.all_files` of a model, or of what the Hub's cache holds of it.

    Raises:
        ModelError: The files are not found.
    """
    path = Path(resolve(model))
    if not path.exists():
        try:
            path = Path(snapshot_download(str(model), local_files_only=True))
        except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError) as error:
            raise ModelError(model, "its files are not found") from error
    return sum(file.stat().st_size for file in all_files(path))


# A process of its own -------------------------------------------------------------------------------------------------

_ALONE = "from secateur.reporting.cost import print_load_and_peak; print_load_and_peak(*sys.argv[1:])"


def measure_alone(model: str | Path, device: str, batch: int) -> dict[str, float]:
    """Open a model and encode long texts with it in a fresh process: ``load_seconds`` and ``peak_bytes``.

    The peak is that of the process, of which the libraries take several hundred megabytes; on a GPU it is that of the
    device's memory.

    Raises:
        ModelError: The process failed.
    """
    command = fresh_python(_ALONE, str(model), device, str(batch))
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - this module
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1][:300]
        raise ModelError(model, f"cannot be measured in a process of its own ({reason})")
    return json.loads(done.stdout.splitlines()[-1])


def print_load_and_peak(model: str, device: str, batch: str) -> None:
    """What :func:`measure_alone` runs in the other process."""
    started = time.perf_counter()
    opened = open_embedder(model, device=device)
    loaded = time.perf_counter() - started
    with quiet():
        opened.encode(texts_of("long", int(batch)), batch_size=int(batch), show_progress_bar=False)
    if opened.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(opened.device)
    elif (status := Path("/proc/self/status")).is_file():
        # On Linux, ru_maxrss starts at that of the process which started this one.
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        peak = int(line.split()[1]) * 1024
    else:
        import resource  # of Unix alone

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    sys.stdout.write(json.dumps({"load_seconds": loaded, "peak_bytes": peak}) + "\n")
