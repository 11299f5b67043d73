"""The FLUX family on the tiny model: against the stock FluxPipeline, and against itself."""

from __future__ import annotations

import copy
import hashlib
import shutil

import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from files import FLUX_DEV

from lowrank.errors import Refused
from lowrank.models.family import Models, Source, latent_scale
from lowrank.models.flux import FLUX, FluxOptions, image_ids, pack, unpack
from lowrank.train.text_conditions import stack_text
from tools.make_tiny_flux import make

CAPTIONS = ["a <c> dog in <s> style", "a [sks] dog", "a dog", "<s>", "<c>", "[sks]", "a cat", ""]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def stock(folder):
    pipe = FluxPipeline.from_pretrained(folder, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def text_of(models: Models, *captions: str, **options) -> dict:
    return stack_text(FLUX.encode_text(models, list(captions), FluxOptions(**options)))


# ---------- the tiny model


def digests(folder):
    return {p.relative_to(folder): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*.*")}


def test_tiny_is_deterministic_and_idempotent(folder, tmp_path):
    torch.manual_seed(1234)
    state = torch.get_rng_state()
    again = make(tmp_path / "again")
    assert torch.equal(torch.get_rng_state(), state)
    assert digests(again) == digests(folder)
    before = (again / "model_index.json").stat().st_mtime_ns
    make(again)
    assert (again / "model_index.json").stat().st_mtime_ns == before
    other = make(tmp_path / "other", seed=1)
    weights = "transformer/diffusion_pytorch_model.safetensors"
    assert (other / weights).read_bytes() != (folder / weights).read_bytes()
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
    assert models.vae.config.latent_channels == 16 == models.denoiser.config.in_channels // 4
    assert (latent_scale(models), FLUX.bucket_step(models)) == (8, 16)


def test_wide(tmp_path):
    wide = make(tmp_path / "wide", size="wide")
    config = FluxTransformer2DModel.load_config(wide / "transformer")
    assert config["attention_head_dim"] * config["num_attention_heads"] >= 1024
    shutil.rmtree(wide)  # 200 MB


def test_flux_dev_facts():
    with torch.device("meta"):
        model = FluxTransformer2DModel(**FLUX_DEV)
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
    with pytest.raises(Refused, match="36×32 does not fit this model: both sides must be multiples of 8"):
        FLUX.encode_images(models, torch.zeros(1, 3, 32, 36))


def test_overflowing_vae_is_refused(models):
    odd = Models(models.source, models.root, vae=copy.deepcopy(models.vae), configs=models.configs)
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
    stacked = stack_text(encoded)
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


def test_tokens_of_captions_are_counted(models):
    stock = models.tokenizers[1]
    counts = FLUX.token_counts(models, ["a dog", "cat " * 100], FluxOptions())
    assert counts.encoder == "T5" and counts.limit == 64
    assert counts.counts == [len(stock(text).input_ids) for text in ("a dog", "cat " * 100)]
    assert counts.counts[0] < 64 < counts.counts[1]


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


def test_denoise_batch_equals_single_samples(models):
    """In float64: a CPU may choose another fp32 kernel for another batch size."""
    denoiser = copy.deepcopy(models.denoiser).double()
    noisy = torch.randn(3, 16, 4, 6, generator=seeded()).double()
    timesteps = torch.tensor([3.0, 500.0, 999.0])
    text = text_of(models, "a dog", "a cat", "<s>")
    text = {key: value.double() if value.is_floating_point() else value for key, value in text.items()}
    with torch.no_grad():
        together = FLUX.denoise(denoiser, noisy, timesteps, text)
        assert together.dtype == torch.float64
        for b in range(3):
            sample = {key: value[b : b + 1] for key, value in text.items()}
            alone = FLUX.denoise(denoiser, noisy[b : b + 1], timesteps[b : b + 1], sample)
            # float64 rounds at 1e-16; this network showed 1e-15
            assert torch.allclose(alone, together[b : b + 1], rtol=0, atol=1e-12)


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
