"""Cut a language model down to the text encoder you can afford."""
