"""tools/import_lora.py: write adapters of other programs as native files."""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import Tensor

from lowrank import __version__
from lowrank.adapter_file import open_adapter_file
from lowrank.config.tools import IMPORT, ImportAdapter
from lowrank.errors import Refused
from lowrank.formats import base_checkpoint, tlora
from lowrank.formats.delta import is_orthogonal
from lowrank.formats.native import TIMES, Native, largest_difference, method_of, to_native, to_native_tlora
from lowrank.formats.read import Adapter, read_adapter, read_and_report
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
    start = _Start(args)
    adapter = read_and_report(raw, args.base, schedule=config or None, start=start)
    if args.method in ("auto", tlora.METHOD) and _is_tlora(adapter, args.method, bool(config)):
        return _import_tlora(args, adapter, start)
    method = method_of(adapter) if args.method == "auto" else args.method
    base = base_checkpoint.BaseCheckpoint(args.model) if args.model else None
    precision = DTYPES[args.basis_dtype] if args.basis_dtype else None
    native = to_native(adapter, method, base, args.rank, precision, args.basis_cache_dir)
    _write(native, args.target, DTYPES[args.dtype] if args.dtype else None, args.source)
    summary = f"{args.target}: {len(adapter.layers)} layers of {adapter.family} as {method}"
    if native.worst[1]:
        print(
            f"{summary}; projected on the basis of {args.model}: {native.loss:.2%} of ‖ΔW‖ is lost, "
            f"{native.worst[0]:.2%} in the worst layer ({native.worst[1]})"
        )
        return 0
    if native.start_of_base:
        print(f"{summary}; its start Q₀R₀ is that of {args.model}")
        return 0
    apart = difference(adapter, read_adapter(args.target))
    print(f"{summary}; read back, at most {apart:.1e} of a layer's change apart")
    return 0


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

    def __init__(self, args: ImportAdapter) -> None:
        self._args, self.used = args, False
        self._base = functools.cache(lambda: base_checkpoint.BaseCheckpoint(args.model or ""))

    def __call__(self, module: str) -> Tensor:
        if not self._args.model:
            raise Refused(
                f"{self._args.source} has no start for {module}, which are components of the base's weights; "
                "give the base that it was trained on with --model"
            )
        self.used = True
        dtype = DTYPES[self._args.basis_dtype] if self._args.basis_dtype else None
        return self._base().stored(places.places(module)[0][0], dtype)


def _is_tlora(adapter: Adapter, method: str, scheduled: bool) -> bool:
    """Whether a file is imported as a T-LoRA: it has orthogonal factors, or a schedule is known."""
    orthogonal = any(map(is_orthogonal, adapter.raw.values()))
    return method == tlora.METHOD or scheduled or "tlora_T" in adapter.metadata or orthogonal


def _import_tlora(args: ImportAdapter, adapter: Adapter, start: _Start) -> int:
    if adapter.schedule is None:
        raise Refused(
            f"{adapter.source} has the tensors of a plain LoRA and no schedule; give the ranks that were "
            "open at pure noise with --tlora_min_rank, or --method lora"
        )
    native = to_native_tlora(adapter, start.used)
    _write(native, args.target, DTYPES[args.dtype] if args.dtype else None, args.source)
    written = read_adapter(args.target, adapter.family)
    print(
        f"{args.target}: {len(written.layers)} layers of {adapter.family} as tlora; read back, at most "
        f"{largest_difference(adapter, written):.1e} of a layer's change apart at "
        f"t = {', '.join(map(str, TIMES))}"
    )
    return 0


def _write(native: Native, target: str, dtype: torch.dtype | None, source: str) -> None:
    state = {
        key: value if dtype is None or value.dim() == 0 else value.to(dtype)
        for key, value in native.state.items()
    }
    facts = {"lowrank.version": __version__, "lowrank.imported_from": Path(source).name}
    write_tensors(target, state, {**native.metadata, **facts})
