"""Tiny models for the tests. All axes differ, so that a swapped one cannot pass unnoticed."""

import torch
from transformers import set_seed

from med3dvlm import (
    DCFormerConfig,
    DCFormerSiglipConfig,
    DCFormerSiglipModel,
    Med3DVLMConfig,
    Med3DVLMForConditionalGeneration,
    Med3DVLMImageProcessor,
    Med3DVLMProcessor,
    Vit3DConfig,
)
from med3dvlm.train.tokenizers import build_tiny_tokenizer


IMAGE_SIZE = (32, 64, 96)  # (depth, height, width)
IMAGE_TOKEN_ID, EOS_TOKEN_ID, PAD_TOKEN_ID = 7, 1, 0
VOCAB_SIZE = 99


def tiny_dcformer_config(**overrides) -> DCFormerConfig:
    fields = {"image_size": IMAGE_SIZE, "hidden_sizes": (4, 6, 8, 10, 12), "depths": (1, 1, 1, 2, 1)}
    return DCFormerConfig(**{**fields, "layer_scale_init_value": 0.5, **overrides})


def tiny_vit3d_config(**overrides) -> Vit3DConfig:
    fields = {"image_size": IMAGE_SIZE, "patch_size": (16, 32, 32), "hidden_size": 12, "num_hidden_layers": 3}
    return Vit3DConfig(**{**fields, "num_attention_heads": 2, "head_dim": 5, "intermediate_size": 9, **overrides})


def tiny_vlm_config(**overrides) -> Med3DVLMConfig:
    text_config = {
        "model_type": "qwen2",
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "eos_token_id": EOS_TOKEN_ID,
        "pad_token_id": PAD_TOKEN_ID,
        **overrides.pop("text_config", {}),
    }
    fields = {
        "vision_config": tiny_dcformer_config(),
        "text_config": text_config,
        "image_token_id": IMAGE_TOKEN_ID,
        "low_level_tokens": (6, 5),
        "high_level_tokens": (2, 3),
    }
    return Med3DVLMConfig(**{**fields, **overrides})


def tiny_vlm(seed: int = 0, **overrides) -> Med3DVLMForConditionalGeneration:
    torch.manual_seed(seed)
    model = Med3DVLMForConditionalGeneration(tiny_vlm_config(**overrides)).eval()
    with torch.no_grad():  # at the usual scale a random model's answer hardly depends on what it reads
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4)
    return model


def tiny_siglip(seed: int = 0, text_type: str = "bert", **overrides) -> DCFormerSiglipModel:
    text_configs = {
        "bert": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24},
        "distilbert": {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24},
    }
    text_config = {"model_type": text_type, "vocab_size": VOCAB_SIZE, **text_configs[text_type]}
    fields = {"vision_config": tiny_dcformer_config(), "text_config": text_config, "projection_dim": 20}
    torch.manual_seed(seed)
    return DCFormerSiglipModel(DCFormerSiglipConfig(**{**fields, **overrides})).eval()


def random_volumes(count: int, seed: int = 0, image_size: tuple[int, int, int] = IMAGE_SIZE) -> torch.Tensor:
    return torch.rand(count, 1, *image_size, generator=torch.Generator().manual_seed(seed))


def text_with_volumes(config: Med3DVLMConfig, *parts: int | list[int]) -> torch.Tensor:
    """(1, L) token ids; an integer stands for that many volumes, a list for text tokens."""
    ids: list[int] = []
    for part in parts:
        ids += [config.image_token_id] * config.image_seq_length * part if isinstance(part, int) else part
    return torch.tensor([ids])


def build_tiny_model(
    image_size: tuple[int, int, int] = (32, 64, 96), seed: int = 0
) -> tuple[Med3DVLMForConditionalGeneration, Med3DVLMProcessor]:
    """
    An untrained vision-language model of the paper's design with few weights, and its processor.

    Args:
        image_size (`tuple[int, int, int]`, *optional*, defaults to `(32, 64, 96)`):
            Voxels along `(depth, height, width)`.
        seed (`int`, *optional*, defaults to 0):
            Seed of the random weights.

    Returns:
        The model, in evaluation mode, and the processor.
    """
    tokenizer = build_tiny_tokenizer()
    config = Med3DVLMConfig(
        vision_config={"image_size": image_size, "hidden_sizes": (4, 6, 8, 10, 12), "depths": (1, 1, 1, 2, 1)},
        text_config={
            "model_type": "qwen2",
            "vocab_size": len(tokenizer),
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 2048,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        low_level_tokens=(6, 5),
        high_level_tokens=(2, 3),
    )
    state = torch.random.get_rng_state()
    set_seed(seed)
    model = Med3DVLMForConditionalGeneration(config).eval()
    torch.random.set_rng_state(state)
    with torch.no_grad():  # at the usual scale, what random weights answer hardly depends on what they read
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4)
    # The weights are random, and without this the answers would be broken characters.
    printable = set(map(chr, range(ord("!"), ord("~") + 1))) | {"Ġ", "<|im_end|>"}
    suppressed = [index for token, index in tokenizer.get_vocab().items() if token not in printable]
    model.generation_config.suppress_tokens = sorted(suppressed)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.max_new_tokens = 32
    processor = Med3DVLMProcessor(
        Med3DVLMImageProcessor(image_size=list(image_size)), tokenizer, image_seq_length=config.image_seq_length
    )
    return model, processor
