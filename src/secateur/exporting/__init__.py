"""Model folders for other runtimes, compared with the original before they are done."""
