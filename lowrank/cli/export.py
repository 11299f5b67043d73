"""tools/export_lora.py: write adapters as files of other programs, or merged into a checkpoint."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowrank import __version__
from lowrank.adapter_file import RawFile
from lowrank.cli.base_model import base as base_source
from lowrank.cli.base_model import model_family
from lowrank.cli.calibrate import attached, nearest_lora
from lowrank.config.command_line import Parsed
from lowrank.config.tools import EXPORT, Export
from lowrank.errors import Refused
from lowrank.files import staged
from lowrank.formats import base_checkpoint, merging, verify
from lowrank.formats.delta import LORA
from lowrank.formats.foreign import refuse_foreign
from lowrank.formats.native import to_native
from lowrank.formats.read import Adapter, baked, read_adapter
from lowrank.formats.resize import Loss, RankRule, as_pairs, resize
from lowrank.formats.tlora import check_sidecar, export_lycoris, ranks_of, write_sidecar
from lowrank.formats.verify import difference
from lowrank.formats.write import only, readers_of, write
from lowrank.formats.writers import Choices
from lowrank.models.family import DTYPES, Family, Models
from lowrank.models.single import is_file
from lowrank.naming.families import layers_of
from lowrank.naming.places import FAMILIES, LayerPath
from lowrank.tensors import write_tensors

MERGED, MASKED = "merged", "lycoris-tlora"


def main(argv: list[str] | None = None) -> int:
    """Export one file and print how exact it is. Raises `Refused`."""
    parsed = EXPORT.parse(argv)
    args = parsed.options
    if args.to == MERGED and not args.model:
        raise Refused("--to merged needs the base model; give it with --model")
    if Path(args.target).resolve() == Path(args.source).resolve():
        raise Refused(f"{args.target} is the adapter itself, which is not overwritten; give another name")
    if args.strength != 1.0 and args.to != MERGED:
        raise Refused(f"--strength {args.strength:g} is for --to merged; set it where the adapter is used")
    if args.calibrate and not args.model:
        raise Refused("--calibrate draws pictures with the base model; give it with --model")
    if args.calibrate and args.at_timestep is not None:
        raise Refused("--calibrate is for experts and --at-timestep for T-LoRA; leave one out")
    if args.to == MASKED:
        _refuse_unmasked(parsed)
        return _export_lycoris(args)
    base = base_checkpoint.BaseCheckpoint(args.model) if args.model else None
    layers = _layers(base, args.parts) if base else ()
    live: str | RawFile = args.source
    if args.calibrate and args.model:
        live, summary = nearest_lora(args.source, args.model, args.calibrate)
        print(summary)
    wide = None if args.at_timestep is None else torch.float32
    adapter = read_adapter(live, args.family, base=layers, precision=wide, foreign=wide is None)
    if args.at_timestep is not None:
        adapter = baked(adapter, args.at_timestep)
        native = to_native(adapter, LORA.name)
        live = RawFile(native.state, native.metadata, args.source)
    print(_export(args, adapter, live, base).usage)
    return 0


def _layers(base: base_checkpoint.BaseCheckpoint, parts: str) -> set[LayerPath]:
    """The layers of the base, and any layer of the parts that are not exported."""
    others = {place for name in FAMILIES for place in layers_of(name, base.per_block)}
    left_out = {place for place in others if parts != "all" and (place.part == "unet") != (parts == "unet")}
    return {*base.places(), *left_out}


def _export_lycoris(args: Export) -> int:
    adapter = read_adapter(args.source, strict=False)
    if args.strict:
        adapter.refuse_unused()
    state, metadata, config = export_lycoris(adapter.raw, adapter.metadata, adapter.schedule, adapter.source)
    ranks, folder = sorted(ranks_of(state)), Path(args.target).parent
    check_sidecar(folder, config)
    with staged(args.target) as part:
        write_tensors(part, state, metadata)
        apart = difference(adapter, read_adapter(part, strict=False))
        if apart > 1e-6:
            raise Refused(
                f"{args.target}, read back, differs by {apart:.1e} of a layer's change from {args.source} "
                "(limit 1e-06); write a plain LoRA with --to kohya"
            )
        write_sidecar(folder, config)
    print(
        f"{args.target}: T-LoRA of rank {', '.join(map(str, ranks))} for LyCORIS; read back, the largest "
        f"relative difference of a layer is {apart:.1e}"
    )
    print(adapter.usage)
    return 0


def _refuse_unmasked(parsed: Parsed[Export]) -> None:
    """Raise `Refused` for flags that have no effect on a T-LoRA, which is written tensor by tensor."""
    args = parsed.options
    if Path(args.target).suffix != ".safetensors":
        raise Refused(
            f"{args.target} is no .safetensors name, and --to {MASKED} writes one such file; give one"
        )
    for name in ("model", "dtype", "rank", "parts", "family", "at_timestep", "calibrate"):
        if name in parsed.given:
            raise Refused(f"--{name} has no effect with --to {MASKED}; leave it out, or write --to kohya")


def _export(
    args: Export, adapter: Adapter, live: str | RawFile, base: base_checkpoint.BaseCheckpoint | None
) -> Adapter:
    """Write the adapter, and return what of it was written.

    `live` is the file, or its tensors in memory, whose network the export is compared with.

    The file appears under its name only after it was read back.
    """
    whole = len(adapter.layers)
    adapter = only(adapter, args.parts)
    if len(adapter.layers) < whole:
        print(f"--parts {args.parts}: {whole - len(adapter.layers)} of {whole} layers are not exported")
    method = adapter.method
    if method is not None and method.gate is not None:
        group = "1" if method.require_factor().copy is None else "2"  # ranks that open together
        gate = {"tlora_group": group, "lowrank.gated_by": method.name}
        adapter = dataclasses.replace(adapter, metadata={**adapter.metadata, **gate})
        print(
            f"{method.name} opens fewer ranks at noisy timesteps; the file's metadata have the schedule, and "
            "programs that do not read it use all ranks at every step (--at-timestep bakes one timestep)"
        )
    adapter = _of_rank(args, adapter, base)
    if args.strict:
        adapter.refuse_unused()
    if args.to == MERGED:
        assert base is not None  # checked in main
        merging.check_target(base, args.target)
        write_file = _merge
    else:
        write_file = _write
    with staged(args.target) as part:
        lines = write_file(args, adapter, base, part)
        if args.verify == "forward" or (args.verify == "auto" and args.model and args.to != MERGED):
            lines.append(_compare_forward(args, adapter, live, part))
    print("\n".join(lines))
    return adapter


def _merge(
    args: Export, adapter: Adapter, base: base_checkpoint.BaseCheckpoint | None, part: Path
) -> list[str]:
    """Merge the adapter into the base; returns what was written as lines of text."""
    assert base is not None  # checked in main
    facts = {"lowrank.version": __version__, "lowrank.merged": Path(args.source).name}
    facts |= {key: value for key, value in adapter.metadata.items() if key.startswith("lowrank.unrouted")}
    dtype = DTYPES[args.dtype] if args.dtype else None
    merged = merging.merge(base, adapter.layers, part, facts, args.strength, dtype, adapter.foreign)
    count = len(adapter.layers.keys() | adapter.foreign.keys())
    line = (
        f"{args.target}: {count} layers merged at strength {args.strength:g}; rounding to the "
        f"model's precision loses {merged.lost:.1e} of the change"
    )
    if not merged.kept:
        return [line]
    names = ", ".join(merged.kept[:8]) + (", …" if len(merged.kept) > 8 else "")
    return [line, f"{len(merged.kept)} tensors overflow in {args.dtype} and keep the base's dtype: {names}"]


def _write(
    args: Export, adapter: Adapter, base: base_checkpoint.BaseCheckpoint | None, part: Path
) -> list[str]:
    """Write the adapter in another program's format; returns what was written and read back as text."""
    if base is not None:
        base.check(adapter.layers)
    choices = Choices(DTYPES[args.dtype] if args.dtype else None, args.dora_norm, base, flat_clip())
    files = write(adapter, args.to, part, choices)
    targets = [Path(args.target) / file.relative_to(part) for file in files]  # part/. is the target itself
    lines = [f"{', '.join(map(str, targets))}: {described(adapter)}; read by {readers_of(adapter, args.to)}"]
    if args.verify == "off":
        return lines
    checked = verify.check_export(adapter, args.to, part, choices)
    lines += map(checked_text, checked)
    if not checked:
        lines.append("not read back: no program for it is installed, or it has more layers than any model")
    return lines


def checked_text(result: verify.Checked) -> str:
    """What reading a written file back showed, in a sentence."""
    return result.note or (
        f"read back by {result.reader}: {result.layers} layers, at most {result.worst:.1e} of a change apart"
    )


def _of_rank(args: Export, adapter: Adapter, base: base_checkpoint.BaseCheckpoint | None) -> Adapter:
    """The adapter with the ranks that were asked for, as pairs of factors where the format needs them."""
    if args.rank is not None:
        rule, others = RankRule(*args.rank), adapter.foreign
        adapter, loss = resize(adapter, rule)
        if adapter.layers:
            print(f"{_ranks(adapter)}: {lost_text(loss)}")
        if any(layer.changes_matrix for layer in others.values()):
            kinds = Counter(layer.kind.name for layer in others.values() if layer.changes_matrix)
            adapter, loss = as_pairs(adapter, rule, base)
            counts = ", ".join(f"{name} × {count}" for name, count in kinds.items())
            print(f"{counts}: the nearest LoRA, {_ranks(adapter)}: {lost_text(loss)}")
    if args.to != MERGED and adapter.foreign:
        if matrices := [layer for layer in adapter.foreign.values() if layer.changes_matrix]:
            refuse_foreign(matrices, adapter.source)
        adapter = adapter.without_foreign()  # changes of norm layers and biases, which only a merge keeps
        if not adapter.layers:
            raise Refused(
                f"{adapter.source} has only changes of norm layers and biases, and a {args.to} file has "
                "none; merge it with --to merged --model BASE"
            )
    return adapter


def lost_text(loss: Loss) -> str:
    """What smaller ranks lose, in a sentence."""
    return f"{loss.together:.2%} of ‖ΔW‖ is lost, {loss.worst:.2%} in the worst layer ({loss.layer})"


def flat_clip() -> bool:
    """Whether the CLIPTextModel of the installed transformers has paths without `text_model`."""
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.device("meta"):
        tiny = CLIPTextModel(CLIPTextConfig(num_hidden_layers=1, vocab_size=8))
    return not hasattr(tiny, "text_model")


def described(adapter: Adapter) -> str:
    """The number of an adapter's layers and their ranks."""
    return f"{len(adapter.layers)} layers of {_ranks(adapter)}"


def _ranks(adapter: Adapter) -> str:
    ranks = sorted({layer.rank for layer in adapter.layers.values()})
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"rank {ranks[0]}–{ranks[-1]}"


# ---------- one forward of the model


def _compare_forward(args: Export, adapter: Adapter, live: str | RawFile, part: Path) -> str:
    difference = forward_difference(live, adapter, args.to, part, args.model, args.strength)
    if isinstance(difference, str):
        return f"no forward compared: {difference}"
    exact = args.dtype in (None, "fp32") and args.rank is None
    if exact and difference > 1e-5:
        raise Refused(
            f"one forward of {args.model} differs by {difference:.1e} of its output between {args.source} "
            f"and {args.target} (limit 1e-05); export to another format with --to, or merge with --to merged"
        )
    return f"one forward of the model: {difference:.1e} of its output apart"


def forward_difference(
    live: str | RawFile, adapter: Adapter, to: str, target: Path, model: str | None, strength: float = 1.0
) -> float | str:
    """‖theirs − ours‖/‖ours‖ of the denoiser's output for one noise, or why none can be compared.

    Ours is the live network of the file's method with all ranks open, as in an export; theirs is the model
    with the export loaded by its program. The model is loaded in fp32.
    """
    if adapter.method is None:
        return f"{adapter.source} names no method of networks/, so there is no live network to compare"
    if not model or (is_file(model) and "flux" in adapter.family):
        return "it needs the folder of a diffusers model, or one file of SD or SDXL (--model)"
    origin = base_source(model, "fp32", "cpu")
    family = model_family(origin)
    models = family.load(origin, ("denoiser",))
    inputs = example_inputs(models, family)
    denoiser: Any = models.denoiser
    network = attached(live, models, strength)
    with network.denoise_at(torch.zeros_like(inputs["timesteps"])):
        ours = _predict(models, family, inputs)
    network.restore()
    if to == MERGED:
        models = family.load(base_source(str(target), "fp32", "cpu"), ("denoiser",))
        theirs = _predict(models, family, inputs)
    else:
        loader = _loader(to, adapter)
        if loader is None:
            return f"no installed program loads a {to} file of this kind into a model of diffusers"
        loader(denoiser, target)
        theirs = _predict(models, family, inputs)
    return float((theirs - ours).norm() / ours.norm())


def _loader(to: str, adapter: Adapter) -> Callable[[Any, Path], None] | None:
    readers = verify.readers(to, adapter, Choices())
    if "diffusers" in readers:
        return lambda denoiser, path: verify.load_by_diffusers(path, adapter, denoiser)
    if "PEFT" in readers:
        return lambda denoiser, path: verify.load_by_peft(path, adapter, denoiser)
    if "LyCORIS" in readers:
        return lambda denoiser, path: verify.load_by_lycoris(path, denoiser)
    return None


def example_inputs(models: Models, family: Family) -> dict[str, Any]:
    """One noise and one random text of the model's sizes, equal at every call."""
    config, generator = models.configs["denoiser"], torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    if family.name == "flux":
        width = config["in_channels"] // 4
        text = {"t5": random(1, 8, config["joint_attention_dim"])}
        text["pooled"] = random(1, config["pooled_projection_dim"])
    else:
        width, text = config["in_channels"], {"context": random(1, 8, config["cross_attention_dim"])}
        if added := config.get("projection_class_embeddings_input_dim"):
            text["pooled"] = random(1, added - 6 * config["addition_time_embed_dim"])
            text["time_ids"] = torch.tensor([[64.0, 64.0, 0.0, 0.0, 64.0, 64.0]])
    return {"noise": random(1, width, 8, 8), "timesteps": torch.tensor([500.0]), "text": text}


def _predict(models: Models, family: Family, inputs: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        output = family.denoise(
            models.denoiser, inputs["noise"], inputs["timesteps"], inputs["text"], family.options()
        )
    return output.double()
