"""The command line."""

from secateur.cli.commands import app, main

__all__ = ["app", "main"]
