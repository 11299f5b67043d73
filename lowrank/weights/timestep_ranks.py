"""The old path of `lowrank.combine.pipeline`."""

from lowrank._moved import moved

__getattr__ = moved(__name__, "lowrank.combine.pipeline")
