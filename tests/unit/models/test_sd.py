"""SD 1.5, SD 2 and SDXL as families: against the stock pipelines, as folders and as original files."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    FluxTransformer2DModel,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.loaders import single_file_utils as stock_reader
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from lowrank.errors import Refused
from lowrank.models import blocks, frozen, memory, published, sd_single
from lowrank.models.family import ROLES, Source, latent_scale
from lowrank.models.flux import FLUX
from lowrank.models.samplers import SAMPLERS, build_sampler
from lowrank.models.sd import PLAIN, SD15, SdOptions
from lowrank.models.sdxl import SDXL
from lowrank.models.single import Checkpoint, autoencoder_config, under_diffusers_names
from lowrank.naming import unet as unet_names
from lowrank.train.text_conditions import stack_text
from tools import make_tiny_flux, make_tiny_sd, tiny
from tools.single_file import vae_name

KINDS = ("sd15", "sd2", "sdxl")
FAMILIES = {"sd15": SD15, "sd2": SD15, "sdxl": SDXL}
LOADED: dict = {}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def folders(tiny_sd, tiny_sd2, tiny_sdxl):
    return {"sd15": tiny_sd, "sd2": tiny_sd2, "sdxl": tiny_sdxl}


@pytest.fixture(scope="module")
def all_models(folders):
    return {k: FAMILIES[k].load(Source(str(folders[k]), dtype=torch.float32)) for k in KINDS}


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def file_source(folder, **more) -> Source:
    single = folder / "single"
    return Source(
        str(single / "model.safetensors"),
        dtype=torch.float32,
        tokenizer_cache_dir=str(single / "tokenizers"),
        **more,
    )


def conditions(family, models, *captions, options=PLAIN, size=64):
    text = stack_text(family.encode_text(models, list(captions), options))
    if family.size_conditions is None:
        return text
    sizes = torch.full((len(captions), 2), size)
    return text | family.size_conditions(sizes, torch.zeros_like(sizes), sizes)


# ---------- against the stock pipelines


def test_sample_equals_the_stock_pipeline(kind, folders, all_models):
    family, models = FAMILIES[kind], all_models[kind]
    stock = (StableDiffusionXLPipeline if kind == "sdxl" else StableDiffusionPipeline).from_pretrained(
        folders[kind], **({} if kind == "sdxl" else {"safety_checker": None})
    )
    stock.set_progress_bar_config(disable=True)
    text = conditions(family, models, "a cat on the beach", "a dog")
    negative = conditions(family, models, "red")
    size = {"height": 64, "width": 48}
    ours = family.sample(models, text, **size, steps=3, generator=seeded(7), negative=negative, scale=4.0)
    expected = stock(
        ["a cat on the beach", "a dog"],
        negative_prompt=["red"] * 2,
        guidance_scale=4.0,
        num_inference_steps=3,
        generator=seeded(7),
        **size,
    ).images
    assert [image.size for image in ours] == [(48, 64)] * 2
    for a, b in zip(ours, expected, strict=True):
        assert torch.tensor(list(a.tobytes())).sub(torch.tensor(list(b.tobytes()))).abs().max() <= 1
    unguided = family.sample(models, text, **size, steps=3, generator=seeded(7))
    assert unguided[0].tobytes() != ours[0].tobytes()


def test_moments_latents_and_back(kind, all_models):
    family, models = FAMILIES[kind], all_models[kind]
    pixels = torch.rand(2, 3, 32, 48, generator=seeded()) * 2 - 1
    moments = family.encode_images(models, pixels)
    with torch.no_grad():
        expected = models.vae.encode(pixels).latent_dist
        factor = {"sd15": 0.18215, "sd2": 0.18215, "sdxl": 0.13025}[kind]
        z = family.latents(models, moments, None)
        assert torch.allclose(z, expected.mode() * factor, atol=1e-6)
        assert torch.allclose(family.decode(models, z), models.vae.decode(expected.mode()).sample, atol=1e-5)
    drawn = family.latents(models, moments, seeded(1))
    xi = torch.stack([torch.randn(z.shape[1:], generator=g) for g in [seeded(1)] for _ in range(2)])
    assert torch.allclose(drawn, (expected.mean + expected.std * xi) * factor, atol=1e-6)


def test_the_sizes_reach_sdxl(all_models):
    models = all_models["sdxl"]
    text = conditions(SDXL, models, "a dog")
    z, t = torch.randn(1, 4, 8, 8, generator=seeded()), torch.tensor([500])
    assert SDXL.size_conditions is not None
    told = SDXL.size_conditions(torch.tensor([[100, 200]]), torch.tensor([[3, 4]]), torch.tensor([[64, 32]]))
    assert told["time_ids"].tolist() == [[100, 200, 3, 4, 64, 32]]
    with torch.no_grad():
        base = SDXL.denoise(models.denoiser, z, t, text)
        for change in ({**told}, {"pooled": text["pooled"] + 1}, {"context": text["context"] + 1}):
            assert not torch.allclose(SDXL.denoise(models.denoiser, z, t, text | change), base)
    assert SD15.size_conditions is None


def test_denoise_batch_equals_single_samples(kind, all_models):
    """In float64: a CPU may choose another fp32 kernel for another batch size (1e-5 apart and more)."""
    family, models = FAMILIES[kind], all_models[kind]
    denoiser = copy.deepcopy(models.denoiser).double()
    text = {key: value.double() for key, value in conditions(family, models, "a dog", "two cats").items()}
    z, t = torch.randn(2, 4, 8, 6, generator=seeded()).double(), torch.tensor([10.0, 900.0])
    with torch.no_grad():
        both = family.denoise(denoiser, z, t, text)
        assert both.dtype == torch.float64
        for i in range(2):
            sample = {key: value[i : i + 1] for key, value in text.items()}
            alone = family.denoise(denoiser, z[i : i + 1], t[i : i + 1], sample)
            # float64 rounds at 1e-16; the deepest of these networks showed 4e-14
            assert torch.allclose(alone, both[i : i + 1], rtol=0, atol=1e-11)


@pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")  # diffusers' numpy 1 code
@pytest.mark.filterwarnings("ignore:.*dpmsolver:FutureWarning")  # kohya's name for what diffusers drops
@pytest.mark.parametrize("name", [*SAMPLERS, "k_euler_a"])
def test_every_sampler_draws(name, all_models):
    models = all_models["sd15"]
    text, negative = conditions(SD15, models, "a dog"), conditions(SD15, models, "")
    more = {"height": 32, "width": 32, "steps": 2, "negative": negative, "scale": 2.0, "sampler": name}
    if name == "lms":
        pytest.importorskip("scipy")
    one, two = (SD15.sample(models, text, generator=seeded(), **more)[0] for _ in range(2))
    assert one.size == (32, 32) and one.tobytes() == two.tobytes()
    made = build_sampler(name, models.configs["scheduler"])
    assert torch.allclose(made.alphas_cumprod, models.scheduler.alphas_cumprod)
    assert made.config.prediction_type == "epsilon"


def test_sampler_of_a_library_that_is_not_there(all_models, monkeypatch):
    import diffusers

    def absent(**_):
        raise ImportError("no scipy")

    monkeypatch.setattr(diffusers, "LMSDiscreteScheduler", absent)
    with pytest.raises(Refused, match=r"sampler lms needs another library \(no scipy\)"):
        build_sampler("lms", all_models["sd15"].configs["scheduler"])


def test_unknown_sampler_is_refused(all_models):
    with pytest.raises(Refused, match="sampler 'euler_b' is unknown"):
        build_sampler("euler_b", all_models["sd15"].configs["scheduler"])


# ---------- original files


def test_an_original_file_gives_the_same_model(kind, folders, all_models):
    family, models = FAMILIES[kind], all_models[kind]
    other = family.load(file_source(folders[kind], v_parameterization=kind == "sd2"))
    pairs = [(models.denoiser, other.denoiser), (models.vae, other.vae)]
    for ours, theirs in [*pairs, *zip(models.text_encoders, other.text_encoders, strict=True)]:
        a, b = ours.state_dict(), theirs.state_dict()
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    for fact in (family.prediction, family.architecture, family.base_model_version, family.bucket_step):
        assert fact(models) == fact(other)
    captions = ("a cat " * 50, "a dog")
    options = SdOptions(max_token_length=150, clip_skip=2)
    a, b = (conditions(family, m, *captions, options=options) for m in (models, other))
    assert all(torch.allclose(a[key], b[key], atol=1e-5) for key in a)
    z, t = torch.randn(2, 4, 8, 8, generator=seeded()), torch.tensor([10, 900])
    with torch.no_grad():
        assert torch.allclose(
            family.denoise(models.denoiser, z, t, a), family.denoise(other.denoiser, z, t, b), atol=1e-5
        )
    assert torch.equal(models.scheduler.alphas_cumprod, other.scheduler.alphas_cumprod)
    assert len({family.model_hash(other, role) for role in ROLES}) == 3


def full(config: dict) -> dict:
    """A published U-Net's tensors on the meta device under their original names."""
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(config)
    blocks = unet_names.Blocks.of(unet)
    return {unet_names.unet_name(name, blocks): value for name, value in unet.state_dict().items()}


def shapes_only(state: dict) -> Checkpoint:
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    return Checkpoint(Path("a file"), {name: name for name in state}, shapes)


def test_full_sizes_are_read_off_the_tensors(kind):
    facts = published.configurations(kind)
    state = full(facts["unet"])
    told = sd_single.unet_config(shapes_only(state))
    expected = facts["unet"]
    for key in expected.keys() - {"sample_size", "addition_time_embed_dim"}:
        assert told[key] == expected[key], key
    with torch.device("meta"):
        vae = AutoencoderKL.from_config(facts["vae"])
    vae_state = {vae_name(name, 4): value for name, value in vae.state_dict().items()}
    assert autoencoder_config(shapes_only(vae_state), facts["vae"]) == facts["vae"]
    assert (
        sum(p.numel() for p in state.values())
        == {
            "sd15": 859_520_964,
            "sd2": 865_910_724,
            "sdxl": 2_567_463_684,
        }[kind]
    )


def test_names_are_those_of_diffusers_converter(kind):
    """At full size our names, and diffusers' own reading of original files, agree on every tensor."""
    facts = published.configurations(kind)
    with torch.device("meta"):
        unet, vae = UNet2DConditionModel.from_config(facts["unet"]), AutoencoderKL.from_config(facts["vae"])
    blocks = unet_names.Blocks.of(unet)
    original = {
        f"model.diffusion_model.{unet_names.unet_name(k, blocks)}": v for k, v in unet.state_dict().items()
    }
    for key, value in vae.state_dict().items():
        told = vae_name(key, 4)
        original[f"first_stage_model.{told}"] = (
            value[..., None, None] if ".attn_1." in told and value.dim() == 2 else value
        )
    read = stock_reader.convert_ldm_unet_checkpoint(dict(original), config=dict(unet.config))
    assert {k: v.shape for k, v in read.items()} == {k: v.shape for k, v in unet.state_dict().items()}
    read = stock_reader.convert_ldm_vae_checkpoint(dict(original), config=dict(vae.config))
    assert {k: v.shape for k, v in read.items()} == {k: v.shape for k, v in vae.state_dict().items()}


def test_values_are_those_of_diffusers_converter(folders):
    """Tiny OpenCLIP, whose joined rows shapes do not tell apart: the same values, row by row."""
    state = load_file(folders["sdxl"] / "single" / "model.safetensors")
    model = CLIPTextModelWithProjection(CLIPTextConfig.from_pretrained(folders["sdxl"] / "text_encoder_2"))
    read = stock_reader.convert_open_clip_checkpoint(model, state, prefix="conditioner.embedders.1.model.")
    ours = load_file(next((folders["sdxl"] / "text_encoder_2").glob("*.safetensors")))
    assert all(torch.equal(read[key], value) for key, value in ours.items())
    unet = load_file(next((folders["sdxl"] / "unet").glob("*.safetensors")))
    config = UNet2DConditionModel.load_config(folders["sdxl"] / "unet")
    read = stock_reader.convert_ldm_unet_checkpoint(state, config=config)
    assert all(torch.equal(read[key], value) for key, value in unet.items())
    vae = load_file(next((folders["sdxl"] / "vae").glob("*.safetensors")))
    read = stock_reader.convert_ldm_vae_checkpoint(
        state, config=AutoencoderKL.load_config(folders["sdxl"] / "vae")
    )
    assert all(torch.equal(read[key], value) for key, value in vae.items())


def test_a_pickled_checkpoint_gives_its_tensors_and_runs_no_code(folders, all_models, tmp_path):
    state = load_file(folders["sd15"] / "single" / "model.safetensors")
    torch.save({"state_dict": state, "global_step": 3}, tmp_path / "model.ckpt")
    source = dataclasses.replace(file_source(folders["sd15"]), path=str(tmp_path / "model.ckpt"))
    other = SD15.load(source)
    own = all_models["sd15"].denoiser.state_dict()
    assert all(torch.equal(own[key], value) for key, value in other.denoiser.state_dict().items())

    class Evil:
        def __reduce__(self):
            return (print, ("run",))

    torch.save({"state_dict": state, "more": Evil()}, tmp_path / "model.ckpt")
    with pytest.raises(Refused, match="code in it is not run"):
        SD15.load(source)


def test_the_oldest_files_lack_a_level(folders, tmp_path):
    state = load_file(folders["sd15"] / "single" / "model.safetensors")
    state = {key.replace(".transformer.text_model.", ".transformer."): v for key, v in state.items()}
    save_file(state, tmp_path / "old.safetensors")
    source = dataclasses.replace(file_source(folders["sd15"]), path=str(tmp_path / "old.safetensors"))
    other = SD15.load(source, ("text",))
    own = SD15.load(file_source(folders["sd15"]), ("text",)).text_encoders[0].state_dict()
    assert all(torch.equal(own[k], v) for k, v in other.text_encoders[0].state_dict().items())


# ---------- another VAE


@pytest.mark.parametrize("layout", ["folder", "parent", "original", "prefixed", "diffusers"])
def test_vae_override(layout, folders, all_models, tmp_path):
    models = all_models["sd15"]
    shutil.copytree(folders["sd15"] / "vae", tmp_path / "vae")
    path = next((tmp_path / "vae").glob("*.safetensors"))
    state = {key: value * 1.25 for key, value in load_file(path).items()}
    save_file(state, path, {"format": "pt"})
    if layout in ("original", "prefixed"):
        prefix = "first_stage_model." if layout == "prefixed" else ""
        save_file({prefix + vae_name(key, 4): v for key, v in state.items()}, tmp_path / "v.safetensors")
    place = {"folder": tmp_path / "vae", "parent": tmp_path, "diffusers": path}
    given = str(place.get(layout, tmp_path / "v.safetensors"))
    other = SD15.load(Source(str(folders["sd15"]), vae=given, dtype=torch.float32), ("vae",))
    assert all(torch.equal(state[key], value) for key, value in other.vae.state_dict().items())
    assert SD15.model_hash(other, "vae") != SD15.model_hash(models, "vae")
    assert SD15.model_hash(other, "denoiser") == SD15.model_hash(models, "denoiser")
    file = SD15.load(dataclasses.replace(file_source(folders["sd15"]), vae=given), ("vae",))
    assert all(torch.equal(state[key], value) for key, value in file.vae.state_dict().items())


def test_a_vae_of_another_scale_is_refused(folders, tmp_path):
    for name in ("vae", "single/model.safetensors"):
        with pytest.raises(Refused, match=r"--vae .* scales latents by 0\.13025 .* at 0\.18215"):
            SD15.load(Source(str(folders["sd15"]), vae=str(folders["sdxl"] / name)), ())
    save_file({"lora_unet.alpha": torch.ones(1)}, tmp_path / "lora.safetensors")
    with pytest.raises(Refused, match="holds no VAE"):
        SD15.load(Source(str(folders["sd15"]), vae=str(tmp_path / "lora.safetensors")), ())


def test_configurations_from_before_diffusers_had_a_scale(kind, folders, tmp_path):
    """SD 1.5 as published and sd-vae-ft-mse do not say it; it is that of their kind of model."""
    shutil.copytree(folders[kind], tmp_path / "old")
    config = tmp_path / "old" / "vae" / "config.json"
    facts = json.loads(config.read_text())
    want = facts.pop("scaling_factor")
    config.write_text(json.dumps(facts))
    for source in (Source(str(tmp_path / "old")), Source(str(folders[kind]), vae=str(config.parent))):
        assert FAMILIES[kind].load(source, ()).configs["vae"]["scaling_factor"] == want


def test_no_half_vae(folders):
    models = SD15.load(
        Source(str(folders["sd15"]), dtype=torch.bfloat16, vae_dtype=torch.float32), ("vae", "denoiser")
    )
    assert models.vae.dtype == torch.float32 and models.denoiser.dtype == torch.bfloat16


# ---------- latents of another size


def test_a_vae_of_another_scale_and_more_channels(kind, tmp_path):
    folder = make_tiny_sd.make(tmp_path / "m", kind, levels=3, latent_channels=8, single=True)
    family = FAMILIES[kind]
    for source in (Source(str(folder), dtype=torch.float32), file_source(folder)):
        models = family.load(source)
        assert latent_scale(models) == 4 and family.bucket_step(models) == 8
        moments = family.encode_images(models, torch.zeros(1, 3, 64, 64))
        assert moments.shape == (1, 16, 16, 16)
        text = conditions(family, models, "a dog")
        z = family.latents(models, moments, seeded())
        with torch.no_grad():
            assert family.denoise(models.denoiser, z, torch.tensor([3]), text).shape == (1, 8, 16, 16)
        assert family.sample(models, text, height=64, width=48, steps=1, generator=seeded())[0].size == (
            48,
            64,
        )


def test_flux_takes_the_scale_from_its_vae_too(tmp_path):
    folder = make_tiny_flux.make(tmp_path / "m")
    vae = tiny.vae(3, latent_channels=8, scaling_factor=0.5, use_quant_conv=False, use_post_quant_conv=False)
    shutil.rmtree(folder / "vae")
    vae.save_pretrained(folder / "vae")
    with pytest.raises(Refused, match="takes 16 latent channels and the VAE makes 8"):
        FLUX.load(Source(str(folder)), ())
    config: dict = FluxTransformer2DModel.load_config(folder / "transformer")
    shutil.rmtree(folder / "transformer")
    small = {key: value for key, value in config.items() if not key.startswith("_")} | {"in_channels": 32}
    FluxTransformer2DModel(**small).save_pretrained(folder / "transformer")
    models = FLUX.load(Source(str(folder), dtype=torch.float32))
    assert (latent_scale(models), FLUX.bucket_step(models)) == (4, 8)
    moments = FLUX.encode_images(models, torch.zeros(1, 3, 24, 40))
    assert moments.shape == (1, 16, 6, 10)
    text = stack_text(FLUX.encode_text(models, ["a dog"]))
    assert FLUX.sample(models, text, height=24, width=40, steps=1, generator=seeded())[0].size == (40, 24)
    with pytest.raises(Refused, match="a sample of 40×20 does not fit"):
        FLUX.sample(models, text, height=20, width=40, steps=1, generator=seeded())


# ---------- what is known, and what is refused


def test_what_is_predicted(folders, all_models):
    assert [SD15.prediction(all_models[k]) for k in KINDS] == ["epsilon", "v_prediction", "epsilon"]
    assert [FAMILIES[k].base_model_version(all_models[k]) for k in KINDS] == [
        "sd_v1",
        "sd_v2_v",
        "sdxl_base_v1-0",
    ]
    asked = SD15.load(Source(str(folders["sd15"]), v_parameterization=True), ())
    assert SD15.prediction(asked) == "v_prediction"
    assert SD15.architecture(asked) == "stable-diffusion-v1"
    plain = SD15.load(file_source(folders["sd2"]), ())  # a file tells that it is SD 2, not what it predicts
    assert SD15.base_model_version(plain) == "sd_v2" and plain.scheduler.config.prediction_type == "epsilon"


def test_models_of_another_kind_are_refused(folders, tmp_path):
    with pytest.raises(Refused, match=r"is SDXL; train it with sdxl_train_network_ABM\.py"):
        SD15.load(Source(str(folders["sdxl"])), ())
    with pytest.raises(Refused, match=r"is SD 1 or SD 2; train it with train_network_ABM\.py"):
        SDXL.load(file_source(folders["sd15"]), ())
    (tmp_path / "flux" / "transformer").mkdir(parents=True)
    with pytest.raises(
        Refused, match=r"a transformer and no unet: FLUX is trained with flux_train_qrlora\.py"
    ):
        SD15.load(Source(str(tmp_path / "flux")), ())
    with pytest.raises(Refused, match=r"--v2 is given and .* is SD 1; leave it out"):
        SD15.load(Source(str(folders["sd15"]), v2=True), ())
    SD15.load(Source(str(folders["sd2"]), v2=True), ())
    weights = next((folders["sd15"] / "unet").glob("*.safetensors"))
    with pytest.raises(Refused, match="diffusers' layout: give its folder"):
        SD15.load(Source(str(weights)), ())
    state = load_file(folders["sd15"] / "single" / "model.safetensors")
    save_file({k: v for k, v in state.items() if "cond_stage" not in k}, tmp_path / "unet.safetensors")
    with pytest.raises(Refused, match="no text encoder"):
        SD15.load(Source(str(tmp_path / "unet.safetensors")), ())
    with pytest.raises(Refused, match="does not exist"):
        SD15.load(Source(str(tmp_path / "absent.ckpt")), ())
    with pytest.raises(Refused, match="neither a folder nor a hub id"):
        SD15.load(Source(str(tmp_path / "absent")), ())
    shutil.copytree(folders["sd15"], tmp_path / "inpainting")
    config = tmp_path / "inpainting" / "unet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"in_channels": 9}))
    with pytest.raises(Refused, match="takes 9 channels and its VAE makes 4"):
        SD15.load(Source(str(tmp_path / "inpainting")), ())


@pytest.mark.parametrize("name", ["unet", "vae", "text_encoder"])
@pytest.mark.parametrize("damage", ["cut", "lost", "shape", "nan"])
def test_damaged_parts_are_refused(name, damage, folders, tmp_path):
    shutil.copytree(folders["sd15"], tmp_path / "m")
    path = next((tmp_path / "m" / name).glob("*.safetensors"))
    state = load_file(path)
    key = sorted(key for key in state if state[key].dim() == 2)[0]
    if damage == "cut":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    else:
        change = {"shape": torch.zeros(3, 3), "nan": state[key] * float("nan")}
        state = {k: v for k, v in state.items() if damage != "lost" or k != key}
        save_file(state | ({key: change[damage]} if damage in change else {}), path, {"format": "pt"})
    with pytest.raises(Refused, match=name) as refused:
        SD15.load(Source(str(tmp_path / "m"), dtype=torch.float32))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("damage", ["cut", "lost", "shape", "nan"])
@pytest.mark.parametrize("part", ["input_blocks.4.0.in_layers.2.weight", "up.1.block.0.conv1.weight"])
def test_damaged_files_are_refused(part, damage, folders, tmp_path):
    path = tmp_path / "model.safetensors"
    shutil.copy(folders["sd15"] / "single" / "model.safetensors", path)
    state = load_file(path)
    key = next(key for key in state if key.endswith(part))
    if damage == "cut":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    else:
        change = {"shape": torch.zeros(3, 3, 3, 3), "nan": state[key] * float("nan")}
        state = {k: v for k, v in state.items() if damage != "lost" or k != key}
        save_file(state | ({key: change[damage]} if damage in change else {}), path)
    with pytest.raises(Refused, match=r"model\.safetensors") as refused:
        SD15.load(dataclasses.replace(file_source(folders["sd15"]), path=str(path)))
    assert "\n" not in str(refused.value)


def test_tokenizers_that_are_not_there_are_refused(folders, tmp_path, monkeypatch):
    from transformers import CLIPTokenizer

    def offline(*_args, **_kwargs):
        raise OSError("offline")

    monkeypatch.setattr(CLIPTokenizer, "from_pretrained", offline)
    source = dataclasses.replace(file_source(folders["sdxl"]), tokenizer_cache_dir=str(tmp_path))
    with pytest.raises(Refused, match=r"put its files into .*openai_clip-vit-large-patch14"):
        SDXL.load(source, ("text",))


def test_sides_that_do_not_fit_are_refused(all_models):
    with pytest.raises(Refused, match="36×32 does not fit this model: both sides must be multiples of 8"):
        SD15.encode_images(all_models["sd15"], torch.zeros(1, 3, 32, 36))
    text = conditions(SD15, all_models["sd15"], "a dog")
    with pytest.raises(Refused, match="a sample of 30×32"):
        SD15.sample(all_models["sd15"], text, height=32, width=30, steps=1, generator=seeded())


# ---------- memory


def test_checkpointed_gradients_are_the_same(kind, all_models):
    family, models = FAMILIES[kind], all_models[kind]
    text = conditions(family, models, "a dog")
    z, t = torch.randn(1, 4, 8, 8, generator=seeded()), torch.tensor([400])
    found = []
    for checkpointed in (False, True):
        unet = copy.deepcopy(models.denoiser).train()
        if checkpointed:
            memory.checkpoint_blocks(unet)
        noisy = z.clone().requires_grad_(True)
        family.denoise(unet, noisy, t, text).square().mean().backward()
        found.append(noisy.grad)
    assert torch.allclose(*found, atol=1e-7) and found[0].abs().max() > 0


def test_fp8_storage(kind, folders):
    family = FAMILIES[kind]
    models = family.load(Source(str(folders[kind]), dtype=torch.bfloat16))
    text = conditions(family, models, "a dog")
    z, t = torch.randn(1, 4, 8, 8, generator=seeded()), torch.tensor([400])
    with torch.no_grad():
        before = family.denoise(models.denoiser, z, t, text)
        blocks.freeze_base(models.denoiser)
        blocks.store_base(models.denoiser, "fp8")
        after = family.denoise(models.denoiser, z, t, text)
    small = [layer for layer in frozen.frozen_layers(models.denoiser) if layer.format.kind == "fp8"]
    assert len(small) > 50 and after.dtype == torch.bfloat16
    assert (after - before).abs().max() < 0.25 * before.abs().max()


def test_attention_kernels(all_models):
    models = all_models["sd15"]
    text = conditions(SD15, models, "a dog")
    z, t = torch.randn(1, 4, 8, 8, generator=seeded()), torch.tensor([400])
    unet = copy.deepcopy(models.denoiser)
    with torch.no_grad():
        base = SD15.denoise(unet, z, t, text)
        memory.attention(unet, "sdpa")
        assert torch.allclose(SD15.denoise(unet, z, t, text), base, atol=1e-6)
    with pytest.raises(Refused, match=r"attention 'xformers' is not available here .* use sdpa"):
        memory.attention(unet, "xformers")
    with pytest.raises(Refused, match="attention 'sage' is not available here"):
        memory.attention(unet, "sage")
    asked = []
    unet.enable_xformers_memory_efficient_attention = lambda: asked.append(True)
    memory.attention(unet, "xformers")
    assert asked


def test_the_empty_denoiser_has_the_shapes(kind, all_models):
    family, models = FAMILIES[kind], all_models[kind]
    empty = family.empty(models)
    own = models.denoiser.state_dict()
    assert all(v.is_meta and v.shape == own[k].shape for k, v in empty.state_dict().items())


def test_original_vae_reads_names_from_before_diffusers_0_15():
    names = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
    state = {f"encoder.mid_block.attentions.0.{n}.weight": torch.zeros(2, 2) for n in names}
    state["decoder.up_blocks.0.resnets.0.conv1.weight"] = torch.zeros(2, 2)
    assert set(under_diffusers_names(state)) == {
        *(f"encoder.mid_block.attentions.0.{n}.weight" for n in names.values()),
        "decoder.up_blocks.0.resnets.0.conv1.weight",
    }


def test_the_maker_of_tiny_models_is_a_command(tmp_path, capsys):
    make_tiny_sd.main([str(tmp_path / "m"), "--kind", "sd2", "--single"])
    assert capsys.readouterr().out.strip() == str(tmp_path / "m")
    file = tmp_path / "m" / "single" / "model.safetensors"
    before = file.read_bytes()
    make_tiny_sd.main([str(tmp_path / "m"), "--kind", "sd2", "--single"])  # left as it is
    assert file.read_bytes() == before
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").touch()
    with pytest.raises(SystemExit, match="is not a tiny Stable Diffusion of this tool"):
        make_tiny_sd.main([str(tmp_path / "other")])
