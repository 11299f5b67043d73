"""The memory that a step needs, from a step without values."""
