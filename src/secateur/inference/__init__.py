"""Texts to vectors: one encoding core, files of texts, and the server."""
