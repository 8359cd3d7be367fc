"""The Qwen-Image-Edit-Plus backbone on tiny checkpoints in the real format, against the pipeline itself."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest
import torch
from diffusers import QwenImageEditPlusPipeline
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus
from safetensors.torch import load_file

from focusdpo.models import Flux1, PromptEmbeddings, QwenEditPlus, TokenLayout
from focusdpo.training.config import FocusConfig, LoraConfig, LossConfig, ModelConfig
from focusdpo.training.step import PreferenceStep
from focusdpo_kernels import cross_layer_similarity
from tests.backbones import (
    check_first_step,
    check_saved_lora,
    check_training_run,
    image_streams,
    pair_batch,
    photos,
    prompt_images,
    recorded_call,
    tapped_scores,
)
from tests.tiny_qwen import write_tiny_qwen

TEXT = 20  # tokens
LAYOUT = TokenLayout((4, 6), ((2, 3), (3, 2)))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen")
    return {kind: write_tiny_qwen(folder / kind, zero_cond_t=kind == "2511") for kind in ("2509", "2511")}


@pytest.fixture
def load(folders):
    def load(kind="2509", dtype=torch.float32):
        return QwenEditPlus.from_pretrained(str(folders[kind]), dtype=dtype)

    return load


@pytest.fixture
def backbone(load):
    return load()


def inputs(batch=2, layout=LAYOUT, lengths=(TEXT, TEXT - 5)):
    """The second text is shorter."""
    mask = (torch.arange(TEXT) < torch.tensor(lengths[:batch])[:, None]).float()
    return (
        torch.randn(batch, layout.num_target, 16),
        torch.rand(batch),
        PromptEmbeddings({"prompt_embeds": torch.randn(batch, TEXT, 16), "prompt_embeds_mask": mask}),
        torch.randn(batch, layout.num_reference, 16),
        layout,
    )


def test_folder_is_in_the_real_format(folders):
    index = json.loads((folders["2509"] / "model_index.json").read_text())
    assert index["_class_name"] == "QwenImageEditPlusPipeline"
    assert index["processor"] == ["transformers", "Qwen2VLProcessor"]


@pytest.mark.parametrize("sizes", [[(96, 64)], [(64, 96), (96, 64), (32, 192)]], ids=len)
@pytest.mark.parametrize(
    ("kind", "dtype"), [("2509", torch.float32), ("2509", torch.bfloat16), ("2511", torch.float32)], ids=str
)
def test_it_is_the_pipelines_own_step(load, kind, dtype, sizes, monkeypatch):
    """One denoising step of the pipeline, whose transformer call is recorded, and the same from pixels and prompt."""
    backbone = load(kind, dtype)
    assert isinstance(backbone.pipeline, QwenImageEditPlusPipeline)
    assert backbone.transformer.zero_cond_t == (kind == "2511")
    # The pipeline scales references to this area, which those of the test have already.
    monkeypatch.setattr(pipeline_qwenimage_edit_plus, "VAE_IMAGE_SIZE", 64 * 96)
    images, pixels = photos(*sizes)
    theirs = recorded_call(
        backbone.transformer,
        lambda: backbone.pipeline(
            image=images,
            prompt="a cat and a cup",
            height=64,
            width=96,
            sigmas=[0.6],
            num_inference_steps=1,
            true_cfg_scale=1.0,
            output_type="latent",
        ),
    )
    layout = TokenLayout((4, 6), tuple((height // 16, width // 16) for height, width in sizes))
    ours = recorded_call(
        backbone.transformer,
        lambda: backbone.predict(
            theirs["hidden_states"][:, :24],
            theirs["timestep"],
            backbone.encode_prompts(["a cat and a cup"], prompt_images(backbone, images)),
            torch.cat([backbone.encode_images(image) for image in pixels], dim=1),
            layout,
        ),
    )
    assert theirs["timestep"].item() == pytest.approx(0.6, rel=1e-2)
    for name in ("hidden_states", "encoder_hidden_states", "timestep", "output"):
        torch.testing.assert_close(ours[name], theirs[name], msg=lambda text, name=name: f"{name}: {text}")
    assert ours["img_shapes"] == theirs["img_shapes"] and len(ours["img_shapes"][0]) == 1 + len(sizes)
    for name in ("guidance", "encoder_hidden_states_mask"):
        assert ours[name] is None and theirs[name] is None, name
    assert torch.equal(ours["result"], ours["output"][:, :24])


def test_images_to_tokens_and_back(backbone):
    images = torch.rand(2, 3, 64, 96)
    tokens = backbone.encode_images(images)
    assert tokens.shape == (2, 24, 16)
    pipeline, vae = backbone.pipeline, backbone.pipeline.vae
    for image, mine in zip(images, tokens, strict=True):
        frame = image[None, :, None] * 2 - 1
        _, theirs = pipeline.prepare_latents([frame], 1, 4, 64, 96, torch.float32, "cpu", None)
        torch.testing.assert_close(mine, theirs[0])
    latents = vae.encode(images[:, :, None] * 2 - 1).latent_dist.mode()  # [2, 4, 1, 8, 12]
    patch = latents[1, :, 0, 4:6, 2:4].reshape(4, 4)  # row 2, column 1 of the grid
    mean, std = torch.tensor(vae.config.latents_mean), torch.tensor(vae.config.latents_std)
    torch.testing.assert_close(tokens[1, 2 * 6 + 1], ((patch - mean[:, None]) / std[:, None]).reshape(-1))
    decoded = backbone.decode_images(tokens, (4, 6))
    torch.testing.assert_close(decoded, ((vae.decode(latents).sample[:, :, 0] + 1) / 2).clamp(0, 1))


def test_prompts_see_the_references(backbone):
    first, second = torch.rand(1, 3, 64, 96), torch.rand(1, 3, 32, 32)

    def embed(*references):
        return backbone.encode_prompts(["a cat"], references).tensors["prompt_embeds"]

    assert torch.equal(embed(first, second), embed(first, second))
    assert not torch.allclose(embed(first, second), embed(1 - first, second), atol=1e-2)
    assert embed().shape[1] < embed(first).shape[1] < embed(first, second).shape[1]


def test_prompts_of_different_lengths_make_a_batch(backbone):
    """Each sample is the one that it would be alone, with its own references and without padding."""
    prompts, references = ["a cat", "two dogs and a cup"], [torch.rand(2, 3, 64, 96), torch.rand(2, 3, 32, 32)]
    noisy, t, _, tokens, layout = inputs()
    batch = backbone.encode_prompts(prompts, references)
    assert batch.tensors["prompt_embeds_mask"].sum(1).diff().item() == len(prompts[1]) - len(prompts[0])
    together = backbone.predict(noisy, t, batch, tokens, layout)
    for i, prompt in enumerate(prompts):
        one = backbone.encode_prompts([prompt], [images[i : i + 1] for images in references])
        assert one.tensors["prompt_embeds_mask"].all()
        alone = backbone.predict(noisy[i : i + 1], t[i : i + 1], one, tokens[i : i + 1], layout)
        torch.testing.assert_close(together[i : i + 1], alone)


def test_another_pipeline_is_refused(tiny_flux):
    message = "holds a FluxPipeline; backbone 'qwen-edit-plus' takes QwenImageEditPlusPipeline"
    with pytest.raises(ValueError, match=message):
        QwenEditPlus.from_pretrained(str(tiny_flux), dtype=torch.float32)


@pytest.mark.parametrize("run", ["eager", "checkpointed", "compiled"])
@pytest.mark.parametrize("kind", ["2509", "2511"])
def test_taps(load, folders, kind, run):
    backbone, arguments = load(kind), inputs()
    mask = torch.rand(2, 2, LAYOUT.num_reference) > 0.3
    transformer = backbone.transformer
    assert backbone.tap_paths() == ["transformer_blocks.0", "transformer_blocks.1"]
    assert QwenEditPlus.count_tapped(folders[kind]) == 2
    layers = image_streams(transformer, list(transformer.transformer_blocks), lambda: backbone.predict(*arguments))
    assert [x.shape for x in layers] == [(2, LAYOUT.num_target + LAYOUT.num_reference, 32)] * 2
    expected = cross_layer_similarity([h[:, :24] for h in layers], [h[:, 24:] for h in layers], mask)
    torch.testing.assert_close(tapped_scores(backbone, arguments, mask, run), expected, rtol=1e-5, atol=1e-6)


def test_lora_loads_into_the_pipeline_with_its_alpha(backbone, load, tmp_path):
    check_saved_lora(backbone, load, inputs(), LoraConfig(rank=4, alpha=16.0), tmp_path)


@pytest.mark.parametrize("kind", ["2509", "2511"])
def test_preference_step(load, kind, tiny_pairs):
    assert check_first_step(load(kind), tiny_pairs) == 2 * 4 * 2


def test_prompts_are_encoded_once_for_what_their_encoder_sees(backbone, tiny_flux, tiny_pairs, monkeypatch):
    batch = pair_batch(tiny_pairs, 0, backbone=QwenEditPlus)
    ((first, *rest),) = batch.prompt_images
    others = dataclasses.replace(batch, prompt_images=((1 - first, *rest),))

    def encoded(model):
        step, calls, encode = PreferenceStep(model, FocusConfig(), LossConfig()), [], model.encode_prompts
        monkeypatch.setattr(model, "encode_prompts", lambda *args: calls.append(args) or encode(*args))
        prompts = [step.noise(x, torch.Generator()).prompts.tensors["prompt_embeds"] for x in (batch, others, batch)]
        assert torch.equal(prompts[0], prompts[2])
        return len(calls), torch.equal(prompts[0], prompts[1])

    assert encoded(backbone) == (2, False)
    assert encoded(Flux1.from_pretrained(str(tiny_flux), dtype=torch.float32)) == (1, True)


def test_training_run(folders, tiny_pairs, tmp_path, monkeypatch):
    # One pair with two prompts, so that they share a batch.
    record = json.loads(tiny_pairs.read_text().splitlines()[0])
    folder = tmp_path / "pairs"
    shutil.copytree(tiny_pairs.parent, folder)
    lines = [json.dumps({**record, "prompt": prompt}) for prompt in ("a cat", "two dogs and a cup")]
    (folder / "pairs.jsonl").write_text("\n".join(lines) + "\n")

    lengths = []
    predict = QwenEditPlus.predict

    def noted(self, noisy, t, prompts, *rest):
        lengths.append(prompts.tensors["prompt_embeds_mask"].sum(1).tolist())
        return predict(self, noisy, t, prompts, *rest)

    monkeypatch.setattr(QwenEditPlus, "predict", noted)
    model = ModelConfig(path=str(folders["2509"]), backbone="qwen-edit-plus", dtype="fp32")
    check_training_run(model, folder, tmp_path / "run")
    assert len(lengths) == 2 * 2  # reference and policy
    assert all(len(of_batch) == 4 and len(set(of_batch)) == 2 for of_batch in lengths), "two prompts, for winner and loser"
    lora = load_file(tmp_path / "run" / "lora" / "pytorch_lora_weights.safetensors")
    assert len(lora) == 16 and all(value.any() for value in lora.values())
