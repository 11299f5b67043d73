"""tools/import_lora.py: write adapters of other programs as native files."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from lowrank import __version__
from lowrank.adapter_file import open_adapter_file
from lowrank.config.tools import IMPORT, ImportAdapter
from lowrank.errors import Refused
from lowrank.files import staged
from lowrank.formats import base_checkpoint, tlora
from lowrank.formats.delta import is_orthogonal
from lowrank.formats.native import TIMES, Native, largest_difference, method_of, to_native, to_native_tlora
from lowrank.formats.read import Adapter, read_adapter
from lowrank.formats.verify import difference
from lowrank.models.family import DTYPES
from lowrank.naming import places
from lowrank.tensors import write_tensors


def main(argv: list[str] | None = None) -> int:
    """Import one file and print what is lost. Raises `Refused`."""
    args = IMPORT.parse(argv).options
    if Path(args.target).suffix != ".safetensors":
        raise Refused(f"{args.target} is no .safetensors name, and a native file is one; give one")
    if Path(args.target).resolve() == Path(args.source).resolve():
        raise Refused(f"{args.target} is the file that is read, which is not overwritten; give another name")
    raw = open_adapter_file(args.source)
    if any(name.endswith(".alpha_up") for name in raw.state):
        raise Refused(
            f"{args.source} is a file of the null-LoRA fork (alpha_up, alpha_down), which does not have "
            "its basis; convert it with tools/legacy_files.py and the basis file that it was trained with"
        )
    config = _schedule(args)
    base = base_checkpoint.BaseCheckpoint(args.model) if args.model else None
    start = _Start(args, base)
    layers = base.places() if base else ()
    adapter = read_adapter(raw, args.family, base=layers, schedule=config or None, start=start)
    if args.strict:
        adapter.refuse_unused()
    if args.method in ("auto", tlora.METHOD) and _is_tlora(adapter, args.method, bool(config)):
        print(_import_tlora(args, adapter, start))
    else:
        print(_import(args, adapter, base))
    print(adapter.usage)
    return 0


def _import(args: ImportAdapter, adapter: Adapter, base: base_checkpoint.BaseCheckpoint | None) -> str:
    """Write the native file; returns a sentence on it."""
    method = method_of(adapter) if args.method == "auto" else args.method
    precision = DTYPES[args.basis_dtype] if args.basis_dtype else None
    native = to_native(adapter, method, base, args.rank, precision, args.basis_cache_dir)
    summary = f"{args.target}: {len(adapter.layers)} layers of {adapter.family} as {method}"
    with staged(args.target) as part:
        _write(native, part, DTYPES[args.dtype] if args.dtype else None, args.source)
        if native.worst[1]:
            return (
                f"{summary}; projected on the basis of {args.model}: {native.loss:.2%} of ‖ΔW‖ is lost, "
                f"{native.worst[0]:.2%} in the worst layer ({native.worst[1]})"
            )
        if native.start_of_base:
            return f"{summary}; its start Q₀R₀ is that of {args.model}"
        apart = difference(adapter, _written(adapter, part))
    return f"{summary}; read back, at most {apart:.1e} of a layer's change apart"


def _written(adapter: Adapter, file: Path) -> Adapter:
    """A written file, held against the model of the adapter that it was made from."""
    return read_adapter(file, adapter.family, base=adapter.model_layers)


def _schedule(args: ImportAdapter) -> dict[str, float]:
    """The schedule of a T-LoRA that the flags give."""
    given = {"min_rank": args.tlora_min_rank, "alpha": args.tlora_alpha}
    if args.tlora_alpha is not None and args.tlora_min_rank is None:
        raise Refused("--tlora_alpha needs the ranks that a schedule begins at; give --tlora_min_rank too")
    config = {name: value for name, value in given.items() if value is not None}
    if config and args.method not in ("auto", tlora.METHOD):
        raise Refused(f"--tlora_min_rank is for T-LoRA, and --method is {args.method}; leave one out")
    return config


class _Start:
    """W of the base by a layer's name, for a T-LoRA file without its start; `used`: W was read."""

    def __init__(self, args: ImportAdapter, base: base_checkpoint.BaseCheckpoint | None) -> None:
        self._args, self._base, self.used = args, base, False

    def __call__(self, module: str) -> Tensor:
        if self._base is None:
            raise Refused(
                f"{self._args.source} has no start for {module}, which are components of the base's weights; "
                "give the base that it was trained on with --model"
            )
        self.used = True
        dtype = DTYPES[self._args.basis_dtype] if self._args.basis_dtype else None
        return self._base.stored(places.places(module, self._base.per_block)[0][0], dtype)


def _is_tlora(adapter: Adapter, method: str, scheduled: bool) -> bool:
    """Whether a file is imported as a T-LoRA: it has orthogonal factors, or a schedule is known."""
    orthogonal = any(map(is_orthogonal, adapter.raw.values()))
    return method == tlora.METHOD or scheduled or "tlora_T" in adapter.metadata or orthogonal


def _import_tlora(args: ImportAdapter, adapter: Adapter, start: _Start) -> str:
    """Write the native T-LoRA; returns a sentence on it."""
    if adapter.schedule is None:
        raise Refused(
            f"{adapter.source} has the tensors of a plain LoRA and no schedule; give the ranks that were "
            "open at pure noise with --tlora_min_rank, or --method lora"
        )
    native = to_native_tlora(adapter, start.used)
    with staged(args.target) as part:
        _write(native, part, DTYPES[args.dtype] if args.dtype else None, args.source)
        written = _written(adapter, part)
        apart = largest_difference(adapter, written)
    return (
        f"{args.target}: {len(written.layers)} layers of {adapter.family} as tlora; read back, at most "
        f"{apart:.1e} of a layer's change apart at t = {', '.join(map(str, TIMES))}"
    )


def _write(native: Native, target: Path, dtype: torch.dtype | None, source: str) -> None:
    state = {
        key: value if dtype is None or value.dim() == 0 else value.to(dtype)
        for key, value in native.state.items()
    }
    facts = {"lowrank.version": __version__, "lowrank.imported_from": Path(source).name}
    write_tensors(target, state, {**native.metadata, **facts})
