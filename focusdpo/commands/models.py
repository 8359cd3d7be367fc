"""`focusdpo models`: the backbones, and the memory that training the released models takes."""

from __future__ import annotations

from collections.abc import Callable

from focusdpo.commands.config import ModelsConfig
from focusdpo.data import LongestSide
from focusdpo.data.images import PATCH_SIZE
from focusdpo.data.lines import MAX_REFERENCES
from focusdpo.foundation.settings import require
from focusdpo.foundation.text import aligned, counted
from focusdpo.models import BACKBONES, TokenLayout
from focusdpo.models.precision import DTYPES
from focusdpo.models.sizes import RELEASED, parameters
from focusdpo.training.memory import GIB, estimate, launched


def prepare(config: ModelsConfig) -> Callable[[], None]:
    """Computes the tables, and returns what prints them.

    Raises:
        ValueError: more references than a pair may have, or photos that a backbone cannot bring to size.
    """
    require(config.references <= MAX_REFERENCES, "references", config.references, f"at most {MAX_REFERENCES}, as a pair has")
    side = config.resolution // PATCH_SIZE
    dtype = DTYPES[config.dtype]
    number = None if config.reference_resolution is None else LongestSide(config.reference_resolution)
    layouts = {}
    for name, model in BACKBONES.items():
        try:
            width, height = (number or model.reference_rule).place(config.photo_size, config.references).size
        except ValueError as error:
            raise ValueError(f"photo: got {config.photo}; {name} cannot bring it to size: {error}") from error
        layouts[name] = TokenLayout((side, side), ((height // PATCH_SIZE, width // PATCH_SIZE),) * config.references)

    parts = ["weights", "text, VAE", "adapter", "kept", "block", "temporaries", "tokens", "total"]
    models = [["model", "backbone", "parameters", "LoRA", "taps", "channels", "references", *parts]]
    launches = [["model", "backbone", "files", "host, DDP", "host, FSDP2", "GPU, DDP", "GPU, FSDP2", "gathered"]]
    for name, architecture in RELEASED.items():
        layout, pairs = layouts[architecture.backbone.name], config.batch_size
        part = estimate(architecture, config.model, config.lora, config.mixed_precision, layout, pairs, config.optimizer)
        backbone = architecture.build(dtype, config.max_sequence_length)
        adapter = part.adapter_weights + part.adapter_gradients + part.optimizer_state
        sizes = [part.frozen_weights, part.companions, adapter, part.kept_activations, part.recomputed_block, part.temporaries]
        models.append(
            [
                name,
                backbone.name,
                f"{parameters(backbone.transformer) / 1e9:.1f}B",
                f"{part.adapter_weights / 4e6:.1f}M",
                str(len(backbone.tap_paths())),
                str(backbone.transformer.config.in_channels),
                str(layout.num_reference),
                *(f"{size / GIB:.2f}" for size in (*sizes, part.tokens, part.total)),
            ]
        )
        if config.processes > 1:
            of = launched(architecture, config.model, config.lora, part, config.optimizer, config.processes)
            values = [of.files, of.host_ddp, of.host_fsdp2, part.total - part.companions, of.device_fsdp2, of.gathered]
            launches.append([name, backbone.name, *("-" if value is None else f"{value / GIB:.2f}" for value in values)])
    pipelines = [["backbone", "pipelines"]]
    pipelines += [
        [name, ", ".join(pipeline.__name__ for pipeline in backbone.pipelines)] for name, backbone in BACKBONES.items()
    ]
    size = f"{side * PATCH_SIZE} px, {side * side} tokens of {PATCH_SIZE}x{PATCH_SIZE} px"
    target = f"{counted(config.batch_size, 'pair')} of {size}"
    brought = "in the backbone's own size" if number is None else f"with a longest side of {config.reference_resolution} px"
    photos = f"{counted(config.references, 'reference')}, photos of {config.photo} px {brought}"
    checkpointing = "on" if config.gradient_checkpointing else "off"
    weights = f"{config.quantization or config.dtype} weights, {config.optimizer}, autocast {config.mixed_precision}"
    text = (
        f"{aligned(pipelines, words=2)}\n\nEstimate in GiB for {target},\n{photos} (references: their tokens),\n"
        f"LoRA rank {config.rank}, {weights}, gradient checkpointing {checkpointing}\n\n{aligned(models, words=2)}"
    )
    if config.processes > 1:
        text += (
            f"\n\n{config.processes} processes on one machine, in GiB (host: memory of all processes together; files: pages of "
            "the model's files,\nonce, which may be dropped; GPU: memory of each, with data.cache)\n\n"
            + aligned(launches, words=2)
        )
    return lambda: print(text)
