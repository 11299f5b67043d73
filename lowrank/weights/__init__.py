"""The old place of `lowrank.combine` and `lowrank.formats`; only documented paths are left."""
