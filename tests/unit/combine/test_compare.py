"""The similarity tool: cosines, their undefined cases, overlaps, files and refusals."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import matplotlib.image
import pytest
import torch
from processes import finished, start
from safetensors.torch import save_file
from torch import Tensor

from lowrank.cli import similarity
from lowrank.cli.similarity import _remark, main
from lowrank.combine import compare as maths
from lowrank.errors import Refused

WIDTHS = {  # (O, I)
    "single_transformer_blocks.0.attn.to_q": (24, 40),
    "transformer_blocks.0.attn.to_out.0": (24, 40),
    "transformer_blocks.0.ff.net.2": (24, 96),
}
MODULES = tuple(WIDTHS)
PER_MATRIX = ("fixed_scale_line.png", "auto_scale_line.png", "distribution.png", "details.json")


def noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def basis(seed: int, out: int, rank: int) -> Tensor:
    return torch.linalg.qr(noise(seed, out, rank))[0].contiguous()


def delta_r(seed: int, rank: int = 4, basis_seed: int = 0) -> dict[str, dict[str, Tensor]]:
    """A ΔR adapter: Q and baseR from `basis_seed`, ΔR from `seed`."""
    return {
        module: {
            "q": basis(basis_seed + n, out, rank),
            "base_r": noise(basis_seed + 50 + n, rank, width).triu(),
            "delta_r": 0.01 * noise(seed + 100 + n, rank, width),
        }
        for n, (module, (out, width)) in enumerate(WIDTHS.items())
    }


def qr(seed: int, rank: int = 4, step: float = 0.01) -> dict[str, dict[str, Tensor]]:
    """A QR-LoRA adapter: both factors moved from their initial copies by `step`."""
    layers = delta_r(0, rank)
    for n, roles in enumerate(layers.values()):
        del roles["delta_r"]
        roles["up"] = roles["q"] + step * noise(seed + 200 + n, *roles["q"].shape)
        roles["down"] = roles["base_r"] + step * noise(seed + 300 + n, *roles["base_r"].shape)
    return layers


def lora(seed: int, rank: int = 4, alpha: float | None = None) -> dict[str, dict[str, Tensor]]:
    """A plain LoRA adapter."""
    return {
        module: {"down": noise(seed + n, rank, width), "up": noise(seed + 400 + n, out, rank)}
        | ({} if alpha is None else {"alpha": torch.tensor(alpha)})
        for n, (module, (out, width)) in enumerate(WIDTHS.items())
    }


def write(path: Path, layers: dict[str, dict[str, Tensor]], **metadata: str) -> str:
    """Native keys, as the trainer writes them."""
    suffix = {role: f"lora.{role}.weight" for role in ("q", "base_r", "delta_r")} | {
        "down": "lora_A.weight",
        "up": "lora_B.weight",
        "alpha": "alpha",
    }
    state = {
        f"transformer.{module}.{suffix[role]}": tensor
        for module, roles in layers.items()
        for role, tensor in roles.items()
    }
    save_file(state, path, {f"lowrank.{key}": value for key, value in metadata.items()})
    return str(path)


def weight(roles: dict[str, Tensor]) -> Tensor:
    """ΔW formed in full, in float64, straight from the definitions."""
    r = {role: tensor.double() for role, tensor in roles.items()}
    if "delta_r" in r:
        return r["q"] @ r["delta_r"]
    scale = r["alpha"] / r["down"].shape[0] if "alpha" in r else 1.0
    return scale * (r["up"] @ r["down"] - (r["q"] @ r["base_r"] if "q" in r else 0))


def disturbance(x: Tensor, y: Tensor) -> float:
    return ((x + y).square().sum() / (x.square().sum() + y.square().sum())).item()


def row_basis(matrix: Tensor) -> Tensor:
    _, sizes, rows = torch.linalg.svd(matrix, full_matrices=False)
    return rows[sizes / sizes[0] > 1e-6]


def values(found: dict, matrix: str) -> list[float | None]:
    return [layer.similarity for layer in found[matrix]]


@pytest.mark.parametrize("sign", [1, -1])
def test_identical_files_are_one_and_negated_updates_minus_one(sign):
    other = {module: roles | {"delta_r": sign * roles["delta_r"]} for module, roles in delta_r(1).items()}
    found = maths.compare(delta_r(1), other)
    assert set(found) == {"Q", "deltaR", "baseR", "deltaW"}
    for matrix in found:
        expected = sign if matrix in maths.UPDATES else 1
        assert values(found, matrix) == pytest.approx([expected] * 3, abs=1e-12)
    for layer in found["deltaR"] + found["deltaW"]:
        assert layer.interference == pytest.approx(1 + sign, abs=1e-12)  # 2 equal, 0 cancelling
        assert layer.row_overlap.mean == pytest.approx(1)


def test_delta_r_cosine_is_that_of_the_whole_update_on_a_shared_basis():
    one, two = delta_r(1), delta_r(2)
    found = maths.compare(one, two)
    assert values(found, "deltaR") == pytest.approx(values(found, "deltaW"), abs=1e-6)
    for module, value in zip(MODULES, values(found, "deltaR"), strict=True):
        formed = torch.cosine_similarity(weight(one[module]).flatten(), weight(two[module]).flatten(), dim=0)
        assert value == pytest.approx(formed.item(), abs=1e-6)  # Q is orthonormal to float32


@pytest.mark.parametrize(
    ("one", "two"),
    [
        (qr(1), qr(2)),
        (qr(1, step=1e-5), qr(2, step=1e-5)),
        (lora(1), lora(2, rank=2, alpha=1.0)),
        (delta_r(1), qr(2)),
        (delta_r(1), delta_r(2, rank=6, basis_seed=7)),
        (qr(1), lora(2)),
    ],
    ids=["qr", "qr, hardly trained", "lora ranks", "delta_r and qr", "other basis and rank", "qr and lora"],
)
def test_whole_updates_compare_across_kinds_ranks_and_bases(one, two):
    for layer, module in zip(maths.compare(one, two)["deltaW"], MODULES, strict=True):
        x, y = weight(one[module]), weight(two[module])
        assert layer.similarity == pytest.approx(((x * y).sum() / (x.norm() * y.norm())).item(), abs=1e-7)
        assert (layer.lora1_norm, layer.lora2_norm) == pytest.approx((x.norm().item(), y.norm().item()))
        assert layer.interference == pytest.approx(disturbance(x, y), abs=1e-7)
        rows1, rows2 = row_basis(x), row_basis(y)
        overlap = (rows1 @ rows2.T).square().sum() / min(len(rows1), len(rows2))
        assert layer.row_overlap.mean == pytest.approx(overlap.item(), abs=1e-6)
        inside = (x @ rows2.T).square().sum() / x.square().sum()
        assert layer.row_overlap.first_in_second == pytest.approx(inside.item(), abs=1e-6)
        assert layer.dimension == tuple(x.shape)


def test_nothing_the_size_of_a_host_weight_is_formed():
    wide = 1 << 20  # the dense weight would need 8 TB
    one, two = ({"layer": {"down": noise(seed, 1, wide), "up": noise(seed + 5, wide, 1)}} for seed in (1, 2))
    layer = maths.compare(one, two)["deltaW"][0]
    parts = [maths.cosine(one["layer"][role], two["layer"][role]) for role in ("down", "up")]
    assert layer.similarity == pytest.approx(parts[0] * parts[1], abs=1e-12)


def test_independent_gaussians_stay_near_zero():
    rank, width = 16, 1024
    cosines = [maths.cosine(noise(2 * n, rank, width), noise(2 * n + 1, rank, width)) for n in range(60)]
    assert max(map(abs, cosines)) < 4 / math.sqrt(rank * width)
    rms = math.sqrt(sum(value**2 for value in cosines) / len(cosines))
    assert 0.7 < rms * math.sqrt(rank * width) < 1.3  # 60 draws know it to 9 %


def test_null_band_of_each_layer():
    found = maths.compare(delta_r(1), delta_r(1))
    bands = [3 / math.sqrt(4 * width) for _, width in WIDTHS.values()]
    for matrix in maths.UPDATES:
        assert [layer.null_band for layer in found[matrix]] == pytest.approx(bands)
    assert maths.statistics(found["deltaR"])["outside_null_band"] == 1


def test_alpha_weighs_the_interference_but_not_the_cosine():
    scaled = {module: roles | {"alpha": torch.tensor(8.0)} for module, roles in delta_r(2).items()}  # s = 2
    found = maths.compare(delta_r(1), scaled)
    plain = maths.compare(delta_r(1), delta_r(2))
    assert values(found, "deltaW") == pytest.approx(values(plain, "deltaW"), abs=1e-12)
    for matrix in ("deltaR", "deltaW"):
        x, y = weight(delta_r(1)[MODULES[0]]), 2 * weight(delta_r(2)[MODULES[0]])
        assert found[matrix][0].interference == pytest.approx(disturbance(x, y), abs=1e-7)
    assert found["deltaW"][0].lora2_norm == pytest.approx(2 * found["deltaR"][0].lora2_norm)


def test_kohya_spelling_meets_native_spelling():
    flat = {f"lora_unet_{module.replace('.', '_')}": roles for module, roles in lora(1).items()}
    assert values(maths.compare(lora(1), flat), "deltaW") == pytest.approx([1, 1, 1])


def test_zero_update_is_undefined_and_left_out():
    zero = delta_r(2)
    zero[MODULES[1]]["delta_r"].zero_()
    found = maths.compare(delta_r(1), zero, ("sty", "cnt"))
    for matrix in ("deltaR", "deltaW"):
        kept = values(found, matrix)
        assert kept[1] is None
        assert found[matrix][1].reason == "zero in cnt"
        assert found[matrix][1].interference is None
        numbers = maths.statistics(found[matrix])
        assert (numbers["layers"], numbers["undefined"], numbers["undefined_zero"]) == (3, 1, 1)
        assert numbers["mean"] == pytest.approx((kept[0] + kept[2]) / 2)
    assert maths.statistics(found["Q"])["undefined"] == 0


def test_untrained_qr_is_exactly_zero():
    found = maths.compare(qr(1, step=0.0), qr(2))
    assert values(found, "deltaW") == [None, None, None]
    numbers = maths.statistics(found["deltaW"])
    assert numbers["mean"] is numbers["std"] is numbers["max"] is maths.judge("deltaW", None) is None


def test_update_that_cancels_itself_is_zero_not_rounding():
    for seed in range(9):  # UD − (UT)(TᵀD), whose rounding may have either sign
        up, down, turn = noise(seed, 24, 4).double(), noise(seed, 4, 40).double(), basis(seed, 4, 4).double()
        pair = torch.cat([up, up @ turn], 1), torch.cat([down, -turn.inverse() @ down])
        assert maths.energy(maths.Delta(*pair, 1.0)) == 0


def test_row_space_of_dependent_rows():
    rows, other = noise(1, 4, 40), noise(2, 4, 40)
    overlap, repeated = maths.row_overlap(rows, other), maths.row_overlap(torch.cat([rows, rows]), other)
    assert repeated == pytest.approx(overlap, abs=1e-9)


def test_bases_of_other_rank_or_rotation_are_compared_as_subspaces():
    wide = delta_r(1, rank=6)
    narrow = {
        module: {role: tensor[:, :4] if role == "q" else tensor[:4] for role, tensor in roles.items()}
        for module, roles in wide.items()
    }
    found = maths.compare(narrow, wide)
    assert values(found, "Q") == pytest.approx([1, 1, 1], abs=1e-6)
    assert {layer.measure for layer in found["Q"]} == {"principal angles"}
    assert values(found, "deltaR") == values(found, "baseR") == [None, None, None]
    assert "shapes differ: (4, 40) and (6, 40)" in found["deltaR"][0].reason
    assert maths.statistics(found["deltaR"])["undefined_zero"] == 0
    turned = {module: roles | {"q": roles["q"] @ basis(9, 4, 4)} for module, roles in delta_r(1).items()}
    layer = maths.compare(delta_r(1), turned)["Q"][0]
    assert abs(layer.similarity) < 0.9 and layer.basis_overlap == pytest.approx(1, abs=1e-6)


def test_files_without_a_common_layer_name_examples_of_both():
    other = {f"other_blocks.{n}.proj": roles for n, roles in enumerate(delta_r(2).values())}
    with pytest.raises(Refused, match=rf"sty: transformer\.{MODULES[0]}.*cnt: transformer\.other_blocks\.0"):
        maths.compare(delta_r(1), other, ("sty", "cnt"))


def test_files_without_a_common_matrix_say_what_they_hold():
    bare = {module: {"delta_r": roles["delta_r"]} for module, roles in delta_r(1).items()}
    with pytest.raises(Refused, match="style has delta_r, content has down, up"):
        maths.compare(bare, lora(2))
    assert set(maths.compare(bare, delta_r(2))) == {"deltaR"}


@pytest.mark.parametrize(
    ("role", "shape", "sentence"),
    [
        ("up", (28, 4), r"to_out\.0 has 24 outputs in style and 28 in content"),
        ("down", (4, 44), r"to_out\.0 has 40 inputs in style and 44 in content"),
        ("up", (24, 5), r"content: .*to_out\.0 has rank 4, 5 in 'up'"),
    ],
)
def test_layers_of_another_model_and_torn_factors_are_refused(role, shape, sentence):
    other = lora(2)
    other[MODULES[1]][role] = noise(3, *shape)
    with pytest.raises(Refused, match=sentence):
        maths.compare(lora(1), other)


@pytest.mark.parametrize(
    ("matrix", "mean", "verdict"),
    [
        ("Q", 0.9985, "ideal"),
        ("Q", 0.97, "warn"),
        ("Q", 0.949, "problem"),
        ("baseR", 0.991, "ideal"),
        ("baseR", 0, "problem"),
        ("deltaR", 0.0342, "ideal"),
        ("deltaR", 0.3, "warn"),
        ("deltaR", -1, "problem"),
        ("deltaR", 0.51, "problem"),
        ("deltaW", 0.2, "warn"),
        ("A", 0.9, None),
    ],
)
def test_thresholds_of_the_demo_guide(matrix, mean, verdict):
    assert maths.judge(matrix, mean) == verdict


@pytest.mark.parametrize(
    ("outside", "verdict"), [(0.0, "ideal"), (0.05, "ideal"), (0.06, "warn"), (0.56, "warn")]
)
def test_low_mean_is_not_separation_if_layers_leave_the_null_band(outside, verdict):
    assert maths.judge("deltaW", 0.02, outside) == maths.judge("deltaR", -0.02, outside) == verdict
    assert maths.judge("deltaW", 0.6, outside) == "problem" and maths.judge("Q", 0.999, outside) == "ideal"


def test_remark_names_the_layers_outside_the_null_band():
    assert "56% of the layers are more alike" in _remark("deltaW", 0.01, 0.56)
    assert "independent random matrices; see" in _remark("deltaW", 0.01, 0.0)


def test_statistics_against_numbers_worked_by_hand():
    cosines = (-0.6, 0.1, 0.2, 0.5)
    layers = [maths.LayerSimilarity("x", value, 1.0, 2.0, (4, 9), null_band=0.5) for value in cosines]
    expected = {
        "mean": 0.05,
        "median": 0.15,
        "min": -0.6,
        "max": 0.5,
        "abs_mean": 0.35,
        "abs_max": 0.6,
        "std": math.sqrt((0.65**2 + 0.05**2 + 0.15**2 + 0.45**2) / 4),
        "outside_null_band": 0.25,
        "lora1_norm_mean": 1,
        "lora2_norm_mean": 2,
    }
    numbers = maths.statistics(layers)
    assert {name: numbers[name] for name in expected} == pytest.approx(expected)


def run(one: str, two: str, folder: Path, *flags: str) -> int:
    return main(["--lora1_path", one, "--lora2_path", two, "--output_dir", str(folder), *flags])


@pytest.fixture(scope="module")
def compared(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("compared")
    zero = delta_r(2)
    zero[MODULES[1]]["delta_r"].zero_()
    one, two = write(folder / "a.safetensors", delta_r(1)), write(folder / "b.safetensors", zero)
    (folder / "out").mkdir()
    (folder / "out" / "vis_script.sh").write_text("kept")
    assert run(one, two, folder / "out", "--lora1_name", "sty", "--lora2_name", "cnt", "--fixed_scale") == 0
    return folder / "out"


def test_every_file_of_the_demo_guide_is_there_and_nothing_else(compared):
    expected = {
        f"{matrix}_similarity_{name}" for matrix in ("Q", "deltaR", "baseR", "deltaW") for name in PER_MATRIX
    } | {"summary_statistics.txt", "all_statistics.json", "vis_script.sh"}
    assert {path.name for path in compared.iterdir()} == expected


def test_plots_are_images_with_something_on_them(compared):
    pictures = {path.name: matplotlib.image.imread(path) for path in compared.glob("*.png")}
    for name, picture in pictures.items():
        assert picture.shape[0] >= 700 and picture.shape[1] >= 1200, name
        assert picture[..., :3].std() > 0.02, name
    fixed, auto = (pictures[f"deltaR_similarity_{scale}_scale_line.png"] for scale in ("fixed", "auto"))
    assert (fixed != auto).any()


def test_json_holds_the_documented_fields_and_null_for_undefined(compared):
    layers = json.loads((compared / "deltaR_similarity_details.json").read_text(encoding="utf-8"))
    assert [layer["layer_name"] for layer in layers] == [f"transformer.{module}" for module in MODULES]
    assert list(layers[0])[:5] == ["layer_name", "similarity", "lora1_norm", "lora2_norm", "dimension"]
    assert layers[0]["dimension"] == [4, 40]
    assert layers[0]["lora1_norm"] == pytest.approx(delta_r(1)[MODULES[0]]["delta_r"].norm().item(), rel=1e-6)
    assert (layers[1]["similarity"], layers[1]["lora2_norm"], layers[1]["reason"]) == (None, 0, "zero in cnt")
    assert set(layers[2]["row_overlap"]) == set(maths.RowOverlap._fields)
    numbers = json.loads((compared / "all_statistics.json").read_text(encoding="utf-8"))
    assert list(numbers) == ["Q", "deltaR", "baseR", "deltaW"]
    assert (numbers["Q"]["verdict"], numbers["deltaR"]["undefined"]) == ("ideal", 1)


def test_summary_has_the_documented_layout(compared):
    text = (compared / "summary_statistics.txt").read_text(encoding="utf-8")
    lines = text.splitlines()
    assert lines[:3] == ["=== QR-LoRA Similarity Analysis Summary ===", "", "Q Matrix Similarity:"]
    assert lines[3:8] == [
        "  Mean:   1.0000",
        "  Median: 1.0000",
        "  Std:    0.0000",
        "  Min:    1.0000",
        "  Max:    1.0000",
    ]
    assert lines[8].startswith("  → practically identical")
    assert [line for line in lines if line.endswith("Matrix Similarity:")] == [
        f"{matrix} Matrix Similarity:" for matrix in ("Q", "deltaR", "baseR", "deltaW")
    ]
    assert "Undefined:    1 of 3 layers (1 × zero in cnt)" in text
    words = ("|cos|:", "Null band:", "Norm:", "Interference:", "Row spaces:", "Energy:", "neither")
    assert not [word for word in words if word not in text]


def test_summary_is_printed_with_the_list_of_files(tmp_path, capsys):
    one, two = write(tmp_path / "a.safetensors", qr(1)), write(tmp_path / "b.safetensors", qr(2))
    out = tmp_path / "new" / "out"
    assert run(one, two, out) == 0
    printed = capsys.readouterr().out
    assert printed.startswith((out / "summary_statistics.txt").read_text(encoding="utf-8"))
    for matrix in ("Q", "baseR", "A", "B", "deltaW"):
        for name in PER_MATRIX:
            assert f"  {matrix}_similarity_{name}\n" in printed
            assert (out / f"{matrix}_similarity_{name}").stat().st_size > 0


@pytest.mark.parametrize("count", [1, 3, 342])
@pytest.mark.parametrize("defined", [True, False])
def test_plots_of_few_many_and_undefined_layers(count, defined):
    cosines = [0.01 * math.sin(n) for n in range(count)]
    layers = [
        maths.LayerSimilarity(
            f"transformer.{'ab'[n > count // 2]}_blocks.{n}.x",
            value if defined else None,
            1.0,
            1.0,
            (4, 9),
            null_band=0.005,
        )
        for n, value in enumerate(cosines)
    ]
    names = ("<s> $\\frac$", "<c>")  # as a formula this would not parse
    fixed, auto = (similarity.line_plot("deltaR", layers, names, fixed=scale) for scale in (True, False))
    for figure in (fixed, auto, similarity.distribution_plot("deltaR", layers, names)):
        figure.savefig(io.BytesIO(), dpi=40)
    assert fixed.axes[0].get_title() == "Cosine Similarity of deltaR matrices\n(<s> $\\frac$ vs <c>)"
    low, high = fixed.axes[0].get_ylim()
    assert low <= -1 and high >= 1  # nothing a cosine can be is cut off
    if defined:
        low, high = auto.axes[0].get_ylim()
        assert low < min(cosines) <= max(cosines) < high < 0.1


def test_different_base_models_and_missing_bases_are_said(tmp_path):
    bare = {module: {"delta_r": roles["delta_r"]} for module, roles in delta_r(1).items()}
    one = write(tmp_path / "a.safetensors", delta_r(1), base_hash="1", basis_hash="5")
    two = write(tmp_path / "b.safetensors", bare, base_hash="2", basis_hash="5")
    run(one, two, tmp_path)
    text = (tmp_path / "summary_statistics.txt").read_text(encoding="utf-8")
    assert "different base models" in text and "different bases" not in text
    assert "content was saved without its basis" in text


def test_bad_values_are_refused_by_name_and_nothing_is_written(tmp_path):
    broken = delta_r(2)
    broken[MODULES[2]]["delta_r"][1, 3] = float("nan")
    one, two = write(tmp_path / "a.safetensors", delta_r(1)), write(tmp_path / "b.safetensors", broken)
    with pytest.raises(Refused, match=r"b\.safetensors.*NaN.*ff\.net\.2"):
        run(one, two, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())
    with pytest.raises(Refused, match="--output_dir"):  # a folder that is a file
        run(one, one, Path(one))


def test_the_root_script_refuses_in_one_sentence(tmp_path):
    one = write(tmp_path / "a.safetensors", delta_r(1))
    words = ["--lora1_path", one, "--lora2_path", "absent"]
    assert finished(start("visualize_similarity.py", words, log := tmp_path / "log")) == 1
    assert log.read_text().count("\n") == 1 and log.read_text().startswith("error: absent ")
