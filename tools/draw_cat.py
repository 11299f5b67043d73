"""The style picture: an orange tabby before the sun, in leaded glass."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

from draw_shapes import (
    SCALE,
    SIZE,
    Colour,
    Point,
    band,
    cloudy,
    ellipse,
    mirror,
    reduced,
    sector,
    smooth,
    tone,
)
from PIL import Image, ImageChops, ImageDraw, ImageFilter

RUBY, AMBER, GOLD, CREAM = (176, 22, 44), (250, 164, 34), (255, 208, 84), (255, 238, 198)
ORANGE, RUST, ROSE = (238, 116, 22), (158, 56, 14), (238, 112, 132)
SKY, COBALT, INDIGO, TEAL = (70, 158, 226), (24, 84, 190), (44, 40, 138), (18, 140, 150)
EMERALD, LEAF, MOSS = (16, 122, 72), (96, 172, 52), (8, 84, 62)


class Window:
    """A pane of leaded glass: coloured cells, and the lead between them."""

    def __init__(self, seed: int):
        self.rng = random.Random(seed)
        self.glass = Image.new("RGB", (SIZE * SCALE, SIZE * SCALE))
        self.lead = Image.new("L", self.glass.size)
        self.glow = Image.eval(Image.radial_gradient("L"), lambda d: 255 - d)  # 255 in the middle

    def mask(self, points: Sequence[Point]) -> Image.Image:
        mask = Image.new("L", self.glass.size)
        ImageDraw.Draw(mask).polygon([(x * SCALE, y * SCALE) for x, y in points], fill=255)
        return mask

    def cell(
        self, points: Sequence[Point], colour: Colour, within: Image.Image | None = None, lead: float = 3.0
    ):
        """Set one piece of glass, brighter in its middle, with lead around it; cut to the mask `within`."""
        mask = self.mask(points)
        if within is not None:
            mask = ImageChops.multiply(mask, within)
        box = mask.getbbox()
        if box is None:
            return
        size = (box[2] - box[0], box[3] - box[1])
        shade = tone(colour, self.rng.uniform(0.86, 1.08))
        fill = Image.composite(
            Image.new("RGB", size, tone(shade, 1.22)),
            Image.new("RGB", size, tone(shade, 0.72)),
            self.glow.resize(size, Image.Resampling.BICUBIC),
        )
        self.glass.paste(fill, box[:2], mask.crop(box))
        self.lead.paste(0, box, mask.crop(box))  # what lies behind this piece has no lead in front of it
        self.line([*points, points[0]], lead, within)

    def line(self, points: Sequence[Point], width: float, within: Image.Image | None = None):
        """Lead along `points`."""
        stroke = Image.new("L", self.glass.size)
        pen, radius = ImageDraw.Draw(stroke), width * SCALE / 2
        scaled = [(x * SCALE, y * SCALE) for x, y in points]
        pen.line(scaled, fill=255, width=round(2 * radius))
        for x, y in scaled:
            pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)
        if within is not None:
            stroke = ImageChops.multiply(stroke, within)
        self.lead = ImageChops.lighter(self.lead, stroke)

    def picture(self, gleams: Sequence[Sequence[Point]]) -> Image.Image:
        """The window against the light: streaks in the glass, rounded lead, `gleams` painted white on top."""
        streaks = ImageChops.multiply(
            cloudy(self.rng, 80, 206, 255, stretch=5), cloudy(self.rng, 12, 214, 255)
        )
        glass = ImageChops.multiply(self.glass, Image.merge("RGB", [streaks] * 3))
        bubbles = Image.eval(cloudy(self.rng, 110, 0, 255), lambda v: max(0, v - 222))
        glass = ImageChops.add(glass, Image.merge("RGB", [bubbles] * 3))
        glass = Image.eval(glass, lambda v: min(255, round(v * 1.16)))
        bloom = glass.filter(ImageFilter.GaussianBlur(9 * SCALE))
        glass = ImageChops.screen(glass, Image.eval(bloom, lambda v: v // 3))
        # Lead is a rounded bar: lighter where its surface faces the upper left.
        round_bar = self.lead.filter(ImageFilter.GaussianBlur(1.1 * SCALE))
        facing = ImageChops.subtract(
            round_bar, ImageChops.offset(round_bar, -SCALE, -SCALE), scale=1, offset=48
        )
        metal = Image.merge(
            "RGB", [Image.eval(facing, lambda v, d=d: min(150, max(8, v - d))) for d in (14, 16, 8)]
        )
        whole = Image.composite(metal, glass, self.lead.filter(ImageFilter.GaussianBlur(0.35 * SCALE)))
        for gleam in gleams:
            whole.paste((250, 252, 255), mask=self.mask(gleam))
        return reduced(whole)


def background(window: Window) -> None:
    """Sun behind the head, sky in rays, hills, and a border of small panes."""
    x, y = 256.0, 206.0
    for ring, (inner, outer, turn) in enumerate([(252, 460, 0.0), (184, 252, 9.0)]):
        for k in range(20):
            colours = [(COBALT, SKY, INDIGO, COBALT), (SKY, TEAL, COBALT, (120, 190, 236))][ring]
            start = turn + 18 * k
            window.cell(sector(x, y, inner, outer, start, start + 18), colours[(k * 3 + ring) % 4])
    for k in range(20):
        window.cell(sector(x, y, 60, 184, 18 * k, 18 * k + 18), (GOLD, AMBER)[k % 2])
    hills = [
        ([(0, 396), (70, 372), (150, 392), (230, 430), (256, 530), (0, 530)], EMERALD),
        ([(512, 380), (440, 368), (360, 392), (280, 430), (256, 530), (512, 530)], MOSS),
        ([(0, 440), (80, 430), (170, 448), (240, 480), (200, 530), (0, 530)], LEAF),
        ([(512, 436), (430, 424), (350, 446), (270, 478), (310, 530), (512, 530)], EMERALD),
        ([(120, 530), (170, 474), (256, 462), (342, 474), (392, 530)], LEAF),
    ]
    for points, colour in hills:
        window.cell(smooth(points), colour)
    for flower_x, flower_y, colour in [(64, 424, RUBY), (110, 466, GOLD), (476, 466, RUBY)]:
        for k in range(5):
            a = math.radians(72 * k - 90)
            window.cell(
                ellipse(flower_x + 11 * math.cos(a), flower_y + 11 * math.sin(a), 8, 8), colour, lead=2
            )
        window.cell(ellipse(flower_x, flower_y, 5.5, 5.5), CREAM, lead=2)


def border(window: Window) -> None:
    edge, pane = 18, 34
    for k in range(14):
        a, b = edge + pane * k, edge + pane * (k + 1)
        colour = (RUBY, INDIGO)[k % 2]
        for points in ([(a, 0), (b, 0), (b, edge), (a, edge)], [(0, a), (edge, a), (edge, b), (0, b)]):
            window.cell(points, colour, lead=4)
            window.cell([(SIZE - px, SIZE - py) for px, py in points], colour, lead=4)
    for cx, cy in ((0, 0), (SIZE - edge, 0), (0, SIZE - edge), (SIZE - edge, SIZE - edge)):
        window.cell([(cx, cy), (cx + edge, cy), (cx + edge, cy + edge), (cx, cy + edge)], GOLD, lead=4)


def cat_body(window: Window) -> None:
    spine = smooth([(322, 452), (392, 462), (438, 424), (434, 362), (404, 322), (414, 276)], closed=False)
    outline = band(spine, [22, 24, 23, 21, 19, 6])
    tail = window.mask(outline)
    for k in range(7):
        part = spine[k * len(spine) // 7 : (k + 1) * len(spine) // 7 + 1]
        window.cell(band(part, [30, 30]), CREAM if k == 6 else (ORANGE, RUST)[k % 2], tail)
    window.line([*outline, outline[0]], 5)

    outline = smooth(
        [
            (256, 262),
            (318, 284),
            (350, 350),
            (374, 424),
            (352, 476),
            (256, 484),
            (160, 476),
            (138, 424),
            (162, 350),
            (194, 284),
        ]
    )
    body = window.mask(outline)
    window.cell(outline, ORANGE)
    for side in (lambda p: p, mirror):
        for points in (
            [(120, 360), (168, 352), (206, 366), (170, 376), (130, 388)],
            [(110, 404), (160, 396), (204, 404), (164, 418), (110, 428)],
            [(120, 446), (160, 438), (196, 442), (160, 456), (120, 466)],
        ):
            window.cell(side(smooth(points)), RUST, body)
        haunch = smooth([(136, 440), (164, 402), (206, 424), (214, 470), (180, 490), (140, 482)])
        window.cell(side(haunch), tone(ORANGE, 0.92), body)
    window.cell(smooth([(256, 290), (300, 310), (296, 370), (256, 420), (216, 370), (212, 310)]), CREAM, body)
    window.line([(256, 330), (256, 420)], 3, body)
    for side in (lambda p: p, mirror):
        leg = smooth([(214, 350), (248, 376), (252, 430), (252, 468), (212, 470), (208, 420)])
        window.cell(side(leg), ORANGE, body)
        window.cell(
            side([(200, 404), (256, 398), (256, 412), (200, 418)]), RUST, window.mask(side(leg)), lead=2.5
        )
    window.line([*outline, outline[0]], 5)
    for side in (lambda p: p, mirror):
        paw = smooth([(202, 470), (216, 452), (242, 454), (254, 472), (246, 490), (212, 490)])
        window.cell(side(paw), CREAM, lead=4)
        for toe in (220, 234):
            window.line(side([(toe, 474), (toe, 488)]), 2.5)


def cat_head(window: Window) -> None:
    for side in (lambda p: p, mirror):
        ear = [(146, 196), (142, 150), (150, 58), (168, 62), (214, 98), (252, 134)]
        window.cell(side(smooth(ear)), ORANGE, lead=5)
        window.cell(side(smooth([(168, 160), (164, 128), (167, 92), (194, 112), (222, 138)])), ROSE, lead=3)
    outline = smooth(
        [
            (256, 116),
            (312, 122),
            (356, 158),
            (376, 212),
            (384, 252),
            (352, 290),
            (304, 316),
            (256, 324),
            (208, 316),
            (160, 290),
            (128, 252),
            (136, 212),
            (156, 158),
            (200, 122),
        ]
    )
    head = window.mask(outline)
    window.cell(outline, ORANGE)
    window.cell([(226, 90), (286, 90), (278, 200), (270, 246), (242, 246), (234, 200)], AMBER, head)
    window.cell([(247, 90), (265, 90), (261, 168), (256, 184), (251, 168)], RUST, head)
    for side in (lambda p: p, mirror):
        window.cell(side(smooth([(206, 100), (224, 104), (234, 140), (236, 172), (222, 150)])), RUST, head)
        window.cell(
            side(smooth([(150, 150), (176, 134), (204, 150), (214, 168), (180, 162)])),
            tone(ORANGE, 0.86),
            head,
        )
        for points in (
            [(110, 204), (150, 212), (178, 232), (146, 228), (110, 226)],
            [(110, 246), (150, 244), (182, 254), (150, 260), (116, 272)],
        ):
            window.cell(side(smooth(points)), RUST, head)
        cheek = smooth([(176, 248), (214, 236), (240, 262), (216, 300), (196, 330), (130, 300), (150, 278)])
        window.cell(side(cheek), GOLD, head)
    window.cell(smooth([(228, 290), (256, 284), (284, 290), (282, 322), (256, 336), (230, 322)]), CREAM, head)
    for side in (lambda p: p, mirror):
        window.cell(
            side(smooth([(256, 250), (222, 246), (202, 266), (212, 292), (240, 298), (256, 286)])),
            CREAM,
            head,
        )
    window.cell(
        smooth([(256, 266), (238, 254), (234, 244), (256, 240), (278, 244), (274, 254)]), ROSE, lead=3.5
    )
    window.line([(256, 266), (256, 284)], 3)
    window.line([*outline, outline[0]], 5)
    for side in (lambda p: p, mirror):
        almond = smooth([(172, 196), (186, 180), (208, 176), (228, 190), (236, 214), (214, 224), (188, 218)])
        window.cell(side(almond), (150, 214, 40), lead=4)
        eye = window.mask(side(almond))
        window.cell(side(ellipse(207, 200, 19, 25)), (34, 168, 84), eye, lead=2)
        window.cell(side(ellipse(207, 200, 8.5, 23)), (14, 10, 20), eye, lead=1)
        for start, end in (((206, 268), (92, 248)), ((204, 276), (88, 278)), ((208, 284), (98, 308))):
            bend = ((start[0] + end[0]) / 2, (start[1] + end[1]) / 2 - 8)
            window.line(side(smooth([start, bend, end], closed=False)), 1.8)
        for x, y in ((226, 268), (218, 278), (232, 280)):
            window.line(side([(x, y), (x, y)]), 3)


def cat() -> Image.Image:
    """An orange tabby before the sun, in leaded glass."""
    window = Window(seed=7)
    background(window)
    cat_body(window)
    cat_head(window)
    border(window)
    gleams = [
        ellipse(x, y, rx, ry)
        for eye in (207, 305)
        for x, y, rx, ry in ((eye - 5, 190, 5.2, 6.2), (eye + 6, 210, 2.2, 2.6))
    ]
    return window.picture(gleams)
