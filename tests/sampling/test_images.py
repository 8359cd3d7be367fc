"""`focusdpo sample` against each pipeline's own call, and against `Backbone.sample` where the pipeline knows no references."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from diffusers.utils import load_image
from safetensors.torch import save_file

from focusdpo.data.images import read_photo
from focusdpo.models import TokenLayout
from focusdpo.models.lora_fusion import Update
from focusdpo.models.lora_reading import Lora
from focusdpo.models.lora_writing import write_lora
from focusdpo.training.seeding import seeded
from tests.models.test_uno_lora import uno_lora
from tests.sampling.studies import (
    TEXT,
    WRITE,
    load,
    model_words,
    pixels,
    random_lora,
    sample,
    write_manifest,
    write_photos,
    write_random_lora,
)

PROMPT, STEPS, SEED = "a cat and a cup", 2, 11
FEWER = {"kontext": 1, "qwen": 1}  # whose references have a megapixel
SIZE, GRID = (96, 64), (4, 6)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Of each kind a model and a LoRA, written once."""
    root, known = tmp_path_factory.mktemp("sampling"), {}

    def make(kind):
        if kind not in known:
            folder = WRITE[kind](root / kind)
            known[kind] = folder, write_random_lora(load(kind, folder), root / f"{kind}-lora")
        return known[kind]

    return make


def assert_same_picture(file, expected):
    """The pixels [1, 3, H, W] in [0, 1] as 8 bits, but for what rounds to another side."""
    difference = np.abs(pixels(file) - (expected[0].permute(1, 2, 0).numpy() * 255).round())
    assert difference.max() <= 1 and (difference > 0).mean() < 0.01, difference.max()


@pytest.mark.parametrize(
    ("kind", "count", "own"),
    [
        ("kontext", 1, {}),  # its pipeline takes one
        ("klein", 2, {"guidance_scale": 4.0}),
        ("dev", 2, {"guidance_scale": 4.0}),
        ("qwen", 1, {"true_cfg_scale": 4.0, "negative_prompt": " "}),
        ("flux", 0, {}),  # its pipeline takes none
        ("klein", 0, {}),
        ("kontext", 0, {}),
    ],
)
def test_it_is_the_pipelines_own_image(made, tmp_path, kind, count, own):
    """With the pipeline's own scales, sizes of references and preprocessing, which are left to it there, and here."""
    folder, lora = made(kind)
    files = write_photos(tmp_path)[:count]
    steps = FEWER.get(kind, STEPS)
    words = ["--prompt", PROMPT, *(("--references", *files) if files else ()), "--size", "96x64", "--steps", steps]
    words += ["--lora", lora, "--seed", SEED, "--images_per_prompt", 2, "--output_dir", tmp_path / "out"]
    sample(*model_words(kind, folder), *words)

    backbone = load(kind, folder)
    backbone.pipeline.load_lora_weights(lora, weight_name="pytorch_lora_weights.safetensors")
    backbone.pipeline.set_progress_bar_config(disable=True)
    latents = torch.randn(1, 24, 16, generator=seeded(SEED, 1, 1))
    if kind in ("klein", "dev"):
        latents = latents.transpose(1, 2).reshape(1, 16, *GRID)
    images = [load_image(str(file)) for file in files]
    arguments = {"prompt": PROMPT, "width": SIZE[0], "height": SIZE[1], "num_inference_steps": steps, **own}
    arguments |= {"latents": latents, "max_sequence_length": TEXT, "output_type": "pt"}
    if images:
        arguments["image"] = images[0] if kind == "kontext" else images
    if kind == "kontext":
        arguments["max_area"] = SIZE[0] * SIZE[1]  # which changes the size that was asked for
    expected = backbone.pipeline(**arguments).images
    assert_same_picture(tmp_path / "out" / "images" / "0001_1.png", expected)
    other = np.abs(pixels(tmp_path / "out" / "images" / "0001_0.png") - pixels(tmp_path / "out" / "images" / "0001_1.png"))
    assert other.max() > 5, "noise makes a difference, so the comparison says something"


def test_unos_layout_is_the_backbones_own_sample(made, tmp_path):
    folder, lora = made("flux")
    files = write_photos(tmp_path)[:2]
    words = ["--prompt", PROMPT, "--references", *files, "--size", "96x64", "--steps", STEPS, "--seed", SEED, "--lora", lora]
    sample(*model_words("flux", folder), *words, "--output_dir", tmp_path / "out")
    backbone = load("flux", folder)
    backbone.pipeline.load_lora_weights(lora, weight_name="pytorch_lora_weights.safetensors")
    photos = [read_photo(file) for file in files]
    images = [backbone.reference_rule.place(photo.size, 2).pixels(photo) for photo in photos]
    assert [max(image.shape[1:]) for image in images] == [320, 320], "as UNO has several"
    with torch.no_grad():
        tokens = backbone.sample(
            torch.randn(1, 24, 16, generator=seeded(SEED, 1, 0)),
            backbone.encode_prompts([PROMPT]),
            torch.cat([backbone.encode_images(image[None]) for image in images], dim=1),
            TokenLayout(GRID, tuple((image.shape[1] // 16, image.shape[2] // 16) for image in images)),
            steps=STEPS,
            guidance=3.5,
        )
        assert_same_picture(tmp_path / "out" / "images" / "0001_0.png", backbone.decode_images(tokens, GRID))


def test_every_form_of_a_lora_and_its_scale(made, tmp_path):
    """The files differ, the images do not. UNO's own form is below."""
    folder, _ = made("flux")
    backbone = load("flux", folder)
    lora = random_lora(backbone.transformer, "flux", ("to_q", "to_k", "to_v", "to_out.0"))
    twice = Lora({name: Update(one.a, one.b * 2, one.scale) for name, one in lora.layers.items()}, lora.families)
    words = [*model_words("flux", folder), "--prompt", PROMPT, "--size", "64x64", "--steps", STEPS]
    found = {}
    forms = ("diffusers", "peft", "comfyui", "kohya")
    for form in forms:
        write_lora(tmp_path / form, lora, form)
    write_lora(tmp_path / "twice", twice, "diffusers")
    shutil.copytree(tmp_path / "peft", tmp_path / "alpha")
    settings = tmp_path / "alpha" / "adapter_config.json"
    settings.write_text(settings.read_text().replace('"lora_alpha": 3', '"lora_alpha": 6'))
    cases = {form: ("--lora", tmp_path / form) for form in (*forms, "twice", "alpha")}
    cases |= {"none": (), "scaled": (*cases["twice"], "--lora_scale", 0.5)}
    for name, more in cases.items():
        sample(*words, *more, "--output_dir", tmp_path / f"out-{name}")
        found[name] = pixels(tmp_path / f"out-{name}" / "images" / "0001_0.png")
    for name in (*forms, "scaled"):
        assert np.abs(found[name] - found["diffusers"]).max() <= 1, name
    assert np.abs(found["alpha"] - found["twice"]).max() <= 1, "what scales it beside the weights counts as well"
    assert all(np.abs(found[name] - found["diffusers"]).max() > 5 for name in ("none", "twice"))


def test_unos_lora_samples_with_unos_guidance(made, tmp_path):
    """As with `model.base_lora`, where the same LoRA is part of the weights: the same image."""
    folder, _ = made("flux")
    uno = tmp_path / "dit_lora.safetensors"
    save_file(uno_lora(), uno)
    words = [*model_words("flux", folder), "--prompt", PROMPT, "--size", "64x64", "--steps", STEPS]
    sample(*words, "--lora", uno, "--output_dir", tmp_path / "adapter")
    sample(*words, "--model.base_lora", uno, "--output_dir", tmp_path / "merged")
    sample(*words, "--lora", uno, "--guidance", 3.5, "--output_dir", tmp_path / "plain")
    adapter, merged, plain = (pixels(tmp_path / name / "images" / "0001_0.png") for name in ("adapter", "merged", "plain"))
    assert np.abs(adapter - merged).max() <= 1 < np.abs(adapter - plain).max()


def test_a_run_brings_sizes_and_lora_of_its_own(config, tmp_path):
    """The finished LoRA, a checkpoint's, and none; as the samples of the run itself."""
    from tests.runs import train

    config.max_steps, config.checkpoint_every, config.optim.lr = 2, 1, 0.5
    run = train(config).folder
    words = ["--manifest", write_manifest(tmp_path), "--steps", STEPS]
    cases = {"finished": (), "latest": ("--checkpoint", "latest"), "none": ("--checkpoint", "none")}
    cases["first"] = ("--checkpoint", run / "checkpoints" / "step-000001")
    found = {}
    for name, more in cases.items():
        sample("--config", run, *words, *more, "--output_dir", tmp_path / name)
        found[name] = pixels(tmp_path / name / "images" / "0003_0.png")
    assert found["finished"].shape == (96, 96, 3), "data.resolution"
    assert np.array_equal(found["finished"], found["latest"])
    for one, other in (("finished", "first"), ("first", "none")):
        assert np.abs(found[one] - found[other]).max() > 2, (one, other)
    (run / "lora" / "pytorch_lora_weights.safetensors").unlink()
    sample("--config", run, *words, "--output_dir", tmp_path / "unfinished")
    assert np.array_equal(pixels(tmp_path / "unfinished" / "images" / "0003_0.png"), found["latest"])
