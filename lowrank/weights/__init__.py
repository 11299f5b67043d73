"""Files and weights: read, compare, merge, export."""
