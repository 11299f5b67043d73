"""Write a trained file of the null-LoRA fork (a-ru2016/sd-scripts) as a native file: it is a plain LoRA.

    python tools/legacy_files.py old.safetensors native.safetensors --basis basis.safetensors

The names network_null_lalora… come from this fork. In its files `<layer>.alpha_up` and `.alpha_down` are
(h, h), `.s` is (2h,) or `.m` (O,), `.null_up` (O, h) and `.null_down` (h, I), in older files the two swapped.
The basis has a file of its own, with `<layer>.lora_up.weight.basis` (O, K), `.lora_down.weight.basis` (I, K)
and their `.mean`s. The forward of the fork is

    ΔW = (L·α_up + μ_up·1ᵀ)·diag(s₁)·V_N + U_N·diag(s₂)·(α_down·R + 1·μ_downᵀ)      or m ⊙ the same without s

with the basis cut to h directions and no alpha, which is a plain LoRA of rank 2h.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from lowrank.adapter_file import kind_of_key
from lowrank.cli import importing
from lowrank.errors import Refused
from lowrank.naming import keys, places
from lowrank.tensors import read_tensors, write_tensors
from lowrank.unused_keys import refuse_unused, usage

# tensors of the fork's layers: factors, and lengths of ranks and rows
ROLES = ("alpha_up", "alpha_down", "null_up", "null_down", "s", "m")


def plain_lora(
    state: Mapping[str, Tensor], basis: Mapping[str, Tensor], source: str
) -> dict[str, tuple[Tensor, Tensor]]:
    """(U (O, 2h), D (2h, I)) with scale 1 by layer, named as `keys.flat` names them.

    Raises `Refused` for routed files, which have no one ΔW, and for a basis without one of the layers.
    """
    if any(".gate." in key or key == "shared_alpha_down" for key in state):
        raise Refused(
            f"{source} is a routed file (gate, shared_alpha_down), which has another ΔW for each input; "
            "no program reads it; train it again with networks.network_null_lalora_plus_Effi_ABM"
        )
    dotted = {_flat(key.split(".lora_")[0]): key.split(".lora_")[0] for key in basis if ".lora_" in key}
    modules = {}
    for name in sorted(key.removesuffix(".alpha_up") for key in state if key.endswith(".alpha_up")):
        if _flat(name) not in dotted:
            raise Refused(
                f"the basis has no layer {name} of {source}; give the basis file it was trained with"
            )
        factors = {
            role: state[f"{name}.{role}"].double()
            for role in ("alpha_up", "alpha_down", "null_up", "null_down")
        }
        modules[_flat(name)] = _pair(name, factors, state, basis, dotted[_flat(name)])
    return modules


def _pair(
    name: str,
    factors: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    basis: Mapping[str, Tensor],
    at: str,
) -> tuple[Tensor, Tensor]:
    h = len(factors["alpha_up"])
    sides = {}
    for side in ("up", "down"):
        columns, mean = (basis[f"{at}.lora_{side}.weight.{part}"].double() for part in ("basis", "mean"))
        if columns.dim() != 2 or columns.shape[1] < h:
            raise Refused(
                f"{name} needs {h} directions and its {side} basis is {tuple(columns.shape)}; it is another"
            )
        sides[side] = (columns[:, :h], mean)
    (L, mean_up), (R, mean_down) = sides["up"], sides["down"]
    U_N, V_N = factors["null_up"].flatten(1), factors["null_down"].flatten(1)
    if U_N.shape[0] == h != len(L):  # the older meaning of the two names
        U_N, V_N = V_N, U_N
    if (U_N.shape, V_N.shape) != ((len(L), h), (h, len(R))):
        raise Refused(
            f"{name} has null factors {tuple(U_N.shape)} and {tuple(V_N.shape)} where its basis has {len(L)} "
            f"outputs and {len(R)} inputs; give the basis file it was trained with"
        )
    s = state.get(f"{name}.s", torch.ones(2 * h)).double()
    m = state.get(f"{name}.m", torch.ones(len(L))).double()
    W_up = L @ factors["alpha_up"] + mean_up[:, None]  # (O, h)
    W_down = factors["alpha_down"] @ R.mT + mean_down  # (h, I)
    up = torch.cat([W_up * s[:h], U_N * s[h:]], dim=1) * m[:, None]
    return up.float(), torch.cat([V_N, W_down]).float()


def _flat(name: str) -> str:
    """`unet.down.blocks.0…`, `unet_down_blocks_0…` and `te1_text_model…` as `keys.flat` spells them."""
    return keys.flat("lora_" + name.replace(".", "_").removeprefix("lora_"))


def main(argv: list[str] | None = None) -> int:
    """Convert one file, and print what tools/import_lora.py says of it. Raises `Refused`."""
    parser = argparse.ArgumentParser(prog="tools/legacy_files.py", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("source", help="trained file of the fork (alpha_up, alpha_down, null_up, null_down)")
    parser.add_argument("target", help="native .safetensors file to write")
    parser.add_argument("--basis", required=True, help="the basis file that it was trained with")
    parser.add_argument("--base", choices=places.FAMILIES, help="the base model, where names do not tell it")
    parser.add_argument("--strict", action="store_true", help="refuse a file with tensors that are not used")
    args = parser.parse_args(argv)
    state, _ = read_tensors(args.source)
    if not any(name.endswith(".alpha_up") for name in state):
        raise Refused(f"{args.source} is no file of the fork (no alpha_up); give it to tools/import_lora.py")
    unused = [kind_of_key(key) for key in state if key.rpartition(".")[2] not in ROLES]
    if args.strict:
        refuse_unused(args.source, len(state), unused)
    plain = {}
    for name, (up, down) in plain_lora(state, read_tensors(args.basis)[0], args.source).items():
        root = "lora_" + (name.replace("|", "_") if keys.is_flat_text(name) else f"unet_{name}")
        plain |= {f"{root}.lora_up.weight": up, f"{root}.lora_down.weight": down}
        plain[f"{root}.alpha"] = torch.tensor(float(len(down)))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / Path(args.source).name
        write_tensors(path, plain, {})
        code = importing.main([str(path), args.target, *(["--base", args.base] if args.base else [])])
    print(usage(args.source, len(state), unused))
    return code


if __name__ == "__main__":
    try:
        sys.exit(main())
    except Refused as refused:
        sys.exit(f"error: {refused}")
