"""secateur, as ``secateur encode`` does it: the backend and arithmetic that are asked for, or that ``auto`` takes."""

import json
import math
from pathlib import Path

from protocol import answer

from secateur.inference.backends import choose
from secateur.inference.encode import SAMPLE
from secateur.inference.encoders import Opening
from secateur.inference.workers import keep_freed_memory


def load(settings):
    keep_freed_memory()
    names = ("model", "backend", "dtype", "threads")
    opening = Opening(**{name: settings[name] for name in names})
    sample = json.loads(Path(settings["texts"]).read_text(encoding="utf-8"))[:SAMPLE]
    chosen = choose(opening, settings["min_cosine"], sample, math.inf)
    return lambda texts, size: chosen.encoder.encode_texts(texts), f"{chosen.opening.backend} {chosen.opening.dtype}"


answer(load)
