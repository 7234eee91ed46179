"""Configuration of the vision-language model."""

from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig

from .configuration_dcformer import DCFormerConfig
from .configuration_dcformer_siglip import build_vision_config, with_image_size
from .transformers_version import PreTrainedConfig, SubConfigSpec


# Sizes of Qwen2.5-7B-Instruct, the language model of the paper (its published config.json).
QWEN2_5_7B: dict[str, object] = {
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    "rms_norm_eps": 1e-6,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
}

# What language models do to the scores of the next token: Granite, Cohere, Gemma 2 and Falcon-H1.
SCALES_OF_LOGITS = ("logits_scaling", "logit_scale", "final_logit_softcapping", "lm_head_multiplier")


def find_scales_of_logits(text_config: PreTrainedConfig) -> list[str]:
    """The fields of a language model, with their values, that scale or cap the scores of its head."""
    values = {name: getattr(text_config, name, None) for name in SCALES_OF_LOGITS}
    return [f"`{name}` {value}" for name, value in values.items() if value not in (None, 1)]


@strict
class Med3DVLMConfig(PreTrainedConfig):
    r"""
    Configuration of [`Med3DVLMModel`] and [`Med3DVLMForConditionalGeneration`]. The defaults are the paper's model (Xin
    et al. 2025): DCFormer-small, two Mixer layers per stream, the sizes of Qwen2.5-7B.

    Args:
        vision_config (`DCFormerConfig`, `Vit3DConfig` or `dict`, *optional*):
            The volume encoder; DCFormer-small by default.
        text_config (`PreTrainedConfig` or `dict`, *optional*):
            Any decoder with attention that `AutoModel` builds and whose embeddings are as wide as its hidden states; Qwen2.5-7B by default.
            The head that scores words has no bias and no scale.
        image_size (`tuple[int, int, int]`, *optional*):
            Voxels along `(depth, height, width)`; sets, and afterwards reads, `vision_config.image_size`.
        image_token_id (`int`, *optional*, defaults to 151665):
            Id of the placeholder that image tokens replace, the first id that Qwen2.5's tokenizer leaves free.
        projector_type (`str`, *optional*, defaults to `"mixer"`):
            `"mixer"`, the paper's low-high hybrid: a stack of MLP-Mixer layers for each of two encoder stages;
            `"low_high_mlp"`, an MLP over both stages; `"mlp"`, `"linear"` and `"mhsa"` (self-attention and MLP), which
            see the last stage only.
        projector_depth (`int`, *optional*, defaults to 2):
            Linear layers in each MLP of the projector.
        projector_hidden_act (`str`, *optional*, defaults to `"gelu"`):
            Activation of the projector.
        low_level_tokens (`tuple[int, ...]`, *optional*, defaults to `(192, 128)`):
            Tokens after each Mixer layer of the low-level stream; its length is the depth of the stack.
        high_level_tokens (`tuple[int, ...]`, *optional*, defaults to `(64, 128)`):
            Tokens after each Mixer layer of the high-level stream.
        vision_feature_layers (`tuple[int, int]`, *optional*, defaults to `(-2, -1)`):
            The encoder's hidden states that are the low-level and the high-level stream.
        prepend_image_token_embedding (`bool`, *optional*, defaults to `False`):
            Puts the placeholder's own embedding in front of each volume's image tokens. The original implementation
            writes image tokens from position 1 on and so keeps its first placeholder; weights trained with it need
            `True`.
        tie_word_embeddings (`bool`, *optional*, defaults to `False`):
            Whether input and output embeddings share their weights; follows `text_config` when that ties them.

    Example:

    ```python
    >>> from med3dvlm import Med3DVLMConfig

    >>> config = Med3DVLMConfig()
    >>> config.image_size, config.image_seq_length
    ((128, 256, 256), 256)
    ```"""

    model_type = "med3dvlm"
    sub_configs_defaults = {
        "vision_config": SubConfigSpec(config_class=DCFormerConfig),
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="qwen2", init_kwargs=QWEN2_5_7B),
    }
    keys_to_ignore_at_inference = ["past_key_values", "cache", "image_hidden_states"]

    vision_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    image_token_id: int = 151665
    projector_type: Literal["mixer", "low_high_mlp", "mlp", "linear", "mhsa"] = "mixer"
    projector_depth: int = 2
    projector_hidden_act: str = "gelu"
    low_level_tokens: list[int] | tuple[int, ...] = (192, 128)
    high_level_tokens: list[int] | tuple[int, ...] = (64, 128)
    vision_feature_layers: list[int] | tuple[int, ...] = (-2, -1)
    prepend_image_token_embedding: bool = False
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any):
        self.auto_map = {
            "AutoConfig": "configuration_med3dvlm.Med3DVLMConfig",
            "AutoModel": "modeling_med3dvlm.Med3DVLMModel",
            "AutoModelForImageTextToText": "modeling_med3dvlm.Med3DVLMForConditionalGeneration",
            "AutoModelForMultimodalLM": "modeling_med3dvlm.Med3DVLMForConditionalGeneration",
        }
        self.custom_pipelines = {
            "image-text-to-text": {
                "impl": "pipeline_med3dvlm.Med3DVLMPipeline",
                "pt": ["AutoModelForImageTextToText"],
            }
        }
        self.vision_config = build_vision_config(self.vision_config)
        if (image_size := kwargs.pop("image_size", None)) is not None:
            self.image_size = image_size
        super().__post_init__(**kwargs)
        # `post_init` of the model reads only this flag; a text config that ties would otherwise lose its head.
        self.tie_word_embeddings = self.tie_word_embeddings or bool(self.text_config.tie_word_embeddings)

    @property
    def image_size(self) -> tuple[int, int, int]:
        """Voxels along `(depth, height, width)`, those of the volume encoder."""
        return tuple(self.vision_config.image_size)

    @image_size.setter
    def image_size(self, image_size: list[int] | tuple[int, ...]) -> None:
        self.vision_config = with_image_size(self.vision_config, image_size)

    @property
    def image_seq_length(self) -> int:
        """Placeholders one volume takes in the text."""
        low_layer, high_layer = self.vision_feature_layers
        if self.projector_type == "mixer":
            num_tokens = self.low_level_tokens[-1] + self.high_level_tokens[-1]
        elif self.projector_type == "low_high_mlp":
            num_tokens = self.vision_config.num_tokens(low_layer) + self.vision_config.num_tokens(high_layer)
        else:
            num_tokens = self.vision_config.num_tokens(high_layer)
        return num_tokens + self.prepend_image_token_embedding

    def validate_architecture(self):
        """Part of the `@strict` validation: refuses what cannot be built, and says what to change."""
        text_config = self.text_config.get_text_config(decoder=True)
        if not 0 <= self.image_token_id < text_config.vocab_size:
            raise ValueError(
                f"`image_token_id` {self.image_token_id} lies outside the vocabulary of {text_config.vocab_size} "
                "tokens: take an id of the tokenizer, or enlarge `text_config.vocab_size`."
            )
        if scales := find_scales_of_logits(text_config):
            raise ValueError(
                "`text_config`: expected a language model whose scores are the product of hidden state and head, as Qwen2's and "
                f"Llama's are; {text_config.model_type!r} has {' and '.join(scales)}, which Med3DVLM's head does not have. Choose "
                "another language model."
            )
        if len(self.vision_feature_layers) != 2:
            raise ValueError(
                "`vision_feature_layers` must name two hidden states, the low-level and the high-level stream, got "
                f"{self.vision_feature_layers}."
            )
        is_dcformer = self.vision_config.model_type == "dcformer"
        num_states = len(self.vision_config.depths) if is_dcformer else self.vision_config.num_hidden_layers + 1
        if not all(-num_states <= layer < num_states for layer in self.vision_feature_layers):
            raise ValueError(
                f"`vision_feature_layers` {tuple(self.vision_feature_layers)} must lie from {-num_states} to {num_states - 1}: "
                f"the volume encoder {self.vision_config.model_type!r} has {num_states} hidden states."
            )
        if self.projector_depth < 1:
            raise ValueError(f"`projector_depth` must be at least 1, got {self.projector_depth}.")
        if self.projector_type == "mixer":
            for name in ("low_level_tokens", "high_level_tokens"):
                tokens = getattr(self, name)
                if len(tokens) < 1 or min(tokens) < 1:
                    raise ValueError(f"`{name}` must hold one positive number for each Mixer layer, got {tokens}.")
                if text_config.hidden_size % 2 ** (len(tokens) - 1):
                    raise ValueError(
                        f"`{name}` asks for {len(tokens)} Mixer layers, each of which doubles the channels up to the "
                        f"text hidden size {text_config.hidden_size}, which 2**{len(tokens) - 1} does not divide: use "
                        "fewer layers or another text model."
                    )
        if self.projector_type == "mhsa" and self.vision_config.token_size(self.vision_feature_layers[1]) % 8:
            raise ValueError(
                "`projector_type` 'mhsa' has 8 attention heads, which do not divide the "
                f"{self.vision_config.token_size(self.vision_feature_layers[1])} channels of the high-level stream."
            )


__all__ = ["QWEN2_5_7B", "Med3DVLMConfig", "find_scales_of_logits"]
