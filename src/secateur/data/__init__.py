"""Texts, pairs and vectors, from files and to files."""
