"""A small world of pictures with known contents, styles and backgrounds, and small models that learn it."""
