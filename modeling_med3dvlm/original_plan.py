"""What weights of the original implementation are, read from the names and shapes of their tensors."""

import os
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel
from transformers.configuration_utils import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import CONFIG_NAME

from ..configuration.configuration_dcformer import DCFORMER_VARIANTS, DCFormerConfig
from ..configuration.configuration_dcformer_siglip import DCFormerSiglipConfig
from ..configuration.configuration_med3dvlm import Med3DVLMConfig
from ..configuration.configuration_vit3d import Vit3DConfig
from ..processing.image_processing_med3dvlm import Med3DVLMImageProcessor
from ..processing.processing_med3dvlm import Med3DVLMProcessor
from .modeling_dcformer import DCFormerModel
from .modeling_dcformer_siglip import DCFormerSiglipModel
from .modeling_med3dvlm import Med3DVLMForConditionalGeneration
from .modeling_projector import PROJECTORS
from .modeling_vit3d import Vit3DModel
from .original_layout import (
    PROJECTOR_ROWS,
    Layout,
    Row,
    dual_encoder_layout,
    encoder_layout,
    find_projector_type,
    prefixed,
    vision_language_layout,
)
from .original_source import PRETRAINED_VIT, Source, few, read_json
from .strict_loading import describe_faults


KNOWN = (
    f"the volume encoder ({PRETRAINED_VIT}: `encoder.s0...` or `encoder.to_patch_embedding...`, or M3D-CLIP's "
    "`patch_embedding...`), the dual encoder (DCFormer_SigLIP: `vision_encoder...`), the projector (mm_projector.bin: "
    "`model.mm_projector...`), a LoRA run (model_with_lora.bin: `base_model.model...`) and the vision-language model "
    "(Med3DVLM-Qwen-2.5-7B: `model.vision_tower...` and `model.layers...`)"
)
IMAGE_TOKEN = "<im_patch>"
# The heads of ClinicalBERT, as of every BERT of its size, are this wide.
BERT_HEAD_SIZE = 64


@dataclass
class Plan:
    """
    What becomes of a source.

    Args:
        kind (`str`):
            What it was found to be, in words.
        layout (`Layout`):
            The table of names.
        expected (`dict[str, tuple[int, ...]]`):
            The names and shapes that must come out, no more and no less.
        vision_config (`PreTrainedConfig`):
            Configuration of the volume encoder, for tensors that follow its grid.
        model (`PreTrainedModel`, *optional*):
            The model on the meta device; none for a projector.
        processor (*optional*):
            What prepares its inputs.
        projector_config (`Med3DVLMConfig`, *optional*):
            Of a projector alone.
        assumptions (`list[str]`):
            What the files do not say.
    """

    kind: str
    layout: Layout
    expected: dict[str, tuple[int, ...]]
    vision_config: Any
    model: PreTrainedModel | None = None
    processor: Any = None
    projector_config: Med3DVLMConfig | None = None
    assumptions: list[str] = field(default_factory=list)


def make_plan(source: Source, config: str | os.PathLike | None, tokenizer: Any) -> Plan:
    """
    Finds out what a source is, from the names of its tensors.

    Raises:
        ValueError: it is none of the known artefacts, or its sizes are none that the original can have.
    """
    names = source.tensors

    def has(prefix: str) -> bool:
        return any(name.startswith(prefix) for name in names)

    if has("vision_encoder.patch_embedding."):
        raise ValueError(
            f"{source.path}: M3D-CLIP as a whole, which pairs its own transformer with a BERT. Its volume encoder alone, "
            f"{PRETRAINED_VIT} of M3D, can be converted."
        )
    needs_text = has("vision_encoder.") or has("model.layers.")
    if (config is not None or tokenizer is not None) and not needs_text:
        raise ValueError(f"{source.path}: it has no text model, so neither `config` nor `tokenizer` has a place here.")
    if has("vision_encoder."):
        return plan_dual_encoder(source, config, tokenizer)
    if has("model.vision_tower.") and has("model.layers."):
        return plan_vision_language_model(source, config, tokenizer)
    if has("model.mm_projector.") and not has("model.layers."):
        return plan_projector(source)
    for prefix in ("", "vision_tower."):  # `vision_tower.bin` of a merged folder has the prefix
        if (
            has(f"{prefix}encoder.s0.")
            or has(f"{prefix}encoder.to_patch_embedding.")
            or has(f"{prefix}patch_embedding.")
        ):
            return plan_encoder(source, prefix)
    model_type = source.config.get("model_type")
    raise ValueError(
        f"{source.path}: no artefact of the original that is known here. Found {len(names)} tensors, {few(sorted(names))}"
        f"{f', and `model_type` {model_type!r}' if model_type else ''}. Known are {KNOWN}."
    )


def plan_encoder(source: Source, prefix: str) -> Plan:
    """The plan for a volume encoder alone."""
    vision_config, vision_type = read_vision_config(source, prefix)
    model = on_meta(DCFormerModel if vision_type == "dcformer" else Vit3DModel, vision_config)
    image_processor = Med3DVLMImageProcessor(image_size=list(vision_config.image_size))
    return Plan(
        f"volume encoder ({describe_vision(vision_config, vision_type)})",
        encoder_layout(vision_type, prefix),
        shapes_of(model),
        vision_config,
        model,
        image_processor,
        assumptions=assumed_size(source, vision_config),
    )


def plan_dual_encoder(source: Source, config: str | os.PathLike | None, tokenizer: Any) -> Plan:
    """The plan for the dual encoder."""
    expect_model_type(source, "dec_clip")
    vision_config, vision_type = read_vision_config(source, "vision_encoder.")
    loss_type = "sigmoid" if "t_prime" in source.tensors or "logit_scale" not in source.tensors else "softmax"
    assumptions = assumed_size(source, vision_config)
    if config is not None:
        text_config = read_text_config(Path(config))
    else:
        text_config = read_distilbert_config(source, "language_encoder.", assumptions)
    projection_dim, _ = source.shape("mm_vision_proj.weight")
    model = on_meta(
        DCFormerSiglipModel,
        DCFormerSiglipConfig(
            vision_config=vision_config, text_config=text_config, projection_dim=projection_dim, loss_type=loss_type
        ),
    )
    processor = Med3DVLMProcessor(
        Med3DVLMImageProcessor(image_size=list(vision_config.image_size)), find_tokenizer(source, tokenizer)
    )
    return Plan(
        f"dual encoder ({describe_vision(vision_config, vision_type)}, {text_config['model_type']}, loss {loss_type})",
        dual_encoder_layout(loss_type, vision_type),
        shapes_of(model),
        vision_config,
        model,
        processor,
        assumptions=assumptions,
    )


def plan_projector(source: Source) -> Plan:
    """The plan for a projector alone, with the input embeddings if they lie beside it."""
    prefix = "model.mm_projector."
    fields, text_hidden_size = read_projector_fields(source, prefix)
    low, high = fields.pop("stages")
    config = Med3DVLMConfig(
        # Only widths and token counts of the two stages count for a projector; DCFormer-small gives Med3DVLM's.
        vision_config={"hidden_sizes": (64, 96, 192, low, high)},
        text_config={
            "model_type": "qwen2",
            "hidden_size": text_hidden_size,
            "num_attention_heads": 1,
            "vocab_size": 1,
        },
        image_token_id=0,
        prepend_image_token_embedding=True,
        **fields,
    )
    with torch.device("meta"):
        projector = PROJECTORS[config.projector_type](config)
    ours = "multi_modal_projector."
    expected = {ours + name: tuple(value.shape) for name, value in projector.state_dict().items()}
    embeddings = Row("model.embed_tokens.weight", "language_model.embed_tokens.weight")
    if "model.embed_tokens.weight" in source.tensors:
        expected["language_model.embed_tokens.weight"] = source.shape("model.embed_tokens.weight")
    return Plan(
        f"projector ({config.projector_type}, to width {text_hidden_size})",
        Layout([*prefixed(PROJECTOR_ROWS[config.projector_type], prefix, ours), embeddings]),
        expected,
        config.vision_config,
        projector_config=config,
    )


def plan_vision_language_model(source: Source, config: str | os.PathLike | None, tokenizer: Any) -> Plan:
    """The plan for the whole model, merged or with the adapters of a LoRA run."""
    if not source.has_adapters:
        expect_model_type(source, "vlm_qwen")
    tower = "model.vision_tower.vision_tower."
    vision_config, vision_type = read_vision_config(source, tower)
    if vision_type != "dcformer":
        raise ValueError(
            f"{source.path}: expected a DCFormer as volume encoder, got {vision_type}: with no other the original's runs."
        )
    layer = source.config.get("vision_select_layer", -2)
    if layer != -2:
        raise ValueError(f"{source.path}: expected `vision_select_layer` -2, the last two stages, got {layer}.")
    if config is not None:
        text_config = read_text_config(Path(config))
    elif source.config:
        text_config = read_text_config(source.folder / CONFIG_NAME)
    else:
        raise ValueError(
            f"{source.path}: there is no {CONFIG_NAME} beside it, and the number of attention heads and the rotary base of "
            "the language model do not follow from its weights. Pass `config`, the folder or config.json of the language "
            "model it was trained from (Qwen2.5-7B-Instruct in the paper)."
        )
    vocab_size, _ = source.shape("model.embed_tokens.weight")
    text_config["vocab_size"] = vocab_size  # the original resized the embeddings when it added its placeholder
    text_config["tie_word_embeddings"] = "lm_head.weight" not in source.tensors
    found_tokenizer = find_tokenizer(source, tokenizer)
    image_token_id = found_tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    if image_token_id is None or image_token_id == found_tokenizer.unk_token_id:
        found_tokenizer.add_tokens([IMAGE_TOKEN], special_tokens=True)  # as the original does with the base model's
        image_token_id = found_tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    if len(found_tokenizer) != vocab_size:
        raise ValueError(
            f"{source.path}: the embeddings have {vocab_size} rows, the tokenizer with {IMAGE_TOKEN!r} has "
            f"{len(found_tokenizer)} tokens, which the original makes equal: take the tokenizer it was trained with."
        )
    fields, text_hidden_size = read_projector_fields(source, "model.mm_projector.")
    del fields["stages"]
    model = on_meta(
        Med3DVLMForConditionalGeneration,
        Med3DVLMConfig(
            vision_config=vision_config,
            text_config=text_config,
            image_token_id=image_token_id,
            prepend_image_token_embedding=True,
            **fields,
        ),
    )
    processor = Med3DVLMProcessor(
        Med3DVLMImageProcessor(image_size=list(vision_config.image_size)),
        found_tokenizer,
        image_seq_length=model.config.image_seq_length,
        image_token=IMAGE_TOKEN,
        prompt_format="original",
    )
    expected = shapes_of(model)
    if model.config.tie_word_embeddings:
        del expected["lm_head.weight"]
    kind = "LoRA run" if source.has_adapters else "vision-language model"
    return Plan(
        f"{kind} ({describe_vision(vision_config, vision_type)}, projector {fields['projector_type']}, "
        f"{text_config['model_type']} of width {text_hidden_size})",
        vision_language_layout(fields["projector_type"]),
        expected,
        vision_config,
        model,
        processor,
        assumptions=assumed_size(source, vision_config),
    )


def read_vision_config(source: Source, prefix: str) -> tuple[Any, str]:
    """
    The configuration of the volume encoder whose tensors begin with `prefix`, and its kind.

    Raises:
        ValueError: there is none, or it has sizes that the original cannot have.
    """
    image_size = read_image_size(source)
    sized = {} if image_size is None else {"image_size": image_size}

    def has(name: str) -> bool:
        return any(key.startswith(prefix + name) for key in source.tensors)

    if has("encoder.s0."):
        num_stages = source.count(prefix + "encoder.s{}.")
        stem = f"{prefix}encoder.s0.0.0.c1.0.weight"
        widths = [source.shape(stem)[0]]
        widths += [source.shape(f"{prefix}encoder.s{stage}.0.scale")[0] for stage in range(1, num_stages)]
        depths = [1, *(source.count(f"{prefix}encoder.s{stage}.{{}}.") for stage in range(1, num_stages))]
        for name, sizes in DCFORMER_VARIANTS.items():
            if (sizes["depths"], sizes["hidden_sizes"]) == (tuple(depths), tuple(widths)):
                return DCFormerConfig.from_variant(name, num_channels=source.shape(stem)[1], **sized), "dcformer"
        raise ValueError(
            f"{source.path}: a DCFormer of {depths} blocks and {widths} channels. Expected one of the original's, "
            f"{', '.join(DCFORMER_VARIANTS)}; a block or a stage may be missing."
        )
    if has("encoder.to_patch_embedding."):
        side = round(source.shape(f"{prefix}encoder.to_patch_embedding.1.weight")[0] ** (1 / 3))
        inner, hidden_size = source.shape(f"{prefix}encoder.transformer.layers.0.0.to_qkv.weight")
        return Vit3DConfig(
            patch_size=(side, side, side),
            hidden_size=hidden_size,
            num_hidden_layers=source.count(prefix + "encoder.transformer.layers.{}."),
            num_attention_heads=inner // 3 // 64,  # the original's heads are 64 wide
            head_dim=64,
            intermediate_size=source.shape(f"{prefix}encoder.transformer.layers.0.1.net.1.weight")[0],
            **sized,
        ), "vit3d"
    if has("patch_embedding."):
        hidden_size, num_voxels = source.shape(f"{prefix}patch_embedding.patch_embeddings.1.weight")
        if num_voxels != 4 * 16 * 16:
            raise ValueError(f"{source.path}: expected M3D's patches of 4 x 16 x 16 voxels, got {num_voxels} voxels.")
        return Vit3DConfig(
            image_size=(32, 256, 256),
            patch_size=(4, 16, 16),
            hidden_size=hidden_size,
            num_hidden_layers=source.count(prefix + "blocks.{}."),
            num_attention_heads=hidden_size // 64,
            head_dim=64,
            intermediate_size=source.shape(f"{prefix}blocks.0.mlp.linear1.weight")[0],
            use_patch_norm=False,
            use_final_norm=True,
        ), "m3d"
    raise ValueError(f"{source.path}: expected a volume encoder under {prefix!r}, a DCFormer or a vision transformer.")


def read_projector_fields(source: Source, prefix: str) -> tuple[dict[str, Any], int]:
    """
    Fields of [`Med3DVLMConfig`] for a projector, from the shapes of its tensors, `stages` (the channels of the two
    encoder stages it reads) among them; and the width of the language model.

    Raises:
        ValueError: it is no projector of the original's, or lacks a tensor.
    """
    projector_type = find_projector_type(source.tensors, prefix)

    def shape(name: str) -> tuple[int, ...]:
        return source.shape(f"{prefix}{name}")

    def num_linears(template: str, first: int = 1) -> int:
        number = 0
        while f"{prefix}{template.format(first + number)}" in source.tensors:
            number += 1
        return number

    if projector_type == "mixer":
        counts = {}
        for stream in ("low", "high"):
            layers = range(source.count(f"{prefix}{stream}_mixer.{{}}."))
            counts[f"{stream}_level_tokens"] = tuple(
                shape(f"{stream}_mixer.{layer}.mlp1.mm_projector.0.weight")[0] for layer in layers
            )
        stages = tuple(shape(f"{stream}_mixer.0.ln1.weight")[0] for stream in ("low", "high"))
        last = len(counts["low_level_tokens"]) - 1
        width = shape(f"low_mixer.{last}.mlp2.mm_projector.0.weight")[0]
        depth = 1 + num_linears("low_mixer.0.mlp1.mm_projector.{}.1.weight")
        fields = {**counts, "projector_depth": depth, "stages": stages}
    elif projector_type == "low_high_mlp":
        width, low = shape("low_up_mlp.weight")
        depth = 1 + sum(f"{prefix}mm_projector.{2 * number + 1}.weight" in source.tensors for number in range(64))
        fields = {"projector_depth": depth, "stages": (low, shape("high_up_mlp.weight")[1])}
    elif projector_type == "mlp":
        width, high = shape("mm_projector.0.weight")
        fields = {"projector_depth": 1 + num_linears("mm_projector.{}.1.weight"), "stages": (high // 2, high)}
    elif projector_type == "mhsa":
        width, high = shape("out_layer.weight")
        fields = {"stages": (high // 2, high)}
    elif projector_type == "linear":
        width, high = shape("weight")
        fields = {"stages": (high // 2, high)}
    else:
        found = [name for name in source.tensors if name.startswith(prefix)]
        raise ValueError(f"{source.path}: no projector of the original's is made of {few(found) or 'nothing'}.")
    return {"projector_type": projector_type, **fields}, width


def read_image_size(source: Source) -> tuple[int, int, int] | None:
    """The size of volumes that a configuration names: the original's `input_size` is (height, width, depth)."""
    if "input_size" not in source.config:
        return None
    height, width, depth = map(int, source.config["input_size"])
    return depth, height, width


def assumed_size(source: Source, vision_config: Any) -> list[str]:
    """What to say where no configuration names the size of volumes."""
    if read_image_size(source) is not None:
        return []
    size = " x ".join(map(str, vision_config.image_size))
    return [f"Volumes of {size} voxels (depth, height, width), as the original's; the file does not say."]


def read_distilbert_config(source: Source, prefix: str, assumptions: list[str]) -> dict[str, Any]:
    """
    The configuration of the text encoder, which the original takes from the Hub and does not write down.

    Raises:
        ValueError: it is no DistilBERT, or the number of its heads has to be told.
    """
    if not any(name.startswith(f"{prefix}transformer.layer.") for name in source.tensors):
        found = [name for name in source.tensors if name.startswith(prefix)]
        raise ValueError(
            f"{source.path}: expected a DistilBERT, such as ClinicalBERT, as text encoder, got {few(found) or 'none'}: pass "
            "`config`, the folder or config.json of the text encoder."
        )
    vocab_size, dim = source.shape(f"{prefix}embeddings.word_embeddings.weight")
    if dim % BERT_HEAD_SIZE:
        raise ValueError(
            f"{source.path}: the number of heads of a text encoder of width {dim} does not follow from its weights: pass "
            "`config`, the folder or config.json of the text encoder."
        )
    assumptions.append(
        f"{dim // BERT_HEAD_SIZE} attention heads in the text encoder, as in ClinicalBERT; the files do not say."
    )
    return {
        "model_type": "distilbert",
        "vocab_size": vocab_size,
        "dim": dim,
        "n_layers": source.count(prefix + "transformer.layer.{}."),
        "n_heads": dim // BERT_HEAD_SIZE,
        "hidden_dim": source.shape(f"{prefix}transformer.layer.0.ffn.lin1.weight")[0],
        "max_position_embeddings": source.shape(f"{prefix}embeddings.position_embeddings.weight")[0],
    }


def read_text_config(path: Path) -> dict[str, Any]:
    """
    The fields of a `config.json` that belong to the text model; what the original adds to them is left out.

    Raises:
        FileNotFoundError: there is none.
        ValueError: transformers does not know its `model_type`.
    """
    path = path / CONFIG_NAME if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file. Expected the config.json of the text model.")
    fields = read_json(path)
    model_type = {"vlm_qwen": "qwen2"}.get(fields.get("model_type", ""), fields.get("model_type", ""))
    if model_type not in CONFIG_MAPPING:
        raise ValueError(f"{path}: expected the configuration of a text model, got `model_type` {model_type!r}.")
    known = set(CONFIG_MAPPING[model_type]().to_dict()) | {"rope_theta", "rope_scaling"}
    dropped = {"architectures", "dtype", "torch_dtype", "transformers_version", "model_type", "use_cache"}
    return {"model_type": model_type, **{key: value for key, value in fields.items() if key in known - dropped}}


def find_tokenizer(source: Source, tokenizer: Any) -> Any:
    """
    The tokenizer that was given, or that lies beside the weights.

    Raises:
        ValueError: there is none.
    """
    if tokenizer is not None and not isinstance(tokenizer, (str, os.PathLike)):
        return tokenizer
    place = source.folder if tokenizer is None else tokenizer
    is_there = tokenizer is not None or any(
        (source.folder / name).is_file()
        for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json")
    )
    if not is_there:
        raise ValueError(
            f"{source.path}: there is no tokenizer beside it: pass `tokenizer`, the folder or repository of the one it was "
            "trained with."
        )
    with tempfile.TemporaryDirectory() as temporary:
        if Path(place).is_dir():  # without the original's config.json, whose `model_type` transformers does not know
            for file in Path(place).iterdir():
                if file.suffix in (".json", ".jinja", ".model", ".txt") and file.name != CONFIG_NAME:
                    shutil.copy(file, temporary)
            place = temporary
        try:
            return AutoTokenizer.from_pretrained(os.fspath(place))
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(
                f"{source.folder if tokenizer is None else tokenizer}: no tokenizer can be loaded from it: pass "
                f"`tokenizer`. {error}"
            ) from error


def expect_model_type(source: Source, expected: str) -> None:
    """
    Raises:
        ValueError: the configuration is that of another model.
    """
    found = source.config.get("model_type")
    if source.config and found != expected:
        raise ValueError(
            f"{source.path}: its tensors are those of `model_type` {expected!r}, its {CONFIG_NAME} says {found!r}: they do "
            "not belong together."
        )


def describe_vision(vision_config: Any, vision_type: str) -> str:
    """The volume encoder in a word or two."""
    if vision_type == "dcformer":
        sizes = {"depths": tuple(vision_config.depths), "hidden_sizes": tuple(vision_config.hidden_sizes)}
        return f"DCFormer-{next(name for name, known in DCFORMER_VARIANTS.items() if known == sizes)}"
    return {"vit3d": "ViT3D", "m3d": "ViT of M3D"}[vision_type]


def check_plan(source: Source, plan: Plan) -> None:
    """
    Checks, before anything is written, that all tensors of the source are taken and all of the result are given.

    Raises:
        ValueError: tensors are missing, left over or of another shape; the message names them as the original does.
    """
    left: list[str] = []
    wrong: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = []
    given: set[str] = set()
    for name, tensor in source.tensors.items():
        found = plan.layout.find(name)
        if found is None or not set(found[0]) <= set(plan.expected):
            left.append(name)
            continue
        ours, change = found
        given.update(ours)
        expected = [plan.expected[key] for key in ours]
        empty = tuple(torch.empty(shape, device="meta") for shape in expected)
        original_shape = tuple(change.to_original(empty, plan.vision_config).shape)
        if tensor.shape != original_shape:
            wrong.append((name, tensor.shape, original_shape))
    missing = []
    for name in plan.expected.keys() - given:
        original = plan.layout.find_original(name)
        missing.append(original[0] if original else name)
    faults = describe_faults(
        {"missing_keys": sorted(set(missing)), "unexpected_keys": left, "mismatched_keys": wrong}, most=8
    )
    if faults:
        raise ValueError(
            f"{source.path} was taken for a {plan.kind}, and does not fit:\n{faults}\nNothing was written."
        )


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The tensors that a checkpoint of a model holds, and their shapes."""
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def on_meta(model_class: Any, config: PreTrainedConfig) -> Any:
    """A model without memory: its names and shapes."""
    with torch.device("meta"):
        return model_class(config).eval()


__all__ = ["Plan", "check_plan", "make_plan"]
