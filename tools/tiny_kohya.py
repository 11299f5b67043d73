"""Run kohya sd-scripts on tiny models: the scripts and classes of a checkout, with smaller sizes.

    SD_SCRIPTS=/path/to/sd-scripts python tools/tiny_kohya.py make FOLDER   # models, pictures
    SD_SCRIPTS=/path/to/sd-scripts python tools/tiny_kohya.py train_network.py …  # any of its scripts

The checkout is not modified. Its classes take the sizes of the published models from module constants, which
are changed in memory before a model is made. Use a Python environment in which the checkout works.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
import runpy
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CHECKOUT = Path(os.environ.get("SD_SCRIPTS", ".")).resolve()
CHANNELS, XL_CHANNELS = (32, 64, 64, 64), 32
FLUX = {
    "vec_in_dim": 64,
    "context_in_dim": 64,
    "hidden_size": 64,
    "num_heads": 2,
    "depth": 3,
    "depth_single_blocks": 4,
    "axes_dim": [4, 14, 14],
}
AE = {"ch": 32, "ch_mult": [1, 1, 1, 1], "num_res_blocks": 1, "resolution": 64}


def shrink() -> None:
    """Set small sizes in the checkout's modules, and put the checkout first on the path."""
    sys.path[:] = [str(CHECKOUT), *(p for p in sys.path if Path(p or ".").resolve() != CHECKOUT)]
    if str(ROOT) not in sys.path:
        sys.path.append(str(ROOT))
    sd: Any = importlib.import_module("library.original_unet")
    sd.BLOCK_OUT_CHANNELS, sd.TIMESTEP_INPUT_DIM, sd.TIME_EMBED_DIM = CHANNELS, CHANNELS[0], 4 * CHANNELS[0]
    xl: Any = importlib.import_module("library.sdxl_original_unet")
    xl.MODEL_CHANNELS, xl.TIME_EMBED_DIM = XL_CHANNELS, 4 * XL_CHANNELS
    xl.ADM_IN_CHANNELS = 6 * 256 + 128

    class Transformer2DModel(xl.Transformer2DModel):  # kohya's networks look for this class name
        def __init__(self, **facts: Any) -> None:
            depth = {2: 1, 10: 2}[facts["num_transformer_layers"]]
            super().__init__(**{**facts, "num_transformer_layers": depth, "cross_attention_dim": 64 + 128})

    xl.Transformer2DModel = Transformer2DModel
    flux: Any = importlib.import_module("library.flux_models")
    for name, spec in list(flux.configs.items()):
        flux.configs[name] = dataclasses.replace(
            spec,
            params=dataclasses.replace(spec.params, **FLUX),
            ae_params=dataclasses.replace(spec.ae_params, **AE),
        )
    utils: Any = importlib.import_module("library.flux_utils")
    utils.load_clip_l = lambda path, dtype, device, **_: _encoder("CLIPTextModel", path, dtype, device)
    utils.load_t5xxl = lambda path, dtype, device, **_: _encoder("T5EncoderModel", path, dtype, device)


def _encoder(kind: str, path: str, dtype: Any, device: Any) -> Any:
    import transformers

    return getattr(transformers, kind).from_pretrained(path).to(device=device, dtype=dtype)


def make(folder: Path) -> None:
    """Write `sd15`, `sdxl` (diffusers folders), `flux` (BFL files), `tokenizers`, and pictures in `data`."""
    import random

    import torch
    from diffusers import UNet2DConditionModel
    from PIL import Image
    from safetensors.torch import load_file, save_file
    from transformers import CLIPTextModelWithProjection

    from tools import make_tiny_flux, make_tiny_sd, tiny

    torch.manual_seed(0)
    make_tiny_sd.make(folder / "sd15", "sd15", single=True)
    weights = folder / "sd15" / "text_encoder" / "model.safetensors"
    state = load_file(weights)
    # gen_img.py divides by the output's mean, which is 0 without a bias in the last norm
    next(v for k, v in state.items() if k.endswith("final_layer_norm.bias")).fill_(0.1)
    save_file(state, weights, {"format": "pt"})
    vocab, _ = tiny.clip_vocabulary(tiny.WORDS.split())
    pipe: Any = make_tiny_sd.pipeline(folder / "sdxl", "sdxl")
    config = dict(pipe.unet.config)
    config |= {
        "block_out_channels": tuple(XL_CHANNELS * n for n in (1, 2, 4)),
        "attention_head_dim": (1, 1, 2),
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 6 * 256 + 128,
    }
    pipe.unet = UNet2DConditionModel(**{k: v for k, v in config.items() if not k.startswith("_")}).eval()
    pipe.text_encoder = tiny.clip(len(vocab), num_hidden_layers=12, hidden_act="quick_gelu")
    assert isinstance(pipe.text_encoder_2, CLIPTextModelWithProjection)
    pipe.save_pretrained(folder / "sdxl")
    make_tiny_flux.make(folder / "parts")
    flux: Any = importlib.import_module("library.flux_models")
    spec = flux.configs["dev"]
    (folder / "flux").mkdir()
    save_file(flux.Flux(spec.params).state_dict(), folder / "flux" / "flux1-dev.safetensors")
    save_file(flux.AutoEncoder(spec.ae_params).state_dict(), folder / "flux" / "ae.safetensors")
    sources = {
        "openai_clip-vit-large-patch14": folder / "parts" / "tokenizer",
        "laion_CLIP-ViT-bigG-14-laion2B-39B-b160k": folder / "sdxl" / "tokenizer_2",
        "google_t5-v1_1-xxl": folder / "parts" / "tokenizer_2",
    }
    (folder / "tokenizers").mkdir()
    for name, source in sources.items():
        (folder / "tokenizers" / name).symlink_to(source.resolve())
    pictures = folder / "data" / "4_dog"
    pictures.mkdir(parents=True)
    draw = random.Random(0)
    for i in range(3):
        pixels = bytes(draw.randrange(256) for _ in range(64 * 64 * 3))
        Image.frombytes("RGB", (64, 64), pixels).save(pictures / f"{i}.png")
        (pictures / f"{i}.txt").write_text("a photo of a dog")


def call(argv: list[str]) -> None:
    """Run a script of the checkout."""
    sys.argv = [str(CHECKOUT / argv[0]), *argv[1:]]
    runpy.run_path(sys.argv[0], run_name="__main__")


def main(argv: list[str]) -> None:
    """Make the models (`make FOLDER`), or run a script of the checkout."""
    shrink()
    if argv[0] == "make":
        make(Path(argv[1]))
    else:
        call(argv)


if __name__ == "__main__":
    main(sys.argv[1:])
