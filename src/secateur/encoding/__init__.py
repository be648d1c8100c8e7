"""Files of texts made into files of vectors."""
