"""The FLUX family on the tiny model: against the stock FluxPipeline, and against itself."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import shutil

import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from safetensors.torch import load_file, save_file

from lowrank.errors import Refused
from lowrank.models import family, flux_load, flux_single, memory
from lowrank.models.family import Models, Source
from lowrank.models.flux import FLUX, FluxOptions, flux_dev_config, image_ids, pack, unpack
from tools.make_tiny_flux import make, transformer

CAPTIONS = ["a <c> dog in <s> style", "a [sks] dog", "a dog", "<s>", "<c>", "[sks]", "a cat", ""]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make(tmp_path_factory.mktemp("flux") / "tiny")


@pytest.fixture(scope="module")
def stock(folder):
    pipe = FluxPipeline.from_pretrained(folder, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def models(folder):
    return FLUX.load(Source(str(folder), dtype=torch.float32))


@pytest.fixture
def broken(folder, tmp_path):
    """A copy of the tiny folder that a test may damage."""
    shutil.copytree(folder, tmp_path / "model")
    return tmp_path / "model"


def text_of(models: Models, *captions: str, **options) -> dict:
    return FLUX.stack_text(FLUX.encode_text(models, list(captions), FluxOptions(**options)))


# ---------- the tiny model


def digests(folder):
    return {p.relative_to(folder): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*.*")}


def test_tiny_is_deterministic_and_idempotent(folder, tmp_path):
    state = torch.get_rng_state()
    again = make(tmp_path / "again")
    assert torch.equal(torch.get_rng_state(), state)
    assert digests(again) == digests(folder)
    before = (again / "model_index.json").stat().st_mtime_ns
    make(again)
    assert (again / "model_index.json").stat().st_mtime_ns == before
    other = make(tmp_path / "other", seed=1)
    assert digests(other) != digests(folder)
    make(again, seed=1)
    assert digests(again) == digests(other)


def test_tiny_never_writes_over_a_foreign_folder(tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(Refused, match="is not a tiny FLUX of this tool"):
        make(tmp_path)
    assert (tmp_path / "mine.txt").read_text() == "keep"


def test_tiny_paints_through_the_stock_pipeline(stock):
    def paint(seed, prompt):
        return stock(
            prompt, height=64, width=96, num_inference_steps=2, max_sequence_length=32, generator=seeded(seed)
        ).images[0]

    one, same, other, said = paint(0, "a cat"), paint(0, "a cat"), paint(1, "a cat"), paint(0, "a dog")
    assert one.size == (96, 64)
    assert one.tobytes() == same.tobytes() != other.tobytes()
    assert one.tobytes() != said.tobytes()
    low, high = one.convert("L").getextrema()
    assert high - low > 20  # not plain grey


def test_tokenizers_tell_captions_apart(stock):
    for tokens in (stock.tokenizer, stock.tokenizer_2):
        ids = [tuple(tokens(caption).input_ids) for caption in CAPTIONS]
        assert len(set(ids)) == len(CAPTIONS)
        assert tuple(tokens("a dog").input_ids) == tuple(tokens("a  dog ").input_ids)
    assert stock.tokenizer.tokenize("a dog") == ["a</w>", "dog</w>"]
    assert stock.tokenizer_2.tokenize("a dog") == ["▁a", "▁dog"]


def test_tiny_has_flux_dev_geometry(models):
    assert models.denoiser.config.guidance_embeds and models.scheduler.config.use_dynamic_shifting
    assert (
        models.vae.config.latent_channels == FLUX.latent_channels == models.denoiser.config.in_channels // 4
    )
    assert 2 ** (len(models.vae.config.block_out_channels) - 1) == FLUX.latent_scale


def test_wide(tmp_path):
    wide = make(tmp_path / "wide", size="wide")
    config = FluxTransformer2DModel.load_config(wide / "transformer")
    assert config["attention_head_dim"] * config["num_attention_heads"] >= 1024


def test_flux_dev_facts():
    with torch.device("meta"):
        model = FluxTransformer2DModel(**flux_dev_config())
    assert sum(p.numel() for p in model.parameters()) == 11_901_408_320


# ---------- pictures


def test_vae_round_trip(models, stock):
    pixels = torch.rand(2, 3, 32, 48, generator=seeded()) * 2 - 1
    moments = FLUX.encode_images(models, pixels)
    assert moments.shape == (2, 32, 4, 6) and moments.dtype == torch.float32
    with torch.no_grad():
        posterior = stock.vae.encode(pixels).latent_dist
        assert torch.allclose(moments, posterior.parameters, atol=1e-6)
        scale, shift = stock.vae.config.scaling_factor, stock.vae.config.shift_factor
        z = FLUX.latents(models, moments, None)
        assert torch.allclose(z, (posterior.mean - shift) * scale, atol=1e-6)
        expected = stock.vae.decode(posterior.mean).sample
    assert torch.allclose(FLUX.decode(models, z), expected, atol=1e-5)


def test_latents_are_drawn_per_sample(models):
    moments = torch.randn(3, 32, 4, 4, generator=seeded())
    together, one_by_one = FLUX.latents(models, moments, seeded(1)), seeded(1)
    apart = [FLUX.latents(models, moments[i : i + 1], one_by_one) for i in range(3)]
    assert torch.equal(together, torch.cat(apart))
    many = torch.stack([FLUX.latents(models, moments[:1], seeded(s))[0] for s in range(400)])
    logvar = moments[:1].chunk(2, dim=1)[1]
    scale = models.configs["vae"]["scaling_factor"]
    assert torch.allclose(many.std(0) / scale, torch.exp(logvar[0] / 2), rtol=0.2)
    assert torch.allclose(many.mean(0), FLUX.latents(models, moments[:1], None)[0], atol=0.6)


def test_side_not_divisible_is_refused(models):
    with pytest.raises(Refused, match="40×32 does not fit FLUX: both sides must be multiples of 16"):
        FLUX.encode_images(models, torch.zeros(1, 3, 32, 40))


def test_overflowing_vae_is_refused(models):
    odd = Models(models.source, models.root, vae=copy.deepcopy(models.vae))
    with torch.no_grad():
        odd.vae.encoder.conv_in.weight.fill_(float("inf"))
    with pytest.raises(Refused, match="--no_half_vae"):
        FLUX.encode_images(odd, torch.zeros(1, 3, 32, 32))


# ---------- text


@pytest.mark.parametrize("length", [None, 24])
def test_text_equals_encode_prompt(models, stock, length):
    encoded = FLUX.encode_text(models, CAPTIONS, FluxOptions(t5xxl_max_token_length=length))
    with torch.no_grad():
        t5, pooled, _ = stock.encode_prompt(CAPTIONS, max_sequence_length=length or 64)
    stacked = FLUX.stack_text(encoded)
    assert stacked["t5"].shape == (len(CAPTIONS), length or 64, 64)
    assert torch.allclose(stacked["t5"], t5, atol=1e-5) and torch.allclose(
        stacked["pooled"], pooled, atol=1e-5
    )
    assert stacked["t5_mask"].sum(1).tolist() == [len(stock.tokenizer_2(c).input_ids) for c in CAPTIONS]
    assert all(value.device.type == "cpu" for value in encoded[0].values())


def test_a_caption_does_not_depend_on_its_neighbours(models):
    alone, among = FLUX.encode_text(models, ["a dog"])[0], FLUX.encode_text(models, CAPTIONS)[2]
    assert all(torch.equal(alone[key], among[key]) for key in alone)


def test_t5_mask_hides_the_padding_from_t5(models):
    plain, masked = text_of(models, "a dog"), text_of(models, "a dog", apply_t5_attn_mask=True)
    assert not torch.allclose(plain["t5"][:, :3], masked["t5"][:, :3], atol=1e-4)
    short = text_of(models, "a dog", apply_t5_attn_mask=True, t5xxl_max_token_length=8)
    assert torch.allclose(masked["t5"][:, :3], short["t5"][:, :3], atol=1e-5)


def test_a_cut_caption_is_said(models, caplog):
    FLUX.encode_text(models, ["cat " * 100])
    assert "caption cut to 64 T5 tokens" in caplog.text


# ---------- denoising


def test_packing_is_the_stock_packing():
    z = torch.randn(2, 16, 6, 8, generator=seeded())
    tokens = pack(z)
    assert torch.equal(tokens, FluxPipeline._pack_latents(z, 2, 16, 6, 8))
    assert torch.equal(unpack(tokens, 6, 8), z)
    assert torch.equal(FluxPipeline._unpack_latents(tokens, 48, 64, 8), z)
    assert torch.equal(
        image_ids(6, 8, "cpu"), FluxPipeline._prepare_latent_image_ids(2, 3, 4, "cpu", torch.float32)
    )


def test_denoise_is_the_stock_step(models, stock):
    """What the stock pipeline's loop gives its transformer, taken from inside it, gives the same velocity."""
    seen = []

    def keep(_module, _args, kwargs, output):
        seen.append((kwargs, output[0]))

    hook = stock.transformer.register_forward_hook(keep, with_kwargs=True)
    prompts = ["a dog", "a <c> cat"]
    stock(
        prompts,
        height=48,
        width=64,
        num_inference_steps=2,
        max_sequence_length=24,
        guidance_scale=2.0,
        generator=seeded(),
        output_type="latent",
    )
    hook.remove()
    text = text_of(models, *prompts, t5xxl_max_token_length=24)
    assert len(seen) == 2
    for kwargs, output in seen:
        noisy = FluxPipeline._unpack_latents(kwargs["hidden_states"], 48, 64, 8)
        v = FLUX.denoise(
            models.denoiser, noisy, kwargs["timestep"] * 1000, text, FluxOptions(guidance_scale=2.0)
        )
        assert v.shape == noisy.shape
        assert torch.allclose(v, FluxPipeline._unpack_latents(output, 48, 64, 8), atol=2e-5)


def test_batch_is_batches_of_one(models):
    noisy = torch.randn(3, 16, 4, 6, generator=seeded())
    timesteps = torch.tensor([3.0, 500.0, 999.0])
    text = text_of(models, "a dog", "a cat", "<s>")
    with torch.no_grad():
        together = FLUX.denoise(models.denoiser, noisy, timesteps, text)
        for b in range(3):
            own = {key: value[b : b + 1] for key, value in text.items()}
            alone = FLUX.denoise(models.denoiser, noisy[b : b + 1], timesteps[b : b + 1], own)
            assert torch.allclose(alone, together[b : b + 1], atol=1e-5)


def test_one_prompt_serves_a_batch(models):
    noisy = torch.randn(2, 16, 4, 4, generator=seeded())
    t = torch.tensor([100.0, 900.0])
    for options in (FluxOptions(), FluxOptions(apply_t5_attn_mask=True)):
        one, two = text_of(models, "a dog"), text_of(models, "a dog", "a dog")
        with torch.no_grad():
            a, b = (FLUX.denoise(models.denoiser, noisy, t, text, options) for text in (one, two))
        assert torch.equal(a, b)


def test_every_input_is_read(models):
    noisy, t = torch.randn(1, 16, 4, 4, generator=seeded()), torch.tensor([500.0])
    text, other = text_of(models, "a dog"), text_of(models, "a cat")
    with torch.no_grad():
        base = FLUX.denoise(models.denoiser, noisy, t, text)
        changed = {
            "guidance": FLUX.denoise(models.denoiser, noisy, t, text, FluxOptions(guidance_scale=1.0)),
            "timestep": FLUX.denoise(models.denoiser, noisy, t + 100, text),
            "pooled": FLUX.denoise(models.denoiser, noisy, t, {**text, "pooled": other["pooled"]}),
            "t5": FLUX.denoise(models.denoiser, noisy, t, {**text, "t5": other["t5"]}),
            "mask": FLUX.denoise(models.denoiser, noisy, t, text, FluxOptions(apply_t5_attn_mask=True)),
        }
    for what, v in changed.items():
        assert (v - base).abs().max() > 1e-4, what


def test_attention_mask_makes_padding_irrelevant(models):
    noisy, t = torch.randn(1, 16, 4, 4, generator=seeded()), torch.tensor([500.0])
    masked = FluxOptions(apply_t5_attn_mask=True)
    text = text_of(models, "a dog", apply_t5_attn_mask=True)
    rubbish = {**text, "t5": torch.where(text["t5_mask"][..., None], text["t5"], torch.full((), 9.0))}
    short = text_of(models, "a dog", apply_t5_attn_mask=True, t5xxl_max_token_length=8)
    with torch.no_grad():
        v = FLUX.denoise(models.denoiser, noisy, t, text, masked)
        for other in (rubbish, short):
            assert torch.allclose(FLUX.denoise(models.denoiser, noisy, t, other, masked), v, atol=1e-5)


def test_model_without_guidance_embedder_ignores_the_scale(models):
    config = {**dict(models.denoiser.config), "guidance_embeds": False}
    bare = FluxTransformer2DModel.from_config(config).eval()
    noisy, t, text = torch.randn(1, 16, 4, 4), torch.tensor([500.0]), text_of(models, "a dog")
    with torch.no_grad():
        one, two = (FLUX.denoise(bare, noisy, t, text, FluxOptions(guidance_scale=g)) for g in (1.0, 9.0))
    assert torch.equal(one, two)
    schnell = Models(models.source, models.root, tokenizers=models.tokenizers, configs={"denoiser": config})
    assert FLUX.architecture(schnell) == "flux-1-schnell" and FLUX.architecture(models) == "flux-1-dev"


def test_odd_latents_are_refused(models):
    with pytest.raises(Refused, match="latents of 5×4 cannot be packed"):
        FLUX.denoise(models.denoiser, torch.zeros(1, 16, 5, 4), torch.zeros(1), text_of(models, "a dog"))


# ---------- sampling


def test_sample_equals_the_stock_pipeline(models, stock):
    prompts = ["a dog", "a cat"]
    text = text_of(models, *prompts, t5xxl_max_token_length=32)
    ours = FLUX.sample(models, text, height=64, width=48, steps=2, generator=seeded(7))
    theirs = stock(
        prompts, height=64, width=48, num_inference_steps=2, max_sequence_length=32, generator=seeded(7)
    ).images
    assert [image.size for image in ours] == [(48, 64)] * 2
    for a, b in zip(ours, theirs, strict=True):
        difference = torch.tensor(list(a.tobytes())).sub(torch.tensor(list(b.tobytes()))).abs()
        assert difference.max() <= 1


def test_sample_with_vae_in_another_dtype_and_a_mask(folder):
    models = FLUX.load(Source(str(folder), dtype=torch.bfloat16, vae_dtype=torch.float32))
    assert models.vae.dtype == torch.float32 and models.denoiser.dtype == torch.bfloat16
    text = text_of(models, "a dog", apply_t5_attn_mask=True)
    options = FluxOptions(apply_t5_attn_mask=True)
    one, two = (
        FLUX.sample(models, text, o, height=32, width=32, steps=1, generator=seeded())[0]
        for o in (options, FluxOptions())
    )
    assert one.size == (32, 32) and one.tobytes() != two.tobytes()
    with pytest.raises(Refused, match="a sample of 40×32"):
        FLUX.sample(models, text, options, height=32, width=40, steps=1, generator=seeded())


def test_sampling_leaves_the_scheduler_alone(models):
    before = models.scheduler.timesteps.clone()
    FLUX.sample(models, text_of(models, "a dog"), height=32, width=32, steps=1, generator=seeded())
    assert torch.equal(models.scheduler.timesteps, before)


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
        monkeypatch.setattr(family, "_WHOLE", whole)
        before = FLUX.model_hash(str(broken), "denoiser")
        path = weights_of(broken, "transformer")
        state = load_file(path)
        for key in ("proj_out.bias", "single_transformer_blocks.1.attn.to_k.weight"):
            state[key] = state[key] + 0.01
            save_file(state, path, {"format": "pt"})
            after = FLUX.model_hash(str(broken), "denoiser")
            assert after != before
            before = after
    assert FLUX.model_hash(str(broken), "vae") == FLUX.model_hash(str(folder), "vae")


# ---------- memory


def gradients(model, text, again=None, between=None):
    noisy = torch.randn(1, 16, 4, 4, generator=seeded(1)).requires_grad_(True)
    out = FLUX.denoise(model, noisy, torch.tensor([400.0]), text)
    if between:
        between()
    out.float().square().sum().backward()
    return [noisy.grad, *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def test_checkpointed_gradient_is_the_plain_gradient(models):
    model, text = copy.deepcopy(models.denoiser).requires_grad_(True), text_of(models, "a dog")
    plain = gradients(model, text)
    model.zero_grad()
    memory.checkpoint_blocks(model)
    again = gradients(model, text)
    assert len(plain) > 100 and all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_recomputation_reenters_the_moment_of_the_forward(models):
    """A layer that reads a clock: a pass in between moves the clock, and must not change the gradient."""
    model, text, clock, computed = copy.deepcopy(models.denoiser), text_of(models, "a dog"), [2.0], []
    host = model.transformer_blocks[1].ff.net[2]
    original = host.forward

    def timed(x):
        computed.append(clock[0])
        return original(x * torch.tensor(clock[0]))  # autograd keeps the tensor

    host.forward = timed

    @contextlib.contextmanager
    def at(value):
        before, clock[0] = clock[0], value
        try:
            yield
        finally:
            clock[0] = before

    def move():
        clock[0] = 7.0
        with torch.no_grad():
            FLUX.denoise(model, torch.zeros(1, 16, 4, 4), torch.tensor([1.0]), text)

    plain = gradients(model, text)
    memory.checkpoint_blocks(model, lambda: at(clock[0]))
    assert torch.equal(gradients(model, text)[0], plain[0])
    computed.clear()
    assert torch.equal(gradients(model, text, between=move)[0], plain[0])
    assert computed == [2.0, 7.0, 2.0] and clock[0] == 7.0
    clock[0] = 2.0
    memory.checkpoint_blocks(model)  # the test can fail: without the context the gradient is another one
    assert not torch.equal(gradients(model, text, between=move)[0], plain[0])


def test_fp8_storage_computes_as_the_rounded_weights(models):
    stored = copy.deepcopy(models.denoiser).to(torch.bfloat16)
    memory.store_in_fp8(stored, torch.bfloat16)
    small = {name for name, p in stored.named_parameters() if p.dtype == torch.float8_e4m3fn}
    assert "transformer_blocks.0.attn.to_q.weight" in small
    rounded = copy.deepcopy(models.denoiser).to(torch.bfloat16)
    for name, p in rounded.named_parameters():
        if name in small:
            p.data = p.data.to(torch.float8_e4m3fn).to(torch.bfloat16)
    text = text_of(models, "a dog")
    expected = gradients(rounded, text)[0]
    assert torch.equal(gradients(stored, text)[0], expected)
    memory.checkpoint_blocks(stored)
    assert torch.equal(gradients(stored, text)[0], expected)
    assert small == {name for name, p in stored.named_parameters() if p.dtype == torch.float8_e4m3fn}


def test_fp8_refusals(models):
    with pytest.raises(Refused, match="add --mixed_precision bf16"):
        memory.store_in_fp8(models.denoiser, torch.float32)


def test_attention_backends(models):
    model = copy.deepcopy(models.denoiser)
    memory.attention(model, "sdpa")
    with pytest.raises(Refused, match="'nonsense' is not available"):
        memory.attention(model, "nonsense")


def test_tf32_is_restored():
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    for allowed in (True, False):
        with memory.tf32(allowed):
            assert torch.backends.cudnn.allow_tf32 == allowed
            assert (torch.get_float32_matmul_precision() == "high") == allowed
        assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == before


def test_peak_is_in_bytes():
    memory.reset_peak("cpu")
    assert 50 << 20 < memory.peak("cpu") < 1 << 40


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


def test_single_file_layout_is_diffusers_own():
    """At FLUX's real width the reader and diffusers' converter agree on every name and shape."""
    from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers

    config = {**flux_dev_config(), "num_layers": 1, "num_single_layers": 1}
    with torch.device("meta"):
        state = FluxTransformer2DModel(**config).state_dict()
    bfl = bfl_state(state, 1, 1)
    ours = {name: value.shape for key, v in bfl.items() for name, value in flux_single.to_diffusers(key, v)}
    assert flux_single.transformer_config({k: tuple(v.shape) for k, v in bfl.items()}, "x") == config
    theirs = convert_flux_transformer_checkpoint_to_diffusers(dict(bfl))
    assert (
        ours == {key: value.shape for key, value in theirs.items()} == {k: v.shape for k, v in state.items()}
    )


def test_fp8_single_file_is_widened(single, tmp_path):
    state = {k: v.to(torch.float8_e4m3fn) for k, v in load_file(single.path).items()}
    save_file(state, tmp_path / "flux-fp8.safetensors")
    model = flux_single.transformer(tmp_path / "flux-fp8.safetensors", torch.bfloat16)
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

    monkeypatch.setattr(flux_single.CLIPTokenizer, "from_pretrained", offline)
    source = Source(**{**single.__dict__, "tokenizer_cache_dir": str(tmp_path)})
    with pytest.raises(Refused, match=r"put its files into .*openai_clip-vit-large-patch14"):
        flux_single.tokenizers(source)


def test_module_of_the_tool_and_record_agree():
    assert transformer("tiny").config.in_channels == 4 * FLUX.latent_channels
    assert set(flux_load.FOLDERS) == set(family.ROLES)
