"""Layers of other programs that are no pair of factors: against LyCORIS in float64, and in files."""

from __future__ import annotations

import logging

import pytest
import torch
from adapter_files import NORM, A, B, Q, lokr, whole
from safetensors.torch import load_file, save_file
from torch import nn

from lowrank.cli import export, inspection
from lowrank.errors import Refused
from lowrank.formats.base_checkpoint import BaseCheckpoint
from lowrank.formats.foreign import ForeignLayer
from lowrank.formats.foreign_kinds import KINDS, kind_of
from lowrank.formats.inspect import report
from lowrank.formats.read import read_adapter
from lowrank.naming.places import LayerPath, places

# LyCORIS' module, its options, and the kind that its tensors are of
MODULES = {
    "lokr": ("lokr.LokrModule", {"factor": 4}, "LoKr"),
    "lokr-both": ("lokr.LokrModule", {"factor": 4, "decompose_both": True}, "LoKr"),
    "lokr-tucker": ("lokr.LokrModule", {"factor": 4, "use_tucker": True}, "LoKr"),
    "lokr-whole": ("lokr.LokrModule", {"full_matrix": True}, "LoKr"),
    "lokr-dora": ("lokr.LokrModule", {"factor": 4, "weight_decompose": True}, "LoKr"),
    "lokr-dora-in": ("lokr.LokrModule", {"factor": 4, "weight_decompose": True, "wd_on_out": False}, "LoKr"),
    "loha": ("loha.LohaModule", {}, "LoHa"),
    "loha-tucker": ("loha.LohaModule", {"use_tucker": True}, "LoHa"),
    "loha-dora": ("loha.LohaModule", {"weight_decompose": True}, "LoHa"),
    "loha-rs": ("loha.LohaModule", {"rs_lora": True, "lora_dim": 4}, "LoHa"),
    "glora": ("glora.GLoRAModule", {}, "GLoRA"),
    "ia3": ("ia3.IA3Module", {}, "IA3"),
    "ia3-input": ("ia3.IA3Module", {"train_on_input": True}, "IA3"),
    "oft": ("diag_oft.DiagOFTModule", {}, "OFT"),
    "oft-bound": ("diag_oft.DiagOFTModule", {"constraint": 2**-10, "rescaled": True}, "OFT"),
    "boft": ("boft.ButterflyOFTModule", {}, "BOFT"),
    "boft-bound": ("boft.ButterflyOFTModule", {"constraint": 2**-10, "rescaled": True}, "BOFT"),
    "full": ("full.FullModule", {}, "full difference"),
    "norm": ("norms.NormModule", {}, "norm"),
}


def host(kind: str, name: str) -> tuple[nn.Module, torch.Tensor]:
    """A layer in float64, and an input for it."""
    torch.manual_seed(1)
    if name == "norm":
        layer = nn.LayerNorm(16) if kind == "linear" else nn.GroupNorm(4, 16)
        x = torch.randn(3, 16) if kind == "linear" else torch.randn(2, 16, 5, 5)
    elif kind == "linear":
        layer, x = nn.Linear(24, 32), torch.randn(3, 24)
    else:
        layer, x = nn.Conv2d(12, 32, 3, padding=1), torch.randn(2, 12, 5, 5)
    return layer.double(), x.double()


def changed(layer: nn.Module, foreign: ForeignLayer) -> nn.Module:
    """The layer with W′ and its changed bias."""
    change, bias = foreign.change(layer.weight.detach()), foreign.bias()
    with torch.no_grad():
        if change is not None:
            layer.weight += change
        if bias is not None:
            layer.bias += bias
    return layer


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["linear", "conv"])
@pytest.mark.parametrize("name", MODULES)
def test_change_equals_lycoris(name, kind, monkeypatch):
    """In float64 the two agree to rounding; 1e-12 leaves room for the inverse in OFT."""
    import importlib

    logging.getLogger("LyCORIS").setLevel(logging.ERROR)
    where, options, wanted = MODULES[name]
    file, cls = where.split(".")
    made = getattr(importlib.import_module(f"lycoris.modules.{file}"), cls)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)  # LyCORIS rounds OFT's inverse to fp32
    layer, x = host(kind, name)
    module = made("x", layer, 1.0, **{"lora_dim": 2, "alpha": 3.0, **options}).double()
    module.dtype_tensor = module.dtype_tensor.double()
    monkeypatch.setattr(torch, "eye", lambda *a, f=torch.eye, **k: f(*a, **{**k, "dtype": torch.float64}))
    if name == "full":
        module.apply_to()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, dtype=torch.float64)
        theirs = module(x)
    state = module.state_dict()
    tensors = {key.replace("dora_scale", "magnitude"): value.detach() for key, value in state.items()}
    if name == "full":
        module.restore()
    before = layer(x)
    found = kind_of(tensors)
    assert found is not None and found.name == wanted
    ours = changed(layer, ForeignLayer(found, tensors, "x"))(x)
    assert (theirs - before).norm() > 1e-2 * before.norm()
    assert (ours - theirs).norm() <= 1e-12 * (theirs - before).norm()


def test_set_weight_replaces_the_weight():
    W = torch.randn(6, 4)
    layer = ForeignLayer(kind_of({"set_weight": W}) or KINDS[0], {"set_weight": W}, "x")
    torch.testing.assert_close(torch.ones(6, 4) + layer.change(torch.ones(6, 4)), W)


def test_glora_of_old_lycoris_has_its_factors_in_the_other_order():
    a1, a2, b1, b2 = torch.randn(8, 2), torch.randn(2, 8), torch.randn(6, 2), torch.randn(2, 8)
    W = torch.randn(6, 8)
    new = {"a1.weight": a1, "a2.weight": a2, "b1.weight": b1, "b2.weight": b2}
    old = {"a1.weight": a2, "a2.weight": a1, "b1.weight": b2, "b2.weight": b1}
    kind = kind_of(new)
    assert kind is not None
    wanted = W @ a1 @ a2 + b1 @ b2
    for tensors in (new, old):
        torch.testing.assert_close(ForeignLayer(kind, tensors, "x").change(W), wanted)


# ---------- files


@pytest.fixture
def sizes(tiny_sd):
    base = BaseCheckpoint(tiny_sd)
    place = read_place(Q)
    return base, base.shape(place)


def read_place(module: str) -> LayerPath:
    return places(module)[0][0]


@pytest.fixture
def mixed(sizes, tmp_path):
    """A LoRA layer, a LoKr layer, a norm layer and a bias, in one file; and its tensors."""
    base, (outs, ins) = sizes
    channels = base.shape(read_place(A))
    state = whole(A, outs=channels[0], ins=channels[1]) | lokr(Q, outs, ins)
    state |= {f"{NORM}.w_norm": torch.randn(outs), f"{NORM}.b_norm": torch.randn(outs)}
    state |= {f"{B}.diff_b": torch.randn(channels[0])}
    save_file(state, tmp_path / "mixed.safetensors")
    return tmp_path / "mixed.safetensors", state


def wanted_lokr(state: dict[str, torch.Tensor], name: str = Q) -> torch.Tensor:
    w1, a, b = (state[f"{name}.lokr_{key}"].double() for key in ("w1", "w2_a", "w2_b"))
    return torch.kron(w1, a @ b) * float(state[f"{name}.alpha"]) / 2


@pytest.mark.parametrize("layout", ["folder", "single"])
def test_merge_of_every_kind_into_a_checkpoint(layout, mixed, tiny_sd, tmp_path, capsys):
    file, state = mixed
    source = tiny_sd if layout == "folder" else tiny_sd / "single" / "model.safetensors"
    target = tmp_path / ("merged" if layout == "folder" else "merged.safetensors")
    assert export.main([str(file), str(target), "--to", "merged", "--model", str(source)]) == 0
    assert "4 layers merged" in capsys.readouterr().out
    before, after = BaseCheckpoint(source), BaseCheckpoint(target)

    def apart(module: str, bias: bool = False) -> torch.Tensor:
        place = read_place(module)
        if not bias:
            return (after.original(place) - before.original(place)).double()
        rows = [base.bias_rows(place) for base in (after, before)]
        new, old = (row.file.rows(row.name) for row in rows)
        return (new - old).double()

    # W and W′ are fp32: their difference has the rounding of W, 1e-7 of numbers near 1
    torch.testing.assert_close(apart(Q), wanted_lokr(state), rtol=0, atol=1e-6)
    torch.testing.assert_close(apart(NORM), state[f"{NORM}.w_norm"].double(), rtol=0, atol=1e-6)
    torch.testing.assert_close(apart(NORM, bias=True), state[f"{NORM}.b_norm"].double(), rtol=0, atol=1e-6)
    torch.testing.assert_close(apart(B, bias=True), state[f"{B}.diff_b"].double(), rtol=0, atol=1e-6)
    assert not apart(A, bias=True).any() and apart(A).any()


def test_nearest_lora_states_its_error(mixed, tiny_sd, tmp_path, capsys):
    file, state = mixed
    target = tmp_path / "lora.safetensors"
    with pytest.raises(
        Refused, match=r"LoKr in 1 layers \(.*attn1_to_q.lokr_w1\), whose change is no pair .* --rank"
    ):
        export.main([str(file), str(target)])
    assert not target.exists()
    assert export.main([str(file), str(target), "--rank", "3"]) == 0
    printed = capsys.readouterr().out
    assert "2 changes of norm layers and biases are left out" in printed
    written = read_adapter(target).layers[read_place(Q)]
    wanted = wanted_lokr(state)
    share = float((written.delta().double() - wanted).norm() / wanted.norm())
    best = torch.linalg.svdvals(wanted)[3:].norm() / wanted.norm()
    assert share == pytest.approx(float(best), rel=1e-4)  # Eckart–Young: no LoRA of rank 3 is nearer
    assert f"LoKr × 1: the nearest LoRA, rank 2–3: {share:.2%} of ‖ΔW‖ is lost" in printed
    exact = tmp_path / "exact.safetensors"  # the rank of a Kronecker product is the product of the ranks
    assert export.main([str(file), str(exact), "--rank", "8"]) == 0
    torch.testing.assert_close(
        read_adapter(exact).layers[read_place(Q)].delta().double(), wanted, rtol=1e-4, atol=1e-6
    )


def test_convolution_needs_the_base_for_its_kernel(sizes, tiny_sd, tmp_path):
    base, _ = sizes
    name = "lora_unet_mid_block_resnets_0_conv1"
    outs, ins, *kernel = base.shape(read_place(name))
    state = lokr(name, outs, ins)
    state[f"{name}.lokr_w2_b"] = torch.randn(2, ins // 4 * 9)
    save_file(state, tmp_path / "conv.safetensors")
    target = tmp_path / "lora.safetensors"
    with pytest.raises(Refused, match="kernel is not in the file; give the base"):
        export.main([str(tmp_path / "conv.safetensors"), str(target), "--rank", "8"])
    call = [str(tmp_path / "conv.safetensors"), str(target), "--rank", "8", "--model", str(tiny_sd)]
    assert export.main(call) == 0
    assert load_file(target)[f"{name}.lora_down.weight"].shape[1:] == (ins, *kernel)
    written = read_adapter(target).layers[read_place(name)].delta().double()
    torch.testing.assert_close(written, wanted_lokr(state, name), rtol=1e-4, atol=1e-5)


def test_report_names_the_kinds_and_measures_them(mixed, tiny_sd, tmp_path, capsys):
    file, state = mixed
    facts = report(file)
    assert facts["method"] == "lora + LoKr + bias + norm"
    assert facts["other_keys"]["count"] == 0 and not facts["problems"]
    layer = next(layer for layer in facts["layers"] if layer.get("kind") == "LoKr")
    assert layer["norm"] == pytest.approx(float(wanted_lokr(state).norm()), rel=1e-5)
    assert layer["rank"] == 2 and layer["alpha"] == 1.0
    base = BaseCheckpoint(tiny_sd)
    W = base.weight(read_place(Q))
    blocks = {f"{Q}.oft_blocks": torch.randn(len(W) // 8, 8, 8), f"{Q}.alpha": torch.tensor(0.0)}
    save_file(blocks, tmp_path / "oft.safetensors")
    assert inspection.main([str(tmp_path / "oft.safetensors")]) == 0
    printed = capsys.readouterr().out
    assert "OFT" in printed and "without 1 layers whose ΔW depends on the base (--model)" in printed
    (layer,) = read_adapter(tmp_path / "oft.safetensors", foreign=True, family="sd15").foreign.values()
    facts = report(tmp_path / "oft.safetensors", base=base)
    assert facts["norm"] == pytest.approx(float(layer.change(W).norm()), rel=1e-5)
    assert inspection.main([str(tmp_path / "oft.safetensors"), "--model", str(tiny_sd)]) == 0
    assert "depends on the base" not in capsys.readouterr().out


def test_joined_layer_of_flux_is_cut_by_rows(tmp_path):
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    state = lokr(name, 48, 16)
    save_file(state, tmp_path / "flux.safetensors")
    adapter = read_adapter(tmp_path / "flux.safetensors", foreign=True)
    assert adapter.family == "flux" and len(adapter.foreign) == 3
    key = adapter.foreign[LayerPath("unet", "transformer_blocks.0.attn.to_k")]
    torch.testing.assert_close(key.change().double(), wanted_lokr(state, name)[16:32], rtol=1e-5, atol=1e-6)
    save_file({f"{name}.oft_blocks": torch.zeros(6, 8, 8)}, tmp_path / "oft.safetensors")
    with pytest.raises(Refused, match="OFT on several layers of FLUX in one"):
        read_adapter(tmp_path / "oft.safetensors", foreign=True)


def test_swapped_halves_of_bfl_are_exchanged(tmp_path):
    name = "lora_unet_final_layer_adaLN_modulation_1"
    save_file({f"{name}.diff": torch.arange(12.0).reshape(6, 2)}, tmp_path / "diff.safetensors")
    (layer,) = read_adapter(tmp_path / "diff.safetensors", foreign=True).foreign.values()
    assert layer.change()[:, 0].tolist() == [6.0, 8.0, 10.0, 0.0, 2.0, 4.0]


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"lokr_w2": torch.ones(4, 4)}, "LoKr and has no lokr_w1 or lokr_w1_a"),
        ({"lokr_w1": torch.ones(2, 2), "lokr_w2_a": torch.ones(4, 2)}, "LoKr and has no lokr_w2_b"),
        ({"hada_w1_a": torch.ones(4, 2)}, "LoHa and has no hada_w1_b, hada_w2_a, hada_w2_b"),
        ({"diff": torch.full((4, 4), torch.nan)}, "NaN"),
        ({"diff": torch.ones(4, 4), "lokr_w1": torch.ones(2, 2), "lokr_w2": torch.ones(2, 2)}, "with diff"),
        ({"diff": torch.ones(4, 4), "lora_up.weight": torch.ones(4, 1)}, "has up too; it is of two adapters"),
    ],
)
def test_damaged_layers_are_refused_by_name(tensors, message, tmp_path):
    save_file({f"{Q}.{name}": value for name, value in tensors.items()}, tmp_path / "bad.safetensors")
    with pytest.raises(Refused, match=message):
        read_adapter(tmp_path / "bad.safetensors", foreign=True)


def test_another_base_is_refused_before_anything_is_written(sizes, tiny_sd, tmp_path):
    _, (outs, ins) = sizes
    save_file(lokr(Q, 2 * outs, ins), tmp_path / "wrong.safetensors")
    call = [
        str(tmp_path / "wrong.safetensors"),
        str(tmp_path / "out"),
        "--to",
        "merged",
        "--model",
        str(tiny_sd),
    ]
    with pytest.raises(Refused, match="another base"):
        export.main(call)
    assert not (tmp_path / "out").exists()
