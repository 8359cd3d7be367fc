"""From a folder of photos to pairs: what comes out, what a person decides, what is refused, and that a killed run goes on."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

pytest.importorskip("cv2", reason="needs the extra build: pip install 'focusdpo[build]'")
pytest.importorskip("imagehash", reason="needs the extra build: pip install 'focusdpo[build]'")
pytest.importorskip("efficientnet_lite_pytorch", reason="needs the extra build: pip install 'focusdpo[build]'")

from focusdpo.building import composed_scenes
from focusdpo.building.composed_scenes import free_part, prompt_of, split_photos
from focusdpo.building.config import ComposeConfig, SegmentationConfig
from focusdpo.building.cut_out_files import read_accepted
from focusdpo.building.cutting import CutOut, Cutter
from focusdpo.building.photo_folder import SubjectPhotos, read_photo_folder
from focusdpo.building.scenes import load_scenes
from focusdpo.commands.data_compose import prepare
from focusdpo.data import load_pairs
from focusdpo.data.validation import check_pairs
from tests.browser import browser, in_browser
from tests.photo_folder import KNOWN, write_photos

pytestmark = pytest.mark.usefixtures("cut_once")
SHOWN = {
    "cup": KNOWN["espresso cup"],
    "blue_cup": KNOWN["espresso cup"].recoloured(0.5),
    "motorcycle": KNOWN["motorcycle"],
    "astronaut2": KNOWN["astronaut"],
}
CLASSES = {"blue_cup": "cup", "motorcycle": {"class_name": "motorcycle", "caption": "an old motorcycle"}}


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    root = write_photos(tmp_path_factory.mktemp("photos") / "photos", SHOWN, 5, 160)
    (root / "classes.yaml").write_text(yaml.safe_dump(CLASSES))
    return root


@pytest.fixture(scope="module")
def composed(photos, cut_once, tmp_path_factory):
    """A run with held-out pairs."""
    config = ComposeConfig(
        str(photos), str(tmp_path_factory.mktemp("composed") / "pairs"), pairs=12, held_out_pairs=4, resolution=128
    )
    prepare(config)()
    return config


@pytest.fixture
def copied(composed, tmp_path):
    """The same run in a folder of the test's own."""
    out = tmp_path / "pairs"
    shutil.copytree(composed.output_dir, out)
    return dataclasses.replace(composed, output_dir=str(out))


def tree(folder):
    """All but what has the clock's numbers, and the lists, which have its hash."""
    files = {path.relative_to(folder): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}
    return {path: content for path, content in files.items() if path.name != "report.json" and ".focusdpo" not in path.parts}


def scenes_of(config, split="train"):
    return load_scenes(Path(config.output_dir) / split, progress=False)


def photos_shown(scenes):
    return {photo for scene in scenes for name in ("photos", "reference_photos") for photo in scene.meta[name]}


def test_pairs_are_what_training_reads(composed):
    for split, most in (("train", 12), ("held_out", 4)):
        folder = Path(composed.output_dir) / split
        pairs, problems = check_pairs(folder, "full", progress=False)
        assert not [problem for problem in problems if problem.severity == "error"], problems
        rejected = (folder / "rejected.jsonl").read_text().count("\n")
        assert len(pairs) + rejected == most and len(pairs) > most / 2
        for pair in pairs:
            record = pair.record
            assert record.per_subject and 1 <= len(record.references) <= 4
            winner, loser = (np.asarray(Image.open(path)) for path in (record.winner, record.loser))
            priors = [np.asarray(Image.open(path)) > 0 for path in record.prior]
            changed = (winner != loser).any(axis=-1)
            assert not (changed & ~np.logical_or.reduce(priors)).any(), "outside the priors nothing changes"
            assert all(prior.any() for prior in priors), "all subjects are changed"
            assert record.meta["resemblance"] <= composed.gates.max_resemblance
            for note in record.meta["disruption"]:
                assert note.get("donor") not in record.meta["subjects"]
    assert {len(scene.subjects) for scene in scenes_of(composed)} == {1, 2, 3, 4}


def test_the_splits_share_no_photo(composed):
    train, held_out = (photos_shown(scenes_of(composed, split)) for split in ("train", "held_out"))
    assert train and held_out and not train & held_out
    assert {photo.split("/")[0] for photo in train} == set(SHOWN)
    for split, own, others in (("train", train, held_out), ("held_out", held_out, train)):
        behind = {scene.meta["background_photo"] for scene in scenes_of(composed, split)}
        pairs = load_pairs(Path(composed.output_dir) / split, progress=False)
        notes = [note for pair in pairs for note in pair.meta["disruption"]]
        donors = {note["donor_photo"] for note in notes if note["kind"] == "swap"}
        assert behind and not behind & others and not donors & others
        assert donors <= own or split == "held_out"
    for scene in scenes_of(composed):
        assert not set(scene.meta["photos"]) & set(scene.meta["reference_photos"]), "a reference is another photo"


def test_prompts_name_what_is_there(composed):
    texts = {scene.prompt for scene in [*scenes_of(composed), *scenes_of(composed, "held_out")]}
    assert any("an old motorcycle" in text for text in texts) and any("an astronaut" in text for text in texts)
    for text in texts:
        told = re.findall(r"a cup (?:on|in|first|second|third|fourth)\b", text)
        assert text.count("a cup") in (0, 1, len(told)), text


def test_a_swap_clears_the_region(copied, tmp_path):
    """Where the loser shows no other instance it shows the background, which shows no subject."""
    config = dataclasses.replace(copied, output_dir=str(tmp_path / "swaps"), held_out_pairs=0, subjects=[1])
    config.disruption = dataclasses.replace(config.disruption, kinds=["swap"])
    prepare(config)()
    scenes = {scene.line: scene for scene in scenes_of(config)}
    records = load_pairs(Path(config.output_dir) / "train", progress=False)
    assert records and {record.references[0].class_name for record in records} == {"cup"}
    for record in records:
        loser = np.asarray(Image.open(record.loser)).astype(int)
        behind = np.asarray(Image.open(scenes[record.meta["scene_line"]].background)).astype(int)
        prior = np.asarray(Image.open(record.prior[0])) > 0
        cleared = prior & (loser == behind).all(axis=-1)
        assert cleared.sum() > 0.02 * prior.sum()
        assert (loser == behind).all(axis=-1)[~prior].all(), "a scene of one subject is its background elsewhere"


def test_a_second_start_changes_nothing(copied):
    before = tree(copied.output_dir)
    prepare(copied)()
    assert tree(copied.output_dir) == before


@pytest.mark.parametrize("stop", ["cutting", "composing"])
def test_a_killed_run_ends_with_the_same_pairs(composed, tmp_path, monkeypatch, stop):
    config = dataclasses.replace(composed, output_dir=str(tmp_path / "pairs"))
    if stop == "cutting":  # anew, to the same masks
        monkeypatch.setattr(Cutter, "cut", Cutter.cut.__wrapped__)
    with monkeypatch.context() as patch:
        name, place, after = {"cutting": ("cut", Cutter, 2), "composing": ("_write", composed_scenes, 5)}[stop]
        patch.setattr(place, name, failing(getattr(place, name), after))
        with pytest.raises(KeyboardInterrupt):
            prepare(config)()
    prepare(config)()
    assert tree(config.output_dir) == {
        path: content.replace(composed.output_dir.encode(), config.output_dir.encode())
        for path, content in tree(composed.output_dir).items()
    }


def failing(work, after):
    calls = []

    def call(*args, **kwargs):
        calls.append(1)
        if len(calls) > after:
            raise KeyboardInterrupt
        return work(*args, **kwargs)

    return call


def test_a_person_strikes_out(copied):
    """What is struck out is in no scene, and the list is never written over."""
    file = Path(copied.output_dir) / "accepted.yaml"
    accepted = yaml.safe_load(file.read_text())
    assert {name: len(each) for name, each in accepted.items()} == dict.fromkeys(SHOWN, 5)
    struck = next(photo for photo in sorted(photos_shown(scenes_of(copied))) if photo.startswith("cup/"))
    accepted["cup"][struck.split("/")[1]] = False
    text = yaml.safe_dump(accepted)
    file.write_text(text)
    masks = {path: content for path, content in tree(copied.output_dir).items() if path.parts[0] == "cutouts"}
    prepare(copied)()
    assert file.read_text() == text
    shown = photos_shown([*scenes_of(copied), *scenes_of(copied, "held_out")])
    assert struck not in shown and shown
    assert len(load_pairs(Path(copied.output_dir) / "train", progress=False)) > 6
    after = tree(copied.output_dir)
    assert all(after[path] == content for path, content in masks.items()), "nothing is cut out again"
    assert "decided by a person" in (Path(copied.output_dir) / "masks.html").read_text()
    prepare(dataclasses.replace(copied, overwrite=True))()
    assert file.read_text() == text and struck not in photos_shown(scenes_of(copied))


def used_of(accepted):
    return sum(flag for photos in accepted.values() for flag in photos.values())


def test_what_nobody_changed_follows_the_verdicts(copied):
    """Other thresholds give other verdicts: a list that is as it was written is written anew, one that was changed is kept."""
    file = Path(copied.output_dir) / "accepted.yaml"
    before = yaml.safe_load(file.read_text())
    strict = dataclasses.replace(copied, overwrite=True, masks_only=True)
    strict.cut_outs = dataclasses.replace(copied.cut_outs, min_agreement=0.99)
    prepare(strict)()
    after = yaml.safe_load(file.read_text())
    assert sum(map(sum, (each.values() for each in after.values()))) < sum(
        map(sum, (each.values() for each in before.values()))
    )
    assert "decided by a person" not in (Path(copied.output_dir) / "masks.html").read_text()
    refused = next((name, photo) for name, each in after.items() for photo, flag in each.items() if not flag)
    after[refused[0]][refused[1]] = True
    file.write_text(text := "# mine\n" + yaml.safe_dump(after))
    prepare(dataclasses.replace(copied, overwrite=True, masks_only=True))()
    page = (Path(copied.output_dir) / "masks.html").read_text()
    assert file.read_text() == text and page.count("decided by a person") == 1, "the rest follows the new verdicts"
    used = int(re.search(r"(\d+) of 20 cut-outs are used", page)[1])
    assert used == used_of(before)


def test_pairs_of_a_part_that_has_no_scenes_any_more_go(copied):
    """All photos are trained on then, those that the old held-out pairs show as well."""
    file, root = Path(copied.output_dir) / "accepted.yaml", Path(copied.output_dir)
    accepted = yaml.safe_load(file.read_text())
    for photos in accepted.values():
        for photo in list(photos)[3:]:
            photos[photo] = False
    file.write_text(yaml.safe_dump(accepted))
    mine = root / "held_out" / "mine.txt"
    mine.write_text("mine")
    prepare(copied)()
    assert [path.name for path in (root / "held_out").iterdir()] == ["mine.txt"]
    assert load_pairs(root / "train", progress=False)


def test_an_edited_pairs_file_is_not_deleted(copied):
    file, root = Path(copied.output_dir) / "accepted.yaml", Path(copied.output_dir)
    accepted = yaml.safe_load(file.read_text())
    for photos in accepted.values():
        photos.update(dict.fromkeys(list(photos)[3:], False))
    file.write_text(yaml.safe_dump(accepted))
    pairs = root / "held_out" / "pairs.jsonl"
    pairs.write_text(text := pairs.read_text() + "\n")
    with pytest.raises(FileExistsError, match=r"held_out holds pairs.jsonl, which this command did not write"):
        prepare(copied)()
    assert pairs.read_text() == text


def test_masks_first_and_then_pairs_of_any_settings(photos, tmp_path):
    config = ComposeConfig(str(photos), str(tmp_path / "pairs"), resolution=128, masks_only=True)
    prepare(config)()
    cut = {path: content for path, content in tree(config.output_dir).items() if path.parts[0] == "cutouts"}
    prepare(dataclasses.replace(config, masks_only=False, pairs=3, held_out_pairs=0, seed=4, subjects=[2]))()
    assert len(scenes_of(config)) == 3
    assert {path: tree(config.output_dir)[path] for path in cut} == cut
    with pytest.raises(ValueError, match="pairs: the run has 3, got 4"):
        prepare(dataclasses.replace(config, pairs=4, held_out_pairs=0, seed=4, subjects=[2]))


def test_names_that_yaml_and_html_would_mangle(photos, tmp_path):
    root = tmp_path / "photos"
    (root / "😀 <b>").mkdir(parents=True)
    for number, name in enumerate(["yes", "1", 'a"b: #c', "é😀"]):
        shutil.copy(photos / "motorcycle" / f"{number:02d}.png", root / "😀 <b>" / f"{name}.png")
    config = ComposeConfig(str(root), str(tmp_path / "pairs"), resolution=128, pairs=2, held_out_pairs=0, subjects=[1])
    prepare(config)()
    before = tree(config.output_dir)
    prepare(config)()
    assert tree(config.output_dir) == before
    assert set(yaml.safe_load((tmp_path / "pairs" / "accepted.yaml").read_text())["😀 <b>"]) == {
        path.name for path in (root / "😀 <b>").iterdir()
    }
    assert "<b>" not in (tmp_path / "pairs" / "masks.html").read_text().split("<main>")[1]


@pytest.mark.parametrize("change", ["small", "wide", "copy"])
def test_photos_that_cannot_be_used_are_named(photos, tmp_path, change):
    root = shutil.copytree(photos, tmp_path / "photos")
    size = {"small": (10, 40), "wide": (900, 100), "copy": None}[change]
    config = ComposeConfig(str(root), str(tmp_path / "pairs"), resolution=128, masks_only=True)
    if size is None:
        shutil.copy(root / "cup" / "00.png", root / "motorcycle" / "09.png")
        prepare(config)()
        rows = (tmp_path / "pairs" / "accepted.yaml").read_text()
        assert '"09.png": false' in rows
        return
    Image.new("RGB", size).save(root / "cup" / "00.png")
    with pytest.raises(ValueError, match=rf"cup/00.png is {size[0]}x{size[1]} pixels; expected at least 64 a side"):
        prepare(config)


def test_backgrounds_of_ones_own(photos, tmp_path):
    """Each part has its own; what is damaged is named before anything is cut out."""
    folder = tmp_path / "places"
    folder.mkdir()
    for number in range(5):
        Image.new("RGB", (200, 150), (40 * number, 90, 200)).save(folder / f"{number}.png")
    config = ComposeConfig(
        str(photos), str(tmp_path / "pairs"), resolution=128, pairs=4, held_out_pairs=3, backgrounds=str(folder)
    )
    prepare(config)()
    behind = [{scene.meta["background_photo"] for scene in scenes_of(config, split)} for split in ("train", "held_out")]
    assert all(behind) and not behind[0] & behind[1] and all(name.startswith("backgrounds/") for name in behind[0])
    (folder / "9.png").write_bytes(b"no")
    with pytest.raises(ValueError, match=r"backgrounds: photos cannot be used.*\n  .*9.png cannot be read"):
        prepare(dataclasses.replace(config, output_dir=str(tmp_path / "other")))
    with pytest.raises(ValueError, match=r"backgrounds: .* is one of the folders in .*, and would be a subject"):
        prepare(dataclasses.replace(config, output_dir=str(tmp_path / "other"), backgrounds=str(photos / "cup")))


def test_the_masks_alone(photos, tmp_path):
    config = ComposeConfig(str(photos), str(tmp_path / "pairs"), resolution=128, masks_only=True)
    prepare(config)()
    assert sorted(path.name for path in (tmp_path / "pairs").iterdir()) == [
        ".focusdpo", "accepted.yaml", "compose.json", "cutouts", "cutouts.jsonl", "masks.html",
    ]  # fmt: skip
    page = (tmp_path / "pairs" / "masks.html").read_text()
    assert page.count("<img") == 20 and all(f"cutouts/{name}/00.png_shown.webp" in page for name in SHOWN)
    verdicts = [json.loads(line) for line in (tmp_path / "pairs" / "cutouts.jsonl").read_text().splitlines()]
    assert sum(one["refused"] is None for row in verdicts for one in row["photos"]) > 15


def test_what_others_put_there_stays(copied):
    note = Path(copied.output_dir) / "cutouts" / "cup" / "note.txt"
    note.write_text("mine")
    prepare(dataclasses.replace(copied, overwrite=True, seed=1, pairs=2, held_out_pairs=0))()
    assert note.read_text() == "mine"
    strange = Path(copied.output_dir) / "cutouts" / "cup" / "mine.png"
    strange.write_bytes(b"mine")
    with pytest.raises(FileExistsError, match="mine.png, which this command did not write"):
        prepare(dataclasses.replace(copied, overwrite=True))
    assert strange.read_bytes() == b"mine"


def test_other_settings_and_other_photos_are_refused_by_name(copied, photos, tmp_path):
    with pytest.raises(ValueError, match=r"pairs of other settings:\n  seed: the run has 0, got 3"):
        prepare(dataclasses.replace(copied, seed=3))
    other = shutil.copytree(photos, tmp_path / "photos")
    Image.open(other / "cup" / "00.png").convert("L").save(other / "cup" / "00.png")
    with pytest.raises(ValueError, match=r"photos \(their content\)"):
        prepare(dataclasses.replace(copied, photos=str(other)))


def damage(root):
    (root / "cup" / "03.png").write_bytes((root / "cup" / "03.png").read_bytes()[:500])


def loose(root):
    for file in list(root.glob("*/*")):
        file.rename(root / f"{file.parent.name}{file.name}")


BROKEN = {
    "no folder": (shutil.rmtree, "photos: no such folder"),
    "photos beside each other": (loose, "its photos stand beside each other; give each subject a folder of its own"),
    "damaged": (damage, r"photos: photos cannot be used; mend or remove them:\n  .*cup/03.png cannot be read as an image"),
    "unknown subject": (
        lambda root: (root / "classes.yaml").write_text("rex: dog"),
        r"classes.yaml:\n  rex: is no folder with photos in .*; known are astronaut2, blue_cup, cup, motorcycle",
    ),
    "unknown field": (lambda root: (root / "classes.yaml").write_text("cup: {kind: cup}"), "cup: kind is not a field; write"),
    "no class": (lambda root: (root / "classes.yaml").write_text("cup: {caption: x}"), "cup: class_name is missing"),
    "no yaml": (lambda root: (root / "classes.yaml").write_text("cup: ["), "classes.yaml is not YAML"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_folders_that_cannot_be_used_are_refused(photos, tmp_path, case):
    change, message = BROKEN[case]
    root = shutil.copytree(photos, tmp_path / "photos")
    change(root)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        prepare(ComposeConfig(str(root), str(tmp_path / "pairs")))
    assert not (tmp_path / "pairs").exists()


def test_too_few_photos_are_an_error_that_says_what_to_do(photos, tmp_path):
    root = tmp_path / "photos"
    (root / "cup").mkdir(parents=True)
    shutil.copy(photos / "cup" / "00.png", root / "cup")
    with pytest.raises(ValueError, match=r"no subject of .* has 2 cut-outs that can be used; masks.html shows why"):
        prepare(ComposeConfig(str(root), str(tmp_path / "pairs"), resolution=128))()
    row = json.loads((tmp_path / "pairs" / "cutouts.jsonl").read_text())
    assert row["photos"][0]["refused"] == "no other cut-out of this subject to compare it with"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rex: {00.png: true}", "rex: is no subject; take it out, or write it in quotes; known are cup"),
        ("cup: {09.png: true}", "cup: 09.png: is no photo of it"),
        ("cup: {00.png: 3}", "cup: 00.png: expected true or false, got 3"),
        ("cup: true", "cup: expected its photos, got True"),
        ("[", "is not YAML"),
    ],
)
def test_lists_of_a_person_are_checked(tmp_path, text, message):
    (tmp_path / "accepted.yaml").write_text(text)
    known = [SubjectPhotos("cup", "cup", None, (Path("cup/00.png"),))]
    with pytest.raises(ValueError, match=message):
        read_accepted(tmp_path / "accepted.yaml", known)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pairs": 0}, "pairs: got 0"),
        ({"subjects": [5]}, r"subjects: got \[5\]; expected some of 1, 2, 3, 4"),
        ({"held_out": 1.0}, "held_out: got 1.0"),
        ({"workers": 0}, "workers: got 0"),
        ({"segmentation": SegmentationConfig("sam", "a/b")}, "segmentation.detector: got None; expected a detector for sam"),
    ],
)
def test_settings_are_refused_by_name(settings, message):
    with pytest.raises(ValueError, match=message):
        ComposeConfig("photos", "out", **settings)


def test_classes_of_folders(photos, tmp_path):
    found = {one.name: (one.class_name, one.caption) for one in read_photo_folder(photos)}
    assert found == {
        "astronaut2": ("astronaut", None),
        "blue_cup": ("cup", None),
        "cup": ("cup", None),
        "motorcycle": ("motorcycle", "an old motorcycle"),
    }


def subject(class_name, caption=None):
    return SubjectPhotos(class_name, class_name, caption, ())


def test_two_of_a_class_are_told_apart():
    dog, eel, rex = subject("dog"), subject("eel"), subject("dog", "a brown dog")
    assert prompt_of([dog]) == "a dog"
    assert prompt_of([dog, eel]) == "a dog and an eel"
    assert prompt_of([dog, rex]) == "a dog and a brown dog"
    assert prompt_of([dog, dog]) == "a dog on the left and a dog on the right"
    assert prompt_of([dog, eel, dog]) == "a dog on the left, an eel and a dog on the right"


@pytest.mark.parametrize(
    ("count", "held_out", "sizes"), [(8, 0.25, (6, 2)), (4, 0.25, (2, 2)), (3, 0.25, (3, 0)), (9, 0.0, (9, 0))]
)
def test_both_parts_have_two_photos_of_a_subject_or_one_has_none(count, held_out, sizes):
    names = [f"{number}.jpg" for number in range(count)]
    train, kept = split_photos(names, held_out, 0)
    if sizes[1] and count > 4:  # without one that is trained on all others keep their part
        again = split_photos([name for i, name in enumerate(names) if i != train[0]], held_out, 0)[1]
        assert [i - (i > train[0]) for i in kept] == again
    assert (len(train), len(kept)) == sizes and sorted(train + kept) == list(range(count))


def test_backgrounds_show_no_subject():
    pixels = np.random.default_rng(0).integers(0, 255, (100, 160, 3), dtype=np.uint8)
    mask = np.zeros((100, 160), bool)
    mask[20:90, 10:60] = True
    pixels[mask] = 0
    part = free_part(CutOut("x", "x", Path("x.png"), pixels, mask))
    assert part.width == part.height > 80 and (np.asarray(part) > 0).any(axis=-1).all()
    mask[:, 30:140] = True
    assert free_part(CutOut("x", "x", Path("x.png"), pixels, mask)) is None


@browser
def test_the_page_of_masks_saves_what_is_ticked(copied, tmp_path):
    script = """
      const texts = [];
      view.URL.createObjectURL = (blob) => { texts.push(blob.text()); return "#"; };
      seen.before = page.getElementById("count").textContent;
      const box = page.querySelector('section[data-subject="cup"] input[data-photo="01.png"]');
      box.click();
      seen.after = page.getElementById("count").textContent;
      page.getElementById("save").click();
      seen.text = await texts[0];
      seen.images = [...page.images].length;
      box.closest("label").querySelector("img").click();
      seen.enlarged = [page.getElementById("enlarged").open, box.checked];
      seen.wide = page.documentElement.scrollWidth > view.innerWidth;
    """
    (tmp_path / "profile").mkdir()
    before = yaml.safe_load((Path(copied.output_dir) / "accepted.yaml").read_text())
    seen, _ = in_browser(Path(copied.output_dir), tmp_path / "profile", script, page="masks.html")
    assert "error" not in seen and not seen["wide"] and seen["images"] == 20, seen
    assert seen["enlarged"] == [True, False], "a click on a picture enlarges it, and ticks nothing"
    used = used_of(before)
    assert seen["before"] == f"{used} of 20 cut-outs are used" and before["cup"]["01.png"]
    assert seen["after"] == f"{used - 1} of 20 cut-outs are used"
    before["cup"]["01.png"] = False
    assert yaml.safe_load(seen["text"]) == before
    known = read_photo_folder(Path(copied.photos))
    (tmp_path / "accepted.yaml").write_text(seen["text"])
    assert read_accepted(tmp_path / "accepted.yaml", known) == before
