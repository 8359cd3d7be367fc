"""The page to look at pairs: what it shows, in a browser with a thousand pairs, and what it refuses to write over."""

from __future__ import annotations

import json
import logging
import re
from urllib.parse import unquote

import numpy as np
import pytest
from PIL import Image

from focusdpo.commands import cli
from focusdpo.pages.pairs import check_page, outlines_of, write_page
from tests.browser import browser, in_browser

PAIRS = 1000
BROKEN = 7  # line of the pair without a winner
NO_JSON = 11  # line that is no record
SIDE = 48
BOX = (8, 8, 32, 32)


def show(pairs, page, size, overwrite):
    return write_page(pairs, page, check_page(page, overwrite), size, progress=False)


def thumbnails_of(page):
    """Of the page that is there: no others are."""
    (folder,) = page.with_name(f"{page.stem}_files").glob("thumbnails-*")
    return folder


def write_pairs(folder, count):
    """Pairs of three classes; every tenth winner is marked too widely, one winner is missing, and one line is no JSON."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    wide, prior = Image.new("L", (SIDE, SIDE), 255), Image.new("L", (SIDE, SIDE))
    prior.paste(255, BOX)
    wide.save(folder / "wide.png")
    prior.save(folder / "prior.png")
    for name in ("cat", "cup", "<dog>"):
        Image.fromarray(rng.integers(0, 256, (32, 40, 3), dtype=np.uint8)).save(folder / f"{name[:2]}.bmp")
    lines = []
    for i in range(count):
        pixels = rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}w.bmp")
        left, top, right, bottom = BOX
        pixels[top:bottom, left:right] ^= 0xFF
        Image.fromarray(pixels).save(folder / f"{i}l.bmp")
        names = ["cat"] if i % 4 == 0 else ["cat", "cup"] if i % 4 < 3 else ["<dog>"]
        references = [{"image": f"{name[:2]}.bmp", "class_name": name} for name in names]
        mask = "wide.png" if i % 10 == 4 else "prior.png"
        record = {"prompt": f"pair number <{i}>", "references": references, "winner": f"{i}w.bmp", "loser": f"{i}l.bmp"}
        noted = {3: {"meta": {"resemblance": 0.95}}, 20: {"meta": {"resemblance": 0.8}}, 21: {"meta": {"resemblance": "high"}}}
        lines.append(json.dumps({**record, "prior": mask, **noted.get(i, {})}))
    if count > NO_JSON:
        lines[BROKEN - 1] = lines[BROKEN - 1].replace(f"{BROKEN - 1}w.bmp", "none.bmp")
        lines[NO_JSON - 1] = "{<script>document.body.remove()</script>"
    (folder / "pairs.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def thousand(tmp_path_factory):
    """The page of a thousand pairs: its folder."""
    folder = tmp_path_factory.mktemp("show")
    pairs = write_pairs(folder / "pairs", PAIRS)
    cards = show(pairs, folder / "page.html", 64, overwrite=False)
    assert len(cards) == PAIRS
    return folder


LOADING = """
  const cards = () => [...page.querySelectorAll("article")];
  const places = () => cards().map((card) => card.querySelector(".place").textContent);
  const loaded = () => [...page.images].filter((image) => image.complete && image.naturalWidth);
  seen.count = page.getElementById("count").textContent;
  await waiting(() => cards()[0].querySelector(".targets img").complete);
  await pause(1000);
  seen.cards = cards().length;
  seen.loaded = loaded().length;
  seen.height = page.documentElement.scrollHeight;
  view.scrollTo({ top: page.documentElement.scrollHeight });
  seen.end = await waiting(() => places().includes("pairs.jsonl:1000"));
  view.scrollTo({ top: page.documentElement.scrollHeight });
  seen.last = await waiting(() => cards().at(-1).querySelector(".targets img").naturalWidth);
  seen.first = await waiting(() => !places().includes("pairs.jsonl:1"));
  seen.cardsThere = cards().length;
  seen.heightThere = page.documentElement.scrollHeight;
"""


@browser
@pytest.mark.parametrize("as_file", [False, True], ids=["served", "from the disk"])
def test_thousand_pairs_of_which_those_near_the_sight_are_there(thousand, tmp_path, as_file):
    seen, asked = in_browser(thousand, tmp_path, LOADING, as_file=as_file)
    assert "error" not in seen and seen["console"] == [], seen
    assert seen["count"] == f"{PAIRS} pairs"
    images = len(list(thumbnails_of(thousand / "page.html").iterdir()))
    assert images > 4 * PAIRS and 4 <= seen["loaded"] < images / 10, "what is in sight is loaded, what is far below is not"
    assert 12 <= seen["cards"] < PAIRS / 5 and seen["cardsThere"] < PAIRS / 5, seen
    assert seen["end"] and seen["last"] == SIDE and seen["first"], "those at the end when one goes there, then not the first"
    assert 0.7 < seen["heightThere"] / seen["height"] < 1.4, "gaps are about as high as what they stand for"
    if not as_file:
        asked = {name for name in asked if name.endswith(".webp")}
        assert {"000000_winner.webp", f"{PAIRS - 2:06}_winner.webp"} <= asked and len(asked) < images / 3


CONTROLS = """
  const field = (id) => page.getElementById(id);
  const set = (id, value) => { field(id).value = value; field(id).dispatchEvent(new view.Event("input", { bubbles: true })); };
  const press = async (key, target) => {
    (target ?? page.activeElement).dispatchEvent(new view.KeyboardEvent("keydown", { key, bubbles: true, cancelable: true }));
    await pause();
  };
  const shown = () => [...page.querySelectorAll("article")].filter((card) => card.getClientRects().length);
  const look = (name) => {
    const [count, hash] = [field("count").textContent, view.location.hash];
    view.dispatchEvent(new view.Event("beforeprint")); // paper has all
    const places = new Set(shown().map((card) => card.querySelector(".place").textContent));
    seen[name] = { cards: places.size, count, hash, first: shown()[0]?.textContent };
    view.dispatchEvent(new view.Event("afterprint"));
    seen[name].afterwards = shown().length;
  };
  const choose = async (name, values) => {
    await press("Escape");
    for (const [id, value] of Object.entries(values)) set(id, value);
    await pause();
    look(name);
  };
  seen.options = [...field("problem").options].map((option) => [option.value, option.text]);
  look("all");
  await choose("cat", { subject: "cat" });
  await choose("dog", { subject: "<dog>" });
  await choose("sound", { problem: "none" });
  await choose("errors", { problem: "error" });
  await choose("winners", { problem: "error winner" });
  await choose("wide", { problem: "warning prior" });
  await choose("wide cats", { problem: "warning prior", subject: "cat" });
  await choose("text", { text: "<5>  PAIR" });
  await choose("in a problem", { text: "none.bmp" });
  await choose("nothing", { text: "zebra" });
  seen.nothing.message = !field("nothing").hidden;
  await choose("dogs again", { subject: "<dog>" });
  view.location.hash = "subject=cup";
  await pause();
  look("address");
  await press("Escape");
  look("cleared");
  set("order", "alike");
  await pause();
  seen.alike = [shown().slice(0, 3).map((card) => card.querySelector(".place").textContent), view.location.hash];
  seen.noted = shown()[0].querySelector(".alike").textContent;
  await press("Escape");
  await press("/");
  seen.searching = page.activeElement.id;
  await press("j");
  seen.typing = page.activeElement.id;
  page.activeElement.blur();
  const place = () => page.activeElement.querySelector(".place")?.textContent;
  seen.steps = [];
  for (const key of "jjk") {
    await press(key);
    seen.steps.push(place());
  }
  for (let i = 0; i < 99; i++) await press("j");
  seen.far = [place(), page.activeElement.getBoundingClientRect().top >= 0];
  view.scrollTo({ top: 0 });
  await waiting(() => page.querySelector("article")?.querySelector(".place").textContent === "pairs.jsonl:1");
  await press("j");
  seen.far.push(place());
  page.activeElement.blur();
  view.scrollTo({ top: 0 });
  await waiting(() => page.querySelector("article")?.querySelector(".place").textContent === "pairs.jsonl:1");
  set("subject", "cat");
  await pause();
  shown()[0].querySelector(".targets .enlarge").click();
  const dialog = page.getElementById("enlarged");
  seen.enlarged = [dialog.matches(":modal"), dialog.querySelectorAll("img").length];
  for (const key of ["Escape", "j"]) await press(key, dialog);
  dialog.close();
  await pause();
  await press("j");
  seen.kept = [field("subject").value, place()];
  await press("Escape");
  const outlined = () => getComputedStyle(page.querySelector("img.outlines")).display;
  seen.outlines = [outlined()];
  await press("o");
  seen.outlines.push(outlined());
  const broken = shown()[BROKEN - 1];
  seen.broken = broken.querySelector("li").textContent;
  seen.missing = broken.querySelectorAll(".missing").length;
"""


@browser
def test_filters_and_keys(thousand, tmp_path):
    """By the page's own controls."""
    seen, _ = in_browser(thousand, tmp_path, CONTROLS.replace("BROKEN", str(BROKEN)))
    assert "error" not in seen, seen

    def classes(i):
        return [] if i == NO_JSON - 1 else ["cat"] if i % 4 == 0 else ["cat", "cup"] if i % 4 < 3 else ["<dog>"]

    def count(fits):
        return sum(fits(i) for i in range(PAIRS))

    expected = {
        "all": PAIRS,
        "cat": count(lambda i: "cat" in classes(i)),
        "dog": count(lambda i: "<dog>" in classes(i)),
        "sound": PAIRS - 2 - PAIRS // 10,
        "errors": 2,
        "winners": 1,
        "wide": PAIRS // 10,
        "wide cats": count(lambda i: i % 10 == 4 and "cat" in classes(i)),
        "text": 1,
        "in a problem": 1,
        "nothing": 0,
        "address": count(lambda i: "cup" in classes(i)),
        "cleared": PAIRS,
    }
    assert {name: seen[name]["cards"] for name in expected} == expected
    for name, cards in expected.items():
        assert seen[name]["count"] == (f"{PAIRS} pairs" if cards == PAIRS else f"{cards} of {PAIRS} pairs")
    assert seen["alike"] == [["pairs.jsonl:4", "pairs.jsonl:21", "pairs.jsonl:1"], "#order=alike"] and seen["noted"] == " 0.95"
    assert "pair number <5>" in seen["text"]["first"], "markup in a prompt is text"
    assert seen["nothing"]["message"] and seen["wide cats"]["hash"] == "#subject=cat&problem=warning+prior"
    options = dict(seen["options"])
    assert options["none"] == f"Without problems ({expected['sound']})"
    assert options["error winner"] == "Error: winner (1)" and options["warning prior"] == f"Warning: prior ({PAIRS // 10})"
    assert (seen["searching"], seen["typing"]) == ("text", "text"), "a letter in the search field is no command"
    assert seen["steps"] == ["pairs.jsonl:1", "pairs.jsonl:2", "pairs.jsonl:1"]
    assert seen["far"] == ["pairs.jsonl:100", True, "pairs.jsonl:101"], "from the card that was left, wherever one scrolls"
    assert all(seen[name]["afterwards"] < PAIRS / 5 for name in expected)
    assert seen["enlarged"] == [True, 2], "the winner with its outlines"
    assert seen["kept"] == ["cat", "pairs.jsonl:2"], "the page's keys rest meanwhile, and go on from the card"
    assert seen["outlines"] == ["block", "none"]
    assert seen["broken"].startswith("error winner no such file: ") and seen["missing"] == 2, "winner and difference"


def data_of(page):
    """What a page's script makes cards of."""
    (found,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page.read_text(), re.S)
    return json.loads(found)


def test_page_is_whole_and_safe(tmp_path):
    """Without a browser: nothing is loaded from elsewhere, every thumbnail named is there, and markup in data is escaped."""
    page = tmp_path / "a #1.html"
    show(write_pairs(tmp_path / "pairs", 12), page, 32, overwrite=False)
    text, data = page.read_text(), data_of(page)
    assert not re.search(r"(src|href)=\"(https?:|//|/)|@import|url\(", text) and "default-src 'none'" in text
    pictures = [picture for card in data["cards"] for picture in (*card["references"], *card["targets"])]
    named = {f"{unquote(data['folder'])}/{name}" for picture in pictures for name in picture[4:] if name is not None}
    assert named == {str(file.relative_to(tmp_path)) for file in thumbnails_of(page).iterdir()}
    assert all(max(Image.open(tmp_path / name).size) <= 32 for name in named)
    assert "<dog>" not in text and "&lt;dog&gt;" in text and text.count("<script") == text.count("</script") == 3


HOSTILE = "</script><script>throw 1</script><!--<script>\u2028 \"'&amp; \\u0041 \u202e"


def write_hostile_pairs(folder):
    """In a folder whose name is no UTF-8, with markup in all texts."""
    pairs = write_pairs(folder / "pairs", 3)
    lines = [json.loads(line) for line in (pairs / "pairs.jsonl").read_text().splitlines()]
    lines[1]["prompt"] = lines[1]["references"][0]["class_name"] = HOSTILE
    lines[2]["winner"] = f"{HOSTILE}.png"
    (pairs / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return pairs.rename(folder / "a \udcff")


TEXTS = """
  const cards = [...page.querySelectorAll("article")];
  seen.prompt = cards[1].querySelector("h2").textContent;
  seen.caption = cards[1].querySelector("figcaption").textContent;
  seen.problem = cards[2].querySelector("li").textContent;
  seen.file = cards[0].querySelector(".place").title;
  const subject = page.getElementById("subject");
  subject.selectedIndex = [...subject.options].findIndex((option) => option.value.startsWith("<" + "/script>"));
  subject.dispatchEvent(new view.Event("input", { bubbles: true }));
  seen.count = page.getElementById("count").textContent;
"""


@browser
def test_texts_are_texts(tmp_path):
    folder = tmp_path / "shown"
    folder.mkdir()
    show(write_hostile_pairs(folder), folder / "page.html", 32, overwrite=False)
    (tmp_path / "profile").mkdir()
    seen, _ = in_browser(folder, tmp_path / "profile", TEXTS)
    assert "error" not in seen and seen["console"] == [], seen
    assert seen["prompt"] == f"pairs.jsonl:2 {HOSTILE}" and seen["caption"] == HOSTILE and seen["count"] == "1 of 3 pairs"
    assert f"{HOSTILE}.png" in seen["problem"] and seen["file"].endswith("/a \\udcff/pairs.jsonl")


def test_thumbnails_show_the_pair(tmp_path):
    """The difference is twice the colour's and black elsewhere; the outline follows the prior's border."""
    folder = tmp_path / "pairs"
    write_pairs(folder, 1)
    winner = Image.new("RGB", (SIDE, SIDE), (100, 100, 100))
    winner.save(folder / "0w.bmp")
    winner.paste((140, 100, 100), BOX)
    winner.save(folder / "0l.bmp")
    show(folder, tmp_path / "page.html", SIDE, overwrite=False)
    thumbnails = thumbnails_of(tmp_path / "page.html")
    difference = np.asarray(Image.open(thumbnails / "000000_difference.webp").convert("RGB")).astype(int)
    assert abs(difference[20, 20] - (80, 0, 0)).max() < 25 and difference[40, 40].max() < 25
    outline = np.asarray(Image.open(thumbnails / "000000_winner_outlines.webp").convert("RGBA"))
    assert outline[8, 20].tolist() == [255, 45, 149, 255] and outline[31, 20, 3] == 255
    assert [outline[y, x, 3] for y, x in ((7, 20), (20, 20), (32, 20), (40, 40))] == [0, 0, 0, 0]


def test_outline_at_the_edge_and_of_a_dot():
    whole = np.asarray(outlines_of([(Image.new("L", (64, 64), 255), "#ffffff")], (32, 32)))
    assert whole[0, 16, 3] == 255 and whole[16, 31, 3] == 255 and whole[16, 16, 3] == 0
    dot = Image.new("L", (64, 64))
    dot.putpixel((20, 20), 255)
    assert np.asarray(outlines_of([(dot, "#ffffff")], (16, 16)))[5, 5, 3] == 255
    assert not np.asarray(outlines_of([(Image.new("L", (64, 64)), "#ffffff")], (16, 16))).any()


def test_command(tmp_path, caplog):
    pairs, page = str(write_pairs(tmp_path / "pairs", 12)), str(tmp_path / "page.html")
    with caplog.at_level(logging.INFO):
        cli.main(["data", "show", pairs, "--out", page, "--size", "32"])
    assert f"{page}: 12 pairs, 3 with problems" in caplog.text
    with pytest.raises(SystemExit, match="out: .*--overwrite true"):
        cli.main(["data", "show", pairs, "--out", page])
    with pytest.raises(SystemExit, match="no such dataset"):
        cli.main(["data", "show", str(tmp_path / "none"), "--out", str(tmp_path / "other.html")])
    with pytest.raises(SystemExit, match="size: got 4; expected 16 to 2048 pixels"):
        cli.main(["data", "show", pairs, "--size", "4"])


REFUSED = {
    "another's page": (lambda f: (f / "page.html").write_text("<p>mine</p>"), "page.html was not written by `focusdpo data"),
    "a file for the folder": (lambda f: (f / "page_files").touch(), "page_files is a file"),
    "a folder for the page": (lambda f: (f / "page.html").mkdir(), "page.html is a folder"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses_what_it_did_not_write(tmp_path, case):
    make, message = REFUSED[case]
    make(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises((FileExistsError, NotADirectoryError), match=f"^out: .*{message}"):
        show(tmp_path / "no pairs are looked for", tmp_path / "page.html", 32, overwrite=True)
    assert sorted(tmp_path.rglob("*")) == before


def test_overwrite_deletes_only_its_own(tmp_path):
    pairs, page = write_pairs(tmp_path / "pairs", 3), tmp_path / "page.html"
    show(pairs, page, 32, overwrite=False)
    old = {file.name for file in thumbnails_of(page).iterdir()}
    (tmp_path / "page_files" / "notes.txt").write_text("mine")
    (pairs / "pairs.jsonl").write_text((pairs / "pairs.jsonl").read_text().splitlines()[0])
    with pytest.raises(FileExistsError, match="^out: "):
        show(pairs, page, 32, overwrite=False)
    show(pairs, page, 32, overwrite=True)
    assert {file.name for file in thumbnails_of(page).iterdir()} < old
    assert (tmp_path / "page_files" / "notes.txt").read_text() == "mine" and len(data_of(page)["cards"]) == 1


def test_out_has_to_be_a_page(tmp_path):
    with pytest.raises(ValueError, match="^out: got .*expected a file that ends with .html"):
        show(tmp_path, tmp_path / "page.png", 32, overwrite=False)
