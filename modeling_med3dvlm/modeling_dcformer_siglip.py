"""The dual encoder that aligns volumes with reports: DCFormer, a text encoder, and one contrastive loss."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.modeling_utils import PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs, can_return_tuple

from ..configuration.configuration_dcformer_siglip import DCFormerSiglipConfig
from .contrastive_loss import contrastive_loss
from .modeling_dcformer import DCFormerModel
from .modeling_vit3d import Vit3DModel
from .strict_loading import StrictLoadingMixin


# Encoders of a volume, by the `model_type` of their configuration. `AutoModel` would not find a published folder's own
# classes when the folder is loaded from a disk.
VISION_MODELS: dict[str, type[PreTrainedModel]] = {"dcformer": DCFormerModel, "vit3d": Vit3DModel}


@dataclass
class DCFormerSiglipOutput(ModelOutput):
    """
    Output of [`DCFormerSiglipModel`].

    Args:
        loss (`torch.Tensor` of shape `()`, *optional*, returned with `return_loss=True`):
            Contrastive loss; in a distributed run this process's share, whose mean over processes is the loss.
        logits_per_image (`torch.Tensor` of shape `(image_batch_size, text_batch_size)`):
            `exp(logit_scale) * <image, text> + logit_bias`; with the sigmoid loss its sigmoid is the probability that
            the two belong together.
        logits_per_text (`torch.Tensor` of shape `(text_batch_size, image_batch_size)`):
            The transpose.
        text_embeds (`torch.Tensor` of shape `(text_batch_size, projection_dim)`):
            Text vectors of unit length.
        image_embeds (`torch.Tensor` of shape `(image_batch_size, projection_dim)`):
            Volume vectors of unit length.
        text_model_output (`BaseModelOutputWithPooling`):
            Output of `get_text_features`.
        vision_model_output (`BaseModelOutputWithPooling`):
            Output of `get_image_features`.
    """

    loss: torch.Tensor | None = None
    logits_per_image: torch.Tensor | None = None
    logits_per_text: torch.Tensor | None = None
    text_embeds: torch.Tensor | None = None
    image_embeds: torch.Tensor | None = None
    text_model_output: BaseModelOutputWithPooling | None = None
    vision_model_output: BaseModelOutputWithPooling | None = None

    def to_tuple(self) -> tuple[Any, ...]:
        """The fields that are not None, nested outputs as tuples too."""
        return tuple(value.to_tuple() if isinstance(value, ModelOutput) else value for value in self.values())


class DCFormerSiglipPreTrainedModel(StrictLoadingMixin, PreTrainedModel):
    """Initialisation and capabilities of the dual encoder."""

    config: DCFormerSiglipConfig
    base_model_prefix = "dcformer_siglip"
    input_modalities = ["image", "text"]
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        """Normal weights for the projections; the scalars start where the configuration says."""
        super()._init_weights(module)
        if isinstance(module, DCFormerSiglipModel):
            init.constant_(module.logit_scale, self.config.logit_scale_init_value)
            if module.logit_bias is not None:
                init.constant_(module.logit_bias, self.config.logit_bias_init_value)


class DCFormerSiglipModel(DCFormerSiglipPreTrainedModel):
    """
    A volume encoder and a text encoder with a shared embedding space (Xin et al. 2025).

    Example:

    ```python
    >>> import torch
    >>> from med3dvlm import DCFormerConfig, DCFormerSiglipConfig, DCFormerSiglipModel

    >>> config = DCFormerSiglipConfig(
    ...     vision_config=DCFormerConfig.from_variant("nano", image_size=(32, 64, 64)),
    ...     text_config={"model_type": "bert", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
    ...     projection_dim=32,
    ... )
    >>> model = DCFormerSiglipModel(config).eval()
    >>> input_ids = torch.tensor([[101, 2023, 102], [101, 2008, 102]])
    >>> outputs = model(input_ids=input_ids, pixel_values=torch.rand(2, 1, 32, 64, 64), return_loss=True)
    >>> outputs.logits_per_image.shape
    torch.Size([2, 2])
    ```"""

    # The loss is a mean over pairs and ignores `num_items_in_batch`. Left to guess, Trainer would take `**kwargs` for a
    # sign that it does not, and leave accumulated batches that happen to carry labels unaveraged.
    accepts_loss_kwargs = False

    def __init__(self, config: DCFormerSiglipConfig):
        super().__init__(config)
        # Not in the precision that a part's configuration remembers: the parts would not fit each other.
        dtype = torch.get_default_dtype()
        vision_class = VISION_MODELS[config.vision_config.model_type]
        self.vision_model = vision_class._from_config(config.vision_config, dtype=dtype)
        self.text_model = AutoModel.from_config(config.text_config, dtype=dtype)
        self.text_model.pooler = None  # a pooler of the text encoder would never be trained: the vector is taken here
        self.visual_projection = nn.Linear(config.vision_config.hidden_size, config.projection_dim)
        self.text_projection = nn.Linear(config.text_config.hidden_size, config.projection_dim)
        # Shape (1,), not (): DeepSpeed cannot handle parameters without a dimension.
        self.logit_scale = nn.Parameter(torch.full((1,), config.logit_scale_init_value))
        self.logit_bias = None
        if config.loss_type == "sigmoid":
            self.logit_bias = nn.Parameter(torch.full((1,), config.logit_bias_init_value))
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The text encoder's embeddings."""
        return self.text_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replaces the text encoder's embeddings."""
        self.text_model.set_input_embeddings(value)

    @can_return_tuple
    def get_image_features(
        self, pixel_values: torch.Tensor, **kwargs: Unpack[TransformersKwargs]
    ) -> BaseModelOutputWithPooling:
        r"""
        Args:
            pixel_values (`torch.Tensor` of shape `(batch_size, num_channels, depth, height, width)`):
                Volumes scaled to [0, 1].

        Returns:
            The volume encoder's output, whose `pooler_output`, of shape `(batch_size, projection_dim)`, is the mean of
            the last stage brought to the shared space, not normalised.
        """
        outputs = self.vision_model(pixel_values, return_dict=True, **kwargs)
        return BaseModelOutputWithPooling(
            last_hidden_state=outputs.last_hidden_state,
            pooler_output=self.visual_projection(outputs.pooler_output),
            hidden_states=outputs.hidden_states,
            attentions=getattr(outputs, "attentions", None),  # a DCFormer has none
        )

    @can_return_tuple
    def get_text_features(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        r"""
        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`):
                Tokens of the reports.
            attention_mask (`torch.Tensor` of shape `(batch_size, sequence_length)`, *optional*):
                1 for tokens, 0 for padding.

        Returns:
            The text encoder's output, whose `pooler_output`, of shape `(batch_size, projection_dim)`, is the first
            token's vector (or the mean, with `text_pooling="mean"`) brought to the shared space, not normalised.
        """
        outputs = self.text_model(input_ids=input_ids, attention_mask=attention_mask, return_dict=True, **kwargs)
        if self.config.text_pooling == "cls":
            pooled = outputs.last_hidden_state[:, 0]  # (B, L, C) -> (B, C)
        else:
            mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            mask = mask.unsqueeze(-1).to(outputs.last_hidden_state.dtype)
            pooled = (outputs.last_hidden_state * mask).sum(dim=1) / mask.sum(dim=1)  # (B, L, C) -> (B, C)
        return BaseModelOutputWithPooling(
            last_hidden_state=outputs.last_hidden_state,
            pooler_output=self.text_projection(pooled),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor,
        pixel_values: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        return_loss: bool | None = None,
        text_group_ids: torch.LongTensor | None = None,
        num_unpaired_texts: int = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> DCFormerSiglipOutput:
        r"""
        Args:
            input_ids (`torch.LongTensor` of shape `(text_batch_size, sequence_length)`):
                Tokens of the reports.
            pixel_values (`torch.Tensor` of shape `(image_batch_size, num_channels, depth, height, width)`):
                Volumes scaled to [0, 1].
            attention_mask (`torch.Tensor` of shape `(text_batch_size, sequence_length)`, *optional*):
                1 for tokens, 0 for padding.
            return_loss (`bool`, *optional*):
                Whether to compute the contrastive loss; text `i` then belongs to volume `i`, and in a distributed run
                every process must take part.
            text_group_ids (`torch.LongTensor` of shape `(text_batch_size,)`, *optional*):
                Equal for texts that are the identical report, whichever process holds them: in the loss a volume matches
                all texts of its own text's group, by default its own alone. Without `return_loss` they have no effect.
            num_unpaired_texts (`int`, *optional*, defaults to 0):
                With `return_loss`: so many texts, the last ones, belong to no volume, and are negatives of all volumes but
                those of their group.

        Returns:
            [`DCFormerSiglipOutput`]

        Raises:
            ValueError: a loss was asked for, and the numbers of volumes, texts and group ids do not fit together.
        """
        vision_outputs = self.get_image_features(pixel_values, return_dict=True, **kwargs)
        text_outputs = self.get_text_features(input_ids, attention_mask, return_dict=True, **kwargs)
        text_embeds = nn.functional.normalize(text_outputs.pooler_output, dim=-1)
        # The two encoders may lie on different devices.
        image_embeds = nn.functional.normalize(vision_outputs.pooler_output, dim=-1).to(text_embeds.device)
        logit_scale = self.logit_scale.to(text_embeds.device)
        logit_bias = None if self.logit_bias is None else self.logit_bias.to(text_embeds.device)

        logits_per_image = logit_scale.exp() * image_embeds @ text_embeds.T
        if logit_bias is not None:
            logits_per_image = logits_per_image + logit_bias

        loss = None
        if return_loss:
            loss = contrastive_loss(
                image_embeds,
                text_embeds,
                logit_scale,
                logit_bias,
                loss_type=self.config.loss_type,
                exchange=self.config.loss_exchange,
                chunk_size=self.config.loss_chunk_size,
                text_group_ids=text_group_ids,
                num_unpaired_texts=num_unpaired_texts,
            )
        return DCFormerSiglipOutput(
            loss=loss,
            logits_per_image=logits_per_image,
            logits_per_text=logits_per_image.T,
            text_embeds=text_embeds,
            image_embeds=image_embeds,
            text_model_output=text_outputs,
            vision_model_output=vision_outputs,
        )


__all__ = ["VISION_MODELS", "DCFormerSiglipModel", "DCFormerSiglipOutput", "DCFormerSiglipPreTrainedModel"]
