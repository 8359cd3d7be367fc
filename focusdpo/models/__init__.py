"""Backbones, one file each."""

from focusdpo.models.base import Backbone, PromptEmbeddings, TokenLayout
from focusdpo.models.flux import Flux1
from focusdpo.models.flux2 import Flux2

BACKBONES: dict[str, type[Backbone]] = {Flux1.name: Flux1, Flux2.name: Flux2}

__all__ = ["BACKBONES", "Backbone", "Flux1", "Flux2", "PromptEmbeddings", "TokenLayout"]
