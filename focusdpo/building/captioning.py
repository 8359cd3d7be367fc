"""The third stage: what each subject is called."""

from __future__ import annotations

from typing import Any, cast

import torch
from PIL import Image

from focusdpo.building.blending import box_of
from focusdpo.building.candidate import Candidate, Photo
from focusdpo.building.config import CaptioningConfig


class ClassNames:
    """The class name is the caption."""

    device = "cpu"

    def __call__(self, candidate: Candidate) -> None:
        candidate.captions = [subject.class_name for subject in candidate.record.subjects]


class CaptionModel:
    """An image-to-text model of transformers describes the part of the scene that shows the subject.

    Models with a chat template see the prompt as the user's message.
    """

    def __init__(self, config: CaptioningConfig) -> None:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        self.device = config.device
        self._config = config
        self._processor = AutoProcessor.from_pretrained(config.path, local_files_only=True)
        self._model = AutoModelForImageTextToText.from_pretrained(config.path, local_files_only=True).to(self.device).eval()

    def __call__(self, candidate: Candidate) -> None:
        candidate.captions = [self._caption(photo) for photo in candidate.subjects]

    @torch.inference_mode()
    def _caption(self, photo: Photo) -> str:
        crop = Image.fromarray(photo.pixels[box_of(photo.region)])
        text = self._config.prompt.format(class_name=photo.subject.class_name)
        inputs = self._inputs(crop, text).to(self.device)
        tokens = self._model.generate(**inputs, max_new_tokens=self._config.max_new_tokens, do_sample=False)
        if not self._model.config.is_encoder_decoder:  # those repeat what they were asked
            tokens = tokens[:, inputs["input_ids"].shape[1] :]
        caption = self._processor.batch_decode(tokens, skip_special_tokens=True)[0].strip()
        return cast(str, caption) or photo.subject.class_name

    def _inputs(self, image: Image.Image, text: str) -> Any:
        if getattr(self._processor, "chat_template", None):
            content = [{"type": "image"}, {"type": "text", "text": text}]
            text = self._processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        return self._processor(images=image, text=text, return_tensors="pt")
