"""Whatever a user names, opened as a SentenceTransformer; where its layers are, and which of them may go."""
