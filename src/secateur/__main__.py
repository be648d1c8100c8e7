"""``python -m secateur``, for launchers that start modules."""

from __future__ import annotations

from secateur.cli import main

if __name__ == "__main__":
    main()
