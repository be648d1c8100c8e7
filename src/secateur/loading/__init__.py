"""Whatever a user names, opened as a `SentenceTransformer`."""
