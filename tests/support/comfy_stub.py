"""ComfyUI's interfaces as far as our nodes meet them, written after ComfyUI a125cd8 (October 2025).

Same names, arguments, key formats and order of calls; the mathematics of patches and of noise levels are
those of its `comfy.lora.calculate_weight`, `comfy.weight_adapter.lora` and `comfy.model_sampling`. `install`
puts the modules where `import comfy…` finds them.
"""

from __future__ import annotations

import copy
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

# ---------- comfy.patcher_extension


class WrappersMP:
    APPLY_MODEL = "apply_model"


class WrapperExecutor:
    """Calls wrappers around a function; each is given an executor for the rest, and the class's instance."""

    def __init__(self, original: Callable, class_obj: Any, wrappers: list[Callable], index: int = 0) -> None:
        self.original, self.class_obj, self.wrappers, self.index = original, class_obj, wrappers, index

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return WrapperExecutor(self.original, self.class_obj, self.wrappers, self.index + 1).execute(
            *args, **kwargs
        )

    def execute(self, *args: Any, **kwargs: Any) -> Any:
        if self.index == len(self.wrappers):
            return self.original(*args, **kwargs)
        return self.wrappers[self.index](self, *args, **kwargs)


# ---------- comfy.model_sampling


class EPS:
    """Noise prediction."""


class CONST:
    """Rectified flow."""


class ModelSamplingDiscrete(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
        bars = torch.cumprod(1 - betas, 0)
        self.register_buffer("sigmas", ((1 - bars) / bars).sqrt().float())

    def timestep(self, sigma: Tensor) -> Tensor:
        return (sigma.log() - self.sigmas.log()[:, None]).abs().argmin(dim=0).view(sigma.shape)


class ModelSamplingDiscreteEDM(ModelSamplingDiscrete):
    def timestep(self, sigma: Tensor) -> Tensor:
        return 0.25 * sigma.log()


class ModelSamplingFlux(nn.Module):
    def timestep(self, sigma: Tensor) -> Tensor:
        return sigma


# ---------- comfy.weight_adapter, comfy.lora


class WeightAdapterBase:
    name: str


class LoRAAdapter(WeightAdapterBase):
    name = "lora"

    def __init__(self, up: Tensor, down: Tensor, alpha: float | None) -> None:
        self.weights = (up, down, alpha)

    def calculate_weight(self, weight, key, strength, strength_model, offset, function, *_: Any, **__: Any):
        up, down, alpha = self.weights
        scale = 1.0 if alpha is None else alpha / down.shape[0]
        change = torch.mm(up.flatten(1).float(), down.flatten(1).float()).reshape(weight.shape)
        weight += function((strength * scale * change).type(weight.dtype))
        return weight


def load_lora(lora: dict[str, Tensor], to_load: dict[str, Any]) -> dict[Any, Any]:
    patches, loaded = {}, set()
    for x, to in to_load.items():
        alpha = lora.get(f"{x}.alpha")
        if f"{x}.lora_up.weight" in lora:
            up, down = lora[f"{x}.lora_up.weight"], lora[f"{x}.lora_down.weight"]
            patches[to] = LoRAAdapter(up, down, None if alpha is None else alpha.item())
            loaded |= {f"{x}.{end}" for end in ("lora_up.weight", "lora_down.weight", "alpha")}
    assert loaded == set(lora), f"lora key not loaded: {set(lora) - loaded}"
    return patches


def calculate_weight(patches: list[tuple], weight: Tensor, key: str) -> Tensor:
    for strength, patch, strength_model, offset, function in patches:
        whole, part = weight, weight if offset is None else weight.narrow(*offset)
        assert strength_model == 1.0
        change = function or (lambda a: a)
        if isinstance(patch, tuple):
            kind, (value,) = patch
            assert kind == "diff"
            part += change(strength * value.to(part.dtype))
        else:
            part = patch.calculate_weight(
                part, key, strength, strength_model, offset, change, torch.float32, None
            )
        weight = part if offset is None else whole
    return weight


def model_lora_keys_unet(model: Any, key_map: dict[str, Any]) -> dict[str, Any]:
    for key in model.state_dict():
        if key.startswith("diffusion_model.") and key.endswith(".weight"):
            path = key.removeprefix("diffusion_model.").removesuffix(".weight")
            key_map["lora_unet_" + path.replace(".", "_")] = key
            key_map[f"diffusion_model.{path}"] = key
    for name, to in unet_to_diffusers(model.model_config.unet_config).items():
        flat = name.removesuffix(".weight").replace(".", "_")
        key_map |= {f"{prefix}_{flat}": f"diffusion_model.{to}" for prefix in ("lora_unet", "lycoris")}
    for name, to in flux_to_diffusers(model.model_config.unet_config, "diffusion_model.").items():
        path = name.removesuffix(".weight")
        key_map |= {f"transformer.{path}": to, "lycoris_" + path.replace(".", "_"): to}
    return key_map


def model_lora_keys_clip(model: Any, key_map: dict[str, Any]) -> dict[str, Any]:
    for key in model.state_dict():
        if key.startswith("clip_l.transformer.") and key.endswith(".weight"):
            path = key.removeprefix("clip_l.transformer.").removesuffix(".weight")
            flat = path.replace(".", "_")
            key_map |= {f"lora_te_{flat}": key, f"lora_te1_{flat}": key, f"text_encoder.{path}": key}
    return key_map


# ---------- comfy.utils


def unet_to_diffusers(config: dict[str, Any]) -> dict[str, str]:
    """For one attention block and one residual block of SD 1.5's first level."""
    if "num_res_blocks" not in config:
        return {}
    inner = [
        *("proj_in", "proj_out", "transformer_blocks.0.ff.net.0.proj", "transformer_blocks.0.ff.net.2"),
        *(
            f"transformer_blocks.0.{a}.{b}"
            for a in ("attn1", "attn2")
            for b in ("to_q", "to_k", "to_v", "to_out.0")
        ),
    ]
    names = {f"down_blocks.0.attentions.0.{name}.weight": f"input_blocks.1.1.{name}.weight" for name in inner}
    return names | {"down_blocks.0.resnets.0.conv1.weight": "input_blocks.1.0.in_layers.2.weight"}


def flux_to_diffusers(config: dict[str, Any], output_prefix: str = "") -> dict[str, Any]:
    H, paths = config.get("hidden_size", 0), {}
    for i in range(config.get("depth", 0)):
        theirs, ours = f"{output_prefix}double_blocks.{i}", f"transformer_blocks.{i}"
        for stream, names in (
            ("img", ("to_q", "to_k", "to_v")),
            ("txt", ("add_q_proj", "add_k_proj", "add_v_proj")),
        ):
            for j, name in enumerate(names):
                paths[f"{ours}.attn.{name}.weight"] = (f"{theirs}.{stream}_attn.qkv.weight", (0, j * H, H))
        for name, to in (
            *(("attn.to_out.0", "img_attn.proj"), ("attn.to_add_out", "txt_attn.proj")),
            *(("ff.net.0.proj", "img_mlp.0"), ("ff.net.2", "img_mlp.2")),
            *(("ff_context.net.0.proj", "txt_mlp.0"), ("ff_context.net.2", "txt_mlp.2")),
        ):
            paths[f"{ours}.{name}.weight"] = f"{theirs}.{to}.weight"
    for i in range(config.get("depth_single_blocks", 0)):
        theirs, ours = f"{output_prefix}single_blocks.{i}", f"single_transformer_blocks.{i}"
        for j, name in enumerate(("to_q", "to_k", "to_v")):
            paths[f"{ours}.attn.{name}.weight"] = (f"{theirs}.linear1.weight", (0, j * H, H))
        paths[f"{ours}.proj_mlp.weight"] = (f"{theirs}.linear1.weight", (0, 3 * H, 4 * H))
        paths[f"{ours}.proj_out.weight"] = f"{theirs}.linear2.weight"
    return paths


# ---------- comfy.model_base, comfy.model_patcher, comfy.sd


class BaseModel(nn.Module):
    """A denoiser with its noise levels; `apply_model` goes through the wrappers, as there."""

    def __init__(self, diffusion_model: nn.Module, unet_config: dict[str, Any], sampling: nn.Module) -> None:
        super().__init__()
        self.diffusion_model, self.model_sampling = diffusion_model, sampling
        self.model_config = types.SimpleNamespace(unet_config=unet_config)

    def apply_model(
        self, x: Tensor, t: Tensor, transformer_options: dict | None = None, **kwargs: Any
    ) -> Tensor:
        wrappers = (transformer_options or {}).get("wrappers", {}).get(WrappersMP.APPLY_MODEL, {})
        flat = [wrapper for of_key in wrappers.values() for wrapper in of_key]
        return WrapperExecutor(self._apply_model, self, flat).execute(x, t, **kwargs)

    def _apply_model(self, x: Tensor, t: Tensor, **kwargs: Any) -> Tensor:
        return self.diffusion_model(x, self.model_sampling.timestep(t).float(), **kwargs)


class ModelPatcher:
    """Patches are applied when a model is loaded and undone afterwards; clones share the model."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.patches, self.wrappers, self.backup = model, {}, {}, {}

    def clone(self) -> ModelPatcher:
        copied = ModelPatcher(self.model)
        copied.patches = {key: list(patches) for key, patches in self.patches.items()}
        copied.wrappers = copy.copy(
            {kind: {k: list(v) for k, v in of.items()} for kind, of in self.wrappers.items()}
        )
        copied.backup = self.backup
        return copied

    def add_patches(self, patches: dict, strength_patch: float = 1.0, strength_model: float = 1.0) -> list:
        known = self.model.state_dict().keys()
        for k, patch in patches.items():
            key, offset = (k, None) if isinstance(k, str) else (k[0], k[1])
            assert key in known, key
            self.patches.setdefault(key, []).append((strength_patch, patch, strength_model, offset, None))
        return list(patches)

    def add_wrapper_with_key(self, wrapper_type: str, key: str, wrapper: Callable) -> None:
        self.wrappers.setdefault(wrapper_type, {}).setdefault(key, []).append(wrapper)

    def get_key_patches(self, filter_prefix: str | None = None) -> dict[str, list]:
        state = {k: v for k, v in self.model.state_dict().items() if k.startswith(filter_prefix or "")}
        return {
            k: [(self.backup.get(k, v), lambda a, **_: a), *self.patches.get(k, [])] for k, v in state.items()
        }

    def patch_model(self) -> nn.Module:
        for key, patches in self.patches.items():
            weight = self.model.get_parameter(key)
            self.backup[key] = weight.detach().clone()
            weight.data = calculate_weight(patches, weight.detach().float().clone(), key).to(weight.dtype)
        return self.model

    def unpatch_model(self) -> None:
        for key, weight in self.backup.items():
            self.model.get_parameter(key).data = weight
        self.backup.clear()

    def sample(self, x: Tensor, sigma: Tensor, **kwargs: Any) -> Tensor:
        """One denoiser call as samplers make it: loaded, with the clone's wrappers, and unloaded again."""
        try:
            model: Any = self.patch_model()
            with torch.inference_mode():
                return model.apply_model(x, sigma, transformer_options={"wrappers": self.wrappers}, **kwargs)
        finally:
            self.unpatch_model()


class CLIP:
    def __init__(self, cond_stage_model: nn.Module) -> None:
        self.cond_stage_model, self.patcher = cond_stage_model, ModelPatcher(cond_stage_model)

    def clone(self) -> CLIP:
        copied = CLIP(self.cond_stage_model)
        copied.patcher = self.patcher.clone()
        return copied

    def add_patches(self, patches: dict, strength_patch: float = 1.0, strength_model: float = 1.0) -> list:
        return self.patcher.add_patches(patches, strength_patch, strength_model)


def install(monkeypatch: Any, folder: Path) -> None:
    """Put `comfy` and `folder_paths` into sys.modules; `folder` is models/loras."""
    stub = globals()
    contents = {
        "comfy.patcher_extension": ("WrappersMP", "WrapperExecutor"),
        "comfy.model_sampling": (
            "EPS",
            "CONST",
            "ModelSamplingDiscrete",
            "ModelSamplingDiscreteEDM",
            "ModelSamplingFlux",
        ),
        "comfy.weight_adapter": ("WeightAdapterBase", "LoRAAdapter"),
        "comfy.lora": ("load_lora", "calculate_weight", "model_lora_keys_unet", "model_lora_keys_clip"),
        "comfy.utils": ("unet_to_diffusers", "flux_to_diffusers"),
    }
    monkeypatch.setitem(sys.modules, "comfy", root := types.ModuleType("comfy"))
    root.__path__ = []
    for name, parts in contents.items():
        module = types.ModuleType(name)
        module.__dict__.update({part: stub[part] for part in parts})
        setattr(root, name.partition(".")[2], module)
        monkeypatch.setitem(sys.modules, name, module)
    paths: Any = types.ModuleType("folder_paths")
    paths.get_filename_list = lambda kind: sorted(file.name for file in folder.iterdir())
    paths.get_full_path_or_raise = lambda kind, name: str(folder / name)
    monkeypatch.setitem(sys.modules, "folder_paths", paths)


# ---------- comfy_api.latest (ComfyUI 004b1b5)


class _SchemaInput:
    def __init__(self, id: str, optional: bool = False, tooltip: str | None = None, **facts: Any) -> None:
        self.id, self.optional, self.tooltip, self.facts = id, optional, tooltip, facts


def _schema_type(*facts: str) -> Any:
    class Input(_SchemaInput):
        def __init__(self, id: str, **given: Any) -> None:
            assert given.keys() <= {"optional", "tooltip", *facts}, given
            super().__init__(id, **given)

    return types.SimpleNamespace(Input=Input, Output=lambda: None)


def install_schema(monkeypatch: Any) -> None:
    """Put `comfy_api.latest` into sys.modules, with the arguments that its inputs take."""
    numbers = ("default", "min", "max", "step")
    io = types.SimpleNamespace(
        Model=_schema_type(), Clip=_schema_type(), Float=_schema_type(*numbers), Int=_schema_type(*numbers),
        Boolean=_schema_type("default"),
        Combo=_schema_type("options", "default"), Schema=types.SimpleNamespace, ComfyNode=object,
        NodeOutput=lambda *results: results,
    )  # fmt: skip
    latest: Any = types.ModuleType("comfy_api.latest")
    latest.io, latest.ComfyExtension = io, type("ComfyExtension", (), {})
    monkeypatch.setitem(sys.modules, "comfy_api", types.ModuleType("comfy_api"))
    monkeypatch.setitem(sys.modules, "comfy_api.latest", latest)
