"""The models a recipe asks for, put together from published folders, pretrained text models and fresh parts."""

import dataclasses
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, TrainingArguments
from transformers.configuration_utils import PreTrainedConfig
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config
from transformers.utils import logging

from ..configuration.configuration_dcformer import DCFormerConfig
from ..configuration.configuration_dcformer_siglip import DCFormerSiglipConfig
from ..configuration.configuration_med3dvlm import Med3DVLMConfig, find_scales_of_logits
from ..hub_cards.remote_code import forget_local_folders
from ..modeling_med3dvlm.modeling_dcformer import DCFormerModel
from ..modeling_med3dvlm.modeling_dcformer_siglip import VISION_MODELS, DCFormerSiglipModel
from ..modeling_med3dvlm.modeling_med3dvlm import Med3DVLMForConditionalGeneration
from ..modeling_med3dvlm.modeling_projector import PROJECTORS
from ..modeling_med3dvlm.modeling_vit3d import Vit3DModel
from ..processing.image_processing_med3dvlm import Med3DVLMImageProcessor
from ..processing.processing_med3dvlm import Med3DVLMProcessor
from .recipe import ModelRecipe
from .tokenizers import IMAGE_TOKEN, build_tiny_tokenizer, train_word_piece_tokenizer
from .whitening import whiten_text_projection


logger = logging.get_logger(__name__)

# The linear layers of a language model's blocks, by the names that Qwen2 and Llama give them.
LORA_TARGETS = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"


@contextmanager
def made_whole(arguments: TrainingArguments) -> Iterator[None]:
    """
    Within it models are made, loaded and changed as in one process. With DeepSpeed's ZeRO-3, [`TrainingArguments`] has
    transformers share out the weights of every model while it is made, and whatever reads or replaces a weight then (a
    tokenizer's new embeddings, whitening, adapters, parts of one model put into another) finds an empty tensor.

    Args:
        arguments (`TrainingArguments`):
            Of the run. They are DeepSpeed's again afterwards.
    """
    plugin = arguments.deepspeed_plugin
    if plugin is None:
        yield
        return
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        set_hf_deepspeed_config(plugin.hf_ds_config)


def build_dual_encoder(
    recipe: ModelRecipe, texts: Iterable[str], reports: Sequence[str] = (), max_text_length: int = 512
) -> tuple[DCFormerSiglipModel, Med3DVLMProcessor]:
    """
    The dual encoder of the stage `contrastive`, and its processor.

    Args:
        recipe ([`ModelRecipe`]):
            `start_from`, or `vision` and `text_encoder` for a new one.
        texts (`Iterable[str]`):
            Training texts, for the tokenizer of a text encoder that starts from random weights.
        reports (`Sequence[str]`, *optional*):
            Training reports, for `whiten_text`.
        max_text_length (`int`, *optional*, defaults to 512):
            Tokens of a report.

    Raises:
        OSError: a pretrained model cannot be found.
        ValueError: a field is missing or cannot be.
    """
    if recipe.start_from:
        warn_of_unused(recipe)
        # Trained weights are float32 whatever the precision of the files.
        return DCFormerSiglipModel.from_pretrained(recipe.start_from, dtype=torch.float32), load_processor(recipe)
    if recipe.text_encoder is None:
        raise ValueError(
            "`model.text_encoder` is empty: name a pretrained text encoder, or give the fields of a configuration, such "
            "as {model_type: bert, hidden_size: 128, ...}."
        )
    if isinstance(recipe.text_encoder, str):
        tokenizer = AutoTokenizer.from_pretrained(recipe.text_encoder)
        text_model = AutoModel.from_pretrained(recipe.text_encoder, dtype=torch.float32)
        text_config = text_model.config
        forget_local_folders(text_config)
    else:
        tokenizer = train_word_piece_tokenizer(texts, _tokenizer_size(recipe))
        fields = {**recipe.text_encoder, "vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
        text_model, text_config = None, build_text_config(fields)

    vision_model = load_volume_encoder(recipe.vision) if isinstance(recipe.vision, str) else None
    vision_config = vision_config_fields(recipe.vision) if vision_model is None else vision_model.config
    config = DCFormerSiglipConfig(vision_config=vision_config, text_config=text_config, **recipe.dual_encoder)
    model = DCFormerSiglipModel(config)
    if vision_model is not None:
        model.vision_model.load_state_dict(vision_model.state_dict())
    if text_model is not None:
        text_model.pooler = None  # the dual encoder has none: it takes the vector itself
        model.text_model.load_state_dict(text_model.state_dict())
    if recipe.whiten_text:
        whiten_text_projection(model, tokenizer, reports, max_text_length)
    image_processor = Med3DVLMImageProcessor(image_size=list(config.image_size))
    if vision_model is not None:  # what the encoder was trained with, where the recipe does not say otherwise
        image_processor = Med3DVLMImageProcessor.from_pretrained(recipe.vision)
    image_processor = adjust_image_processor(image_processor, recipe.image_processor)
    return model, Med3DVLMProcessor(image_processor, tokenizer)


def adjust_image_processor(image_processor: Any, options: dict[str, Any]) -> Med3DVLMImageProcessor:
    """
    An image processor with the options that a recipe gives.

    Raises:
        ValueError: an option cannot be, or would make volumes of another size than the model takes.
    """
    adjusted = Med3DVLMImageProcessor(**{**image_processor.to_dict(), **options})
    if list(adjusted.image_size) != list(image_processor.image_size):
        raise ValueError(
            f"The image processor makes volumes of {tuple(adjusted.image_size)}, and the volume encoder takes "
            f"{tuple(image_processor.image_size)}: leave `image_size` out of `model.image_processor`."
        )
    return adjusted


def load_processor(recipe: ModelRecipe) -> Med3DVLMProcessor:
    """
    The processor of what a recipe starts from, its image processor with the options that the recipe gives.

    Raises:
        OSError: there is none.
        ValueError: an option cannot be, see [`adjust_image_processor`].
    """
    processor = Med3DVLMProcessor.from_pretrained(str(recipe.start_from))
    processor.image_processor = adjust_image_processor(processor.image_processor, recipe.image_processor)
    return processor


def warn_of_unused(recipe: ModelRecipe) -> None:
    """Says which fields of a recipe have no effect, because the whole model that it starts from brings its own."""
    used = ("start_from", "image_processor", "dtype")
    names = [entry.name for entry in dataclasses.fields(recipe) if entry.name not in used]
    unused = [f"`model.{name}`" for name in names if getattr(recipe, name)]
    if unused:
        logger.warning(f"{', '.join(unused)}: not used, {recipe.start_from} brings its own.")


def load_volume_encoder(source: str) -> DCFormerModel | Vit3DModel:
    """
    A published volume encoder, or that of a published dual encoder.

    Args:
        source (`str`):
            Folder, or name of a repository on the Hub.

    Returns:
        [`DCFormerModel`] or [`Vit3DModel`], in float32 whatever the precision of the files.

    Raises:
        OSError: there is none.
        ValueError: it is another kind of model, or the weights do not fit, see `from_pretrained`.
    """
    model_type = AutoConfig.from_pretrained(source).model_type
    if model_type == DCFormerSiglipConfig.model_type:
        return DCFormerSiglipModel.from_pretrained(source, dtype=torch.float32).vision_model
    if model_type not in VISION_MODELS:
        raise ValueError(
            f"`model.vision` {source!r}: expected a dual encoder or one of the volume encoders {sorted(VISION_MODELS)}, got "
            f"`model_type` {model_type!r}."
        )
    return VISION_MODELS[model_type].from_pretrained(source, dtype=torch.float32)


def build_vision_language_model(
    recipe: ModelRecipe, texts: Iterable[str]
) -> tuple[Med3DVLMForConditionalGeneration, Med3DVLMProcessor]:
    """
    The vision-language model that the stage `projector` starts with: the volume encoder of a published dual encoder, a
    fresh projector, and a language model. A published vision-language model is loaded as it is.

    Args:
        recipe ([`ModelRecipe`]):
            `start_from`, `language_model` and `projector`.
        texts (`Iterable[str]`):
            Training texts, for the tokenizer of a language model that starts from random weights.

    Raises:
        OSError: a pretrained model cannot be found.
        ValueError: a field is missing or cannot be, `start_from` is another kind of model, or the language model scores words
            in another way than the model that it becomes a part of.
    """
    start_config = AutoConfig.from_pretrained(str(recipe.start_from))
    if start_config.model_type == Med3DVLMConfig.model_type:
        return load_vision_language_model(recipe)
    if start_config.model_type != DCFormerSiglipConfig.model_type:
        raise ValueError(
            f"`model.start_from` {recipe.start_from!r}: expected a dual encoder or a vision-language model, got "
            f"`model_type` {start_config.model_type!r}."
        )
    if recipe.language_model is None:
        raise ValueError(
            "`model.language_model` is empty: name a pretrained one, or give the fields of a configuration, such as "
            "{model_type: qwen2, hidden_size: 128, ...}."
        )
    dual_encoder = DCFormerSiglipModel.from_pretrained(recipe.start_from, dtype=torch.float32)
    image_processor = load_processor(recipe).image_processor
    language_model, tokenizer = build_language_model(recipe, texts)
    check_head(language_model)

    config = Med3DVLMConfig(
        vision_config=dual_encoder.config.vision_config,
        text_config=language_model.config,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        **recipe.projector,
    )
    with torch.device("meta"):  # every part is replaced by one that exists: nothing large is made twice
        model = Med3DVLMForConditionalGeneration(config)
    model.model.vision_tower = dual_encoder.vision_model
    model.model.language_model = language_model.base_model  # what `AutoModel` builds
    model.lm_head = language_model.get_output_embeddings()
    model.model.multi_modal_projector = PROJECTORS[config.projector_type](config)
    model.model.multi_modal_projector.apply(model._init_weights)
    model.generation_config = language_model.generation_config
    processor = Med3DVLMProcessor(image_processor, tokenizer, image_seq_length=config.image_seq_length)
    return model, processor


def check_head(language_model: Any) -> None:
    """
    Raises:
        ValueError: the scores of the next token are not the product of the last hidden state and the head's weight: the loss
            would not be the language model's own.
    """
    faults = find_scales_of_logits(language_model.config.get_text_config(decoder=True))
    if getattr(language_model.get_output_embeddings(), "bias", None) is not None:
        faults.append("a bias in its head")
    if faults:
        raise ValueError(
            f"`model.language_model`: expected one whose scores are the product of hidden state and head, as Qwen2's and "
            f"Llama's are; {type(language_model).__name__} has {' and '.join(faults)}, which Med3DVLM's head does not have. Choose "
            "another language model."
        )


def build_language_model(recipe: ModelRecipe, texts: Iterable[str]) -> tuple[Any, Any]:
    """
    The language model and its tokenizer, which knows the placeholder of a volume.

    Raises:
        OSError: a pretrained model cannot be found.
        ValueError: a field cannot be.
    """
    if isinstance(recipe.language_model, str):
        tokenizer = AutoTokenizer.from_pretrained(recipe.language_model)
        model = AutoModelForCausalLM.from_pretrained(recipe.language_model, dtype=getattr(torch, recipe.dtype))
        forget_local_folders(model.config)
        if tokenizer.convert_tokens_to_ids(IMAGE_TOKEN) in (None, tokenizer.unk_token_id):
            tokenizer.add_tokens([IMAGE_TOKEN], special_tokens=True)
        if len(tokenizer) > model.config.vocab_size:
            model.resize_token_embeddings(len(tokenizer))
        return model, tokenizer
    tokenizer = build_tiny_tokenizer().train_new_from_iterator(list(texts), vocab_size=_tokenizer_size(recipe))
    fields = {
        **recipe.language_model,
        "vocab_size": len(tokenizer),
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": None,
    }
    return AutoModelForCausalLM.from_config(build_text_config(fields)), tokenizer


def load_vision_language_model(recipe: ModelRecipe) -> tuple[Med3DVLMForConditionalGeneration, Med3DVLMProcessor]:
    """
    The published vision-language model that a stage goes on with.

    Raises:
        OSError: there is none.
        ValueError: the weights do not fit, see `from_pretrained`.
    """
    source = str(recipe.start_from)
    if (Path(source) / "adapter_config.json").exists():
        raise ValueError(
            f"`model.start_from` {source!r} is an adapter: merge it into its base first, `med3dvlm merge {source} FOLDER`."
        )
    warn_of_unused(recipe)
    model = Med3DVLMForConditionalGeneration.from_pretrained(source, dtype=getattr(torch, recipe.dtype))
    return model, load_processor(recipe)


def choose_trained_parts(model: Med3DVLMForConditionalGeneration, trained: list[str]) -> None:
    """
    Lets gradients reach the named parts only. Trained weights are float32 whatever the precision of the frozen ones:
    steps of a usual size would be lost in a shorter format.

    Args:
        model ([`Med3DVLMForConditionalGeneration`]):
            Changed in place.
        trained (`list[str]`):
            Of "vision_tower", "multi_modal_projector" and "language_model"; the head belongs to the language model.
    """
    model.requires_grad_(False)
    for name in trained:
        part: nn.Module = getattr(model.model, name)
        part.float().requires_grad_(True)
    if "language_model" in trained:
        model.lm_head.float().requires_grad_(True)


def add_lora(model: Med3DVLMForConditionalGeneration, lora: dict[str, Any], trained: list[str]) -> Any:
    """
    Puts low-rank adapters on the linear layers of the language model.

    Args:
        model ([`Med3DVLMForConditionalGeneration`]):
            The base model.
        lora (`dict`):
            Fields of `peft.LoraConfig`. The layers are those of the language model's blocks unless `target_modules` says
            otherwise.
        trained (`list[str]`):
            Parts that are trained in full and saved with the adapters.

    Returns:
        `peft.PeftModel`.

    Raises:
        ValueError: a field is not known to peft, or linear layers of the language model have other names, so that they would
            get no adapter.
    """
    from peft import LoraConfig, get_peft_model

    if "target_modules" not in lora:
        check_lora_targets(model.model.language_model)
    fields = {
        "target_modules": LORA_TARGETS,
        "task_type": "CAUSAL_LM",
        "modules_to_save": list(trained) or None,
        **lora,
    }
    try:
        settings = LoraConfig(**fields)
    except TypeError as error:
        raise ValueError(f"`lora`: not all of {sorted(lora)} are fields of peft.LoraConfig: {error}") from error
    model.requires_grad_(False)
    peft_model = get_peft_model(model, settings)
    for parameter in peft_model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return peft_model


def check_lora_targets(language_model: nn.Module) -> None:
    """
    Raises:
        ValueError: linear layers of the language model have other names than `LORA_TARGETS`.
    """
    linear = [name for name, module in language_model.named_modules() if isinstance(module, nn.Linear)]
    names = sorted({name.rpartition(".")[2] for name in linear})
    left_out = [name for name in names if not re.fullmatch(LORA_TARGETS, f"language_model.{name}")]
    if left_out:
        raise ValueError(
            f"`lora`: expected linear layers with the names that Qwen2 and Llama give them, got {', '.join(left_out)} in "
            f"{type(language_model).__name__}, which would have no adapter. Name those that are to have one, all of them with "
            f"lora.target_modules='.*language_model.*\\.({'|'.join(names)})'."
        )


def build_text_config(fields: dict[str, Any]) -> PreTrainedConfig:
    """
    Raises:
        ValueError: `model_type` is missing or not one of transformers.
    """
    fields = dict(fields)
    model_type = fields.pop("model_type", None)
    if model_type is None:
        raise ValueError(f"The configuration of a text model needs `model_type`, such as bert or qwen2; got {fields}.")
    return AutoConfig.for_model(model_type, **fields)


def vision_config_fields(vision: dict[str, Any]) -> Any:
    """Fields of a volume encoder's configuration, with `variant` resolved to one of the published sizes of DCFormer."""
    fields = dict(vision)
    variant = fields.pop("variant", None)
    if variant is None:
        return fields
    if fields.pop("model_type", "dcformer") != "dcformer":
        raise ValueError("`model.vision.variant` names a size of DCFormer: leave it out for another `model_type`.")
    return DCFormerConfig.from_variant(variant, **fields)


def _tokenizer_size(recipe: ModelRecipe) -> int:
    if recipe.tokenizer_size is None:
        raise ValueError(
            "`model.tokenizer_size` is empty: a text model from random weights needs a tokenizer of its own."
        )
    return recipe.tokenizer_size


__all__ = [
    "LORA_TARGETS",
    "add_lora",
    "build_dual_encoder",
    "build_language_model",
    "build_text_config",
    "build_vision_language_model",
    "choose_trained_parts",
    "load_vision_language_model",
    "load_volume_encoder",
    "made_whole",
    "vision_config_fields",
]
