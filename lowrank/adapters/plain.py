"""The old path of LoRA's factor in `lowrank.adapters.method`."""

from lowrank._moved import moved

__getattr__ = moved(__name__, "lowrank.adapters.method", {"FACTOR": "LORA_FACTOR", "start": "lora_start"})
