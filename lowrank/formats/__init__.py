"""Adapter files: read, write, convert to other programs' formats, verify, inspect."""
