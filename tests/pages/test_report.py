"""The page of a run: what the curves keep of a long one, what the page shows in a browser, and what is refused."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import logging
import math
import re
import shutil
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from accelerate.state import AcceleratorState
from PIL import Image

from focusdpo.commands import cli
from focusdpo.drawing.training_curves import PANELS, smooth
from focusdpo.foundation.files import is_stamped
from focusdpo.foundation.journals import read_rows
from focusdpo.foundation.output_folder import OutputFolder
from focusdpo.pages import html as pages
from focusdpo.pages.run.binning import read_run
from focusdpo.pages.run.facts import _held_out
from focusdpo.pages.run.films import evenly, read_films
from focusdpo.pages.run.page import write_run_page
from focusdpo.pages.run.plotly_figures import MARKS, panel_figure
from focusdpo.training import health
from focusdpo.training.callbacks import Callback
from focusdpo.training.config import SamplesConfig
from focusdpo.training.run_files import WRITTEN, read_starts
from focusdpo.training.run_folder import RunFolder
from focusdpo.training.trainer import Trainer
from tests import PATIENCE
from tests.browser import browser, in_browser
from tests.synthetic_run import NOT_A_NUMBER, SPIKE, write_run, write_samples

DIFFERENCE = "error/policy_win-error/reference_win"
PLOTS = len(PANELS) + 6 + 1  # those by time, and the heat map


# Curves


def test_bins_against_numpy(tmp_path):
    """5003 steps in bins of 51: means, ranges and NaN of every bin as numpy finds them in the whole file."""
    file = write_run(tmp_path / "run", 5003) / "metrics.jsonl"
    run = read_run(file, ["loss", DIFFERENCE, "beta"], points=100, progress=False)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert (run.first, run.last, run.width, len(run.steps)) == (1, 5003, 51, 99)
    assert run.steps[0] == 26 and run.steps[-1] == np.mean(range(1 + 98 * 51, 5004))
    expected = {
        "loss": np.array([row["loss"] for row in rows]),
        DIFFERENCE: np.array([row["error/policy_win"] - row["error/reference_win"] for row in rows]),
        "beta": np.full(5003, 2000.0),
    }
    assert run.curves.keys() == expected.keys()
    for line, values in expected.items():
        curve, padded = run.curves[line], np.pad(values, (0, 99 * 51 - 5003), constant_values=math.nan).reshape(99, 51)
        np.testing.assert_allclose(curve.mean, np.nanmean(padded, 1), rtol=1e-12)
        np.testing.assert_array_equal(curve.low, np.nanmin(padded, 1))
        np.testing.assert_array_equal(curve.high, np.nanmax(padded, 1))
        np.testing.assert_array_equal(curve.bad, [0] * 68 + [1] + [0] * 30 if line == "loss" else 0)
    assert run.curves["loss"].high.max() == 9.0, "a spike of one step is not averaged away"
    assert run.pairs == 4 * 5003 and run.seconds == pytest.approx(sum(4 / row["pairs_per_second"] for row in rows))


def test_metrics_that_some_rows_lack(tmp_path):
    """As those of a bin of times without pairs: the mean is over the rows that have them, and a bin without any has none."""
    rows = [{"step": i, "loss": 1.0, **({"margin": float(i)} if i in (2, 3, 9) else {})} for i in range(1, 11)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = read_run(tmp_path / "metrics.jsonl", ["margin", "logit"], points=5, progress=False)
    np.testing.assert_array_equal(run.curves["margin"].mean, [2, 3, math.nan, math.nan, 9])
    assert not run.curves["margin"].bad.any() and "logit" not in run.curves


def test_memory_does_not_grow_with_the_run(tmp_path):
    peaks = []
    for steps in (2000, 8000):
        file = write_run(tmp_path / str(steps), steps, distinct=500) / "metrics.jsonl"
        tracemalloc.start()
        read_run(file, ["loss", "margin"], points=200, progress=False)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0] + 2**20, "all rows at once would take four times as much"
    assert peaks[1] < file.stat().st_size / 2


def test_a_run_that_diverged_is_not_called_better():
    def mood(*losses):
        return [fact.mood for fact in _held_out([{"step": 10 * i, "loss": loss} for i, loss in enumerate(losses)])]

    assert mood(0.69, 0.5) == ["good"] and mood(0.69, 0.9) == ["bad"] and mood(0.69, 0.69) == [""]
    assert mood(0.69, math.nan) == mood(math.nan, 0.5) == mood(0.69, -math.inf) == ["bad"]


def test_a_run_of_100_000_steps(tmp_path):
    folder = write_run(tmp_path / "run", 100_000, distinct=1000)
    page, metrics = tmp_path / "page.html", folder / "metrics.jsonl"
    held_out, alarm = (json.loads((folder / f"{name}.jsonl").read_text().splitlines()[0]) for name in ("validation", "alarms"))
    (folder / "validation.jsonl").write_text("".join(json.dumps(held_out | {"step": n}) + "\n" for n in range(0, 100_000, 20)))
    (folder / "alarms.jsonl").write_text("".join(json.dumps(alarm | {"step": n}) + "\n" for n in range(1, 100_000, 20)))
    started = time.process_time()
    write_run_page(folder, page, progress=False)
    assert time.process_time() - started < PATIENCE, "seconds of a processor"
    assert metrics.stat().st_size > 2e8 and page.stat().st_size < 12e6
    traces = [trace for content in contents_of(page.read_text()) for trace in content["data"]]
    assert len(traces) > 100 and max(length_of(trace) for trace in traces) <= 2000
    marks = [trace for trace in traces if trace.get("name", "").endswith("held out") or trace.get("name") == "alarms"]
    assert marks and max(length_of(trace) for trace in marks if trace["mode"] != "lines") <= MARKS + 1
    text = next(trace["text"] for trace in marks if trace["name"] == "alarms" and "text" in trace)
    assert sum(int(words.split()[0]) for words in text) == 5000, "those that share a mark are counted"
    metrics.unlink()  # pytest keeps its folders


def contents_of(text: str) -> list[dict]:
    return [json.loads(found) for found in re.findall(r'<script type="application/json">(.*?)</script>', text, re.S)]


def length_of(trace: dict) -> int:
    x = trace["x"]
    return len(x) if isinstance(x, list) else len(base64.b64decode(x["bdata"])) // int(x["dtype"][-1])


def test_spikes_and_nan_are_marked(tmp_path):
    """The axis stays with the many; what leaves it is marked at its edge, and what is not finite by a cross."""
    run = read_run(write_run(tmp_path / "run", 3000) / "metrics.jsonl", PANELS["loss"].lines, points=300, progress=False)
    figure = panel_figure(PANELS["loss"], run, [], [], ["#336699"])
    traces = {trace.name: trace for trace in figure.data}
    assert figure.layout.yaxis.range[1] < 1.5
    (spike,), (step,) = traces["loss: off the axis"].customdata, traces["loss: off the axis"].x
    assert spike == 9.0 and abs(step - 3000 * SPIKE) < 10
    assert abs(traces["loss: not finite"].x[0] - 3000 * NOT_A_NUMBER) < 10
    smooth_run = read_run(tmp_path / "run" / "metrics.jsonl", PANELS["accuracy"].lines, points=300, progress=False)
    assert not any("off" in trace.name for trace in panel_figure(PANELS["accuracy"], smooth_run, [], [], ["#336699"]).data)


def test_smoothing_passes_over_nan():
    values = np.arange(100.0)
    values[40] = math.nan
    smoothed = smooth(values)
    assert np.isfinite(smoothed).all() and smoothed[40] == pytest.approx(40) and smoothed[20] == pytest.approx(20)
    assert np.isnan(smooth(np.full(3, math.nan))).all()


def test_a_killed_and_a_damaged_file(tmp_path, caplog):
    file = write_run(tmp_path / "run", 50) / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join([*lines[:9], "\x00\x00\n", "[1]\n", *lines[11:]]) + '{"step": 51, "lo')
    run = read_run(file, ["loss"], points=100, progress=False)
    assert (run.first, run.last) == (1, 50) and np.isnan(run.curves["loss"].mean[9:11]).all()
    assert "metrics.jsonl:10: left out" in caplog.text and "metrics.jsonl:11: left out" in caplog.text
    assert "metrics.jsonl:51" not in caplog.text, "a line cut short is no damage"
    assert len(list(read_rows(file))) == 48


# Pictures


def test_steps_are_chosen_evenly_in_time():
    assert evenly([0, 10, 20], 5) == [0, 10, 20]
    assert evenly(list(range(0, 1001, 10)), 5) == [0, 250, 500, 750, 1000]
    assert evenly([0, 1, 2, 3, 4, 50, 100], 3) == [0, 50, 100] and evenly([0, 5, 9], 1) == [9]


def test_pictures_are_bounded(tmp_path, caplog):
    write_samples(tmp_path, list(range(0, 70, 10)), 3)
    samples = tmp_path / "samples"
    (samples / "step-000030" / "0.png").write_bytes(b"no picture")
    (samples / "step-000070.partial").mkdir()
    films = read_films(samples, 12, 300, progress=False)
    assert [(film.name, film.available) for film in films] == [("0", 7), ("1", 7), ("2", 7)]
    assert [[shot.step for shot in film.shots] for film in films] == [[0, 60]] * 3
    sizes = [Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).size for uri in films[1].shots[1].images.values()]
    assert sizes == [(300, 94), (284, 300)]
    assert [film.name for film in read_films(samples, 5, 300, progress=False)] == ["0", "1"], "whole pairs"
    assert read_films(samples, 1, 300, progress=False) == [] == read_films(tmp_path / "none", 12, 300, progress=False)
    assert [len(shot.images) for shot in read_films(samples, 100, 300, progress=False)[0].shots] == [2, 2, 2, 1, 2, 2, 2]
    assert "0.png: left out, it cannot be read" in caplog.text


def test_image_uri_keeps_what_is_clear():
    image = Image.new("RGBA", (40, 20), (255, 0, 0, 0))
    shown = Image.open(io.BytesIO(base64.b64decode(pages.image_uri(image, 10).partition(",")[2])))
    assert shown.size == (10, 5) and shown.convert("RGBA").getpixel((5, 2))[3] == 0


# The page in a browser

LOOK = """
  const plots = [...page.querySelectorAll(".plot")];
  await waiting(() => plots[0].querySelector(".js-line"));
  seen.atOnce = plots.filter((plot) => plot.querySelector(".main-svg")).length;
  for (const plot of plots) {
    plot.scrollIntoView({ behavior: "instant" });
    await waiting(() => plot.querySelector(".main-svg .xtick, .failed"));
  }
  await pause(300);
  seen.plots = plots.map((plot) => ({
    id: plot.id,
    drawn: [...plot.querySelectorAll(".js-line")].filter((line) => /L|H/.test(line.getAttribute("d"))).length
      + plot.querySelectorAll(".heatmaplayer image").length,
    failed: plot.querySelectorAll(".failed").length,
    alarms: plot.querySelectorAll(".overplot .point").length,
  }));
  const buttons = [...page.querySelectorAll(".modebar-btn")].map((button) => button.dataset.title);
  seen.buttons = [...new Set(buttons)];
  const canvas = (id) => page.querySelector(`#${id} .canvas`);
  await view.Plotly.relayout(canvas("learning-0"), { "xaxis.range": [100, 200] });
  await pause(300);
  seen.zoomed = ["learning-1", "by-time-0", "coverage-histogram"].map((id) => canvas(id).layout.xaxis.range);
  await view.Plotly.relayout(canvas("learning-1"), { "xaxis.autorange": true });
  await pause(300);
  seen.reset = canvas("learning-0").layout.xaxis.autorange;
  for (const image of page.images) image.loading = "eager";
  for (const image of page.images) await image.decode();
  seen.images = [...page.images].filter((image) => image.naturalWidth > 0).length;
  const film = page.querySelector(".film");
  const shots = [...film.querySelectorAll(".shot")];
  const shown = () => shots.filter((shot) => shot.getClientRects().length).map((shot) => shot.dataset.label);
  seen.film = [shown()];
  const slider = film.querySelector("input");
  slider.value = 0;
  slider.dispatchEvent(new view.Event("input"));
  seen.film.push(shown());
  film.querySelectorAll(".frames button")[1].click();
  seen.film.push(shown(), [film.querySelector("output").textContent, slider.value]);
  seen.contents = [...page.querySelectorAll("nav a")].map((link) => [link.textContent, !!page.querySelector(link.hash)]);
  seen.text = page.querySelector("main").innerText;
"""
SECTIONS = [
    "Summary", "Alarms", "Learning", "Focus", "By time", "Optimisation and cost", "Samples over training",
    "Configuration", "Environment",
]  # fmt: skip


@pytest.fixture(scope="module")
def long_page(tmp_path_factory):
    """The page of a run of 20,000 steps that was killed at 20,000 of 30,000, with samples of two pairs at five steps."""
    folder = tmp_path_factory.mktemp("report")
    run = write_run(folder / "run", 20_000, max_steps=30_000, distinct=2000)
    write_samples(run, [0, 5000, 10_000, 15_000, 20_000], 2)
    write_run_page(run, folder / "page.html", max_images=12, image_size=320, progress=False)
    shutil.rmtree(run)
    return folder


@browser
@pytest.mark.parametrize("as_file", [False, True], ids=["served", "from the disk"])
def test_page_in_a_browser(long_page, tmp_path, as_file):
    seen, asked = in_browser(long_page, tmp_path, LOOK, as_file=as_file)
    assert "error" not in seen and seen["console"] == [], seen
    assert [name for name in seen["requests"] if not name.startswith(("data:", "blob:"))] == []
    assert asked <= {"driver.html", "page.html", "seen", "favicon.ico"}, "of which the driver's frame asks for the icon"
    assert len(seen["plots"]) == PLOTS and 0 < seen["atOnce"] < PLOTS / 2, "what is far below is drawn when one goes there"
    for plot in seen["plots"]:
        assert plot["drawn"] >= 1 and not plot["failed"], plot
        assert plot["alarms"] >= 1 or plot["id"] == "coverage-histogram", plot
    assert seen["buttons"] == ["Download plot as a PNG", "Zoom", "Pan", "Reset axes"], "none that sends data anywhere"
    assert seen["zoomed"] == [[100, 200]] * 3 and seen["reset"]
    assert seen["images"] == 2 * 3 * 3, "for each pair and step a sheet, masks and a thumbnail"
    assert seen["film"] == [["step 20,000"], ["step 0"], ["step 10,000"], ["step 10,000", "1"]]
    assert seen["contents"] == [[name, True] for name in SECTIONS]
    for text in (
        "running, or stopped at step 20,000",
        "20,000 of 30,000 steps",
        "pairs/<train>",
        "over 50 steps <both> errors rise",
        "in bins of 10",
        "3 of 5 steps",
        "8 pairs per second",
        "40.0 GiB",
    ):
        assert text in seen["text"], text


WIDTHS = """
  const plots = [...page.querySelectorAll(".plot")];
  for (const plot of plots) {
    plot.scrollIntoView({ behavior: "instant" });
    await waiting(() => plot.querySelector(".main-svg .xtick, .failed"));
  }
  await pause(500);
  TURN
  const box = (element) => element.getBoundingClientRect();
  seen.legends = plots.filter((plot) => plot.querySelector(".legend")).map((plot) => {
    const [legend, bar, area] = [".legend", ".modebar", ".nsewdrag"].map((one) => box(plot.querySelector(one)));
    return [plot.id, legend.top >= bar.bottom || legend.right <= bar.left, legend.bottom <= area.top, area.height];
  });
  seen.overflow = page.documentElement.scrollWidth - view.innerWidth;
  const told = page.querySelector(".alarms td:last-child");
  seen.alarm = [box(told).right <= view.innerWidth, box(told).width, parseFloat(view.getComputedStyle(told).fontSize)];
  const sheets = [...page.querySelectorAll(".shot:not([hidden]) .enlarge")];
  seen.sheets = sheets.map((sheet) => {
    const image = sheet.querySelector("img");
    return [image.naturalWidth, image.clientWidth, sheet.scrollWidth, box(sheet).right <= view.innerWidth];
  });
  const dialog = page.getElementById("enlarged");
  sheets[1].click();
  seen.enlarged = [dialog.matches(":modal"), dialog.querySelector("img").src === sheets[1].querySelector("img").src];
  const shown = dialog.querySelector("img");
  await waiting(() => shown.clientWidth);
  seen.size = [shown.clientWidth, shown.naturalWidth];
  const press = (key) => page.activeElement.dispatchEvent(new view.KeyboardEvent("keydown", { key, bubbles: true }));
  press("ArrowRight");
  seen.next = dialog.querySelector("img").alt;
  dialog.click();
  seen.closed = [dialog.open, page.activeElement.querySelector("img").alt];
  seen.keyboard = sheets.every((sheet) => sheet.matches("button[type=button]"));
"""


@browser
@pytest.mark.parametrize(("first", "width"), [(1300, 1300), (800, 800), (390, 390), (800, 390), (390, 1300)])
def test_page_at_many_widths(tmp_path_factory, tmp_path, first, width):
    """Nothing overlaps or is cut, and pictures enlarge, on a desk and on a phone, also when that is turned."""
    folder = tmp_path_factory.mktemp("report")
    run = write_run(folder / "run", 200)
    write_samples(run, [0, 200], 2)
    message = "skipped, the gradient norm is nan; its pairs: " + ", ".join(f"{'/data' * 12}/pairs.jsonl:{i}" for i in range(8))
    (run / "alarms.jsonl").write_text(json.dumps({"name": "non_finite_gradient", "step": 9, "message": message}) + "\n")
    write_run_page(run, folder / "page.html", progress=False)
    turn = "" if first == width else f"document.querySelector('iframe').width = {width}; await pause(2000);"
    seen, _ = in_browser(folder, tmp_path, WIDTHS.replace("TURN", turn), width=first)
    assert "error" not in seen and seen["console"] == [], seen
    assert len(seen["legends"]) == 5 + 6, "of the panels with several lines"
    for name, is_clear, is_above, height in seen["legends"]:
        assert is_clear and is_above and height > 140, (name, "its legend leaves toolbar and plot alone")
    assert seen["overflow"] <= 0
    inside, wide, font = seen["alarm"]
    assert inside and wide > 250 and font >= 12
    for natural, shown, scrolled, is_inside in seen["sheets"]:
        assert is_inside and shown == (natural if width < 640 else min(natural, scrolled)) and shown > 500
    assert seen["enlarged"] == [True, True] and seen["size"][0] >= max(seen["size"][1], 0.9 * width), "scrolled, not shrunk"
    assert seen["next"] == "references, samples and winner, step 200", "of the next pair; what is hidden is passed over"
    assert seen["closed"] == [False, seen["next"]] and seen["keyboard"], "Enter and Space press a button"


@browser
def test_the_console_is_heard(tmp_path):
    """Without which the test above would see no error: thrown before the driver looks, written, or of a refused request."""
    rule = "<meta http-equiv=Content-Security-Policy content=\"default-src 'none'; script-src 'unsafe-inline'\">"
    script = "<script>setTimeout(() => { throw new Error('thrown') }); console.error('written'); fetch('other.html')</script>"
    (tmp_path / "page.html").write_text(rule + script)
    seen, asked = in_browser(tmp_path, tmp_path, "await pause(300);")
    for text in ("thrown", "written", "Content Security Policy"):
        assert any(text in line for line in seen["console"]), (text, seen)
    assert "other.html" not in asked


def test_page_is_one_file_and_safe(long_page):
    text = (long_page / "page.html").read_text()
    assert sorted(file.name for file in long_page.iterdir() if file.name != "driver.html") == ["page.html"]
    own = text.replace(pages.get_plotlyjs(), "")
    assert text.count(pages.get_plotlyjs()) == 1 and len(own) < len(text) / 2
    assert not re.search(r"(src|href)=\"(?!data:|#)|@import|url\(|https?://", own)
    assert "<train>" not in own and "&lt;train&gt;" in own and "<both>" not in own
    assert is_stamped(long_page / "page.html", "report")


def test_plot_cannot_end_its_script():
    figure = pages.go.Figure(pages.go.Scatter(x=[1], y=[1], name="</script><script>alert(1)</script>"))
    figure.update_layout(title_text="<b>bold</b>")
    html = str(pages.plot(figure, "a"))
    assert html.count("</script>") == 1 and "<b>" not in html and "&lt;b&gt;" in html
    (content,) = contents_of(html)
    assert content["data"][0]["name"] == "</script><script>alert(1)</script>" and "title" not in content["layout"]


# Runs that lack something


def test_a_run_that_has_nothing_yet(tmp_path):
    run = write_run(tmp_path / "run", 1)
    for name in ("metrics.jsonl", "validation.jsonl", "alarms.jsonl"):
        (run / name).unlink()
    write_run_page(run, tmp_path / "page.html", progress=False)
    text = (tmp_path / "page.html").read_text()
    assert 'class="plot"' not in text and text.count("No step is recorded yet.") == 4
    for said in (
        "not begun",
        "not evaluated",
        "only logged its alarms",
        "wrote no environment.json",
        "The run made no samples",
    ):
        assert said in text, said


def test_a_run_without_the_focus_mask(tmp_path):
    run = write_run(tmp_path / "run", 20)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows = [{name: value for name, value in row.items() if "focus/" not in name} for row in rows]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run / "validation.jsonl").unlink()
    settings = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(settings + "focus: {mask: prior}\nloss: {loss_type: ipo}\n")
    (run / "alarms.jsonl").write_text("")
    write_run_page(run, tmp_path / "page.html", progress=False)
    text = (tmp_path / "page.html").read_text()
    assert "The run has no focus mask: focus.mask is prior." in text and '<p class="note">None.</p>' in text
    assert text.count('class="plot"') == PLOTS - 2 - 1 - 1 and "Diffusion-DPO within the prior" in text
    loss = next(content for content in contents_of(text) if "sigmoid loss" in content["layout"]["meta"]["note"])
    assert "ln 2" not in json.dumps(loss["layout"].get("annotations", [])), "which means nothing to ipo"


# A run that was trained


SETTINGS = {
    "data.validation": "{pairs}", "focus.tau": 0.02, "max_steps": 8, "checkpoint_every": 3,
}  # fmt: skip


class KilledError(Exception):
    pass


class Hears(Callback):
    """Passes alarms on."""

    def __init__(self, hear):
        self.hear = hear

    def on_alarm(self, trainer, alarm):
        self.hear(alarm)


def test_alarms_and_environment_of_a_resumed_run(config, tmp_path, monkeypatch):
    """Killed at an alarm beyond its checkpoint, a run ends with the alarms of one that never stopped, and knows both starts."""
    monkeypatch.setattr(health, "WINDOW", 2)
    monkeypatch.setattr(health, "STUCK", 0.01)
    monkeypatch.setattr(health, "SATURATED", 1.0)
    heard = []
    Trainer(config, callbacks=[Hears(heard.append)]).train()
    AcceleratorState._reset_state(reset_partial_state=True)
    expected = (tmp_path / "run" / "alarms.jsonl").read_text()
    alarms = [json.loads(line) for line in expected.splitlines()]
    assert alarms == [dataclasses.asdict(alarm) for alarm in heard] and any(alarm["step"] in (4, 5) for alarm in alarms), alarms
    assert any(alarm["step"] <= 3 for alarm in alarms), "some before the checkpoint, which are not written twice"

    def kill(alarm):
        if alarm.step in (4, 5):
            raise KilledError

    killed = dataclasses.replace(config, output_dir=str(tmp_path / "killed"))
    with pytest.raises(KilledError):
        Trainer(killed, callbacks=[Hears(kill)]).train()
    AcceleratorState._reset_state(reset_partial_state=True)
    written = (tmp_path / "killed" / "alarms.jsonl").read_text()
    assert json.loads(written.splitlines()[-1])["step"] in (4, 5), "written before anyone else heard of it"
    samples = SamplesConfig(every=8, count=1, steps=1)
    Trainer(dataclasses.replace(killed, samples=samples, resume="latest")).train()
    assert (tmp_path / "killed" / "alarms.jsonl").read_text() == expected

    starts = json.loads((tmp_path / "killed" / "environment.json").read_text())
    assert [start["step"] for start in starts] == [0, 3]
    assert all((start["processes"], start["device"], start["training_pairs"]) == (1, "cpu", 8) for start in starts)
    assert any(line.startswith("torch ") for line in starts[0]["environment"])

    cli.main(["report", str(tmp_path / "killed"), "--image_size", "64"])
    text = (tmp_path / "killed" / "report.html").read_text()
    assert text.count('class="plot"') + text.count('class="plot wide"') == PLOTS
    assert "finished" in text and "<dd>8</dd>" in text and "Earlier starts" in text and text.count('class="shot"') == 1
    assert text.count('class="alarm"') == len(alarms)


def test_starts_of_a_run(tmp_path):
    """One that goes on from step 3 puts away what started there or later; a damaged file is begun anew."""
    run = RunFolder(OutputFolder("output_dir", tmp_path, "train", WRITTEN), None)
    for step in (0, 6, 3, 3):
        run.record_start(step, processes=2)
    starts = read_starts(tmp_path / "environment.json")
    assert [(start["step"], start["processes"]) for start in starts] == [(0, 2), (3, 2)]
    (tmp_path / "environment.json").write_text("[{")
    run.record_start(5)
    assert [start["step"] for start in read_starts(tmp_path / "environment.json")] == [5]


# The command


def test_command(tmp_path, caplog, monkeypatch):
    run = str(write_run(tmp_path / "run", 30))
    page = tmp_path / "run" / "report.html"
    with caplog.at_level(logging.INFO):
        cli.main(["report", run])
    assert f"{page}: " in caplog.text and page.is_file()
    (tmp_path / "run" / "metrics.jsonl").unlink()
    cli.main(["report", run])
    assert "not begun" in page.read_text(), "the run's own page is replaced"
    cli.main(["report", run, "--out", str(tmp_path / "other" / "page.html")])
    with pytest.raises(SystemExit, match="out: .*exists; replace it with --overwrite true"):
        cli.main(["report", run, "--out", str(tmp_path / "other" / "page.html")])
    cli.main(["report", run, "--out", str(tmp_path / "other" / "page.html"), "--overwrite", "true"])
    earlier = page.read_text()

    def fail(*arguments):
        raise KilledError

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(KilledError):
        cli.main(["report", run, "--points", "20"])
    assert page.read_text() == earlier, "an earlier page stays until the new one is whole"


REFUSED = {
    "no run": (lambda f: ["none"], "run_dir: no such folder"),
    "a file": (lambda f: ["run/config.yaml"], "run_dir: .* is a file"),
    "no settings": (lambda f: (f / "run" / "config.yaml").unlink() or ["run"], "run_dir: no such file: .*config.yaml"),
    "other settings": (lambda f: (f / "run" / "config.yaml").write_text("a: 1") and ["run"], "run_dir: .* does not hold"),
    "no page": (lambda f: ["run", "--out", "page.png"], "out: got .*page.png.*html"),
    "another's page": (
        lambda f: (f / "run" / "report.html").write_text("mine") and ["run"],
        "out: .* not written by `focusdpo rep",
    ),
    "a folder": (lambda f: (f / "run" / "report.html").mkdir() or ["run"], "out: .* is a folder"),
    "within a file": (lambda f: ["run", "--out", "run/config.yaml/page.html"], "out: .*config.yaml is a file"),
    "points": (lambda f: ["run", "--points", "3"], "points: got 3; expected at least 10"),
    "images": (lambda f: ["run", "--max_images", "-1"], "max_images: got -1; expected 0 or more"),
    "image size": (lambda f: ["run", "--image_size", "10"], "image_size: got 10; expected 64 to 4096 pixels"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name(tmp_path, monkeypatch, case):
    make, message = REFUSED[case]
    write_run(tmp_path / "run", 3)
    monkeypatch.chdir(tmp_path)
    arguments = make(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit, match=f"^focusdpo report: error: {message}"):
        cli.main(["report", *arguments])
    assert sorted(tmp_path.rglob("*")) == before
