"""Model cards, written from the model and its processor rather than by hand."""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from torch import nn
from transformers import PreTrainedModel
from typing_extensions import TypedDict

from ..configuration.transformers_version import REQUIREMENT
from ..modeling_med3dvlm.modeling_dcformer import DCFormerModel
from ..modeling_med3dvlm.modeling_dcformer_siglip import DCFormerSiglipModel
from ..modeling_med3dvlm.modeling_med3dvlm import Med3DVLMForConditionalGeneration
from ..modeling_med3dvlm.modeling_vit3d import Vit3DModel
from ..processing.image_processing_med3dvlm import HU_OF_AIR, HU_OF_DENSE_BONE, resolve_hu_range
from .model_index import CARD_NAME, RESULTS, read_card, section_of
from .places import has_form_of_repository, is_owned_repository


# Template, task on the Hub and title of each kind of model.
CARD_KINDS: dict[type[PreTrainedModel], tuple[str, str, str]] = {
    Med3DVLMForConditionalGeneration: ("vision_language", "image-text-to-text", "Med3DVLM"),
    DCFormerSiglipModel: ("dual_encoder", "zero-shot-image-classification", "DCFormer-SigLIP"),
    DCFormerModel: ("encoder", "image-feature-extraction", "DCFormer"),
    Vit3DModel: ("encoder", "image-feature-extraction", "ViT3D"),
}
TAGS = ["medical", "radiology", "ct", "3d", "custom_code"]
MODEL_NAMES = {"dcformer": "DCFormer", "vit3d": "ViT3D"}
# What a model's parts are, by the name of the submodule.
PART_NAMES = {
    "vision_tower": "volume encoder",
    "vision_model": "volume encoder",
    "multi_modal_projector": "projector",
    "language_model": "language model",
    "text_model": "text encoder",
    "visual_projection": "projection of volumes",
    "text_projection": "projection of texts",
    "lm_head": "language-model head",
}
# Metadata that a card gets anew: those of `CardFields`, and those that follow from the model.
FIELDS_IN_METADATA = ("license", "license_name", "license_link", "language", "base_model", "datasets")
MADE_METADATA = (*FIELDS_IN_METADATA, "library_name", "pipeline_tag", "tags")
NO_LICENSE, OTHER_LICENSE = "unknown", "other"
LICENSE_PATTERN = re.compile(r"[a-z0-9.-]+")
LANGUAGE_PATTERN = re.compile(r"[a-z]{2,3}|code|multilingual")
NOT_STATED = "Not stated."
PROVENANCE = "Training data and provenance"
# Ends the section on provenance where the folder has the record of a training, see `training_record.describe_training`.
OF_TRAINING_RECORD = (
    "`training.json` has the settings of the training, the version of `med3dvlm` that ran it, and the hashes of the weights of "
    "local folders that it started from."
)
# How the training data of converted weights begin, and what a run on volumes made of slices says of its own. Either means
# volumes as M3D publishes them.
CONVERSION_BEGINS = "Converted from weights of the original implementation"
OF_PICTURES = "Its volumes were stacks of 8-bit pictures."
# Begins what a merged model's card says of the weights before the last training, which decides about the inputs.
BASE_BEGINS = "The base model, before that:"
DIRECTIONS = {
    "R": "the patient's right",
    "L": "the patient's left",
    "A": "anterior",
    "P": "posterior",
    "S": "superior",
    "I": "inferior",
}


class CardFields(TypedDict, total=False):
    """
    What a card says that the model does not know.

    repo_id (`str`):
        The repository, or the folder, that the examples of use load.
    title (`str`):
        Heading; by default the kind of model.
    license (`str`):
        Identifier of the licence of the weights on the Hub; `"unknown"` by default, and required for an upload.
    license_name (`str`), license_link (`str`):
        Of a licence that the Hub does not know, with `license="other"`: its name, which is required then, such as
        "qwen-research", and where its text is.
    base_model (`str` or `list[str]`):
        Repositories that the weights were trained from; by default that of the text model, if it is known.
    datasets (`list[str]`):
        Data sets on the Hub that it was trained on.
    language (`str` or `list[str]`):
        Codes of languages; `"en"` by default.
    training_data (`str`):
        Training data and provenance, in Markdown.
    notes (`str`):
        What a reader must know first, such as that the weights are random.
    """

    repo_id: str | None
    title: str | None
    license: str
    license_name: str | None
    license_link: str | None
    base_model: str | list[str] | None
    datasets: list[str] | None
    language: str | list[str]
    training_data: str | None
    notes: str | None


@dataclass(frozen=True)
class OldCard:
    """
    What a card that was made here says beyond the model itself.

    Args:
        fields (`dict`): Those of [`CardFields`] that it states.
        metadata (`dict`): Keys of its metadata that no field stands for: `model-index`, and what others wrote there.
        results (`str`): Its section of results, empty if it has none.
    """

    fields: dict[str, Any]
    metadata: dict[str, Any]
    results: str


def read_old_card(folder: str | os.PathLike) -> OldCard | None:
    """
    Reads the card of a folder, if [`create_model_card`] made it.

    Args:
        folder (`str` or `os.PathLike`):
            Folder of a model.

    Returns:
        [`OldCard`]; `None` where there is no card, or one of another make.

    Raises:
        ValueError: the card's metadata cannot be read.
    """
    found = read_card(Path(folder) / CARD_NAME)
    if found is None:
        return None
    metadata, body = found
    training_data = section_of(body, PROVENANCE, "Citation")
    head = re.match(r"\s*# (.+)\n(?:\n((?:>.*\n)+))?", body)
    if head is None or not training_data or not set(TAGS) <= set(metadata.get("tags") or ()):
        return None
    training_data = training_data.removeprefix(f"## {PROVENANCE}").strip().removesuffix(OF_TRAINING_RECORD).strip()
    fields = {
        **{name: metadata.get(name) for name in FIELDS_IN_METADATA},
        "title": head[1].strip(),
        "notes": "\n".join(line[1:].removeprefix(" ") for line in (head[2] or "").splitlines()),
        "training_data": None if training_data == NOT_STATED else training_data,
    }
    return OldCard(
        fields={name: value for name, value in stated_fields(fields).items() if value},
        metadata={name: value for name, value in metadata.items() if name not in MADE_METADATA},
        results=section_of(body, RESULTS),
    )


def stated_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Those of [`CardFields`] that say something: not `None`, and not the licence `"unknown"`."""
    return {
        name: value
        for name, value in fields.items()
        if value is not None and not (name == "license" and value == NO_LICENSE)
    }


def renew_fields(old: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """
    Those of [`CardFields`] that are given, and of older ones what is not; a licence that is given anew has no older name or
    link.
    """
    if any(given.get(name, old.get(name)) != old.get(name) for name in ("license", "license_name")):
        old = {name: value for name, value in old.items() if name not in ("license_name", "license_link")}
    return {**old, **given}


def check_fields(fields: Mapping[str, Any]) -> None:
    """
    Checks the metadata among the fields of a card, so far as it can be done without the Hub.

    Args:
        fields (`Mapping`):
            Of [`CardFields`].

    Raises:
        ValueError: the Hub would refuse the licence, a base model or a language.
    """
    license = str(fields.get("license") or NO_LICENSE)
    has_name, has_link = (bool(fields.get(name)) for name in ("license_name", "license_link"))
    if not LICENSE_PATTERN.fullmatch(license):
        raise ValueError(
            f"`license` must be an identifier of the Hub, such as apache-2.0, got {license!r}. Of a licence that it does not "
            "know, it is `other`."
        )
    if license == OTHER_LICENSE and not has_name:
        raise ValueError("`license` other says nothing without a name: pass `license_name`, such as qwen-research.")
    if license != OTHER_LICENSE and (has_name or has_link):
        raise ValueError(
            f"`license_name` and `license_link` go with `license` other alone, got {license!r}. Pass `license` other, or an "
            "empty text for `license_name` and `license_link`."
        )
    for name in _listed(fields.get("base_model")):
        if not has_form_of_repository(str(name)):
            raise ValueError(f"`base_model` must be a repository of the Hub, such as org/name, got {name!r}.")
    for code in _listed(fields.get("language")):
        if not LANGUAGE_PATTERN.fullmatch(str(code)):
            raise ValueError(f"`language` must be a code of two or three letters (ISO 639), such as en, got {code!r}.")


def create_model_card(
    model: PreTrainedModel,
    processor: Any,
    *,
    repo_id: str | None = None,
    title: str | None = None,
    license: str = NO_LICENSE,
    license_name: str | None = None,
    license_link: str | None = None,
    base_model: str | list[str] | None = None,
    datasets: list[str] | None = None,
    language: str | list[str] = "en",
    training_data: str | None = None,
    notes: str | None = None,
    has_training_record: bool = False,
) -> ModelCard:
    """
    The card of a model: the metadata that the Hub reads, and a text whose numbers and settings are the objects' own.

    Args:
        model (`PreTrainedModel`):
            One of our models.
        processor ([`Med3DVLMProcessor`] or [`Med3DVLMImageProcessor`]):
            What prepares its inputs; an encoder's is an image processor.
        repo_id, title, license, license_name, license_link, base_model, datasets, language, training_data, notes (*optional*):
            See [`CardFields`].
        has_training_record (`bool`, *optional*, defaults to `False`):
            Whether the folder has a `training.json`.

    Returns:
        [`~huggingface_hub.ModelCard`], read back from its own text.

    Raises:
        TypeError: `model` is none of ours.
        ValueError: the metadata are none that the Hub takes, see [`check_fields`], or do not survive being written and read.
    """
    kind, pipeline_tag, default_title = card_kind(model)
    check_fields(
        {
            "license": license,
            "license_name": license_name,
            "license_link": license_link,
            "base_model": base_model,
            "language": language,
        }
    )
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag=pipeline_tag,
        license=license,
        license_name=license_name or None,
        license_link=license_link or None,
        language=language,
        base_model=base_model or find_base_model(model.config),
        datasets=datasets,
        tags=TAGS if kind == "encoder" else ["vision-language", *TAGS],
    )
    image_processor = getattr(processor, "image_processor", processor)
    body = _fill(
        kind,
        **_facts(model),
        title=title or default_title,
        notes="".join(f"\n> {line}".rstrip() for line in notes.splitlines()) + "\n" if notes else "",
        transformers=REQUIREMENT,
        usage=usage_example(model, processor, repo_id or "path/to/this/folder"),
        parameters=parameter_table(model),
        input_contract=describe_inputs(model.config, image_processor, saw_pictures(training_data)),
        research_only=_fill("research_only"),
        provenance=_fill(
            "provenance",
            training_data=training_data or NOT_STATED,
            training_record=f"\n{OF_TRAINING_RECORD}\n" if has_training_record else "",
        ),
        citation=_fill("citation"),
    )
    card = ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}\n")
    if card.data.to_dict() != data.to_dict():
        raise ValueError(
            f"The metadata {data.to_dict()} read back from the card as {card.data.to_dict()}: pass plain texts and "
            "lists of texts."
        )
    return card


def card_kind(model: Any) -> tuple[str, str, str]:
    """
    Template, task on the Hub and default title for a model.

    Raises:
        TypeError: it is none of ours.
    """
    for model_class, kind in CARD_KINDS.items():
        if isinstance(model, model_class):
            return kind
    raise TypeError(
        f"Expected one of our models, {', '.join(known.__name__ for known in CARD_KINDS)}, got "
        f"{type(model).__module__}.{type(model).__name__}. Merge adapters first; publish the generating model rather "
        "than its base; load with `from_pretrained` of this package what was loaded with remote code."
    )


def find_base_model(config: Any) -> str | None:
    """The repository that the text model was loaded from, if its configuration remembers one."""
    name = getattr(getattr(config, "text_config", None), "_name_or_path", None) or ""
    return name if is_owned_repository(name) else None


def parameter_table(model: nn.Module) -> str:
    """A Markdown table of the parameters of each part; what two parts share is counted with the first."""
    parts = dict(model.named_children())
    if "model" in parts:  # a language-model head around the base model
        parts = {**dict(parts.pop("model").named_children()), **parts}
    seen: set[int] = set()

    def count(parameters: Iterable[nn.Parameter]) -> int:
        new = [parameter for parameter in parameters if id(parameter) not in seen]
        seen.update(id(parameter) for parameter in new)
        return sum(parameter.numel() for parameter in dict.fromkeys(new))

    rows = [(PART_NAMES.get(name, name.replace("_", " ")), count(part.parameters())) for name, part in parts.items()]
    rows.append(("other", count(model.parameters())))
    rows = [(name, number) for name, number in rows if number]
    rows.append(("**all**", sum(number for _, number in rows)))
    precision = str(next(model.parameters()).dtype).removeprefix("torch.")
    return _table(("Part", f"Parameters ({precision})"), [(name, f"{number:,}") for name, number in rows])


def describe_image_tokens(config: Any) -> str:
    """How many placeholders a volume takes in the text, and where the number comes from."""
    low_layer, high_layer = config.vision_feature_layers
    low, high = (config.vision_config.num_tokens(layer) for layer in (low_layer, high_layer))
    if config.projector_type == "mixer":
        source = (
            f"{config.low_level_tokens[-1]} from the {low} positions of the encoder's low-level stage and "
            f"{config.high_level_tokens[-1]} from the {high} positions of its high-level stage"
        )
    elif config.projector_type == "low_high_mlp":
        source = f"one for each of the {low} and {high} positions of the encoder's last two stages"
    else:
        source = f"one for each of the {high} positions of the encoder's last stage"
    if config.prepend_image_token_embedding:
        source += ", and the placeholder's own embedding in front of them"
    return (
        f"Each volume takes {config.image_seq_length} placeholders in the text (projector `{config.projector_type}`): "
        f"{source}."
    )


def saw_pictures(training_data: str | None) -> bool:
    """Whether the last training saw 8-bit pictures without HU, by what a card says of its data."""
    last = (training_data or "").partition(BASE_BEGINS)[0]
    return CONVERSION_BEGINS in last or OF_PICTURES in last


def describe_inputs(config: Any, image_processor: Any, is_of_pictures: bool = False) -> str:
    """
    The section of a card on inputs: the image processor's settings, and what they mean for CT and MR.

    Args:
        config (`PreTrainedConfig`):
            Of the model.
        image_processor ([`Med3DVLMImageProcessor`]):
            Its image processor.
        is_of_pictures (`bool`, *optional*, defaults to `False`):
            Whether the model was trained on stacks of 8-bit pictures instead of scans with units and an affine.
    """
    orientation = image_processor.orientation
    if orientation == "none":
        axes = "the axes stay as the file stores them"
    else:
        width, height, depth = (DIRECTIONS[letter] for letter in orientation)
        axes = f"depth grows to {depth}, height to {height}, width to {width}: swapped and flipped, never interpolated"
    lower, upper = resolve_hu_range(image_processor.hu_range)
    percentiles = " to ".join(f"{value:g}" for value in image_processor.intensity_percentiles)
    window = f"clipped to {lower:g} to {upper:g} HU and scaled linearly to [0, 1]"
    own_range = "scaled linearly to [0, 1] by the volume's own range, its minimum to 0 and its maximum to 1"
    meaning = {
        "auto": f"a volume with air in HU (minimum at most {HU_OF_AIR:g}, mean at most {HU_OF_DENSE_BONE:g}) is {window}; "
        f"every other is {own_range}",
        "window": f"values are HU, {window}",
        "percentile": f"clipped to the percentiles {percentiles} of all voxels and scaled linearly to [0, 1]",
        "minmax": own_range,
        "none": "values are in [0, 1] already; others are refused",
    }[image_processor.intensity_mode]
    size = " x ".join(map(str, image_processor.image_size))
    settings = [
        ("1", "`orientation`", f"`{orientation}`", axes),
        ("2", "`intensity_mode`", f"`{image_processor.intensity_mode}`", f"{meaning}, in float32"),
    ]
    if image_processor.intensity_mode in ("auto", "window"):
        settings.append(("2", "`hu_range`", f"`({lower:g}, {upper:g})`", "HU that become 0 and 1"))
    crop, resize = image_processor.do_crop_foreground, image_processor.do_resize
    box = "cropped to the smallest box around the voxels above 0"
    grid = "resized, trilinear (`align_corners=False`, without antialiasing), whatever the spacing; values are not scaled again"
    settings += [
        ("3", "`do_crop_foreground`", f"`{crop}`", box if crop else "not cropped"),
        ("4", "`do_resize`", f"`{resize}`", grid if resize else "not resized"),
        ("4", "`image_size`", f"`({size.replace(' x', ',')})`", f"{size} voxels (depth, height, width)"),
    ]
    ct = (
        "Training saw stacks of 8-bit pictures without HU or affine, as M3D has them: each scaled by its own range, in the "
        "order of its slices. CT in HU goes by the settings above instead, a window and an orientation; what that does to scores "
        "is not measured. What training saw is given by `intensity_mode='minmax'` for a stack as an array (depth, height, "
        "width), by that and `orientation='none'` for a NIfTI file of one, and by `intensity_mode='none'` and "
        "`do_crop_foreground=False` for a volume that `med3dvlm prepare` or the original's preparation wrote."
        if is_of_pictures
        else "CT must be in HU; an 8-bit export is not, and cannot be turned back."
    )
    modality = {
        "percentile": "For CT in HU, pass `intensity_mode='window'` if the model was trained with it.",
        "none": "Scale CT and MR yourself, exactly as in training, or pass another `intensity_mode`.",
    }.get(
        image_processor.intensity_mode,
        f"{ct} MR has no unit: pass `intensity_mode='percentile'`, which clips to the percentiles {percentiles} and "
        "scales, and expect worse results from a model that was trained on CT.",
    )
    vision_config = getattr(config, "vision_config", config)
    shape = ", ".join(map(str, ("batch", vision_config.num_channels, *image_processor.image_size)))
    return _fill(
        "input_contract",
        settings=_table(("Step", "Setting", "Value", "Meaning"), settings),
        pixel_values_shape=f"({shape})",
        modality=modality,
    )


def usage_example(model: PreTrainedModel, processor: Any, repo_id: str) -> str:
    """Python that answers on one scan, for the kind of model; `repo_id` is what it loads."""
    kind, _, _ = card_kind(model)
    if kind == "vision_language":
        lines = [
            "from transformers import pipeline",
            "",
            f'pipe = pipeline("image-text-to-text", model="{repo_id}", trust_remote_code=True)',
        ]
        if getattr(processor, "chat_template", None):
            lines += [
                'content = [{"type": "image", "path": "scan.nii.gz"}, '
                '{"type": "text", "text": "Is there a pleural effusion?"}]',
                'answers = pipe(text=[{"role": "user", "content": content}], return_full_text=False, '
                "max_new_tokens=256)",
            ]
        else:
            lines += [
                f'question = "{processor.image_token}\\nIs there a pleural effusion?"',
                'answers = pipe(images="scan.nii.gz", text=question, return_full_text=False, max_new_tokens=256)',
            ]
        return "\n".join([*lines, 'print(answers[0]["generated_text"])'])

    processor_class = "AutoProcessor" if kind == "dual_encoder" else "AutoImageProcessor"
    lines = [
        "import torch",
        f"from transformers import AutoModel, {processor_class}",
        "",
        f'model = AutoModel.from_pretrained("{repo_id}", trust_remote_code=True)',
        f'processor = {processor_class}.from_pretrained("{repo_id}", trust_remote_code=True)',
    ]
    if kind == "dual_encoder":
        scores = "sigmoid()" if model.config.loss_type == "sigmoid" else "softmax(dim=-1)"
        lines += [
            'texts = ["There is a pleural effusion.", "There is no pleural effusion."]',
            'inputs = processor(images="scan.nii.gz", text=texts, padding=True, return_tensors="pt")',
            "with torch.no_grad():",
            f"    scores = model(**inputs).logits_per_image.{scores}",
            "print(scores)  # a row for each scan, a column for each text",
        ]
    else:
        lines += [
            'inputs = processor("scan.nii.gz", return_tensors="pt")',
            "with torch.no_grad():",
            "    outputs = model(**inputs, output_hidden_states=True)",
            "print(outputs.pooler_output.shape, [tuple(state.shape) for state in outputs.hidden_states])",
        ]
    return "\n".join(lines)


def _listed(value: str | list[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else list(value or ())


def _facts(model: PreTrainedModel) -> dict[str, Any]:
    """What the template of the model's kind asks of the configuration."""
    config = model.config
    vision_config = getattr(config, "vision_config", config)
    facts: dict[str, Any] = {"vision_name": MODEL_NAMES[vision_config.model_type]}
    if isinstance(model, Med3DVLMForConditionalGeneration):
        facts["image_seq_length"] = config.image_seq_length
        facts["image_tokens"] = describe_image_tokens(config)
    elif isinstance(model, DCFormerSiglipModel):
        facts["projection_dim"] = config.projection_dim
        facts["scores"] = (
            "The scores are independent of each other: each is how well one text fits, by itself (sigmoid loss)."
            if config.loss_type == "sigmoid"
            else "The scores of a scan sum to 1 over the texts: each says how well one text fits among these (softmax loss)."
        )
    else:
        facts["hidden_size"] = vision_config.hidden_size
    if hasattr(config, "text_config"):
        facts["text_name"] = f"`{config.text_config.model_type}`"
    return facts


def _fill(template: str, **values: Any) -> str:
    """A template with its placeholders filled; a missing value is an error."""
    text = (resources.files(__package__) / "templates" / f"{template}.md").read_text(encoding="utf-8")
    return Template(text).substitute(values).strip()


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


__all__ = [
    "BASE_BEGINS",
    "CARD_KINDS",
    "CONVERSION_BEGINS",
    "OF_PICTURES",
    "OF_TRAINING_RECORD",
    "CardFields",
    "OldCard",
    "card_kind",
    "check_fields",
    "create_model_card",
    "describe_image_tokens",
    "describe_inputs",
    "find_base_model",
    "parameter_table",
    "read_old_card",
    "renew_fields",
    "saw_pictures",
    "stated_fields",
    "usage_example",
]
