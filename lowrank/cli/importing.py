"""Adapters of other programs as native files, from the command line."""

from __future__ import annotations

import argparse
import json
import math
import re
from dataclasses import replace
from pathlib import Path

import torch

from lowrank import __version__
from lowrank.cli.adapter import read, warn_skipped
from lowrank.errors import Refused
from lowrank.formats import base_checkpoint, native_tlora, static
from lowrank.formats.names import read_contents, read_layers
from lowrank.formats.native import METHODS, Native, method_of, to_native
from lowrank.formats.static import Plain
from lowrank.formats.tlora import schedule_of, with_copies, without_copies, without_dead
from lowrank.formats.verify import difference
from lowrank.models.family import DTYPES, reading
from lowrank.naming import places
from lowrank.tensors import read_names, write_tensors

FILE, CONFIG = "adapter_model.safetensors", "adapter_config.json"  # in PEFT's folders
_COMPONENTS = ("unet", "transformer", "text_encoder", "text_encoder_2")


def parser() -> argparse.ArgumentParser:
    """The command line of tools/import_lora.py."""
    made = argparse.ArgumentParser(
        prog="tools/import_lora.py", description="Write another program's adapter as a native file."
    )
    made.add_argument(
        "source", help="LoRA or DoRA of kohya, diffusers, PEFT (its folder) or LyCORIS; official QR-LoRA"
    )
    made.add_argument("target", help="native .safetensors file to write")
    made.add_argument(
        "--method", choices=("auto", *METHODS, "tlora"), default="auto", help="method of the file (auto)"
    )
    made.add_argument(
        "--tlora_min_rank",
        type=int,
        help="ranks a T-LoRA has open at pure noise, where the file does not say",
    )
    made.add_argument("--tlora_alpha", type=float, help="exponent of that schedule (1)")
    made.add_argument("--model", help="base model: what a basis, an official QR file or missing lengths need")
    made.add_argument("--rank", type=int, help="rank of the basis (that of the adapter)")
    made.add_argument(
        "--basis_dtype",
        choices=("fp32", "fp16", "bf16"),
        help="precision the base is trained in, which a basis depends on (as it is stored)",
    )
    made.add_argument("--basis_cache_dir", help="folder where bases are kept")
    made.add_argument("--dtype", choices=("fp32", "fp16", "bf16"), help="precision written (as it is)")
    made.add_argument("--base", choices=places.FAMILIES, help="what the file is for, where it does not tell")
    return made


def main(argv: list[str] | None = None) -> int:
    """Import one file and say what is lost. Raises `Refused`."""
    args = parser().parse_args(argv)
    if Path(args.target).suffix != ".safetensors":
        raise Refused(f"{args.target} is no .safetensors name, and a native file is one; give one")
    if args.rank is not None and args.rank < 1:
        raise Refused(f"--rank {args.rank} is below 1; give 1 or more")
    if Path(args.target).resolve() == Path(args.source).resolve():
        raise Refused(f"{args.target} is the file that is read, which is not overwritten; give another name")
    folder = Path(args.source).is_dir()
    if not folder and any(name.endswith(".alpha_up") for name in read_names(args.source)):
        raise Refused(
            f"{args.source} is a file of the null-LoRA fork (alpha_up, alpha_down), which leaves its basis "
            "out; convert it with tools/legacy_files.py and the basis file that it was trained with"
        )
    if not folder and (report := _masked(args, args.source)):
        print(report)
        return 0
    adapter = peft_folder(args.source, args.base) if folder else read(args.source, args.base)
    method = method_of(adapter) if args.method == "auto" else args.method
    base = base_checkpoint.BaseCheckpoint(args.model) if args.model else None
    precision = DTYPES[args.basis_dtype] if args.basis_dtype else None
    made = to_native(adapter, method, base, args.rank, precision, args.basis_cache_dir)
    _write(made, args.target, DTYPES[args.dtype] if args.dtype else None, args.source)
    told = f"{args.target}: {len(adapter.layers)} layers of {adapter.family} as {method}"
    if method.startswith("delta_r") and made.worst[1]:
        print(
            f"{told}; projected on the basis of {args.model}: {made.loss:.2%} of ‖ΔW‖ is lost, "
            f"{made.worst[0]:.2%} in the worst layer ({made.worst[1]})"
        )
        return 0
    if method == "qrlora" and method_of(adapter) != "qrlora":
        print(f"{told}; its start Q₀R₀ is that of {args.model}")
        return 0
    print(
        f"{told}; read back, at most {difference(adapter, read(args.target)):.1e} of a layer's change apart"
    )
    return 0


def _masked(args: argparse.Namespace, source: str) -> str | None:
    """Import a T-LoRA, with what is said of it; None for a file of another method."""
    given = {"min_rank": args.tlora_min_rank, "alpha": args.tlora_alpha}
    config = {name: value for name, value in given.items() if value is not None}
    if args.tlora_alpha is not None and args.tlora_min_rank is None:
        raise Refused("--tlora_alpha is of a schedule that begins at --tlora_min_rank ranks; give that too")
    if args.tlora_min_rank is not None and args.tlora_min_rank < 1:
        raise Refused(f"--tlora_min_rank {args.tlora_min_rank} is below 1; give 1 or more")
    if args.tlora_alpha is not None and not 0 < args.tlora_alpha < math.inf:
        raise Refused(f"--tlora_alpha {args.tlora_alpha:g} is no number above 0; 1 is the linear schedule")
    if args.method not in ("auto", "tlora"):
        if config:
            raise Refused(
                f"--tlora_min_rank is a T-LoRA's, and --method {args.method} is none; leave one out"
            )
        return None
    layers, metadata, skipped = read_contents(source)
    if args.method == "auto" and not config and not native_tlora.is_masked(layers, metadata):
        return None
    left_out, precision = without_copies(layers), DTYPES[args.basis_dtype] if args.basis_dtype else None
    layers = without_dead(layers)
    schedule = schedule_of(source, layers, metadata, config or None)
    if schedule is None:
        raise Refused(
            f"{source} has the tensors of a plain LoRA and says no schedule; give the ranks that were open "
            "at pure noise with --tlora_min_rank, or --method lora"
        )
    if left_out:
        if not args.model:
            raise Refused(
                f"{source} leaves out the start of {left_out[0]}, components of the base's weights; give the "
                "base that it was trained on with --model"
            )
        base = base_checkpoint.BaseCheckpoint(args.model)
        layers = with_copies(
            layers, lambda one: base.stored(places.places(one)[0][0], precision), metadata, source
        )
    if args.base:
        places.check_family(layers, args.base, source)
    family = args.base or places.adapter_family(layers, metadata, source)
    made = native_tlora.to_native_tlora(layers, metadata, schedule, family, source, bool(left_out))
    _write(made, args.target, DTYPES[args.dtype] if args.dtype else None, args.source)
    warn_skipped(source, skipped)
    back, told = read_layers(args.target)
    opened = schedule_of(args.target, back, told)
    assert opened is not None  # it was written
    return (
        f"{args.target}: {len(back)} layers of {family} as tlora; read back, at most "
        f"{native_tlora.apart(layers, schedule, back, opened):.1e} of a layer's change apart at "
        f"t = {', '.join(map(str, native_tlora.TIMES))}"
    )


def _write(made: Native, target: str, dtype: torch.dtype | None, source: str) -> None:
    state = {
        key: value if dtype is None or value.dim() == 0 else value.to(dtype)
        for key, value in made.state.items()
    }
    told = {"lowrank.version": __version__, "lowrank.imported_from": Path(source).name}
    write_tensors(target, state, {**made.metadata, **told})


def peft_folder(folder: str, family: str | None = None) -> Plain:
    """A folder that PEFT saved, or the folders of several models in one: scales are in their
    configurations."""
    found = [name for name in _COMPONENTS if (Path(folder) / name / CONFIG).is_file()]
    if not found and (Path(folder) / CONFIG).is_file():
        found = [""]
    if not found:
        raise Refused(
            f"{folder} has no {CONFIG}, in it or in a folder named {', '.join(_COMPONENTS)}; give an "
            "adapter that PEFT saved, or a file"
        )
    parts: list[Plain] = []
    for name in found:
        place = Path(folder) / name
        component = name or (Path(folder).name if Path(folder).name in _COMPONENTS else "")
        known = family or ("flux" if component == "transformer" else parts[0].family if parts else None)
        parts.append(_scaled(static.read(place / FILE, known, inside=component), place / CONFIG))
    layers = {place: layer for part in parts for place, layer in part.layers.items()}
    metadata = {key: value for part in parts for key, value in part.metadata.items()}
    return Plain(folder, parts[0].family, layers, metadata)


def _scaled(part: Plain, path: Path) -> Plain:
    """The layers with the scales that PEFT's configuration gives them."""
    with reading("PEFT configuration", path):
        config = json.loads(path.read_text(encoding="utf-8"))
        if config.get("peft_type") != "LORA":
            raise Refused(
                f"{path} is of {config.get('peft_type')}, and only LORA is a LoRA; convert it there"
            )
        alpha, patterns = float(config["lora_alpha"]), dict(config.get("alpha_pattern") or {})
        for name in patterns:
            if not re.fullmatch(r"\^?[\w.]+", name):  # a regular expression of a stranger is not run
                raise Refused(
                    f"{path} has the alpha pattern {name!r}, which is no plain name; name the layers"
                )
        layers = {}
        for place, layer in part.layers.items():
            own = next((float(v) for name, v in patterns.items() if _ends(place.path, name)), alpha)
            root = layer.rank**0.5 if config.get("use_rslora") else layer.rank
            layers[place] = layer._replace(scale=own / root)
    return replace(part, layers=layers, raw={})


def _ends(path: str, name: str) -> bool:
    return path == name.removeprefix("^") or (not name.startswith("^") and path.endswith(f".{name}"))
