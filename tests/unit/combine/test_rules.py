"""The rules of merging, each against its formula in float64 or against PEFT."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from flux_adapters import flux, forward, saved  # noqa: F401 (fixtures)
from safetensors.torch import load_file

from lowrank.combine import rules
from lowrank.combine.columns import recorded
from lowrank.combine.mixture import read_mixture
from lowrank.combine.rules import RULES, Merging, Part, RuleOptions
from lowrank.combine.selection import top_sum
from lowrank.config import merge as flags
from lowrank.errors import Refused
from lowrank.formats.delta import Delta

O, I = 14, 10
# fp32 factors and an SVD of a 14×10 matrix: a few hundred roundings of 6e-8
TOLERANCE = 5e-6


def layer(rank: int, seed: int, scale: float = 0.5) -> Delta:
    draw = torch.Generator().manual_seed(seed)
    return Delta(torch.randn(O, rank, generator=draw), torch.randn(rank, I, generator=draw), scale)


def parts(*weights: float, ranks: tuple[int, ...] = (3, 4, 2)) -> list[Part]:
    return [Part(w, layer(ranks[i], i, 0.5 + i)) for i, w in enumerate(weights)]


def dense(part: Part) -> np.ndarray:
    pair = part.layer
    return (pair.scale * pair.up.double() @ pair.down.double()).numpy()


def product(pair: tuple[torch.Tensor, torch.Tensor]) -> np.ndarray:
    return (pair[0].double() @ pair[1].double()).numpy()


def nearest(matrix: np.ndarray, rank: int) -> np.ndarray:
    u, s, vh = np.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vh[:rank]


def trimmed(matrix: np.ndarray, density: float) -> np.ndarray:
    order = np.argsort(-np.abs(matrix), axis=None, kind="stable")[: int(density * matrix.size)]
    out = np.zeros(matrix.size)
    out[order] = matrix.reshape(-1)[order]
    return out.reshape(matrix.shape)


def elected(matrices: list[np.ndarray], weights: list[float], sign: str) -> np.ndarray:
    """Element by element, without vector arithmetic."""
    out = np.zeros((O, I))
    for i, j in np.ndindex(O, I):
        values = [m[i, j] for m in matrices]
        votes = sum(values) if sign == "total" else sum(np.sign(v) for v in values)
        wanted = 1.0 if votes >= 0 else -1.0
        agreeing = [w * v for w, v in zip(weights, values, strict=True) if np.sign(v) == wanted]
        out[i, j] = sum(agreeing) / max(1, len(agreeing))
    return out


def check(got: np.ndarray, want: np.ndarray) -> None:
    assert np.abs(got - want).max() <= TOLERANCE * np.abs(want).max()


def test_flags_and_rules_are_the_same_list():
    assert list(flags.RULES) == list(RULES)


def test_concatenation_is_the_weighted_sum():
    given = parts(0.7, -1.3, 2.0)
    pair = rules.concat(given, RuleOptions(), "m")
    assert pair[0].shape[1] == 3 + 4 + 2
    check(product(pair), sum(p.weight * dense(p) for p in given))


@pytest.mark.parametrize("rank", [None, 2, 7, 30])
def test_svd_is_the_nearest_matrix_of_its_rank(rank):
    given = parts(0.7, -1.3)
    want = nearest(sum(p.weight * dense(p) for p in given), rank or 4)
    check(product(rules.svd(given, RuleOptions(rank=rank), "m")), want)


@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
def test_magnitude_pruning(density):
    given = parts(0.7, 1.3)
    want = nearest(sum(p.weight * trimmed(dense(p), density) for p in given), 5)
    check(product(rules.magnitude_prune(given, RuleOptions(rank=5, density=density), "m")), want)


@pytest.mark.parametrize("sign", ["total", "frequency"])
def test_ties(sign):
    given = parts(0.7, 1.3, 0.4)
    want = elected([trimmed(dense(p), 0.4) for p in given], [p.weight for p in given], sign)
    pair = rules.ties(given, RuleOptions(rank=10, density=0.4, sign=sign), "m")
    check(product(pair), want)


def test_dare_keeps_a_share_of_the_elements_and_the_mean():
    given = parts(1.0)
    change = dense(given[0])
    drawn = [
        product(rules.dare_linear(given, RuleOptions(rank=10, density=0.25, seed=seed), "m"))
        for seed in range(200)
    ]
    kept = np.abs(np.stack(drawn)) > 1e-4 * np.abs(change).max()
    # 200·140 draws of probability 1/4: the standard deviation of the share is 0.0026
    assert abs(kept.mean() - 0.25) < 0.012
    for matrix, mask in zip(drawn[:5], kept[:5], strict=True):
        check(matrix[mask], 4 * change[mask])
    again = rules.dare_linear(given, RuleOptions(rank=10, density=0.25, seed=3), "m")
    assert np.array_equal(product(again), drawn[3])
    other = rules.dare_linear(given, RuleOptions(rank=10, density=0.25, seed=3), "other layer")
    assert not np.allclose(product(other), drawn[3])


def test_dare_ties_elects_among_what_is_left():
    given = parts(0.7, 1.3)
    options = RuleOptions(rank=10, density=0.5, seed=1)
    kept = [m.double().numpy() for m in rules._dropped(given, options, "m")]
    want = elected(kept, [0.7, 1.3], "total")
    check(product(rules.dare_ties(given, options, "m")), want)


@pytest.mark.parametrize(
    "kind", ["svd", "ties_svd", "magnitude_prune_svd", "dare_linear_svd", "dare_ties_svd"]
)
def test_peft_merges_to_the_same_matrices(kind, monkeypatch):
    from peft import LoraConfig, get_peft_model

    model = torch.nn.Sequential(torch.nn.Linear(I, O, bias=False))
    names = ("default", "b")
    peft_model = get_peft_model(model, LoraConfig(r=3, lora_alpha=2, target_modules=["0"]))
    peft_model.add_adapter("b", LoraConfig(r=4, lora_alpha=12, target_modules=["0"]))
    host = peft_model.base_model.model[0]
    given = []
    for seed, (name, weight, scale) in enumerate(zip(names, (0.7, 1.3), (2 / 3, 3.0), strict=True)):
        pair = layer(host.r[name], seed, scale)
        host.lora_A[name].weight.data, host.lora_B[name].weight.data = pair.down, pair.up
        given.append(Part(weight, pair))
    rule = getattr(rules, kind.removesuffix("_svd"))
    if "dare" in kind:  # both draw with torch.bernoulli: give theirs our generator
        draw, ours = torch.Generator(), torch.bernoulli
        monkeypatch.setattr(torch, "bernoulli", lambda x, generator=None, **_: ours(x, generator=draw))
        draw.manual_seed(5)
    pair = rule(given, RuleOptions(rank=5, density=0.5), "m")
    if "dare" in kind:
        draw.manual_seed(5)
    peft_model.base_model.add_weighted_adapter(
        list(names), [0.7, 1.3], "m", combination_type=kind, svd_rank=5, density=0.5
    )
    check(product(pair), host.get_delta_weight("m").detach().double().numpy())


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_orthogonal_sum_keeps_the_first_and_projects_the_others(share):
    given = parts(0.7, 1.3, -0.5)
    want, rows = np.zeros((O, I)), np.zeros((0, I))
    for part in given:
        change = dense(part)
        projector = np.linalg.pinv(rows) @ rows if len(rows) else np.zeros((I, I))
        want += part.weight * change @ (np.eye(I) - share * projector)
        rows = np.concatenate([rows, change])
    check(product(rules.orthogonal(given, RuleOptions(projection=share), "m")), want)


def test_orthogonal_sum_acts_as_the_style_on_the_styles_directions():
    style, content = parts(1.0, 1.0)
    merged = product(rules.orthogonal([style, content], RuleOptions(), "m"))
    directions = style.layer.down.double().numpy().T
    check(merged @ directions, dense(style) @ directions)


# ---------- on a model


def merged(files, name: str, **options):
    return read_mixture(files, merging=Merging(RULES[name], RuleOptions(**options)))


@pytest.mark.parametrize("name", [n for n, rule in RULES.items() if rule.pair and not rule.learned])
def test_saved_rule_is_the_live_rule(name, flux, saved, tmp_path):
    files = [saved("lora", 1), saved("lora", 2)]
    base = forward(flux)
    mixture = merged(files, name)
    assert name in mixture.describe() or RULES[name].pair is None
    attached = mixture.attach(flux)
    assert torch.equal(forward(flux), base)
    attached.set((0.9, 1.1))
    live = forward(flux)
    attached.set((0.0, 0.0))
    assert torch.equal(forward(flux), base)
    attached.restore()
    mixture.save(tmp_path / "merged.safetensors", (0.9, 1.1), {})
    again = read_mixture([tmp_path / "merged.safetensors"])
    assert again.adapters[0].fact("merged_by") == name
    attached = again.attach(flux)
    attached.set((1.0,))
    torch.testing.assert_close(forward(flux), live, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(live, base, atol=1e-4)


def test_delta_r_needs_one_basis(saved):
    files = [saved("delta_r", 1), saved("delta_r", 2)]
    assert merged(files, "delta_r").pairs.shared
    with pytest.raises(Refused, match="has another basis in each adapter"):
        merged([files[0], saved("lora", 1)], "delta_r")


def test_rules_refuse_what_they_cannot_merge(saved):
    files = [saved("lora", 1), saved("lora", 2)]
    with pytest.raises(Refused, match="merges a style and a content adapter, not 3 adapters"):
        merged([*files, files[0]], "klora")
    with pytest.raises(Refused, match="is dora, which has no low-rank ΔW"):
        merged([files[0], saved("dora", 1)], "ties")
    with pytest.raises(Refused, match="opens its ranks by the timestep"):
        merged([files[0], saved("tlora", 1)], "svd")
    with pytest.raises(Refused, match="is known for SDXL's blocks"):
        merged(files, "blora")


def test_klora_chooses_by_layer_and_timestep(flux, saved, tmp_path):
    files = [saved("lora", 1), saved("lora", 2)]
    options = RuleOptions(top=5, alpha=1.5, beta=0.5)
    mixture = read_mixture(files, merging=Merging(RULES["klora"], options))
    alone = [read_mixture([file]).pairs for file in files]
    # the paper's comparison, written out
    deltas = [{name: p[0][1].delta().double().abs() for name, p in pairs.parts.items()} for pairs in alone]
    gamma = sum(float(d.sum()) for d in deltas[1].values()) / sum(float(d.sum()) for d in deltas[0].values())
    attached = mixture.attach(flux)
    attached.set((0.8, 1.2))
    chosen = set()
    for timestep in (1000.0, 700.0, 350.0, 0.0):
        attached._selection.selection.set(torch.tensor([timestep]))
        progress = 1 - timestep / 1000
        by_name = [dict(sum_.layers()) for _, sum_ in attached._sums]
        for name in deltas[0]:
            tops = [float(d[name].flatten().sort(descending=True).values[:5].sum()) for d in deltas]
            content = tops[1] / gamma > (1.5 * progress + 0.5) * tops[0]
            assert by_name[0][name].multiplier == (0.0 if content else 0.8)
            assert by_name[1][name].multiplier == (1.2 if content else 0.0)
            chosen.add(content)
    assert chosen == {True, False}  # the case tests both
    attached.restore()
    with pytest.raises(Refused, match="chooses an adapter at each step"):
        mixture.save(tmp_path / "merged.safetensors", (1, 1), {})


def test_klora_follows_the_denoisers_own_timestep(flux, saved):
    files = [saved("lora", 1), saved("lora", 2)]
    base = forward(flux)
    attached = merged(files, "klora", beta=0.0, alpha=1e9).attach(flux)  # the style after the first step
    attached.set((1.0, 1.0))
    mixed = forward(flux)
    attached.restore()
    style = read_mixture(files[:1]).attach(flux)
    style.set((1.0,))
    torch.testing.assert_close(mixed, forward(flux), rtol=0, atol=1e-6)
    style.restore()
    assert torch.equal(forward(flux), base)


def test_changeover_orders_layers_by_their_largest_elements():
    assert top_sum(layer(2, 0, 1.0), 3) == pytest.approx(
        float((layer(2, 0, 1.0).delta().abs().flatten().sort(descending=True).values[:3]).sum()), rel=1e-6
    )


def test_ziplora_lowers_its_loss_and_is_saved_exactly(flux, saved, tmp_path):
    files = [saved("lora", 1), saved("lora", 2)]
    mixture = merged(files, "ziplora", steps=30, rate=0.05, penalty=0.01)
    attached = mixture.attach(flux)
    calls = []
    for weights in ((1.0, 0.0), (0.0, 1.0)):
        attached.set(weights)
        with recorded(flux) as answers:
            forward(flux)
        calls.append(answers)
    attached.set((1.0, 1.0))
    losses = attached.learn(flux, calls)
    assert len(losses) == 30 and losses[-1] < 0.9 * losses[0]
    columns = mixture.pairs.columns
    assert columns and all(not torch.allclose(m, torch.ones_like(m)) for ms in columns.values() for m in ms)
    attached.set((1.0, 0.5))
    live = forward(flux)
    for name, made in attached._sums[0][1].layers():
        want = sum(
            w * part.layer.double()
            if False
            else w * part.scale * (part.up.double() @ (part.down * m).double())
            for w, (_, part), m in zip((1.0, 0.5), mixture.pairs.parts[name], columns[name], strict=True)
        )
        assert (made.delta_weight().double() - want).norm() <= 1e-6 * want.norm()
    attached.restore()
    mixture.save(tmp_path / "zip.safetensors", (1.0, 0.5), {})
    again = read_mixture([tmp_path / "zip.safetensors"]).attach(flux)
    again.set((1.0,))
    torch.testing.assert_close(forward(flux), live, rtol=1e-5, atol=1e-5)
    assert load_file(tmp_path / "zip.safetensors")


def test_ziplora_gradient_is_that_of_the_formula(flux, saved):
    """One step of Adam moves each coefficient by its rate, against the sign of a numerical gradient."""
    files = [saved("lora", 1), saved("lora", 2)]
    mixture = merged(files, "ziplora", steps=1, rate=1e-3, penalty=0.0)
    attached = mixture.attach(flux)
    attached.set((1.0, 0.0))
    with recorded(flux) as answers:
        forward(flux)
    attached.learn(flux, [answers, answers])
    name = next(iter(mixture.pairs.columns))
    moved = mixture.pairs.columns[name][1] - 1
    attached.set((1.0, 1.0))

    def loss(k: int, step: float) -> float:
        mixture.pairs.columns = {name: [torch.ones_like(moved), torch.ones_like(moved)]}
        mixture.pairs.columns[name][1][k] += step
        attached.set((1.0, 1.0))
        return 2 * float((forward(flux).double() - answers[0].answer.double()).square().mean())

    slopes = [(loss(k, 0.05) - loss(k, -0.05)) / 0.1 for k in range(len(moved))]
    k = int(np.argmax(np.abs(slopes)))
    assert np.sign(slopes[k]) == -np.sign(float(moved[k])) and abs(float(moved[k])) == pytest.approx(
        1e-3, rel=0.01
    )
    attached.restore()
