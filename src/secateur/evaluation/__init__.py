"""Scores of models on tasks, with intervals, by mteb."""
