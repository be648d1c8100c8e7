"""Formulas: losses, curves, intervals, counts."""
