"""Texts and volumes to model inputs: the chat template, the placeholders, and the one image processor."""

from typing import TYPE_CHECKING, Any

from transformers.image_processing_base import BatchFeature
from transformers.processing_utils import ProcessingKwargs, ProcessorMixin
from transformers.utils import logging

from .image_processing_med3dvlm import Med3DVLMImageProcessorKwargs, check_option_names


if TYPE_CHECKING:
    # Nothing imports the pipeline when a model is loaded or saved; named here, its file travels with this one.
    from .pipeline_med3dvlm import Med3DVLMPipeline  # noqa: F401


logger = logging.get_logger(__name__)

PROMPT_FORMATS = ("chat", "original")
PROCESSOR_ARGUMENTS = (
    "image_processor",
    "tokenizer",
    "image_seq_length",
    "image_token",
    "chat_template",
    "prompt_format",
)

# A content is a text or a list of volumes and texts in any order; what follows a volume is the format's own.
RENDER_CONTENT = """\
{%- macro render_content(content) -%}
    {%- if content is string -%}
        {{- content -}}
    {%- else -%}
        {%- for part in content -%}
            {%- if part['type'] in ('image', 'image_url') -%}
                {{- '<image>AFTER_IMAGE' -}}
            {%- elif part['type'] == 'text' -%}
                {{- part['text'] -}}
            {%- else -%}
                {{- raise_exception('A content part must be of type "image" or "text", got ' + part['type'] + '.') -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
"""

# ChatML, the format of Qwen2.5. The generation block holds what the model is to say, its end token included:
# `assistant_masks` marks just these tokens for training.
CHAT_TEMPLATE = (
    RENDER_CONTENT.replace("AFTER_IMAGE", "\\n")
    + """\
{%- for message in messages -%}
    {%- if message['role'] == 'assistant' -%}
        {{- '<|im_start|>assistant\\n' -}}
        {%- generation -%}
            {{- render_content(message['content']) + '<|im_end|>' -}}
        {%- endgeneration -%}
        {{- '\\n' -}}
    {%- elif message['role'] in ('system', 'user') -%}
        {{- '<|im_start|>' + message['role'] + '\\n' + render_content(message['content']) + '<|im_end|>\\n' -}}
    {%- else -%}
        {{- raise_exception('A role must be "system", "user" or "assistant", got "' + message['role'] + '".') -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""
)


# The prompt of the original implementation: the placeholders of one volume, then the text, without any format of a chat.
# A space stands between them, as in its question answering; whatever the text begins with, its first token is not read.
ORIGINAL_TEMPLATE = (
    RENDER_CONTENT.replace("AFTER_IMAGE", " ")
    + """\
{%- for message in messages -%}
    {%- if message['role'] == 'user' and loop.first -%}
        {{- render_content(message['content']) -}}
    {%- elif message['role'] == 'assistant' and loop.index0 == 1 -%}
        {{- ' ' -}}
        {%- generation -%}
            {{- render_content(message['content']) + eos_token -}}
        {%- endgeneration -%}
    {%- else -%}
        {{- raise_exception('The prompt of the original implementation is one question of the user, and one answer.') -}}
    {%- endif -%}
{%- endfor -%}
"""
)


def count_volumes(volumes: Any) -> int:
    """Number of volumes in what `fetch_images` of the image processor returns: one, or nested lists of them."""
    return sum(map(count_volumes, volumes)) if isinstance(volumes, (list, tuple)) else 1


def forget_last_call(tokenizer: Any) -> None:
    """
    Clears the truncation and padding of the last call, which a tokenizer would else save as its own: whoever reads its file
    without transformers would cut all texts at the length of the last training batch.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        backend.no_truncation()
        backend.no_padding()
    for name in ("max_length", "truncation_strategy", "stride", "pad_to_multiple_of"):
        getattr(tokenizer, "init_kwargs", {}).pop(name, None)


def forget_options_of_volumes(tokenizer: Any) -> None:
    """
    Clears the image processor's options from a tokenizer: an `AutoProcessor` hands what it is given to both, and what the
    tokenizer keeps would win over the image processor in every call, and be saved.
    """
    init_kwargs = getattr(tokenizer, "init_kwargs", {})
    for name in Med3DVLMImageProcessorKwargs.__annotations__:
        if name != "return_tensors":
            init_kwargs.pop(name, None)


class Med3DVLMProcessorKwargs(ProcessingKwargs, total=False):
    """Options of [`Med3DVLMProcessor`], those of the image processor included."""

    images_kwargs: Med3DVLMImageProcessorKwargs


class Med3DVLMProcessor(ProcessorMixin):
    r"""
    Prepares texts and volumes together.

    Args:
        image_processor ([`Med3DVLMImageProcessor`]):
            Prepares the volumes.
        tokenizer (`PreTrainedTokenizerBase`):
            Prepares the texts. Its `padding_side` is set, as generation or a dual encoder needs it; in a call of the processor
            that side holds unless the call names another. A warning tells where the tokenizer's own was changed.
        image_seq_length (`int`, *optional*):
            Placeholders one volume takes, `config.image_seq_length` of the model. Left out for a dual encoder, whose
            texts have no placeholders and are padded on the right.
        image_token (`str`, *optional*, defaults to `"<image>"`):
            What stands for a volume in a text; repeated `image_seq_length` times before tokenization. The tokenizer
            must know it as one token, with the id `config.image_token_id`.
        chat_template (`str`, *optional*):
            Jinja template of conversations. By default ChatML, if the tokenizer has its tokens.
        prompt_format (`str`, *optional*, defaults to `"chat"`):
            `"original"` for converted weights of the original implementation, which was trained without a chat format
            and writes a volume's tokens one position too late: its first placeholder stays, and the first token of the
            text is overwritten. A text then begins with its one volume, `image_seq_length` counts the placeholder that
            stays, and the last placeholder takes the place of the first token.

    Raises:
        ValueError: there is no tokenizer, or it does not know `image_token`, with `image_seq_length`; `prompt_format` is
            neither of the two; or an argument is not known.

    Example:

    ```python
    >>> from transformers import AutoProcessor

    >>> processor = AutoProcessor.from_pretrained("org/med3dvlm", trust_remote_code=True)  # doctest: +SKIP
    >>> inputs = processor(images="scan.nii.gz", text="<image>\nIs there a pleural effusion?")  # doctest: +SKIP
    ```"""

    valid_processor_kwargs = Med3DVLMProcessorKwargs
    skip_tensor_conversion = [*ProcessorMixin.skip_tensor_conversion, "preprocessing_report"]

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        image_seq_length: int | None = None,
        image_token: str = "<image>",
        chat_template: str | None = None,
        prompt_format: str = "chat",
        **kwargs: Any,
    ):
        check_option_names(kwargs, PROCESSOR_ARGUMENTS)  # to refuse the others with the nearest name
        if prompt_format not in PROMPT_FORMATS:
            raise ValueError(f"`prompt_format` must be one of {PROMPT_FORMATS}, got {prompt_format!r}.")
        forget_options_of_volumes(tokenizer)
        self.prompt_format = prompt_format
        self.image_seq_length = image_seq_length
        self.image_token: Any = None  # None tells the base class that texts have no placeholders
        self.image_token_id: int | None = None
        if image_seq_length is not None:
            if tokenizer is None:
                raise ValueError(
                    f"Expected a `tokenizer` with `image_seq_length` {image_seq_length}, which counts placeholders in texts, "
                    "got none: pass both or neither."
                )
            self.image_token = image_token
            self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)
            if self.image_token_id is None or self.image_token_id == tokenizer.unk_token_id:
                raise ValueError(
                    f"The tokenizer does not know the placeholder {image_token!r}: add it first, "
                    f"`tokenizer.add_tokens([{image_token!r}], special_tokens=True)`, and give its id to the model's "
                    "configuration as `image_token_id`."
                )
            if chat_template is None and prompt_format == "original":
                chat_template = ORIGINAL_TEMPLATE.replace("<image>", image_token)
            elif chat_template is None and "<|im_start|>" in tokenizer.get_vocab():
                chat_template = CHAT_TEMPLATE.replace("<image>", image_token)
        # The next token follows the last one of every text only when the padding stands before; a dual encoder reads the first
        # token of a text, or the average.
        self._padding_side = "right" if image_seq_length is None else "left"
        if tokenizer is not None:
            tokenizer.padding_side = self._padding_side
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        # Set here, because loading drops it: a processor saved without it would load as a bare tokenizer.
        self.auto_map = {"AutoProcessor": "processing_med3dvlm.Med3DVLMProcessor"}

    def __call__(self, images: Any = None, text: Any = None, **kwargs: Any) -> BatchFeature:
        """
        Model inputs of volumes and texts, see `ProcessorMixin.__call__`; in the original's format if that is set.

        Raises:
            ValueError: in the original's format, a text was cut off right behind its placeholders.
        """
        if "padding_side" not in {**kwargs, **(kwargs.get("text_kwargs") or {})}:
            kwargs["padding_side"] = self._padding_side
            changed = getattr(self.tokenizer, "padding_side", self._padding_side)  # perhaps by another processor
            if changed != self._padding_side and text is not None:
                logger.warning_once(
                    f"The tokenizer's `padding_side` was changed to {changed!r}; this processor pads on its own, "
                    f"{self._padding_side!r}. For the other, pass `padding_side={changed!r}` in the call."
                )
        inputs = super().__call__(images=images, text=text, **kwargs)
        if self.prompt_format == "original" and self.image_token is not None and "input_ids" in inputs:
            for row, ids in enumerate(inputs["input_ids"]):  # rows of a tensor or lists: written in place
                numbers = ids if isinstance(ids, list) else ids.tolist()
                if self.image_token_id in numbers:
                    last = len(numbers) - 1 - numbers[::-1].index(self.image_token_id)
                    if last + 1 == len(numbers):
                        raise ValueError(
                            f"Expected words behind the {self.image_seq_length} placeholders of a volume, got a text of "
                            f"{len(numbers)} tokens that was cut off there: raise `max_length`."
                        )
                    ids[last + 1] = self.image_token_id
                    if "mm_token_type_ids" in inputs:
                        inputs["mm_token_type_ids"][row][last + 1] = 1  # an image
        return inputs

    def save_pretrained(self, save_directory: Any, push_to_hub: bool = False, **kwargs: Any) -> Any:
        """Saves all parts; see [`forget_last_call`] for what is left out of the tokenizer's files."""
        forget_last_call(self.tokenizer)
        return super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    def validate_inputs(self, images: Any = None, text: Any = None, **kwargs: Any) -> None:
        """
        Checks that every placeholder has a volume and every volume a placeholder.

        Raises:
            ValueError: an option is not known, `videos` or `audio` was given, or neither `images` nor `text`, or the counts
                differ; with a list of volumes for each text, in any one of them.
        """
        kinds = self.valid_processor_kwargs.__annotations__
        options = {name for kind in ("text_kwargs", "images_kwargs") for name in kinds[kind].__annotations__}
        check_option_names(kwargs, {*options, *kinds, "common_kwargs", "return_metadata", "videos", "audio"})
        if foreign := [name for name in ("videos", "audio") if kwargs.get(name) is not None]:
            raise ValueError(f"Got `{foreign[0]}`, but Med3DVLM reads volumes and texts: pass a volume as `images`.")
        if images is None and text is None:
            raise ValueError("Expected `images`, `text` or both, got neither.")
        if text is None or self.image_token is None:
            return
        if not isinstance(text, list) or not all(isinstance(sample, str) for sample in text):
            raise ValueError(f"Expected `text` to be a string or a list of strings, got {type(text).__name__}.")
        placeholders = [sample.count(self.image_token) for sample in text]
        volumes = 0 if images is None else count_volumes(images)
        if sum(placeholders) != volumes:
            raise ValueError(
                f"Expected as many volumes as placeholders {self.image_token!r} in the text, got {volumes} volumes and "
                f"{sum(placeholders)} placeholders. Write {self.image_token!r} where each volume belongs and nowhere "
                "else, or use `apply_chat_template`, which writes it for each volume of a message."
            )
        is_nested = isinstance(images, (list, tuple)) and any(isinstance(entry, (list, tuple)) for entry in images)
        if is_nested and (counts := [count_volumes(entry) for entry in images]) != placeholders:
            raise ValueError(
                f"The texts have {placeholders} placeholders, but their lists of volumes have {counts}: give each text "
                "the volumes it shows."
            )
        if self.prompt_format == "original":
            for sample in text:
                before, token, after = sample.partition(self.image_token)
                if token and (before.strip() or self.image_token in after or not after.strip()):
                    raise ValueError(
                        f"Expected a text that begins with its one placeholder {self.image_token!r} and goes on with words, "
                        f"as the original was trained, got {sample!r}."
                    )

    def _process_images(self, images: Any, **kwargs: Any) -> tuple[BatchFeature, list[str]]:
        processed = self.image_processor(images, **kwargs)
        if self.image_token is None:
            return processed, []
        return processed, [self.replace_image_token(processed, index) for index in range(count_volumes(images))]

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs: Any) -> str:
        """What stands in the text for one volume: `image_seq_length` placeholders, one fewer in the original's format."""
        assert self.image_seq_length is not None  # there is a placeholder only where it is given
        return self.image_token * (self.image_seq_length - int(self.prompt_format == "original"))


__all__ = ["CHAT_TEMPLATE", "ORIGINAL_TEMPLATE", "Med3DVLMProcessor", "Med3DVLMProcessorKwargs", "forget_last_call"]
