"""Med3DVLM: a vision-language model that reads a whole 3D volume and answers in words (Xin et al. 2025)."""

import copy
import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModel
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    BaseModelOutputWithPooling,
    CausalLMOutputWithPast,
)
from transformers.modeling_utils import PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple, torch_compilable_check

from ..configuration.configuration_med3dvlm import Med3DVLMConfig
from .modeling_dcformer_siglip import VISION_MODELS
from .modeling_projector import PROJECTORS
from .strict_loading import StrictLoadingMixin


# What language models call their keys and values, as an argument and in their outputs: renamed by transformers 5.24.
CACHE_NAME = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"
# How a new turn alone is told from a whole chat, for messages.
MASK_OF_ALL = "an `attention_mask` of the cache's tokens and these"

KEYS_OF_HEAD = r"^lm_head\."


@dataclass
class Med3DVLMImageFeatures(BaseModelOutputWithPooling):
    """
    What the model sees of a batch of volumes, output of `get_image_features`. It can be kept and passed on as
    `mm_encoder_outputs={"image": features}` in place of `pixel_values`.

    Args:
        last_hidden_state (`torch.Tensor` of shape `(num_volumes, channels, D, H, W)`):
            Last stage of the encoder; for a vision transformer of shape `(num_volumes, num_tokens, channels)`.
        pooler_output (`torch.Tensor` of shape `(num_volumes, image_seq_length, text_hidden_size)`):
            The image tokens, which take the places of the placeholders in the text.
        hidden_states (`tuple(torch.Tensor)`, *optional*, returned with `output_hidden_states=True`):
            All stages of the encoder.
        low_level_states (`torch.Tensor` of shape `(num_volumes, low_tokens, low_channels)`):
            The projector's low-level stream: the finer grid, tokens in raster order with depth slowest.
        high_level_states (`torch.Tensor` of shape `(num_volumes, high_tokens, high_channels)`):
            The projector's high-level stream.
    """

    low_level_states: torch.Tensor | None = None
    high_level_states: torch.Tensor | None = None


@dataclass
class Med3DVLMModelOutputWithPast(BaseModelOutputWithPast):
    """
    Output of [`Med3DVLMModel`].

    Args:
        last_hidden_state (`torch.Tensor` of shape `(batch_size, sequence_length, text_hidden_size)`):
            Last hidden states of the language model.
        past_key_values (`Cache`, *optional*, returned with `use_cache=True`):
            Keys and values of the attention layers; `cache` from transformers 5.24 on.
        hidden_states (`tuple(torch.Tensor)`, *optional*, returned with `output_hidden_states=True`):
            Hidden states of the language model.
        attentions (`tuple(torch.Tensor)`, *optional*, returned with `output_attentions=True`):
            Attention weights of the language model.
        image_hidden_states (`torch.Tensor` of shape `(num_volumes, image_seq_length, text_hidden_size)`, *optional*):
            The image tokens.
    """

    image_hidden_states: torch.Tensor | None = None


@dataclass
class Med3DVLMCausalLMOutputWithPast(CausalLMOutputWithPast):
    """
    Output of [`Med3DVLMForConditionalGeneration`].

    Args:
        loss (`torch.Tensor` of shape `()`, *optional*, returned with `labels`):
            Next-token cross-entropy.
        logits (`torch.Tensor` of shape `(batch_size, sequence_length, vocab_size)`):
            Scores of the next token.
        past_key_values (`Cache`, *optional*, returned with `use_cache=True`):
            Keys and values of the attention layers; `cache` from transformers 5.24 on.
        hidden_states (`tuple(torch.Tensor)`, *optional*, returned with `output_hidden_states=True`):
            Hidden states of the language model.
        attentions (`tuple(torch.Tensor)`, *optional*, returned with `output_attentions=True`):
            Attention weights of the language model.
        image_hidden_states (`torch.Tensor` of shape `(num_volumes, image_seq_length, text_hidden_size)`, *optional*):
            The image tokens.
    """

    image_hidden_states: torch.Tensor | None = None


class Med3DVLMPreTrainedModel(StrictLoadingMixin, PreTrainedModel):
    """Initialisation and capabilities shared by the vision-language models."""

    config: Med3DVLMConfig
    base_model_prefix = "model"
    input_modalities = ["image", "text"]
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    # Two put two streams side by side, the third attends with what three of its layers give: all must lie on one device.
    _no_split_modules = ["Med3DVLMMixerProjector", "Med3DVLMLowHighMLPProjector", "Med3DVLMSelfAttentionProjector"]


def length_of(cache: Any) -> Any:
    """Tokens whose keys and values are kept; 0 also for the pages of continuous batching, which are no `Cache`."""
    return cache.get_seq_length() if isinstance(cache, Cache) else 0


def holds_read_tokens(
    input_ids: torch.LongTensor | None,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    inputs_embeds: torch.Tensor | None = None,
    **model_kwargs: Any,
) -> bool:
    """
    Whether a prompt of `generate` begins with the tokens whose keys and values are in the cache, which are then left out, or
    holds the new tokens alone. As where transformers reads a prompt: embeddings are whole, and ids as many as the mask's. A
    mask of ones is dropped before; then the positions tell.
    """
    if inputs_embeds is not None or input_ids is None:
        return True
    if attention_mask is not None:
        return attention_mask.shape[1] == input_ids.shape[1]
    assert position_ids is not None  # `generate` makes them
    length = position_ids.shape[-1]
    return length < input_ids.shape[1] or (length == input_ids.shape[1] and not bool(position_ids[..., 0].any()))


def stage_to_tokens(hidden_state: torch.Tensor) -> torch.Tensor:
    """(B, C, D, H, W) -> (B, D * H * W, C), tokens in raster order with depth slowest; tokens stay as they are."""
    return hidden_state.flatten(2).transpose(1, 2) if hidden_state.ndim == 5 else hidden_state


class Med3DVLMModel(Med3DVLMPreTrainedModel):
    """
    The vision-language model without a head: volume encoder, projector, language model.

    Raises:
        ValueError: the language model's embeddings and hidden states are of different widths, or it has no attention.

    Example:

    ```python
    >>> from transformers import AutoModel

    >>> model = AutoModel.from_pretrained("org/med3dvlm", trust_remote_code=True)  # doctest: +SKIP
    ```"""

    _keys_to_ignore_on_load_unexpected = [KEYS_OF_HEAD]  # a generating model's checkpoint serves this one too

    def __init__(self, config: Med3DVLMConfig):
        super().__init__(config)
        # Not in the precision that a part's configuration remembers: the parts would not fit each other.
        dtype = torch.get_default_dtype()
        vision_class = VISION_MODELS[config.vision_config.model_type]
        self.vision_tower = vision_class._from_config(config.vision_config, dtype=dtype)
        self.multi_modal_projector = PROJECTORS[config.projector_type](config)
        self.language_model = AutoModel.from_config(config.text_config, dtype=dtype)
        text_config = config.text_config.get_text_config(decoder=True)
        takes_cache = CACHE_NAME in inspect.signature(self.language_model.forward).parameters
        if not takes_cache or set(getattr(text_config, "layer_types", None) or ()) == {"linear_attention"}:
            raise ValueError(
                "Expected a decoder with attention, whose keys and values are kept while it answers, got "
                f"{type(self.language_model).__name__}. Choose another `text_config`."
            )
        hidden_size = text_config.hidden_size
        embedding_size = getattr(self.get_input_embeddings(), "embedding_dim", hidden_size)
        if embedding_size != hidden_size:
            raise ValueError(
                f"Expected a language model whose embeddings are as wide as its hidden states, {hidden_size}, because image "
                f"tokens take the places of embeddings; those of {type(self.language_model).__name__} are {embedding_size} wide. "
                "Choose another `text_config`."
            )
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The language model's token embeddings."""
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replaces the language model's token embeddings."""
        self.language_model.set_input_embeddings(value)

    @can_return_tuple
    def get_image_features(
        self, pixel_values: torch.Tensor, **kwargs: Unpack[TransformersKwargs]
    ) -> Med3DVLMImageFeatures:
        r"""
        Encodes volumes and projects them to tokens of the language model.

        Args:
            pixel_values (`torch.Tensor` of shape `(num_volumes, num_channels, depth, height, width)`):
                Volumes of `config.image_size`, scaled to [0, 1], all texts' volumes one after the other.
            kwargs:
                `output_hidden_states` (`bool`), whether to return all stages of the encoder; all others go to the encoder.

        Returns:
            [`Med3DVLMImageFeatures`], whose `pooler_output` holds the image tokens.

        Raises:
            ValueError: `pixel_values` has another shape than the model was built for.
        """
        # No argument of its own: `generate` takes those that this method names away from the language model.
        output_hidden_states = kwargs.pop("output_hidden_states", None)
        num_channels = self.config.vision_config.num_channels
        expected = (num_channels, *self.config.image_size)
        if tuple(pixel_values.shape[1:]) != expected:
            raise ValueError(
                f"Expected `pixel_values` of shape (num_volumes, {', '.join(map(str, expected))}), that is `num_channels` "
                f"{num_channels} and `image_size` (depth, height, width), got {tuple(pixel_values.shape)}. Prepare volumes "
                "with the model's own processor."
            )
        outputs = self.vision_tower(pixel_values, output_hidden_states=True, return_dict=True, **kwargs)
        low_level_states, high_level_states = (
            stage_to_tokens(outputs.hidden_states[layer]) for layer in self.config.vision_feature_layers
        )
        image_tokens = self.multi_modal_projector(low_level_states, high_level_states)
        if self.config.prepend_image_token_embedding:
            image_token_id = torch.full((len(image_tokens), 1), self.config.image_token_id, device=image_tokens.device)
            embedding = self.get_input_embeddings()(image_token_id)
            image_tokens = torch.cat([embedding.to(image_tokens), image_tokens], dim=1)
        return Med3DVLMImageFeatures(
            last_hidden_state=outputs.last_hidden_state,
            pooler_output=image_tokens,
            hidden_states=outputs.hidden_states if output_hidden_states else None,
            low_level_states=low_level_states,
            high_level_states=high_level_states,
        )

    def get_placeholder_mask(
        self, input_ids: torch.LongTensor | None, inputs_embeds: torch.Tensor, image_tokens: torch.Tensor
    ) -> torch.Tensor:
        """
        Finds the places of the image tokens by the placeholder's id, or by its embedding where there are no ids.

        Returns:
            `torch.BoolTensor` of shape `(batch_size, sequence_length, 1)`, on the device of `inputs_embeds`.

        Raises:
            ValueError: the numbers of placeholders and image tokens differ, or the widths of embeddings and image tokens.
        """
        mask = self.find_placeholders(input_ids, inputs_embeds)
        self.check_placeholders(mask, image_tokens)
        if image_tokens.shape[-1] != inputs_embeds.shape[-1]:
            raise ValueError(
                f"Expected image tokens as wide as the embeddings of the text, {inputs_embeds.shape[-1]}, got "
                f"{image_tokens.shape[-1]}: these are the features of another model. Encode the volumes with this one's "
                "`get_image_features`."
            )
        return mask.unsqueeze(-1).to(inputs_embeds.device)

    def find_placeholders(
        self, input_ids: torch.LongTensor | None, inputs_embeds: torch.Tensor | None
    ) -> torch.Tensor:
        """The places of the placeholders, `(batch_size, sequence_length)`, by their id or, without ids, their embedding."""
        if input_ids is not None:
            return input_ids == self.config.image_token_id
        assert inputs_embeds is not None  # one of the two is always given
        image_token_id = torch.full((), self.config.image_token_id, dtype=torch.long, device=inputs_embeds.device)
        return (inputs_embeds == self.get_input_embeddings()(image_token_id)).all(-1)

    def check_placeholders(self, mask: torch.Tensor, image_tokens: torch.Tensor, past_length: int = 0) -> None:
        """
        Raises where placeholders, the True places of `mask`, and image tokens differ in number. `past_length` is the number of
        tokens before those of `mask`, whose keys and values are in the cache.
        """
        num_placeholders, num_image_tokens = mask.sum(), image_tokens.shape[0] * image_tokens.shape[1]
        place, remedy = "", "Build both with the model's own processor, and do not truncate the placeholders."
        if past_length:
            place = f" after the {past_length} tokens in the cache"
            remedy = (
                "Volumes of earlier turns are in the cache: pass only those of the new turn, with the whole chat, or with the "
                f"new turn and {MASK_OF_ALL}."
            )
        torch_compilable_check(
            num_placeholders == num_image_tokens,
            lambda: (
                f"The text has {int(num_placeholders)} image placeholders (id {self.config.image_token_id}){place}, the "
                f"{image_tokens.shape[0]} volumes have {num_image_tokens} image tokens ({image_tokens.shape[1]} each). {remedy}"
            ),
        )

    def check_no_placeholder(self, input_ids: torch.LongTensor, cache: Cache | None = None) -> None:
        """Raises where a text that starts here has placeholders but came without volumes: it would be read blind."""
        past_length = length_of(cache)
        num_placeholders = (input_ids == self.config.image_token_id).sum()
        torch_compilable_check(
            (num_placeholders == 0) | (past_length > 0),
            lambda: (
                f"The text has {int(num_placeholders)} image placeholders (id {self.config.image_token_id}), but no "
                "volume was given: pass `pixel_values` or `mm_encoder_outputs`."
            ),
        )

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        cache: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> Med3DVLMModelOutputWithPast:
        r"""
        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                Tokens of the texts, `image_seq_length` placeholders for each volume.
            pixel_values (`torch.Tensor` of shape `(num_volumes, num_channels, depth, height, width)`, *optional*):
                The volumes in the order of their placeholders, all texts' one after the other.
            attention_mask (`torch.Tensor` of shape `(batch_size, sequence_length)`, *optional*):
                1 for tokens, 0 for padding.
            position_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                Positions of the tokens.
            past_key_values (`Cache`, *optional*):
                Keys and values of the tokens before these.
            inputs_embeds (`torch.Tensor` of shape `(batch_size, sequence_length, text_hidden_size)`, *optional*):
                Embeddings in place of `input_ids`.
            mm_encoder_outputs (`dict`, *optional*):
                `{"image": features}` with what `get_image_features` returned, in place of `pixel_values`.
            cache (`Cache`, *optional*):
                The name that transformers 5.24 gave to `past_key_values`; of continuous batching in all versions, whose
                pages of keys and values are no [`~transformers.Cache`].

        Returns:
            [`Med3DVLMModelOutputWithPast`]

        Raises:
            ValueError: not exactly one of `input_ids` and `inputs_embeds`, both of `pixel_values` and
                `mm_encoder_outputs`, both of `past_key_values` and `cache`, another number of placeholders than image tokens,
                or image tokens of another width than embeddings.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Expected exactly one of `input_ids` and `inputs_embeds`.")
        if past_key_values is not None and cache is not None:
            raise ValueError("Expected `past_key_values` or `cache`, not both: they are two names of the same.")
        cache = past_key_values if cache is None else cache
        image_features = (mm_encoder_outputs or {}).get("image")
        if pixel_values is not None and image_features is not None:
            raise ValueError("Expected `pixel_values` or `mm_encoder_outputs`, not both: they are the same volumes.")

        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        if pixel_values is not None:
            image_features = self.get_image_features(pixel_values, return_dict=True)
        image_tokens = None
        if image_features is not None:
            image_tokens = image_features.pooler_output.to(inputs_embeds.device, inputs_embeds.dtype)
            mask = self.get_placeholder_mask(input_ids, inputs_embeds, image_tokens)
            inputs_embeds = inputs_embeds.masked_scatter(mask, image_tokens)
        elif input_ids is not None and input_ids.shape[1] > 1:
            self.check_no_placeholder(input_ids, cache)

        outputs = self.language_model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            **{CACHE_NAME if cache is None or isinstance(cache, Cache) else "cache": cache},
            **kwargs,
        )
        return Med3DVLMModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            **{CACHE_NAME: getattr(outputs, CACHE_NAME)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=image_tokens,
        )


class Med3DVLMForConditionalGeneration(Med3DVLMPreTrainedModel, GenerationMixin):
    """
    Med3DVLM with a language-model head: writes reports and answers questions about volumes.

    Example:

    ```python
    >>> from transformers import AutoModelForImageTextToText, AutoProcessor

    >>> processor = AutoProcessor.from_pretrained("org/med3dvlm", trust_remote_code=True)  # doctest: +SKIP
    >>> model = AutoModelForImageTextToText.from_pretrained("org/med3dvlm", trust_remote_code=True)  # doctest: +SKIP
    >>> content = [{"type": "image", "path": "scan.nii.gz"}, {"type": "text", "text": "Is there a pleural effusion?"}]
    >>> inputs = processor.apply_chat_template(
    ...     [{"role": "user", "content": content}],
    ...     add_generation_prompt=True,
    ...     tokenize=True,
    ...     return_dict=True,
    ...     return_tensors="pt",
    ... )  # doctest: +SKIP
    >>> processor.post_process_image_text_to_text(model.generate(**inputs))  # doctest: +SKIP
    ```"""

    def __init__(self, config: Med3DVLMConfig):
        super().__init__(config)
        text_config = config.text_config.get_text_config(decoder=True)
        self.model = Med3DVLMModel(config)
        self.lm_head = nn.Linear(text_config.hidden_size, text_config.vocab_size, bias=False)
        # Each kind of language model calls its embeddings by another name.
        embeddings = self.get_input_embeddings()
        name = next(name for name, module in self.named_modules() if module is embeddings)
        self._tied_weights_keys = {"lm_head.weight": f"{name}.weight"}
        self.post_init()
        self._keys_to_ignore_on_load_unexpected.discard(KEYS_OF_HEAD)  # of the base model, which has no head

    def get_output_embeddings(self) -> nn.Module:
        """The language-model head."""
        return self.lm_head

    def enable_input_require_grads(self) -> None:
        """
        Lets gradients reach the layers of a frozen language model under activation checkpointing, as transformers does for every
        embedding of a model; but not the volume encoder's, whose stages would all be kept and gone through backwards for nothing.
        """
        hook = self.get_input_embeddings().register_forward_hook(
            lambda module, args, output: output.requires_grad_(True)
        )
        self._require_grads_hook, self._require_grads_hooks = hook, [hook]

    def get_image_features(
        self, pixel_values: torch.Tensor, **kwargs: Unpack[TransformersKwargs]
    ) -> Med3DVLMImageFeatures:
        """Encodes volumes once, for `generate(mm_encoder_outputs={"image": features})`: see [`Med3DVLMModel`]."""
        return self.model.get_image_features(pixel_values, **kwargs)

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: torch.LongTensor | None = None,
        **model_kwargs: Any,
    ) -> tuple[torch.LongTensor, dict[str, Any]]:
        """
        Repeats the inputs for several answers to one text (beams, `num_return_sequences`). Before that, volumes and the
        placeholders that are still to be read are compared: transformers leaves out volumes that are too many, here and where
        it reads a prompt in chunks, and counts placeholders that are in the cache already. A text that would be cut to nothing,
        because it is taken for one that begins with the tokens in the cache, is refused.
        """
        mm_encoder_outputs = model_kwargs.pop("mm_encoder_outputs", None) or {}
        inputs_embeds = model_kwargs.get("inputs_embeds")
        past_length = int(length_of(model_kwargs.get(CACHE_NAME)))
        start = past_length if past_length and holds_read_tokens(input_ids, **model_kwargs) else 0
        if inputs_embeds is None and input_ids is not None and 0 < input_ids.shape[1] <= start:
            raise ValueError(
                f"The cache holds {past_length} tokens, the text has {input_ids.shape[1]}: pass the whole chat, or the new turn "
                f"with {MASK_OF_ALL}."
            )
        if (image_features := mm_encoder_outputs.get("image")) is not None:
            mask = self.model.find_placeholders(input_ids if inputs_embeds is None else None, inputs_embeds)[:, start:]
            image_tokens = image_features.pooler_output
            self.model.check_placeholders(mask, image_tokens, past_length)
            if expand_size > 1:
                volumes_of_texts = mask.sum(1) // image_tokens.shape[1]
                groups = image_tokens.split(volumes_of_texts.tolist())
                image_features = copy.copy(image_features)  # the caller's features serve the next question too
                image_features.pooler_output = torch.cat([group for group in groups for _ in range(expand_size)])
        elif inputs_embeds is None and input_ids is not None:
            self.model.check_no_placeholder(input_ids[:, start:])
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size, is_encoder_decoder, input_ids, **model_kwargs
        )
        if image_features is not None:
            model_kwargs["mm_encoder_outputs"] = {**mm_encoder_outputs, "image": image_features}
        return input_ids, model_kwargs

    def _validate_generation_mode(
        self, generation_mode: Any, generation_config: Any, generation_mode_kwargs: dict[str, Any]
    ) -> None:
        """Refuses an assistant that reads volumes: transformers gives it none, and it would draft blind."""
        assistant = generation_mode_kwargs.get("assistant_model")
        if assistant is not None and assistant.config.model_type == self.config.model_type:
            raise ValueError(
                "Expected a language model that reads text alone as `assistant_model`, got a Med3DVLM, to which no volumes would "
                "be given. Take a smaller model of the language model's family, or `prompt_lookup_num_tokens`."
            )
        super()._validate_generation_mode(generation_mode, generation_config, generation_mode_kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        cache: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> Med3DVLMCausalLMOutputWithPast:
        r"""
        Takes the arguments of [`Med3DVLMModel`], and:

        Args:
            labels (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                The tokens to learn, -100 elsewhere. They are shifted here, not by the caller.
            logits_to_keep (`int` or `torch.Tensor`, *optional*, defaults to 0):
                Positions to score: so many last ones, 0 for all; their indices; or, as a `torch.BoolTensor` of shape
                `(batch_size, sequence_length)`, those of each text. Where `labels` say what to learn, a mask of the
                positions before them gives the same loss as all positions, without the logits of the others.

        Returns:
            [`Med3DVLMCausalLMOutputWithPast`], `logits` of shape `(batch_size, num_positions, vocab_size)`, for a mask
            `(num_positions, vocab_size)`.

        Raises:
            ValueError: see [`Med3DVLMModel`]; or the mask has another shape than the texts.
        """
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            mm_encoder_outputs=mm_encoder_outputs,
            cache=cache,
            return_dict=True,
            **kwargs,
        )
        logits = self.lm_head(keep_positions(outputs.last_hidden_state, logits_to_keep))

        loss = None
        if labels is not None:
            if is_mask(logits_to_keep):
                kwargs["shift_labels"] = next_labels(labels)[logits_to_keep]
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1], **kwargs)
        return Med3DVLMCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            **{CACHE_NAME: getattr(outputs, CACHE_NAME)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
        )


def is_mask(logits_to_keep: int | torch.Tensor) -> bool:
    """Whether positions are told for each text of a batch."""
    return isinstance(logits_to_keep, torch.Tensor) and logits_to_keep.dtype == torch.bool


def keep_positions(hidden_states: torch.Tensor, logits_to_keep: int | torch.Tensor) -> torch.Tensor:
    """
    The states to score, as [`Med3DVLMForConditionalGeneration.forward`] takes `logits_to_keep`.

    Args:
        hidden_states (`torch.Tensor` of shape `(batch_size, sequence_length, hidden_size)`):
            Of all positions.
        logits_to_keep (`int` or `torch.Tensor`):
            How many last positions, which positions of all texts, or a mask of positions of each text.

    Returns:
        `torch.Tensor` of shape `(batch_size, num_positions, hidden_size)`, for a mask `(num_positions, hidden_size)`.

    Raises:
        ValueError: the mask has another shape than the texts.
    """
    if is_mask(logits_to_keep):
        if logits_to_keep.shape != hidden_states.shape[:2]:
            raise ValueError(
                f"Expected a mask `logits_to_keep` of shape {tuple(hidden_states.shape[:2])}, (batch_size, "
                f"sequence_length), got {tuple(logits_to_keep.shape)}."
            )
        return hidden_states[logits_to_keep]
    positions = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
    return hidden_states[:, positions]


def next_labels(labels: torch.Tensor) -> torch.Tensor:
    """What the token at each position is to predict: the label after it, -100 at the end. `(batch_size, sequence_length)`."""
    return nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]


__all__ = [
    "Med3DVLMCausalLMOutputWithPast",
    "Med3DVLMForConditionalGeneration",
    "Med3DVLMImageFeatures",
    "Med3DVLMModel",
    "Med3DVLMModelOutputWithPast",
    "Med3DVLMPreTrainedModel",
]
