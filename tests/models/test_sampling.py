"""Sampling with references: the images of each pipeline's own call, from the same noise, on tiny checkpoints."""

from __future__ import annotations

import inspect
import itertools

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus

from focusdpo.data.images import to_pil
from focusdpo.models import BACKBONES, TokenLayout
from tests.backbones import photos, prompt_images
from tests.sampling.studies import BACKBONE, TEXT, WRITE

PROMPT = "a cat and a cup"
STEPS = 3
GRID = (4, 6)
SIZES = [(64, 96), (96, 64)]  # (height, width) of references, of the area that Qwen's pipeline is told below


@pytest.fixture
def load(tmp_path_factory):
    def load(kind, **arguments):
        folder = tmp_path_factory.getbasetemp() / f"sampling-{kind}"
        if not folder.exists():
            WRITE[kind](folder)
        arguments = {"dtype": torch.float32, "max_sequence_length": TEXT} | arguments
        return BACKBONES[BACKBONE.get(kind, kind)].from_pretrained(str(folder), **arguments)

    return load


def sampled(backbone, noise, pixels, *, guidance=None, cfg_scale=1.0):
    """What `sample` and `decode_images` make of pixels and prompt."""
    layout = TokenLayout(GRID, tuple((image.shape[2] // 16, image.shape[3] // 16) for image in pixels))
    references = torch.cat([torch.zeros(1, 0, 16), *(backbone.encode_images(image) for image in pixels)], dim=1)
    seen = prompt_images(backbone, [to_pil(image[0]) for image in pixels])
    prompts = backbone.encode_prompts([PROMPT], seen)
    negative = backbone.encode_prompts([backbone.negative_prompt], seen) if cfg_scale != 1 else None
    tokens = backbone.sample(
        noise, prompts, references, layout, steps=STEPS, guidance=guidance, negative=negative, cfg_scale=cfg_scale
    )
    return backbone.decode_images(tokens, GRID)


def called(backbone, **arguments):
    """What the pipeline's own call makes of them."""
    backbone.pipeline.set_progress_bar_config(disable=True)
    common = {"prompt": PROMPT, "height": 64, "width": 96, "num_inference_steps": STEPS, "output_type": "pt"}
    return backbone.pipeline(**common, **arguments).images


@pytest.mark.parametrize(
    ("kind", "count", "dynamic", "cfg_scale"),
    [
        ("flux", 0, True, 1.0),
        ("flux", 0, False, 3.0),
        ("kontext", 1, True, 1.0),
        ("kontext", 0, True, 3.0),
        ("klein", 2, True, 1.0),
        ("klein", 1, True, 3.0),
        ("dev", 2, True, 1.0),  # its pipeline has no classifier-free guidance
        ("qwen", 1, False, 1.0),
        ("qwen", 2, True, 3.0),
    ],
)
def test_it_is_the_pipelines_own_image(load, monkeypatch, kind, count, dynamic, cfg_scale):
    monkeypatch.setattr(pipeline_qwenimage_edit_plus, "VAE_IMAGE_SIZE", 64 * 96)
    backbone = load(kind, guidance=1.0)
    # As the released models have it: times depend on the number of tokens.
    backbone.pipeline.scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=dynamic, max_image_seq_len=1024)
    images, pixels = photos(*SIZES[:count])
    noise = torch.randn(1, 24, 16)
    latents = noise
    if BACKBONE.get(kind) == "flux2":
        latents = noise.transpose(1, 2).reshape(1, 16, *GRID)
    arguments = {"latents": latents, "max_sequence_length": TEXT}
    if kind == "kontext":
        arguments |= {"image": images[0] if images else None, "max_area": 64 * 96, "_auto_resize": False}
    elif kind != "flux":
        arguments["image"] = images
    if kind == "qwen" or (kind in ("flux", "kontext") and cfg_scale != 1):
        arguments |= {"true_cfg_scale": cfg_scale, "negative_prompt": backbone.negative_prompt}
    if kind != "qwen":
        arguments["guidance_scale"] = cfg_scale if kind == "klein" else 2.5
    theirs = called(backbone, **arguments)
    ours = sampled(backbone, noise, pixels, guidance=2.5, cfg_scale=cfg_scale)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert backbone.guidance == 1.0, "that of the training comes back"
    other = sampled(backbone, torch.randn(1, 24, 16), pixels, guidance=2.5, cfg_scale=cfg_scale)
    assert not torch.allclose(other, theirs, atol=1e-3), "noise makes a difference, so the comparison says something"


def test_unos_layout_against_an_explicit_loop(load):
    """FLUX.1's own pipeline takes no references: Euler's steps, written out."""
    backbone = load("flux", guidance=1.0)
    backbone.pipeline.scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    _, pixels = photos(*SIZES)
    noise = torch.randn(1, 24, 16)
    layout = TokenLayout(GRID, ((4, 6), (6, 4)))
    prompts = backbone.encode_prompts([PROMPT])
    references = torch.cat([backbone.encode_images(image) for image in pixels], dim=1)
    shift = np.exp(0.5 + (24 - 256) * (1.15 - 0.5) / (4096 - 256))
    times = [shift * s / (1 + (shift - 1) * s) for s in (1, 2 / 3, 1 / 3, 0)]
    backbone.guidance = 2.5
    tokens = noise
    for now, then in itertools.pairwise(times):
        with torch.no_grad():
            velocity = backbone.predict(tokens, torch.tensor([now], dtype=torch.float32), prompts, references, layout)
        tokens = tokens + (then - now) * velocity
    backbone.guidance = 1.0
    sample = backbone.sample(noise, prompts, references, layout, steps=STEPS, guidance=2.5)
    torch.testing.assert_close(sample, tokens, rtol=1e-4, atol=1e-5)
    without = backbone.sample(noise, prompts, references[:, :0], TokenLayout(GRID, ()), steps=STEPS, guidance=2.5)
    assert not torch.allclose(sample, without, atol=1e-3)


@pytest.mark.parametrize("kind", WRITE)
def test_default_scales_are_the_pipelines_own(load, kind):
    backbone = load(kind)
    defaults = inspect.signature(type(backbone.pipeline).__call__).parameters
    guidance, cfg_scale = backbone.default_scales()
    names = {"klein": ("", "guidance_scale"), "qwen": ("", "true_cfg_scale")}.get(kind, ("guidance_scale", "true_cfg_scale"))
    assert guidance == (defaults[names[0]].default if names[0] in defaults else 1.0)
    assert cfg_scale == (defaults[names[1]].default if names[1] in defaults else 1.0)
    if kind == "klein":
        backbone.pipeline.register_to_config(is_distilled=True)
        assert backbone.default_scales() == (1.0, 1.0)


def test_guidance_needs_a_negative_prompt(load):
    with pytest.raises(ValueError, match="cfg_scale: got 4 without a negative prompt"):
        load("klein").sample(torch.randn(1, 24, 16), None, torch.zeros(1, 0, 16), TokenLayout(GRID, ()), steps=1, cfg_scale=4)


def test_the_vae_alone(load):
    whole, vae = load("kontext"), load("kontext", parts="vae")
    assert vae.transformer is None and vae.pipeline.text_encoder is None and vae.pipeline.text_encoder_2 is None
    tokens = torch.randn(1, 24, 16)
    assert torch.equal(vae.decode_images(tokens, GRID), whole.decode_images(tokens, GRID))
    assert vae.dtype is torch.float32
