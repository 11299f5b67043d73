"""Several adapters: sum them, compare them, extract a basis they share, run them in a pipeline."""
