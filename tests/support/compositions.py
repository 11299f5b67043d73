"""Every method with every addition: for test_compositions.py and tools/make_compositions.py."""

from __future__ import annotations

from collections.abc import Callable

from lowrank.adapters.gate import Schedule
from lowrank.adapters.method import Factor, Gate, Method
from lowrank.errors import Refused
from networks import (
    delta_r,
    delta_r_triu,
    dora,
    effilora,
    lalora,
    lora,
    null_lora,
    qrlora,
    tlora,
    universal_lora,
)

FACTORS: dict[str, Callable[[str], Method]] = {  # by name, from a folder for bases
    "lora": lambda cache: lora.method(lora.Options()),
    "delta_r": lambda cache: delta_r.method(delta_r.Options(basis_cache=cache)),
    "delta_r_triu": lambda cache: delta_r_triu.method(delta_r.Options(basis_cache=cache)),
    "qrlora": lambda cache: qrlora.method(qrlora.Options(basis_cache=cache)),
    "tlora": lambda cache: tlora.method(tlora.Options()),
    "null_lora": lambda cache: null_lora.method(null_lora.Options()),
    "universal_lora": lambda cache: universal_lora.method(universal_lora.Options(basis_path="auto:random")),
    "effilora": lambda cache: effilora.method(effilora.Options(num_experts=3)),
}


def _plus(factor: Factor) -> Method:
    sped = set(factor.loraplus) & set(factor.trained)
    if not sped:
        raise Refused("LoRA+ speeds up the trained up factor, and this method trains none")
    return Method("loraplus", rates=dict.fromkeys(sped, 16.0))


def _gate(factor: Factor) -> Method:
    schedule = Schedule(1, 1.0)
    return Method("tlora's gate", gate=Gate(schedule.open, schedule.metadata))


ADDITIONS: dict[str, Callable[[Factor], Method]] = {
    "DoRA": lambda factor: dora.LENGTHS,
    "LaLoRA": lambda factor: lalora.penalty(lalora.Options(lalora_lambda=0.1, lalora_isotropic=True)),
    "experts": lambda factor: effilora.experts(effilora.Options(num_experts=3), factor),
    "T-LoRA's gate": _gate,
    "LoRA+": _plus,
}


def joined(factor: str, addition: str, cache: str = "") -> Method | str:
    """Both methods at once, or the sentence that refuses it."""
    first = FACTORS[factor](cache)
    try:
        return first | ADDITIONS[addition](first.require_factor())
    except Refused as refused:
        return str(refused)


def export(method: Method) -> str:
    """What a file of this combination becomes for other programs."""
    if method.experts is not None and method.gate is not None:
        return "no export: use it live"
    if method.experts is not None:
        return "the nearest LoRA (`--calibrate`)"
    if method.gate is not None:
        return "LoRA with all ranks open, or of one timestep"
    return "DoRA, exact" if method.magnitude is not None else "LoRA, exact"
