"""``python -m secateur``, for launchers that start modules."""

from __future__ import annotations

import sys

from secateur.cli import main

if __name__ == "__main__":
    sys.argv[0] = "secateur"  # as results name the command
    main()
