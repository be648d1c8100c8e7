"""Model folders and their tensors: found, read in part, written anew, and compared."""
