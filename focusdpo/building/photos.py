"""Subjects cut from the free photographs that come with scikit-image.

The outlines were traced by hand on the photographs, in pixels (x, y).
"""

from __future__ import annotations

import colorsys
from dataclasses import dataclass
from functools import cache

import numpy as np
import skimage.data
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

Points = list[tuple[int, int]]

ASTRONAUT: Points = [
    (40, 512), (30, 470), (22, 430), (28, 380), (38, 300), (50, 270), (75, 240), (110, 212), (118, 190), (130, 165),
    (150, 152), (178, 150), (172, 130), (158, 115), (153, 85), (160, 55), (185, 35), (215, 18), (255, 18), (285, 35),
    (300, 65), (300, 95), (292, 120), (275, 135), (262, 160), (258, 175), (285, 195), (300, 220), (306, 240), (330, 255),
    (345, 280), (355, 310), (365, 348), (330, 360), (300, 385), (285, 420), (278, 460), (280, 512),
]  # fmt: skip
SHUTTLE: Points = [
    (400, 0), (430, 0), (440, 40), (450, 38), (455, 60), (455, 190), (458, 230), (440, 240), (457, 270), (470, 278),
    (368, 276), (378, 235), (355, 225), (355, 215), (378, 185), (379, 100), (380, 50), (388, 40), (394, 48), (396, 12),
]  # fmt: skip
CAT: Points = [
    (35, 60), (45, 20), (60, 0), (395, 0), (385, 25), (358, 65), (358, 110), (363, 140), (345, 185), (330, 220), (300, 265),
    (260, 285), (200, 300), (25, 300), (15, 220), (30, 120),
]  # fmt: skip
CUP: Points = [
    (173, 95), (178, 65), (205, 35), (245, 20), (290, 18), (340, 28), (380, 55), (403, 90), (404, 120), (395, 175),
    (380, 215), (350, 240), (330, 270), (300, 285), (270, 284), (250, 280), (240, 300), (220, 308), (200, 298), (195, 280),
    (205, 250), (215, 235), (195, 215), (182, 180), (174, 140),
]  # fmt: skip
MOTORCYCLE: Points = [
    (97, 195), (135, 190), (145, 150), (165, 160), (235, 165), (280, 190), (350, 190), (420, 160), (440, 150), (480, 125),
    (490, 85), (510, 90), (540, 105), (560, 120), (582, 130), (575, 145), (560, 185), (548, 200), (570, 260), (600, 270),
    (640, 300), (645, 312), (670, 350), (682, 400), (670, 440), (645, 450), (610, 445), (570, 425), (535, 385), (515, 340),
    (510, 310), (480, 300), (475, 340), (440, 375), (350, 365), (345, 430), (325, 435), (325, 380), (270, 360), (230, 395),
    (190, 402), (150, 385), (125, 340), (125, 300), (135, 260), (150, 245), (105, 245),
]  # fmt: skip
PHOTOGRAPHER: Points = [
    (0, 245), (20, 215), (50, 190), (65, 150), (100, 128), (130, 122), (150, 108), (163, 105), (165, 85), (180, 70),
    (205, 63), (235, 72), (258, 92), (270, 112), (268, 130), (255, 140), (252, 165), (245, 185), (240, 205), (250, 240),
    (275, 225), (303, 272), (285, 290), (245, 312), (205, 293), (180, 330), (142, 380), (150, 430), (150, 500), (0, 500),
]  # fmt: skip
# centre x, centre y, radius
COINS = [(335, 43, 29), (347, 187, 32), (271, 119, 25), (46, 260, 28), (173, 262, 28), (301, 264, 25), (213, 193, 24)]


@dataclass(frozen=True, eq=False)
class Subject:
    """One instance of a class: RGBA, cut to its outline."""

    name: str
    class_name: str
    image: Image.Image

    def recoloured(self, hue: float) -> Subject:
        """The same subject with its hues turned by `hue` (a share of the circle); gray parts take on a tint."""
        red, green, blue, alpha = self.image.split()
        h, s, v = (np.asarray(c) for c in Image.merge("RGB", (red, green, blue)).convert("HSV").split())
        turned = ((h.astype(np.int32) + round(hue * 256)) % 256).astype(np.uint8)
        gray = s < 40
        turned = np.where(gray, np.uint8(round(hue * 255) % 256), turned)
        saturation = np.where(gray, np.uint8(90), s)
        channels = [Image.fromarray(c) for c in (turned, saturation, v)]
        image = Image.merge("HSV", channels).convert("RGB")
        image.putalpha(alpha)
        return Subject(f"{self.name} hue {hue:.2f}", self.class_name, image)

    def retextured(self, texture: str, hue: float) -> Subject:
        """The same outline and shading under the pattern of a texture photograph in a colour of its own."""
        pattern = Image.fromarray(getattr(skimage.data, texture)()).convert("L").crop((0, 0, 256, 256))
        grain = np.asarray(pattern.resize(self.image.size), dtype=np.float32) / 255
        shade = np.asarray(self.image.convert("L"), dtype=np.float32) / 255
        colour = np.array(colorsys.hsv_to_rgb(hue, 0.6, 1.0), dtype=np.float32)
        values = np.clip((0.3 * shade + 0.9 * grain)[..., None] * colour, 0, 1)
        image = Image.fromarray((values * 255).astype(np.uint8))
        image.putalpha(self.image.getchannel("A"))
        return Subject(f"{self.name} as {texture}", self.class_name, image)


def _cut(name: str, class_name: str, photo: NDArray[np.uint8], outline: Points | tuple[int, int, int]) -> Subject:
    image = Image.fromarray(photo).convert("RGB")
    mask = Image.new("L", image.size)
    if isinstance(outline, tuple):
        x, y, radius = outline
        ImageDraw.Draw(mask).ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)
    else:
        ImageDraw.Draw(mask).polygon(outline, fill=255)
    image.putalpha(mask.filter(ImageFilter.GaussianBlur(0.7)))
    return Subject(name, class_name, image.crop(mask.getbbox()))


@cache
def subjects() -> tuple[Subject, ...]:
    """Every subject, at the photographs' resolution."""
    astronaut = skimage.data.astronaut()
    cut = [
        _cut("astronaut", "person", astronaut, ASTRONAUT),
        _cut("photographer", "person", skimage.data.camera(), PHOTOGRAPHER),
        _cut("shuttle", "space shuttle", astronaut, SHUTTLE),
        _cut("chelsea", "cat", skimage.data.chelsea(), CAT),
        _cut("espresso cup", "cup", skimage.data.coffee(), CUP),
        _cut("motorcycle", "motorcycle", skimage.data.stereo_motorcycle()[0], MOTORCYCLE),
    ]
    coins = skimage.data.coins()
    return (*cut, *(_cut(f"coin {i}", "coin", coins, circle) for i, circle in enumerate(COINS)))


@cache
def backgrounds() -> tuple[Image.Image, ...]:
    """Photographs and parts of photographs to stand in front of."""
    rocket = Image.fromarray(skimage.data.rocket())
    coffee = Image.fromarray(skimage.data.coffee())
    camera = Image.fromarray(skimage.data.camera()).convert("RGB")
    textures = [Image.fromarray(getattr(skimage.data, name)()).convert("RGB") for name in ("brick", "grass", "gravel")]
    return (
        rocket.crop((205, 0, 305, 100)),
        rocket,
        coffee.crop((470, 160, 600, 290)),
        camera.crop((340, 0, 512, 172)),
        *textures,
    )
