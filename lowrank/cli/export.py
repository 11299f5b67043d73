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
from lowrank.formats import base_checkpoint, merging, verify
from lowrank.formats.delta import LORA
from lowrank.formats.foreign import refuse_foreign
from lowrank.formats.native import to_native
from lowrank.formats.read import Adapter, baked, read_adapter, read_and_report
from lowrank.formats.resize import Loss, RankRule, as_pairs, resize
from lowrank.formats.tlora import export_lycoris, ranks_of
from lowrank.formats.verify import difference
from lowrank.formats.write import only, readers_of, write
from lowrank.formats.writers import Choices
from lowrank.models.family import DTYPES, Family, Models
from lowrank.models.single import is_file

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
    if args.calibrate and args.model:
        raw, summary = nearest_lora(args.source, args.model, args.calibrate)
        print(summary)
        return _export(args, read_and_report(raw, args.base, foreign=True), raw)
    if args.at_timestep is None:
        return _export(args, read_and_report(args.source, args.base, foreign=True), args.source)
    adapter = baked(read_and_report(args.source, args.base, precision=torch.float32), args.at_timestep)
    native = to_native(adapter, LORA.name)
    return _export(args, adapter, RawFile(native.state, native.metadata, args.source))


def _export_lycoris(args: Export) -> int:
    adapter = read_and_report(args.source, strict=False)
    state = export_lycoris(adapter.raw, adapter.metadata, adapter.schedule, adapter.source, args.target)
    ranks = sorted(ranks_of(state))
    apart = difference(adapter, read_adapter(args.target, strict=False))
    print(
        f"{args.target}: T-LoRA of rank {', '.join(map(str, ranks))} for LyCORIS; read back, the largest "
        f"relative difference of a layer is {apart:.1e}"
    )
    return 0


def _refuse_unmasked(parsed: Parsed[Export]) -> None:
    """Raise `Refused` for flags that have no effect on a T-LoRA, which is written tensor by tensor."""
    args = parsed.options
    if Path(args.target).suffix != ".safetensors":
        raise Refused(
            f"{args.target} is no .safetensors name, and --to {MASKED} writes one such file; give one"
        )
    for name in ("model", "dtype", "rank", "parts", "base", "at_timestep", "calibrate"):
        if name in parsed.given:
            raise Refused(f"--{name} has no effect with --to {MASKED}; leave it out, or write --to kohya")


def _export(args: Export, adapter: Adapter, live: str | RawFile) -> int:
    """Write the adapter; `live` is the file, or its tensors in memory, whose network it is compared with."""
    adapter = only(adapter, args.parts)
    method = adapter.method
    if method is not None and method.gate is not None:
        group = "1" if method.require_factor().copy is None else "2"  # ranks that open together
        gate = {"tlora_group": group, "lowrank.gated_by": method.name}
        adapter = dataclasses.replace(adapter, metadata={**adapter.metadata, **gate})
        print(
            f"{method.name} opens fewer ranks at noisy timesteps; the file's metadata have the schedule, and "
            "programs that do not read it use all ranks at every step (--at-timestep bakes one timestep)"
        )
    base = base_checkpoint.BaseCheckpoint(args.model) if args.model else None
    adapter = _of_rank(args, adapter, base)
    dtype = DTYPES[args.dtype] if args.dtype else None
    if args.to == MERGED:
        assert base is not None  # checked above
        facts = {"lowrank.version": __version__, "lowrank.merged": Path(args.source).name}
        facts |= {key: value for key, value in adapter.metadata.items() if key.startswith("lowrank.unrouted")}
        lost = merging.merge(base, adapter.layers, args.target, facts, args.strength, dtype, adapter.foreign)
        count = len(adapter.layers.keys() | adapter.foreign.keys())
        print(
            f"{args.target}: {count} layers merged at strength {args.strength:g}; rounding to the model's "
            f"precision loses {lost:.1e} of the change"
        )
        if args.verify == "forward":
            _compare_forward(args, adapter, live)
        return 0
    if base is not None:
        base.check(adapter.layers)
    choices = Choices(dtype, args.dora_norm, base, flat_clip())
    files = write(adapter, args.to, args.target, choices)
    print(f"{', '.join(map(str, files))}: {described(adapter)}; read by {readers_of(adapter, args.to)}")
    if args.verify != "off":
        checked = verify.check_export(adapter, args.to, Path(args.target), choices)
        for result in checked:
            print(
                result.note
                or f"read back by {result.reader}: {result.layers} layers, at most {result.worst:.1e} of a "
                "change apart"
            )
        if not checked:
            print("not read back: no program for it is installed, or it has more layers than any model")
    if args.verify == "forward" or (args.verify == "auto" and args.model):
        _compare_forward(args, adapter, live)
    return 0


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
        print(
            f"{len(adapter.foreign)} changes of norm layers and biases are left out: a {args.to} file has "
            "none (--to merged keeps them)"
        )
        if not adapter.layers:
            raise Refused(f"{adapter.source} has nothing else; merge it with --to merged --model BASE")
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


def _compare_forward(args: Export, adapter: Adapter, live: str | RawFile) -> None:
    difference = forward_difference(live, adapter, args.to, Path(args.target), args.model, args.strength)
    if isinstance(difference, str):
        print(f"no forward compared: {difference}")
        return
    exact = args.dtype in (None, "fp32") and args.rank is None
    if exact and difference > 1e-5:
        raise Refused(
            f"one forward of {args.model} differs by {difference:.1e} of its output between {args.source} "
            f"and {args.target} (limit 1e-05); export to another format with --to, or merge with --to merged"
        )
    print(f"one forward of the model: {difference:.1e} of its output apart")


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
