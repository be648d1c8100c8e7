"""How ``benchmarks/peers.py`` and a peer talk: a JSON object a line, on the peer's standard input and output.

A peer gets its settings as an argument, loads, encodes one text and says ``{"peer": "ready"}``. Then it answers each
``{"texts": FILE, "batch_size": N, "vectors": FILE or null}`` with the seconds that encoding took. Here for those in
Python; those in JavaScript do the same.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Encode = Callable[[list[str], int], Any]
"""Texts and the number of them in a batch, to vectors (texts, dimension)."""


def answer(load: Callable[[dict[str, Any]], tuple[Encode, str]]) -> None:
    """Answer until standard input ends.

    Args:
        load: From settings to a way to encode, and what there is to say of it, if anything.
    """
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print
    encode, note = load(json.loads(sys.argv[1]))
    encode(["What does this function return?"], 1)
    print(json.dumps({"peer": "ready", "note": note}), file=channel, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        texts = json.loads(Path(asked["texts"]).read_text(encoding="utf-8"))
        start = time.perf_counter()
        vectors = encode(texts, asked["batch_size"])
        seconds = time.perf_counter() - start
        if asked["vectors"]:
            np.asarray(vectors, dtype=np.float32).tofile(asked["vectors"])
        print(json.dumps({"peer": "encoded", "seconds": seconds}), file=channel, flush=True)
