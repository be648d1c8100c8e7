"""Commands of secateur, one after the other in one process: it takes seconds to import the libraries.

``python tests/several.py FILE prune ... then heal ...``. A written folder is reopened here, and not in a fresh process.
The file gets the environment, as a launcher of several processes has made it.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
from pathlib import Path

from conftest import reopen_here
from secateur.cli import main
from secateur.models import save

if __name__ == "__main__":
    save.reopen = reopen_here
    if os.environ["RANK"] == "0":
        Path(sys.argv[1]).write_text(json.dumps(dict(os.environ)))
    for is_end, words in itertools.groupby(sys.argv[2:], lambda word: word == "then"):
        if not is_end:
            sys.argv = ["secateur", *words]
            try:
                main()
            except SystemExit as ended:
                if ended.code:
                    raise
