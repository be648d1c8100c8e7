"""Every measure at every depth, from one pass over the data."""
