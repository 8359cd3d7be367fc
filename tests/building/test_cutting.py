"""Which cut-outs are trusted: masks that are whole pass, and those that are not are refused with their reason."""

from __future__ import annotations

import re

import numpy as np
import pytest
from PIL import Image, ImageOps

pytest.importorskip("cv2", reason="needs the extra build: pip install 'focusdpo[build]'")
pytest.importorskip("imagehash", reason="needs the extra build: pip install 'focusdpo[build]'")
pytest.importorskip("efficientnet_lite_pytorch", reason="needs the extra build: pip install 'focusdpo[build]'")

from focusdpo.building import cutting
from focusdpo.building.blending import grow
from focusdpo.building.config import CutOutsConfig
from focusdpo.building.cutting import Cutter, default_cutter, likeness, without_bars
from focusdpo.building.encoder import GRID, EfficientNetLite0, on_gray, shares
from focusdpo.building.segmentation import GrabCut, Segmentation
from tests.photo_folder import KNOWN, write_photos

COUNT = 5


@pytest.fixture(scope="module")
def encoder():
    return EfficientNetLite0("cpu")


@pytest.fixture(scope="module")
def astronauts(tmp_path_factory):
    """Photos of one subject, and their cut-outs, which are good: by eye, and by what `missing` and `purity` say."""
    root = write_photos(tmp_path_factory.mktemp("cutting") / "photos", {"astronaut": KNOWN["astronaut"]}, COUNT, 192)
    files = sorted((root / "astronaut").iterdir())
    return files, default_cutter().cut("astronaut", "astronaut", files)


class Told(Segmentation):
    """Finds the masks that it is told."""

    def __init__(self, masks):
        super().__init__()
        self.masks = list(masks)

    def find(self, pixels, class_name, area):
        return self.masks.pop(0)


def judged(files, masks, encoder):
    return Cutter(Told(masks), encoder, CutOutsConfig(), 512).cut("astronaut", "astronaut", files)


def test_whole_subjects_pass(astronauts):
    _, found = astronauts
    assert [one.refused for one in found] == [None] * COUNT
    for one in found:
        red, _, blue = (one.pixels[one.mask].mean(0)).astype(int)
        assert red > blue + 40, "the suit is orange"
        assert set(one.scores) == {"area", "agreement", "purity", "missing", "doubt"}


def lower_half_left_out(mask):
    rows, cut = np.flatnonzero(mask.any(1)), mask.copy()
    cut[(rows[0] + rows[-1]) // 2 :] = False
    return cut


def with_background(mask):
    wide = grow(mask, 12)
    rows = np.flatnonzero(mask.any(1))
    wide[rows[0] :, : np.flatnonzero(mask.any(0))[0]] = True
    return wide


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lower_half_left_out, r"a part of the subject seems left out: missing \d.\d\d, over 0\.1(;|$)"),
        (with_background, r"a part of it looks like background, or unlike the subject: doubt \d.\d\d, over 0.14"),
        (lambda mask: ~grow(mask, 20), "does not look like the subject's other cut-outs|looks like background|covers"),
        (lambda mask: np.zeros_like(mask), "the segmentation finds nothing"),
        (lambda mask: np.ones_like(mask), "the mask covers 100% of the photo, over max_area=0.9"),
    ],
)
def test_a_spoilt_mask_is_refused_and_the_others_pass(astronauts, encoder, spoil, reason):
    files, good = astronauts
    masks = [one.mask for one in good]
    found = judged(files, [spoil(masks[0]), *masks[1:]], encoder)
    assert re.search(reason, found[0].refused or ""), (found[0].refused, found[0].scores)
    assert [one.refused for one in found[1:]] == [None] * (COUNT - 1)


def test_a_photo_of_something_else_is_refused(astronauts, tmp_path):
    files, _ = astronauts
    other = write_photos(tmp_path / "other", {"coin": KNOWN["coin 1"]}, 1, 192) / "coin" / "00.png"
    found = default_cutter().cut("astronaut", "astronaut", [*files, other])
    assert found[-1].refused is not None
    assert [one.refused for one in found[:-1]] == [None] * COUNT


def test_faults_add_up(astronauts, encoder):
    files, good = astronauts
    masks = [one.mask for one in good]
    masks[0] = lower_half_left_out(masks[0])

    def found(limit):
        config = CutOutsConfig(max_doubt=limit, max_missing=9)
        return Cutter(Told(masks), encoder, config, 512).cut("astronaut", "astronaut", files)

    scores = [one.scores for one in found(9)]
    first = scores[0]
    shortfall = np.median([one["agreement"] for one in scores]) - first["agreement"]
    assert first["doubt"] == pytest.approx(first["missing"] - first["purity"] + shortfall) and shortfall > 0.01
    assert max(one["doubt"] for one in scores[1:]) < first["doubt"]
    assert re.fullmatch(r"a part of it looks like .*: doubt .*", found(first["doubt"] - 0.01)[0].refused)
    assert found(first["doubt"] + 0.01)[0].refused is None


def test_background_in_a_mask_is_trimmed(astronauts, encoder):
    """GrabCut that takes a patch of background for the subject, wherever it starts from."""
    files, good = astronauts
    patches = []
    for one in good:
        rows, columns = (np.flatnonzero(one.mask.any(axis)) for axis in (1, 0))
        beside = np.zeros_like(one.mask)
        beside[rows[0] : rows[0] + len(rows) // 2, max(columns[0] - 20, 0) : columns[-1]] = True
        patches.append(beside & ~grow(one.mask, 4))
    spoilt = {one.pixels.tobytes(): one.mask | patch for one, patch in zip(good, patches, strict=True)}

    class Careless(GrabCut):
        def find(self, pixels, class_name, area):
            return spoilt[pixels.tobytes()]

        def find_likely(self, pixels, likely):
            return spoilt[pixels.tobytes()]

    found = Cutter(Careless(), encoder, CutOutsConfig(), 512).cut("astronaut", "astronaut", files)
    for one, whole, patch in zip(found, good, patches, strict=True):
        assert patch.sum() > 0.4 * whole.mask.sum()
        assert (one.mask & patch).sum() < 0.05 * patch.sum()
        assert (one.mask & whole.mask).sum() > 0.95 * whole.mask.sum()


def test_one_bad_mask_of_four_makes_a_background_of_the_subject_only_where_asked():
    grid = np.zeros((GRID * GRID, 2), np.float32)
    grid[:100, 0] = grid[100:, 1] = 1  # the subject's cells first
    covered = [grid[:, 0]] * 3 + [np.zeros(GRID * GRID, np.float32)]
    for enough, of_subject in ((3, 0), (4, 1)):
        subject, others = likeness([grid] * 4, covered, 0, enough)
        assert (subject == grid[:, 0]).all()
        assert (others[:100] == of_subject).all() and (others[100:] == 1).all()


def test_cutting_asks_two_of_three_and_verdicts_of_four(astronauts, monkeypatch):
    asked = []

    def noted(*arguments, enough=4):
        asked.append(enough)
        return likeness(*arguments, enough=enough)

    monkeypatch.setattr(cutting, "likeness", noted)
    default_cutter().cut("astronaut", "astronaut", astronauts[0][:4])
    assert asked == [3] * 4 * cutting.ROUNDS + [4] * 4


@pytest.mark.parametrize("mirrored", [False, True])
def test_one_photo_twice_is_refused_once(astronauts, tmp_path, mirrored):
    files, _ = astronauts
    image = Image.open(files[2])
    (ImageOps.mirror(image) if mirrored else image.resize((150, 150))).save(tmp_path / "again.jpg")
    found = default_cutter().cut("astronaut", "astronaut", [*files, tmp_path / "again.jpg"])
    assert found[-1].refused == f"is 02.png{' mirrored' if mirrored else ''} once more"


@pytest.mark.parametrize("axis", [0, 1])
def test_bars_of_a_letterbox_go_and_a_plain_sky_stays(axis):
    rng = np.random.default_rng(0)
    picture = rng.integers(40, 255, (80, 90, 3), dtype=np.uint8)
    bars = np.pad(picture, [(12, 9) if axis == i else (0, 0) for i in range(2)] + [(0, 0)])
    noisy = np.clip(bars.astype(int) + rng.integers(0, 3, bars.shape), 0, 255).astype(np.uint8)
    kept = without_bars(noisy)
    assert noisy[kept].shape == picture.shape
    assert without_bars(picture) == (slice(0, 80), slice(0, 90))
    mixed = noisy.copy()  # as JPEG leaves the first line beside a bar
    across = np.moveaxis(mixed, axis, 0)
    across[12] = across[11] // 2 + across[12] // 30
    assert mixed[without_bars(mixed)].shape[axis] == picture.shape[axis] - 1
    sky = np.full((80, 90, 3), 120, np.uint8)
    sky[30:50, 40:60] = picture[:20, :20]
    assert without_bars(sky) == (slice(0, 80), slice(0, 90)), "it does not end along its whole length"
    product = np.full((80, 90, 3), 250, np.uint8)
    product[20:60, 10:80] = picture[:40, :70]
    assert without_bars(product) == (slice(0, 80), slice(0, 90)), "a wide box on a plain table: beside it the table goes on"
    thin = np.full((80, 90, 3), 250, np.uint8)
    thin[40] = picture[0]
    assert without_bars(thin) == (slice(0, 80), slice(0, 90)), "nothing would be left"
    one_side = np.pad(picture, [(20, 0), (0, 0), (0, 0)])
    assert without_bars(one_side) == (slice(0, 100), slice(0, 90))


def test_the_encoder_tells_instances_apart(astronauts, encoder):
    _, found = astronauts
    alone = encoder.embed([on_gray(one.pixels, one.mask) for one in found])
    coin = np.asarray(KNOWN["coin 1"].image.convert("RGB"))
    (other,) = encoder.embed([coin])
    assert np.allclose(np.linalg.norm(alone, axis=1), 1, atol=1e-5)
    assert (alone @ alone.T).min() > 0.8 > (alone @ other).max()


def test_cells_add_up():
    mask = np.zeros((280, 560), bool)
    mask[:100, :200] = True
    covered = shares(mask).reshape(28, 28)
    assert covered[:10, :10].min() == 1 and covered.sum() == 100
