"""Settings of `focusdpo data build` and `data dreambench`; the docstrings are their --help."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from focusdpo.foundation.choices import WeightDtype
from focusdpo.foundation.settings import require

SMALLEST = 64  # pixels along a side: four tokens

Kind = Literal["swap", "recolour", "retexture", "leak"]
Engine = Literal["plain", "ray"]
KINDS: tuple[Kind, ...] = get_args(Kind)
ALWAYS_APPLY = {"recolour", "retexture"}  # the others need another instance, or another subject in the scene


@dataclass
class SegmentationConfig:
    """Where a subject is. Masks that the scenes file gives are always used.

    Args:
        name: "given" refuses subjects without a mask; "grabcut" is OpenCV's, with no weights; "sam" is a transformers
            mask-generation model (SAM, SAM 2) prompted by boxes.
        path: Local folder of the mask-generation model.
        detector: Local folder of an open-vocabulary detector (Grounding DINO, OWLv2), which finds the boxes that are not given.
        threshold: Score from which the detector's box counts.
        device: Where the models run.
    """

    name: Literal["given", "grabcut", "sam"] = "grabcut"
    path: str | None = None
    detector: str | None = None
    threshold: float = 0.3
    device: str = "cpu"

    def __post_init__(self) -> None:
        _model("segmentation", self.name, "sam", self.path)
        require(self.detector is None or self.name == "sam", "segmentation.detector", self.detector, "none without name=sam")
        require(0 <= self.threshold <= 1, "segmentation.threshold", self.threshold, "0 to 1")


@dataclass
class CaptioningConfig:
    """What a subject is called in the inpainting prompt.

    Args:
        name: "class" takes the class name; "model" is a transformers image-to-text model (Florence-2, Qwen-VL, BLIP).
        path: Local folder of the model.
        prompt: What the model is asked; a task token for Florence-2. {class_name} is filled in.
        max_new_tokens: Length limit of a caption.
        device: Where the model runs.
    """

    name: Literal["class", "model"] = "class"
    path: str | None = None
    prompt: str = "<CAPTION>"
    max_new_tokens: int = 64
    device: str = "cpu"

    def __post_init__(self) -> None:
        _model("captioning", self.name, "model", self.path)
        require(self.max_new_tokens >= 1, "captioning.max_new_tokens", self.max_new_tokens, "at least 1")


@dataclass
class DisruptionConfig:
    """How a subject becomes another instance.

    Args:
        name: "embedded" needs no weights; "inpaint" is a diffusers inpainting pipeline (FLUX Fill, SDXL inpaint).
        kinds: What the embedded disruption may do, each as likely: "swap" puts in another instance of the class from the scenes
            file, "recolour" turns hues, "retexture" adds a pattern, "leak" gives the subject the colours of another subject of
            its scene. Those that a scene has nothing for are passed over.
        changed: Whether a pair changes one subject of its scene, drawn at random, or all.
        donors: How many other instances a swap chooses the best fitting one from.
        path: Local folder of the inpainting pipeline.
        prompt: Its prompt; {caption} and {class_name} are filled in.
        steps: Its denoising steps.
        guidance: Its guidance scale.
        strength: How much of the region's own content is given up, where the pipeline has such a setting.
        margin: Context around the region, as a share of the region's longer side.
        resolution: Longest side in pixels that the region is inpainted at.
        dtype: Precision of its weights.
        device: Where it runs.
    """

    name: Literal["embedded", "inpaint"] = "embedded"
    kinds: list[Kind] = field(default_factory=lambda: list(KINDS))
    changed: Literal["one", "all"] = "one"
    donors: int = 4
    path: str | None = None
    prompt: str = "{caption}"
    steps: int = 30
    guidance: float = 30.0
    strength: float = 1.0
    margin: float = 0.5
    resolution: int = 1024
    dtype: WeightDtype = "bf16"
    device: str = "cpu"

    def __post_init__(self) -> None:
        _model("disruption", self.name, "inpaint", self.path)
        unique = bool(self.kinds) and len(set(self.kinds)) == len(self.kinds)
        require(unique, "disruption.kinds", self.kinds, f"a list of {', '.join(KINDS)}, each at most once")
        require(self.donors >= 1, "disruption.donors", self.donors, "at least 1")
        require(self.steps >= 1, "disruption.steps", self.steps, "at least 1")
        require(self.guidance >= 0, "disruption.guidance", self.guidance, "at least 0")
        require(0 < self.strength <= 1, "disruption.strength", self.strength, "above 0, at most 1")
        require(self.margin >= 0, "disruption.margin", self.margin, "at least 0")
        require(self.resolution >= SMALLEST, "disruption.resolution", self.resolution, f"at least {SMALLEST} pixels")


@dataclass
class GatesConfig:
    """What a pair must be like; what is not is listed in rejected.jsonl with the reason.

    Args:
        min_area: Least share of the image that changes.
        max_area: Largest share of the image that changes.
        visibility: How the change is measured: "lab" is the mean colour distance within the prior (CIE76; 2 is just
            noticeable), "features" the cosine distance between a vision model's features of the changed region.
        path: Local folder of the vision model (DINO, CLIP).
        min_change: Least visible change. By default 8 for lab, 0.05 for features.
        min_hash_distance: Pairs fewer bits apart than this are duplicates; the first in the scenes file stays. 0 keeps all.
        device: Where the vision model runs.
    """

    min_area: float = 0.02
    max_area: float = 0.7
    visibility: Literal["lab", "features"] = "lab"
    path: str | None = None
    min_change: float | None = None
    min_hash_distance: int = 4
    device: str = "cpu"

    def __post_init__(self) -> None:
        _model("gates", self.visibility, "features", self.path)
        require(0 <= self.min_area < self.max_area <= 1, "gates.min_area", self.min_area, "0 <= min_area < max_area <= 1")
        require(self.min_change is None or self.min_change >= 0, "gates.min_change", self.min_change, "at least 0")
        require(0 <= self.min_hash_distance <= 32, "gates.min_hash_distance", self.min_hash_distance, "0 to 32 bits")


@dataclass
class BuildConfig:
    """From scenes with their subjects to preference pairs.

    Args:
        scenes: The scenes.jsonl, or the folder that holds it; docs/build.md describes it.
        output_dir: Folder for pairs.jsonl, its images, and rejected.jsonl. A build that was interrupted goes on where it was.
        segmentation: Where the subjects are.
        captioning: What they are called.
        disruption: How one becomes another instance.
        gates: What a pair must be like.
        resolution: Longest side of winner and loser in pixels; sides are cut to multiples of 16.
        reference_resolution: Longest side of a reference in pixels.
        pairs_per_scene: How many pairs are built of a scene, each with choices of its own.
        seed: Of every random choice.
        engine: "plain" runs here, "ray" on a Ray cluster.
        workers: Processes, which share the cores; with ray as many actors for each kind of device.
        ray_address: The Ray cluster to join: host:port, ray://host:port, or "auto" for the one of this machine. "local" starts
            one of its own, as does null where the variable RAY_ADDRESS names none.
        overwrite: Delete what an earlier build left in output_dir, and start anew.
    """

    scenes: str
    output_dir: str
    segmentation: SegmentationConfig = field(default_factory=SegmentationConfig)
    captioning: CaptioningConfig = field(default_factory=CaptioningConfig)
    disruption: DisruptionConfig = field(default_factory=DisruptionConfig)
    gates: GatesConfig = field(default_factory=GatesConfig)
    resolution: int = 512
    reference_resolution: int = 512
    pairs_per_scene: int = 1
    seed: int = 0
    engine: Engine = "plain"
    workers: int = 1
    ray_address: str | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        for name in ("resolution", "reference_resolution"):
            require(getattr(self, name) >= SMALLEST, name, getattr(self, name), f"at least {SMALLEST} pixels")
        for name in ("pairs_per_scene", "workers"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        require(self.seed >= 0, "seed", self.seed, "at least 0")
        no_address = self.engine == "ray" or self.ray_address is None
        require(no_address and self.ray_address != "", "ray_address", self.ray_address, "null, or with engine=ray an address")
        for group in ("segmentation", "captioning", "disruption", "gates"):
            device = getattr(self, group).device
            free = self.engine != "ray" or device in ("cpu", "cuda")
            require(free, f"{group}.device", device, "cpu or cuda with engine=ray, which gives each worker a GPU of its own")


@dataclass
class DreamBenchConfig:
    """From a DreamBench folder to manifests of its prompts, and pairs built from its photos.

    Args:
        root: DreamBench: a folder of photos per subject, prompts_and_classes.txt, and UNO's two lists.
        output_dir: Folder for single.jsonl, multi.jsonl, scenes.jsonl, composed/, and the built pairs in pairs/.
        allow_missing: Leave out the prompts whose photos are not there; their number is reported.
        pairs_per_scene: How many pairs are built of a photo; 0 writes manifests and scenes only.
        disruption: How a subject becomes another instance.
        resolution: Longest side of winner and loser in pixels.
        seed: Of every random choice.
        engine: "plain" or "ray", as for `focusdpo data build`.
        workers: Processes or actors.
        ray_address: The Ray cluster to join, as for `focusdpo data build`.
        overwrite: Delete what an earlier run left in output_dir.
    """

    root: str
    output_dir: str = "dreambench-pairs"
    allow_missing: bool = False
    pairs_per_scene: int = 1
    disruption: DisruptionConfig = field(default_factory=DisruptionConfig)
    resolution: int = 512
    seed: int = 0
    engine: Engine = "plain"
    workers: int = 1
    ray_address: str | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        require(self.pairs_per_scene >= 0, "pairs_per_scene", self.pairs_per_scene, "at least 0")


def _model(group: str, name: str, of_model: str, path: str | None) -> None:
    """A model's folder is named exactly where a model is chosen."""
    if name == of_model:
        require(path is not None, f"{group}.path", path, f"the local folder of a model, for {name}")
    else:
        require(path is None, f"{group}.path", path, f"none for {name}")
