"""The OpenAI embeddings API over a model folder or an export."""
