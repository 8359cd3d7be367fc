"""Device memory of a training step, computed before it runs, and what to change when it does not fit.

    total = frozen weights + companions + adapter (4 + 4 + 8 bytes a parameter) + kept activations + recomputed block
            + temporaries + tokens

- Frozen weights and companions (text encoders, VAE) stay on the device, in `model.dtype`; `model.quantization` makes those of
  the blocks smaller.
- The adapter is fp32: weights, gradients and the optimiser's state, which for AdamW is two moments.
- Activations are not guessed but counted: the transformer runs once on the meta device, where nothing takes memory, and hooks
  see every tensor that autograd saves for the backward pass. Storages are counted once, parameters not at all. Reference and
  policy have equal shapes, and the reference saves nothing.
- With gradient checkpointing only the blocks' inputs are kept, and what is saved outside of them; the backward pass then
  recomputes one block at a time, so that the largest block's activations come on top. Without it all are kept.
- Temporaries are what lives besides when most does: results of operations that nothing keeps, and gradients on their way. A
  whole step runs on the meta device for them, forward and backward, and every storage is counted from its making to its end.
- Tokens are what the loss compares: noisy tokens, targets, and both predictions.

Not in it: fragmentation, libraries' workspaces, DDP's buckets (the adapter's gradients once more), what `model.compile` saves,
and of `model.quantization` a layer's weights in full precision. Attention and RMS norm are taken to be PyTorch's fused kernels,
as on a GPU. tests/training/test_memory.py holds it against the peaks that were measured (benchmarks/results).

`launched` says what several processes on one machine need, each with a device of its own, beyond what a process takes to run
at all. Files of weights are mapped: their pages stand in memory once, and the kernel drops them where it needs room. What the
processes hold themselves, all together, is

    host, DDP    processes x (adapter + optimiser's state)
    host, FSDP2  the larger of that and frozen weights + processes x adapter
    GPU, FSDP2   (frozen weights + adapter with gradients and optimiser's state) / processes + gathered + kept activations
                 + recomputed block + temporaries + tokens

Adapter and optimiser's state are what every process has of a checkpoint that is written or read; the frozen weights are those
of the process that reads them for all, and nearly nothing where its files have `model.dtype` and no base LoRA is merged, since
their pages then serve. Where the files have another dtype each process converts a tensor at a time on top. Quantised weights
are read into host memory by each process. Gathered are the parameters outside of the blocks, which stay whole during a step,
and the largest block three times: FSDP2 keeps the buffer that a block came in until the next one is there.
"""

from __future__ import annotations

import dataclasses
import functools
import warnings
import weakref
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.checkpoint import checkpoint

from focusdpo.data import PairDataset
from focusdpo.data.dataset import PairSizes
from focusdpo.data.images import PATCH_SIZE
from focusdpo.foundation.text import counted, size
from focusdpo.models import BACKBONES, Backbone, PromptEmbeddings, TokenLayout
from focusdpo.models.base import pipeline_folder
from focusdpo.models.precision import BITS, DTYPES, quantized_layers
from focusdpo.models.sizes import Architecture, parameters
from focusdpo.training.adapter import add_adapter
from focusdpo.training.batches import dataset_of, in_order
from focusdpo.training.config import DataConfig, LoraConfig, ModelConfig, TrainConfig
from focusdpo.training.optimizers import STATE_BYTES

GIB = 2**30
MAX_ADVICE = 3


@dataclass(frozen=True)
class Estimate:
    """Bytes by part, in the order they are shown."""

    frozen_weights: int
    companions: int
    adapter_weights: int
    adapter_gradients: int
    optimizer_state: int
    kept_activations: int
    recomputed_block: int
    temporaries: int
    tokens: int

    @property
    def total(self) -> int:
        return sum(dataclasses.astuple(self))

    def __str__(self) -> str:
        parts = {**dataclasses.asdict(self), "total": self.total}
        return "\n".join(f"  {name.replace('_', ' '):<18}{size(value):>12}" for name, value in parts.items())


def estimate(
    architecture: Architecture,
    model: ModelConfig,
    lora: LoraConfig,
    mixed_precision: str,
    layout: TokenLayout,
    pairs: int,
    optimizer: str = "adamw",
) -> Estimate:
    """Memory of one step.

    Args:
        architecture: the backbone's.
        model: of which dtype, quantization, gradient_checkpointing and max_sequence_length matter.
        lora: the adapter.
        mixed_precision: "no" or "bf16".
        layout: token grids of a pair.
        pairs: pairs in the batch, winner and loser each.
        optimizer: `optim.optimizer`.

    Raises:
        ValueError: as `add_adapter`.
    """
    dtype = DTYPES[model.dtype]
    backbone = architecture.build(dtype, model.max_sequence_length)
    frozen = parameters(backbone.transformer) * dtype.itemsize
    if model.quantization is not None:
        quantized = sum(layer.weight.numel() for _, _, layer in quantized_layers(backbone))
        frozen -= round(quantized * (dtype.itemsize - BITS[model.quantization] / 8))
    trained = sum(p.numel() for p in add_adapter(backbone, lora, seed=0))
    backbone.transformer.train()

    kept, block, temporaries, tokens = _activations(backbone, model, mixed_precision, layout, 2 * pairs)
    return Estimate(
        frozen_weights=frozen,
        companions=architecture.companions * dtype.itemsize,
        adapter_weights=4 * trained,
        adapter_gradients=4 * trained,
        optimizer_state=STATE_BYTES[optimizer] * trained,
        kept_activations=kept,
        recomputed_block=block,
        temporaries=temporaries,
        tokens=tokens,
    )


def _activations(
    backbone: Backbone, model: ModelConfig, mixed_precision: str, layout: TokenLayout, images: int
) -> tuple[int, int, int, int]:
    """Bytes of kept activations, a recomputed block, temporaries and tokens, of a step on the meta device."""
    channels = backbone.transformer.config.in_channels
    shapes = backbone.prompt_shapes().items()
    prompts = PromptEmbeddings(
        {name: torch.empty(images, *shape, dtype=backbone.dtype, device="meta") for name, shape in shapes}
    )
    noisy = torch.empty(images, layout.num_target, channels, device="meta")
    references = torch.empty(images, layout.num_reference, channels, device="meta")
    t = torch.empty(images, device="meta")
    blocks = [backbone.transformer.get_submodule(path) for path in backbone.tap_paths()]
    device = _Device(autocast=mixed_precision == "bf16")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # advice about speed, for a pass that computes nothing
        with SavedBytes(backbone.transformer, blocks) as saved, device:
            prediction = backbone.predict(noisy, t, prompts, references, layout)
        kept, block = saved.kept_and_recomputed(model.gradient_checkpointing)
        compared = 2 * noisy.nbytes + references.nbytes + 2 * prediction.untyped_storage().nbytes()
        del prediction, saved
        if model.gradient_checkpointing:
            # The backward pass recomputes outside of this context.
            again = functools.partial(checkpoint, use_reentrant=False, context_fn=lambda: (nullcontext(), device))
            backbone.transformer.enable_gradient_checkpointing(again)
        inputs = (noisy, references, t, *prompts.tensors.values())
        with LiveBytes(*backbone.transformer.parameters(), *backbone.transformer.buffers(), *inputs) as live, device:
            torch.autograd.backward([backbone.predict(noisy, t, prompts, references, layout).sum()])
    return kept, block, max(live.peak - kept - block, 0), compared


@dataclass(frozen=True)
class Launched:
    """Bytes that several processes on one machine need; None where a launch refuses the settings.

    Args:
        files: pages of the model's files, once for all processes.
        host_ddp: memory of all processes under DDP, without these pages.
        host_fsdp2: the same under FSDP2.
        gathered: parameters that are whole on a device at once under FSDP2.
        device_fsdp2: memory on each device under FSDP2, with `data.cache`.
    """

    files: int
    host_ddp: int
    host_fsdp2: int | None
    gathered: int | None
    device_fsdp2: int | None


def launched(
    architecture: Architecture, model: ModelConfig, lora: LoraConfig, part: Estimate, optimizer: str, processes: int
) -> Launched:
    """What `processes` on one machine need.

    Args:
        architecture: the backbone's.
        model: as for `estimate`.
        lora: the adapter.
        part: the estimate of a step of one process.
        optimizer: `optim.optimizer`.
        processes: their number.
    """
    dtype = DTYPES[model.dtype]
    backbone = architecture.build(dtype, model.max_sequence_length)
    weights = sum(p.nbytes for p in backbone.transformer.parameters())
    files = weights + part.companions
    state = processes * (part.adapter_weights + part.optimizer_state)
    if model.quantization is not None:
        return Launched(files, processes * weights + state, None, None, None)
    if optimizer != "adamw":
        return Launched(files, state, None, None, None)
    add_adapter(backbone, lora, seed=0)
    blocks = [sum(p.nbytes for p in backbone.transformer.get_submodule(path).parameters()) for path in backbone.tap_paths()]
    gathered = weights + part.adapter_weights - sum(blocks) + 3 * max(blocks)
    adapter = part.adapter_weights + part.adapter_gradients + part.optimizer_state
    alone = part.total - part.companions - part.frozen_weights - adapter
    return Launched(
        files,
        state,
        max(weights + processes * part.adapter_weights, state),
        gathered,
        -(-(part.frozen_weights + adapter) // processes) + gathered + alone,
    )


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Context manager: the most bytes that live at once among the storages made inside it, on the meta device.

    Args:
        fixed: tensors from before, which do not count.
    """

    def __init__(self, *fixed: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._sizes = {_key(tensor): 0 for tensor in fixed}
        self._now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and _key(tensor) not in self._sizes:
                self._sizes[_key(tensor)] = tensor.untyped_storage().nbytes()
                self._now += self._sizes[_key(tensor)]
                weakref.finalize(tensor.untyped_storage(), self._end, _key(tensor))
        self.peak = max(self.peak, self._now)
        return result

    def _end(self, key: int) -> None:
        self._now -= self._sizes.pop(key)


class SavedBytes(ExitStack):
    """Context manager: bytes that autograd saves for the backward pass of a forward pass inside it, and where.

    Args:
        module: whose parameters and buffers do not count.
        blocks: those that gradient checkpointing recomputes.
    """

    def __init__(self, module: nn.Module, blocks: list[nn.Module]) -> None:
        super().__init__()
        self._fixed = {_key(x) for x in (*module.parameters(), *module.buffers())}
        self._blocks = blocks
        self._running: int | None = None
        self._inputs: dict[int, Tensor] = {}  # of blocks: what checkpointing keeps to recompute them from
        self._saved: dict[int | None, dict[int, Tensor]] = {}  # by block, None outside; the tensors keep their keys unique

    def __enter__(self) -> SavedBytes:
        for number, block in enumerate(self._blocks):
            enter = functools.partial(self._enter, number)
            self.enter_context(block.register_forward_pre_hook(enter, with_kwargs=True))
            self.enter_context(block.register_forward_hook(self._leave))
        self.enter_context(torch.autograd.graph.saved_tensors_hooks(self._save, lambda tensor: tensor))
        return self

    def _enter(self, number: int, module: nn.Module, args: Any, kwargs: Any) -> None:
        tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        self._inputs |= {_key(tensor): tensor.detach() for tensor in tensors if _key(tensor) not in self._fixed}
        self._running = number

    def _leave(self, *_: Any) -> None:
        self._running = None

    def _save(self, tensor: Tensor) -> Tensor:
        if _key(tensor) not in self._fixed:
            self._saved.setdefault(self._running, {})[_key(tensor)] = tensor.detach()
        return tensor

    def kept_and_recomputed(self, checkpointing: bool) -> tuple[int, int]:
        """Bytes that are kept, and with gradient checkpointing those that the largest block saves beyond these."""
        if not checkpointing:
            return _bytes({key: tensor for saved in self._saved.values() for key, tensor in saved.items()}), 0
        kept = self._saved.get(None, {}) | self._inputs
        inside = [saved for block, saved in self._saved.items() if block is not None]
        return _bytes(kept), max((_bytes({k: v for k, v in saved.items() if k not in kept}) for saved in inside), default=0)


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _bytes(saved: dict[int, Tensor]) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in saved.values())


class _Fused(torch.autograd.Function):
    """A fused kernel by what it saves: its inputs, one number a row, and where its backward pass needs it the output."""

    @staticmethod
    def forward(ctx: Any, saves_output: bool, *inputs: Tensor) -> Tensor:
        output = torch.empty_like(inputs[0])
        rows = inputs[0].new_empty(inputs[0].shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(*inputs, rows, *[output] * saves_output)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        needed = ctx.needs_input_grad[1:]
        return None, *(torch.empty_like(x) if n else None for x, n in zip(ctx.saved_tensors, needed, strict=False))


AUTOCAST = dict.fromkeys((F.linear, F.scaled_dot_product_attention), torch.bfloat16)
AUTOCAST |= dict.fromkeys((F.layer_norm, torch.layer_norm), torch.float32)


class _Device(TorchFunctionMode):
    """What the meta device lacks of a GPU: fused kernels, and autocast for the operations that transformers consist of."""

    def __init__(self, autocast: bool) -> None:
        super().__init__()
        self._autocast = autocast

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._autocast and func in AUTOCAST:
            dtype = AUTOCAST[func]
            args, kwargs = tree_map(
                lambda x: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x, (args, kwargs)
            )
        if func is F.scaled_dot_product_attention:
            query, key, value = (*args, *(kwargs[name] for name in ("query", "key", "value")[len(args) :]))[:3]
            return _Fused.apply(True, query, key, value)  # type: ignore[no-untyped-call]
        if func is F.rms_norm:
            x, weight = args[0], kwargs.get("weight", args[2] if len(args) > 2 else None)
            if weight is None or weight.dtype == x.dtype:  # others are not fused on a GPU either
                return _Fused.apply(False, x, *[] if weight is None else [weight])  # type: ignore[no-untyped-call]
        return func(*args, **kwargs)


def advice(architecture: Architecture, config: TrainConfig, layout_of: Callable[[DataConfig], TokenLayout], pairs: int) -> str:
    """The estimate of a step by part, and the settings that would save most.

    Args:
        architecture: the backbone's.
        config: the run's settings.
        layout_of: token grids of the batch's pairs under other settings of the data.
        pairs: pairs in the batch.
    """

    def of(changed: TrainConfig) -> Estimate:
        count = min(pairs, changed.data.batch_size)
        layout, optimizer = layout_of(changed.data), changed.optim.optimizer
        return estimate(architecture, changed.model, changed.lora, changed.mixed_precision, layout, count, optimizer)

    now = of(config)
    saved = {"data.cache=FOLDER": now.companions} if config.data.cache is None else {}
    for section, name, value in _remedies(config, layout_of(config.data)):
        changed: Any = dataclasses.replace(getattr(config, section) if section else config, **{name: value})
        changed = dataclasses.replace(config, **{section: changed}) if section else changed
        saved[f"{section}.{name}={str(value).lower()}".removeprefix(".")] = now.total - of(changed).total
    best = sorted((label for label in saved if saved[label] > 0), key=lambda label: -saved[label])[:MAX_ADVICE]
    lines = "\n".join(f"  {label:<42}{size(saved[label]):>12} less" for label in best)
    return f"The estimate of its memory:\n{now}\nWhat would save most, each by itself:\n{lines}"


def batch_text(dataset: PairDataset, indices: list[int]) -> str:
    """A batch of a dataset's pairs in words."""
    return f"{counted(len(indices), 'pair')} of {dataset.sizes[indices[0]]}"


def batch_advice(architecture: Architecture, config: TrainConfig, dataset: PairDataset, indices: list[int]) -> str:
    """`advice` for a batch of a dataset's pairs."""

    def layout_of(data: DataConfig) -> TokenLayout:
        return _layout(dataset_of([dataset.records[indices[0]]], data, config.model.backbone).sizes[0])

    return advice(architecture, config, layout_of, len(indices))


def _layout(sizes: PairSizes) -> TokenLayout:
    grids = [(height // PATCH_SIZE, width // PATCH_SIZE) for width, height in (sizes.target, *sizes.references)]
    return TokenLayout(grids[0], tuple(grids[1:]))


def run_estimate(config: TrainConfig, dataset: PairDataset) -> Estimate:
    """The memory of a run's largest batch, in one process that is not split."""
    architecture, largest = _largest(config, dataset)
    sizes, optimizer = dataset.sizes[largest[0]], config.optim.optimizer
    return estimate(architecture, config.model, config.lora, config.mixed_precision, _layout(sizes), len(largest), optimizer)


def _largest(config: TrainConfig, dataset: PairDataset) -> tuple[Architecture, list[int]]:
    """What a run has on its device, and the indices of its largest batch."""
    model = config.model
    architecture = Architecture.of_folder(BACKBONES[model.backbone], pipeline_folder(model.path, model.revision))
    if config.data.cache is not None:
        architecture = dataclasses.replace(architecture, companions=0)
    batches = in_order(dataset, config.data.batch_size)
    return architecture, max(batches, key=lambda batch: len(batch) * dataset.sizes[batch[0]].tokens)


def run_advice(config: TrainConfig, dataset: PairDataset, encoding: bool = False) -> str:
    """What a run needs that has not come to its first step: for its largest batch, or to encode for `data.cache`."""
    if encoding:
        model = config.model
        architecture = Architecture.of_folder(BACKBONES[model.backbone], pipeline_folder(model.path, model.revision))
        weights = size(architecture.companions * DTYPES[model.dtype].itemsize)
        return f"VAE and text encoders take {weights}, an image or prompt comes on top; lower data.resolution, or free memory"
    architecture, largest = _largest(config, dataset)
    return f"The largest batch is {batch_text(dataset, largest)}. {batch_advice(architecture, config, dataset, largest)}"


def _remedies(config: TrainConfig, layout: TokenLayout) -> list[tuple[str, str, Any]]:
    """(section, setting, value) of everything that could be made smaller: halves, and cheaper choices."""
    half = [("data", "resolution", 16), ("data", "batch_size", 1), ("lora", "rank", 1)]
    apart = len(layout.references) > 1 and config.data.reference_resolution_multiple is not None
    half.append(("data", "reference_resolution_multiple" if apart else "reference_resolution", 16))
    # Of references in the backbone's own size: to half of it.
    longest = max((side for grid in layout.references for side in grid), default=0) * PATCH_SIZE
    values = [(s, n, (getattr(getattr(config, s), n) or longest) // 2 // unit * unit, unit) for s, n, unit in half]
    remedies: list[tuple[str, str, Any]] = [(s, n, value) for s, n, value, unit in values if value >= unit]
    if not config.model.gradient_checkpointing and config.model.activation_budget is None:
        remedies.append(("model", "gradient_checkpointing", True))
    if config.model.dtype == "fp32":
        remedies.append(("model", "dtype", "bf16"))
    if config.model.quantization is None:
        remedies.append(("model", "quantization", "nf4"))
    if config.optim.optimizer != "adamw8bit":
        remedies.append(("optim", "optimizer", "adamw8bit"))
    if config.mixed_precision == "no":
        remedies.append(("", "mixed_precision", "bf16"))
    return remedies
