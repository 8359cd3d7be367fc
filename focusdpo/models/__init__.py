"""Backbones, one file each."""

from focusdpo.models.base import Backbone, PromptEmbeddings, TokenLayout
from focusdpo.models.flux import Flux1, Kontext
from focusdpo.models.flux2 import Flux2
from focusdpo.models.qwen import QwenEditPlus
from focusdpo.models.registry import BACKBONES

__all__ = ["BACKBONES", "Backbone", "Flux1", "Flux2", "Kontext", "PromptEmbeddings", "QwenEditPlus", "TokenLayout"]
