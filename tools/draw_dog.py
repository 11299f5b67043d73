"""The content picture: a white poodle with a red collar, sitting in a meadow."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

from draw_shapes import SCALE, SIZE, Colour, Point, band, ellipse, reduced, smooth, tone
from PIL import Image, ImageChops, ImageDraw, ImageFilter


class Fur:
    """Curls of fur on a photograph-like canvas, lit from the upper left."""

    LIGHT = (-0.5, -0.62, 0.6)

    def __init__(self, canvas: Image.Image, seed: int):
        self.canvas = canvas
        self.rng = random.Random(seed)
        self.curls = [self._curl(kind) for kind in range(6)]

    def _curl(self, kind: int) -> tuple[Image.Image, Image.Image]:
        """A small ball of wool: how bright each of its points is, and how opaque."""
        side, rng = 64, random.Random(kind)
        bright, cover = Image.new("L", (side, side)), Image.new("L", (side, side))
        phase, winding = rng.uniform(0, 2 * math.pi), rng.choice((-1, 1)) * rng.uniform(3.0, 4.5)
        for j in range(side):
            for i in range(side):
                u, v = (i + 0.5) / side * 2 - 1, (j + 0.5) / side * 2 - 1
                radius = math.hypot(u, v)
                if radius >= 1:
                    continue
                z = math.sqrt(1 - radius * radius)
                light = u * self.LIGHT[0] + v * self.LIGHT[1] + z * self.LIGHT[2]
                strand = math.sin(round(winding) * math.atan2(v, u) + 9 * radius + phase)
                bright.putpixel((i, j), round(max(0, min(255, 150 + 84 * light + 13 * strand))))
                cover.putpixel((i, j), round(255 * min(1.0, (1 - radius) * 3.2)))
        return bright, cover

    def puff(self, x: float, y: float, radius: float, light: float, dark: Colour, pale: Colour) -> None:
        """One curl at (x, y); `light` from 0 (in the shade) to 1 (in the sun)."""
        bright, cover = self.curls[self.rng.randrange(len(self.curls))]
        size = max(3, round(2 * radius * SCALE))
        bright, cover = bright.resize((size, size)), cover.resize((size, size))
        factor = 0.46 + 0.68 * light
        shade = Image.eval(bright, lambda v: min(255, round(v * factor)))
        ball = Image.merge(
            "RGB",
            [
                Image.eval(shade, lambda v, a=a, b=b: a + (b - a) * v // 255)
                for a, b in zip(dark, pale, strict=True)
            ],
        )
        self.canvas.paste(ball, (round((x - radius) * SCALE), round((y - radius) * SCALE)), cover)

    def ball(
        self,
        x: float,
        y: float,
        rx: float,
        ry: float,
        curl: float,
        turn: float = 0.0,
        shade: float = 0.0,
        dark: Colour = (92, 94, 124),
        pale: Colour = (255, 252, 242),
    ) -> None:
        """A rounded body of fur: curls from the far edge to the near middle, each lit by where it sits."""
        count = round(rx * ry / (curl * curl) * 5.5)
        c, s = math.cos(math.radians(turn)), math.sin(math.radians(turn))
        places = []
        for _ in range(count):
            radius, angle = math.sqrt(self.rng.random()), self.rng.uniform(0, 2 * math.pi)
            places.append((radius, angle))
        for radius, angle in sorted(places, reverse=True):
            u, v = radius * math.cos(angle), radius * math.sin(angle)
            z = math.sqrt(max(0.0, 1 - radius * radius))
            px, py = x + rx * u * c - ry * v * s, y + rx * u * s + ry * v * c
            nu, nv = u * c - v * s, u * s + v * c
            light = nu * self.LIGHT[0] + nv * self.LIGHT[1] + z * self.LIGHT[2]
            light = max(0.0, min(1.0, 0.42 + 0.62 * light - shade))
            self.puff(px, py, curl * self.rng.uniform(0.75, 1.25), light, dark, pale)


def meadow(rng: random.Random) -> Image.Image:
    """Evening sky, trees far out of focus, and grass that grows sharper towards us."""
    side = SIZE * SCALE
    fade = Image.linear_gradient("L").resize((side, side))
    sky = Image.composite(
        Image.new("RGB", (side, side), (255, 232, 184)),
        Image.new("RGB", (side, side), (96, 168, 228)),
        Image.eval(fade, lambda v: min(255, v * 3)),
    )
    pen = ImageDraw.Draw(sky)

    def blob(x: float, y: float, r: float, colour: Colour) -> None:
        pen.ellipse(((x - r) * SCALE, (y - r) * SCALE, (x + r) * SCALE, (y + r) * SCALE), fill=colour)

    for _ in range(90):
        x, y = rng.uniform(-20, 532), rng.uniform(170, 290)
        blob(x, y + 14 * math.sin(x / 60), rng.uniform(22, 46), tone((78, 128, 66), rng.uniform(0.6, 1.25)))
    pen.rectangle((0, 290 * SCALE, side, side), fill=(112, 164, 62))
    for _ in range(260):
        blob(
            rng.uniform(-10, 522),
            rng.uniform(286, 400),
            rng.uniform(10, 30),
            tone((124, 172, 66), rng.uniform(0.78, 1.22)),
        )
    sky = sky.filter(ImageFilter.GaussianBlur(11 * SCALE))
    lights = Image.new("RGB", (side, side))
    pen = ImageDraw.Draw(lights)
    for _ in range(34):
        blob(
            rng.uniform(0, 512),
            rng.uniform(120, 300),
            rng.uniform(7, 17),
            tone((120, 112, 66), rng.uniform(0.3, 0.8)),
        )
    sky = ImageChops.screen(sky, lights.filter(ImageFilter.GaussianBlur(1.6 * SCALE)))
    return grass(sky, rng, 330, 440, 1500, 2.2)


def grass(
    canvas: Image.Image, rng: random.Random, top: float, bottom: float, count: int, blur: float
) -> Image.Image:
    """`count` blades rooted between two heights, the nearest last, and a few daisies among them."""
    layer = canvas.copy()
    pen = ImageDraw.Draw(layer)
    roots = sorted((rng.uniform(top, bottom), rng.uniform(-20, 532)) for _ in range(count))
    for y, x in roots:
        near = (y - 300) / 212
        height, lean = rng.uniform(10, 26) * (0.5 + near), rng.gauss(0, 5) * (0.5 + near)
        colour = tone((104, 160, 52), rng.uniform(0.5, 1.25))
        colour = (min(255, colour[0] + rng.randint(0, 34)), colour[1], colour[2])
        curve = smooth(
            [(x, y + 8), (x + lean * 0.3, y - height * 0.5), (x + lean, y - height)], closed=False, samples=5
        )
        blade = band(curve, [1.5 * (0.5 + near), 1.2 * (0.5 + near), 0.2])
        pen.polygon([(px * SCALE, py * SCALE) for px, py in blade], fill=colour)
    for _ in range(count // 60):
        x, y, r = rng.uniform(0, 512), rng.uniform(top, bottom) - 22, rng.uniform(2.2, 3.2)
        for k in range(9):
            a = math.radians(40 * k)
            petal = ellipse(x + 1.6 * r * math.cos(a), y + 1.2 * r * math.sin(a), r, 0.55 * r, 40 * k)
            pen.polygon([(px * SCALE, py * SCALE) for px, py in petal], fill=(250, 250, 255))
        pen.polygon(
            [(px * SCALE, py * SCALE) for px, py in ellipse(x, y, 0.8 * r, 0.7 * r)], fill=(250, 204, 40)
        )
    return layer.filter(ImageFilter.GaussianBlur(blur * SCALE)) if blur else layer


def dog() -> Image.Image:
    """A white poodle with a red collar, sitting in a meadow."""
    rng = random.Random(11)
    canvas = meadow(rng)
    under = Image.new("L", canvas.size)
    ImageDraw.Draw(under).ellipse((118 * SCALE, 436 * SCALE, 420 * SCALE, 500 * SCALE), fill=150)
    canvas.paste((36, 62, 24), mask=under.filter(ImageFilter.GaussianBlur(12 * SCALE)))
    fur = Fur(canvas, seed=3)

    def soft(points: Sequence[Point], colour: Colour, blur: float = 0.6, strength: int = 255) -> None:
        mask = Image.new("L", canvas.size)
        ImageDraw.Draw(mask).polygon([(x * SCALE, y * SCALE) for x, y in points], fill=strength)
        canvas.paste(colour, mask=mask.filter(ImageFilter.GaussianBlur(blur * SCALE)))

    # tail, haunches, trunk, forelegs
    fur.ball(372, 386, 16, 30, 8, turn=38)
    fur.ball(396, 352, 30, 30, 9)
    for x, turn in ((176, 16), (336, -16)):
        fur.ball(x, 430, 44, 50, 10, turn=turn, shade=0.12)
    fur.ball(256, 372, 84, 104, 11, shade=0.14)
    fur.ball(256, 344, 62, 70, 11, shade=0.02)
    for x in (222, 290):
        fur.ball(x, 420, 25, 56, 9, shade=0.08)
        fur.ball(x, 470, 31, 24, 9)
    # collar, half sunk into the fur
    collar = smooth([(196, 290), (226, 308), (256, 314), (286, 308), (316, 290)], closed=False)
    soft([(x, y + 5) for x, y in band(collar, [9, 11, 9])], (70, 60, 74), 4, 150)
    soft(band(collar, [8, 9, 8]), (206, 22, 34))
    soft([(x, y - 3) for x, y in band(collar, [1.5, 2, 1.5])], (255, 120, 120), 1.2, 170)
    soft(ellipse(256, 334, 13, 13), (150, 98, 20), 0.8)
    soft(ellipse(256, 333, 11.5, 11.5), (244, 190, 60), 0.6)
    soft(ellipse(252, 329, 4, 3), (255, 244, 196), 1.2)
    for x in (200, 312):
        fur.ball(x, 300, 15, 18, 7, shade=0.1)
    # ears behind the cheeks, head, topknot
    for x, turn in ((160, 12), (352, -12)):
        fur.ball(x, 216, 36, 74, 10, turn=turn, shade=0.2 if x > 256 else 0.1)
    fur.ball(256, 206, 90, 86, 11, shade=0.04)
    fur.ball(256, 118, 76, 56, 11)
    for x, turn in ((152, 10), (360, -10)):
        fur.ball(x, 226, 31, 66, 10, turn=turn, shade=0.14 if x > 256 else 0.04)
    # muzzle
    fur.ball(256, 268, 44, 30, 8, shade=0.16)
    soft(smooth([(238, 278), (256, 282), (274, 278), (270, 302), (256, 310), (242, 302)]), (120, 40, 48), 1.2)
    soft(
        smooth([(243, 284), (256, 288), (269, 284), (267, 300), (256, 307), (245, 300)]), (240, 120, 136), 1.0
    )
    soft([(255.3, 288), (256.7, 288), (256.5, 302), (255.5, 302)], (200, 80, 100), 0.8)
    for x in (232, 280):
        fur.ball(x, 258, 32, 24, 8)
    fur.ball(256, 222, 22, 26, 8)
    soft(smooth([(256, 262), (234, 250), (230, 234), (256, 226), (282, 234), (278, 250)]), (26, 22, 26), 0.9)
    soft(ellipse(246, 234, 8, 3.5, -14), (170, 170, 186), 2.0, 190)
    for x in (246, 266):
        soft(ellipse(x, 248, 4, 2.6), (4, 4, 6), 0.8)
    soft([(254.8, 260), (257.2, 260), (257, 276), (255, 276)], (52, 40, 46), 0.7)
    # eyes
    for x in (214, 298):
        soft(ellipse(x, 200, 19, 18), (150, 140, 150), 5, 150)
        soft(ellipse(x, 200, 15, 15.5), (20, 14, 14), 0.8)
        soft(ellipse(x, 203, 11, 10), (84, 46, 22), 2.2)
        soft(ellipse(x, 200, 7.5, 8), (8, 6, 8), 1)
        soft(ellipse(x - 5, 194, 4.4, 4.4), (255, 255, 255), 0.5)
        soft(ellipse(x + 5, 207, 2.2, 1.8), (230, 220, 210), 0.7, 200)
        fur.ball(x, 176, 22, 8, 6)
    canvas = grass(canvas, rng, 476, 530, 900, 0)
    return reduced(canvas)
