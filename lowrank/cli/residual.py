"""The residual of every adapted layer, from the command line."""

from __future__ import annotations

import logging

from lowrank import __version__
from lowrank.adapters.targets import dense_weight, find, host_shape
from lowrank.bases.qr_basis import start_basis
from lowrank.cli.base_model import base, check_folder
from lowrank.config.tools import SAVE_RESIDUAL
from lowrank.errors import Refused
from lowrank.files import writable_folder
from lowrank.formats.residual import write_residual
from lowrank.models.family import DTYPES
from lowrank.models.flux import FLUX

FILE = "flux_residual_weights.safetensors"


def main(argv: list[str] | None = None) -> int:
    """Write `flux_residual_weights.safetensors`; only the transformer is loaded. Raises `Refused`."""
    options = SAVE_RESIDUAL.parse(argv).options
    logging.basicConfig(level="INFO", format="%(message)s")
    check_folder(options.model_path)
    path = writable_folder(options.output_dir) / FILE
    models = FLUX.load(base(options.model_path, options.dtype, options.device), ("denoiser",))
    targets = find("unet", models.denoiser)
    smallest = min(targets, key=lambda t: min(host_shape(t.module)))
    if options.rank > (limit := min(host_shape(smallest.module))):
        raise Refused(f"--rank {options.rank} exceeds the {limit} of {smallest.native}; give {limit} or less")
    modules = {t.native.removeprefix("transformer."): t.module for t in targets}
    weights = {module: dense_weight(host) for module, host in modules.items()}
    bases, facts = start_basis(
        {t.name: dense_weight(t.module) for t in targets},
        {t.name: options.rank for t in targets},
        options.basis_cache_dir,
    )
    names = {t.native.removeprefix("transformer."): t.name for t in targets}
    write_residual(
        path,
        weights,
        lambda module: bases[names[module]],
        DTYPES[options.dtype],
        {
            "lowrank.kind": "residual",
            "lowrank.version": __version__,
            "lowrank.rank": str(options.rank),
            "lowrank.basis_hash": facts["basis_hash"],
            "lowrank.base_hash": FLUX.model_hash(models, "denoiser"),
        },
    )
    size = path.stat().st_size
    print(
        f"{path}: W - QR of {len(weights)} layers at rank {options.rank}, {size / 1e9:.3g} GB "
        f"({options.dtype})"
    )
    return 0
