"""Layers that are no pair of factors, live beside a model: the model of a merged checkpoint."""

from __future__ import annotations

import files
import pytest
import torch
from adapter_files import NORM, A, B, Q, lokr, whole
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file
from transformers import CLIPTextModel

from lowrank.cli import export
from lowrank.combine.mixture import Entry, read_mixture, shares
from lowrank.errors import Refused
from lowrank.formats.base_checkpoint import BaseCheckpoint
from lowrank.naming.places import places

CLIP = "lora_te_text_model_encoder_layers_0_"


@pytest.fixture(scope="module")
def mixed(tiny_sd, tmp_path_factory):
    """LoRA, LoKr, OFT on a convolution, IA3, norm layers and a bias of the U-Net; LoHa and a norm of CLIP."""
    base = BaseCheckpoint(tiny_sd)
    torch.manual_seed(0)

    def shape(name: str) -> tuple[int, ...]:
        return base.shape(places(name)[0][0])

    (outs, ins), channels = shape(Q), shape(A)
    conv, key = "lora_unet_mid_block_resnets_0_conv1", Q.replace("to_q", "to_k")
    state = whole(A, outs=channels[0], ins=channels[1]) | lokr(Q, outs, ins)
    state |= {f"{NORM}.w_norm": 0.3 * torch.randn(outs), f"{NORM}.b_norm": 0.3 * torch.randn(outs)}
    group = "lora_unet_mid_block_attentions_0_norm"
    state |= {f"{group}.w_norm": 0.3 * torch.randn(outs), f"{group}.b_norm": 0.3 * torch.randn(outs)}
    state |= {f"{B}.diff_b": torch.randn(channels[0])}
    blocks = shape(conv)[0] // 8
    state |= {f"{conv}.oft_blocks": 0.1 * torch.randn(blocks, 8, 8), f"{conv}.alpha": torch.tensor(0.0)}
    state |= {f"{key}.weight": 0.3 * torch.randn(shape(key)[0]), f"{key}.on_input": torch.tensor(0)}
    fc1 = f"{CLIP}mlp_fc1"
    o, i = shape(fc1)
    for which in "12":
        state |= {
            f"{fc1}.hada_w{which}_a": torch.randn(o, 2),
            f"{fc1}.hada_w{which}_b": torch.randn(2, i) / 8,
        }
    state |= {f"{CLIP}layer_norm1.w_norm": 0.3 * torch.randn(i), f"{CLIP}layer_norm1.b_norm": torch.randn(i)}
    path = tmp_path_factory.mktemp("mixed") / "mixed.safetensors"
    save_file(state, path)
    return path


def denoiser(folder) -> UNet2DConditionModel:
    return UNet2DConditionModel.from_pretrained(folder / "unet").requires_grad_(False)


def text(encoder) -> torch.Tensor:
    with torch.no_grad():
        return encoder(torch.tensor([[1, 5, 9, 2]])).last_hidden_state


def test_live_layers_equal_the_merged_checkpoint(mixed, tiny_sd, tmp_path):
    call = [
        str(mixed),
        str(tmp_path / "merged"),
        "--to",
        "merged",
        "--strength",
        "0.7",
        "--model",
        str(tiny_sd),
    ]
    assert export.main(call) == 0
    unet, encoder = denoiser(tiny_sd), CLIPTextModel.from_pretrained(tiny_sd / "text_encoder")
    plain, plain_text = files.answer("sd15", unet), text(encoder)
    mixture = read_mixture([mixed])
    assert "LoKr × 1" in mixture.describe() and "norm × 3" in mixture.describe()
    attached = mixture.attach(unet, [encoder])
    assert torch.equal(files.answer("sd15", unet), plain)
    attached.set([0.7])
    wanted = files.answer("sd15", denoiser(tmp_path / "merged"))
    wanted_text = text(CLIPTextModel.from_pretrained(tmp_path / "merged" / "text_encoder"))
    assert (wanted - plain).norm() > 1e-2 * plain.norm()
    assert (wanted_text - plain_text).norm() > 1e-2 * plain_text.norm()
    # fp32 on both sides, rounded in another order
    assert (files.answer("sd15", unet) - wanted).norm() <= 1e-5 * wanted.norm()
    assert (text(encoder) - wanted_text).norm() <= 1e-5 * wanted_text.norm()
    attached.restore()
    assert torch.equal(files.answer("sd15", unet), plain) and torch.equal(text(encoder), plain_text)
    with pytest.raises(Refused, match=r"LoKr in 1 layers.*no pair"):
        mixture.save(tmp_path / "sum.safetensors", [1.0], {})


def test_strengths_of_layers_hold_for_them_too(mixed, tiny_sd):
    unet, encoder = denoiser(tiny_sd), CLIPTextModel.from_pretrained(tiny_sd / "text_encoder")
    plain = files.answer("sd15", unet)
    attached = read_mixture([Entry(mixed, shares("mid_block -> 0"))]).attach(unet, [encoder])
    attached.set([1.0])
    assert (files.answer("sd15", unet) - plain).norm() <= 1e-6 * plain.norm()  # zeros are added
    attached.restore()


def test_a_layer_of_another_model_is_refused(mixed, tiny_sd, tmp_path):
    save_file(lokr(Q.replace("mid_block", "down_blocks_9"), 64, 64), tmp_path / "other.safetensors")
    with pytest.raises(Refused, match="is not in UNet2DConditionModel; the adapter is for another model"):
        read_mixture([tmp_path / "other.safetensors"]).attach(denoiser(tiny_sd))
