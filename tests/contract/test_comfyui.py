"""The ComfyUI nodes on ComfyUI's interfaces (comfy_stub): every method, T-LoRA, routed experts, merges."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
import textwrap
from typing import Any

import comfy_stub as stub
import pytest
import torch
from adapter_files import lokr
from diffusers import FluxTransformer2DModel, UNet2DConditionModel
from repository import ROOT
from torch import Tensor, nn
from toys import PLAIN, SHIPPED, shake
from transformers import CLIPTextModel

from lowrank.combine.mixture import read_mixture
from lowrank.combine.rules import RULES, Merging, RuleOptions
from lowrank.combine.selection import changeovers
from lowrank.errors import Refused
from lowrank.formats.read import read_adapter
from lowrank.naming import keys
from lowrank.tensors import read_tensors, write_tensors

SIGMAS = torch.tensor([0.999, 0.5, 0.001])  # a step at noise, in the middle and at the picture, in one batch
FLUX_CONFIG = {"hidden_size": 128, "depth": 2, "depth_single_blocks": 2}
SD_CONFIG = {"num_res_blocks": [2]}


class Layers(nn.Module):
    """Layers under ComfyUI's paths; each gets its share of x (B, 16, 640), and their outputs are joined."""

    def __init__(self, layers: dict[str, list[nn.Module]]) -> None:
        super().__init__()
        self.paths = list(layers)
        for path, parts in layers.items():
            *above, last = path.split(".")
            place: nn.Module = self
            for name in above:
                if name not in dict(place.named_children()):
                    place.add_module(name, nn.Module())
                place = place.get_submodule(name)
            place.add_module(last, fused(parts))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return torch.cat([through(self.get_submodule(path), x) for path in self.paths], 1)


def fused(parts: list[Any]) -> nn.Module:
    first = parts[0]
    if isinstance(first, nn.Conv2d):
        facts = (first.in_channels, first.out_channels, first.kernel_size, first.stride, first.padding)
        made: Any = nn.Conv2d(*facts, bias=first.bias is not None)
    else:
        outs = sum(part.out_features for part in parts)
        made = nn.Linear(first.in_features, outs, bias=first.bias is not None)
    for name in ("weight", "bias"):
        if getattr(first, name) is not None:
            joined = torch.cat([getattr(part, name).detach() for part in parts])
            setattr(made, name, nn.Parameter(joined.clone(), requires_grad=False))
    return made


def through(layer: Any, x: Tensor) -> Tensor:
    """(B, …) of one layer."""
    if isinstance(layer, nn.Conv2d):
        return layer(x[..., : layer.in_channels].mT.unflatten(2, (4, 4))).flatten(1)
    return layer(x[..., : layer.in_features]).flatten(1)


class Case:
    """A denoiser of diffusers, and the same layers in ComfyUI's model."""

    def __init__(self, denoiser: Any, config: dict[str, Any], sampling: nn.Module) -> None:
        self.denoiser = denoiser
        names = {**stub.unet_to_diffusers(config), **stub.flux_to_diffusers(config)}
        self.parts: dict[str, list[str]] = {}
        for name, to in names.items():
            path = (to if isinstance(to, str) else to[0]).removesuffix(".weight")
            self.parts.setdefault(path, []).append(name.removesuffix(".weight"))
        layers = {
            path: [denoiser.get_submodule(name) for name in names] for path, names in self.parts.items()
        }
        self.model = stub.ModelPatcher(stub.BaseModel(Layers(layers), config, sampling))
        torch.manual_seed(3)
        self.x = torch.randn(3, 16, 640)
        self.sigmas = SIGMAS
        if isinstance(sampling, stub.ModelSamplingDiscrete):
            self.sigmas = sampling.get_buffer("sigmas")[torch.tensor([999, 500, 1])]
        self.timesteps = torch.tensor([999.0, 500.0, 1.0])

    def expected(self) -> Tensor:
        """What the layers of diffusers give, with whatever is on them."""
        with torch.no_grad():
            rows = []
            for names in self.parts.values():
                outs = [self.denoiser.get_submodule(name) for name in names]
                shapes = [through(layer, self.x) for layer in outs]
                if len(outs) > 1:  # side by side in the last dimension
                    shapes = [torch.cat([out.unflatten(1, (16, -1)) for out in shapes], -1).flatten(1)]
                rows += shapes
        return torch.cat(rows, 1)


@pytest.fixture(scope="module")
def flux_denoiser(tiny_flux):
    return FluxTransformer2DModel.from_pretrained(tiny_flux / "transformer").requires_grad_(False)


@pytest.fixture(scope="module")
def sd_denoiser(tiny_sd):
    return UNet2DConditionModel.from_pretrained(tiny_sd / "unet").requires_grad_(False)


@pytest.fixture
def case(request, flux_denoiser, sd_denoiser):
    """The tiny FLUX, or (indirect parameter "sd") a part of the tiny SD 1.5."""
    if getattr(request, "param", "flux") == "flux":
        sampling: Any = type("ModelSampling", (stub.ModelSamplingFlux, stub.CONST), {})()
        return Case(flux_denoiser, FLUX_CONFIG, sampling)
    return Case(sd_denoiser, SD_CONFIG, type("ModelSampling", (stub.ModelSamplingDiscrete, stub.EPS), {})())


@pytest.fixture
def nodes(monkeypatch, tmp_path):
    """The package as ComfyUI would load it; files are in tmp_path."""
    stub.install(monkeypatch, tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == "comfyui"]:
        monkeypatch.delitem(sys.modules, name)
    package = importlib.import_module("comfyui")
    yield package
    for name in [name for name in sys.modules if name.partition(".")[0] == "comfyui"]:
        sys.modules.pop(name)


@pytest.fixture
def trained(case, cache, tmp_path):
    """A function (method, file, seed, arguments) that puts a moved adapter on the denoiser and writes it."""
    made: list[Any] = []

    def train(method: str, file: str = "a.safetensors", seed: int = 0, encoders: Any = (), **arguments: str):
        module = importlib.import_module(f"networks.{method}")
        if "basis_cache" in module.create_network.__self__.known and method not in PLAIN:
            arguments["basis_cache"] = str(cache)
        if isinstance(case.denoiser, UNet2DConditionModel):
            arguments.setdefault("target", r"^down_blocks\.0\.(attentions\.0|resnets\.0\.conv1)")
        torch.manual_seed(seed)
        network = module.create_network(1.0, 8, 4.0, None, list(encoders), case.denoiser, **arguments)
        network.apply_to(list(encoders), case.denoiser, bool(encoders), True)
        made.append(network)
        shake(network, 0.05, seed)
        network.save_weights(str(tmp_path / file), None, {"ss_network_module": f"networks.{method}"})
        return network

    yield train
    for network in reversed(made):
        network.restore()


def loader(nodes, case, file: str = "a.safetensors", strength: float = 1.0, **more):
    made = nodes.NODE_CLASS_MAPPINGS["LowrankLoader"]()
    return getattr(made, made.FUNCTION)(case.model, file, strength, **more)


def close(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> bool:
    return bool((a - b).abs().max() <= tolerance * b.abs().max())


# ---------- every method


@pytest.mark.parametrize("case", ["flux", "sd"], indirect=True)
@pytest.mark.parametrize("method", SHIPPED)
def test_node_output_equals_training_forward(method, case, nodes, trained):
    base = case.expected()
    network = trained(method)
    with network.denoise_at(case.timesteps):
        expected = case.expected()
    assert not close(expected, base, 1e-3)
    model, clip = loader(nodes, case)
    assert clip is None
    assert close(model.sample(case.x, case.sigmas), expected)
    # the model that came in, and a clone made before, run as they were
    before = {name: value.clone() for name, value in case.model.model.state_dict().items()}
    assert close(case.model.sample(case.x, case.sigmas), base, 1e-6)
    assert all(torch.equal(value, before[name]) for name, value in case.model.model.state_dict().items())
    assert not any(m._forward_hooks for m in case.model.model.modules())


def test_strength_scales_change(case, nodes, trained):
    network = trained("lora")
    network.set_multiplier(0.5)
    model, _ = loader(nodes, case, strength=0.5)
    assert close(model.sample(case.x, case.sigmas), case.expected())
    again, _ = nodes.NODE_CLASS_MAPPINGS["LowrankLoader"]().run(model, "a.safetensors", -0.5)
    network.set_multiplier(0.0)
    assert close(again.sample(case.x, case.sigmas), case.expected())


@pytest.mark.parametrize("node", ["LowrankLoader", "LowrankMerge"])
def test_unused_tensors_are_listed_or_refused(node, case, nodes, trained, tmp_path, caplog):
    network = trained("lora")
    state, metadata = read_tensors(tmp_path / "a.safetensors")
    extra = {"clip_l": torch.ones(2, 768), "emb_params": torch.ones(2), "x.reft_R": torch.ones(2, 2)}
    write_tensors(tmp_path / "b.safetensors", {**state, **extra}, metadata)
    count = f"{len(state)} of {len(state) + 3} tensors"
    left_out = "embedding × 2, unknown (reft_R) × 1, for example clip_l"
    words = (
        ("b.safetensors", 1.0) if node == "LowrankLoader" else ("a.safetensors", "b.safetensors", 0.0, 1.0)
    )
    run = nodes.NODE_CLASS_MAPPINGS[node]().run
    with pytest.raises(Refused, match=rf"--strict, and 3 of {len(state) + 3} .*{re.escape(left_out)}"):
        run(case.model, *words, strict=True)
    caplog.set_level("INFO")
    caplog.clear()
    model, _ = run(case.model, *words)
    lines = [r for r in caplog.records if "b.safetensors: " in r.getMessage()]
    assert [r.levelname for r in lines] == ["WARNING"]
    assert f"b.safetensors: {count} are used; left out: {left_out}" in lines[0].getMessage()
    network.set_multiplier(1.0)
    assert close(model.sample(case.x, case.sigmas), case.expected())


def test_half_precision(case, nodes, trained):
    network = trained("tlora")
    with network.denoise_at(case.timesteps):
        expected = case.expected()
    case.model.model.diffusion_model.to(torch.bfloat16)
    model, _ = loader(nodes, case)
    out = model.sample(case.x.bfloat16(), case.sigmas)
    assert out.dtype == torch.bfloat16 and close(out.float(), expected, 0.03)


# ---------- T-LoRA


def test_rank_schedule_during_sampling(case, nodes, trained):
    """Each sample of a batch by its own σ; the middle of the model's own sampling is 500."""
    network = trained("tlora", orthogonal="False", tlora_min_rank="1")
    model, _ = loader(nodes, case)
    for sigma, t in zip(case.sigmas, case.timesteps, strict=True):
        with network.denoise_at(t.reshape(1)):
            assert close(model.sample(case.x, sigma.expand(3)), case.expected())
    with network.denoise_at(torch.tensor([1.0])):
        assert not close(model.sample(case.x, case.sigmas), case.expected(), 1e-3)


@pytest.mark.parametrize("case", ["flux", "sd"], indirect=True)
def test_lycoris_file_with_node_schedule(case, nodes, trained, tmp_path):
    """It has no initial copy, which are the principal components of the model's own weights."""
    start = {"sig_type": "principal", "use_data_init": "True", "tlora_min_rank": "2", "tlora_alpha": "2"}
    chosen = r"attn1?\.to_|attn\.add_.*_proj|net\."
    if case.model.model.model_config.unet_config is SD_CONFIG:
        chosen = r"^down_blocks\.0\.attentions\.0\.transformer_blocks"
    network = trained("tlora", target=chosen, **start)
    state = {}
    for key, value in read_tensors(tmp_path / "a.safetensors")[0].items():
        module, role = keys.role_of(key) or ("", "")
        if role in ("p_layer", "q_layer", "lambda_layer", "alpha"):
            value = value.reshape(1, -1) if role == "lambda_layer" else value
            state[f"lycoris_{keys.flat(module)}.{keys.KOHYA[role]}"] = value
    write_tensors(tmp_path / "theirs.safetensors", state, {})
    model, _ = loader(nodes, case, "theirs.safetensors", min_rank=2, schedule_alpha=2.0)
    with network.denoise_at(case.timesteps):
        assert close(model.sample(case.x, case.sigmas), case.expected(), 1e-4)


def test_timestep_of_noise_level(nodes):
    timestep = importlib.import_module("comfyui.live").timestep
    discrete: Any = type("ModelSampling", (stub.ModelSamplingDiscrete, stub.EPS), {})()
    assert timestep(discrete, discrete.sigmas[[0, 421, 999]]).tolist() == [0, 421, 999]
    flow: Any = type("ModelSampling", (stub.ModelSamplingFlux, stub.CONST), {})()
    assert timestep(flow, torch.tensor([1.0, 0.25])).tolist() == [1000, 250]
    edm: Any = type("ModelSampling", (stub.ModelSamplingDiscreteEDM, stub.EPS), {})()
    with pytest.raises(Refused, match="timesteps of ModelSamplingDiscreteEDM are not known"):
        timestep(edm, torch.tensor([1.0]))


# ---------- routed experts

ROUTED = """
    from dataclasses import dataclass, replace
    from lowrank.adapters.network_module import bind
    from toys import probes

    @dataclass(frozen=True)
    class Options:
        pass

    def method(options):
        return replace(probes()["experts"], name="routed_probe")

    create_network, create_network_from_weights = bind(method, Options)
"""


def test_routed_experts(case, nodes, trained, tmp_path, monkeypatch):
    (tmp_path / "path" / "networks").mkdir(parents=True)
    (tmp_path / "path" / "networks" / "routed_probe.py").write_text(textwrap.dedent(ROUTED))
    monkeypatch.syspath_prepend(tmp_path / "path")
    base = case.expected()
    trained("routed_probe")
    model, _ = loader(nodes, case)
    assert close(model.sample(case.x, case.sigmas), case.expected()) and not close(
        case.expected(), base, 1e-3
    )
    monkeypatch.delitem(sys.modules, "networks.routed_probe")


# ---------- merging, text encoders


def test_style_and_content_with_shared_basis(case, nodes, trained):
    """W + α·ΔW_style + β·ΔW_content; the patches keep the rank of one adapter."""
    style, content = trained("delta_r", "style.safetensors", 1), trained("delta_r", "content.safetensors", 2)
    style.set_multiplier(0.7)
    content.set_multiplier(1.2)
    merge = nodes.NODE_CLASS_MAPPINGS["LowrankMerge"]().run
    model, _ = merge(case.model, "style.safetensors", "content.safetensors", 0.7, 1.2)
    assert close(model.sample(case.x, case.sigmas), case.expected())
    assert {patch[1].weights[1].shape[0] for patches in model.patches.values() for patch in patches} == {8}


def test_masked_style_with_plain_content(case, nodes, trained):
    content = trained("dora", "content.safetensors", 2)  # first: a patch of W, beside which the style is
    style = trained("tlora", "style.safetensors", 1)
    style.set_multiplier(0.7)
    merge = nodes.NODE_CLASS_MAPPINGS["LowrankMerge"]().run
    model, _ = merge(case.model, "style.safetensors", "content.safetensors", 0.7, 1.0)
    with style.denoise_at(case.timesteps):
        assert close(model.sample(case.x, case.sigmas), case.expected())
    assert content.method.magnitude is not None


@pytest.mark.parametrize("rule", ["svd", "ties", "orthogonal"])
def test_merge_by_a_rule(rule, case, nodes, trained, tmp_path):
    """The patches are the factors that the rule gives, which tests/unit/combine/test_rules.py checks."""
    files = [tmp_path / name for name in ("style.safetensors", "content.safetensors")]
    networks = [trained("lora", file.name, seed) for seed, file in enumerate(files)]
    for network in networks:
        network.set_multiplier(0.0)
    merge = nodes.NODE_CLASS_MAPPINGS["LowrankMerge"]().run
    model, _ = merge(case.model, files[0].name, files[1].name, 0.7, 1.2, rule=rule, rank=3, density=0.4)
    base = case.expected()
    mixture = read_mixture(files, merging=Merging(RULES[rule], RuleOptions(rank=3, density=0.4)))
    attached = mixture.attach(case.denoiser)
    attached.set((0.7, 1.2))
    wanted = case.expected()
    attached.restore()
    assert close(model.sample(case.x, case.sigmas), wanted) and not close(wanted, base, 1e-3)


def test_merge_by_klora_chooses_for_each_sample(case, nodes, trained, tmp_path):
    files = [tmp_path / name for name in ("style.safetensors", "content.safetensors")]
    style, content = (trained("lora", file.name, seed) for seed, file in enumerate(files))
    merge = nodes.NODE_CLASS_MAPPINGS["LowrankMerge"]().run
    model, _ = merge(case.model, files[0].name, files[1].name, 0.7, 1.2, rule="klora")
    alone = [read_mixture([file]).pairs for file in files]
    ends = changeovers(*alone, RuleOptions())
    done = 1 - case.timesteps.double() / 1000
    for position, network in enumerate((style, content)):
        for layer in network.layers():
            end = ends[keys.flat(network.targets[layer.name].native or layer.name)]
            uses = done >= end if position == 0 else done < end
            layer.multiplier = (0.7, 1.2)[position] * uses.float()
    assert close(model.sample(case.x, case.sigmas), case.expected())
    assert any(0 < end < 1 for end in ends.values())  # the samples of the batch differ


def test_merge_of_doras_does_not_depend_on_their_order(case, nodes, trained):
    """W + α·(W₁ − W) + β·(W₂ − W): the second is not normalised by what the first changed."""
    base = case.expected()
    changes = []
    for seed, name in ((1, "style.safetensors"), (2, "content.safetensors")):
        network = trained("dora", name, seed)
        changes.append(case.expected() - base)
        network.set_multiplier(0.0)
    merge = nodes.NODE_CLASS_MAPPINGS["LowrankMerge"]().run
    wanted = base + 0.7 * changes[0] - 1.2 * changes[1]  # the layers are linear in their weights
    for files, weights in (((0, 1), (0.7, -1.2)), ((1, 0), (-1.2, 0.7))):
        names = [("style.safetensors", "content.safetensors")[i] for i in files]
        model, _ = merge(case.model, *names, *weights)
        assert close(model.sample(case.x, case.sigmas), wanted)


@pytest.mark.parametrize("case", ["flux", "sd"], indirect=True)
def test_layers_that_are_no_pair(case, nodes, tmp_path):
    """LoKr on a layer (of FLUX: one of the rows of a fused one), a bias, and OFT, beside each other."""
    flux = "hidden_size" in case.model.model.model_config.unet_config
    first = (
        "transformer_blocks.0.attn.to_k"
        if flux
        else "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_k"
    )
    second = "transformer_blocks.0.ff.net.2" if flux else "down_blocks.0.resnets.0.conv1"
    prefix = "transformer" if flux else "unet"
    W, V = (case.denoiser.get_submodule(name) for name in (first, second))
    small = lokr(f"{prefix}.{first}", *W.weight.shape)
    state = {**small, f"{prefix}.{second}.diff_b": torch.randn(V.bias.shape)}
    state[f"{prefix}.{second}.oft_blocks"] = 0.1 * torch.randn(len(V.weight) // 8, 8, 8)
    write_tensors(tmp_path / "a.safetensors", {k: v for k, v in state.items() if "oft" not in k}, {})
    write_tensors(tmp_path / "b.safetensors", {k: v for k, v in state.items() if "oft" in k}, {})
    options: Any = {"foreign": True, "strict": False}
    changes = [read_adapter(tmp_path / f"{name}.safetensors", **options).foreign for name in "ab"]
    model, _ = nodes.NODE_CLASS_MAPPINGS["LowrankMerge"]().run(
        case.model, "a.safetensors", "b.safetensors", 0.7, 0.5
    )
    saved = {name: value.clone() for name, value in case.denoiser.state_dict().items()}
    with torch.no_grad():
        for share, layers in zip((0.7, 0.5), changes, strict=True):
            for place, layer in layers.items():
                host, W = case.denoiser.get_submodule(place.path), saved[f"{place.path}.weight"]
                if layer.kind.change is not None:
                    host.weight += share * layer.change(W)
                if layer.bias() is not None:
                    host.bias += share * layer.bias()
    try:
        assert not close(case.expected(), case.model.sample(case.x, case.sigmas), 1e-3)
        assert close(model.sample(case.x, case.sigmas), case.expected())
    finally:
        case.denoiser.load_state_dict(saved)


@pytest.mark.parametrize("case", ["sd"], indirect=True)
def test_text_encoders(case, nodes, trained, tiny_sd, caplog):
    encoder: Any = CLIPTextModel.from_pretrained(tiny_sd / "text_encoder").requires_grad_(False)
    network = trained("lora", encoders=[encoder])
    held = nn.Module()
    held.add_module("clip_l", nn.Module())
    held.get_submodule("clip_l").add_module("transformer", nn.Module())
    inner = CLIPTextModel.from_pretrained(tiny_sd / "text_encoder").requires_grad_(False)
    whole = inner if hasattr(inner, "text_model") else nn.ModuleDict({"text_model": inner})
    held.get_submodule("clip_l.transformer").add_module("text_model", whole.get_submodule("text_model"))
    model, clip = loader(nodes, case, clip=stub.CLIP(held), strength_clip=0.5)
    clip.patcher.patch_model()
    layers = network.layers("te") or network.layers("te1")
    assert len(layers) == 18 == len(clip.patcher.patches)
    for layer in layers:
        path = network.targets[layer.name].path.removeprefix("text_model.")
        W = held.get_submodule(f"clip_l.transformer.text_model.{path}").weight
        assert close(W, layer.host.weight + 0.5 * layer.delta_weight())
    model, none = loader(nodes, case)
    assert none is None and "18 layers of text encoders are left out; connect a CLIP" in caplog.text
    assert model.patches


# ---------- what is refused, and what is imported


@pytest.mark.parametrize("case", ["flux"], indirect=True)
def test_file_of_another_model_is_refused(case, nodes, trained, sd_denoiser, tmp_path):
    other = Case(sd_denoiser, SD_CONFIG, type("M", (stub.ModelSamplingDiscrete, stub.EPS), {})())
    trained("lora")
    with pytest.raises(Refused, match=r"layers of .*a.safetensors are not in this BaseModel, for example"):
        loader(nodes, other)
    state, metadata = read_tensors(tmp_path / "a.safetensors")
    for key in [key for key in state if key.endswith("lora_A.weight")]:
        state[key] = state[key][:, :-1]
    write_tensors(tmp_path / "b.safetensors", state, metadata)
    with pytest.raises(Refused, match="the adapter is for another base"):
        loader(nodes, case, "b.safetensors")


def test_node_interface(nodes, tmp_path):
    (tmp_path / "x.safetensors").touch()
    for name, kind in nodes.NODE_CLASS_MAPPINGS.items():
        assert name in nodes.NODE_DISPLAY_NAME_MAPPINGS and hasattr(kind, kind.FUNCTION)
        told = kind.INPUT_TYPES()
        inputs = [*told["required"], *told["optional"]]
        code = getattr(kind, kind.FUNCTION).__code__
        assert set(code.co_varnames[: code.co_argcount]) == set(inputs)
        assert any(entry[0] == ["x.safetensors"] for entry in told["required"].values())
        for entry in (*told["required"].values(), *told["optional"].values()):
            assert entry[1]["tooltip"].endswith(".")
    merge = nodes.NODE_CLASS_MAPPINGS["LowrankMerge"].INPUT_TYPES()["required"]
    assert merge["alpha"][0] == merge["beta"][0] == "FLOAT"


def test_schema_of_newer_comfyui(nodes, tmp_path, monkeypatch):
    """Where comfy_api is there the nodes come through `comfy_entrypoint`, with the same names and inputs."""
    import asyncio

    (tmp_path / "x.safetensors").touch()
    stub.install_schema(monkeypatch)
    newer = importlib.reload(nodes)
    assert newer.NODE_CLASS_MAPPINGS is None  # ComfyUI would take these first
    extension = asyncio.run(newer.comfy_entrypoint())
    made = asyncio.run(extension.get_node_list())
    older = importlib.import_module("comfyui.nodes").CLASSES
    for node in made:
        schema = node.define_schema()
        types = older[schema.node_id].INPUT_TYPES()
        wanted = {**types["required"], **types["optional"]}
        assert {entry.id for entry in schema.inputs} == set(wanted)
        for entry in schema.inputs:
            assert entry.optional == (entry.id in types["optional"])
            facts = wanted[entry.id][1]
            assert {name: entry.facts[name] for name in facts if name != "tooltip"} == {
                name: value for name, value in facts.items() if name != "tooltip"
            }
            assert entry.tooltip == facts["tooltip"]
    monkeypatch.setattr(importlib.import_module("comfyui.nodes"), "read_adapter", lambda *a: a)
    load = next(node for node in made if node.define_schema().node_id == "LowrankLoader")
    with pytest.raises(AttributeError):  # it reaches our code, with a model that is none
        load.execute(model=1, lora_name="x.safetensors", strength_model=1.0)


def test_imports_are_torch_and_safetensors():
    """Also where ComfyUI loads it by its path, under a name of its own."""
    support, root = ROOT / "tests" / "support", ROOT
    code = f"""
        import importlib.util, pathlib, sys
        sys.path.append({str(support)!r})
        import comfy_stub, pytest
        patch = pytest.MonkeyPatch()
        comfy_stub.install(patch, pathlib.Path("."))
        spec = importlib.util.spec_from_file_location("custom", {str(root / "comfyui" / "__init__.py")!r},
            submodule_search_locations=[{str(root / "comfyui")!r}])
        module = sys.modules["custom"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        assert len(module.NODE_CLASS_MAPPINGS) == 2
        heavy = {{"diffusers", "transformers", "accelerate", "peft", "bitsandbytes", "matplotlib", "PIL"}}
        assert not heavy & {{name.partition(".")[0] for name in sys.modules}}
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, cwd=root.parent
    )
    assert done.returncode == 0, done.stderr
