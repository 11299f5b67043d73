"""The old path of `lowrank.adapters.network_module`."""

from lowrank._moved import moved

__getattr__ = moved(__name__, "lowrank.adapters.network_module")
