"""Ranks by singular values against kohya's definition, and the nearest matrix of a rank."""

from __future__ import annotations

import pytest
import torch
from adapter_files import _flux, _random
from safetensors.torch import save_file

from lowrank.cli import export
from lowrank.config.tools import rank_choice
from lowrank.errors import Refused
from lowrank.formats.delta import Delta
from lowrank.formats.read import read_adapter
from lowrank.formats.resize import RankRule, cut_matrix, cut_pair, resize
from lowrank.formats.write import only


def kohya_rank(matrix: torch.Tensor, method: str, target: float, most: int) -> int:
    """The rank of `rank_resize` in kohya's networks/resize_lora.py (063ef10), of the whole matrix U·D."""
    S = torch.linalg.svdvals(matrix)
    if S[0] <= 1e-6:
        return 1
    rank = 0
    if method == "sv_ratio":
        rank = sum(1 for value in S if value > S[0] / target)
    elif method == "sv_fro":
        kept, whole = 0.0, float((S**2).sum())
        while rank < len(S) and kept / whole < target**2:
            kept, rank = kept + float(S[rank] ** 2), rank + 1
    elif method == "sv_cumulative":
        kept, whole = 0.0, float(S.sum())
        while rank < len(S) and kept / whole < target:
            kept, rank = kept + float(S[rank]), rank + 1
    return min(max(rank, 1), most)


def spread(rank: int, seed: int = 0) -> Delta:
    """A pair whose singular values fall by a factor of 1.7."""
    pair = _random(40, 30, rank, scale=0.25, seed=seed)
    sizes = 1.7 ** -torch.arange(float(rank))
    Q, P = (torch.linalg.qr(factor)[0] for factor in (pair.up, pair.down.T))
    return pair._replace(up=Q * sizes, down=P.T)


@pytest.mark.parametrize("most", [4, 100])
@pytest.mark.parametrize(
    ("method", "target"),
    [
        *(("sv_ratio", value) for value in (1.5, 4.0, 20.0, 1e9)),
        *(("sv_fro", value) for value in (0.3, 0.9, 0.99, 1.0)),
        *(("sv_cumulative", value) for value in (0.1, 0.6, 0.95)),
    ],
)
def test_ranks_are_those_of_kohya(method, target, most):
    layer = spread(12)
    made = cut_pair(layer, RankRule(method, target, most)).layer
    whole = layer.up.double() @ layer.down.double()
    assert min(made.rank, 12) == min(kohya_rank(whole, method, target, most), 12)


def test_zero_layer_has_rank_one():
    zero = Delta(torch.zeros(6, 4), torch.randn(4, 5), 1.0)
    assert cut_pair(zero, RankRule("sv_fro", 0.9)).layer.rank == 1
    assert kohya_rank(torch.zeros(6, 5), "sv_fro", 0.9, 8) == 1


def test_each_layer_has_a_rank_of_its_own():
    adapter = _flux(
        {"transformer_blocks.0.attn.to_q": spread(12), "transformer_blocks.0.attn.to_k": spread(3, 1)}
    )
    small, loss = resize(adapter, RankRule("sv_fro", 0.9))
    ranks = [layer.rank for layer in small.layers.values()]
    assert ranks[0] == ranks[1] == kohya_rank(spread(12).delta(), "sv_fro", 0.9, 99)
    assert 0 < loss.together <= (1 - 0.9**2) ** 0.5


def test_part_of_a_file_with_another_rank(tmp_path):
    layers = {
        "lora_unet_mid_block_attentions_0_proj_in": 8,
        "lora_te1_text_model_encoder_layers_0_mlp_fc1": 6,
    }
    state = {}
    for name, size in layers.items():
        state |= {
            f"{name}.lora_up.weight": torch.randn(size, 4),
            f"{name}.lora_down.weight": torch.randn(4, 5),
        }
    save_file(state, tmp_path / "in.safetensors")
    part = only(read_adapter(tmp_path / "in.safetensors", "sdxl"), "unet")
    small, _ = resize(part, RankRule(most=2))
    assert [(place.part, layer.rank) for place, layer in small.layers.items()] == [("unet", 2)]
    assert not small.raw


@pytest.mark.parametrize("rank", [3, 29])  # by block Krylov iteration, and by the whole SVD
def test_nearest_matrix(rank):
    matrix = torch.randn(40, 30, generator=torch.Generator().manual_seed(3))
    cut = cut_matrix(matrix, RankRule(most=rank))
    best = torch.linalg.svdvals(matrix.double())[rank:].square().sum()
    assert cut.lost == pytest.approx(float(best), rel=1e-4) and cut.layer.rank == rank
    apart = (cut.layer.delta().double() - matrix).square().sum()
    assert float(apart) == pytest.approx(float(best), rel=1e-4)


def test_rank_of_the_command_line():
    assert rank_choice("8") == ("fixed", 0.0, 8)
    assert rank_choice("auto:sv_ratio=20") == ("sv_ratio", 20.0, None)
    assert rank_choice("auto:sv_cumulative=0.9,max=32") == ("sv_cumulative", 0.9, 32)
    for text in ("auto", "auto:", "8,max=3", "auto:sv_fro", "auto:max=3", "1.5", "auto:sv_fro=x"):
        with pytest.raises(Refused, match="is no rank; give a whole number"):
            rank_choice(text)
    with pytest.raises(Refused, match="names sv_knee; give one of sv_ratio, sv_fro, sv_cumulative"):
        rank_choice("auto:sv_knee=3")


@pytest.mark.parametrize(
    ("text", "message"), [("auto:sv_fro=1.5", "at most 1"), ("auto:sv_ratio=1", "not above 1")]
)
def test_targets_outside_of_their_limits(text, message, tmp_path):
    with pytest.raises(Refused, match=message):
        export.main([str(tmp_path / "in.safetensors"), str(tmp_path / "out.safetensors"), "--rank", text])


@pytest.mark.parametrize(("method", "target"), [("sv_ratio", 4.0), ("sv_fro", 0.9), ("sv_fro", 0.9999)])
def test_ranks_from_the_largest_singular_values_alone(method, target):
    """A large matrix is not decomposed as a whole where the rule has a largest rank."""
    layer = spread(12)
    matrix = torch.zeros(400, 300)
    matrix[:40, :30] = layer.up @ layer.down
    found = cut_matrix(matrix, RankRule(method, target, 16)).layer.rank
    assert found == kohya_rank(matrix, method, target, 16)
