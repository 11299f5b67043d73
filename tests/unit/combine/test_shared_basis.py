"""Bases of LoRA collections: planted directions, invariances, dialects, bad files, and what networks read."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from repository import ROOT
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from toys import network, shake

from lowrank.adapters.targets import find
from lowrank.bases.basis_file import for_layers, random_basis, read_basis, weight_basis, write_basis
from lowrank.combine.shared_basis import Extraction, extract, find_files, read_updates
from lowrank.combine.sketch import Sketch, without
from lowrank.errors import Refused
from tools.extract_universal_basis import main

TO_Q = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"  # 48×40
CONV = "lora_unet_down_blocks_0_resnets_0_conv1"  # 24×(6·3·3)
TEXT = "lora_te_text_model_encoder_layers_0_mlp_fc1"  # 32×36
SIZES = {TO_Q: (48, 40), CONV: (24, 54), TEXT: (32, 36)}
FLAT = {
    TO_Q: TO_Q.removeprefix("lora_unet_"),
    CONV: CONV.removeprefix("lora_unet_"),
    TEXT: TEXT.replace("lora_te_", "te1|"),
}


def noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def orthonormal(seed: int, n: int, count: int) -> Tensor:
    return torch.linalg.qr(noise(seed, n, count))[0]


def planted(layer: str, count: int) -> tuple[Tensor, Tensor]:
    """(O, count) and (I, count): the directions in which every LoRA of `collection` lies."""
    number = list(SIZES).index(layer)
    outputs, inputs = SIZES[layer]
    return orthonormal(900 + number, outputs, count), orthonormal(950 + number, inputs, count)


def pairs(n: int, rank: int, shared: int | None) -> dict[str, tuple[Tensor, Tensor]]:
    """LoRA n: (up, down) by layer, within the planted directions or, for None, anywhere."""
    made = {}
    for number, (layer, (outputs, inputs)) in enumerate(SIZES.items()):
        up, down = noise(10 * n + number, outputs, rank), noise(500 + 10 * n + number, rank, inputs)
        if shared:
            left, right = planted(layer, shared)
            up, down = left @ left.T @ up, down @ right @ right.T
        made[layer] = (up, down)
    return made


def kohya(made: dict[str, tuple[Tensor, Tensor]], alpha: float | None = 2.0) -> dict[str, Tensor]:
    state = {}
    for layer, (up, down) in made.items():
        if layer == CONV:
            up, down = up[:, :, None, None], down.unflatten(1, (6, 3, 3))
        state |= {f"{layer}.lora_up.weight": up, f"{layer}.lora_down.weight": down}
        if alpha is not None:
            state[f"{layer}.alpha"] = torch.tensor(alpha)
    return {key: value.float().contiguous() for key, value in state.items()}


def collection(folder: Path, count: int = 6, shared: int | None = 3, rank: int = 2) -> Path:
    folder.mkdir(parents=True)
    for n in range(count):
        save_file(kohya(pairs(n, rank, shared)), folder / f"lora_{n}.safetensors")
    return folder


def basis_of(folder: Path, **how):
    return extract(find_files([folder])[0], Extraction(**how), progress=False)


def angle(first: Tensor, second: Tensor) -> float:
    """The largest principal angle between the spans of orthonormal columns, from its sine."""
    first, second = first.double(), second.double()
    assert first.shape == second.shape
    return float(torch.linalg.matrix_norm(second - first @ (first.T @ second), 2).clamp(max=1).asin())


def largest_angle(one, other) -> float:
    assert one.layers.keys() == other.layers.keys()
    both = [(one.layers[name], other.layers[name]) for name in one.layers]
    return max(max(angle(a.left, b.left), angle(a.right.mT, b.right.mT)) for a, b in both)


# ------------------------------------------------------------------ the directions


def test_planted_directions_are_found(tmp_path):
    found = basis_of(collection(tmp_path / "loras"), tau=1.0)
    for layer in SIZES:
        pair, row = found.layers[FLAT[layer]], found.table[FLAT[layer]]
        left, right = planted(layer, 3)
        assert row.directions == 3 and pair.right.shape == (3, SIZES[layer][1]), "not more than were planted"
        assert angle(pair.left, left) < 1e-3 and angle(pair.right.mT, right) < 1e-3
        values = found.values[FLAT[layer]]
        for side in values:
            assert (side[:-1] >= side[1:]).all(), "most important first"
        assert row.both == pytest.approx(1) and row.held_out == pytest.approx(1)
        assert row.exact and row.random == pytest.approx(9 / (row.outputs * row.inputs))


def test_it_is_the_hosvd_of_the_stacked_updates(tmp_path):
    """Against the definition, with every ΔW formed and unfolded."""
    found = basis_of(collection(tmp_path / "loras", shared=None), rank=4, tau=1.0)
    for layer in SIZES:
        stack = torch.stack([up @ down for up, down in (pairs(n, 2, None)[layer] for n in range(6))])
        right = torch.linalg.svd(stack.flatten(0, 1).double(), full_matrices=False)
        left = torch.linalg.svd(torch.cat(list(stack), 1).double(), full_matrices=False)
        pair, values, row = found.layers[FLAT[layer]], found.values[FLAT[layer]], found.table[FLAT[layer]]
        assert angle(pair.right.mT, right.Vh[:4].mT) < 1e-5 and angle(pair.left, left.U[:, :4]) < 1e-5
        # alpha/rank is 2/2
        torch.testing.assert_close(values.right, right.S[:4], rtol=1e-5, atol=0)
        assert row.right == pytest.approx(
            float(right.S[:4].square().sum() / right.S.square().sum()), rel=1e-5
        )


@pytest.mark.parametrize("center", [False, True])
def test_held_out_is_a_basis_made_without_that_lora(tmp_path, center):
    """The downdate equals making the basis again from the other files, one LoRA after the other."""
    folder = collection(tmp_path / "loras", shared=None)
    found = basis_of(folder, rank=4, tau=1.0, center=center)
    layer = FLAT[CONV]
    updates = [up @ down for up, down in (pairs(n, 2, None)[CONV] for n in range(6))]
    measured = []
    for n, one in enumerate(updates):
        rest = torch.stack(updates[:n] + updates[n + 1 :])
        mean = rest.mean(0) * center
        rest, one = rest - mean, one - mean
        right = torch.linalg.svd(rest.flatten(0, 1), full_matrices=False).Vh[:4]
        left = torch.linalg.svd(torch.cat(list(rest), 1), full_matrices=False).U[:, :4]
        measured.append(float((left.T @ one @ right.T).square().sum() / one.square().sum()))
    row = found.table[layer]
    assert row.held_out == pytest.approx(sum(measured) / 6, rel=1e-4)
    assert row.least_held_out == pytest.approx(min(measured), rel=1e-4)


def test_held_out_tells_shared_directions_from_none(tmp_path):
    shared = basis_of(collection(tmp_path / "shared"), rank=3).table
    strangers = basis_of(collection(tmp_path / "strangers", shared=None), rank=3).table
    for name in shared:
        assert shared[name].held_out > 0.99 > 20 * shared[name].random
        assert strangers[name].held_out < 5 * strangers[name].random, "chance, to its own scatter"
        assert strangers[name].both > 5 * strangers[name].held_out, (
            "what the basis was made from looks better"
        )


def test_a_lora_that_is_alone_with_its_directions_is_not_found_without_it(tmp_path):
    """Three LoRAs of rank 2 have six directions; without one, four of them remain, whatever rank is asked."""
    for row in basis_of(collection(tmp_path / "loras", count=3, shared=None), tau=1.0).table.values():
        assert row.directions == 6 and row.both == pytest.approx(1) and row.held_out < 0.3


def test_a_small_sketch_keeps_what_matters(tmp_path):
    """Planted directions survive a sketch that forgets most of the noise, and the table says it was one."""
    folder = collection(tmp_path / "loras", count=12)
    for path in folder.iterdir():
        state = load_file(path)
        noisy = {k: v + 1e-3 * noise(len(k), *v.shape).float() for k, v in state.items() if "lora_" in k[9:]}
        save_file(state | {k: v for k, v in noisy.items() if not k.endswith("alpha")}, path)
    exact, rough = basis_of(folder, rank=3, sketch=64), basis_of(folder, rank=3, sketch=4)
    assert all(row.exact for row in exact.table.values())
    assert not any(row.exact for row in rough.table.values())
    assert largest_angle(exact, rough) < 1e-3


def test_a_sketch_never_counts_more_energy_than_there_is():
    sketch = Sketch(3)
    columns = noise(0, 20, 30)
    for piece in columns.split(4, dim=1):
        sketch.add(piece)
    side = sketch.side()
    assert not sketch.exact and side.energy == pytest.approx(float(columns.square().sum()))
    assert side.shares()[-1] < 1
    torch.testing.assert_close(side.vectors.T @ side.vectors, torch.eye(side.vectors.shape[1]).double())


def test_taking_a_part_away_leaves_the_others():
    kept, gone = noise(1, 20, 3), noise(2, 20, 2)
    sketch = Sketch(8)
    sketch.add(kept)
    sketch.add(gone)
    side = sketch.side()
    left = side.vectors @ without(side, gone.T @ side.vectors, 1.0, 5)
    assert left.shape == (20, 3) and angle(left, torch.linalg.qr(kept)[0]) < 1e-6


def test_one_side_with_fewer_directions_is_filled_up(tmp_path):
    """Every LoRA writes into one output direction: the left side has one, and K is what the right needs."""
    folder = tmp_path / "loras"
    folder.mkdir()
    for n in range(4):
        made = {TO_Q: (planted(TO_Q, 1)[0], noise(n, 1, 40))}
        save_file(kohya(made), folder / f"{n}.safetensors")
    found = basis_of(folder, tau=1.0)
    pair, values = found.layers[FLAT[TO_Q]], found.values[FLAT[TO_Q]]
    assert pair.left.shape == (48, 4) and (values.left[1:] == 0).all() and (values.right > 0).all()
    torch.testing.assert_close(pair.left.T @ pair.left, torch.eye(4).double())
    assert angle(pair.left[:, :1], planted(TO_Q, 1)[0]) < 1e-5


def test_tau_chooses_how_many_and_rank_is_the_most(tmp_path):
    folder = collection(tmp_path / "loras", shared=None)
    few, more, most = (basis_of(folder, tau=tau, rank=8).table[FLAT[TO_Q]] for tau in (0.3, 0.6, 1.0))
    assert few.directions < more.directions < most.directions == 8
    assert min(few.left, few.right) >= 0.3 and min(more.left, more.right) >= 0.6


# ------------------------------------------------------------------ what must not matter


def test_how_an_update_is_split_does_not_matter(tmp_path):
    """A → MA, B → BM⁻¹, also with another alpha for the same ΔW, and another rank."""
    plain = basis_of(collection(tmp_path / "plain"))
    folder = tmp_path / "turned"
    folder.mkdir()
    for n in range(6):
        turned = {}
        for layer, (up, down) in pairs(n, 2, 3).items():
            m = noise(n, 2, 2) + 3 * torch.eye(2)
            up, down = up @ torch.linalg.inv(m), m @ down
            turned[layer] = (torch.cat([up, 0 * up], 1), torch.cat([down, noise(n, 2, down.shape[1])]))
        turned = {layer: (up / 5, down) for layer, (up, down) in turned.items()}
        save_file(kohya(turned, alpha=20.0), folder / f"{n}.safetensors")
    assert largest_angle(plain, basis_of(folder)) < 1e-4
    for name, values in plain.values.items():
        torch.testing.assert_close(basis_of(folder).values[name].right, values.right, rtol=1e-4, atol=1e-6)


def test_strength_does_not_matter_once_normalised(tmp_path):
    folder = collection(tmp_path / "loras", shared=None)
    stronger = shutil.copytree(folder, tmp_path / "stronger")
    state = load_file(stronger / "lora_2.safetensors")
    save_file(
        {k: v * 30 if k.endswith("alpha") else v for k, v in state.items()}, stronger / "lora_2.safetensors"
    )
    assert (
        largest_angle(basis_of(folder, rank=4, normalize=True), basis_of(stronger, rank=4, normalize=True))
        < 1e-5
    )
    plain = basis_of(stronger, rank=2).layers[FLAT[TO_Q]]
    assert angle(plain.right.mT, torch.linalg.qr(pairs(2, 2, None)[TO_Q][1].T)[0]) < 0.1, "alpha is respected"


def test_order_names_and_hash_seed_do_not_matter(tmp_path):
    """The same bytes in other files, and another PYTHONHASHSEED, give the same basis file, byte for byte."""
    folder = collection(tmp_path / "a", shared=None)
    other = tmp_path / "b"
    (other / "below").mkdir(parents=True)
    for n, path in enumerate(sorted(folder.iterdir(), reverse=True)):
        shutil.copy(path, other / ("below" if n % 2 else ".") / f"{n}.safetensors")
    here, there = tmp_path / "here.safetensors", tmp_path / "there.safetensors"
    assert main(["--lora_dir", str(folder), "--output", str(here)]) == 0
    done = subprocess.run(
        [sys.executable, "tools/extract_universal_basis.py", "--lora_dir", other, "--output", there],
        env=os.environ | {"PYTHONHASHSEED": "3", "OMP_NUM_THREADS": str(torch.get_num_threads())},
        **{"cwd": ROOT, "capture_output": True, "text": True, "encoding": "utf-8"},
    )
    assert done.returncode == 0, done.stderr
    assert here.read_bytes() == there.read_bytes()


def test_centred_directions_leave_the_mean_out(tmp_path):
    folder = tmp_path / "loras"
    folder.mkdir()
    mean = (planted(TO_Q, 1)[0], planted(TO_Q, 1)[1].T)
    for n in range(5):
        up = torch.cat([50 * mean[0], noise(n, 48, 1)], 1)
        down = torch.cat([mean[1], noise(n + 50, 1, 40)])
        save_file(kohya({TO_Q: (up, down)}), folder / f"{n}.safetensors")
    plain, centred = (basis_of(folder, rank=1, center=c).layers[FLAT[TO_Q]] for c in (False, True))
    assert angle(plain.left, mean[0]) < 0.2 and angle(centred.left, mean[0]) > 1.0


# ------------------------------------------------------------------ dialects and kinds


def renamed(layer: str, prefix: str = "unet.") -> str:
    paths = {
        TO_Q: f"{prefix}down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
        CONV: f"{prefix}down_blocks.0.resnets.0.conv1",
        TEXT: "text_encoder.text_model.encoder.layers.0.mlp.fc1",
    }
    return paths[layer]


def test_dialects_are_one_collection(tmp_path):
    """kohya's, PEFT's, diffusers' older keys and PEFT's own folder give what kohya's files alone give."""
    reference = basis_of(collection(tmp_path / "kohya"))
    folder = tmp_path / "mixed"
    folder.mkdir()
    for n in range(6):
        state = kohya(pairs(n, 2, 3))
        inside = {
            TO_Q: "base_model.model." + renamed(TO_Q, ""),
            CONV: "base_model.model." + renamed(CONV, ""),
        }
        spelled = {}
        for key, value in state.items():
            layer, _, suffix = key.partition(".")
            peft = suffix.replace("lora_down", "lora_A").replace("lora_up", "lora_B")
            if n == 1:
                spelled[f"{renamed(layer)}.{peft}"] = value
            elif n == 2 and suffix != "alpha":  # alpha 2 of rank 2, as these files have none
                old = ".lora." if layer == CONV else ".lora_linear_layer."
                name = (
                    renamed(layer).replace(".to_q", ".processor.to_q_lora.")
                    if layer == TO_Q
                    else renamed(layer) + old
                )
                spelled[name + suffix.removeprefix("lora_")] = value
            elif n == 3 and suffix != "alpha":
                spelled[f"{inside.get(layer, renamed(layer))}.{peft}"] = value * (
                    0.5 if "up" in suffix else 1
                )
            elif n not in (1, 2, 3):
                spelled[key] = value
        if n == 3:
            (folder / "peft").mkdir()
            config = {"lora_alpha": 4, "r": 2}
            (folder / "peft" / "adapter_config.json").write_text(json.dumps(config))
            save_file(spelled, folder / "peft" / "adapter_model.safetensors")
        else:
            save_file(spelled, folder / f"{n}.safetensors")
    mixed = basis_of(folder)
    assert mixed.loras == 6 and not mixed.few
    assert largest_angle(reference, mixed) < 1e-4
    for name, values in reference.values.items():
        torch.testing.assert_close(mixed.values[name].right, values.right, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("config", "alpha"),
    [
        ({"unet.lora_alpha": 8, "unet.r": 2}, 8.0),
        ({"unet.lora_alpha": 8, "unet.use_rslora": True}, 8 * 2**0.5),
        ({"unet.lora_alpha": 8, "unet.alpha_pattern": {"attn1.to_q": 6}}, 6.0),
        ({"text_encoder.lora_alpha": 8}, 2.0),
    ],
)
def test_alpha_of_diffusers_metadata(tmp_path, config, alpha):
    up, down = pairs(0, 2, None)[TO_Q]
    state = {f"{renamed(TO_Q)}.lora_A.weight": down.float(), f"{renamed(TO_Q)}.lora_B.weight": up.float()}
    save_file(state, tmp_path / "one.safetensors", {"lora_adapter_metadata": json.dumps(config)})
    one = read_updates(tmp_path / "one.safetensors").updates[FLAT[TO_Q]]
    torch.testing.assert_close(one.up @ one.down, alpha / 2 * (up.float().double() @ down.float().double()))


def test_both_spellings_of_sdxl_are_one(tmp_path, tiny_sdxl):
    """diffusers' paths and kohya's original block names of the same layers meet under kohya's."""
    unet = UNet2DConditionModel.from_pretrained(tiny_sdxl, subfolder="unet")
    targets = [
        t for t in find("unet", unet, conv=True) if isinstance(t.module, nn.Linear) or "conv" in t.path
    ]
    folder = tmp_path / "loras"
    folder.mkdir()
    for n in range(3):
        state = {}
        for number, target in enumerate(targets):
            weight = target.module.weight
            up, down = noise(number + n, len(weight), 1).float(), noise(number, 1, *weight.shape[1:]).float()
            up = up[..., None, None] if weight.dim() == 4 else up
            name = target.name if n else f"unet.{target.path}"
            kinds = ("lora_up", "lora_down") if n else ("lora_B", "lora_A")
            state |= {f"{name}.{kind}.weight": x for kind, x in zip(kinds, (up, down), strict=True)}
        save_file(state, folder / f"{n}.safetensors")
    found = basis_of(folder)
    assert set(found.layers) == {t.name.removeprefix("lora_unet_") for t in targets} and not found.few
    write_basis(tmp_path / "basis.safetensors", found.layers, found.values, "universal", {})
    shapes = {t.name: (len(t.module.weight), t.module.weight[0].numel()) for t in targets}
    matched = for_layers(read_basis(tmp_path / "basis.safetensors"), shapes)
    assert not matched.missing and not matched.unused


@pytest.mark.parametrize("method", ["lora", "delta_r", "qrlora"])
def test_our_own_files_are_read(tmp_path, cache, method):
    model = nn.ModuleDict({"first": nn.Linear(24, 40)}).requires_grad_(False)
    made = shake(network(method, model, cache))
    made.save_weights(str(tmp_path / "one.safetensors"), None, {})
    (one,) = read_updates(tmp_path / "one.safetensors").updates.values()
    expected = made.layers()[0].delta_weight().detach().double()
    assert float((one.up @ one.down - expected).norm() / expected.norm()) < 1e-5


OTHERS = {
    "DoRA": {"dora_scale": (48, 1), "lora_up.weight": (48, 2), "lora_down.weight": (2, 40), "alpha": ()},
    "LoHa": {k: (4, 4) for k in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")} | {"alpha": ()},
    "LoKr": {"lokr_w1": (4, 4), "lokr_w2": (12, 10), "alpha": ()},
    "Tucker": {
        "lora_mid.weight": (2, 2, 3, 3),
        "lora_up.weight": (48, 2, 1, 1),
        "lora_down.weight": (2, 40, 1, 1),
    },
    "full difference": {"diff": (48, 40)},
    "experts": {"router": (3, 2), "lora_up.weight": (3, 48, 2), "lora_down.weight": (2, 40)},
    "core": {"core": (2, 2), "basis_up": (48, 2), "basis_down": (2, 40), "alpha": ()},
    "unknown (lora_new.weight)": {"lora_new.weight": (3, 2)},
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_kinds_are_counted_and_left_out(tmp_path, kind):
    folder = collection(tmp_path / "loras")
    plain = basis_of(folder)
    state = {f"{TO_Q}.{suffix}": torch.ones(shape) for suffix, shape in OTHERS[kind].items()}
    save_file(state, folder / "other.safetensors")
    beside = {k: v for k, v in kohya(pairs(0, 2, 3)).items() if not k.startswith(TO_Q)}
    beside = {k: v * 1.5 for k, v in beside.items()}
    save_file(state | beside, folder / "mixed.safetensors")
    found = basis_of(folder)
    assert found.other == {kind: 2} and found.loras == 7
    assert found.table[FLAT[TO_Q]] == plain.table[FLAT[TO_Q]], "the layer of another kind does not count"
    assert found.table[FLAT[CONV]].loras == 7, "the plain ones beside it do"


def test_mixed_ranks_copies_and_files_without_adapters(tmp_path):
    folder = collection(tmp_path / "loras", count=2)
    for n, rank in ((2, 1), (3, 8)):
        save_file(kohya(pairs(n, rank, 3), alpha=None), folder / f"{n}.safetensors")
    shutil.copy(folder / "3.safetensors", folder / "again.safetensors")
    save_file({"first_stage_model.decoder.weight": torch.ones(3)}, folder / "vae.safetensors")
    save_file({k: 0 * v for k, v in kohya(pairs(4, 2, 3)).items()}, folder / "zero.safetensors")
    files, copies = find_files([folder])
    found = extract(files, Extraction(tau=1.0), progress=False)
    assert +copies == {"copies of another file": 1} and found.loras == 4
    assert found.other == {"files without an adapter": 1, "layers that are zero": 3}
    assert all(row.directions == 3 for row in found.table.values())


def test_a_layer_needs_three_loras(tmp_path):
    folder = collection(tmp_path / "loras", count=3)
    state = load_file(folder / "lora_0.safetensors")
    save_file({k: v for k, v in state.items() if not k.startswith(CONV)}, folder / "lora_0.safetensors")
    found = basis_of(folder)
    assert set(found.layers) == {FLAT[TO_Q], FLAT[TEXT]} and found.few == {FLAT[CONV]: 2}


# ------------------------------------------------------------------ the tool


def test_the_tool_writes_a_basis_a_report_and_a_table(tmp_path, capsys):
    folder, out = collection(tmp_path / "loras"), tmp_path / "made" / "basis.safetensors"
    assert main(["--lora_dir", str(folder), "--output", str(out), "--report", str(tmp_path / "r.json")]) == 0
    told, report, basis = (
        capsys.readouterr().out,
        json.loads((tmp_path / "r.json").read_text()),
        read_basis(out),
    )
    assert all(name in told for name in FLAT.values()) and "too few for 16 directions; lower --rank" in told
    assert "share nothing" not in told
    assert told.splitlines()[-1].endswith(f"LoRAs, basis {basis.facts['hash'][:12]}; left out: nothing")
    assert report["basis_hash"] == basis.facts["hash"] and report["loras"] == 6
    assert json.loads(basis.facts["layers"]) == report["layers"], "the file describes itself"
    assert basis.facts["kind"] == "universal" and basis.facts["layout"] == "native"
    for name, (left, right) in basis.layers.items():
        assert left.dtype == right.dtype == torch.float32
        for x in (left.mT @ left, right @ right.mT):
            torch.testing.assert_close(x, torch.eye(len(x)), atol=1e-6, rtol=0)
        assert set(report["layers"][name]) >= {"both", "held_out", "random"}


def test_strangers_are_said_to_share_nothing(tmp_path, capsys):
    folder = collection(tmp_path / "loras", shared=None)
    assert main(["--lora_dir", str(folder), "--output", str(tmp_path / "b.safetensors"), "--rank", "2"]) == 0
    assert "share nothing" in capsys.readouterr().out


def test_facts_of_the_base_stay_where_all_agree(tmp_path):
    folder = tmp_path / "loras"
    folder.mkdir()
    for n in range(3):
        facts = {"ss_base_model_version": "sd_1.5", "lowrank.base_hash": str(n)}
        save_file(kohya(pairs(n, 2, 3)), folder / f"{n}.safetensors", facts)
    assert basis_of(folder).facts == {"base_model_version": "sd_1.5"}


def spoil(folder: Path, how: str) -> list[str]:
    """Break something; returns words that the sentence must have."""
    path = folder / "lora_1.safetensors"
    state = load_file(path)
    if how == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    elif how == "garbage":
        path.write_bytes(b"not a tensor file at all")
    elif how == "NaN":
        state[f"{TO_Q}.lora_up.weight"][0, 0] = float("nan")
        save_file(state, path)
    elif how == "half a layer":
        del state[f"{TO_Q}.lora_up.weight"]
        save_file(state, path)
    elif how == "another model":
        state[f"{TO_Q}.lora_up.weight"] = torch.ones(64, 2)
        save_file(state, path)
        return ["48×40", "64×40", "separate folders"]
    return [str(path)]


@pytest.mark.parametrize("how", ["truncated", "garbage", "NaN", "half a layer", "another model"])
def test_a_bad_file_is_named(tmp_path, capsys, how):
    folder = collection(tmp_path / "loras")
    words = spoil(folder, how)
    assert main(["--lora_dir", str(folder), "--output", str(tmp_path / "basis.safetensors")]) == 1
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert told.startswith("error: ") and all(word in told for word in words), told
    assert not (tmp_path / "basis.safetensors").exists()


def test_bad_calls_get_one_sentence(tmp_path, capsys):
    folder = collection(tmp_path / "loras", count=2)
    empty, file = tmp_path / "empty", tmp_path / "file"
    empty.mkdir()
    file.write_text("")
    target = str(tmp_path / "b.safetensors")
    calls = {
        "no .safetensors file": ["--lora_dir", str(empty), "--output", target],
        "does not exist": ["--lora_dir", str(tmp_path / "absent"), "--output", target],
        "2 usable LoRAs": ["--lora_dir", str(folder), "--output", target],
        "cannot be written": ["--lora_dir", str(folder), "--output", str(file / "b.safetensors")],
        "is a folder": ["--lora_dir", str(folder), "--output", target, "--report", str(empty)],
        "does not end in .safetensors": ["--lora_dir", str(folder), "--output", str(tmp_path / "b.pt")],
        "below --rank": ["--lora_dir", str(folder), "--output", target, "--sketch", "3"],
        "not above 0": ["--lora_dir", str(folder), "--output", target, "--tau", "0"],
        "is no basis": ["--lora_dir", str(folder), "--output", str(folder / "lora_0.safetensors")],
        "is JSON": ["--lora_dir", str(folder), "--output", target, "--report", target],
    }
    for words, call in calls.items():
        assert main(call) == 1
        told = capsys.readouterr().err.strip().splitlines()[-1]
        assert told.startswith("error: ") and words in told, told
    for n in (2, 3):
        state = kohya(pairs(n, 2, 3))
        save_file(
            {f"{key.split('.')[0]}_{n}.{key.split('.', 1)[1]}": v for key, v in state.items()},
            folder / f"{n}.safetensors",
        )
    assert main(["--lora_dir", str(folder), "--output", target]) == 1
    assert "no usable layer is in 3 of the 4 LoRAs" in capsys.readouterr().err
    assert not Path(target).exists()


# ------------------------------------------------------------------ the file, for networks


def row_layout(tmp_path: Path, columns: int = 3, rank: int = 1, **spoiled: Tensor) -> Path:
    """A legacy file: dotted names, fp16, means partly in the basis; `rank` > 1 is the flat layout."""
    state = {}
    names = {
        TO_Q: "unet.down.blocks.0.attentions.0.transformer.blocks.0.attn1.to.q",
        TEXT: "te.text.model.encoder.layers.0.mlp.fc1",
    }
    for number, (layer, name) in enumerate(names.items()):
        for side, n in zip(("up", "down"), SIZES[layer], strict=True):
            basis = orthonormal(number, rank * n, columns).contiguous()
            state[f"{name}.lora_{side}.weight.basis"] = basis.half()
            state[f"{name}.lora_{side}.weight.mean"] = (noise(70 + number, rank * n) / 9 + basis[:, 0]).half()
    save_file(state | spoiled, tmp_path / "row.safetensors")
    return tmp_path / "row.safetensors"


def test_the_row_layout_is_read_with_its_mean_as_first_direction(tmp_path):
    path = row_layout(tmp_path)
    basis, state = read_basis(path), load_file(path)
    assert set(basis.layers) == {FLAT[TO_Q], FLAT[TEXT]} and basis.facts["layout"] == "row"
    pair = basis.layers[FLAT[TO_Q]]
    assert pair.left.shape == (48, 4) and pair.right.shape == (4, 40)
    torch.testing.assert_close(pair.right @ pair.right.mT, torch.eye(4), atol=1e-6, rtol=0)
    name = "unet.down.blocks.0.attentions.0.transformer.blocks.0.attn1.to.q.lora_down.weight"
    mean, columns = state[f"{name}.mean"].float(), state[f"{name}.basis"].float()
    torch.testing.assert_close(pair.right[0], mean / mean.norm())
    span = torch.linalg.qr(torch.cat([mean[:, None], columns], 1).double())[0]
    assert angle(pair.right.mT, span) < 1e-5
    matched = for_layers(basis, {TO_Q: (48, 40), TEXT: (32, 36), CONV: (24, 54)})
    assert set(matched.pairs) == {TO_Q, TEXT} and matched.missing == (CONV,) and not matched.unused
    assert read_basis(path).facts["hash"] == basis.facts["hash"]


def test_a_mean_that_is_zero_or_in_the_basis_adds_nothing(tmp_path):
    name = "unet.down.blocks.0.attentions.0.transformer.blocks.0.attn1.to.q"
    columns = orthonormal(0, 40, 3).float().contiguous()
    zero = {f"{name}.lora_down.weight.mean": torch.zeros(40), f"{name}.lora_up.weight.mean": torch.zeros(48)}
    assert read_basis(row_layout(tmp_path, **zero)).layers[FLAT[TO_Q]].right.shape == (3, 40)
    inside = {f"{name}.lora_down.weight.mean": columns[:, 0] * 2, f"{name}.lora_down.weight.basis": columns}
    assert read_basis(row_layout(tmp_path, **inside)).layers[FLAT[TO_Q]].right.shape == (3, 40)


def test_the_flat_joint_layout_is_refused(tmp_path):
    basis = read_basis(row_layout(tmp_path, rank=2))
    with pytest.raises(Refused, match=r"matrices of rank 2 \(the flat-joint layout\)"):
        for_layers(basis, {TO_Q: (48, 40)})


def test_layers_with_one_side_only_are_left_out_aloud(tmp_path, caplog):
    state = load_file(row_layout(tmp_path))
    save_file(
        {k: v for k, v in state.items() if not k.startswith("te.") or "lora_down" in k},
        tmp_path / "half.safetensors",
    )
    assert set(read_basis(tmp_path / "half.safetensors").layers) == {FLAT[TO_Q]}
    assert "only one of down and up" in caplog.text
    save_file({k: v for k, v in state.items() if "lora_down" in k}, tmp_path / "half.safetensors")
    with pytest.raises(Refused, match="no layer with both"):
        read_basis(tmp_path / "half.safetensors")


def small_basis(tmp_path: Path) -> Path:
    found = basis_of(collection(tmp_path / "loras"))
    write_basis(tmp_path / "basis.safetensors", found.layers, found.values, "universal", {})
    return tmp_path / "basis.safetensors"


def test_another_model_is_refused_and_strange_layers_are_told(tmp_path):
    basis = read_basis(small_basis(tmp_path))
    with pytest.raises(Refused, match="is 64×40 in this model and 48×40"):
        for_layers(basis, {TO_Q: (64, 40)})
    with pytest.raises(Refused, match="no layer of this model"):
        for_layers(basis, {"lora_unet_mid_block_proj_in": (48, 40)})
    matched = for_layers(basis, {TO_Q: (48, 40), "lora_unet_mid_block_proj_in": (8, 8)})
    assert matched.missing == ("lora_unet_mid_block_proj_in",) and set(matched.unused) == {
        FLAT[CONV],
        FLAT[TEXT],
    }
    by_spelling = for_layers(basis, {"own name": (48, 40)}, {"own name": {FLAT[TO_Q], "another"}})
    assert torch.equal(by_spelling.pairs["own name"].left, basis.layers[FLAT[TO_Q]].left)


def test_files_that_are_no_basis_are_refused(tmp_path):
    path = small_basis(tmp_path)
    whole = path.read_bytes()
    damaged = bytearray(whole)
    damaged[-5] ^= 1
    for name, data in (("cut", whole[:-9]), ("flipped", bytes(damaged))):
        (tmp_path / f"{name}.safetensors").write_bytes(data)
    for name, words in (
        ("cut", "not a whole safetensors file"),
        ("flipped", "is damaged"),
        ("absent", "does not exist"),
    ):
        with pytest.raises(Refused, match=words):
            read_basis(tmp_path / f"{name}.safetensors")
    with pytest.raises(Refused, match="is no basis"):
        read_basis(tmp_path / "loras" / "lora_0.safetensors")
    poisoned = row_layout(tmp_path, **{"x.lora_up.weight.mean": torch.tensor([float("inf")])})
    with pytest.raises(Refused, match="NaN, infinite"):
        read_basis(poisoned)


# ------------------------------------------------------------------ bases without data


def test_bases_of_the_weight_and_of_chance():
    weights = {"b": noise(1, 30, 20).float(), "a": noise(2, 20, 40).half(), "c": noise(3, 30, 20).float()}
    ranks = {"a": 4, "b": 6, "c": 6}
    weight, random = weight_basis(weights, ranks), random_basis(weights, ranks)
    for name, (left, right) in [*weight.items(), *random.items()]:
        assert left.shape == (len(weights[name]), ranks[name])
        assert (
            right.shape == (ranks[name], weights[name].shape[1])
            and left.dtype == right.dtype == torch.float32
        )
        for x in (left.mT @ left, right @ right.mT):
            torch.testing.assert_close(x, torch.eye(ranks[name]), atol=1e-5, rtol=0)
    for name, w in weights.items():
        u, _, vh = torch.linalg.svd(w.double(), full_matrices=False)
        assert angle(weight[name].left, u[:, : ranks[name]]) < 1e-3
        assert angle(weight[name].right.mT, vh[: ranks[name]].mT) < 1e-3
    again = random_basis(dict(reversed(weights.items())), ranks)
    assert all(torch.equal(x, y) for name in weights for x, y in zip(random[name], again[name], strict=True))
    assert not torch.equal(random["b"].left, random["c"].left), "each layer its own"
    for kind in (weight_basis, random_basis):
        with pytest.raises(Refused, match=r"rank 21 .* of b"):
            kind({"b": weights["b"]}, {"b": 21})
