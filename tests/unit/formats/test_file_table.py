"""Every dialect × family × kind of layer × place of alpha × dtype: the reader's ΔW against float64.

ΔW is computed here by each program's own definition, from the tensors as they are stored: s·U·D with s =
alpha/r, or 1 without an alpha; with DoRA W′ = m·(W + sUD)/‖W + sUD‖ by rows. PEFT, diffusers and LyCORIS
compute it too where they read or write the format.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from files import denoiser
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from lowrank.formats.read import read_adapter
from lowrank.naming.places import LayerPath

FEW = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
EXACT = 1e-6  # factors are read as they are; products and sums here and there are in float64


class Row(NamedTuple):
    """A layer: its path, its name in original code, and the kernel of a convolution."""

    family: str
    path: str
    original: str
    part: str = "unet"
    kernel: tuple[int, ...] = ()


IN = "transformer_blocks.0"
ROWS = (
    Row("sd15", f"down_blocks.1.attentions.0.{IN}.attn1.to_q", f"input_blocks.4.1.{IN}.attn1.to_q"),
    Row("sd15", "mid_block.attentions.0.proj_in", "middle_block.1.proj_in", kernel=(1, 1)),
    Row("sd15", "up_blocks.3.resnets.1.conv1", "output_blocks.10.0.in_layers.2", kernel=(3, 3)),
    Row("sd15", "text_model.encoder.layers.3.self_attn.q_proj", "", "te1"),
    Row("sdxl", f"down_blocks.2.attentions.1.{IN}.attn2.to_out.0", f"input_blocks.8.1.{IN}.attn2.to_out.0"),
    Row("sdxl", "up_blocks.0.upsamplers.0.conv", "output_blocks.2.2.conv", kernel=(3, 3)),
    Row("sdxl", "down_blocks.0.downsamplers.0.conv", "input_blocks.3.0.op", kernel=(3, 3)),
    Row("sdxl", "add_embedding.linear_1", "label_emb.0.0"),
    Row("sdxl", "text_model.encoder.layers.30.mlp.fc2", "", "te2"),
    Row("flux", "transformer_blocks.18.ff_context.net.0.proj", "double_blocks.18.txt_mlp.0"),
    Row("flux", "single_transformer_blocks.37.proj_out", "single_blocks.37.linear2"),
    Row("flux", "time_text_embed.guidance_embedder.linear_2", "guidance_in.out_layer"),
    Row("flux", "text_model.encoder.layers.0.mlp.fc1", "", "te1"),
)  # fmt: skip
KOHYA = ("lora_down.weight", "lora_up.weight", "dora_scale")
PEFT = ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")
OLD = ("lora.down.weight", "lora.up.weight", "dora_scale")


def module_in(dialect: str, row: Row) -> str:
    """The name of a layer in a program's files."""
    number = {"te1": "1", "te2": "2"}.get(row.part, "")
    component = {"te1": "text_encoder", "te2": "text_encoder_2"}.get(row.part)
    component = component or ("transformer" if row.family == "flux" else "unet")
    if dialect == "kohya":
        if row.part != "unet":
            return f"lora_te{'' if row.family == 'sd15' else number}_" + row.path.replace(".", "_")
        return "lora_unet_" + (row.path if row.family == "sd15" else row.original).replace(".", "_")
    if dialect == "comfyui":
        clip = {"te1": "clip_l", "te2": "clip_g"}.get(row.part)
        return f"text_encoders.{clip}.transformer.{row.path}" if clip else f"diffusion_model.{row.original}"
    if dialect == "onetrainer":
        clip = {"te1": "clip_l", "te2": "clip_g"}.get(row.part)
        return f"{clip}.{row.path}" if clip else f"{component}.{row.original}"
    if dialect == "lycoris":
        return ("lycoris_" if row.part == "unet" else f"lora_te{number}_") + row.path.replace(".", "_")
    if dialect == "fal":
        return f"base_model.model.{component}.{row.path}"
    return f"{component}.{row.path}"  # diffusers, and its older suffixes


SUFFIXES = {
    **dict.fromkeys(("kohya", "onetrainer", "lycoris"), KOHYA),
    **dict.fromkeys(("diffusers", "comfyui", "fal"), PEFT),
    "diffusers before PEFT": OLD,
}
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn)


class Case(NamedTuple):
    dialect: str
    row: Row
    dora: bool
    place: str
    alpha: float
    dtype: torch.dtype
    rank: int
    middle: bool
    seed: int


@st.composite
def cases(draw) -> Case:
    dialect, row = draw(st.sampled_from(sorted(SUFFIXES))), draw(st.sampled_from(ROWS))
    places = ["key", "one axis", "none"] + ["header"] * (dialect == "diffusers")
    return Case(
        dialect,
        row,
        draw(st.booleans()),
        draw(st.sampled_from(places)),
        draw(st.sampled_from([0.5, 1.0, 3.0, 16.0, 32.0])),
        draw(st.sampled_from(DTYPES)),
        draw(st.integers(1, 5)),
        draw(st.booleans()) and SUFFIXES[dialect] == KOHYA and row.kernel == (3, 3),
        draw(st.integers(0, 2**16)),
    )


def wide(value: Tensor) -> Tensor:
    return (value.float() if value.dtype.itemsize == 1 else value).double()


def made(case: Case) -> tuple[dict[str, Tensor], dict[str, str], Tensor, Tensor | None]:
    """A file's tensors and metadata, its ΔW (O, I·k·k) by the definition, and the lengths of DoRA."""
    draw = torch.Generator().manual_seed(case.seed)
    row, r, (O, I) = case.row, case.rank, (6, 8)
    module, (down_name, up_name, magnitude_name) = module_in(case.dialect, row), SUFFIXES[case.dialect]

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw).to(case.dtype)

    ones = (1,) * len(row.kernel)
    up, down = random(O, r, *ones), random(r, I, *(ones if case.middle else row.kernel))
    state = {f"{module}.{up_name}": up, f"{module}.{down_name}": down}
    D = wide(down)
    if case.middle:  # LyCORIS' Tucker form: 1×1, k×k, 1×1
        state[f"{module}.lora_mid.weight"] = random(r, r, *row.kernel)
        D = torch.einsum("rskl,sixy->rikl", wide(state[f"{module}.lora_mid.weight"]), D)
    scale, metadata = case.alpha / r, {}
    if case.place == "key":
        state[f"{module}.alpha"] = torch.tensor(case.alpha)
    elif case.place == "one axis":
        state[f"{module}.alpha"] = torch.tensor([case.alpha])
    elif case.place == "header":
        component, _, path = module.partition(".")
        header = {
            f"{component}.lora_alpha": 99,
            f"{component}.alpha_pattern": {path.replace(".", r"\."): case.alpha},
        }
        metadata["lora_adapter_metadata"] = json.dumps(header)
    else:
        scale = 1.0
    lengths = None
    if case.dora:
        lengths = torch.rand(O, generator=draw).to(case.dtype)
        shape = (O, 1, *ones) if magnitude_name == "dora_scale" else (1, O, *ones) if row.kernel else (O,)
        state[f"{module}.{magnitude_name}"] = lengths.reshape(shape)
    return state, metadata, scale * wide(up).flatten(1) @ D.flatten(1), lengths


@FEW
@given(case=cases())
def test_reader_equals_definition(case, tmp_path_factory):
    state, metadata, want, lengths = made(case)
    file = tmp_path_factory.mktemp("table") / "in.safetensors"
    save_file({key: value.contiguous() for key, value in state.items()}, file, metadata)
    adapter = read_adapter(file, case.row.family, precision=torch.float64)
    ((place, layer),) = adapter.layers.items()
    assert place == LayerPath(case.row.part, case.row.path)
    have = layer.scale * wide(layer.up) @ wide(layer.down)
    # LyCORIS' middle is folded in fp32
    assert float((have - want).norm() / want.norm()) <= (EXACT if not case.middle else 2e-6)
    assert not adapter.not_understood
    if lengths is not None:
        W = torch.randn(want.shape, dtype=torch.float64)
        summed = W + want
        expected = wide(lengths)[:, None] * summed / summed.norm(dim=1, keepdim=True)
        changed = layer._replace(up=wide(layer.up), down=wide(layer.down)).changed(W)
        assert float((changed - expected).norm() / expected.norm()) <= 2 * EXACT


# ---------- the programs themselves


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(4, 6, 3, padding=1, bias=False)
        self.conv_out = nn.Conv2d(6, 4, 1, bias=False)
        self.time_embedding = nn.Module()
        self.time_embedding.linear_1 = nn.Linear(8, 12, bias=False)
        self.time_embedding.linear_2 = nn.Linear(12, 12, bias=False)


LINEAR = ("time_embedding.linear_1", "time_embedding.linear_2")


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("init", [True, "gaussian", "orthogonal"])
def test_reader_equals_peft(use_dora, use_rslora, init, tmp_path):
    """PEFT merges what it saved; ΔW of the reader is the difference."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    names = LINEAR if init == "orthogonal" else (*LINEAR, "conv_in", "conv_out")
    model = Two()
    before = {name: model.get_submodule(name).weight.detach().double().flatten(1).clone() for name in names}
    config = LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=list(names),
        rank_pattern={"linear_2": 2},
        alpha_pattern={r"time_embedding\.linear_\d+": 12},
        use_dora=use_dora,
        use_rslora=use_rslora,
        init_lora_weights=init,
    )
    peft = get_peft_model(model, config)
    for name, value in peft.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(value)
        if "magnitude" in name:
            value.data *= 1.5
    peft.save_pretrained(str(tmp_path / "unet"))
    merged = peft.merge_and_unload()
    adapter = read_adapter(tmp_path, "sd15", base=[LayerPath("unet", name) for name in names])
    for name in names:
        layer = adapter.layers[LayerPath("unet", name)]
        have = layer._replace(up=layer.up.double(), down=layer.down.double()).changed(before[name])
        want = merged.get_submodule(name).weight.detach().double().flatten(1)
        assert float((have - want).norm() / want.norm()) <= EXACT, name


@pytest.mark.parametrize("decompose", [False, True])
@pytest.mark.parametrize("tucker", [False, True])
def test_reader_equals_lycoris(decompose, tucker, tmp_path):
    from lycoris.modules.locon import LoConModule

    torch.manual_seed(0)
    host = nn.Conv2d(8, 12, 3, padding=1)
    theirs = LoConModule("m", host, 1.0, 4, 2.0, weight_decompose=decompose, use_tucker=tucker)
    nn.init.normal_(theirs.lora_up.weight)
    module = "lora_unet_mid_block_resnets_0_conv1"
    state = {
        f"{module}.{key}": value.detach().contiguous() for key, value in theirs.custom_state_dict().items()
    }
    save_file(state, tmp_path / "in.safetensors")
    adapter = read_adapter(tmp_path / "in.safetensors", "sd15")
    W = host.weight.detach().double().flatten(1)
    layer = adapter.layers[LayerPath("unet", "mid_block.resnets.0.conv1")]
    have = layer._replace(up=layer.up.double(), down=layer.down.double()).changed(W)
    want = theirs.get_merged_weight()[0].detach().double().flatten(1)
    assert float((have - want).norm() / want.norm()) <= EXACT


def test_reader_equals_diffusers(tmp_path):
    """diffusers fuses a kohya file into a U-Net; its weights change by the reader's ΔW."""
    from diffusers.loaders import StableDiffusionLoraLoaderMixin

    unet = denoiser("sd15")
    names = ("mid_block.attentions.0.transformer_blocks.0.attn1.to_q", "mid_block.attentions.0.proj_in")
    before = {name: unet.get_submodule(name).weight.detach().clone() for name in names}
    state = {}
    for i, name in enumerate(names):
        O, I = before[name].shape[:2]
        draw, kernel = torch.Generator().manual_seed(i), (1, 1) * (before[name].dim() == 4)
        module = "lora_unet_" + name.replace(".", "_")
        state[f"{module}.lora_up.weight"] = torch.randn(O, 4, *kernel, generator=draw)
        state[f"{module}.lora_down.weight"] = torch.randn(4, I, *kernel, generator=draw)
        state[f"{module}.alpha"] = torch.tensor(10.0)
    file = Path(tmp_path / "in.safetensors")
    save_file(state, file)
    read, alphas = StableDiffusionLoraLoaderMixin.lora_state_dict(
        str(tmp_path), weight_name=file.name, unet_config=unet.config
    )
    unet.load_lora_adapter(read, prefix="unet", network_alphas=alphas)
    unet.fuse_lora()
    adapter = read_adapter(file, "sd15")
    for name in names:
        layer = adapter.layers[LayerPath("unet", name)]
        want = unet.get_submodule(name).base_layer.weight.detach() - before[name]
        have = layer.scale * layer.up.double() @ layer.down.double()
        # the fused weight is in fp32, and its change is read off it
        assert float((have - want.double().flatten(1)).norm() / have.norm()) <= 1e-5
