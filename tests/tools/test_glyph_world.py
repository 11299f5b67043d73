"""The glyph world: its words and held-out sets, its renderings, the training loop, and the two commands.

Whatever draws needs the font and is skipped without it; nothing here needs a trained model.
"""

from __future__ import annotations

import json
import math
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from tools import make_demo_models, score_pictures
from tools.glyph_world import corpus, draw, report, scorer, world
from tools.glyph_world.training import Plan, at_step, fit
from tools.glyph_world.world import Scene, caption

needs_font = pytest.mark.skipif(not draw.FONT.is_file(), reason=f"no font {draw.FONT}")
EVERY_LOOK = [Scene(content, style, "beach") for content in world.CONTENTS for style in world.STYLES]


# ---------- words


@pytest.mark.parametrize(
    ("scene", "options", "text"),
    [
        (Scene("dog", "mosaic", "beach"), {}, "a dog in mosaic style on a beach"),
        (Scene("apple", "neon", "red"), {}, "an apple in neon style on a red background"),
        (Scene("elephant", "photo", "night"), {}, "a photo of an elephant under a night sky"),
        (Scene("apple", "photo", "snow"), {"trigger": "<c>"}, "a photo of a <c> apple in the snow"),
        (Scene("cat", "sepia", "snow"), {"style": "<s>", "background": False}, "a cat in <s> style"),
    ],
)
def test_caption(scene, options, text):
    assert caption(scene, **options) == text


def test_held_out_pairs_are_not_in_training_scenes():
    seen = world.seen_scenes()
    assert not {s.content for s in seen} & set(world.HELD_CONTENTS)
    assert not {s.style for s in seen} & set(world.HELD_STYLES)
    assert not {(s.content, s.style) for s in seen} & world.HELD_PAIRS
    assert len(set(seen)) == len(seen) == (20 * 8 - 10) * 11
    assert {s.content for s in seen} == set(world.SEEN_CONTENTS)
    assert {s.style for s in seen} == set(world.SEEN_STYLES)


def test_choice_of_held_out_pairs():
    pairs = {(s.content, s.style) for s in world.held_pair_scenes()}
    assert pairs == world.HELD_PAIRS and len(world.held_pair_scenes()) == 10 * 11
    assert {c for c, _ in pairs} <= set(world.SEEN_CONTENTS)
    assert {s for _, s in pairs} == set(world.SEEN_STYLES) - {"photo"}


def test_caption_shares():
    rng, n = np.random.default_rng(0), 20_000
    scene = Scene("dog", "mosaic", "beach")
    told = [world.training_caption(scene, rng) for _ in range(n)]
    words = Counter()
    for text in told:
        words["empty"] += not text
        if text:
            words["trigger"] += not text.startswith("a dog")
            words["style"] += " in mosaic style" not in text
            words["background"] += not text.endswith(" on a beach")
    expected = {"empty": 0.1, "trigger": 0.9 * 0.2, "style": 0.9 * 0.06, "background": 0.9 * 0.15}
    for name, p in expected.items():
        assert words[name] / n == pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) / n)), name


def test_photograph_captions():
    rng = np.random.default_rng(1)
    told = {world.training_caption(Scene("dog", "photo", "snow"), rng) for _ in range(2000)} - {""}
    assert all(text.startswith("a photo of a ") for text in told)


def test_nonsense_words_are_unknown():
    rng = np.random.default_rng(2)
    words = [world.nonsense(rng) for _ in range(20_000)]
    bare = {word.strip("<>") for word in words}
    assert not bare & set(world.WORDS)
    assert {len(word) for word in bare} == {1, 2, 3, 4, 5} and all(word.isalpha() for word in bare)
    assert 0.27 < sum(word.startswith("<") and word.endswith(">") for word in words) / len(words) < 0.33


def test_vocabulary_covers_captions():
    told = " ".join(
        caption(Scene(c, s, b)) for c in world.CONTENTS for s in world.STYLES for b in world.BACKGROUNDS
    )
    assert set(told.split()) <= set(world.WORDS)


# ---------- pictures


@needs_font
@pytest.mark.parametrize("style", world.STYLES)
def test_every_content_renders_in_every_style(style):
    drawn = [draw.render(s, np.random.default_rng(0)) for s in EVERY_LOOK if s.style == style]
    assert len(drawn) == len(world.CONTENTS)
    assert all(p.shape == (64, 64, 3) and p.dtype == np.uint8 and p.std() > 8 for p in drawn)
    assert len({p.tobytes() for p in drawn}) == len(drawn), "two contents look the same"


@needs_font
def test_rendering_depends_on_seed():
    scenes = [Scene("dog", style, place) for style in ("photo", "neon") for place in world.BACKGROUNDS]
    for scene in scenes:
        one, again, other = (draw.render(scene, np.random.default_rng(seed)) for seed in (5, 5, 6))
        assert np.array_equal(one, again) and not np.array_equal(one, other), scene


@needs_font
def test_number_of_processes_keeps_renderings():
    scenes = EVERY_LOOK[:3]
    alone = np.stack([corpus.scene_at(scenes, 9, i) for i in range(5)])
    drawn = corpus.pictures(_three_scenes, 5, 9)
    assert np.array_equal(drawn, alone)
    assert not np.array_equal(drawn[0], drawn[3]), "a scene that comes round again is drawn anew"


def _three_scenes(seed: int, i: int) -> np.ndarray:
    return corpus.scene_at(EVERY_LOOK[:3], seed, i)


def test_autoencoder_glyphs(monkeypatch):
    def glyph(character):
        if character in "\u2600\u26c4":
            raise ValueError("the font has none")

    monkeypatch.setattr(draw, "glyph", glyph)
    listed = corpus.glyphs.__wrapped__()
    known, held = set(world.SEEN_CONTENTS), set(world.HELD_CONTENTS)
    assert {name for name, character in world.CONTENTS.items() if character in listed} == known
    assert len(listed) > 1000 and not {world.CONTENTS[name] for name in held} & set(listed)
    assert not {"\u2600", "\u26c4"} & set(listed), "a glyph that the font lacks"


@needs_font
def test_autoencoder_pictures(monkeypatch):
    """Their seed's own, of glyphs on the list and of seen styles only."""
    some = ("\U0001f680", "\U0001f355", "\u2615")
    allowed, glyph = {*some, *(world.CONTENTS[name] for name in world.SEEN_CONTENTS)}, draw.glyph

    def watched(character):
        assert character in allowed
        return glyph(character)

    monkeypatch.setattr(draw, "glyph", watched)
    monkeypatch.setattr(corpus, "glyphs", lambda: some)
    for style in world.HELD_STYLES:
        monkeypatch.delitem(draw.STYLE, style)
    first, again = ([corpus.anything(3, i) for i in range(24)] for _ in range(2))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert all(p.shape == (64, 64, 3) and p.dtype == np.uint8 for p in first)
    assert len({p.tobytes() for p in first}) == 24


@needs_font
def test_shipped_pictures_equal_renderings(tmp_path, monkeypatch):
    monkeypatch.setattr(make_demo_models, "ROOT", tmp_path)
    made = [f"{path}.png" for path, *_ in make_demo_models.taught_sets()]
    make_demo_models.main(["--parts", "pictures", *folders(tmp_path)])
    for path in made:
        ours, shipped = (
            np.asarray(Image.open(root / path), float) for root in (tmp_path, score_pictures.ROOT)
        )
        assert np.abs(ours - shipped).mean() < 3, "other versions of font and Pillow differ by less"
    for path, *_, words in make_demo_models.taught_sets():
        assert (score_pictures.ROOT / f"{path}.txt").read_text(encoding="utf-8") == words + "\n"


# ---------- training

PLAN = Plan(steps=7, lr=0.05, warmup=2, decay=0.8, seed=3)


def toy():
    """A module with a matrix, a vector and a number that is no float, and its loss at a step."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))

    def loss(step):
        rng, generator = at_step(PLAN.seed, step)
        x = torch.randn(6, 4, generator=generator)
        return {"loss": (model(x) - float(rng.random())).square().mean()}

    return model, loss


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_resume_equals_uninterrupted_training(tmp_path):
    whole, loss = toy()
    facts = fit("toy", PLAN, {"toy": whole}, loss, tmp_path / "whole")
    assert facts["steps"] == 7 and not whole.training
    done = []
    for _ in range(9):  # each call stops after one step; the last two find nothing to do
        model, loss = toy()
        done.append(fit("toy", PLAN, {"toy": model}, loss, tmp_path / "parts", minutes=0)["steps"])
    assert done == [1, 2, 3, 4, 5, 6, 7, 7, 7]
    assert same(model.state_dict(), whole.state_dict())
    kept = [torch.load(tmp_path / name / "toy.pt", weights_only=True) for name in ("whole", "parts")]
    for part in ("model", "averaged"):
        assert same(kept[0][part], kept[1][part])
    assert not same(kept[0]["model"], kept[0]["averaged"])


def test_training_saves_averaged_weights(tmp_path):
    model, loss = toy()
    average, live = model[2].weight.detach().double(), []

    def watched(step):
        live.append(model[2].weight.detach().double().clone())  # before step `step`
        return loss(step)

    fit("toy", PLAN, {"toy": model}, watched, tmp_path)
    live.append(torch.load(tmp_path / "toy.pt", weights_only=True)["model"]["toy.2.weight"].double())
    for step, weight in enumerate(live[1:]):
        decay = min(0.8, (1 + step) / (10 + step))
        average = decay * average + (1 - decay) * weight
    torch.testing.assert_close(model[2].weight.double(), average, rtol=1e-5, atol=1e-6)


def test_training_log(tmp_path):
    model, loss = toy()
    fit("toy", Plan(steps=100, lr=1e-3), {"toy": model}, loss, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "toy.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [100] and 0 < lines[0]["loss"] < 10


def test_cosine_learning_rate():
    plan = Plan(steps=110, lr=1.0, warmup=10, floor=0.1)
    assert [plan.rate(step) for step in (0, 4, 9)] == pytest.approx([0.1, 0.5, 1.0])
    assert plan.rate(10) == pytest.approx(1.0)
    assert plan.rate(60) == pytest.approx((1 + 0.1) / 2)
    assert plan.rate(35) == pytest.approx(0.1 + 0.9 * math.cos(math.pi / 8) ** 2)
    assert plan.rate(110) == plan.rate(500) == pytest.approx(0.1)


def test_random_state_of_step():
    (a, x), (b, y), (c, z) = (at_step(*place) for place in ((1, 2), (1, 2), (1, 3)))
    assert a.random() == b.random() != c.random()
    first, again, other = (torch.rand(1, generator=g).item() for g in (x, y, z))
    assert first == again != other


# ---------- scores


@pytest.mark.parametrize(("k", "n"), [(0, 20), (1, 3), (437, 500), (32, 32)])
def test_wilson_interval(k, n):
    """Its ends are where |p̂ − p| = 1.96 √(p (1 − p) / n), found here by bisection."""
    p = k / n

    def end(inside, outside):
        for _ in range(200):
            middle = (inside + outside) / 2
            near = abs(p - middle) <= 1.96 * math.sqrt(middle * (1 - middle) / n)
            inside, outside = (middle, outside) if near else (inside, middle)
        return inside

    told = report.share(np.arange(n) < k)
    assert told == {"share": round(p, 4), "n": n, "low": told["low"], "high": told["high"]}
    assert told["low"] == pytest.approx(end(p, 0.0), abs=1e-4)
    assert told["high"] == pytest.approx(end(p, 1.0), abs=1e-4)


def test_label_order_of_shipped_scorer():
    """Another order would give its logits other names: the scorer has to be trained anew then."""
    assert " ".join(scorer.LABELS["content"]) == (
        "dog cat horse rabbit elephant bird fish turtle butterfly apple mushroom flower tree cactus house "
        "car boat guitar crown ball poodle fox robot teapot"
    )
    assert " ".join(scorer.LABELS["style"]) == (
        "photo pencil mosaic halftone sepia neon woodcut thermal stained glass blueprint"
    )
    assert " ".join(scorer.LABELS["background"]) == (
        "white red blue green yellow gray beach meadow night snow sunset"
    )


def test_labels_are_logits_in_order():
    names = [f"{kind}: {name}" for kind, labels in scorer.LABELS.items() for name in labels]
    assert list(scorer.LABELS) == ["content", "style", "background"]
    model = scorer.scorer().eval()
    assert [model.config.id2label[i] for i in range(len(names))] == names and len(names) == 45
    heads = scorer.heads(torch.arange(45.0)[None])
    assert [int(v) for part in heads.values() for v in part[0]] == list(range(45))
    assert [part.shape[1] for part in heads.values()] == [24, 10, 11]
    with torch.no_grad():
        assert model(torch.zeros(2, 3, 64, 64)).logits.shape == (2, 45)


def test_scorer_accuracy():
    scenes = EVERY_LOOK[::7]
    right = scorer.answers(scenes)
    for kind, labels in scorer.LABELS.items():
        assert [labels[i] for i in right[kind]] == [getattr(scene, kind) for scene in scenes]
    logits = torch.cat([nn.functional.one_hot(right[k], len(v)) for k, v in scorer.LABELS.items()], 1) * 9.0

    class Oracle(nn.Linear):
        def forward(self, x):
            return type("Output", (), {"logits": logits[: len(x)]})

    blank = np.zeros((len(scenes), 64, 64, 3), np.uint8)
    assert all(values.all() for values in scorer.score(Oracle(1, 1), blank, scenes).values())
    shifted = scorer.score(Oracle(1, 1), blank, [Scene("fox", "blueprint", "snow")] * len(scenes))
    assert shifted["background"].sum() == 0 and shifted["style"].sum() < len(scenes)
    sure = scorer.read(Oracle(1, 1), blank)["style"][1]
    assert sure == pytest.approx(math.exp(9) / (math.exp(9) + 9))


def test_sheet_order():
    drawn = np.arange(7, dtype=np.uint8)[:, None, None, None] + np.zeros((7, 64, 64, 3), np.uint8)
    grid = report.sheet(drawn, columns=3)
    assert grid[::64, ::64, 0].tolist() == [[0, 1, 2], [3, 4, 5]]  # the incomplete row is left out


# ---------- the commands


def folders(path):
    return ["--work", str(path / "work"), "--out", str(path / "out"), "--device", "cpu"]


@pytest.fixture
def font(tmp_path, monkeypatch):
    """A stand-in for the font's file, for errors that come before anything is drawn."""
    (tmp_path / "font.ttf").touch()
    monkeypatch.setattr(draw, "FONT", tmp_path / "font.ttf")


def refused(main, arguments) -> str:
    with pytest.raises(SystemExit) as told:
        main(arguments)
    text = str(told.value)
    assert text.startswith("error: ") and "\n" not in text
    return text


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--parts", "flx"], r"--parts 'flx' is unknown (did you mean 'flux'?); choose from pictures"),
        (["--parts", ""], r"--parts '' is unknown; choose from pictures"),
        (["--minutes", "0"], "--minutes 0 leaves no time"),
        (["--minutes", "-3"], "--minutes -3 leaves no time"),
        (["--minutes", "nan"], "--minutes nan leaves no time"),
        (["--device", "abacus"], "--device abacus cannot be used"),
        (["--parts", "flux"], "has none; make it with --parts vae"),
        (["--parts", "sd15, sdxl"], "has none; make it with --parts vae"),
        (["--parts", "report"], "the report needs the scorer"),
    ],
)
def test_model_making_errors(arguments, said, tmp_path, font):
    assert said in refused(make_demo_models.main, [*folders(tmp_path), *arguments])


def test_report_needs_model(tmp_path):
    (tmp_path / "out" / "scorer").mkdir(parents=True)
    (tmp_path / "out" / "scorer" / "config.json").touch()
    told = refused(make_demo_models.main, ["--parts", "report", *folders(tmp_path)])
    assert f"no model to report on in {tmp_path / 'out'}; make one with --parts flux" in told


def test_missing_font_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(draw, "FONT", tmp_path / "none.ttf")
    told = refused(make_demo_models.main, ["--parts", "pictures", *folders(tmp_path)])
    assert str(tmp_path / "none.ttf") in told and "GLYPH_WORLD_FONT" in told
    assert not (tmp_path / "work").exists()


def test_unfinished_training_is_refused(tmp_path, font, monkeypatch):
    short = Plan(steps=5, lr=1e-3)
    monkeypatch.setattr(scorer, "PLAN", short)
    monkeypatch.setattr(scorer, "BATCH", 2)
    (tmp_path / "work").mkdir()
    np.save(tmp_path / "work" / "every.npy", np.zeros((1, 64, 64, 3), np.uint8))
    monkeypatch.setattr(make_demo_models, "EVERY", make_demo_models.EVERY[:1])
    command = ["--parts", "scorer", "--minutes", "1e-9", *folders(tmp_path)]
    for steps in (1, 2):
        with pytest.raises(SystemExit) as told:
            make_demo_models.main(command)
        text = str(told.value)
        assert (
            f"scorer was stopped after {steps} of 5 steps" in text and "repeat the command to resume" in text
        )
    assert not (tmp_path / "out" / "scorer").exists() and not (tmp_path / "work" / "scorer.json").exists()


def test_report_without_work_folder(tmp_path):
    shop = make_demo_models.Workshop(tmp_path / "work", tmp_path, "cpu", None)
    assert shop.load_facts("flux") == {}
    kept = {"vae": {"psnr seen": 30}, "flux": {"shares": {}, "training": {"pretraining": {"steps": 3}}}}
    (tmp_path / "metrics.json").write_text(json.dumps(kept))
    assert shop.load_facts("vae") == kept["vae"]
    assert shop.load_facts("flux") == {"pretraining": {"steps": 3}}
    (tmp_path / "work").mkdir()
    shop.save_facts("flux", {"pretraining": {"steps": 4}})
    assert shop.load_facts("flux") == {"pretraining": {"steps": 4}}


def blank(path):
    path.parent.mkdir(exist_ok=True)
    Image.new("RGB", (64, 64)).save(path)
    return path


def test_grid_table(tmp_path, monkeypatch, capsys):
    for a in ("0.50", "1.00"):
        for b in ("0.50", "10.00"):
            blank(tmp_path / "grid" / f"inference_s{a}_c{b}.png")
    blank(tmp_path / "grid" / "sheet.png")
    single = blank(tmp_path / "single.png")

    def read_pictures(paths, folder):
        answers = {"inference_s1.00_c10.00.png": ("poodle", "stained glass")}
        found = [answers.get(path.name, ("dog", "photo")) for path in paths]
        return [{"content": (c, 0.875), "style": (s, 0.5), "background": ("snow", 1)} for c, s in found]

    monkeypatch.setattr(score_pictures, "read_pictures", read_pictures)
    wanted = ["--content", "poodle", "--style", "stained glass"]
    score_pictures.main([str(tmp_path / "grid"), str(single), *wanted])
    assert capsys.readouterr().out.splitlines() == [
        f"{single}: dog 0.88, photo 0.50",
        "           content 0.5           content 10",
        "style 0.5  dog 0.88, photo 0.50  dog 0.88, photo 0.50",
        "style 1    dog 0.88, photo 0.50  poodle 0.88, stained glass 0.50",
        "1 of 5 pictures show poodle and stained glass",
    ]


def test_sheet_cell_without_picture():
    one = {"content": ("dog", 1.0), "style": ("photo", 1.0)}
    lines = score_pictures.table({(0, 0): [one], (1, 1): [one]}).splitlines()
    assert [line.count("dog") for line in lines] == [0, 1, 1]


def test_scoring_errors(tmp_path, monkeypatch):
    monkeypatch.setattr(scorer, "load", lambda folder: None)
    (tmp_path / "config.json").touch()  # a scorer's folder, for the check
    picture = blank(tmp_path / "good.png")
    (tmp_path / "empty").mkdir()
    blank(tmp_path / "sheets" / "sheet.png")
    broken = tmp_path / "broken.png"
    broken.write_bytes(picture.read_bytes()[:40])
    text = tmp_path / "text.png"
    text.write_text("no picture")

    def told(*arguments):
        return refused(score_pictures.main, [*map(str, arguments), "--scorer", str(tmp_path)])

    for folder in ("empty", "sheets", "nowhere", "nothing.png"):
        assert f"there is no picture in {tmp_path / folder}" in told(picture, tmp_path / folder)
    for path in (broken, text):
        assert f"{path} cannot be read as a picture" in told(picture, path)
    assert "--content 'podle' is unknown (did you mean 'poodle'?)" in told(picture, "--content", "podle")
    assert "--style 'oil' is unknown; choose from photo" in told(picture, "--style", "oil")
    missing = ["--scorer", str(tmp_path / "empty")]
    assert "has no config.json" in refused(score_pictures.main, [str(picture), *missing])
