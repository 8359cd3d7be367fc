"""Images from seeded noise, by a pipeline's own scheduler and scales: while a run trains, and by `focusdpo sample`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from focusdpo.models.base import Backbone, PromptEmbeddings
from focusdpo.models.conditioning import Conditioning


class Sampler:
    """Samples one image at a time: what it is depends on its own noise, whatever else is sampled.

    Args:
        backbone: whose transformer samples, with its adapter where that is on.
        steps: of the sampler; None takes the pipeline's own number, as it does below.
        guidance: fed to guidance-distilled models.
        cfg_scale: of classifier-free guidance; 1 is none.
    """

    def __init__(
        self, backbone: Backbone, steps: int | None = None, guidance: float | None = None, cfg_scale: float | None = None
    ) -> None:
        own_guidance, own_scale = backbone.default_scales()
        self.backbone = backbone
        self.steps = backbone.default_steps if steps is None else steps
        self.guidance = own_guidance if guidance is None else guidance
        self.cfg_scale = own_scale if cfg_scale is None else cfg_scale

    @property
    def needs_negative(self) -> bool:
        return self.cfg_scale != 1

    def __call__(
        self,
        given: Conditioning,
        negative: PromptEmbeddings | None,
        generator: torch.Generator,
        on_step: Callable[[], object] = lambda: None,
    ) -> Tensor:
        """Clean tokens, fp32 [1, P, C].

        Args:
            given: a prompt with its references, a batch of one.
            negative: the negative prompt's text, where `needs_negative`.
            generator: CPU generator of the noise, which is then the same on every device.
            on_step: called after each step.
        """
        shape = (1, given.layout.num_target, given.references.shape[-1])
        return self.backbone.sample(
            torch.randn(shape, generator=generator).to(self.backbone.device),
            given.prompts,
            given.references,
            given.layout,
            steps=self.steps,
            guidance=self.guidance,
            negative=negative,
            cfg_scale=self.cfg_scale,
            on_step=on_step,
        )
