"""Settings of `focusdpo evaluate`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from focusdpo.foundation.choices import DinoTransform, ReferencePhotos
from focusdpo.foundation.settings import require
from focusdpo.metrics import LEVEL, RESAMPLES


@dataclass
class EvaluateConfig:
    """Generated images, what they were asked for, and the encoders that compare both. docs/evaluation.md says how to read it.

    Args:
        images: Folder of the generated images: those of the manifest's line N are N.png, N_K.png or N/K.png.
        manifest: File with a prompt and its references a line, as `focusdpo data dreambench` writes it; pairs.jsonl, or the
            folder that holds one, serves too.
        output_dir: Folder for results.json, tables, a picture, and the embeddings that a killed run goes on from.
        clip: Local folder of a CLIP model, for CLIP-I and CLIP-T.
        dino: Local folder of DINO as transformers has it (facebook/dino-vits16), for DINO.
        dinov2: Local folder of DINOv2, for DINOv2.
        fid: What FID's features are of: a folder of one of these three kinds, or a file with torch-fidelity's InceptionV3.
        real: Folder of real images for FID; by default the photos of the references.
        references: "listed" compares with the reference that the model was given, as UNO does; "all" with every photo in that
            reference's folder, as DreamBooth does.
        reference_crop: "none" compares with whole photos, as DreamBench does; "mask" with what the reference's mask marks.
        dino_transform: "folder" prepares images for DINO as its folder says, "original" as its authors do: the shorter side to
            256, the middle 224.
        images_per_prompt: How many images each prompt must have; by default what is there.
        allow_missing: Go on where prompts, images or regions are missing; they are counted in the results.
        regions: File with a line per image that says where each of its subjects is, for the measure of leakage.
        level: Of the intervals.
        resamples: Bootstrap resamples of an interval.
        fid_resamples: Bootstrap resamples of FID, each of which takes as long as FID itself; 0 leaves its interval out.
        seed: Of the resamples.
        batch_size: Images that are encoded at once.
        device: Where the encoders run.
        overwrite: Replace the results that an earlier run left in output_dir; its embeddings stay and are used.
    """

    images: str
    manifest: str
    output_dir: str = "evaluation"
    clip: str | None = None
    dino: str | None = None
    dinov2: str | None = None
    fid: str | None = None
    real: str | None = None
    references: ReferencePhotos = "listed"
    reference_crop: Literal["none", "mask"] = "none"
    dino_transform: DinoTransform = "folder"
    images_per_prompt: int | None = None
    allow_missing: bool = False
    regions: str | None = None
    level: float = LEVEL
    resamples: int = RESAMPLES
    fid_resamples: int = 100
    seed: int = 0
    batch_size: int = 32
    device: str = "cpu"
    overwrite: bool = False

    def __post_init__(self) -> None:
        if not any((self.clip, self.dino, self.dinov2, self.fid)):
            raise ValueError("clip, dino, dinov2, fid: got none of them; name the local folder of at least one encoder")
        require(self.real is None or self.fid is not None, "real", self.real, "none without fid")
        similar = any((self.clip, self.dino, self.dinov2))
        require(self.regions is None or similar, "regions", self.regions, "none without clip, dino or dinov2")
        both = self.reference_crop == "mask" and self.references == "all"
        require(
            not both, "reference_crop", self.reference_crop, "none with --references all: only listed references have masks"
        )
        original = self.dino_transform == "original" and self.dino is None
        require(not original, "dino_transform", self.dino_transform, "folder without dino")
        per_prompt = self.images_per_prompt
        require(per_prompt is None or per_prompt >= 1, "images_per_prompt", per_prompt, "at least 1, or null")
        require(0 < self.level < 1, "level", self.level, "a number between 0 and 1, like 0.95")
        require(self.resamples >= 100, "resamples", self.resamples, "at least 100")
        require(self.fid_resamples == 0 or self.fid_resamples >= 2, "fid_resamples", self.fid_resamples, "0, or at least 2")
        require(self.seed >= 0, "seed", self.seed, "0 or more")
        require(self.batch_size >= 1, "batch_size", self.batch_size, "at least 1")
