"""From a profile and a budget to the blocks that are kept."""
