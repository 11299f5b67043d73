"""W_res = W − s·Q·R, the file of QR-LoRA's own workflow: written on request, checked if given, not needed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lowrank.adapters.targets import Layer
from lowrank.bases.qr_basis import QrBasis
from lowrank.errors import Refused
from lowrank.formats.delta import check_shapes
from lowrank.naming import keys
from lowrank.naming.flux_join import strength
from lowrank.tensors import existing_file, stream_tensors

# Relative error of W = W_res + Q·R after rounding W_res and W to the coarsest dtype either is stored in.
_ROUNDING = {torch.float64: 1e-5, torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}


def write_residual(
    path: str | Path,
    weights: Mapping[str, Tensor],
    bases: Callable[[str], QrBasis],
    dtype: torch.dtype,
    metadata: Mapping[str, str],
) -> None:
    """Write `{module}.residual.weight` for every weight (O, I), one at a time, rounded once to `dtype`."""

    def residual(key: str) -> Tensor:
        module = key.removesuffix(".residual.weight")
        basis = bases(module)
        return torch.addmm(weights[module].float(), basis.q, basis.r, alpha=-1.0)

    shapes = {f"{module}.residual.weight": tuple(weight.shape) for module, weight in weights.items()}
    stream_tensors(path, shapes, dtype, residual, metadata)


def residual_file(path: str | Path) -> Path:
    """The path, if a file is there. Raises `Refused`."""
    return existing_file(path, "correct --residual_path or leave it out, it is not needed")


def check_residual(
    path: str | Path,
    layers: Mapping[str, Mapping[str, Tensor]],
    metadata: Mapping[str, str],
    hosts: Mapping[str, Layer],
    sample: int = 8,
) -> str:
    """Check that a residual file belongs to these adapter layers and this base; returns what was checked.

    Compares the facts both files state (base, basis, rank) and, on `sample` layers spread over the model,
    W_res + s·Q·R against W. Raises `Refused` on any mismatch, and where nothing can be compared.
    """
    path = residual_file(path)
    try:
        with safe_open(path, framework="pt") as file:
            file_metadata = dict(file.metadata() or {})
            names = {k.removesuffix(".residual.weight"): k for k in file.keys()}  # noqa: SIM118
            for fact in ("base_hash", "basis_hash", "rank"):
                mine, theirs = file_metadata.get(f"lowrank.{fact}"), metadata.get(f"lowrank.{fact}")
                if mine and theirs and mine != theirs:
                    raise Refused(
                        f"{path} was made with {fact} {mine[:16]} and the adapter with {theirs[:16]}; make "
                        "it again with save_flux_residual.py, or leave --residual_path out, it is not needed"
                    )
            usable = [m for m, roles in layers.items() if {*keys.QR_BASIS} <= roles.keys() and m in hosts]
            if not usable:
                raise Refused(
                    f"nothing in {path} can be compared: no layer of the adapter has both q and base_r, "
                    "it is a LoRA or was saved with --save_basis q; leave --residual_path out, it is not "
                    "needed"
                )
            absent = [module for module in usable if module not in names]
            if absent:
                raise Refused(
                    f"{path} lacks {len(absent)} of the adapter's layers, for example {absent[0]}; it was "
                    "made for other targets or another model; leave --residual_path out, it is not needed"
                )
            compared = usable[:: max(1, len(usable) // sample)]
            for module in compared:
                _check_layer(
                    str(path), module, file.get_tensor(names[module]), layers[module], hosts[module].weight
                )
    except (SafetensorError, OSError) as error:
        raise Refused(
            f"{path} is not a whole safetensors file ({error}); make it again or leave --residual_path out"
        ) from error
    return f"{path} fits: {len(usable)} layers present, {len(compared)} compared"


def _check_layer(
    path: str, module: str, residual: Tensor, roles: Mapping[str, Tensor], weight: Tensor
) -> None:
    W = weight.detach().float().cpu().flatten(1)
    if residual.shape != W.shape:
        raise Refused(
            f"{path}: {module} is {tuple(residual.shape)} and the model's is {tuple(W.shape)}; it belongs to "
            "another model"
        )
    have = check_shapes(module, roles, "the adapter")
    if (have["outputs"], have["inputs"]) != W.shape:
        raise Refused(
            f"{module} is {have['outputs']}×{have['inputs']} in the adapter and {W.shape[0]}×{W.shape[1]} in "
            "the model; the adapter is for another base"
        )
    if residual.dtype not in _ROUNDING:
        raise Refused(
            f"{path} holds {str(residual.dtype).removeprefix('torch.')}, and a residual is fp32, fp16 or "
            "bf16; make it again with save_flux_residual.py"
        )
    q, r = (roles[role].float().flatten(1) for role in keys.QR_BASIS)
    scale = strength(roles, q.shape[1])
    error = float(torch.linalg.norm(residual.float() + scale * (q @ r) - W) / torch.linalg.norm(W))
    limit = max(_ROUNDING[t] for t in (residual.dtype, weight.dtype, roles[keys.QR_BASIS[0]].dtype))
    if error > limit:
        raise Refused(
            f"{path} does not belong to this adapter and base: in {module} W_res + Q·R misses W by "
            f"{error:.1%} (limit {limit:.1%}); base model, rank or basis differ; leave --residual_path out, "
            "it is not needed"
        )
