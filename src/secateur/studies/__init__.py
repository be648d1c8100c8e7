"""The whole way over models, depths and seeds, in a run folder that resumes."""
