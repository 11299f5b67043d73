"""A routed adapter as the nearest LoRA, fitted on its layers' inputs while the model draws images with it."""

from __future__ import annotations

from pathlib import Path

from tqdm import tqdm

from lowrank.adapter_file import RawFile
from lowrank.adapters.network import AdapterNetwork
from lowrank.adapters.network_module import method_made_by, network_named
from lowrank.adapters.targets import as_passed
from lowrank.cli.base_model import base, device_of, model_family, own_side
from lowrank.cli.source_pictures import default_prompt
from lowrank.errors import Refused
from lowrank.formats.delta import LORA
from lowrank.formats.nearest_lora import together, unrouted
from lowrank.models.family import Models, align
from lowrank.naming import keys
from lowrank.tensors import TensorFile, read_metadata
from lowrank.train.preview import draw_picture
from lowrank.train.prompts import read_prompts
from lowrank.train.text_conditions import TextConditions


def attached(file: str | RawFile, models: Models, strength: float = 1.0) -> AdapterNetwork:
    """The network of an adapter file, attached to the parts of the model that are in memory.

    Raises `Refused` for a file whose method has no networks/ file.
    """
    encoders, denoiser = list(models.text_encoders), models.denoiser
    metadata = file.metadata if isinstance(file, RawFile) else read_metadata(file)
    name, passed = metadata.get("lowrank.method", ""), as_passed(encoders, denoiser)
    module = network_named(name)
    if module is None:
        raise Refused(f"there is no networks/{name}.py, which made the adapter; use the release that made it")
    if isinstance(file, RawFile):
        network, _ = module.create_network_from_weights(strength, None, None, passed, denoiser, file.state)
        network.read_state(file.state, file.metadata, file.source)
    else:
        network, _ = module.create_network_from_weights(strength, file, None, passed, denoiser)
        network.load_weights(file)
    network.apply_to(passed, denoiser, bool(encoders), True)
    network.set_multiplier(strength)
    network.to(next(denoiser.parameters()).device)
    return network


def nearest_lora(source: str, model: str, prompts: str) -> tuple[RawFile, str]:
    """The nearest LoRA, or DoRA, of a routed adapter as a native file, and a sentence on its error.

    Each prompt is one image, drawn with the adapter attached; all positions of all its steps count, with and
    without the prompt where guidance needs both. The metadata keep the errors. Raises `Refused`.
    """
    method = method_made_by(read_metadata(source), source)
    if method is None or method.experts is None:
        raise Refused(
            f"{source} has one ΔW, or names no method of networks/, and needs no calibration; leave "
            "--calibrate out"
        )
    device = device_of(None)
    origin = base(model, "fp32" if device == "cpu" else "bf16", device, flag="model")
    family = model_family(origin)
    models, switches = family.load(origin, ()), family.options()
    side = own_side(models)
    prompt_list = read_prompts(
        prompts, default_prompt(family, (side, side)), family.bucket_step(models), "--calibrate"
    )
    if not prompt_list:
        raise Refused(f"--calibrate {prompts} is empty; write a prompt per line")
    texts = [text for prompt in prompt_list for text in (prompt.prompt, prompt.negative_prompt or "")]
    trains = any(map(keys.is_text_encoder, TensorFile(Path(source)).entries))
    conditions = TextConditions(family, models, switches, texts, trains)
    family.add(models, ("denoiser", "vae"))
    align(models)
    network = attached(source, models)

    def calibrate() -> None:
        for index, prompt in enumerate(tqdm(prompt_list, desc="calibrating", unit="picture")):
            seed = index if prompt.seed is None else prompt.seed
            draw_picture(family, models, switches, conditions, prompt, seed)

    state, errors = unrouted(network, calibrate)
    network.restore()
    worst = max(errors, key=lambda name: errors[name].share)
    whole = together(errors.values()).share
    facts = {
        "method": keys.DORA if method.magnitude else LORA.name,
        "options": "{}",
        "exported_from": method.name,
        "unrouted_error": f"{whole:.6g}",
        "unrouted_worst": f"{errors[worst].share:.6g} {worst}",
        "unrouted_on": f"{len(prompt_list)} pictures of {Path(prompts).name}",
    }
    metadata = read_metadata(source) | {f"lowrank.{name}": value for name, value in facts.items()}
    nearest = RawFile({key: value.detach().cpu() for key, value in state.items()}, metadata, source)
    return nearest, (
        f"{method.experts.count} experts become one up by least squares over {len(prompt_list)} pictures: "
        f"{whole:.2%} of what they add to the layers' outputs is lost, {errors[worst].share:.2%} in the "
        f"worst layer ({worst})"
    )
