"""Backbones by the name that `model.backbone` gives."""

from focusdpo.models.base import Backbone
from focusdpo.models.flux import Flux1, Kontext
from focusdpo.models.flux2 import Flux2
from focusdpo.models.qwen import QwenEditPlus

BACKBONES: dict[str, type[Backbone]] = {model.name: model for model in (Flux1, Kontext, Flux2, QwenEditPlus)}
