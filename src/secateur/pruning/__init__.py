"""A model folder with the chosen layers alone."""
