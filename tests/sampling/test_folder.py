"""The folder of `focusdpo sample`: what is missing is made to the same bits, and nothing else is gone on with."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from PIL import Image

from focusdpo.commands import cli
from focusdpo.data.prompts import read_prompts
from focusdpo.metrics.images import find_images
from tests import PATIENCE, ROOT
from tests.sampling.studies import contents, load, model_words, sample, write_manifest, write_random_lora


@pytest.fixture(scope="module")
def lora(tiny_flux, tmp_path_factory):
    return write_random_lora(load("flux", tiny_flux), tmp_path_factory.mktemp("lora"))


@pytest.fixture
def words(tiny_flux, lora, tmp_path):
    """Three prompts at 64 px in two steps; the folder is tmp_path / "out"."""
    common = [*model_words("flux", tiny_flux), "--lora", lora, "--size", "64x64", "--steps", 2]
    return [*common, "--manifest", write_manifest(tmp_path), "--output_dir", tmp_path / "out"]


def images(folder):
    return contents(folder, "images/*.png")


def test_names_are_what_evaluate_takes(words, tmp_path):
    sample(*words, "--images_per_prompt", 2)
    found, missing = find_images(tmp_path / "out" / "images", read_prompts(tmp_path / "prompts.jsonl"), 2, False)
    assert [(image.name, image.line) for image in found] == [(f"{n:04d}_{k}.png", n) for n in (1, 2, 3) for k in (0, 1)]
    assert not missing and len(set(images(tmp_path / "out").values())) == 6, "each has noise of its own"


def test_only_what_is_missing_is_made(words, tmp_path, monkeypatch):
    """More images a prompt, more lines, and one that was lost: the same bits as all at once, from its own seed alone."""
    whole = [*words[:-1], tmp_path / "whole", "--images_per_prompt", 3]
    sample(*whole)
    manifest = tmp_path / "prompts.jsonl"
    lines = manifest.read_text().splitlines(keepends=True)
    manifest.write_text("".join(lines[:2]))
    sample(*words)
    made, kept = [], images(tmp_path / "out")
    assert sorted(kept) == ["images/0001_0.png", "images/0002_0.png"]
    (tmp_path / "out" / "images" / "0001_0.png").unlink()
    (tmp_path / "out" / "images" / ".0002_0.png.elsewhere-77.partial").write_bytes(b"half")
    manifest.write_text("".join(lines))
    save = Image.Image.save
    monkeypatch.setattr(Image.Image, "save", lambda image, file, *more: made.append(file.name) or save(image, file, *more))
    sample(*words, "--images_per_prompt", 3)
    assert len(made) == 8 and not any(name.startswith(".0002_0") for name in made)
    assert images(tmp_path / "out") == images(tmp_path / "whole")
    assert sorted(os.listdir(tmp_path / "out" / "images")) == sorted(os.listdir(tmp_path / "whole" / "images"))


def test_a_second_start_with_nothing_to_do_loads_no_model(words, tmp_path, monkeypatch):
    sample(*words)
    monkeypatch.setattr("focusdpo.commands.sample.load", lambda *_: pytest.fail("nothing is missing"))
    sample(*words)


def test_a_killed_process_goes_on(words, tmp_path):
    """Killed by the system in the middle of its third image: that one is not there, and all come out as if it had not been."""
    sample(*words[:-1], tmp_path / "whole", "--images_per_prompt", 2)
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)  # a fork has none of its parent's threads
        try:
            run_killed(words)
        finally:
            os._exit(0)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
    left = sorted(os.listdir(tmp_path / "out" / "images"))
    assert [name for name in left if not name.startswith(".")] == ["0001_0.png", "0001_1.png"] and len(left) == 3
    sample(*words, "--images_per_prompt", 2)
    assert images(tmp_path / "out") == images(tmp_path / "whole")
    assert not list((tmp_path / "out").rglob("*.partial"))


def run_killed(words):
    save, saved = Image.Image.save, []

    def killed(image, file, *more):
        saved.append(file)
        if len(saved) == 3:
            file.write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
        save(image, file, *more)

    Image.Image.save = killed
    sample(*words, "--images_per_prompt", 2)


BEGUN = "the begun set of images has"
OTHERS = {
    "--steps 3": f"settings.steps: {BEGUN} 2, got 3",
    "--seed 1": f"settings.seed: {BEGUN} 0, got 1",
    "--size 64x96": f"settings.size: {BEGUN} '64x64', got '64x96'",
    "--guidance 2": f"settings.guidance: {BEGUN} None, got 2.0",
    "--images_per_prompt 1": f"settings.images_per_prompt: {BEGUN} 2, got 1",
    "--lora_scale 0.5": f"settings.lora_scale: {BEGUN} 1.0, got 0.5",
    "--model.dtype bf16": f"model.dtype: {BEGUN} 'fp32', got 'bf16'",
    "another prompt": f"prompts.line 2: {BEGUN} 'a dog [",
    "another reference": f"prompts.line 1: {BEGUN} 'a cat and a cup [",
}


def test_other_settings_are_refused_by_name(words, tmp_path, monkeypatch):
    manifest, photos = tmp_path / "prompts.jsonl", tmp_path / "photos"
    sample(*words, "--images_per_prompt", 2)
    before, text, photo = images(tmp_path / "out"), manifest.read_text(), (photos / "photo0.png").read_bytes()
    monkeypatch.setattr("focusdpo.sampling.work.load_whole", lambda *_: pytest.fail("before a model is loaded"))
    for case, message in OTHERS.items():
        if case == "another prompt":
            manifest.write_text(text.replace("a dog", "a fox", 1))
        if case == "another reference":
            shutil.copy(photos / "photo2.png", photos / "photo0.png")
        with pytest.raises(SystemExit) as stop:
            sample(*words, "--images_per_prompt", 2, *(case.split() if case.startswith("--") else ()))
        assert message in stop.value.code and "start anew with --overwrite true" in stop.value.code
        manifest.write_text(text)
        (photos / "photo0.png").write_bytes(photo)
    assert images(tmp_path / "out") == before
    monkeypatch.undo()
    sample(*words, "--seed", 1, "--overwrite", "true")
    assert images(tmp_path / "out").keys() == {f"images/000{n}_0.png" for n in (1, 2, 3)}, "the others are gone"
    assert not set(images(tmp_path / "out").values()) & set(before.values())


def test_another_lora_is_refused_by_its_content(words, tmp_path, lora):
    sample(*words)
    shutil.copytree(lora, tmp_path / "moved")
    sample(*words, "--lora", tmp_path / "moved")
    with pytest.raises(SystemExit, match=r"model.lora \(its content\): the begun set of images has '\w+', got None"):
        cli.main([str(word) for word in ["sample", *words[: words.index("--lora")], *words[words.index("--lora") + 2 :]]])


def test_what_others_put_there_stays(words, tmp_path):
    (tmp_path / "out" / "images").mkdir(parents=True)
    mine = tmp_path / "out" / "images" / "0002_0.png"
    mine.write_bytes(b"mine")
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(SystemExit, match="holds images/0002_0.png, which this command did not write"):
        sample(*words, "--overwrite", "true")
    assert mine.read_bytes() == b"mine"
    mine.unlink()
    sample(*words)
    kept = tmp_path / "out" / "images" / "favourite.png"
    kept.write_bytes(b"mine")
    sample(*words, "--seed", 3, "--overwrite", "true")
    assert kept.read_bytes() == b"mine" and (tmp_path / "out" / "notes.txt").read_text() == "mine"


HERE = "--model.path {model} --prompt a"  # {model} is one that is there
REFUSED = {
    "--prompt a": "config, model: got neither; expected a run, or --model.path",
    "--config x --model.path y --prompt a": "config, model: got both",
    "--model.path y": "prompt, manifest: got neither; expected one prompt, or a file",
    "--model.path y --prompt a --manifest m": "prompt, manifest: got both",
    "--model.path y --prompt=": "prompt: got ''; expected a text that is not empty",
    "--model.path y --manifest m --references a.png": "references: got ['a.png']; expected none with --manifest",
    "--model.path y --prompt a --checkpoint latest": "checkpoint: got 'latest'; expected none without --config",
    "--config x --prompt a --checkpoint latest --lora l": "checkpoint: got 'latest'; expected none together with --lora",
    "--model.path y --prompt a --lora_scale 2": "lora_scale: got 2.0; expected 1 without a LoRA",
    "--model.path y --prompt a --lora l --lora_scale 0": "lora_scale: got 0.0; expected a finite number other than 0",
    "--model.path y --prompt a --compare true": "compare: got True; expected false without a LoRA",
    "--config x --checkpoint none --prompt a --compare true": "compare: got True; expected false without a LoRA",
    "--model.path y --prompt a --size large": "size: got 'large'; expected width and height in pixels, such as 768x512",
    "--model.path y --prompt a --images_per_prompt 0": "images_per_prompt: got 0; expected at least 1",
    "--model.path y --prompt a --steps 0": "steps: got 0; expected at least 1, or null",
    "--model.path y --prompt a --guidance -1": "guidance: got -1.0; expected 0 or more, or null",
    "--model.path y --prompt a --cfg_scale -1": "cfg_scale: got -1.0; expected 0 or more, or null",
    "--model.path y --prompt a --seed -1": "seed: got -1; expected 0 <= seed < 2^32",
    "--model.path y --prompt a --output_dir=": "output_dir: got ''; expected a folder",
    "--config nowhere --prompt a": "config: no such file: nowhere; expected a training run's folder",
    "--model.path ./nowhere --prompt a": "model.path: no such folder: ./nowhere",
    "--model.path {model} --manifest nowhere": "manifest: no such file: nowhere",
    f"{HERE} --lora nowhere": "lora: no such file or folder: nowhere",
    f"{HERE} --size 500x60": "size: got '500x60'; expected multiples of 16 pixels, such as 496x64",
    f"{HERE} --references a b c d e f g": "expected at most 6 images",
    f"{HERE} --references a.png": "--prompt:1: references[0].image: no such file: a.png; copy it there",
}


@pytest.mark.parametrize("given", REFUSED)
def test_refused_before_a_model_is_loaded(tiny_flux, tmp_path, monkeypatch, given):
    monkeypatch.setattr("focusdpo.sampling.work.load_whole", lambda *_: pytest.fail("before a model is loaded"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        sample(*given.format(model=tiny_flux).split())
    assert REFUSED[given] in stop.value.code and not list(tmp_path.iterdir()), "and nothing is left"


def test_all_problems_of_a_manifest_at_once(words, tmp_path, monkeypatch):
    monkeypatch.setattr("focusdpo.sampling.work.load_whole", lambda *_: pytest.fail("before a model is loaded"))
    (tmp_path / "photos" / "photo0.png").write_bytes(b"no image")
    (tmp_path / "photos" / "photo2.png").unlink()
    with pytest.raises(SystemExit) as stop:
        sample(*words)
    found = [line.strip() for line in stop.value.code.splitlines()[1:]]
    assert [line.split(": ")[0].rpartition(":")[2] + " " + line.split(": ")[1] for line in found] == [
        "1 references[0].image", "2 references[0].image", "3 references[1].image",
    ]  # fmt: skip
    assert "cannot be read as an image" in found[0] and "no such file" in found[1]
    write_manifest(tmp_path)
    Image.new("RGB", (2000, 8)).save(tmp_path / "photos" / "photo2.png")
    with pytest.raises(SystemExit, match=r"prompts.jsonl:2: references\[0\].image: .* expected sides of at least 16 px"):
        sample(*words)


def test_a_pipeline_that_needs_references(tmp_path):
    words = ["--model.path", tmp_path, "--model.backbone", "qwen-edit-plus", "--prompt", "a"]
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(SystemExit, match=r"--prompt:1: references: expected 1 or more, got 0; name the images"):
        sample(*words)


def test_a_lora_for_another_model(words, tmp_path):
    from tests.sampling.studies import WRITE

    other = write_random_lora(load("klein", WRITE["klein"](tmp_path / "klein")), tmp_path / "other")
    with pytest.raises(SystemExit, match=r"lora: .*other/pytorch_lora_weights.safetensors: "):
        sample(*words, "--lora", other)
    assert not (tmp_path / "out").exists()


def test_a_run_without_lora_says_what_to_do(config, tmp_path):
    from dataclasses import asdict

    import yaml

    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(asdict(config)))
    with pytest.raises(SystemExit, match="checkpoint: no checkpoint under .* expected one, or 'none' for the model without it"):
        sample("--config", file, "--prompt", "a", "--output_dir", tmp_path / "out")


LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
          "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]  # fmt: skip


def launched(*words, case=""):
    command = [*LAUNCH, str(ROOT / "tests" / "sampling" / "sample_worker.py"), *map(str, words)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CASE": case, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, cwd=ROOT, env=environment)


def test_two_processes_make_what_one_makes(words, tmp_path):
    """Bit for bit; the first alone shows progress. Where one fails, both end and one says why; what was made stays."""
    sample(*words[:-1], tmp_path / "alone", "--images_per_prompt", 3)
    failed = launched(*words, "--images_per_prompt", 3, case="fails")
    assert failed.returncode != 0 and "no space on rank 1" in failed.stderr.replace("\r", "\n").split("Root Cause")[-1]
    made = images(tmp_path / "out")
    assert made and "images/0003_2.png" not in made
    done = launched(*words, "--images_per_prompt", 3)
    assert done.returncode == 0, done.stderr[-3000:]
    assert images(tmp_path / "out") == images(tmp_path / "alone")
    assert done.stderr.count("9 images, ") == 1 and done.stderr.count("sampling:   0%") == 1
    listed = json.loads((tmp_path / "out" / ".focusdpo" / "sample.json").read_text())
    assert listed["through"] and set(images(tmp_path / "out")) <= listed["files"].keys()
