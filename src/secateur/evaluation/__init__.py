"""Scores of models on tasks, with intervals, by mteb."""

import os
import tempfile
from pathlib import Path

if "MTEB_CACHE" not in os.environ:
    # mteb makes its folder when it is imported; in a container, the home folder may be nobody's to write.
    # Secateur keeps nothing there.
    try:
        (Path.home() / ".cache" / "mteb").mkdir(parents=True, exist_ok=True)
    except OSError:
        os.environ["MTEB_CACHE"] = tempfile.gettempdir()
