"""Cards say what the objects say."""

import re
from importlib import resources

import original_files
import pytest
import torch
from huggingface_hub import ModelCard
from tiny import tiny_siglip, tiny_vlm_config
from torch import nn

from med3dvlm import Med3DVLMImageProcessor, Med3DVLMModel, hub_cards
from med3dvlm.configuration.transformers_version import REQUIREMENT
from med3dvlm.hub_cards.model_card import (
    BASE_BEGINS,
    CONVERSION_BEGINS,
    OF_PICTURES,
    create_model_card,
    describe_image_tokens,
    describe_inputs,
    find_base_model,
    parameter_table,
    read_old_card,
    saw_pictures,
    usage_example,
)
from med3dvlm.modeling_med3dvlm.convert_original import convert


KINDS = {
    "vlm": "image-text-to-text",
    "siglip": "zero-shot-image-classification",
    "encoder": "image-feature-extraction",
    "vit3d": "image-feature-extraction",
}


@pytest.mark.parametrize("kind, task", KINDS.items())
def test_metadata_are_complete(published, kind, task):
    data = ModelCard.load(published[kind] / "README.md").data
    assert (data.library_name, data.pipeline_tag, data.license, data.language) == (
        "transformers",
        task,
        "unknown",
        "en",
    )
    assert {"medical", "radiology", "ct", "3d", "custom_code"} <= set(data.tags)
    assert ("vision-language" in data.tags) == (kind in ("vlm", "siglip"))


@pytest.mark.parametrize("kind", KINDS)
def test_card_has_every_section_and_no_placeholder(published, kind):
    text = (published[kind] / "README.md").read_text()
    for heading in (
        "How to use",
        "Parameters",
        "Input contract",
        "Intended use",
        "Out of scope",
        "Limits",
        "Citation",
    ):
        assert f"\n## {heading}\n" in text
    assert not re.search(r"\$\w|\$\{|None\b", text)
    assert "not a medical device" in text and "must not be used for diagnosis" in text
    assert text.index("> Random weights.") < text.index("## How to use")
    assert "2503.20047" in text and "2502.05091" in text
    assert "trust_remote_code=True" in text
    assert "The code in this repository is licensed under Apache-2.0, whatever the licence of the weights." in text
    assert f"`{REQUIREMENT}`" in text


def test_no_template_has_a_version_of_transformers_of_its_own():
    templates = list((resources.files(hub_cards) / "templates").iterdir())
    assert templates and not any(re.search(r"5\.2\d", path.read_text(encoding="utf-8")) for path in templates)


def test_card_takes_its_fields(vlm):
    card = create_model_card(
        vlm.model,
        vlm.processor,
        repo_id="org/name",
        title="A title",
        license="mit",
        base_model=["Qwen/Qwen2.5-7B-Instruct"],
        datasets=["org/data"],
        language=["en", "de"],
        training_data="Costs $5 & <html>.",
        notes="First line.\nSecond line.",
    )
    data = card.data
    assert (data.license, data.base_model, data.datasets, data.language) == (
        "mit",
        ["Qwen/Qwen2.5-7B-Instruct"],
        ["org/data"],
        ["en", "de"],
    )
    assert "# A title\n" in card.text and 'model="org/name"' in card.text
    assert "Costs $5 & <html>." in card.text and "> First line.\n> Second line.\n" in card.text


FIELDS = {
    "title": "A title",
    "license": "mit",
    "base_model": ["org/base", "org/other"],
    "datasets": ["org/data"],
    "language": ["en", "de"],
    "training_data": "Costs $5.\n\n## Data\n\n- `a.bin`\n\n```text\n## Citation\n```",
    "notes": "First line.\n\nThird line.",
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "fields",
    [
        FIELDS,
        {"title": "Plain"},
        {**FIELDS, "notes": None, "base_model": "org/base"},
        {"title": "Own", "license": "other", "license_name": "own", "license_link": "https://example.org/own"},
    ],
)
def test_a_card_is_read_back_as_it_was_told(request, tmp_path, kind, fields):
    model, processor = vars(request.getfixturevalue(kind)).values()
    card = create_model_card(model, processor, **fields)
    card.save(tmp_path / "README.md")
    old = read_old_card(tmp_path)
    stated = {"language": "en", **{name: value for name, value in fields.items() if value is not None}}
    assert (old.fields, old.metadata, old.results) == (stated, {}, "")
    assert str(create_model_card(model, processor, **old.fields)) == str(card)


@pytest.mark.parametrize(
    "fields, message",
    [
        (
            {"license": "Apache 2.0"},
            "`license` must be an identifier of the Hub, such as apache-2.0, got 'Apache 2.0'",
        ),
        ({"license": "other"}, "`license` other says nothing without a name: pass `license_name`"),
        ({"license": "other", "license_link": "LICENSE"}, "pass `license_name`"),
        ({"license": "mit", "license_name": "own"}, "other alone, got 'mit'. Pass `license` other, or an empty text"),
        ({"license_link": "LICENSE"}, "go with `license` other alone, got 'unknown'"),
        ({"base_model": "./local/qwen"}, "`base_model` must be a repository of the Hub, .* got './local/qwen'"),
        ({"base_model": ["gpt2", "a/b/c"]}, "`base_model` must be .* got 'a/b/c'"),
        ({"language": ["en", "german"]}, "`language` must be a code .* got 'german'"),
    ],
)
def test_metadata_that_the_hub_refuses_are_refused_here(encoder, fields, message):
    with pytest.raises(ValueError, match=message):
        create_model_card(encoder.model, encoder.processor, **fields)


@pytest.mark.parametrize("training_data", [None, "Phantoms."])
def test_a_card_names_the_record_of_a_training_and_is_read_back_without_it(encoder, tmp_path, training_data):
    card = create_model_card(encoder.model, encoder.processor, training_data=training_data, has_training_record=True)
    card.save(tmp_path / "README.md")
    assert card.text.count("`training.json` has the settings of the training") == 1
    assert read_old_card(tmp_path).fields.get("training_data") == training_data


def test_cards_of_another_make_are_none_of_ours(encoder, tmp_path):
    assert read_old_card(tmp_path) is None
    text = str(create_model_card(encoder.model, encoder.processor))
    (tmp_path / "README.md").write_text(text.replace("- radiology\n", ""))
    assert read_old_card(tmp_path) is None
    for content in (b"# Any\n", b"---\nlicense: mit\n---\n# Any\n", "# Gr\u00f6\u00dfe\n".encode("latin-1")):
        (tmp_path / "README.md").write_bytes(content)
        assert read_old_card(tmp_path) is None
    (tmp_path / "README.md").write_text("---\na: [\n---\n")
    with pytest.raises(ValueError, match=r"README\.md: its metadata are no YAML"):
        read_old_card(tmp_path)


def test_card_without_notes_or_provenance_says_so(encoder):
    text = create_model_card(encoder.model, encoder.processor).text
    assert "Not stated." in text and "\n> " not in text and 'from_pretrained("path/to/this/folder"' in text


def test_base_model_comes_from_the_text_model_only_if_it_is_a_repository(tmp_path, monkeypatch):
    config = tiny_vlm_config()
    assert find_base_model(config) is None
    config.text_config._name_or_path = "Qwen/Qwen2.5-7B-Instruct"
    assert find_base_model(config) == "Qwen/Qwen2.5-7B-Instruct"
    config.text_config._name_or_path = str(tmp_path)
    assert find_base_model(config) is None
    (tmp_path / "runs" / "last").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for name in ("runs/last", "../last", "bert"):
        config.text_config._name_or_path = name
        assert find_base_model(config) is None


def test_parameters_are_counted_once(vlm):
    rows = dict(re.findall(r"\| ([\w* -]+) \| ([\d,]+) \|", parameter_table(vlm.model)))
    numbers = {name: int(number.replace(",", "")) for name, number in rows.items()}
    total = numbers.pop("**all**")
    assert total == sum(numbers.values()) == vlm.model.num_parameters()
    assert set(numbers) == {"volume encoder", "projector", "language model", "language-model head"}

    tied = nn.Module()
    tied.language_model, tied.lm_head = nn.Linear(2, 3, bias=False), nn.Linear(2, 3, bias=False)
    tied.lm_head.weight = tied.language_model.weight
    assert parameter_table(tied).endswith("| language model | 6 |\n| **all** | 6 |")


@pytest.mark.parametrize(
    "overrides, expected",
    [
        ({}, "takes 8 placeholders.*5 from the 6 positions.*3 from the 2 positions"),
        ({"prepend_image_token_embedding": True}, "takes 9 placeholders.*own embedding"),
        ({"projector_type": "low_high_mlp"}, "takes 8 placeholders.*the 6 and 2 positions"),
        ({"projector_type": "linear"}, "takes 2 placeholders.*the 2 positions"),
    ],
)
def test_image_tokens_are_those_of_the_configuration(overrides, expected):
    assert re.search(expected, describe_image_tokens(tiny_vlm_config(**overrides)))


@pytest.mark.parametrize(
    "options, expected",
    [
        ({}, ["depth grows to superior, height to posterior, width to the patient's left", "-1000 to 1000 HU"]),
        (
            {},
            [
                "| 1 | `orientation` |",
                "| 2 | `intensity_mode` | `auto` | a volume with air in HU (minimum at most -200, mean at most 1000) is clipped",
                "every other is scaled linearly to [0, 1] by the volume's own range, its minimum to 0 and its maximum to 1",
                "| 3 | `do_crop_foreground` | `True` | cropped to the smallest box around the voxels above 0 |",
                "| 4 | `do_resize` | `True` | resized, trilinear (`align_corners=False`, without antialiasing)",
                "values are not scaled again |",
            ],
        ),
        ({"orientation": "RAS"}, ["height to anterior, width to the patient's right"]),
        ({"orientation": "none"}, ["as the file stores them"]),
        ({"intensity_mode": "window", "hu_range": "lung"}, ["values are HU", "(-1350, 150)", "MR has no unit"]),
        ({"intensity_mode": "percentile", "intensity_percentiles": [1, 99]}, ["percentiles 1 to 99", "For CT in HU"]),
        ({"intensity_mode": "minmax"}, ["the volume's own range"]),
        ({"intensity_mode": "none"}, ["in [0, 1] already", "exactly as in training"]),
        ({"do_crop_foreground": False, "do_resize": False}, ["not cropped", "not resized"]),
        ({"image_size": [8, 16, 24]}, ["8 x 16 x 24 voxels (depth, height, width)", "(batch, 1, 8, 16, 24)"]),
    ],
)
def test_inputs_are_those_of_the_processor(options, expected):
    text = describe_inputs(tiny_vlm_config(), Med3DVLMImageProcessor(**options))
    for part in expected:
        assert part in text


def test_the_card_of_converted_weights_tells_what_they_were_trained_on(tmp_path):
    source = original_files.write_dual_encoder(tmp_path / "source", "sigmoid")
    convert(source, tmp_path / "ours", config=original_files.write_text_config(tmp_path / "text"))
    card = (tmp_path / "ours" / "README.md").read_text()
    assert "Training saw stacks of 8-bit pictures without HU" in card and "cannot be turned back" not in card
    for option in ("`intensity_mode='minmax'`", "`orientation='none'`", "`do_crop_foreground=False`"):
        assert option in card


@pytest.mark.parametrize(
    "training_data, expected",
    [
        (None, False),
        ("Reports.", False),
        (f"Reports. {OF_PICTURES}", True),
        (f"{CONVERSION_BEGINS} by med3dvlm.", True),
        (f"{OF_PICTURES}\n\n{BASE_BEGINS} Reports.", True),
        (f"Scans.\n\n{BASE_BEGINS} Reports. {OF_PICTURES}", False),
    ],
)
def test_the_last_training_decides_what_is_said_of_inputs(encoder, training_data, expected):
    assert saw_pictures(training_data) is expected
    card = create_model_card(encoder.model, encoder.processor, training_data=training_data).text
    assert ("8-bit pictures without HU" in card, "cannot be turned back" in card) == (expected, not expected)


def test_example_follows_loss_and_template(siglip, vlm, tokenizer):
    assert "logits_per_image.sigmoid()" in usage_example(siglip.model, siglip.processor, "org/name")
    softmax = usage_example(tiny_siglip(loss_type="softmax"), siglip.processor, "org/name")
    assert "logits_per_image.softmax(dim=-1)" in softmax
    assert '"role": "user"' in usage_example(vlm.model, vlm.processor, "org/name")

    class PlainProcessor:
        chat_template, image_token = None, "<image>"

    assert 'question = "<image>\\nIs there' in usage_example(vlm.model, PlainProcessor(), "org/name")


def test_foreign_models_are_refused(vlm):
    with pytest.raises(TypeError, match=r"one of our models, Med3DVLMForConditionalGeneration.*got torch.*Linear"):
        create_model_card(nn.Linear(1, 1), vlm.processor)
    with torch.device("meta"), pytest.raises(TypeError, match="publish the generating model rather than its base"):
        create_model_card(Med3DVLMModel(tiny_vlm_config()), vlm.processor)
