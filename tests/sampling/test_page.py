"""`focusdpo sample --compare` and the page of its images, as files and in a browser."""

from __future__ import annotations

import re
import shutil

import numpy as np
import pytest
from PIL import Image

from tests.browser import browser, in_browser
from tests.sampling.studies import contents, load, model_words, pixels, sample, write_manifest, write_random_lora


@pytest.fixture(scope="module")
def made(tiny_flux, tmp_path_factory):
    """Three prompts with two images each, compared; and the words that made them."""
    root = tmp_path_factory.mktemp("compared")
    lora = write_random_lora(load("flux", tiny_flux), root / "lora")
    manifest = write_manifest(root)
    manifest.write_text(manifest.read_text().replace("a dog", "a <b>dog</b>", 1))
    words = [*model_words("flux", tiny_flux), "--manifest", manifest, "--size", "64x48", "--steps", 1, "--images_per_prompt", 2]
    sample(*words, "--lora", lora, "--compare", "true", "--output_dir", root / "out")
    return root, words


def test_the_base_is_the_model_without_lora_from_the_same_noise(made):
    root, words = made
    sample(*words, "--output_dir", root / "plain")
    base = {name.removeprefix("base/"): image for name, image in contents(root / "out", "base/*.png").items()}
    plain = {name.removeprefix("images/"): image for name, image in contents(root / "plain", "images/*.png").items()}
    assert len(base) == 6 and base == plain
    tuned = contents(root / "out", "images/*.png")
    assert not set(tuned.values()) & set(base.values())
    assert not (root / "plain" / "compare").exists() and not (root / "plain" / "base").exists()


def test_a_sheet_has_references_base_and_lora(made):
    root, _ = made
    assert sorted(file.name for file in (root / "out" / "compare").iterdir()) == ["0001.png", "0002.png", "0003.png"]
    sheet = pixels(root / "out" / "compare" / "0002.png")
    shown = []
    for number in range(2):
        for kind in ("base", "images"):
            picture = pixels(root / "out" / kind / f"0002_{number}.png").repeat(5, 0).repeat(5, 1)  # to 320 px
            shown.append(places_of(sheet, picture))
    (top, left), (_, right), (below, _), _ = shown
    assert len(set(shown)) == 4 and left < right and top < below and shown[2][1] == left


def places_of(sheet, picture):
    """Where a picture stands in a sheet."""
    height, width = picture.shape[:2]
    corner = (sheet == picture[0, 0]).all(-1)
    for row, column in np.argwhere(corner):
        part = sheet[row : row + height, column : column + width]
        if part.shape == picture.shape and np.array_equal(part, picture):
            return int(row), int(column)
    raise AssertionError("it is not in the sheet")


def test_sheets_that_are_out_of_date_are_drawn_anew(made, tmp_path):
    root, words = made
    out = tmp_path / "out"
    shutil.copytree(root / "out", out)
    before = contents(out, "compare/*.png")
    (out / "base" / "0003_1.png").unlink()
    (out / "compare" / "0001.png").unlink()
    Image.new("RGB", (9, 9)).save(out / "compare" / "0003.png")
    sample(*words, "--lora", root / "lora", "--compare", "true", "--output_dir", out)
    assert contents(out, "compare/*.png") == before
    sample(*words, "--images_per_prompt", 3, "--lora", root / "lora", "--compare", "true", "--output_dir", out)
    assert all(Image.open(out / name).height > Image.open(root / "out" / name).height for name in before)


def test_the_page_can_be_moved(made, tmp_path):
    root, _ = made
    page = (root / "out" / "index.html").read_text()
    links = set(re.findall(r'(?:src|href)="([^"#]+)"', page)) - {"data:,"}
    assert len(links) == 6 + 6 + 3, "of three photos, of which two stand in two prompts, one copy each"
    assert all((root / "out" / link).is_file() for link in links)
    assert str(root) not in page and "a &lt;b&gt;dog&lt;/b&gt;" in page and "<b>dog" not in page
    assert page.index("a cat and a cup") < page.index("&lt;b&gt;dog")


def test_a_page_that_was_edited_is_kept(made, tmp_path):
    root, words = made
    out = tmp_path / "out"
    shutil.copytree(root / "out", out)
    page = (out / "index.html").read_text()
    (out / "index.html").write_text(page + "<!-- mine -->")
    sample(*words, "--lora", root / "lora", "--compare", "true", "--output_dir", out)
    assert (out / "index.html").read_text() == page and (out / "index.html.edited").read_text() == page + "<!-- mine -->"


@browser
def test_pictures_enlarge_and_nothing_else_is_asked_for(made, tmp_path):
    root, _ = made
    folder = tmp_path / "moved"
    shutil.copytree(root / "out", folder)
    script = """
      const wide = page.querySelectorAll("figure a");
      seen.links = wide.length;
      seen.loaded = await waiting(() => [...page.querySelectorAll("main img")].every((image) => image.naturalWidth));
      wide[2].click();
      const dialog = page.querySelector("dialog");
      seen.open = dialog.open;
      seen.enlarged = dialog.querySelector("img").src.split("/").slice(-2).join("/");
      page.activeElement.dispatchEvent(new view.KeyboardEvent("keydown", { key: "ArrowRight", bubbles: true }));
      seen.next = dialog.querySelector("img").src.split("/").slice(-2).join("/");
      dialog.click();
      seen.closed = !dialog.open;
      document.querySelector("iframe").width = 390;
      await pause(50);
      seen.overflow = page.documentElement.scrollWidth - view.innerWidth;
      seen.narrow = Math.min(...[...page.querySelectorAll(".images img")].map((image) => image.clientWidth));
    """
    profile = tmp_path / "profile"
    profile.mkdir()
    seen, _ = in_browser(folder, profile, script, page="index.html")
    assert seen.get("error") is None and seen["console"] == [], seen.get("error")
    assert (seen["links"], seen["loaded"], seen["open"], seen["closed"]) == (6 + 6 + 5, True, True, True)
    assert (seen["enlarged"], seen["next"]) == ("base/0001_0.png", "images/0001_0.png")
    assert seen["overflow"] <= 0 and seen["narrow"] > 100, "readable on a telephone"
    assert len(seen["requests"]) == 6 + 6 + 3


def test_a_prompt_without_references(tiny_flux, tmp_path):
    """As FLUX.1's own pipeline: its page and its sheet have none."""
    lora = write_random_lora(load("flux", tiny_flux), tmp_path / "lora")
    words = [*model_words("flux", tiny_flux), "--prompt", "a cat", "--size", "64x64", "--steps", 1, "--lora", lora]
    sample(*words, "--compare", "true", "--output_dir", tmp_path / "out")
    assert 'class="references"' not in (tmp_path / "out" / "index.html").read_text()
    assert Image.open(tmp_path / "out" / "compare" / "0001.png").width < 3 * 320
