"""`pipeline("image-text-to-text")` for volumes."""

import os
from typing import Any

from transformers.image_processing_base import BatchFeature
from transformers.pipelines.image_text_to_text import ImageTextToTextPipeline


class Med3DVLMPipeline(ImageTextToTextPipeline):
    r"""
    The image-text-to-text pipeline, for volumes in place of pictures: a path of a NIfTI file, its bytes, also in base64 as
    `data:...;base64,...`, a nibabel image, an array or a tensor, in chat messages or beside a text.

    Example:

    ```python
    >>> from transformers import pipeline

    >>> pipe = pipeline("image-text-to-text", model="org/med3dvlm", trust_remote_code=True)  # doctest: +SKIP
    >>> pipe(images="scan.nii.gz", text="<image>\nIs there a pleural effusion?")  # doctest: +SKIP
    >>> content = [{"type": "image", "path": "scan.nii.gz"}, {"type": "text", "text": "Is there a pleural effusion?"}]
    >>> pipe(text=[{"role": "user", "content": content}], return_full_text=False)  # doctest: +SKIP
    ```"""

    def check_model_type(self, supported_models: Any) -> None:
        """Says nothing of the model that this pipeline is made for: the list of transformers has its own models only."""
        if type(self.model).__name__ != "Med3DVLMForConditionalGeneration":
            super().check_model_type(supported_models)

    def __call__(self, images: Any = None, text: Any = None, **kwargs: Any) -> Any:
        """
        Answers about volumes: chat messages as `text`, or `images` beside a `text`.

        Raises:
            ValueError: a volume comes without a text. The stock pipeline would take its path for the text, and answer blind.
        """
        first = images[0] if isinstance(images, (list, tuple)) and images else images
        if text is None and (isinstance(first, (str, bytes, os.PathLike)) or hasattr(first, "shape")):
            raise ValueError(
                "Expected a text beside the volumes: pass the question as `text=`, with `<image>` where a volume belongs, or "
                "both in chat messages. A text alone is passed as `text=`, too."
            )
        return super().__call__(images, text, **kwargs)

    def preprocess(self, inputs: Any = None, timeout: float | None = None, **kwargs: Any) -> BatchFeature:
        """
        Prepares one conversation, or one text or list of texts with its volumes. The stock pipeline opens every image
        as a picture before the processor sees it; here the processor does all the reading.

        Raises:
            ValueError: `images` or `text` is missing, or a report of the preprocessing is asked for.
        """
        if {**kwargs, **(kwargs.get("processor_kwargs") or {})}.get("return_report"):
            raise ValueError(
                "A pipeline gives answers alone. For `return_report=True` call the processor, "
                "`pipe.processor.image_processor(volume, return_report=True)`."
            )
        if not isinstance(inputs, dict):
            return super().preprocess(inputs, timeout=timeout, **kwargs)
        if missing := {"images", "text"} - inputs.keys():
            raise ValueError(f"Expected a dictionary with `images` and `text`, {sorted(missing)} missing.")
        kwargs.pop("continue_final_message", None)  # concerns conversations only
        processor_kwargs = kwargs.pop("processor_kwargs", None) or {}
        processor_kwargs = {**kwargs, **processor_kwargs}
        if isinstance(inputs["text"], (list, tuple)) and len(inputs["text"]) > 1:
            processor_kwargs.setdefault("padding", True)
        model_inputs = self.processor(
            images=inputs["images"], text=inputs["text"], return_tensors="pt", **processor_kwargs
        ).to(dtype=self.dtype)
        model_inputs["text"] = inputs["text"]
        return model_inputs


__all__ = ["Med3DVLMPipeline"]
