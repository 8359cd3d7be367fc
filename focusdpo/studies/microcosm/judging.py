"""What a model of the microcosm draws for held-out scenes, and whom the judge sees in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm

from focusdpo.data import collate
from focusdpo.metrics.fid import frechet_distance_of_features
from focusdpo.studies.ablation.yardsticks import Measure
from focusdpo.studies.microcosm.autoencoder import AT_ONCE
from focusdpo.studies.microcosm.judge import classify, load_judge
from focusdpo.training.loading import load_backbone
from focusdpo.training.seeding import seeded
from focusdpo.training.trainer import Trainer

IMAGES_FILE = "generated.safetensors"
BATCH, SMALL_BATCH = 48, 6  # images that are sampled at once on a GPU, and on a CPU, where more do not fit its cache
MEASURES = {
    "identity": Measure("identity accuracy of generated regions", is_share=True),
    "leakage": Measure("leakage: generated regions that show the other reference's subject", "less", is_share=True),
    "wrong instance": Measure("generated regions that show another instance of the right class", "less", is_share=True),
    "class": Measure("generated regions of the right class", is_share=True),
    "nobody": Measure("generated regions that show nobody", "less", is_share=True),
    "FID": Measure("FID of generated regions, in the judge's features (of few: for comparison only)", "less"),
}


def verdicts(logits: Tensor, identities: Tensor, classes: Sequence[str], samples: int = 1) -> dict[str, list[float]]:
    """What the two regions of each scene show, by name: the share of them, as regions of one image are not independent.

    Args:
        logits: of the judge, [N, 2, identities + 1], the last of nobody.
        identities: who should be left and right, [N, 2].
        classes: class by identity.
        samples: how many images in a row are of one scene.
    """
    seen = logits.argmax(-1)
    kinds = torch.tensor([*(sorted(set(classes)).index(name) for name in classes), -1])
    same_class = kinds[seen] == kinds[identities]
    found = {
        "identity": seen == identities,
        "leakage": seen == identities.flip(1),  # the first choice: of a drawing that shows nobody one is likelier as well
        "wrong instance": same_class & (seen != identities),
        "class": same_class,
        "nobody": seen == len(classes),
    }
    return {name: value.float().reshape(len(value) // samples, -1).mean(1).tolist() for name, value in found.items()}


@torch.no_grad()
def generate(trainer: Trainer, samples: int, steps: int) -> Tensor:
    """Images of the held-out scenes, 8 bits [pairs * samples, 3, H, W], from the same noise for every model."""
    dataset, step, backbone = trainer.validation_set, trainer.step, trainer.backbone
    decoder = backbone
    if backbone.pipeline.vae is None:  # with data.cache it was only needed to encode
        decoder = load_backbone(trainer.config, "vae")
        decoder.to(backbone.device)
        decoder.vae.to(memory_format=torch.channels_last)
    was_training = trainer.module.training
    trainer.module.eval()
    images = []
    todo = [(index, sample) for index in range(len(dataset)) for sample in range(samples)]
    bar = tqdm(total=len(todo), desc="drawing held-out scenes", unit="image", leave=False)
    size = SMALL_BATCH if backbone.device.type == "cpu" else BATCH
    for start in range(0, len(todo), size):
        part = todo[start : start + size]
        batch = collate([dataset[index] for index, _ in part]).to(backbone.device)
        given = step.condition(batch)
        shape = (given.layout.num_target, given.references.shape[-1])
        noise = torch.stack([torch.randn(shape, generator=seeded(index, sample)) for index, sample in part])
        tokens = backbone.sample(
            noise.to(backbone.device), given.prompts, given.references, given.layout, steps=steps, guidance=1.0
        )
        for decoded in torch.split(tokens, AT_ONCE):
            images.append((decoder.decode_images(decoded, given.layout.target) * 255).round().byte().cpu().contiguous())
        bar.update(len(part))
    bar.close()
    trainer.module.train(was_training)
    return torch.cat(images)


@dataclass(frozen=True)
class GeneratedRegions:
    """Judges a trained model by what it draws; `focusdpo.studies.ablation.jobs.Judge`.

    weights: of the judge. classes: class by identity. real_features: [N, D] of regions of real scenes, as safetensors.
    """

    weights: Path
    classes: tuple[str, ...]
    real_features: Path
    samples: int
    steps: int

    def __call__(self, trainer: Trainer, folder: Path) -> dict[str, list[float]]:
        images = generate(trainer, self.samples, self.steps)
        folder.mkdir(parents=True, exist_ok=True)
        save_file({"images": images}, folder / IMAGES_FILE)
        judge = load_judge(self.weights, len(self.classes), trainer.backbone.device)
        logits, features = classify(judge, images.float() / 255)
        who = torch.tensor([record.meta["identities"] for record in trainer.validation_set.records])
        real = load_file(self.real_features)["features"]
        distance = frechet_distance_of_features(real, features.flatten(0, 1))
        return verdicts(logits, who.repeat_interleave(self.samples, 0), self.classes, self.samples) | {"FID": [distance]}
