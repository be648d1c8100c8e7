"""From a profile and a budget to the layers that are kept."""
