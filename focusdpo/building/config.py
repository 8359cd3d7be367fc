"""Settings of `focusdpo data compose`, `data build` and `data dreambench`; the docstrings are their --help."""

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
        name: "given" refuses subjects without a mask; "grabcut" is OpenCV's, with no weights; "rembg" removes the background,
            which is recommended where its model can be downloaded; "sam" is a transformers mask-generation model (SAM, SAM 2)
            prompted by boxes.
        path: For sam, local folder or hub id of the model; for rembg's u2net_custom and dis_custom, the model's .onnx file.
        model: Which model rembg takes, by its name there: isnet-general-use, birefnet-general, u2net and others.
        detector: Local folder or hub id of an open-vocabulary detector (Grounding DINO, OWLv2), which finds the boxes that are
            not given.
        threshold: Score from which the detector's box counts.
        device: Where sam and its detector run; rembg runs where onnxruntime does.
    """

    name: Literal["given", "grabcut", "rembg", "sam"] = "grabcut"
    path: str | None = None
    model: str = "isnet-general-use"
    detector: str | None = None
    threshold: float = 0.3
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.name != "rembg":
            _model("segmentation", self.name, "sam", self.path)
        elif self.model.endswith("_custom"):
            require(self.path is not None, "segmentation.path", self.path, f"an .onnx file for rembg's {self.model}")
        else:
            require(self.path is None, "segmentation.path", self.path, f"none for rembg's {self.model}")
        require(self.detector is None or self.name == "sam", "segmentation.detector", self.detector, "none without name=sam")
        require(0 <= self.threshold <= 1, "segmentation.threshold", self.threshold, "0 to 1")


@dataclass
class EncoderConfig:
    """The network that compares pictures: cut-outs of a subject with each other, losers with winners.

    Args:
        name: "efficientnet-lite0" comes with its weights; "transformers" is any vision model of that library (DINOv2, DINO,
            CLIP); "none" goes without, where that is possible.
        path: Local folder or hub id of the vision model.
        device: Where it runs.
    """

    name: Literal["efficientnet-lite0", "transformers", "none"] = "efficientnet-lite0"
    path: str | None = None
    device: str = "cpu"

    def __post_init__(self) -> None:
        _model("encoder", self.name, "transformers", self.path)


@dataclass
class CutOutsConfig:
    """Which cut-outs can be trusted; the others are listed with the reason. Defaults are for efficientnet-lite0.

    Args:
        min_area: Least share of its photo that a mask covers.
        max_area: Largest share.
        min_agreement: Least median cosine of a cut-out with the subject's other ones.
        max_doubt: Largest sum of three signs that a cut-out has something else in it, or lacks a part: how much more its least
            fitting tenth looks like a background than like the subject's other cut-outs, and how far its agreement is below
            the subject's median, both differences of cosines; and what max_missing limits.
        max_missing: Largest share, of the cut-out's own cells, of cells around it that look more like the subject's other
            cut-outs than like the other photos' backgrounds.
    """

    min_area: float = 0.01
    max_area: float = 0.9
    min_agreement: float = 0.6
    max_doubt: float = 0.14
    max_missing: float = 0.1

    def __post_init__(self) -> None:
        require(0 <= self.min_area < self.max_area <= 1, "cut_outs.min_area", self.min_area, "0 <= min_area < max_area <= 1")
        require(-1 <= self.min_agreement <= 1, "cut_outs.min_agreement", self.min_agreement, "-1 to 1")
        require(self.max_doubt >= -1, "cut_outs.max_doubt", self.max_doubt, "at least -1")
        require(self.max_missing >= 0, "cut_outs.max_missing", self.max_missing, "at least 0")


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
        changed: Whether a pair changes all subjects of its scene, as the paper draws it, or one, drawn at random.
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
    changed: Literal["one", "all"] = "all"
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
            noticeable), "features" the cosine distance between the encoder's vectors of the changed region.
        min_change: Least visible change. By default 8 for lab, 0.05 for features.
        min_changed: Least share of each subject's prior in which one sees that winner and loser differ.
        max_resemblance: Largest cosine of the encoder's vectors of a subject in the winner and of what is in its place in the
            loser. Above it the loser still shows the winner's subject, and the next kind of disruption is tried.
        min_hash_distance: Pairs fewer bits apart than this are duplicates; the first in the scenes file stays. 0 keeps all.
    """

    min_area: float = 0.02
    max_area: float = 0.7
    visibility: Literal["lab", "features"] = "lab"
    min_change: float | None = None
    min_changed: float = 0.5
    max_resemblance: float = 0.9
    min_hash_distance: int = 4

    def __post_init__(self) -> None:
        require(0 <= self.min_area < self.max_area <= 1, "gates.min_area", self.min_area, "0 <= min_area < max_area <= 1")
        require(self.min_change is None or self.min_change >= 0, "gates.min_change", self.min_change, "at least 0")
        require(0 <= self.min_changed <= 1, "gates.min_changed", self.min_changed, "0 to 1")
        require(-1 <= self.max_resemblance <= 1, "gates.max_resemblance", self.max_resemblance, "-1 to 1")
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
        encoder: What compares losers with winners.
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
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
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
        needed = self.gates.visibility == "features" and self.encoder.name == "none"
        require(not needed, "encoder.name", self.encoder.name, "an encoder, for gates.visibility=features")
        for group in ("segmentation", "captioning", "disruption", "encoder"):
            device = getattr(self, group).device
            free = self.engine != "ray" or device in ("cpu", "cuda")
            require(free, f"{group}.device", device, "cpu or cuda with engine=ray, which gives each worker a GPU of its own")


@dataclass
class ComposeConfig:
    """From a folder of photos to preference pairs: subjects are cut out, put into scenes, and disrupted there.

    Args:
        photos: A folder with a folder of photos per subject. Two photos of a subject are needed, and four for held-out pairs.
        output_dir: Folder for the pairs in train/ and held_out/, the cut-outs, and masks.html to look at these. A run that was
            interrupted goes on where it was.
        classes: YAML with the class of each subject, or {class_name, caption}, by its folder's name; by default classes.yaml in
            photos, or else the folders' names.
        accepted: YAML that says for each photo whether its cut-out is used. By default accepted.yaml in output_dir, which is
            written with the verdicts for a person to change; what nobody changed follows the verdicts.
        masks_only: Stop after the cut-outs and masks.html.
        pairs: How many scenes are composed to train on, each of which gives a pair unless a gate refuses it.
        held_out_pairs: The same of the held-out photos.
        held_out: Share of each subject's photos that train/ never shows, two at least; 0 holds none out.
        subjects: How many subjects a scene may have; each number is as likely.
        backgrounds: Folder of photos without subjects to stand in front of; by default the parts of the photos that show none.
        segmentation: Where the subjects are in their photos.
        cut_outs: Which cut-outs can be trusted.
        encoder: What compares cut-outs with each other, and losers with winners.
        captioning: What the subjects are called when they are inpainted.
        disruption: How they become other instances.
        gates: What a pair must be like.
        resolution: Side of winner and loser in pixels, cut to a multiple of 16.
        reference_resolution: Longest side of a reference in pixels.
        seed: Of every random choice.
        engine: "plain" runs here, "ray" builds the pairs on a Ray cluster.
        workers: Processes that build the pairs, which share the cores; with ray as many actors for each kind of device.
        ray_address: The Ray cluster to join, as for `focusdpo data build`.
        overwrite: Delete what an earlier run left in output_dir, and start anew; what a person changed in accepted.yaml stays.
    """

    photos: str
    output_dir: str
    classes: str | None = None
    accepted: str | None = None
    masks_only: bool = False
    pairs: int = 200
    held_out_pairs: int = 20
    held_out: float = 0.25
    subjects: list[int] = field(default_factory=lambda: [1, 2, 3, 4])
    backgrounds: str | None = None
    segmentation: SegmentationConfig = field(default_factory=SegmentationConfig)
    cut_outs: CutOutsConfig = field(default_factory=CutOutsConfig)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    captioning: CaptioningConfig = field(default_factory=CaptioningConfig)
    disruption: DisruptionConfig = field(default_factory=DisruptionConfig)
    gates: GatesConfig = field(default_factory=GatesConfig)
    resolution: int = 512
    reference_resolution: int = 512
    seed: int = 0
    engine: Engine = "plain"
    workers: int = 1
    ray_address: str | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        require(self.pairs >= 1, "pairs", self.pairs, "at least 1")
        require(self.held_out_pairs >= 0, "held_out_pairs", self.held_out_pairs, "at least 0")
        require(0 <= self.held_out < 1, "held_out", self.held_out, "at least 0, below 1")
        known = set(self.subjects) <= set(range(1, MOST_SUBJECTS + 1))
        known = known and 0 < len(self.subjects) == len(set(self.subjects))
        require(known, "subjects", self.subjects, "some of 1, 2, 3, 4, each once")
        require(self.encoder.name != "none", "encoder.name", self.encoder.name, "an encoder: the cut-outs are judged by it")
        boxes = self.segmentation.name != "sam" or self.segmentation.detector is not None
        require(boxes, "segmentation.detector", self.segmentation.detector, "a detector for sam: photos have no boxes")
        require(self.segmentation.name != "given", "segmentation.name", self.segmentation.name, "grabcut, rembg or sam")
        self.build_config("train", False)  # refuses what `data build` would

    def build_config(self, split: str, overwrite: bool) -> BuildConfig:
        """The build of the pairs of "train" or "held_out"."""
        folder = f"{self.output_dir}/{split}"
        shared = {name: getattr(self, name) for name in _SHARED}
        return BuildConfig(f"{folder}/scenes.jsonl", folder, SegmentationConfig("given"), overwrite=overwrite, **shared)


MOST_SUBJECTS = 4
# Settings of a build that a run of `data compose` has as well.
_SHARED = (
    "captioning", "disruption", "gates", "encoder", "resolution", "reference_resolution", "seed", "engine", "workers",
    "ray_address",
)  # fmt: skip


@dataclass
class DreamBenchConfig:
    """From a DreamBench folder to manifests of its prompts, and pairs composed of its photos.

    Args:
        root: DreamBench: a folder of photos per subject, prompts_and_classes.txt, and UNO's two lists.
        output_dir: Folder for single.jsonl and multi.jsonl; pairs/ in it is as `focusdpo data compose` makes it.
        allow_missing: Leave out the prompts whose photos are not there; their number is reported.
        pairs: How many scenes are composed to train on; 0 writes the manifests only.
        held_out_pairs: The same of held-out photos.
        segmentation: Where the subjects are in their photos.
        disruption: How a subject becomes another instance.
        resolution: Side of winner and loser in pixels.
        seed: Of every random choice.
        engine: "plain" or "ray", as for `focusdpo data build`.
        workers: Processes or actors.
        ray_address: The Ray cluster to join, as for `focusdpo data build`.
        overwrite: Delete what an earlier run left in output_dir.
    """

    root: str
    output_dir: str = "dreambench-pairs"
    allow_missing: bool = False
    pairs: int = 200
    held_out_pairs: int = 20
    segmentation: SegmentationConfig = field(default_factory=SegmentationConfig)
    disruption: DisruptionConfig = field(default_factory=DisruptionConfig)
    resolution: int = 512
    seed: int = 0
    engine: Engine = "plain"
    workers: int = 1
    ray_address: str | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        require(self.pairs >= 0, "pairs", self.pairs, "at least 0")
        self.compose_config()  # refuses what `data compose` would

    def compose_config(self) -> ComposeConfig:
        """The making of the pairs."""
        same = ("held_out_pairs", "segmentation", "disruption", "resolution", "seed", "engine", "workers", "ray_address")
        return ComposeConfig(
            self.root,
            f"{self.output_dir}/pairs",
            pairs=max(self.pairs, 1),
            reference_resolution=self.resolution,
            overwrite=self.overwrite,
            **{name: getattr(self, name) for name in same},
        )


def _model(group: str, name: str, of_model: str, path: str | None) -> None:
    """A model's folder is named exactly where a model is chosen."""
    if name == of_model:
        require(path is not None, f"{group}.path", path, f"the local folder of a model, for {name}")
    else:
        require(path is None, f"{group}.path", path, f"none for {name}")
