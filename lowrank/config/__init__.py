"""Command line, TOML and JSON to checked values: each flag with its type, default, limits and help text."""
