"""One loop, readable top to bottom, and what it needs around it."""
