"""Commands of secateur, one after the other in one process: it takes seconds to import the libraries.

``python tests/several.py prune ... then heal ...``. A written folder is reopened here, and not in a fresh process.
"""

from __future__ import annotations

import itertools
import sys

from conftest import reopen_here
from secateur.cli import main
from secateur.models import save

if __name__ == "__main__":
    save.reopen = reopen_here
    for is_end, words in itertools.groupby(sys.argv[1:], lambda word: word == "then"):
        if not is_end:
            sys.argv = ["secateur", *words]
            try:
                main()
            except SystemExit as ended:
                if ended.code:
                    raise
