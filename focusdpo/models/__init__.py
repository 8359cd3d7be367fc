"""Backbones, one file each."""

from focusdpo.models.base import Backbone, PromptEmbeddings, TokenLayout
from focusdpo.models.flux import Flux1

BACKBONES: dict[str, type[Flux1]] = {Flux1.name: Flux1}

__all__ = ["BACKBONES", "Backbone", "Flux1", "PromptEmbeddings", "TokenLayout"]
