"""Loading FLUX: parts that come and go, all that can be broken, hashes, and single checkpoint files."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from files import FLUX_DEV
from safetensors.torch import load_file, save_file
from transformers import CLIPTokenizer

from lowrank.errors import Refused
from lowrank.models import components, family, flux_load, flux_single
from lowrank.models.family import Models, Source
from lowrank.models.flux import FLUX, FluxOptions
from lowrank.models.single import Checkpoint
from lowrank.train.text_conditions import stack_text


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def broken(folder, tmp_path):
    """A copy of the tiny folder that a test may damage."""
    shutil.copytree(folder, tmp_path / "model")
    return tmp_path / "model"


def text_of(models: Models, *captions: str, **options) -> dict:
    return stack_text(FLUX.encode_text(models, list(captions), FluxOptions(**options)))


# ---------- loading, releasing


def test_parts_come_and_go(folder):
    models = FLUX.load(Source(str(folder), dtype=torch.float32), roles=("text", "vae"))
    assert models.denoiser is None and models.configs["denoiser"]["guidance_embeds"]
    text = text_of(models, "a dog")
    moments = FLUX.encode_images(models, torch.zeros(1, 3, 32, 32))
    family.release(models, ("text", "vae"))
    assert models.text_encoders == models.tokenizers == () and models.vae is None
    FLUX.add(models, ("denoiser",))
    z = FLUX.latents(models, moments, seeded())
    assert FLUX.denoise(models.denoiser, z, torch.tensor([500.0]), text).shape == z.shape
    assert not any(p.requires_grad for p in models.denoiser.parameters()) and not models.denoiser.training
    assert next(models.denoiser.parameters()).dtype == torch.float32
    family.move(models, ("denoiser", "vae", "text"), "cpu")
    with pytest.raises(ValueError, match="'unet' is not one of"):
        family.release(models, ("unet",))


@pytest.mark.parametrize(
    "name", ["transformer", "vae", "text_encoder", "text_encoder_2", "tokenizer", "scheduler"]
)
def test_missing_component_is_named(broken, name):
    shutil.rmtree(broken / name)
    with pytest.raises(Refused, match=f"model has no '{name}'"):
        FLUX.load(Source(str(broken)))


@pytest.mark.parametrize("text", ["[]", "{}"])
@pytest.mark.parametrize(
    "file",
    [
        "transformer/config.json",
        "vae/config.json",
        "text_encoder/config.json",
        "scheduler/scheduler_config.json",
        "tokenizer/tokenizer_config.json",
        "tokenizer_2/tokenizer.json",
    ],
)
def test_json_of_another_kind_is_refused_or_harmless(broken, file, text):
    assert (broken / file).exists()
    (broken / file).write_text(text)
    try:
        FLUX.load(Source(str(broken)))
    except Refused as refused:
        assert file.split("/")[0] in str(refused)
    else:
        assert text == "{}" and file.split("/")[0] in ("tokenizer",)


@pytest.mark.parametrize("name", ["clip_l", "t5xxl", "ae"])
def test_a_companion_that_is_not_there_is_refused(folder, tmp_path, name):
    with pytest.raises(Refused, match=f"--{name} .* does not exist"):
        FLUX.load(Source(str(folder), **{name: str(tmp_path / "nothing")}), roles=())
    if name != "ae":
        with pytest.raises(Refused, match=f"--{name} .* is a folder"):
            FLUX.load(Source(str(folder), **{name: str(tmp_path)}), roles=())


def weights_of(root, name):
    return next((root / name).glob("*.safetensors"))


@pytest.mark.parametrize("name", ["transformer", "vae", "text_encoder", "text_encoder_2"])
@pytest.mark.parametrize("damage", ["cut", "lost", "shape", "nan"])
def test_damaged_weights_are_refused(broken, name, damage):
    path = weights_of(broken, name)
    state = load_file(path)
    key = sorted(key for key in state if state[key].dim() == 2 or name == "vae")[0]
    if damage == "cut":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif damage == "lost":
        del state[key]
    elif damage == "shape":
        state[key] = torch.zeros(3, 3)
    else:
        state[key].view(-1)[1] = float("nan")
    if damage != "cut":
        save_file(state, path, {"format": "pt"})
    with pytest.raises(Refused, match=name) as refused:
        FLUX.load(Source(str(broken), dtype=torch.float32))
    if damage in ("lost", "nan"):
        assert key.split(".")[-2] in str(refused.value)
    assert "\n" not in str(refused.value)


def test_weights_without_a_configuration_are_refused(broken):
    (broken / "transformer" / "config.json").write_text("{")
    with pytest.raises(Refused, match="transformer"):
        FLUX.load(Source(str(broken)))


@pytest.mark.parametrize("path", ["no/such/folder", "/no/such", "./x/y", "typo"])
def test_path_that_is_nothing(path):
    with pytest.raises(Refused, match="is neither a folder nor a hub id"):
        FLUX.load(Source(path))


def test_hub_id_is_downloaded_once_and_errors_are_one_sentence(folder, monkeypatch):
    asked = []

    def download(name, **options):
        asked.append((name, options["revision"]))
        if name == "a/gated":
            raise OSError("gated\nlong story")
        return str(folder)

    monkeypatch.setattr(FluxPipeline, "download", download)
    models = FLUX.load(Source("a/model", revision="r1"), roles=())
    assert models.root == folder and asked == [("a/model", "r1")]
    with pytest.raises(Refused, match=r"no folder 'a/gated'.*: gated; check"):
        FLUX.load(Source("a/gated"), roles=())


def test_local_folder_never_asks_the_hub(folder, monkeypatch):
    """With every socket refused the folder still loads, tokenizers included."""
    import socket

    def refuse(*_args, **_kwargs):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    FLUX.load(Source(str(folder)))


def test_older_clip_key_names_load(models, broken):
    """FLUX.1-dev's own files say text_model.…; transformers 5 writes them without."""
    path = weights_of(broken, "text_encoder")
    state = {f"text_model.{key.removeprefix('text_model.')}": v for key, v in load_file(path).items()}
    save_file(state, path, {"format": "pt"})
    again = FLUX.load(Source(str(broken), dtype=torch.float32), roles=("text",))
    for key, value in text_of(models, "a dog").items():
        assert torch.equal(text_of(again, "a dog")[key], value)


def test_vae_override(models, broken, folder):
    path = weights_of(broken, "vae")
    save_file({key: value * 1.5 for key, value in load_file(path).items()}, path, {"format": "pt"})
    pixels = torch.rand(1, 3, 32, 32, generator=seeded())
    own = FLUX.encode_images(models, pixels)
    for place in (broken, broken / "vae"):
        other = FLUX.load(Source(str(folder), vae=str(place), dtype=torch.float32), roles=("vae",))
        assert not torch.allclose(FLUX.encode_images(other, pixels), own)
        assert (
            FLUX.model_hash(other, "vae")
            == FLUX.model_hash(str(broken), "vae")
            != FLUX.model_hash(models, "vae")
        )


# ---------- hashes


def test_hash_names_the_weights(models, folder, broken, monkeypatch):
    assert FLUX.model_hash(str(folder), "denoiser") == FLUX.model_hash(models, "denoiser")
    assert len({FLUX.model_hash(models, role) for role in family.ROLES}) == 3
    for role in family.ROLES:
        assert FLUX.model_hash(str(broken), role) == FLUX.model_hash(models, role)  # not the place
    config = broken / "transformer" / "config.json"
    facts = json.loads(config.read_text())
    config.write_text(json.dumps({**facts, "_diffusers_version": "0"}))
    assert FLUX.model_hash(str(broken), "denoiser") == FLUX.model_hash(models, "denoiser")
    for whole in (64 << 20, 0):  # byte for byte, then as large files are
        monkeypatch.setattr(components, "_WHOLE", whole)
        before = FLUX.model_hash(str(broken), "denoiser")
        path = weights_of(broken, "transformer")
        state = load_file(path)
        key = "single_transformer_blocks.1.attn.to_k.weight"  # 64 KiB: read in three pieces
        for at in (0, state[key].numel() // 2, -1):
            state[key].view(-1)[at] += 0.01
            save_file(state, path, {"format": "pt"})
            after = FLUX.model_hash(str(broken), "denoiser")
            assert after != before
            before = after
    assert FLUX.model_hash(str(broken), "vae") == FLUX.model_hash(str(folder), "vae")


def test_every_role_has_its_folders():
    assert set(flux_load.FLUX_PARTS.folders) == set(family.ROLES)


# ---------- single files


def bfl_state(state: dict, double: int, single: int) -> dict:
    """A diffusers transformer in Black Forest Labs' layout, written out here independently of the reader."""
    names = {
        "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
        "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
        "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
        "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
        "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
        "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
        "txt_in": "context_embedder",
        "img_in": "x_embedder",
        "final_layer.linear": "proj_out",
    }
    names = {a: b for a, b in names.items() if f"{b}.weight" in state}  # schnell has no guidance
    out = {f"{a}.{k}": state[f"{b}.{k}"] for a, b in names.items() for k in ("weight", "bias")}
    for k in ("weight", "bias"):
        scale, shift = state[f"norm_out.linear.{k}"].chunk(2)
        out[f"final_layer.adaLN_modulation.1.{k}"] = torch.cat([shift, scale])
    for i in range(double):
        ours, theirs = f"transformer_blocks.{i}", f"double_blocks.{i}"
        for k in ("weight", "bias"):
            for side, norm, q, o, ff in (
                ("img", "norm1", ("to_q", "to_k", "to_v"), "to_out.0", "ff"),
                (
                    "txt",
                    "norm1_context",
                    ("add_q_proj", "add_k_proj", "add_v_proj"),
                    "to_add_out",
                    "ff_context",
                ),
            ):
                out[f"{theirs}.{side}_mod.lin.{k}"] = state[f"{ours}.{norm}.linear.{k}"]
                out[f"{theirs}.{side}_attn.qkv.{k}"] = torch.cat([state[f"{ours}.attn.{n}.{k}"] for n in q])
                out[f"{theirs}.{side}_attn.proj.{k}"] = state[f"{ours}.attn.{o}.{k}"]
                out[f"{theirs}.{side}_mlp.0.{k}"] = state[f"{ours}.{ff}.net.0.proj.{k}"]
                out[f"{theirs}.{side}_mlp.2.{k}"] = state[f"{ours}.{ff}.net.2.{k}"]
        for side, added in (("img", ""), ("txt", "added_")):
            for n, short in (("query", "q"), ("key", "k")):
                own = state[f"{ours}.attn.norm_{added}{short}.weight"]
                out[f"{theirs}.{side}_attn.norm.{n}_norm.scale"] = own
    for i in range(single):
        ours, theirs = f"single_transformer_blocks.{i}", f"single_blocks.{i}"
        for k in ("weight", "bias"):
            joined = [state[f"{ours}.{n}.{k}"] for n in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")]
            out[f"{theirs}.linear1.{k}"] = torch.cat(joined)
            out[f"{theirs}.linear2.{k}"] = state[f"{ours}.proj_out.{k}"]
            out[f"{theirs}.modulation.lin.{k}"] = state[f"{ours}.norm.linear.{k}"]
        for n, short in (("query", "q"), ("key", "k")):
            out[f"{theirs}.norm.{n}_norm.scale"] = state[f"{ours}.attn.norm_{short}.weight"]
    return out


def bfl_autoencoder(state: dict) -> dict:
    """A diffusers AutoencoderKL in the names of BFL's autoencoder file."""
    out = {}
    for key, value in state.items():
        name = key.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
        name = name.replace("mid_block.resnets.0", "mid.block_1").replace(
            "mid_block.resnets.1", "mid.block_2"
        )
        name = name.replace("mid_block.attentions.0", "mid.attn_1").replace("group_norm", "norm")
        for ours, theirs in (("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "proj_out")):
            if f"attn_1.{ours}." in name:
                name = name.replace(ours, theirs)
                value = value[:, :, None, None] if value.dim() == 2 else value
        for i in range(4):
            name = name.replace(f"down_blocks.{i}.resnets", f"down.{i}.block")
            name = name.replace(f"down_blocks.{i}.downsamplers.0", f"down.{i}.downsample")
            name = name.replace(f"up_blocks.{i}.resnets", f"up.{3 - i}.block")
            name = name.replace(f"up_blocks.{i}.upsamplers.0", f"up.{3 - i}.upsample")
        out[name] = value.contiguous()
    return out


@pytest.fixture(scope="module")
def single(folder, tmp_path_factory):
    """The tiny model as kohya's users keep FLUX: four files, and tokenizers in a cache folder."""
    root = tmp_path_factory.mktemp("single")
    state = bfl_state(load_file(weights_of(folder, "transformer")), 2, 2)
    save_file(
        {f"model.diffusion_model.{k}": v.contiguous() for k, v in state.items()}, root / "flux.safetensors"
    )
    save_file(bfl_autoencoder(load_file(weights_of(folder, "vae"))), root / "ae.safetensors")
    clip = load_file(weights_of(folder, "text_encoder"))
    clip = {f"text_model.{k.removeprefix('text_model.')}": v for k, v in clip.items()}
    save_file({**clip, "text_projection.weight": torch.zeros(2, 2)}, root / "clip_l.safetensors")
    shutil.copy(weights_of(folder, "text_encoder_2"), root / "t5xxl.sft")
    for ours, theirs in (
        ("tokenizer", "openai_clip-vit-large-patch14"),
        ("tokenizer_2", "google_t5-v1_1-xxl"),
    ):
        shutil.copytree(folder / ours, root / "tokenizers" / theirs)
    return Source(
        str(root / "flux.safetensors"),
        dtype=torch.float32,
        ae=str(root / "ae.safetensors"),
        clip_l=str(root / "clip_l.safetensors"),
        t5xxl=str(root / "t5xxl.sft"),
        tokenizer_cache_dir=str(root / "tokenizers"),
    )


def test_single_files_give_the_same_model(models, single):
    other = FLUX.load(single)
    ours, theirs = models.denoiser.state_dict(), other.denoiser.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert FLUX.architecture(other) == "flux-1-dev"
    assert other.scheduler.config.use_dynamic_shifting and other.denoiser.config.num_attention_heads == 4
    pixels = torch.rand(1, 3, 32, 32, generator=seeded())
    assert torch.allclose(FLUX.encode_images(models, pixels), FLUX.encode_images(other, pixels), atol=1e-5)
    a, b = text_of(models, "a <s> dog"), text_of(other, "a <s> dog")
    assert all(torch.allclose(a[key].float(), b[key].float(), atol=1e-5) for key in a)
    images = [
        FLUX.sample(m, a, height=32, width=32, steps=1, generator=seeded())[0].tobytes()
        for m in (models, other)
    ]
    assert images[0] == images[1]
    assert len({FLUX.model_hash(other, role) for role in family.ROLES}) == 3


@pytest.mark.parametrize("guidance", [True, False], ids=["dev", "schnell"])
def test_single_file_layout_is_diffusers_own(guidance):
    """At FLUX.1's real size the reader and diffusers' converter agree on every name and shape."""
    from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers

    config = {**FLUX_DEV, "guidance_embeds": guidance}
    with torch.device("meta"):
        state = FluxTransformer2DModel(**config).state_dict()
    bfl = bfl_state(state, 19, 38)
    ours = {name: value.shape for key, v in bfl.items() for name, value in flux_single.to_diffusers(key, v)}
    assert (
        flux_single.transformer_config(Checkpoint(Path("x"), {}, {k: tuple(v.shape) for k, v in bfl.items()}))
        == config
    )
    theirs = convert_flux_transformer_checkpoint_to_diffusers(dict(bfl))
    assert (
        ours == {key: value.shape for key, value in theirs.items()} == {k: v.shape for k, v in state.items()}
    )


def test_fp8_single_file_is_widened(single, tmp_path):
    state = {k: v.to(torch.float8_e4m3fn) for k, v in load_file(single.path).items()}
    save_file(state, tmp_path / "flux-fp8.safetensors")
    source = dataclasses.replace(single, path=str(tmp_path / "flux-fp8.safetensors"), dtype=torch.bfloat16)
    model = FLUX.load(source, ("denoiser",)).denoiser
    key = "model.diffusion_model.img_in.weight"
    assert torch.equal(model.x_embedder.weight, state[key].to(torch.bfloat16))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"t5xxl": None}, "name its companion with --t5xxl"),
        ({"ae": None}, "name its companion with --ae"),
        ({"clip_l": "/no/such.safetensors"}, "--clip_l '/no/such.safetensors' does not exist"),
        ({"path": "/no/such.ckpt"}, "does not exist"),
    ],
)
def test_single_file_refusals(single, change, said):
    with pytest.raises(Refused, match=said):
        FLUX.load(Source(**{**single.__dict__, **change}), roles=())


def test_other_files_are_refused(single, folder, tmp_path):
    (tmp_path / "sd" / "unet").mkdir(parents=True)
    with pytest.raises(
        Refused, match=r"a unet and no transformer: SD 1 and SD 2 .* sdxl_train_network_ABM\.py"
    ):
        FLUX.load(Source(str(tmp_path / "sd")), roles=())
    with pytest.raises(Refused, match="diffusers' layout: give its folder"):
        FLUX.load(Source(**{**single.__dict__, "path": str(weights_of(folder, "transformer"))}), roles=())
    with pytest.raises(Refused, match="it is another model"):
        FLUX.load(Source(**{**single.__dict__, "path": single.clip_l}), roles=())
    (tmp_path / "x.ckpt").write_bytes(b"x")
    with pytest.raises(Refused, match="pickled checkpoints are not opened"):
        FLUX.load(Source(**{**single.__dict__, "path": str(tmp_path / "x.ckpt")}), roles=())


def test_absent_tokenizer_is_refused(single, monkeypatch, tmp_path):
    def offline(*_args, **_kwargs):
        raise OSError("offline")

    monkeypatch.setattr(CLIPTokenizer, "from_pretrained", offline)
    source = Source(**{**single.__dict__, "tokenizer_cache_dir": str(tmp_path)})
    with pytest.raises(Refused, match=r"put its files into .*openai_clip-vit-large-patch14"):
        FLUX.load(source, ("text",))


def test_a_tokenizer_without_words_is_refused(tiny_flux, tmp_path):
    shutil.copytree(tiny_flux, tmp_path / "model")
    for file in (tmp_path / "model" / "tokenizer").glob("[vmt]*"):  # vocab.json, merges.txt, tokenizer.json
        if file.name != "tokenizer_config.json":
            file.unlink()
    with pytest.raises(Refused, match="tokenizer"):
        FLUX.load(Source(str(tmp_path / "model"), dtype=torch.float32), ("text",))
