import importlib
import logging
import math
import re
import sys
from pathlib import Path

import pytest
import transformers
from huggingface_hub.errors import StrictDataclassClassValidationError, StrictDataclassFieldValidationError
from transformers import PreTrainedConfig, ResNetConfig

from med3dvlm import DCFormerConfig, DCFormerSiglipConfig, Med3DVLMConfig, Vit3DConfig
from med3dvlm.configuration import transformers_version
from med3dvlm.configuration.configuration_dcformer import DCFORMER_VARIANTS


# Three different axis lengths: a swapped axis cannot pass unnoticed.
VISION = {"image_size": (32, 64, 96), "hidden_sizes": (4, 6, 8, 10, 12), "depths": (1, 1, 1, 2, 1)}
TEXT = {"model_type": "qwen2", "vocab_size": 99, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}


def tiny_config(**overrides):
    fields = {"vision_config": VISION, "text_config": TEXT, "image_token_id": 7}
    return Med3DVLMConfig(**{**fields, **overrides})


@pytest.mark.parametrize(
    "config",
    [
        DCFormerConfig(**VISION),
        DCFormerConfig.from_variant("base", out_features=["stage2", "stage4"]),
        Vit3DConfig(image_size=(32, 64, 96)),
        DCFormerSiglipConfig(vision_config={**VISION, "sync_batch_norm": True}),
        DCFormerSiglipConfig(vision_config=VISION, loss_type="softmax", loss_exchange="ring", loss_chunk_size=3),
        DCFormerSiglipConfig(vision_config={"model_type": "vit3d"}, text_config={"model_type": "bert"}),
        tiny_config(projector_type="low_high_mlp"),
        tiny_config(vision_config={"model_type": "vit3d"}, projector_type="linear"),
        Med3DVLMConfig(),
    ],
    ids=lambda config: config.model_type,
)
def test_config_survives_save_and_load(config, tmp_path):
    config.save_pretrained(tmp_path)
    assert type(config).from_pretrained(tmp_path).to_dict() == config.to_dict()


MODULES = ["dcformer", "dcformer_siglip", "med3dvlm", "vit3d"]


@pytest.mark.parametrize("name", ["SubConfigSpec", "PreTrainedConfig"])
@pytest.mark.parametrize("module", MODULES)
def test_too_old_a_transformers_is_named(name, module, monkeypatch):
    monkeypatch.delattr(transformers.configuration_utils, name)
    version = re.escape(transformers.__version__)
    install = r'pip install -U "transformers>=5\.23,<5\.25"'
    for loaded in ("transformers_version", *(f"configuration_{entry}" for entry in MODULES)):
        monkeypatch.delitem(sys.modules, f"med3dvlm.configuration.{loaded}", raising=False)
    with pytest.raises(ImportError, match=rf"needs transformers 5\.23 or later, found {version}: {install}"):
        importlib.import_module(f"med3dvlm.configuration.configuration_{module}")


def test_the_releases_that_are_asked_for_are_those_of_the_package():
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    assert f'"{transformers_version.REQUIREMENT}"' in project
    assert ",<{}.{}".format(*transformers_version.FIRST_UNTRIED) in transformers_version.REQUIREMENT


@pytest.mark.parametrize(
    "version, is_untried", [("5.24.9", False), ("5.25.0", True), ("5.25.0.dev0", True), ("6.0", True)]
)
def test_a_transformers_that_was_not_tried_is_told_of(version, is_untried, monkeypatch):
    said = []
    monkeypatch.setattr(logging.Logger, "warning", lambda self, message, *rest, **options: said.append(message))
    # Not the name of this file: transformers may have been loaded a second time, which puts another module there.
    monkeypatch.setattr(sys.modules["transformers"], "__version__", version)
    logging.Logger.warning_once.cache_clear()
    monkeypatch.delitem(sys.modules, transformers_version.__name__)
    importlib.import_module(transformers_version.__name__)
    assert [f"untried with transformers {version}" in message for message in said] == [True] * is_untried


def test_statistics_are_synchronised_only_when_asked_for():
    older = DCFormerConfig(**VISION).to_dict()
    del older["sync_batch_norm"]  # as in folders saved before there was this field
    assert DCFormerConfig.from_dict(older).sync_batch_norm is False
    assert DCFormerSiglipConfig(vision_config={**VISION, "sync_batch_norm": True}).vision_config.sync_batch_norm


def test_defaults_are_the_model_of_the_paper():
    config = Med3DVLMConfig()
    assert config.vision_config.to_dict() == DCFormerConfig.from_variant("small").to_dict()
    assert (config.low_level_tokens, config.high_level_tokens) == ((192, 128), (64, 128))
    assert config.image_size == (128, 256, 256) and config.image_seq_length == 256
    text = config.text_config
    assert (text.hidden_size, text.num_hidden_layers, text.vocab_size) == (3584, 28, 152064)
    assert text.rope_parameters["rope_theta"] == 1e6


@pytest.mark.parametrize("stage, expected", [(0, (8, 16, 24)), (-2, (1, 2, 3)), (-1, (1, 1, 2))])
def test_grid_follows_the_stride_rounded_up(stage, expected):
    config = DCFormerConfig(**VISION)
    assert config.grid(stage) == expected
    assert config.num_tokens(stage) == math.prod(expected)


@pytest.mark.parametrize("stage", [-6, 5])
def test_a_stage_that_is_not_there_has_no_grid(stage):
    with pytest.raises(IndexError):
        DCFormerConfig(**VISION).grid(stage)


@pytest.mark.parametrize(
    "projector_type, expected",
    [("mixer", 128 + 128), ("low_high_mlp", 6 + 2), ("mlp", 2), ("linear", 2)],
)
def test_image_seq_length_follows_the_projector(projector_type, expected):
    assert tiny_config(projector_type=projector_type).image_seq_length == expected
    prepended = tiny_config(projector_type=projector_type, prepend_image_token_embedding=True)
    assert prepended.image_seq_length == expected + 1


def test_image_size_is_written_once_and_leaves_the_callers_config_alone():
    vision_config = DCFormerConfig(**VISION)
    config = tiny_config(vision_config=vision_config, image_size=(64, 32, 16))
    assert config.image_size == tuple(config.vision_config.image_size) == (64, 32, 16)
    assert vision_config.image_size == (32, 64, 96)
    assert "image_size" not in {key for key in config.to_dict() if key != "vision_config"}


@pytest.mark.parametrize("config", [tiny_config(), DCFormerSiglipConfig(vision_config=VISION)])
def test_image_size_can_be_changed_when_a_configuration_is_loaded(config, tmp_path):
    config.save_pretrained(tmp_path)
    loaded = type(config).from_pretrained(tmp_path, image_size=(64, 32, 16))
    assert loaded.image_size == tuple(loaded.vision_config.image_size) == (64, 32, 16)
    with pytest.raises(StrictDataclassClassValidationError, match="three positive numbers"):
        type(config).from_pretrained(tmp_path, image_size=(64, 32))


def test_tied_embeddings_of_the_text_config_are_kept():
    assert tiny_config(text_config={**TEXT, "tie_word_embeddings": True}).tie_word_embeddings
    assert not tiny_config().tie_word_embeddings


@pytest.mark.parametrize("loss_type, expected", [("sigmoid", math.log(10)), ("softmax", math.log(1 / 0.07))])
def test_temperature_starts_where_the_loss_was_published(loss_type, expected):
    assert DCFormerSiglipConfig(loss_type=loss_type).logit_scale_init_value == pytest.approx(expected)


@pytest.mark.parametrize("variant", DCFORMER_VARIANTS)
def test_variants_have_one_entry_a_stage(variant):
    config = DCFormerConfig.from_variant(variant, image_size=(64, 64, 128))
    assert len(config.depths) == len(config.hidden_sizes) == len(config.kernel_sizes) == 5
    assert config.image_size == (64, 64, 128)


def granite(logits_scaling):
    return {**TEXT, "model_type": "granite", "logits_scaling": logits_scaling}


def test_a_language_model_that_scales_its_scores_by_one_is_taken():
    assert tiny_config(text_config=granite(1.0)).text_config.logits_scaling == 1


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: DCFormerConfig(depths=(1, 2)), "one entry for the stem and one per stage, got 5, 2 and 5"),
        (lambda: DCFormerConfig(image_size=(64, 64)), r"three positive numbers of voxels.*\(64, 64\)"),
        (lambda: DCFormerConfig(image_size=(64, 0, 64)), "three positive numbers"),
        (lambda: DCFormerConfig(kernel_sizes=(7, 12, 11, 9, 7)), "must be odd.*12"),
        (lambda: DCFormerConfig(depths=(2, 2, 3, 6, 2)), r"`depths\[0\]` must be 1.*got 2"),
        (lambda: DCFormerConfig(hidden_sizes=(64, 96, 0, 384, 768)), "must be positive"),
        (lambda: DCFormerConfig(image_size="big"), "image_size"),
        (lambda: DCFormerConfig.from_variant("huge"), "nano.*got 'huge'"),
        (lambda: Vit3DConfig(image_size=(100, 256, 256)), r"\(100, 256, 256\).*multiple of `patch_size`"),
        (lambda: Vit3DConfig(num_attention_heads=0), "`num_attention_heads` must be positive, got 0"),
        (lambda: DCFormerSiglipConfig(loss_type="triplet"), "'sigmoid', 'softmax'"),
        (lambda: DCFormerSiglipConfig(loss_chunk_size=0), "positive number of texts"),
        (lambda: DCFormerSiglipConfig(projection_dim=0), "`projection_dim` must be positive"),
        (lambda: tiny_config(image_token_id=99), "99 lies outside the vocabulary of 99 tokens"),
        (lambda: tiny_config(vision_config={"model_type": "resnet"}), r"\['dcformer', 'vit3d'\].*got 'resnet'"),
        (lambda: tiny_config(vision_config=ResNetConfig()), r"\['dcformer', 'vit3d'\].*got 'resnet'"),
        (lambda: tiny_config(vision_config=PreTrainedConfig()), r"\['dcformer', 'vit3d'\].*got ''"),
        (lambda: DCFormerSiglipConfig(vision_config=ResNetConfig()), r"\['dcformer', 'vit3d'\].*got 'resnet'"),
        (lambda: tiny_config(projector_type="qformer"), "'mixer'.*got qformer"),
        (lambda: tiny_config(projector_depth=0), "at least 1, got 0"),
        (lambda: tiny_config(low_level_tokens=()), "one positive number for each Mixer layer"),
        (lambda: tiny_config(low_level_tokens=(4,) * 7), "7 Mixer layers.*hidden size 32"),
        (lambda: tiny_config(vision_feature_layers=(-1,)), "two hidden states"),
        (lambda: tiny_config(vision_feature_layers=(-6, -1)), r"\(-6, -1\) must lie from -5 to 4.*'dcformer' has 5"),
        (lambda: tiny_config(vision_feature_layers=(3, 5), projector_type="mlp"), r"\(3, 5\) must lie from -5 to 4"),
        (
            lambda: tiny_config(vision_config={"model_type": "vit3d"}, vision_feature_layers=(-2, 13)),
            r"\(-2, 13\) must lie from -13 to 12.*'vit3d' has 13",
        ),
        (lambda: tiny_config(projector_type="mhsa"), "8 attention heads.*12 channels"),
        (lambda: tiny_config(text_config=granite(8.0)), "'granite' has `logits_scaling` 8.0, which .* does not have"),
        (lambda: tiny_config(text_config={**TEXT, "model_type": "cohere"}), "'cohere' has `logit_scale` 0.0625"),
        (lambda: tiny_config(text_config={**TEXT, "model_type": "gemma2"}), "`final_logit_softcapping` 30.0"),
        (
            lambda: tiny_config(text_config={**TEXT, "model_type": "falcon_h1", "lm_head_multiplier": 0.5}),
            "'falcon_h1' has `lm_head_multiplier` 0.5",
        ),
    ],
)
def test_impossible_values_are_refused_with_a_remedy(build, message):
    # `@strict` wraps the ValueError of a validator in its own type, which is not a ValueError.
    errors = (StrictDataclassClassValidationError, StrictDataclassFieldValidationError, ValueError)
    with pytest.raises(errors, match=message):
        build()
