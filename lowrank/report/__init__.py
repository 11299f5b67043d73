"""The report of a run: its settings, curves, pictures and layers as one HTML page without network access."""
