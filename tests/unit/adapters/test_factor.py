"""Starting values, the top singular subspace, its QR factors, algebra of pairs, against float64 formulas."""

from __future__ import annotations

import math

import pytest
import torch

from lowrank.adapters.factor import concat, kaiming, resize_pair
from lowrank.bases import krylov
from lowrank.bases.krylov import full_precision, thin_qr, top_subspace
from lowrank.errors import Refused

R, B = 6, 8  # a rank and a block small enough for tests


def low_rank(up: torch.Tensor, core: torch.Tensor | None, down: torch.Tensor) -> torch.Tensor:
    """ΔW = U·diag(core)·D (O, I) or (O, I, kh, kw)."""
    rows = down.flatten(1) if core is None else core[:, None] * down.flatten(1)
    return (up.flatten(1) @ rows).unflatten(1, down.shape[1:])


def known(o: int, i: int, sigma: torch.Tensor, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """W (O, I) in float64 with the singular values sigma, and its left singular vectors (O, k)."""
    generator = torch.Generator().manual_seed(seed)
    u, v = (
        torch.linalg.qr(torch.randn(n, len(sigma), generator=generator, dtype=torch.float64))[0]
        for n in (o, i)
    )
    return u * sigma @ v.mT, u


def power(k: int, p: float) -> torch.Tensor:
    return torch.arange(1, k + 1, dtype=torch.float64) ** -p


def sine(found: torch.Tensor, truth: torch.Tensor) -> float:
    """Largest principal sine between two column spaces."""
    x = torch.linalg.qr(found.double())[0]
    return torch.linalg.svdvals(x - truth @ (truth.mT @ x)).max().item()


def loss(found: torch.Tensor, weight: torch.Tensor) -> float:
    """1 - captured / best possible energy."""
    x = torch.linalg.qr(found.double())[0]
    best = torch.linalg.svdvals(weight.double())[: x.shape[1]].square().sum()
    return 1 - ((x.mT @ weight.double()).square().sum() / best).item()


def off_identity(q: torch.Tensor) -> float:
    return (q.double().mT @ q.double() - torch.eye(q.shape[1])).abs().max().item()


# ------------------------------------------------------------------ kaiming


@pytest.mark.parametrize("shape", [(20,), (5, 3, 3)])
def test_kaiming_is_torchs_for_a_root_five(shape):
    mine = kaiming(4, shape, generator=torch.Generator().manual_seed(3))
    theirs = torch.empty(4, *shape)
    torch.nn.init.kaiming_uniform_(theirs, a=math.sqrt(5), generator=torch.Generator().manual_seed(3))
    assert torch.allclose(mine, theirs, rtol=1e-6)
    assert kaiming(4, shape, dtype=torch.bfloat16).dtype == torch.bfloat16


# ------------------------------------------------------------------ top_subspace


@pytest.mark.parametrize("shape", [(320, 320), (300, 700), (700, 300)], ids=str)
@pytest.mark.parametrize("p", [0.25, 0.5, 1.0])
def test_krylov_finds_the_top_subspace(shape, p):
    sigma = power(min(shape), p)
    weight, u = known(*shape, sigma)
    top = top_subspace(weight.float(), R, block=B)
    assert top.report.method == "krylov"
    assert sine(top.u, u[:, :R]) <= min(1e-4, top.report.sine)
    assert loss(top.u, weight) <= 1e-6
    assert max(off_identity(top.u), off_identity(top.vh.mT)) <= 1e-5
    assert torch.allclose(top.s.double(), sigma[:R], rtol=1e-5)
    core = u[:, :R] @ (u[:, :R].mT @ weight)
    assert (low_rank(top.u, top.s, top.vh) - core).norm() <= 1e-4 * core.norm()


def test_krylov_at_the_size_of_a_layer():
    weight, u = known(800, 1000, power(800, 0.5))
    top = top_subspace(weight.float(), 40)
    assert top.report.method == "krylov" and top.report.columns < 400
    assert sine(top.u, u[:, :40]) <= 1e-4


def test_a_flat_spectrum_is_accepted_for_its_energy():
    weight = torch.randn(400, 400, generator=torch.Generator().manual_seed(1))
    top = top_subspace(weight, R, block=B)
    assert top.report.method == "krylov" and top.report.columns >= krylov.DEEP * B and top.report.sine > 1e-3
    assert loss(top.u, weight) <= min(1e-5, top.report.loss + 1e-7)


@pytest.mark.parametrize("shape", [(150, 200), (200, 150)], ids=str)
def test_what_krylov_cannot_do_is_solved_exactly_and_said(shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    top = top_subspace(weight, R, block=B)
    assert top.report.method == "fallback"
    assert sine(top.u, torch.linalg.svd(weight.double())[0][:, :R]) <= 1e-6
    assert top_subspace(weight[:99, :99], R, block=B).report.method == "exact"


@pytest.mark.parametrize("n", [7, 40, 400])
def test_every_rank_up_to_the_smaller_side(n):
    weight = torch.randn(5, n, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for turned in (weight, weight.mT):
        top = top_subspace(turned, 5)
        assert torch.allclose(low_rank(top.u, top.s, top.vh), turned, atol=1e-12)


@pytest.mark.parametrize("rank", [3, 0])
@pytest.mark.parametrize("shape", [(30, 50), (50, 30), (300, 400), (400, 300)], ids=str)
def test_weights_without_the_rank(shape, rank):
    """Also with structure: rows of zeros leave a start of random columns nothing to stand on."""
    weight = known(*shape, torch.ones(rank, dtype=torch.float64))[0].float()
    weight[10:20] = 0
    top = top_subspace(weight, R, block=B)
    assert max(off_identity(top.u), off_identity(top.vh.mT)) <= 1e-5
    assert (top.s[rank:] <= 1e-6).all()
    assert torch.allclose(low_rank(top.u, top.s, top.vh), weight, atol=1e-6)


@pytest.mark.parametrize("y", [torch.zeros(30, 4), torch.eye(30, 4), torch.eye(30, 4) * 1e-20])
def test_a_block_that_vanishes_is_replaced_by_new_directions(y):
    """W with rows of zeros: nothing is left of G X, not even rounding noise to stand on."""
    q = torch.eye(8, 30)
    x, t = krylov._orthonormal(y, q, torch.Generator().manual_seed(0))
    assert off_identity(x) <= 1e-6 and (q @ x).abs().max() <= 1e-6 and (t == 0).all()


def test_repeated_singular_values_are_all_found():
    sigma = torch.cat([torch.ones(R - 1), torch.full((200,), 0.5), torch.full((195,), 0.1)]).double()
    weight, u = known(400, 400, sigma)
    top = top_subspace(weight.float(), R - 1, block=B)
    assert sine(top.u, u[:, : R - 1]) <= 1e-4
    assert torch.allclose(top_subspace(torch.eye(400), R, block=B).s, torch.ones(R), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(320, 600), (600, 320), (30, 50)], ids=str)
def test_dtypes_are_widened_and_not_rounded(dtype, shape, monkeypatch):
    monkeypatch.setattr(krylov, "CHUNK", 7 * 320)  # several pieces, the last one smaller
    weight = known(*shape, power(min(shape), 0.5))[0].to(dtype)
    top = top_subspace(weight, R, block=B)
    assert top.u.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert sine(top.u, torch.linalg.svd(weight.double())[0][:, :R]) <= 1e-4


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_any_magnitude(scale):
    weight, u = known(320, 320, power(320, 0.5))
    top = top_subspace((weight * scale).float(), R, block=B)
    assert top.report.method == "krylov" and sine(top.u, u[:, :R]) <= 1e-4
    assert torch.allclose(top.s.double(), power(R, 0.5) * scale, rtol=1e-5)


def test_views_parameters_and_autocast_change_nothing():
    weight = known(320, 400, power(320, 0.5))[0].float()
    plain = top_subspace(weight, R, block=B)
    view = weight.mT.contiguous().mT
    with torch.autocast("cpu", dtype=torch.bfloat16):
        other = top_subspace(torch.nn.Parameter(view), R, block=B)
    assert not view.is_contiguous() and not other.u.requires_grad
    assert sine(other.u, torch.linalg.qr(plain.u.double())[0]) <= 1e-5


def test_the_same_seed_gives_the_same_bytes_and_no_other_bytes_are_held():
    weight = known(320, 400, power(320, 0.5))[0]
    for case in (weight.float(), weight.mT.float(), weight[:50].float(), weight.bfloat16(), weight):
        first, again = top_subspace(case, R, block=B), top_subspace(case, R, block=B)
        for x, y in zip(first[:3], again[:3], strict=True):
            assert torch.equal(x, y)
            assert x.is_contiguous() and x.untyped_storage().nbytes() == x.numel() * x.element_size()
    assert not torch.equal(top_subspace(weight, R, block=B, seed=1).u, top_subspace(weight, R, block=B).u)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [30, 400])
def test_a_weight_that_is_not_finite_is_refused_by_name(bad, dtype, n):
    weight = torch.randn(n, n).to(dtype)
    weight[n // 2, 3] = bad
    with pytest.raises(Refused, match=r"blocks\.0\.to_q has NaN or infinite"):
        top_subspace(weight, R, block=B, name="blocks.0.to_q")


@pytest.mark.parametrize("rank", [0, 9])
def test_a_rank_the_weight_cannot_have_is_refused(rank):
    with pytest.raises(Refused, match=rf"rank {rank} is not between 1 and min\(out=8, in=20\) of to_q"):
        top_subspace(torch.randn(8, 20), rank, name="to_q")
    with pytest.raises(ValueError, match="narrower"):
        top_subspace(torch.randn(8, 20), 6, block=4)


@pytest.mark.parametrize("weight", [torch.ones(8, 20, dtype=torch.int8), torch.ones(8, 20, 3, 3)])
def test_only_a_floating_point_matrix_has_a_basis(weight):
    with pytest.raises(Refused, match=r"to_q is .* dequantise or flatten"):
        top_subspace(weight, 4, name="to_q")


# ------------------------------------------------------------------ full_precision


@pytest.mark.parametrize("value", ["none", "tf32", "ieee"])
def test_full_precision_switches_tf32_off_and_restores_it(value):
    backend = torch.backends.cuda.matmul
    before = backend.fp32_precision
    try:
        backend.fp32_precision = value
        with pytest.raises(KeyError), torch.autocast("cpu", dtype=torch.bfloat16):
            with full_precision(torch.device("cpu")):
                inside = (
                    backend.fp32_precision,
                    (torch.ones(2, 2) @ torch.ones(2, 2)).dtype,
                    torch.is_grad_enabled(),
                )
            raise KeyError
        assert inside == ("ieee", torch.float32, False)
        assert backend.fp32_precision == value and torch.is_grad_enabled()
        with pytest.raises(KeyError), full_precision(torch.device("cpu")):
            raise KeyError
        assert backend.fp32_precision == value
    finally:
        backend.fp32_precision = before


def test_the_older_setting_of_torch_is_kept():
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        with full_precision(torch.device("cpu")):
            assert torch.backends.cuda.matmul.fp32_precision == "ieee"
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)


# ------------------------------------------------------------------ thin_qr


def core_of(o: int, i: int, zero: tuple[int, ...] = (), rank: int = R) -> tuple[torch.Tensor, ...]:
    """The exact top-r triplets in float64 of a matrix with some columns of zeros."""
    weight = known(o, i, power(min(o, i), 0.5))[0]
    weight[:, list(zero)] = 0
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    return u[:, :rank], s[:rank], vh[:rank]


@pytest.mark.parametrize("shape", [(40, 40), (60, 25), (25, 60), (40, R), (R, 40)], ids=str)
def test_thin_qr_is_the_official_qr_with_its_signs_fixed(shape):
    """The released code factors the whole dense core and cuts; its signs are whatever LAPACK gives."""
    u, s, vh = core_of(*shape)
    q, r = thin_qr(u, s, vh)
    whole_q, whole_r = torch.linalg.qr(low_rank(u, s, vh))
    sign = whole_r.diagonal()[:R].sign()
    assert (q - whole_q[:, :R] * sign).abs().max() <= 1e-10
    assert (r - whole_r[:R] * sign[:, None]).abs().max() <= 1e-10
    assert (r.diagonal() > 0).all() and (r.tril(-1) == 0).all() and off_identity(q) <= 1e-12


def test_thin_qr_depends_on_the_core_alone():
    u, s, vh = core_of(40, 50)
    q, r = thin_qr(u, s, vh)
    order, sign = torch.tensor([3, 1, 0, 5, 2, 4]), torch.tensor([1, -1, -1, 1, 1, -1]).double()
    other_q, other_r = thin_qr((u * sign)[:, order], s[order], (vh * sign[:, None])[order])
    assert (q - other_q).abs().max() <= 1e-12 and (r - other_r).abs().max() <= 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("zero", [(0, 1, 2), (2,), tuple(range(20))], ids=str)
def test_dead_inputs_do_not_lose_the_subspace(zero, dtype):
    """With the first columns zero, cutting the whole core's QR, as the official code does, loses half."""
    u, s, vh = (x.to(dtype) for x in core_of(40, 50, zero))
    q, r = thin_qr(u, s, vh)
    eps = 20 * torch.finfo(dtype).eps
    assert off_identity(q) <= eps and sine(q, torch.linalg.qr(u.double())[0]) <= eps
    assert (q @ r - low_rank(u, s, vh)).abs().max() <= eps
    assert (
        (r.tril(-1) == 0).all() and (r.diagonal() >= 0).all() and (r[:, list(zero)] == 0).sum() >= len(zero)
    )
    flipped = thin_qr(-u, s, -vh)[0]
    assert (q - flipped).abs().max() <= eps


def test_a_core_that_lacks_rank_keeps_an_orthonormal_q():
    u, s, vh = core_of(40, 50)
    s = torch.cat([s[:4], torch.zeros(2, dtype=torch.float64)])
    q, r = thin_qr(u, s, vh)
    assert (
        off_identity(q) <= 1e-12
        and sine(q, u) <= 1e-12
        and torch.allclose(q @ r, low_rank(u, s, vh), atol=1e-12)
    )
    assert (r[4:] == 0).all() and (r.diagonal()[:4] > 0).all()
    q, r = thin_qr(u, 0 * s, vh)
    assert sine(q, u) <= 1e-12 and (r == 0).all()


# ------------------------------------------------------------------ pairs


def pair(
    kind: str, seed: int = 0, rank: int = 4, dtype: torch.dtype = torch.float64
) -> tuple[torch.Tensor, torch.Tensor]:
    """up and down of a Linear 12 -> 9 or a 3 × 2 convolution 5 -> 9."""
    generator = torch.Generator().manual_seed(seed)
    up, down = ((9, rank), (rank, 12)) if kind == "linear" else ((9, rank, 1, 1), (rank, 5, 3, 2))
    return tuple(
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in (up, down)
    )


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_concat_is_the_exact_sum(kind):
    parts = [(0.5, *pair(kind, 0)), (-2.0, *pair(kind, 1, rank=3)), (0.0, *pair(kind, 2))]
    up, down = concat(parts)
    assert up.shape[1] == down.shape[0] == 11
    assert torch.allclose(
        low_rank(up, None, down), sum(s * low_rank(u, None, d) for s, u, d in parts), atol=1e-14
    )


def test_concat_refuses_layers_of_different_shape():
    with pytest.raises(Refused, match="cannot be added"):
        concat([(1.0, *pair("linear")), (1.0, *pair("conv"))])


@pytest.mark.parametrize("kind", ["linear", "conv"])
@pytest.mark.parametrize("rank", [1, 3, 6])
def test_resize_is_the_best_approximation_and_knows_its_error(kind, rank):
    up, down = concat([(1.0, *pair(kind, 0)), (0.3, *pair(kind, 1, rank=2))])
    whole = low_rank(up, None, down).flatten(1)
    new_up, new_down, error = resize_pair(up, down, rank)
    assert (new_up.shape, new_down.shape) == ((9, rank, *up.shape[2:]), (rank, *down.shape[1:]))
    u, s, vh = torch.linalg.svd(whole, full_matrices=False)
    small = low_rank(new_up, None, new_down).flatten(1)
    assert torch.allclose(small, low_rank(u[:, :rank], s[:rank], vh[:rank]), atol=1e-12)
    assert error == pytest.approx(((whole - small).norm() / whole.norm()).item(), abs=1e-12)
    assert torch.allclose(new_up.flatten(1).norm(dim=0), new_down.flatten(1).norm(dim=1))  # balanced


def test_resize_keeps_dtypes_and_takes_zero_and_refuses_more():
    up, down = pair("linear", dtype=torch.bfloat16)
    new_up, new_down, error = resize_pair(up, down, 2)
    assert new_up.dtype == new_down.dtype == torch.bfloat16 and 0 < error < 1
    assert resize_pair(0 * up, down, 2)[2] == 0.0
    for rank in (0, 5):
        with pytest.raises(Refused, match=f"rank {rank} is not between 1 and 4, the rank of this layer"):
            resize_pair(up, down, rank)
