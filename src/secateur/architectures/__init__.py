"""Where an architecture keeps its blocks, which of them may go, and how states run through those that stay."""
