"""A model folder with the chosen blocks alone."""
