"""Adapters as files of other programs, from the command line: export, resize, merge into a checkpoint,
verify."""

from __future__ import annotations

import argparse
import dataclasses
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowrank import __version__
from lowrank.cli.adapter import made_by, read
from lowrank.cli.base_model import base as base_source
from lowrank.cli.base_model import model_family
from lowrank.cli.calibrate import attached, write_nearest
from lowrank.errors import Refused
from lowrank.formats import base_checkpoint, verify
from lowrank.formats.convert import PARTS, only, resize, write
from lowrank.formats.export import export_lora, export_lycoris, ranks_of, worst_difference
from lowrank.formats.formats import FORMATS, Choices
from lowrank.formats.static import Plain
from lowrank.models.family import DTYPES, Family, Models
from lowrank.models.single import is_file
from lowrank.naming import places

MERGED, MASKED = "merged", "lycoris-tlora"


def parser() -> argparse.ArgumentParser:
    """The command line of tools/export_lora.py."""
    made = argparse.ArgumentParser(
        prog="tools/export_lora.py",
        description="Write an adapter as a file of another program, and read it back.",
    )
    made.add_argument("source", help="adapter file of any method or dialect")
    made.add_argument("target", help="file to write; a folder for peft, and for merged where the base is one")
    made.add_argument("--to", choices=(*FORMATS, MASKED, MERGED), default="kohya", help="format (kohya)")
    made.add_argument("--model", help="base model: folder of a diffusers model, or one checkpoint file")
    made.add_argument("--dtype", choices=("fp32", "fp16", "bf16"), help="precision written (as it is)")
    made.add_argument("--rank", type=int, help="largest rank of a layer, by SVD; what is lost is said")
    made.add_argument("--parts", choices=PARTS, default="all", help="which layers (all)")
    made.add_argument("--base", choices=places.FAMILIES, help="what the file is for, where it does not tell")
    made.add_argument(
        "--dora_norm",
        choices=("merged", "base"),
        default="merged",
        help="whose rows DoRA's readers divide by: W + ΔW (merged: LyCORIS), or W (base: ComfyUI; needs "
        "--model)",
    )
    made.add_argument(
        "--at-timestep",
        "--at_timestep",
        type=float,
        help="bake a T-LoRA at this timestep, 0 … 1000",
    )
    made.add_argument(
        "--calibrate",
        metavar="PROMPTS",
        help="file of prompts (.txt, .toml, .json) that --model draws with an adapter of several experts; "
        "the LoRA nearest to it over all steps is exported, and its error is printed",
    )
    made.add_argument("--strength", type=float, default=1.0, help="share of the change that is merged (1)")
    made.add_argument(
        "--verify",
        choices=("auto", "layers", "forward", "off"),
        default="auto",
        help="read the file back by the program it is for: layer by layer, or one forward of the model "
        "(auto: forward where --model is given, except for merged)",
    )
    return made


def main(argv: list[str] | None = None) -> int:
    """Export one file and say how exact it is. Raises `Refused`."""
    args = parser().parse_args(argv)
    if args.rank is not None and args.rank < 1:
        raise Refused(f"--rank {args.rank} is below 1; give 1 or more")
    if args.to == MERGED and not args.model:
        raise Refused("--to merged needs the base model; give it with --model")
    if Path(args.target).resolve() == Path(args.source).resolve():
        raise Refused(f"{args.target} is the adapter itself, which is not overwritten; give another name")
    if not math.isfinite(args.strength):
        raise Refused(f"--strength {args.strength:g} is no finite number; 1 adds the whole change")
    if args.strength != 1.0 and args.to != MERGED:
        raise Refused(f"--strength {args.strength:g} is for --to merged; set it where the adapter is used")
    if args.calibrate and not args.model:
        raise Refused("--calibrate draws pictures with the base model; give it with --model")
    if args.calibrate and args.at_timestep is not None:
        raise Refused("--calibrate is for experts and --at-timestep for T-LoRA; leave one out")
    if args.to == MASKED:
        _refuse_unmasked(args)
        ranks = sorted(ranks_of(export_lycoris(args.source, args.target)))
        print(
            f"{args.target}: T-LoRA of rank {', '.join(map(str, ranks))} for LyCORIS; read back, the largest "
            f"relative difference of a layer is {worst_difference(args.source, args.target):.1e}"
        )
        return 0
    if args.at_timestep is None and not args.calibrate:
        return _export(args)
    with tempfile.TemporaryDirectory() as folder:  # a file with one ΔW stands for the one without
        baked = Path(folder) / Path(args.source).name
        if args.calibrate:
            print(write_nearest(args.source, args.model, args.calibrate, baked))
        else:
            export_lora(args.source, baked, args.at_timestep)
        args.source = str(baked)
        return _export(args)


def _refuse_unmasked(args: argparse.Namespace) -> None:
    """Raise `Refused` for flags that a T-LoRA, written tensor by tensor for LyCORIS, would go without."""
    if Path(args.target).suffix != ".safetensors":
        raise Refused(
            f"{args.target} is no .safetensors name, and --to {MASKED} writes one such file; give one"
        )
    unset = parser()
    for name in ("model", "dtype", "rank", "parts", "base", "at_timestep", "calibrate"):
        if getattr(args, name) != unset.get_default(name):
            raise Refused(f"--{name} has no effect with --to {MASKED}; leave it out, or write --to kohya")


def _export(args: argparse.Namespace) -> int:
    adapter = only(read(args.source, args.base), args.parts)
    method = made_by(args.source)
    if method is not None and method.gate is not None:
        group = "1" if method.require_factor().copy is None else "2"  # ranks that open together
        told = {"tlora_group": group, "lowrank.gated_by": method.name}
        adapter = dataclasses.replace(adapter, metadata={**adapter.metadata, **told})
        print(
            f"{method.name} opens fewer ranks at noisy timesteps; the file's metadata say which, and "
            "programs that do not read them use all at every step (--at-timestep bakes one)"
        )
    if args.rank is not None:
        adapter, loss = resize(adapter, args.rank)
        print(
            f"rank {args.rank}: {loss.together:.2%} of ‖ΔW‖ is lost, {loss.worst:.2%} in the worst layer "
            f"({loss.layer})"
        )
    base = base_checkpoint.BaseCheckpoint(args.model) if args.model else None
    dtype = DTYPES[args.dtype] if args.dtype else None
    if args.to == MERGED:
        assert base is not None  # checked above
        told = {"lowrank.version": __version__, "lowrank.merged": Path(args.source).name}
        told |= {key: value for key, value in adapter.metadata.items() if key.startswith("lowrank.unrouted")}
        lost = base_checkpoint.merge(base, adapter.layers, args.target, told, args.strength, dtype)
        print(
            f"{args.target}: {len(adapter.layers)} layers merged at strength {args.strength:g}; rounding to "
            f"the model's precision loses {lost:.1e} of the change"
        )
        if args.verify == "forward":
            _tell_forward(args, adapter)
        return 0
    if base is not None:
        base.check(adapter.layers)
    choices = Choices(dtype, args.dora_norm, base, flat_clip())
    files = write(adapter, args.to, args.target, choices)
    print(f"{', '.join(map(str, files))}: {_described(adapter)}; read by {FORMATS[args.to].readers}")
    if args.verify != "off":
        told = verify.check_export(adapter, args.to, Path(args.target), choices)
        for one in told:
            print(
                f"read back by {one.reader}: {one.layers} layers, at most {one.worst:.1e} of a change apart"
            )
        if not told:
            print("not read back: no program for that is here, or it has more layers than any model")
    if args.verify == "forward" or (args.verify == "auto" and args.model):
        _tell_forward(args, adapter)
    return 0


def flat_clip() -> bool:
    """Whether the transformers that is installed has a CLIPTextModel without the level text_model."""
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.device("meta"):
        tiny = CLIPTextModel(CLIPTextConfig(num_hidden_layers=1, vocab_size=8))
    return not hasattr(tiny, "text_model")


def _described(adapter: Plain) -> str:
    ranks = sorted({layer.rank for layer in adapter.layers.values()})
    told = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]}–{ranks[-1]}"
    return f"{len(adapter.layers)} layers of rank {told}"


# ---------- one forward of the model


def _tell_forward(args: argparse.Namespace, adapter: Plain) -> None:
    told = forward_difference(args.source, adapter, args.to, Path(args.target), args.model, args.strength)
    if isinstance(told, str):
        print(f"no forward compared: {told}")
        return
    exact = args.dtype in (None, "fp32") and args.rank is None
    if exact and told > 1e-5:
        raise Refused(
            f"one forward of {args.model} differs by {told:.1e} of its output between {args.source} and "
            f"{args.target} (limit 1e-05); do not use the export, and tell us the file"
        )
    print(f"one forward of the model: {told:.1e} of its output apart")


def forward_difference(
    source: str, adapter: Plain, to: str, target: Path, model: str, strength: float = 1.0
) -> float | str:
    """‖theirs − ours‖/‖ours‖ of the denoiser's answer to one noise, or a sentence why none can be compared.

    Ours is the live network of the file's own method, with all ranks open, as an export has them; theirs what
    the program that the export is for makes of it. The model is loaded in fp32.
    """
    method = made_by(source)
    if method is None:
        return f"{source} is not of a method here, so that there is no live network to compare with"
    if not model or (is_file(model) and "flux" in adapter.family):
        return "it needs the folder of a diffusers model, or one file of SD or SDXL (--model)"
    origin = base_source(model, "fp32", "cpu")
    family = model_family(origin)
    models = family.load(origin, ("denoiser",))
    inputs = example_inputs(models, family)
    denoiser: Any = models.denoiser
    network = attached(method, source, models, strength)
    with network.denoise_at(torch.zeros_like(inputs["timesteps"])):
        ours = _ask(models, family, inputs)
    network.restore()
    if to == MERGED:
        models = family.load(base_source(str(target), "fp32", "cpu"), ("denoiser",))
        theirs = _ask(models, family, inputs)
    else:
        loader = _loader(to, adapter)
        if loader is None:
            return f"no program here loads a {to} file of this kind into a model of diffusers"
        loader(denoiser, target)
        theirs = _ask(models, family, inputs)
    return float((theirs - ours).norm() / ours.norm())


def _loader(to: str, adapter: Plain) -> Callable[[Any, Path], None] | None:
    asked = verify.readers(to, adapter, Choices())
    if "diffusers" in asked:
        return lambda denoiser, path: verify.load_by_diffusers(path, adapter, denoiser)
    if "PEFT" in asked:
        return lambda denoiser, path: verify.load_by_peft(path, adapter, denoiser)
    if "LyCORIS" in asked:
        return lambda denoiser, path: verify.load_by_lycoris(path, denoiser)
    return None


def example_inputs(models: Models, family: Family) -> dict[str, Any]:
    """One noise and one random text of the model's sizes, the same at every call."""
    config, made = models.configs["denoiser"], torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=made)

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


def _ask(models: Models, family: Family, inputs: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        told = family.denoise(
            models.denoiser, inputs["noise"], inputs["timesteps"], inputs["text"], family.options()
        )
    return told.double()
